"""World models for Gymnasium and Stable-Baselines3.

The names below are resolved when they are first used: importing the package loads neither torch nor anything that
TensorBoard, which imports its plug-ins at every start, could wait for.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any

_HOMES = {
    "Config": "worldmodel.config",
    "ConfigError": "worldmodel.errors",
    "CorruptError": "worldmodel.errors",
    "EnvError": "worldmodel.errors",
    "MissingExtraError": "worldmodel.errors",
    "NumericsError": "worldmodel.errors",
    "Recording": "worldmodel.recording",
    "Replay": "worldmodel.replay",
    "Run": "worldmodel.run",
    "StorageError": "worldmodel.errors",
    "TrainResult": "worldmodel.agents.train",
    "TrustError": "worldmodel.errors",
    "UnsupportedSpaceError": "worldmodel.errors",
    "WorldModel": "worldmodel.model",
    "fit_prior": "worldmodel.agents.two_stage",
    "train": "worldmodel.agents.train",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.metadata.version("worldmodel")
    if name not in _HOMES:
        raise AttributeError(f"module 'worldmodel' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
