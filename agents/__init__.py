"""What acts. The names below are resolved when they are first used."""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "DreamPolicy": "sb3.dream_training",
    "Dreamer": "dreamer",
    "DynaCallback": "sb3.dyna",
    "Interrupted": "training.signals",
    "JointWorldModel": "sb3.joint",
    "LatentExtractor": "sb3.extractor",
    "Planner": "planner",
    "RandomAgent": "random",
    "SB3Agent": "sb3.agent",
    "Watch": "training.watch",
    "WorldModelAlgorithm": "loop",
    "dreamed_episodes": "exchange",
    "evaluate": "evaluation",
    "latent_policy_kwargs": "sb3.extractor",
    "train_in_dream": "sb3.dream_training",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'worldmodel.agents' has no attribute '{name}'")
    return getattr(importlib.import_module(f"worldmodel.agents.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
