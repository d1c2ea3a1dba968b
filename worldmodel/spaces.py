"""Gymnasium spaces <-> canonical tensors: the only place where observations and actions change form.

| space | kind | canonical event |
|---|---|---|
| Box, 3-D, or 2-D with both sides >= 16 | image | float [C, H, W] in [0, 1] |
| Box of any other shape, float or integer | vector | float [D], values as they are |
| Discrete, MultiDiscrete | categorical | one-hot groups side by side, [D] |
| MultiBinary, Box of bool | binary | 0.0 or 1.0, [D] |

Actions: Box -> [-1, 1] per dimension, Discrete and MultiDiscrete -> one-hot groups, MultiBinary -> 0 or 1; all flat [A].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from gymnasium import spaces as gym_spaces
from torch import Tensor

from worldmodel.casts import cast, needs_word, numbers, tell
from worldmodel.errors import EnvError, NumericsError, UnsupportedSpaceError
from worldmodel.layouts import Layout, image_layout

Where = str | Callable[[int], str]

MAX_CATEGORIES = 65536
"""One-hot groups wider than this would fill the memory before they taught anything."""
FLOAT32_MAX = float(np.finfo(np.float32).max)

FLATTEN = "worldmodel.envs.FlattenSpaces"
TRANSFORM_OBS = "gymnasium.wrappers.TransformObservation"
TRANSFORM_ACTION = "gymnasium.wrappers.TransformAction"


@dataclass(frozen=True, eq=False)
class KeySpec:
    """One key of an observation (or the action): its raw form, and the canonical one.

    shape      canonical event shape: image (C, H, W), else (D,)
    raw_shape  shape of one raw value; raw_dtype its numpy dtype
    layout     of an image: "hwc", "chw" or "hw" (grey); else None
    sizes      categorical: categories of each group; start: the smallest raw value of each group
    low, high  raw bounds with raw_dtype and raw_shape (images: 0-d, the same for all pixels); None unless Box
    """

    name: str
    kind: Literal["image", "vector", "categorical", "binary"]
    shape: tuple[int, ...]
    raw_shape: tuple[int, ...]
    raw_dtype: np.dtype
    layout: Literal["hwc", "chw", "hw"] | None = None
    sizes: tuple[int, ...] = ()
    start: tuple[int, ...] = ()
    low: np.ndarray | None = None
    high: np.ndarray | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, KeySpec) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash((self.name, self.kind, self.raw_shape, self.raw_dtype.str))

    @property
    def space(self) -> gym_spaces.Space:
        """The Gymnasium space that this was made from (without its random state)."""
        if self.low is not None:
            low, high = (np.broadcast_to(b, self.raw_shape).copy() for b in (self.low, self.high))
            return gym_spaces.Box(low, high, shape=self.raw_shape, dtype=self.raw_dtype.type)
        if self.kind == "binary":
            return gym_spaces.MultiBinary(self.raw_shape[0] if len(self.raw_shape) == 1 else self.raw_shape)
        if not self.raw_shape:
            return gym_spaces.Discrete(self.sizes[0], start=self.start[0])
        sizes, start = (np.array(v, self.raw_dtype).reshape(self.raw_shape) for v in (self.sizes, self.start))
        return gym_spaces.MultiDiscrete(sizes, dtype=self.raw_dtype.type, start=start)

    def canonical(self, x: Tensor) -> Tensor:
        """[..., *raw_shape] in any dtype -> float32 [..., *shape]. Raises ValueError where the raw shape does not fit."""
        lead = x.shape[: x.ndim - len(self.raw_shape)]
        if x.shape[len(lead) :] != self.raw_shape:
            raise ValueError(f"Observation '{self.name}' has shape {tuple(x.shape)}; expected [..., {self.raw_shape}].")
        if self.kind == "image":
            if self.layout == "hw":
                x = x.unsqueeze(-3)
            elif self.layout == "hwc":
                x = x.movedim(-1, -3)
            x = x.contiguous()  # while it is still small: permuting floats costs half as much again
            if x.dtype == torch.float32:
                return x / float(self.high)
            return x.to(torch.float32).div_(float(self.high))
        x = x.reshape(*lead, -1) if lead or self.raw_shape else x.reshape(1)
        if self.kind != "categorical":
            return x.to(torch.float32)
        shift, offset = _group_constants(self.sizes, self.start, x.device)
        out = torch.zeros(*lead, *self.shape, dtype=torch.float32, device=x.device)
        return out.scatter_(-1, x.to(torch.int64) - shift + offset, 1.0)

    def raw(self, x: Tensor | np.ndarray) -> np.ndarray:
        """[..., *shape] -> [..., *raw_shape] in the raw dtype: rounded, inside the bounds; categories by argmax."""
        x = x.detach().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)
        lead = x.shape[: x.ndim - len(self.shape)]
        if x.shape[len(lead) :] != self.shape:
            raise ValueError(f"Canonical '{self.name}' has shape {x.shape}; expected [..., {self.shape}].")
        if self.kind == "image":
            x = x * float(self.high)
            x = np.moveaxis(x, -3, -1) if self.layout == "hwc" else x[..., 0, :, :] if self.layout == "hw" else x
        elif self.kind == "categorical":
            x = _argmax_groups(x, self.sizes) + np.array(self.start)
        elif self.kind == "binary":
            x = x > 0.5
        x = x.reshape(*lead, *self.raw_shape)
        if self.low is None or self.kind == "binary":
            return x.astype(self.raw_dtype)
        return _into_bounds(x, self.low, self.high, self.raw_dtype)

    def fault(self, rows: np.ndarray) -> tuple[np.ndarray, str] | None:
        """(bad rows [N] bool, what is wrong) of raw rows [N, *raw_shape]; None where all is well."""
        flat = rows.reshape(len(rows), -1)
        if self.raw_dtype.kind == "f":
            limit = FLOAT32_MAX if self.raw_dtype.itemsize > 4 else np.inf
            bad = ~np.isfinite(flat) if limit == np.inf else ~(np.abs(flat) <= limit)
            if bad.any():
                return bad.any(1), f"is not a finite 32-bit float ({flat[bad][0]})"
        if self.kind == "image" and (self.raw_dtype.kind == "f" or self.high < 255):
            slack = 1e-3 * float(self.high) if self.raw_dtype.kind == "f" else 0
            bad = (flat < -slack) | (flat > self.high + slack)
            if bad.any():
                return bad.any(1), f"holds {flat[bad][0]}, outside the space's bounds [0, {self.high}]"
        if self.kind == "categorical":
            bad = (flat < np.array(self.start)) | (flat >= np.array(self.start) + np.array(self.sizes))
            if bad.any():
                return bad.any(1), f"holds {flat[bad][0]}, which is no category of {self.space}"
        if self.kind == "binary" and self.raw_dtype.kind != "b" and (flat > 1).any() | (flat < 0).any():
            return ((flat > 1) | (flat < 0)).any(1), f"holds {flat.max()}; expected 0 or 1"
        return None

    def to_json(self) -> dict[str, Any]:
        """Finite JSON (infinite bounds as strings) from which `from_json` makes an equal KeySpec."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        bounds = {"low": _bound_to_json(self.low), "high": _bound_to_json(self.high)}
        return {**values, **bounds, "raw_dtype": self.raw_dtype.name}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> KeySpec:
        values = dict(data)
        dtype = np.dtype(values["raw_dtype"])
        shape = () if values["kind"] == "image" else tuple(values["raw_shape"])
        for name in ("shape", "raw_shape", "sizes", "start"):
            values[name] = tuple(values[name])
        bounds = {name: _bound_from_json(values[name], shape, dtype) for name in ("low", "high")}
        return cls(**{**values, **bounds, "raw_dtype": dtype})


