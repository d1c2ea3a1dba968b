"""Action masks: which discrete actions are legal now, as one more key of the observation.

Environments say it in one of three ways, of which the first that is there counts: a method `action_masks()` (sb3-contrib's
MaskablePPO), `info["action_mask"]` after each reset and step (Gymnasium's Taxi, PettingZoo), or a key `action_mask` of the
observation itself (PettingZoo's classic games). Here all of them become the key `action_mask`, a Box of bool with one number for
each action; of MultiDiscrete actions those of all groups, side by side. An observation that is no Dict becomes the key `obs`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from jaxtyping import Bool
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper

from worldmodel.envs.vectors.batches import describe, take
from worldmodel.errors import ConfigError, EnvError
from worldmodel.spaces import ActionSpec
from worldmodel.spaces.casts import numbers
from worldmodel.spaces.keys import offsets
from worldmodel.spaces.specs import ACTION_MASK

METHOD = "action_masks"
"""sb3-contrib's name of the method."""


def checked_mask(value: Any, sizes: tuple[int, ...], where: str, *, ended: bool = False) -> Bool[np.ndarray, " A"]:
    """The mask [A] of what an environment gives for categorical groups of these sizes. EnvError for anything else.

    ended  the episode is over: nothing need be legal, and nothing need be given (None)
    """
    count = sum(sizes)
    if value is None:
        if ended:
            return np.zeros(count, bool)
        raise EnvError(
            f"{where}: there is no action mask; expected one at every reset and step, from {METHOD}() or in info['{ACTION_MASK}']. "
            "Give it every time, or begin a run with env.action_masks=false, which tries all actions."
        )
    given = numbers(value)
    if given is None or given.shape != (count,) or not np.isin(given, (0, 1)).all():
        found = describe(value) if given is None or given.shape != (count,) else given.tolist()
        raise EnvError(
            f"{where}: the action mask is {found}; expected 0 or 1 for each of {count} actions, an array of shape ({count},). "
            f"Correct what {METHOD}() or info['{ACTION_MASK}'] gives."
        )
    mask = given.astype(bool)
    if not ended and not np.logical_or.reduceat(mask, offsets(sizes)).all():
        raise EnvError(
            f"{where}: the action mask {mask.astype(int).tolist()} allows no action{' of a group' if len(sizes) > 1 else ''}; "
            "expected at least one. End the episode where nothing can be done."
        )
    return mask


def observes_mask(space: spaces.Space) -> bool:
    """Whether observations of this space hold masks already in the form that is made here."""
    mask = space.spaces.get(ACTION_MASK) if isinstance(space, spaces.Dict) else None
    return isinstance(mask, spaces.Box) and mask.dtype.kind == "b"


def can_be_masked(space: spaces.Space) -> bool:
    """Whether actions of this space can have masks."""
    return isinstance(space, spaces.Discrete | spaces.MultiDiscrete)


def with_mask(observation: spaces.Space, action: spaces.Space) -> tuple[spaces.Dict, tuple[int, ...]]:
    """(the space of observations with a mask, the sizes of its groups). ConfigError where actions cannot have one."""
    if not can_be_masked(action):
        raise ConfigError(f"env.action_masks=true is for Discrete and MultiDiscrete actions, and these are {action}. Leave it out.")
    sizes = ActionSpec.from_space(action).sizes
    return spaces.Dict({**_named(observation), ACTION_MASK: spaces.Box(0, 1, (sum(sizes),), bool)}), sizes


class MaskedActions(gym.Wrapper):
    """An environment whose observation holds the mask of legal actions.

    Raises ConfigError for other than Discrete and MultiDiscrete actions, EnvError for what is no mask.
    """

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.observation_space, self._sizes = with_mask(env.observation_space, env.action_space)
        self._method = env.get_wrapper_attr(METHOD) if env.has_wrapper_attr(METHOD) else None
        self._mask = np.ones(sum(self._sizes), bool)

    def action_masks(self) -> Bool[np.ndarray, " A"]:
        """The mask of the newest observation, for sb3-contrib."""
        return self._mask.copy()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        obs, info = self.env.reset(seed=seed, options=options)
        return self._observation(obs, info, False), info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        obs, reward, terminated, truncated, info = self.env.step(action)
        return self._observation(obs, info, terminated or truncated), reward, terminated, truncated, info

    def _observation(self, obs: Any, info: dict[str, Any], ended: bool) -> dict[str, Any]:
        where = self.env.get_wrapper_attr("place")() if self.env.has_wrapper_attr("place") else str(self.env)
        value = _given(info, obs)
        if self._method is not None:
            try:
                value = self._method()
            except Exception as error:
                raise EnvError(
                    f"{where}: {METHOD} raised {type(error).__name__}: {error}. Expected a mask. Correct the environment."
                ) from error
        self._mask = checked_mask(value, self._sizes, where, ended=ended)
        return {**_named(obs), ACTION_MASK: self._mask.copy()}


