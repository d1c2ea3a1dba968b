"""Batched observations: an array [N, ...], or a dict of such arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def take(obs: Any, index: Any) -> Any:
    """The observations at `index`, a number, a slice or an array."""
    return {key: x[index] for key, x in obs.items()} if isinstance(obs, Mapping) else obs[index]


def copied(obs: Any) -> Any:
    """A copy in arrays; of one number, a NumPy number."""
    return {key: np.array(x) for key, x in obs.items()} if isinstance(obs, Mapping) else np.array(obs)[()]


def write(obs: Any, index: Any, value: Any) -> None:
    """Replaces the observations at `index` in place."""
    for old, new in [(obs[key], value[key]) for key in obs] if isinstance(obs, Mapping) else [(obs, value)]:
        old[index] = new


def describe(value: Any) -> str:
    """The type of a value, and its size, shape or keys, in a few words."""
    if isinstance(value, np.ndarray | np.generic):
        return f"an array of shape {value.shape}, dtype {value.dtype}"
    if isinstance(value, dict):
        return f"a dict with the keys {list(value)}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return f"{value!r}" if value is None or isinstance(value, bool | int | float | str) else f"of type {type(value).__name__}"
