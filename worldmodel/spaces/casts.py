"""What environments give, in the form that their spaces declare: nested values by flat names, numbers in the right dtype."""

from __future__ import annotations

import warnings
from collections.abc import Container, Mapping
from functools import cache
from typing import Any

import numpy as np


def join_path(path: tuple[Any, ...]) -> str:
    """`arm.angle` of the steps ("arm", "angle"), `pair.0` of ("pair", 0)."""
    return ".".join(map(str, path))


def flatten(value: Any, names: Container[str], path: tuple[Any, ...] = ()) -> dict[str, Any]:
    """{flat name: array} of nested dicts and tuples; a tuple that has one of the names is an array that somebody wrote so."""
    if isinstance(value, Mapping) or (isinstance(value, tuple) and not (path and join_path(path) in names)):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        return {name: x for step, part in items for name, x in flatten(part, names, (*path, step)).items()}
    return {join_path(path): value}


def numbers(value: Any) -> np.ndarray | None:
    """A list, a tensor or one number (or flag) as an array; None for anything else."""
    try:
        array = np.asarray(value)
    except Exception:  # a ragged list, a tensor on a GPU
        return None
    return array if array.dtype.kind in "biuf" else None


def cast(x: np.ndarray, dtype: np.dtype) -> np.ndarray | None:
    """A copy in `dtype`; None where that cannot represent one of the numbers. Only digits of floats may be lost."""
    if np.can_cast(x.dtype, dtype, "safe"):
        return np.array(x, dtype)
    with np.errstate(invalid="ignore", over="ignore"):
        converted = x.astype(dtype)
    if dtype.kind == "f":
        return converted if (np.isfinite(converted) | ~np.isfinite(x)).all() else None
    return converted if np.array_equal(converted, x) else None


def warning_due(x: np.ndarray, dtype: np.dtype) -> bool:
    """Whether to warn of a cast: digits may be lost, or floats stand for whole numbers."""
    return not (np.can_cast(x.dtype, dtype, "safe") or (x.dtype.kind in "iub" and dtype.kind in "iub"))


@cache
def warn_once(what: str, given: str, declared: str, remedy: str) -> None:
    """Warns once in a process that something is converted from now on."""
    warnings.warn(f"{what} comes as {given} where {declared} is declared; it is converted. {remedy}.", stacklevel=2)
