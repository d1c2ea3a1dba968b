"""Numbers given in another dtype than the space declares."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import numpy as np


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
