"""Nested observations by flat names: the steps to an array, joined with a dot."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
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


def stack(observations: Sequence[Any]) -> Any:
    """Single observations, arrays or dicts of arrays [...], as one batch [N, ...]."""
    if isinstance(observations[0], Mapping):
        return {name: np.stack([obs[name] for obs in observations]) for name in observations[0]}
    return np.stack(observations)