@dataclass(frozen=True)
class ObsSpec:
    """What an observation is: its keys, in the space's order. A space that is no Dict is the one key "obs" (single)."""

    keys: dict[str, KeySpec]
    single: bool = False

    @classmethod
    def from_space(cls, space: gym_spaces.Space, layout: Layout | Mapping[str, Layout] | None = None) -> ObsSpec:
        """The spec of a space; `layout` (for all image-shaped Boxes, or by key) settles what shapes leave open.

        Raises UnsupportedSpaceError with the key, the reason and the wrapper to use.
        """
        single = not isinstance(space, gym_spaces.Dict)
        items = {"obs": space} if single else dict(space.spaces)
        if not items:
            raise UnsupportedSpaceError(
                "The observation space is an empty Dict. Expected at least one key: there is nothing to see otherwise."
            )
        keys = {}
        for name, sub in items.items():
            if not isinstance(name, str):
                raise UnsupportedSpaceError(f"Observation key {name!r} is no string. Expected string keys; {FLATTEN} renames them.")
            declared = layout.get(name) if isinstance(layout, Mapping) else layout
            keys[name] = _observation_key(name, sub, declared)
        return cls(keys, single)

    @property
    def space(self) -> gym_spaces.Space:
        """The Gymnasium space that this was made from."""
        parts = {name: key.space for name, key in self.keys.items()}
        return parts["obs"] if self.single else gym_spaces.Dict(parts)

    @property
    def store(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """{key: (raw shape, raw dtype)}: what a replay needs to know."""
        return {name: (key.raw_shape, key.raw_dtype) for name, key in self.keys.items()}

    def to_rows(self, obs: Any, where: Where = "the observation") -> dict[str, np.ndarray]:
        """Batched observation (array or dict of arrays [N, ...]) -> {key: [N, *raw_shape]} in the raw dtype, copied.

        Other kinds of numbers are converted, with one warning where digits may be lost. Raises EnvError for missing or extra keys,
        another shape, or numbers that the dtype does not hold.
        """
        given = {"obs": obs} if self.single and not isinstance(obs, Mapping) else obs
        self._same_keys(given, where)
        return {name: _raw_array(key, given[name], where) for name, key in self.keys.items()}

    def check(self, rows: Mapping[str, np.ndarray], where: Where = "the observation") -> None:
        """Raise EnvError unless every row is of its space: keys, shapes, dtypes, finite numbers, categories.

        where: the place to name, or a function from the row's index to it ("environment 3, episode 12, step 40").
        Vectors may leave their declared bounds: canonical vectors do not depend on them.
        """
        self._same_keys(rows, where)
        for name, key in self.keys.items():
            row = rows[name]
            if row.shape[1:] != key.raw_shape or row.dtype != key.raw_dtype:
                raise EnvError(
                    f"{_place(where, 0)}: observation '{name}' is {row.dtype} {row.shape[1:]}; "
                    f"expected {key.raw_dtype} {key.raw_shape}. Correct the environment or its observation_space."
                )
            fault = key.fault(row)
            if fault is not None:
                bad, what = fault
                raise EnvError(
                    f"{_place(where, int(bad.argmax()))}: observation '{name}' {what}. Expected values of {key.space}. "
                    "Correct the environment, or wrap it."
                )

    def canonical(self, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """{key: [..., *raw_shape]} -> {key: float32 [..., *shape]}; any leading dimensions, any device."""
        return {name: key.canonical(rows[name]) for name, key in self.keys.items()}

    def raw(self, canonical: Mapping[str, Tensor | np.ndarray]) -> dict[str, np.ndarray]:
        """Inverse of `canonical`, as numpy arrays: rounded, inside the bounds, categories by argmax."""
        return {name: key.raw(canonical[name]) for name, key in self.keys.items()}

    def to_env(self, rows: Mapping[str, np.ndarray]) -> Any:
        """Rows as the environment gives them: the array itself where the space is no Dict."""
        return rows["obs"] if self.single else dict(rows)

    def to_json(self) -> dict[str, Any]:
        return {"single": self.single, "keys": [key.to_json() for key in self.keys.values()]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ObsSpec:
        keys = [KeySpec.from_json(key) for key in data["keys"]]
        return cls({key.name: key for key in keys}, bool(data["single"]))

    def _same_keys(self, given: Any, where: Where) -> None:
        if not isinstance(given, Mapping):
            raise EnvError(f"{_place(where, 0)}: got {type(given).__name__}; expected a dict with the keys {sorted(self.keys)}.")
        if given.keys() != self.keys.keys():
            missing, extra = sorted(self.keys.keys() - given.keys()), sorted(map(str, given.keys() - self.keys.keys()))
            raise EnvError(
                f"{_place(where, 0)}: missing observation keys {missing}, extra keys {extra}. "
                f"Expected {sorted(self.keys)}: correct the environment or its observation_space."
            )


@dataclass(frozen=True)
class ActionSpec:
    """What an action is: a flat float vector [A] here, whatever the space wants there.

    dim    A
    kind   "continuous" (Box, in [-1, 1]), "categorical" (one-hot groups) or "binary" (0 or 1)
    sizes  width of each categorical group
    """

    dim: int
    kind: Literal["continuous", "categorical", "binary"]
    sizes: tuple[int, ...]
    key: KeySpec

    @classmethod
    def from_space(cls, space: gym_spaces.Space) -> ActionSpec:
        """Raises UnsupportedSpaceError with the reason and the wrapper to use."""
        if isinstance(space, gym_spaces.Box):
            if np.dtype(space.dtype).kind != "b" and not (np.isfinite(space.low).all() and np.isfinite(space.high).all()):
                raise UnsupportedSpaceError(
                    f"The action space {space} has infinite bounds, so it has no scale to learn in. Expected finite bounds in "
                    f"every dimension. Wrap the environment in {TRANSFORM_ACTION} with a bounded Box, for example Box(-1, 1)."
                )
            key = _box_key("action", space, "vector")
        else:
            key = _finite_key("action", space)
        if key is None:
            raise _unsupported("action", "action", space)
        kind = "continuous" if key.kind == "vector" else key.kind
        return cls(key.shape[0], kind, key.sizes, key)

    @property
    def space(self) -> gym_spaces.Space:
        """The Gymnasium space that this was made from."""
        return self.key.space

    def encode(self, env_actions: np.ndarray) -> np.ndarray:
        """The environment's actions [N, ...] -> canonical float32 [N, A]. Raises ValueError for another shape or category."""
        actions = np.asarray(env_actions)
        if actions.shape[1:] != self.key.raw_shape:
            raise ValueError(f"Actions have shape {actions.shape}; expected [N, {self.key.raw_shape}] of {self.space}.")
        if self.kind == "continuous":
            middle, half = self._affine
            unit = (actions.reshape(len(actions), -1).astype(np.float64) - middle) / np.where(half > 0, half, 1)
            return np.where(half > 0, np.clip(unit, -1, 1), 0).astype(np.float32)
        fault = self.key.fault(actions)
        if fault is not None:
            raise ValueError(f"Action of row {int(fault[0].argmax())} {fault[1]}.")
        return self.key.canonical(torch.as_tensor(actions)).numpy()

    def decode(self, canonical: np.ndarray | Tensor) -> np.ndarray:
        """Canonical [N, A] -> actions for the environment, in its dtype and shape, always inside its bounds.

        Raises NumericsError where a number is NaN.
        """
        x = canonical.detach().cpu().numpy() if isinstance(canonical, Tensor) else np.asarray(canonical)
        if np.isnan(x).any():
            raise NumericsError("An action is NaN; expected finite numbers. The policy's parameters or its input are broken.")
        if self.kind == "continuous":
            middle, half = self._affine
            x = middle + np.clip(x.astype(np.float64), -1, 1) * half
        return self.key.raw(x)

    def project(self, action: Tensor) -> Tensor:
        """[..., A] into the canonical range: continuous actions are clamped to [-1, 1], others come back as they are."""
        return action.clamp(-1, 1) if self.kind == "continuous" else action

    def sample(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """float32 [n, A], uniform over the space."""
        if self.kind == "binary":
            return rng.integers(0, 2, (n, self.dim)).astype(np.float32)
        if self.kind == "categorical":
            sizes = np.array(self.sizes)
            index = rng.integers(0, sizes, (n, len(sizes))) + _offsets(self.sizes)
            out = np.zeros((n, self.dim), np.float32)
            np.put_along_axis(out, index, 1.0, axis=1)
            return out
        if self.key.raw_dtype.kind in "iu":
            low, high = (b.astype(self.key.raw_dtype) for b in (self.key.low, self.key.high))
            return self.encode(rng.integers(low, high, (n, *self.key.raw_shape), dtype=self.key.raw_dtype, endpoint=True))
        return rng.uniform(-1, 1, (n, self.dim)).astype(np.float32)

    def to_json(self) -> dict[str, Any]:
        return {"dim": self.dim, "kind": self.kind, "sizes": list(self.sizes), "key": self.key.to_json()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ActionSpec:
        return cls(int(data["dim"]), data["kind"], tuple(data["sizes"]), KeySpec.from_json(data["key"]))

    @property
    def _affine(self) -> tuple[np.ndarray, np.ndarray]:
        # Halved before they are added: the span of two huge bounds overflows.
        low, high = (b.reshape(-1).astype(np.float64) / 2 for b in (self.key.low, self.key.high))
        return low + high, high - low


def _observation_key(name: str, space: gym_spaces.Space, layout: Layout | None) -> KeySpec:
    key = _box_key(name, space, layout) if isinstance(space, gym_spaces.Box) else _finite_key(name, space)
    if key is None:
        raise _unsupported("observation", name, space)
    return key


def _finite_key(name: str, space: gym_spaces.Space) -> KeySpec | None:
    """The KeySpec of Discrete, MultiDiscrete or MultiBinary; None for any other space."""
    if isinstance(space, gym_spaces.MultiBinary):
        return KeySpec(name, "binary", (int(np.prod(space.shape)),), tuple(space.shape), np.dtype(space.dtype))
    if isinstance(space, gym_spaces.Discrete):
        sizes, start = (int(space.n),), (int(space.start),)
    elif isinstance(space, gym_spaces.MultiDiscrete):
        sizes = tuple(int(n) for n in space.nvec.reshape(-1))
        start = tuple(int(n) for n in np.broadcast_to(getattr(space, "start", 0), space.nvec.shape).reshape(-1))
    else:
        return None
    if sum(sizes) > MAX_CATEGORIES:
        raise UnsupportedSpaceError(
            f"'{name}' ({space}) has {sum(sizes)} categories, too many for one-hot vectors. Expected at most {MAX_CATEGORIES}. "
            f"Turn the index into numbers or into several smaller groups with {TRANSFORM_OBS} or {TRANSFORM_ACTION}."
        )
    return KeySpec(name, "categorical", (sum(sizes),), tuple(space.shape), np.dtype(space.dtype), sizes=sizes, start=start)


def _box_key(name: str, space: gym_spaces.Box, layout: Layout | None) -> KeySpec:
    dtype, shape = np.dtype(space.dtype), tuple(space.shape)
    if int(np.prod(shape)) == 0:
        raise UnsupportedSpaceError(f"'{name}' ({space}) holds no numbers. Leave it out with gymnasium.wrappers.FilterObservation.")
    try:
        torch.from_numpy(np.zeros(1, dtype))
    except TypeError as error:
        raise UnsupportedSpaceError(
            f"'{name}' has dtype {dtype}, which torch does not hold. Expected float64 or smaller. Convert it with {TRANSFORM_OBS}."
        ) from error
    image = None if dtype.kind == "b" else image_layout(name, space, layout)
    if image is None:
        kind = "binary" if dtype.kind == "b" else "vector"
        return KeySpec(name, kind, (int(np.prod(shape)),), shape, dtype, low=space.low.copy(), high=space.high.copy())
    _check_image(name, space)
    canonical = {"hw": (1, *shape), "chw": shape, "hwc": (shape[-1], *shape[:-1])}[image]
    low, high = (np.array(b.flat[0], dtype) for b in (space.low, space.high))
    return KeySpec(name, "image", canonical, shape, dtype, layout=image, low=low, high=high)


def _check_image(name: str, space: gym_spaces.Box) -> None:
    low, high, dtype = space.low, space.high, np.dtype(space.dtype)
    what = f"'{name}' ({space}) has the shape of an image, but"
    if dtype != np.uint8 and dtype.kind != "f":
        raise UnsupportedSpaceError(
            f"{what} its dtype is {dtype}. Expected uint8 or float. Convert it with {TRANSFORM_OBS}, or declare env.layout=vector."
        )
    if (low != 0).any() or high.min() != high.max() or high.flat[0] not in (1, 255):
        raise UnsupportedSpaceError(
            f"{what} its bounds are not [0, 1] or [0, 255], so its brightness has no scale. Rescale it with "
            f"gymnasium.wrappers.RescaleObservation or {TRANSFORM_OBS}, or declare env.layout=vector."
        )


def _unsupported(role: str, name: str, space: Any) -> UnsupportedSpaceError:
    kind = type(space).__name__
    transform = TRANSFORM_OBS if role == "observation" else TRANSFORM_ACTION
    if not isinstance(space, gym_spaces.Space):
        advice = "it is no gymnasium.Space. Wrap the environment with shimmy or give it gymnasium spaces."
    elif kind in ("Dict", "Tuple") and role == "observation":
        advice = f"it nests other spaces. Wrap the environment in {FLATTEN}, which makes one flat Dict of it."
    elif kind in ("Dict", "Tuple"):
        advice = f"it nests other spaces. Offer one Box or MultiDiscrete through {transform}."
    elif kind == "Text" and role == "observation":
        advice = f"text has no fixed-size tensor. Drop it with gymnasium.wrappers.FilterObservation or embed it with {transform}."
    elif kind == "Sequence":
        advice = f"its length varies. Pad it to a Box of fixed shape with {transform}."
    else:
        advice = f"it has no fixed-size tensor. Turn it into a Box, Discrete or Dict of these with {transform}."
    return UnsupportedSpaceError(f"The {role} space at '{name}' is a {kind}, which is not supported: {advice}")


def _raw_array(key: KeySpec, value: Any, where: Where) -> np.ndarray:
    """A copy of `value` [N, *raw_shape] in the raw dtype; EnvError where that does not hold its numbers."""
    given = numbers(value)
    if given is None:
        form = f"array of dtype {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
        raise EnvError(f"{_place(where, 0)}: observation '{key.name}' is a {form}; expected an array of numbers.")
    if given.ndim == 0 or given.shape[1:] != key.raw_shape:
        raise EnvError(f"{_place(where, 0)}: observation '{key.name}' has shape {given.shape}; expected [N, {key.raw_shape}].")
    held = cast(given, key.raw_dtype)
    if held is None:
        raise EnvError(
            f"{_place(where, 0)}: observation '{key.name}' has dtype {given.dtype} and holds numbers that the expected "
            f"{key.raw_dtype} cannot represent. Return {key.raw_dtype}, or convert it with {TRANSFORM_OBS}."
        )
    if needs_word(given, key.raw_dtype):
        tell(f"observation '{key.name}'", str(given.dtype), str(key.raw_dtype), f"Return it so, or convert it with {TRANSFORM_OBS}")
    return held


def _place(where: Where, row: int) -> str:
    return where(row) if callable(where) else where


def _offsets(sizes: tuple[int, ...]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)


@lru_cache(maxsize=256)
def _group_constants(sizes: tuple[int, ...], start: tuple[int, ...], device: torch.device) -> tuple[Any, Any]:
    """(start, first column) of every group; plain numbers for one group, or a copy to the GPU would stall each call."""
    if len(sizes) == 1:
        return start[0], 0
    with torch.inference_mode(False):
        return torch.tensor(start, device=device), torch.as_tensor(_offsets(sizes), device=device)


def _argmax_groups(x: np.ndarray, sizes: tuple[int, ...]) -> np.ndarray:
    """[..., sum(sizes)] -> [..., groups]: the largest entry of every group, all groups at once."""
    if len(set(sizes)) == 1:
        return x.reshape(*x.shape[:-1], len(sizes), sizes[0]).argmax(-1)
    columns = np.arange(max(sizes))
    index = np.minimum(_offsets(sizes)[:, None] + columns, x.shape[-1] - 1)
    return np.where(columns < np.array(sizes)[:, None], x[..., index], -np.inf).argmax(-1)


def _into_bounds(x: np.ndarray, low: np.ndarray, high: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """x in `dtype` within [low, high]; integers are rounded first."""
    if dtype.kind == "f":
        return np.clip(x.astype(np.result_type(x.dtype, dtype)), low, high).astype(dtype)
    x = np.rint(x.astype(np.float64))
    # Bounds of 64-bit integers are no exact floats: compare as floats, but take the bounds themselves where x leaves them.
    above, below = x >= high.astype(np.float64), x <= low.astype(np.float64)
    inside = np.where(above | below | np.isnan(x), 0, x).astype(dtype)
    return np.where(above, high, np.where(below | np.isnan(x), low, inside)).astype(dtype)


def _bound_to_json(bound: np.ndarray | None) -> Any:
    """A number where all entries are equal, else nested lists; infinities as "inf" and "-inf"."""
    if bound is None:
        return None
    if bound.size and (bound == bound.flat[0]).all():
        bound = bound.flat[0]
    number = np.asarray(bound).tolist()

    def finite(value: Any) -> Any:
        if isinstance(value, list):
            return [finite(v) for v in value]
        return str(value) if isinstance(value, float) and not np.isfinite(value) else value

    return finite(number)


def _bound_from_json(value: Any, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray | None:
    if value is None:
        return None

    def number(v: Any) -> Any:
        return [number(x) for x in v] if isinstance(v, list) else float(v) if isinstance(v, str) else v

    return np.broadcast_to(np.array(number(value), dtype), shape).copy()
