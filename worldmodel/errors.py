"""The named errors. Each message says what is wrong, what was expected and what to do."""

from __future__ import annotations

import difflib
import numbers
from collections.abc import Collection, Iterable
from typing import Any


class ConfigError(ValueError):
    """A recipe, an override or an argument does not fit."""

    exit_code = 2


class UnsupportedSpaceError(ValueError):
    """A Gymnasium space that has no canonical tensor form here."""

    exit_code = 2


class MissingExtraError(ImportError):
    """An optional dependency is absent; the message names the extra that brings it."""

    exit_code = 2


class TrustError(PermissionError):
    """Opening this file would run code from it."""

    exit_code = 2


class EnvError(RuntimeError):
    """The environment raised, hung or returned what its spaces do not allow."""

    exit_code = 3


class StorageError(OSError):
    """A file could not be written or read: damaged, full, read-only or taken by another writer."""

    exit_code = 4


class CorruptError(StorageError):
    """A file is not what its checksum says it was."""


class NumericsError(ArithmeticError):
    """A loss, gradient or parameter is not finite."""

    exit_code = 5


def did_you_mean(name: str, known: Iterable[str], near_only: bool = False) -> str:
    """`" Did you mean 'deter'?"`; where nothing is near all choices, or with `near_only` nothing. Starts with a space."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.55)
    if near:
        return " Did you mean " + " or ".join(f"'{n}'" for n in near) + "?"
    return f" Known: {', '.join(known)}." if known and not near_only else ""


def require_whole(prefix: str = "", **values: Any) -> None:
    """ConfigError where one of the named values is no whole number of at least 1; the message begins with `prefix`."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
            raise ConfigError(f"{prefix}{name} is {value!r}; expected a whole number of at least 1.")


def require_choice(name: str, value: Any, known: Collection[str]) -> None:
    """ConfigError where a value is none of the known ones."""
    if value not in known:
        raise ConfigError(f"{name} is {value!r}; expected one of {tuple(known)}.{did_you_mean(str(value), known)}")
