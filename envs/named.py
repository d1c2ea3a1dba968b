"""Modules and wrapper classes that an `env` config names: imported where an environment is made, and nowhere else."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import pkgutil
import re
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import gymnasium as gym

from worldmodel.envs.extras import missing_extra, remedy
from worldmodel.errors import ConfigError, EnvError, did_you_mean

FORM = "module:Class, or {module:Class: {argument: value}}"
NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def imported(module: str, where: str, purpose: str) -> ModuleType:
    """The module that a config names. `where` begins every message, `purpose` says what it is imported for.

    Raises ConfigError where it is not there (with the nearest name), MissingExtraError, EnvError where importing it raises.
    """
    try:
        return importlib.import_module(module)
    except (Exception, SystemExit) as error:
        extra = missing_extra(error)
        if extra is not None:
            raise extra from error
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            raise ConfigError(
                f"{where}: the module '{module}' could not be imported ({error}).{_near(error.name or module)} Expected an "
                f"installed module that {purpose}, or {module.replace('.', '/')}.py in the current folder, {os.getcwd()}."
            ) from error
        raise EnvError(
            f"{where}: the module '{module}' is there, and importing it raised {type(error).__name__}: {error}. "
            f"{remedy(error, 'Correct it')}."
        ) from error


def _near(absent: str) -> str:
    """ " Did you mean 'gymnasium.wrappers'?" of the modules beside the one that is absent; "" where none is near."""
    package, _, _ = absent.rpartition(".")
    folders = getattr(sys.modules.get(package), "__path__", []) if package else None
    return did_you_mean(absent, [f"{package}.{found.name}".lstrip(".") for found in pkgutil.iter_modules(folders)], near_only=True)


def named_wrapper(entry: Any) -> tuple[str, dict[str, Any]]:
    """(module:Class, its arguments) of one entry of `env.wrappers`. Raises ValueError for any other form."""
    if isinstance(entry, str):
        entry = {entry: {}}
    if not isinstance(entry, Mapping) or len(entry) != 1:
        raise ValueError(f"{entry!r} names no wrapper. Expected {FORM}.")
    ((name, kwargs),) = entry.items()
    if not isinstance(name, str) or not NAME.fullmatch(name):
        near = f" Did you mean 'gymnasium.wrappers:{name}'?" if str(name) in gym.wrappers.__all__ else ""
        raise ValueError(f"{name!r} names no class.{near} Expected {FORM}.")
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise ValueError(f"{name} has {kwargs!r} for arguments. Expected {{{name}: {{argument: value}}}}.")
    return name, dict(kwargs or {})


def wrapper_class(name: str) -> type[gym.Wrapper]:
    """The class under `module:Class`. ConfigError where there is none, or it is no gymnasium.Wrapper; else as `imported` does.

    No other callable will do: else a file could call any function that is installed.
    """
    where, (module_name, _, attribute) = f"env.wrappers '{name}'", name.partition(":")
    module = imported(module_name, where, "holds the wrapper")
    try:
        found = getattr(module, attribute)
    except AttributeError as error:
        others = [word for word, value in vars(module).items() if _is_wrapper(value)]
        raise ConfigError(f"{where}: {error}.{did_you_mean(attribute, others)}") from error
    except Exception as error:  # of what the module loads only now
        raise EnvError(f"{where}: loading it raised {type(error).__name__}: {error}. {remedy(error, 'Correct it')}.") from error
    if not _is_wrapper(found):
        what = f"the class {found.__name__}" if isinstance(found, type) else f"of type {type(found).__name__}"
        raise ConfigError(
            f"{where} is {what}; expected a subclass of gymnasium.Wrapper, and nothing else is called. Write one whose constructor "
            "takes the environment and plain data, and name that."
        )
    return found


def _is_wrapper(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, gym.Wrapper)


def wrapped(env: gym.Env, name: str, kwargs: Mapping[str, Any], place: str) -> gym.Env:
    """The environment in a wrapper; where that fails, the environment is closed.

    Raises ConfigError (no such wrapper, or none that takes these arguments), MissingExtraError, EnvError (its constructor raised).
    """
    try:
        wrapper = wrapper_class(name)
        _require_arguments(wrapper, name, kwargs)
        try:
            return wrapper(env, **kwargs)
        except Exception as error:
            extra = missing_extra(error)
            if extra is not None:
                raise extra from error
            advice = remedy(error, "Correct env.wrappers, or env.kwargs where it asks for another environment")
            raise EnvError(
                f"{place} could not be wrapped in {name}{dict(kwargs) or ''}: it raised {type(error).__name__}: {error}. {advice}."
            ) from error
    except BaseException:
        with contextlib.suppress(Exception):
            env.close()
        raise


def _require_arguments(wrapper: type[gym.Wrapper], name: str, kwargs: Mapping[str, Any]) -> None:
    """ConfigError where the constructor does not take an environment and these arguments."""
    signature = inspect.signature(wrapper)
    try:
        signature.bind(None, **kwargs)
    except TypeError as error:
        known = [
            word for word, one in list(signature.parameters.items())[1:] if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)
        ]
        unknown = [word for word in kwargs if word not in known]
        hint = did_you_mean(unknown[0], known) if unknown else ""
        raise ConfigError(
            f"env.wrappers '{name}' does not take {dict(kwargs)}: {error}.{hint} Expected values for "
            f"{', '.join(known) or 'no argument'}, beside the environment."
        ) from error
