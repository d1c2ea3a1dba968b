"""One key of an observation, or the action: which tensor a Gymnasium space becomes, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from gymnasium import spaces as gym_spaces
from torch import Tensor

from worldmodel.errors import ConfigError, UnsupportedSpaceError
from worldmodel.spaces.casts import cast, numbers
from worldmodel.spaces.layouts import Layout, image_layout

MAX_CATEGORIES = 65536
"""Wider one-hot groups would fill the memory."""
FLOAT32_MAX = float(np.finfo(np.float32).max)
WIDE = {torch.float64, torch.int32, torch.int64, torch.uint32, torch.uint64}
"""Dtypes that float32 would round: a Unix time loses its minutes."""

FLATTEN = "worldmodel.envs.FlattenSpaces"
TRANSFORM_OBS = "gymnasium.wrappers.TransformObservation"
TRANSFORM_ACTION = "gymnasium.wrappers.TransformAction"


def discrete(n: int, start: int, dtype: np.dtype) -> gym_spaces.Discrete:
    """Gymnasium's space; older ones know int64 alone."""
    other = {} if np.dtype(dtype) == np.int64 else {"dtype": np.dtype(dtype).type}
    return gym_spaces.Discrete(n, start=start, **other)


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
            return discrete(self.sizes[0], self.start[0], self.raw_dtype)
        sizes, start = (np.array(v, self.raw_dtype).reshape(self.raw_shape) for v in (self.sizes, self.start))
        return gym_spaces.MultiDiscrete(sizes, dtype=self.raw_dtype.type, start=start)

    @property
    def canonical_dtype(self) -> torch.dtype:
        """Of what `canonical` makes of raw values: float64 for vectors whose numbers float32 would round."""
        wide = self.kind == "vector" and torch.from_numpy(np.empty(0, self.raw_dtype)).dtype in WIDE
        return torch.float64 if wide else torch.float32

    @property
    def transposed_shape(self) -> tuple[int, ...] | None:
        """The raw shape of an image with its channels at the other end, as SB3's VecTransposeImage moves them; else None."""
        shape = self.raw_shape
        return {"hwc": (*shape[-1:], *shape[:-1]), "chw": (*shape[1:], *shape[:1])}.get(self.layout)

    def canonical(self, x: Tensor) -> Tensor:
        """[..., *raw_shape] in any dtype -> [..., *shape]: float32, but vectors of a wider dtype are float64.

        Raises ValueError where the raw shape does not fit.
        """
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
            return x.to(torch.float64 if self.kind == "vector" and x.dtype in WIDE else torch.float32)
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
            x = self.picture(x)
        elif self.kind == "categorical":
            x = _argmax_groups(x, self.sizes) + np.array(self.start)
        elif self.kind == "binary":
            x = x > 0.5
        x = x.reshape(*lead, *self.raw_shape)
        if self.low is None or self.kind == "binary":
            return x.astype(self.raw_dtype)
        return _into_bounds(x, self.low, self.high, self.raw_dtype)

    def picture(self, x: np.ndarray) -> np.ndarray:
        """Numbers of canonical pixels [..., C, H, W] in the raw range and layout [..., *raw_shape]; floats, not rounded."""
        x = x * float(self.high)
        return np.moveaxis(x, -3, -1) if self.layout == "hwc" else x[..., 0, :, :] if self.layout == "hw" else x

    def fitted(self, value: Any, rows: int, where: str, expected: str = "") -> np.ndarray:
        """`value` as [rows, *raw_shape] in the raw dtype; images may have their channels at the other end.

        Raises ConfigError where the shape is another, which `expected` may explain, or a number would change its meaning.
        """
        given, shape = numbers(value), [rows, *self.raw_shape]
        if given is None:
            raise ConfigError(f"{where} is no array of numbers. Expected {shape}{expected}.")
        if given.shape == (rows, *(self.transposed_shape or ())) != tuple(shape):
            given = np.moveaxis(given, 1, -1) if self.layout == "hwc" else np.moveaxis(given, -1, 1)
        if given.shape != tuple(shape):
            raise ConfigError(f"{where} has shape {list(given.shape)}; expected {shape}{expected}.")
        converted = given if given.dtype == self.raw_dtype else cast(given, self.raw_dtype)
        if converted is None:
            raise ConfigError(
                f"{where} has dtype {given.dtype}, which {self.raw_dtype} does not hold. Expected values of {self.space}."
            )
        return converted

    def fault(self, values: np.ndarray) -> tuple[np.ndarray, str] | None:
        """(bad rows [N] bool, what is wrong) of raw rows [N, *raw_shape]; None where all is well."""
        flat = values.reshape(len(values), -1)
        is_float = self.raw_dtype.kind == "f"
        if is_float:
            bad = ~(np.abs(flat) <= FLOAT32_MAX) if self.raw_dtype.itemsize > 4 else ~np.isfinite(flat)
            if bad.any():
                return bad.any(1), f"is not a finite 32-bit float ({flat[bad][0]})"
        if self.kind == "image" and (is_float or self.high < 255):
            tolerance = 1e-3 * float(self.high) if is_float else 0
            bad = (flat < -tolerance) | (flat > self.high + tolerance)
            what = f"outside the space's bounds [0, {self.high}]"
        elif self.kind == "categorical":
            bad = (flat < np.array(self.start)) | (flat >= np.array(self.start) + np.array(self.sizes))
            what = f"which is no category of {self.space}" if bad.any() else ""
        elif self.kind == "binary" and self.raw_dtype.kind != "b":
            bad, what = (flat > 1) | (flat < 0), "expected 0 or 1"
        else:
            return None
        return (bad.any(1), f"holds {flat[bad][0]}, {what}") if bad.any() else None

    def to_json(self) -> dict[str, Any]:
        """Finite JSON (infinite bounds as strings) from which `from_json` makes an equal KeySpec."""
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}
        return {**values, "raw_dtype": self.raw_dtype.name, "low": _bound_to_json(self.low), "high": _bound_to_json(self.high)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> KeySpec:
        dtype = np.dtype(data["raw_dtype"])
        shape = () if data["kind"] == "image" else tuple(data["raw_shape"])

        def bound(value: Any) -> np.ndarray | None:
            return None if value is None else np.broadcast_to(np.array(value, dtype), shape).copy()

        values = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
        return cls(**{**values, "raw_dtype": dtype, "low": bound(data["low"]), "high": bound(data["high"])})


def finite_key(name: str, space: gym_spaces.Space) -> KeySpec | None:
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


def box_key(name: str, space: gym_spaces.Box, layout: Layout | None) -> KeySpec:
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


def unsupported(role: str, name: str, space: Any, single: bool = True) -> UnsupportedSpaceError:
    """The error about a space without a tensor form; `single`: it is the whole observation, so there is no key to leave out."""
    kind = type(space).__name__
    transform = TRANSFORM_OBS if role == "observation" else TRANSFORM_ACTION
    advice = {
        ("Dict", "observation"): f"it nests other spaces. Wrap the environment in {FLATTEN}, which makes one flat Dict of it.",
        ("Dict", "action"): f"it nests other spaces. Offer one Box or MultiDiscrete through {transform}.",
        ("Text", "observation"): "text has no fixed-size tensor. Drop it with gymnasium.wrappers.FilterObservation or embed it "
        f"with {transform}.",
        ("Sequence", role): f"its length varies. Pad it to a Box of fixed shape with {transform}.",
    }.get(("Dict" if kind == "Tuple" else kind, role))
    if not isinstance(space, gym_spaces.Space):
        advice = "it is no gymnasium.Space. Wrap the environment with shimmy or give it gymnasium spaces."
    advice = advice or f"it has no fixed-size tensor. Turn it into a Box, Discrete or Dict of these with {transform}."
    if not single and not isinstance(space, (gym_spaces.Dict, gym_spaces.Tuple)):
        advice += f" Or leave it out: env.ignore=[{name}]."
    return UnsupportedSpaceError(f"The {role} space at '{name}' is a {kind}, which is not supported: {advice}")


def offsets(sizes: tuple[int, ...]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)


@lru_cache(maxsize=256)
def _group_constants(sizes: tuple[int, ...], start: tuple[int, ...], device: torch.device) -> tuple[Any, Any]:
    """(start, first column) of every group; plain numbers for one group, or a copy to the GPU would stall each call."""
    if len(sizes) == 1:
        return start[0], 0
    with torch.inference_mode(False):
        return torch.tensor(start, device=device), torch.as_tensor(offsets(sizes), device=device)


def _argmax_groups(x: np.ndarray, sizes: tuple[int, ...]) -> np.ndarray:
    """[..., sum(sizes)] -> [..., groups]: the largest entry of every group, all groups at once."""
    if len(set(sizes)) == 1:
        return x.reshape(*x.shape[:-1], len(sizes), sizes[0]).argmax(-1)
    columns = np.arange(max(sizes))
    index = np.minimum(offsets(sizes)[:, None] + columns, x.shape[-1] - 1)
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
        bound = np.asarray(bound.flat[0])
    return np.where(np.isfinite(bound), bound.astype(object), bound.astype(str)).tolist()
