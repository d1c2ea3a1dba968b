"""Names for parts: (role, kind) -> (config class, class).

Each module registers its own parts; a file can only name what is registered, never an import path, so reading a config runs
no code. A name that is not registered yet is looked for in `MODULES` and in the installed entry points of the group
`worldmodel.parts` (modules that register parts when they are imported).
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, get_args

from worldmodel.errors import ConfigError, did_you_mean

# From the lower layers to the upper ones: a search stops at the first module that has the name.
MODULES: tuple[str, ...] = (
    "worldmodel.encoders",
    "worldmodel.decoders",
    "worldmodel.heads",
    "worldmodel.ensemble",
    "worldmodel.distributions",
    "worldmodel.dynamics",
    "worldmodel.diamond",
    "worldmodel.objectives",
    "worldmodel.model",
    "worldmodel.learner",
    "worldmodel.storage.run",
    "worldmodel.envs.make",
    "worldmodel.agents.evaluation",
    "worldmodel.agents.loop",
    "worldmodel.agents.dreamer",
    "worldmodel.agents.planner",
    "worldmodel.agents.random",
    "worldmodel.agents.sb3.agent",
    "worldmodel.agents.training.report",
)
ENTRY_POINTS = "worldmodel.parts"

Class = TypeVar("Class", bound=type)


class Entry(NamedTuple):
    config: type
    part: type


_entries: dict[tuple[str, str], Entry] = {}
_loaded_entry_points = False


def register(role: str, kind: str, config: type | None = None) -> Callable[[Class], Class]:
    """Decorator: the class below is the `kind` of `role`, configured by `config`.

    Without `config` the class is its own config: `@register("group", "train")` on `class TrainConfig(Frozen)`.
    Where `config` has a field `kind`, it must be a Literal that holds this kind. TypeError otherwise;
    ConfigError where another class already has the name.
    """

    def add(part: Class) -> Class:
        entry = Entry(config or part, part)
        field = getattr(entry.config, "model_fields", {}).get("kind")
        if role != "group" and (field is None or kind not in get_args(field.annotation)):
            name = entry.config.__name__
            raise TypeError(f"{name} configures {role} '{kind}': give it a field `kind: Literal[{kind!r}] = {kind!r}`.")
        known = _entries.get((role, kind))
        if known is not None and _origin(known.part) != _origin(part):
            raise ConfigError(f"{role} '{kind}' is already {_origin(known.part)}. Choose another name for {_origin(part)}.")
        _entries[role, kind] = entry
        return part

    return add


def _origin(part: type) -> str:
    return f"{part.__module__}.{part.__qualname__}"


def config_class(role: str, kind: str) -> type:
    """The config class of a part. ConfigError with the nearest name where there is none."""
    return _find(role, kind).config


def part(role: str, kind: str) -> type:
    """The class of a part. ConfigError with the nearest name where there is none."""
    return _find(role, kind).part


def build(role: str, config: Any, *args: Any, **kwargs: Any) -> Any:
    """The part that `config.kind` names, made with the config and the other arguments."""
    return part(role, config.kind)(config, *args, **kwargs)


def kinds(role: str) -> list[str]:
    """Every kind of a role, sorted; imports all modules."""
    load()
    return sorted(k for r, k in _entries if r == role)


def entries() -> list[tuple[str, str, type]]:
    """(role, kind, config class) of everything registered, sorted; imports all modules."""
    load()
    return [(role, kind, _entries[role, kind].config) for role, kind in sorted(_entries)]


def has(role: str, kind: str) -> bool:
    """Whether the part exists; imports modules until it is found."""
    load(until=(role, kind))
    return (role, kind) in _entries


def load(until: tuple[str, str] | None = None) -> None:
    """Import the modules, then the entry points, stopping as soon as `until` is registered."""
    for module in MODULES:
        if until in _entries:
            return
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module:  # the module is there, but something that it needs is not
                raise
    if until not in _entries:
        _load_entry_points()


def _load_entry_points() -> None:
    global _loaded_entry_points
    if _loaded_entry_points:
        return
    _loaded_entry_points = True
    for point in sorted(importlib.metadata.entry_points(group=ENTRY_POINTS), key=lambda p: (p.name, p.value)):
        try:
            point.load()
        except Exception as error:
            _loaded_entry_points = False
            raise ConfigError(
                f"The installed plug-in '{point.name}' ({point.value}) failed on import: {error!r}. Repair or uninstall it."
            ) from error


def _find(role: str, kind: str) -> Entry:
    if has(role, kind):
        return _entries[role, kind]
    near = did_you_mean(kind, kinds(role))
    own = f" If '{kind}' is yours, import its module first, or install a package that names it under '{ENTRY_POINTS}'."
    raise ConfigError(f"no {role} is called '{kind}'.{near}{'' if near.startswith(' Did') else own}")
