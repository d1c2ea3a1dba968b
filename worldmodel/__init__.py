"""World models for Gymnasium and Stable-Baselines3.

The names below are resolved when they are first used: importing the package loads neither torch nor anything that
TensorBoard, which imports its plug-ins at every start, could wait for.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any

_MODULES = {
    "Config": "worldmodel.config",
    "ConfigError": "worldmodel.errors",
    "CorruptError": "worldmodel.errors",
    "EnvError": "worldmodel.errors",
    "MissingExtraError": "worldmodel.errors",
    "NumericsError": "worldmodel.errors",
    "Recording": "worldmodel.storage.recording",
    "Replay": "worldmodel.storage.replay",
    "Run": "worldmodel.storage.run",
    "StorageError": "worldmodel.errors",
    "TrainResult": "worldmodel.agents.training.session",
    "TrustError": "worldmodel.errors",
    "UnsupportedSpaceError": "worldmodel.errors",
    "WorldModel": "worldmodel.model",
    "dream": "worldmodel.commands.dream",
    "dreamed_episodes": "worldmodel.agents.exchange",
    "fit_prior": "worldmodel.commands.fit_prior",
    "train": "worldmodel.commands.train",
}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.metadata.version("worldmodel")
    if name not in _MODULES:
        raise AttributeError(f"module 'worldmodel' has no attribute '{name}'")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
