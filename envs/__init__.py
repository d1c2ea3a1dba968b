"""Environments: real ones, small ones with known solutions, the learned world as an environment, and real ones observed through
its filter.

Importing this registers `Catch-v0`, `Chain-v0`, `Heating-v0`, `TwoRooms-v0` and `Imagined-v0` with Gymnasium (use them as
`worldmodel.envs:Catch-v0`) and loads nothing else: the names below are resolved when they are first used.
"""

from __future__ import annotations

import importlib
from typing import Any

import gymnasium

_MODULES = {
    "ActionRepeat": "wrappers",
    "Catch": "tiny",
    "Chain": "tiny",
    "CheckedEnv": "wrappers",
    "EnvConfig": "make",
    "FlattenSpaces": "wrappers",
    "GymVecEnvAdapter": "vectors.adapter",
    "Heating": "heating",
    "ImaginedEnv": "imagined",
    "ImaginedVecEnv": "imagined",
    "ImaginedVectorEnv": "imagined",
    "ImaginedWorld": "imagined",
    "LatentVecEnv": "latent",
    "MaskedActions": "masks",
    "MaskedVecEnv": "masks",
    "PlainVecEnv": "vectors.plain",
    "RenderObservation": "wrappers",
    "Scene": "draw",
    "TwoRooms": "tiny",
    "Viewer": "draw",
    "as_vec_env": "make",
    "check_vec_env": "vectors.check",
    "make_env": "make",
    "make_vec": "make",
    "scene": "draw",
}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'worldmodel.envs' has no attribute '{name}'")
    return getattr(importlib.import_module(f"worldmodel.envs.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]


gymnasium.register("Catch-v0", entry_point="worldmodel.envs.tiny:Catch", reward_threshold=0.9)
gymnasium.register("Chain-v0", entry_point="worldmodel.envs.tiny:Chain", reward_threshold=0.39)
gymnasium.register("Heating-v0", entry_point="worldmodel.envs.heating:Heating")
gymnasium.register("TwoRooms-v0", entry_point="worldmodel.envs.tiny:TwoRooms", reward_threshold=0.9)
gymnasium.register(
    "Imagined-v0",
    entry_point="worldmodel.envs.imagined:ImaginedEnv",
    vector_entry_point="worldmodel.envs.imagined:ImaginedVectorEnv",
)