class MaskedVecEnv(VecEnvWrapper):
    """A VecEnv whose observations hold the masks of legal actions [N, A]: `MaskedActions` for environments that somebody else made.

    An episode's last observation has the mask of its info, or else that of the row before: `action_masks()` speaks of the next
    episode by then.
    """

    def __init__(self, venv: VecEnv):
        space, self._sizes = with_mask(venv.observation_space, venv.action_space)
        self._has_method = has_method(venv)
        super().__init__(venv, observation_space=space)

    @classmethod
    def around(cls, venv: VecEnv, wanted: bool | None) -> VecEnv:
        """The environments in this wrapper where they are to be; `wanted` None: where they have the method.

        Those that give masks in their infos alone are known by them after a first reset: see `warn_of_unread_masks`.
        """
        if wanted is False or observes_mask(venv.observation_space):
            return venv
        return cls(venv) if wanted or (can_be_masked(venv.action_space) and has_method(venv)) else venv

    def reset(self) -> dict[str, np.ndarray]:
        obs = self.venv.reset()
        return self._observations(obs, self.venv.unwrapped.reset_infos)

    def step_wait(self) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, list[dict[str, Any]]]:
        obs, rewards, dones, infos = self.venv.step_wait()
        for i in np.flatnonzero(dones).tolist():
            if (last := infos[i].get("terminal_observation")) is not None:
                value = _given(infos[i], last)
                mask = self._masks[i] if value is None else checked_mask(value, self._sizes, f"environment {i}", ended=True)
                infos[i]["terminal_observation"] = {**_named(last), ACTION_MASK: mask}
        fresh = self.venv.unwrapped.reset_infos
        return self._observations(obs, [fresh[i] if done else infos[i] for i, done in enumerate(dones)]), rewards, dones, infos

    def _observations(self, obs: Any, infos: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
        if self._has_method:
            values = self.venv.env_method(METHOD)
        else:
            values = [_given(info, take(obs, i)) for i, info in enumerate(infos)]
        self._masks = np.stack([checked_mask(value, self._sizes, f"environment {i}") for i, value in enumerate(values)])
        return {**_named(obs), ACTION_MASK: self._masks.copy()}


def has_method(venv: VecEnv) -> bool:
    """Whether the environments have the method `action_masks`; a VecEnv need not know its environments' attributes."""
    try:
        return bool(venv.has_attr(METHOD))
    except (AttributeError, NotImplementedError, EnvError):
        return False


def gives_masks(venv: VecEnv) -> bool:
    """Whether the environments give masks in one of the ways; those in infos are there after a reset."""
    space = venv.observation_space
    in_observation = isinstance(space, spaces.Dict) and ACTION_MASK in space.spaces
    in_info = any(ACTION_MASK in info for info in venv.unwrapped.reset_infos)
    return can_be_masked(venv.action_space) and (in_observation or in_info or has_method(venv))


def warn_of_unread_masks(venv: VecEnv) -> None:
    """Warns where environments that were just reset give masks, and observations hold none: any action may be taken."""
    if gives_masks(venv) and not observes_mask(venv.observation_space):
        warnings.warn(
            f"The environments say which actions are legal (info['{ACTION_MASK}']), and the agent was made before they did: "
            "it tries all. Make it with config={'env.action_masks': True} to keep to these, or with False to silence this.",
            stacklevel=3,
        )


def _given(info: Mapping[str, Any], obs: Any) -> Any:
    """The mask in an info, or else in an observation; None where there is none."""
    return info.get(ACTION_MASK, obs.get(ACTION_MASK) if isinstance(obs, Mapping) else None)


def _named(obs: Any) -> dict[str, Any]:
    """An observation, or its space, by keys."""
    return dict(obs.items()) if isinstance(obs, Mapping | spaces.Dict) else {"obs": obs}
