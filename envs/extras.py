"""Optional packages that environments need, and the extra of this project that brings each."""

from __future__ import annotations

import importlib
import re
from collections.abc import Collection
from importlib.util import find_spec

import gymnasium
from gymnasium import spaces

from worldmodel.errors import EnvError, MissingExtraError

EXTRAS = {"ale_py": "atari", "cv2": "atari", "Box2D": "box2d", "mujoco": "mujoco", "minigrid": "minigrid", "pygame": "render"}
"""Import name -> extra."""
REGISTERS = {
    re.compile(r"ALE/|.*(NoFrameskip|Deterministic)-v\d$"): "ale_py",
    re.compile(r"(MiniGrid|BabyAI)-"): "minigrid",
}
"""Ids that exist only once a package is imported."""
CATEGORIES = {re.compile(r"(MiniGrid|BabyAI)-"): {"image": (11, 6, 3)}}
"""Ids whose environments declare bytes where they observe categories, and how many of each, along the last side.

MiniGrid: the kind of an object, its colour, the state of a door; minigrid.core.constants has the lists.
"""


def register_for(env_id: str) -> None:
    """Imports the package that registers `env_id`, if one is known.

    Raises MissingExtraError where it is absent, EnvError where it is broken.
    """
    for pattern, module in REGISTERS.items():
        if pattern.match(env_id):
            try:
                gymnasium.register_envs(importlib.import_module(module))
            except Exception as error:
                if not isinstance(error, ImportError) or find_spec(module) is not None:
                    raise EnvError(
                        f"'{env_id}' comes with the package '{module}', which is installed and cannot be imported: {error}. "
                        "Correct that installation."
                    ) from error
                raise MissingExtraError(
                    f"'{env_id}' comes with the package '{module}', which is not installed. {install(EXTRAS[module])}"
                ) from error


def missing_extra(error: BaseException) -> MissingExtraError | None:
    """The error with the name of our extra, if `error` names one of its packages as absent, and it is."""
    if not isinstance(error, (ImportError, gymnasium.error.DependencyNotInstalled)):
        return None
    mentioned = {name.lower() for name in absent(error)}
    # Gymnasium wraps the import error in a sentence of its own, which may also name another package.
    if isinstance(error, gymnasium.error.DependencyNotInstalled) and not mentioned & {module.lower() for module in EXTRAS}:
        mentioned = set(re.findall(r"\w+", str(error).lower()))
    for module, extra in EXTRAS.items():
        if module.lower() in mentioned and find_spec(module) is None:
            return MissingExtraError(f"The environment needs the package '{module}', which is not installed. {install(extra)}")
    return None


def absent(error: BaseException | None) -> list[str]:
    """The packages that an error and its causes name as not installed."""
    names = []
    while error is not None:
        if isinstance(error, ModuleNotFoundError) and error.name:
            names.append(error.name.partition(".")[0])
        error = error.__cause__ or error.__context__
    return names


def remedy(error: BaseException, other: str) -> str:
    """Advice to install the package that an error names as absent, else `other`."""
    names = absent(error)
    return f"Install '{names[0]}'" if names else other


def known_categories(env_id: str | None, space: gymnasium.Space, ignore: Collection[str] = ()) -> dict[str, tuple[int, ...]]:
    """The entries of CATEGORIES for an id, where its observation has these keys, in bytes."""
    name = (env_id or "").rpartition(":")[2]
    return {
        key: sizes
        for pattern, keys in CATEGORIES.items()
        for key, sizes in keys.items()
        if pattern.match(name) and key not in ignore and isinstance(space, spaces.Dict)
        if isinstance(box := space.spaces.get(key), spaces.Box) and box.dtype == "uint8" and box.shape[-1:] == (len(sizes),)
    }


def install(extra: str) -> str:
    return f"Install it with: pip install 'worldmodel[{extra}]'"
