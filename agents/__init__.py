"""What acts. The names below are resolved when they are first used."""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "Dreamer": "dreamer",
    "dream": "dreams",
    "DreamPolicy": "in_dream",
    "DynaCallback": "dyna",
    "dreamed_episodes": "exchange",
    "Interrupted": "train",
    "Planner": "planner",
    "JointWorldModel": "joint",
    "LatentExtractor": "extractor",
    "RandomAgent": "random",
    "SB3Agent": "sb3",
    "TrainResult": "train",
    "Watch": "watch",
    "WorldModelAlgorithm": "loop",
    "evaluate": "evaluation",
    "fit_prior": "two_stage",
    "train_in_dream": "in_dream",
    "latent_policy_kwargs": "extractor",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'worldmodel.agents' has no attribute '{name}'")
    return getattr(importlib.import_module(f"worldmodel.agents.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
