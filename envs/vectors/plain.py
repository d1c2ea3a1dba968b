"""The plain form of spaces, which Stable-Baselines3's own algorithms need: counted from 0, in one dimension.

Those algorithms give the first category the number 0 whatever the space's start. Our own agents take every space as it is. This
module converts between an algorithm of SB3 and environments, real or imagined.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper

from worldmodel.spaces import ActionSpec, ObsSpec
from worldmodel.spaces.keys import KeySpec, discrete

COUNT_FROM_0 = "SB3's own algorithms count categories from 0: wrap the environments in worldmodel.envs.PlainVecEnv."
"""Advice for messages."""


@dataclass(frozen=True)
class Plain:
    """A space and its plain form, with the conversion of one value or many [..., *shape] in both directions.

    Discrete and MultiDiscrete start at 0, grids of categories and of bits as actions become one row, a Box without dimensions
    gets one. Any other space is its own plain form.
    """

    inner: spaces.Space
    outer: spaces.Space
    start: np.ndarray | int = 0

    @classmethod
    def of(cls, space: spaces.Space, *, action: bool = False) -> Plain:
        if isinstance(space, spaces.Discrete) and space.start != 0:
            return cls(space, discrete(int(space.n), 0, space.dtype), int(space.start))
        if isinstance(space, spaces.MultiDiscrete):
            start = np.broadcast_to(getattr(space, "start", 0), space.nvec.shape).astype(np.int64)
            if start.any() or start.ndim > 1:
                return cls(space, spaces.MultiDiscrete(space.nvec.reshape(-1), dtype=space.dtype), start)
        if isinstance(space, spaces.Box) and space.shape == ():
            return cls(space, spaces.Box(space.low.reshape(1), space.high.reshape(1), dtype=space.dtype))
        if isinstance(space, spaces.MultiBinary) and action and len(space.shape) > 1:
            return cls(space, spaces.MultiBinary(int(np.prod(space.shape))))
        return cls(space, space)

    @property
    def changes(self) -> bool:
        return self.inner is not self.outer

    def to_plain(self, value: Any) -> Any:
        """The user's value in the plain form."""
        return self._convert(value, self.inner, self.outer, -1) if self.changes else value

    def from_plain(self, value: Any) -> Any:
        """A plain value in the user's form."""
        return self._convert(value, self.outer, self.inner, 1) if self.changes else value

    def _convert(self, value: Any, here: spaces.Space, there: spaces.Space, sign: int) -> Any:
        value = np.asarray(value)
        shape = (*value.shape[: value.ndim - len(here.shape)], *there.shape)
        if isinstance(here, spaces.Discrete | spaces.MultiDiscrete):
            start = np.reshape(self.start, here.shape)
            value = value.astype(np.int64) + (start if sign > 0 else -start)
        value = np.asarray(value, there.dtype).reshape(shape)
        return value if isinstance(there, spaces.Box) else value[()]


# Specs ----------------------------------------------------------------------------------------------------------------


def plain_obs(spec: ObsSpec) -> ObsSpec:
    """The spec of the plain form; the canonical form is the same."""
    return ObsSpec({name: _plain_key(key) for name, key in spec.keys.items()}, spec.single)


def plain_action(spec: ActionSpec) -> ActionSpec:
    """The spec of the plain form; the canonical form is the same."""
    return replace(spec, key=_plain_key(spec.key, action=True))


def plain_raw(spec: ObsSpec, raw: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Raw rows {key: [..., *raw_shape]} in the plain form."""
    return {name: Plain.of(key.space).to_plain(raw[name]) if _may_change(key) else raw[name] for name, key in spec.keys.items()}


def _plain_key(key: KeySpec, action: bool = False) -> KeySpec:
    if not _may_change(key):
        return key
    plain = Plain.of(key.space, action=action)
    if not plain.changes:
        return key
    bounds = {} if key.low is None else {"low": plain.outer.low, "high": plain.outer.high}
    return replace(key, raw_shape=tuple(plain.outer.shape), start=(0,) * len(key.start), **bounds)


def _may_change(key: KeySpec) -> bool:
    """Whether the plain form may differ; saves making the space of a picture."""
    return key.kind in ("categorical", "binary") or not key.raw_shape


# Environments ---------------------------------------------------------------------------------------------------------


class PlainSpaces:
    """The plain form of an environment's spaces, whose observation is one space or a flat Dict.

    observation, action  the plain spaces
    changes              whether one of them differs from the environment's
    """

    def __init__(self, observation: spaces.Space, action: spaces.Space):
        self._named = isinstance(observation, spaces.Dict)
        parts = observation.spaces if self._named else {"": observation}
        self._parts = {name: Plain.of(space) for name, space in parts.items()}
        self._action = Plain.of(action, action=True)
        self.observation, self.action = observation, self._action.outer
        changed = any(plain.changes for plain in self._parts.values())
        if changed:
            outer = {name: plain.outer for name, plain in self._parts.items()}
            self.observation = spaces.Dict(outer) if self._named else outer[""]
        self.changes = changed or self._action.changes

    def to_plain_obs(self, obs: Any) -> Any:
        """One observation, or many [N, ...]."""
        return {k: plain.to_plain(obs[k]) for k, plain in self._parts.items()} if self._named else self._parts[""].to_plain(obs)

    def from_plain_action(self, action: Any) -> Any:
        return self._action.from_plain(action)


class PlainVecEnv(VecEnvWrapper):
    """Environments in the plain form, for SB3's own algorithms: `PPO("MlpPolicy", PlainVecEnv(make_vec("YourEnv-v0")))`.

    Where all spaces are plain already it changes nothing. Our own agents do not need it: they take every space.
    """

    def __init__(self, venv: VecEnv):
        self._spaces = PlainSpaces(venv.observation_space, venv.action_space)
        self.changes = self._spaces.changes
        super().__init__(venv, observation_space=self._spaces.observation, action_space=self._spaces.action)

    @classmethod
    def around(cls, venv: VecEnv) -> VecEnv:
        """The environments in this wrapper, or themselves where nothing would change."""
        wrapped = cls(venv)
        return wrapped if wrapped.changes else venv

    def reset(self) -> Any:
        return self._spaces.to_plain_obs(self.venv.reset())

    def step_async(self, actions: np.ndarray) -> None:
        self.venv.step_async(self._spaces.from_plain_action(actions))

    def step_wait(self) -> tuple[Any, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        obs, rewards, dones, infos = self.venv.step_wait()
        for i in np.flatnonzero(dones):
            if infos[i].get("terminal_observation") is not None:
                infos[i]["terminal_observation"] = self._spaces.to_plain_obs(infos[i]["terminal_observation"])
        return self._spaces.to_plain_obs(obs), rewards, dones, infos


def as_trained(model: Any, venv: VecEnv) -> VecEnv:
    """The environments in the spaces of a model: in the plain form where it has that of their spaces.

    SB3's own algorithms have, and agents of version 0.1, which counted categories from 0. A model without spaces gets the
    environments as they are.
    """
    if hasattr(model, "obs_spec"):
        return as_known(venv, model.obs_spec.space, model.action_spec.space)
    return as_known(venv, getattr(model, "observation_space", None), getattr(model, "action_space", None))


def as_known(venv: VecEnv, observation: spaces.Space | None, action: spaces.Space | None) -> VecEnv:
    """`as_trained` for the spaces alone."""
    plain = PlainVecEnv.around(venv)
    as_it_is = (observation, action) == (venv.observation_space, venv.action_space)
    return plain if action == plain.action_space and not as_it_is else venv
