"""World models for Gymnasium and Stable-Baselines3.

The names below are resolved when they are first used: importing the package loads neither torch nor anything that
TensorBoard, which imports its plug-ins at every start, could wait for.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any

_NAMES = {
    "agents.exchange": "dreamed_episodes",
    "agents.training.session": "TrainResult",
    "agents.comparison.sweeping": "Sweep",
    "agents.comparison.table": "Comparison",
    "agents.diagnosis": "Diagnosis",
    "commands.compare": "compare",
    "commands.diagnose": "diagnose",
    "commands.dream": "dream",
    "commands.fit_prior": "fit_prior",
    "commands.report": "report",
    "commands.sweep": "sweep",
    "commands.train": "train",
    "config": "Config",
    "errors": "ConfigError CorruptError EnvError MissingExtraError NumericsError StorageError TrustError UnsupportedSpaceError",
    "forecasts": "Forecast PlanRanking",
    "model": "WorldModel",
    "storage.recording": "Recording",
    "storage.replay": "Replay",
    "storage.run": "Run",
}
_MODULES = {name: f"worldmodel.{module}" for module, names in _NAMES.items() for name in names.split()}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.metadata.version("worldmodel")
    if name not in _MODULES:
        raise AttributeError(f"module 'worldmodel' has no attribute '{name}'")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
