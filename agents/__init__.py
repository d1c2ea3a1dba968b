"""What acts. The names below are resolved when they are first used."""

from __future__ import annotations

import importlib
from typing import Any

_MODULES = {
    "DreamPolicy": "sb3.dream_training",
    "Dreamer": "dreamer",
    "DynaCallback": "sb3.dyna",
    "Interrupted": "training.signals",
    "JointWorldModel": "sb3.joint",
    "LatentExtractor": "sb3.extractor",
    "Planner": "planner",
    "RandomAgent": "random",
    "SB3Agent": "sb3.agent",
    "HeldOutCallback": "training.held_out_callback",
    "WorldModelAlgorithm": "loop",
    "dreamed_episodes": "exchange",
    "evaluate": "evaluation",
    "latent_policy_kwargs": "sb3.extractor",
    "train_in_dream": "sb3.dream_training",
}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'worldmodel.agents' has no attribute '{name}'")
    return getattr(importlib.import_module(f"worldmodel.agents.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
