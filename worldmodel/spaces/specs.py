"""Gymnasium spaces <-> canonical tensors: the only place where observations and actions change form.

| space | kind | canonical event |
|---|---|---|
| Box, 3-D, or 2-D with both sides >= 16 | image | float [C, H, W] in [0, 1] |
| Box of any other shape, float or integer | vector | float [D], values as they are; float64 where float32 would round them |
| Discrete, MultiDiscrete | categorical | one-hot groups side by side, [D] |
| MultiBinary, Box of bool | binary | 0.0 or 1.0, [D] |

Actions: Box -> [-1, 1] per dimension, Discrete and MultiDiscrete -> one-hot groups, MultiBinary -> 0 or 1; all flat [A].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from gymnasium import spaces as gym_spaces
from jaxtyping import Bool, Float
from torch import Tensor, nn

from worldmodel.errors import EnvError, NumericsError, UnsupportedSpaceError
from worldmodel.spaces.casts import cast, flatten, numbers, warn_once, warning_due
from worldmodel.spaces.keys import (
    FLATTEN,
    TRANSFORM_ACTION,
    TRANSFORM_OBS,
    KeySpec,
    box_key,
    finite_key,
    offsets,
    unsupported,
)
from worldmodel.spaces.layouts import Layout

Where = str | Callable[[int], str]
ACTION_MASK = "action_mask"
"""The observation's key that says which actions are legal, where it is a Box of bool as long as a categorical action."""


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
            raise UnsupportedSpaceError("The observation space is an empty Dict. Expected at least one key.")
        keys = {}
        for name, sub in items.items():
            if not isinstance(name, str):
                raise UnsupportedSpaceError(f"Observation key {name!r} is no string. Expected string keys; {FLATTEN} renames them.")
            declared = layout.get(name) if isinstance(layout, Mapping) else layout
            key = box_key(name, sub, declared) if isinstance(sub, gym_spaces.Box) else finite_key(name, sub)
            if key is None:
                raise unsupported("observation", name, sub, single)
            keys[name] = key
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

    def to_raw(self, obs: Any, where: Where = "the observation") -> dict[str, np.ndarray]:
        """Batched observation (array or dict of arrays [N, ...]) -> {key: [N, *raw_shape]} in the raw dtype, copied.

        Nested dicts and tuples are taken by their flat names; images may have their channels at the other end, where SB3 puts them.
        Other kinds of numbers are converted, with one warning where digits may be lost. Raises EnvError for missing or extra keys,
        another shape, or numbers that the dtype does not hold.
        """
        given = {"obs": obs} if self.single and not isinstance(obs, Mapping) else obs
        if not self.single and isinstance(obs, Mapping | tuple):  # perhaps nested, as the user's environment gives it
            given = flatten(obs, self.keys)
        self._same_keys(given, where)
        return {name: _raw_array(key, given[name], where) for name, key in self.keys.items()}

    def check(self, raw: Mapping[str, np.ndarray], where: Where = "the observation") -> None:
        """Raise EnvError unless every row is of its space: keys, shapes, dtypes, finite numbers, categories.

        where: the place to name, or a function from the row's number to it ("environment 3, episode 12, step 40").
        Vectors may leave their declared bounds: canonical vectors do not depend on them.
        """
        self._same_keys(raw, where)
        for name, key in self.keys.items():
            row = raw[name]
            if row.shape[1:] != key.raw_shape or row.dtype != key.raw_dtype:
                raise EnvError(
                    f"{_location(where, 0)}: observation '{name}' is {row.dtype} {row.shape[1:]}; "
                    f"expected {key.raw_dtype} {key.raw_shape}. Correct the environment or its observation_space."
                )
            fault = key.fault(row)
            if fault is not None:
                bad, what = fault
                raise EnvError(
                    f"{_location(where, int(bad.argmax()))}: observation '{name}' {what}. Expected values of {key.space}. "
                    "Correct the environment, or wrap it."
                )

    def canonical(self, raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """{key: [..., *raw_shape]} -> {key: [..., *shape]} as each key has it; any leading dimensions, any device."""
        return {name: key.canonical(raw[name]) for name, key in self.keys.items()}

    def raw(self, canonical: Mapping[str, Tensor | np.ndarray]) -> dict[str, np.ndarray]:
        """Inverse of `canonical`, as numpy arrays: rounded, inside the bounds, categories by argmax."""
        return {name: key.raw(canonical[name]) for name, key in self.keys.items()}

    def to_env(self, raw: Mapping[str, np.ndarray]) -> Any:
        """Rows as the environment gives them: the array itself where the space is no Dict."""
        return raw["obs"] if self.single else dict(raw)

    def to_json(self) -> dict[str, Any]:
        return {"single": self.single, "keys": [key.to_json() for key in self.keys.values()]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ObsSpec:
        keys = [KeySpec.from_json(key) for key in data["keys"]]
        return cls({key.name: key for key in keys}, bool(data["single"]))

    def _same_keys(self, given: Any, where: Where) -> None:
        if not isinstance(given, Mapping):
            raise EnvError(f"{_location(where, 0)}: got {type(given).__name__}; expected a dict with the keys {sorted(self.keys)}.")
        if given.keys() != self.keys.keys():
            missing, extra = sorted(self.keys.keys() - given.keys()), sorted(map(str, given.keys() - self.keys.keys()))
            raise EnvError(
                f"{_location(where, 0)}: missing observation keys {missing}, extra keys {extra}. "
                f"Expected {sorted(self.keys)}: correct the environment or its observation_space."
            )


@dataclass(frozen=True)
class ActionSpec:
    """What an action is: a flat float vector [A], whatever the space.

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
            key = box_key("action", space, "vector")
        else:
            key = finite_key("action", space)
        if key is None:
            raise unsupported("action", "action", space)
        kind = "continuous" if key.kind == "vector" else key.kind
        return cls(key.shape[0], kind, key.sizes, key)

    @property
    def space(self) -> gym_spaces.Space:
        """The Gymnasium space that this was made from."""
        return self.key.space

    def encode(self, env_actions: np.ndarray) -> np.ndarray:
        """The environment's actions [N, ...] -> canonical float32 [N, A]. Raises ValueError for what is no action of the space."""
        actions = np.asarray(env_actions)
        if actions.shape[1:] != self.key.raw_shape:
            raise ValueError(f"Actions have shape {actions.shape}; expected [N, {self.key.raw_shape}] of {self.space}.")
        if self.kind == "continuous":
            if np.isnan(actions).any():
                raise ValueError(f"An action is NaN; expected numbers of {self.space}.")
            middle, half = self._affine
            unit = (actions.reshape(len(actions), -1).astype(np.float64) - middle) / np.where(half > 0, half, 1)
            return np.where(half > 0, np.clip(unit, -1, 1), 0).astype(np.float32)
        converted = cast(actions, self.key.raw_dtype)
        if converted is None:
            raise ValueError(f"Actions are {actions.dtype} with parts of whole numbers; expected elements of {self.space}.")
        fault = self.key.fault(converted)
        if fault is not None:
            raise ValueError(f"Action of row {int(fault[0].argmax())} {fault[1]}.")
        return self.key.canonical(torch.as_tensor(converted)).numpy()

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
            index = rng.integers(0, sizes, (n, len(sizes))) + offsets(self.sizes)
            out = np.zeros((n, self.dim), np.float32)
            np.put_along_axis(out, index, 1.0, axis=1)
            return out
        if self.key.raw_dtype.kind in "iu":
            low, high = (b.astype(self.key.raw_dtype) for b in (self.key.low, self.key.high))
            return self.encode(rng.integers(low, high, (n, *self.key.raw_shape), dtype=self.key.raw_dtype, endpoint=True))
        return rng.uniform(-1, 1, (n, self.dim)).astype(np.float32)

    # Masks ----------------------------------------------------------------------------------------------------------

    def is_masked_by(self, obs: ObsSpec) -> bool:
        """Whether the observation says which actions are legal, under ACTION_MASK."""
        key = obs.keys.get(ACTION_MASK)
        return self.kind == "categorical" and key is not None and key.raw_dtype.kind == "b" and key.raw_shape == (self.dim,)

    def likely_legal(self, probability: Float[Tensor, "*N A"]) -> Bool[Tensor, "*N A"]:
        """What is legal with a probability of a half at least; in a group where nothing is, the most probable category."""
        parts = []
        for part in probability.split(self.sizes, -1):
            likely = part >= 0.5
            best = nn.functional.one_hot(part.argmax(-1), part.shape[-1]).bool()
            parts.append(torch.where(likely.any(-1, keepdim=True), likely, best))
        return torch.cat(parts, -1)

    def restrict(self, share: Float[Tensor, "*N A"], legal: Bool[Tensor, "*N A"]) -> Float[Tensor, "*N A"]:
        """Probabilities of each group given that its category is legal; uniform over the legal ones where these had no share."""
        parts = []
        for part, allowed in zip(share.split(self.sizes, -1), legal.split(self.sizes, -1), strict=True):
            part = part * allowed
            part = torch.where(part.sum(-1, keepdim=True) > 0, part, allowed.to(part))
            parts.append(part / part.sum(-1, keepdim=True))
        return torch.cat(parts, -1)

    def redraw_illegal(
        self,
        action: Float[Tensor, "*N A"] | np.ndarray,
        legal: Bool[Tensor, "*N A"],
        random: np.random.Generator | torch.Generator | None,
        share: Float[Tensor, "*N A"] | None = None,
    ) -> Float[Tensor, "*N A"]:
        """The actions, those of their groups that are not legal drawn anew from `share` (None: uniform) among the legal ones.

        Of actions drawn from `share` this makes draws of `restrict(share, legal)`. Each group needs a legal category.
        """
        action, parts = torch.as_tensor(action, device=legal.device), []
        shape = *action.shape[:-1], len(self.sizes)
        if isinstance(random, np.random.Generator):
            draws = torch.from_numpy(random.random(shape, np.float32)).to(legal.device)
        else:
            draws = torch.rand(shape, generator=random, device=legal.device)
        share = self.restrict(torch.ones_like(action) if share is None else share, legal)
        groups = (x.split(self.sizes, -1) for x in (action, legal, share))
        for (old, allowed, part), draw in zip(zip(*groups, strict=True), draws.split(1, -1), strict=True):
            index = (part.cumsum(-1) <= draw).sum(-1, keepdim=True).clamp_max(part.shape[-1] - 1)
            index = torch.where(allowed.gather(-1, index), index, part.argmax(-1, keepdim=True))  # behind the last by rounding
            fresh = torch.zeros_like(old).scatter_(-1, index, 1.0)
            parts.append(torch.where((old * allowed).sum(-1, keepdim=True) > 0, old, fresh))
        return torch.cat(parts, -1)

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


def _raw_array(key: KeySpec, value: Any, where: Where) -> np.ndarray:
    """A copy of `value` [N, *raw_shape] in the raw dtype; EnvError where that does not hold its numbers."""
    given = numbers(value)
    if given is None:
        found = f"array of dtype {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
        raise EnvError(f"{_location(where, 0)}: observation '{key.name}' is a {found}; expected an array of numbers.")
    if given.shape[1:] == key.transposed_shape != key.raw_shape:
        given = np.moveaxis(given, 1, -1) if key.layout == "hwc" else np.moveaxis(given, -1, 1)
    if given.ndim == 0 or given.shape[1:] != key.raw_shape:
        raise EnvError(f"{_location(where, 0)}: observation '{key.name}' has shape {given.shape}; expected [N, {key.raw_shape}].")
    converted = cast(given, key.raw_dtype)
    if converted is None:
        raise EnvError(
            f"{_location(where, 0)}: observation '{key.name}' has dtype {given.dtype} and holds numbers that the expected "
            f"{key.raw_dtype} cannot represent. Return {key.raw_dtype}, or convert it with {TRANSFORM_OBS}."
        )
    if warning_due(given, key.raw_dtype):
        warn_once(
            f"observation '{key.name}'", str(given.dtype), str(key.raw_dtype), f"Return it so, or convert it with {TRANSFORM_OBS}"
        )
    return converted


def _location(where: Where, row: int) -> str:
    return where(row) if callable(where) else where
