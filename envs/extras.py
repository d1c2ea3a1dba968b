"""Optional packages that environments need, and the extra of this project that brings each."""

from __future__ import annotations

import importlib
import re

import gymnasium

from worldmodel.errors import MissingExtraError

EXTRAS = {"ale_py": "atari", "box2d": "box2d", "mujoco": "mujoco", "minigrid": "minigrid", "pygame": "render"}
"""Import name, lower case -> extra."""
REGISTERS = {
    re.compile(r"ALE/|.*(NoFrameskip|Deterministic)-v\d$"): "ale_py",
    re.compile(r"(MiniGrid|BabyAI)-"): "minigrid",
}
"""Ids that exist only once a package is imported."""


def register_for(env_id: str) -> None:
    """Import the package that registers `env_id`, if one is known to. Raises MissingExtraError where it is absent."""
    for pattern, module in REGISTERS.items():
        if pattern.match(env_id):
            try:
                gymnasium.register_envs(importlib.import_module(module))
            except ImportError as error:
                raise MissingExtraError(
                    f"'{env_id}' comes with the package '{module}', which is not installed. {install(EXTRAS[module])}"
                ) from error


def missing_extra(error: BaseException) -> MissingExtraError | None:
    """The error that names our extra, if `error` says that one of its packages is absent."""
    if not isinstance(error, (ImportError, gymnasium.error.DependencyNotInstalled)):
        return None
    # Gymnasium wraps the import error in a sentence of its own, which may name a second package in passing.
    named = [getattr(e, "name", None) or "" for e in (error, error.__cause__, error.__context__) if e is not None]
    for text in (*named, str(error)):
        for module, extra in EXTRAS.items():
            if module in text.lower():
                return MissingExtraError(f"The environment needs the package '{module}', which is not installed. {install(extra)}")
    return None


def install(extra: str) -> str:
    return f"Install it with: pip install 'worldmodel[{extra}]'"
