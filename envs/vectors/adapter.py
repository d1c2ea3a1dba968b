"""Gymnasium's vector environments as SB3 VecEnvs.

The two differ in when an ended environment is reset. SB3 wants it in the same step: `step` gives the new episode's first
observation, and the info the old one's last. Gymnasium has three modes:

| autoreset_mode | what the adapter does | supported |
|---|---|---|
| SAME_STEP | takes the last observations from `final_obs` | always |
| DISABLED | resets the ended ones with `reset_mask` | always |
| NEXT_STEP | the same, so that there is no step which only resets | where single environments can be reset |

A NEXT_STEP environment that cannot reset single environments is refused: it gives the first observation one step late, while the
others move on, so that there would be a transition from the old episode into the new one. SyncVectorEnv, AsyncVectorEnv (with
shared memory), ImaginedVectorEnv and Gymnasium's CartPole can; for others there is `reset_rows`. Wrappers around them that do not
pass `reset_mask` on, or lose the other environments with it, are refused at the first reset.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv, VectorWrapper
from gymnasium.vector.utils import create_empty_array
from gymnasium.wrappers.vector import NormalizeReward
from stable_baselines3.common.env_util import is_wrapped
from stable_baselines3.common.vec_env import VecEnv

from worldmodel.envs.vectors.batches import copied, take, write
from worldmodel.envs.vectors.check import PLAIN
from worldmodel.errors import ConfigError, EnvError, UnsupportedSpaceError

ResetRows = Callable[[VectorEnv, np.ndarray], tuple[Any, dict[str, Any]]]
"""(vector environment, mask [N] bool) -> observations [N, ...], of which those in the mask are used, and infos, as of `reset`."""


class GymVecEnvAdapter(VecEnv):
    """A Gymnasium VectorEnv as an SB3 VecEnv.

    vector_env  its spaces must be ones that SB3 takes: plain ones, or a flat Dict of them as observation. SB3's own algorithms
                need a PlainVecEnv around this where categories do not start at 0
    reset_rows  resets single environments, for NEXT_STEP ones without `reset_mask`: (env, mask [N]) -> (obs, infos)

    Rewards are float32, observations copies. `seed(s)` seeds environment i with s + i where the VectorEnv does so.
    Gymnasium's wrappers that count episodes themselves are correct with SAME_STEP only; SB3's VecMonitor always is.
    Raises ConfigError, UnsupportedSpaceError.
    """

    def __init__(self, vector_env: VectorEnv, reset_rows: ResetRows | None = None):
        if not isinstance(vector_env, VectorEnv):
            raise ConfigError(f"Expected a gymnasium.vector.VectorEnv; got {type(vector_env).__name__}.")
        observation, action = vector_env.single_observation_space, vector_env.single_action_space
        parts = observation.spaces.values() if isinstance(observation, spaces.Dict) else [observation]
        for space in [*parts, action]:
            if not isinstance(space, PLAIN):
                raise UnsupportedSpaceError(
                    f"Stable-Baselines3 does not take the space {space}; expected Box, Discrete, MultiDiscrete, MultiBinary "
                    "or a flat Dict of them as observation. Pass the environment's id instead: worldmodel.envs.make_vec takes it."
                )
        self.vector_env = vector_env
        self.mode = vector_env.metadata.get("autoreset_mode")
        if not isinstance(self.mode, AutoresetMode):
            raise ConfigError(
                f"{vector_env}: metadata['autoreset_mode'] is {self.mode!r}; expected a gymnasium.vector.AutoresetMode. Without it "
                "nobody knows which steps are transitions."
            )
        self._reset_rows = reset_rows or _find_reset_rows(vector_env, self.mode)
        self._mask_unchecked = self._reset_rows is _by_mask and isinstance(vector_env, VectorWrapper)
        super().__init__(vector_env.num_envs, observation, action)

    def reset(self) -> Any:
        options = self._options[0]
        if any(other != options for other in self._options):
            raise ConfigError("A VectorEnv takes one `options` for all its environments; set_options got different ones.")
        obs, infos = self.vector_env.reset(seed=self._seeds[0], options=options or None)
        if self._mask_unchecked:
            _check_reset_mask(self.vector_env)
            self._mask_unchecked = False
        self._reset_seeds()
        self._reset_options()
        self.reset_infos = _infos_per_env(infos, self.num_envs)
        return copied(obs)

    def step_async(self, actions: np.ndarray) -> None:
        self._actions = actions

    def step_wait(self) -> tuple[Any, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        obs, rewards, terminated, truncated, infos = self.vector_env.step(self._actions)
        obs, terminated, truncated = copied(obs), np.asarray(terminated, bool), np.asarray(truncated, bool)
        dones = terminated | truncated
        rows = _infos_per_env(infos, self.num_envs)
        if dones.any():
            last = self._reset_ended(obs, dones, rows)
            for i in np.flatnonzero(dones).tolist():
                rows[i]["terminal_observation"] = last[i]
                rows[i]["TimeLimit.truncated"] = bool(truncated[i] and not terminated[i])
        return obs, np.array(rewards, np.float32), dones, rows

    def _reset_ended(self, obs: Any, dones: np.ndarray, rows: list[dict[str, Any]]) -> dict[int, Any]:
        """The last observations of ended environments, by number; writes their new episodes' first ones into `obs`."""
        ended = np.flatnonzero(dones).tolist()
        if self.mode is AutoresetMode.SAME_STEP:
            last = {}
            for i in ended:
                self.reset_infos[i] = {key: value for key, value in rows[i].items() if key not in ("final_obs", "final_info")}
                if "final_obs" not in rows[i]:
                    raise EnvError(
                        f"environment {i}: it ended, and its info holds no 'final_obs'. Expected the episode's last observation "
                        "there, as of every VectorEnv whose autoreset_mode is SAME_STEP. Correct the environment."
                    )
                last[i] = copied(rows[i].pop("final_obs"))
                rows[i] = {**rows[i].get("final_info", {})}
            return last
        last = {i: copied(take(obs, i)) for i in ended}
        fresh, infos = self._reset_rows(self.vector_env, dones.copy())
        new_infos = _infos_per_env(infos, self.num_envs)
        self.reset_infos = [new_infos[i] if dones[i] else old for i, old in enumerate(self.reset_infos)]
        write(obs, dones, take(fresh, dones))
        return last

    def close(self) -> None:
        self.vector_env.close()

    def get_images(self) -> list[np.ndarray | None]:
        pictures = self.vector_env.render()
        return [None] * self.num_envs if pictures is None else list(pictures)

    # Single environments: SyncVectorEnv has them, AsyncVectorEnv only calls all at once, native ones have none ----------

    def has_attr(self, attr_name: str) -> bool:
        inner = self.vector_env.unwrapped
        return all(inner.call("has_wrapper_attr", attr_name)) if hasattr(inner, "call") else hasattr(inner, attr_name)

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        inner = self._envs_with(attr_name)
        if isinstance(inner, SyncVectorEnv):
            return [env.get_wrapper_attr(attr_name) for env in self._envs(indices)]
        values = inner.get_attr(attr_name) if hasattr(inner, "get_attr") else [getattr(inner, attr_name)] * inner.num_envs
        return [values[i] for i in self._indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        inner = self.vector_env.unwrapped
        if isinstance(inner, SyncVectorEnv):
            for env in self._envs(indices):
                env.set_wrapper_attr(attr_name, value)
        elif hasattr(inner, "set_attr") and list(self._indices(indices)) == list(range(self.num_envs)):
            inner.set_attr(attr_name, [value] * self.num_envs)
        else:
            raise NotImplementedError(f"{inner} has no single environments whose '{attr_name}' could be set.")

    def env_method(self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any) -> list[Any]:
        inner = self._envs_with(method_name)
        if isinstance(inner, SyncVectorEnv):
            return [env.get_wrapper_attr(method_name)(*method_args, **method_kwargs) for env in self._envs(indices)]
        if hasattr(inner, "call") and list(self._indices(indices)) == list(range(self.num_envs)):
            return list(inner.call(method_name, *method_args, **method_kwargs))
        raise NotImplementedError(f"{inner} has no single environments whose '{method_name}' could be called.")

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: Any = None) -> list[bool]:
        if isinstance(self.vector_env.unwrapped, SyncVectorEnv):
            return [is_wrapped(env, wrapper_class) for env in self._envs(indices)]
        if isinstance(self.vector_env.unwrapped, AsyncVectorEnv):  # their names: <Monitor<TimeLimit<...>>>
            chains, names = self.vector_env.unwrapped.call("__str__"), _class_names(wrapper_class)
            return [not names.isdisjoint(re.findall(r"<(\w+)", chains[i])) for i in self._indices(indices)]
        return [False for _ in self._indices(indices)]

    def _envs_with(self, name: str) -> VectorEnv:
        """The VectorEnv; AttributeError where its environments lack the name, at which AsyncVectorEnv would end its processes."""
        if not self.has_attr(name):
            raise AttributeError(f"The environments of {self.vector_env} have no attribute '{name}'.")
        return self.vector_env.unwrapped

    def _envs(self, indices: Any) -> list[gym.Env]:
        return [self.vector_env.unwrapped.envs[i] for i in self._indices(indices)]

    def _indices(self, indices: Any) -> Any:
        """As SB3's `_get_indices`, before SB3's own constructor knows num_envs."""
        return range(self.vector_env.num_envs) if indices is None else self._get_indices(indices)


def _find_reset_rows(env: VectorEnv, mode: AutoresetMode) -> ResetRows | None:
    """What resets single environments; None where they reset themselves in the same step. Raises ConfigError."""
    if mode is AutoresetMode.SAME_STEP:
        return None
    inner = env.unwrapped
    if mode is AutoresetMode.DISABLED or isinstance(inner, SyncVectorEnv):
        return _by_mask
    if getattr(inner, "supports_reset_mask", False) or (isinstance(inner, AsyncVectorEnv) and inner.shared_memory):
        return _by_mask
    if isinstance(env, CartPoleVectorEnv):
        return _cart_pole
    raise ConfigError(
        f"{env} begins an ended environment anew one step late (autoreset_mode NEXT_STEP) and cannot reset some rows alone, so SB3 "
        "would learn a transition from one episode into the next. Make it with autoreset_mode=AutoresetMode.SAME_STEP (for "
        "gymnasium.make_vec: vectorization_mode='sync', vector_kwargs={'autoreset_mode': ...}), or pass reset_rows."
    )


def _by_mask(env: VectorEnv, rows: np.ndarray) -> tuple[Any, dict[str, Any]]:
    return env.reset(options={"reset_mask": rows})


def _check_reset_mask(env: VectorEnv) -> None:
    """ConfigError, with the wrapper's name, where `reset_mask` does not reach the environment, which answers with zeros here."""
    inner, mask_received = env.unwrapped, []
    chain = [env]
    while isinstance(chain[-1], VectorWrapper):
        chain.append(chain[-1].env)
    faulty = next((one for one in chain if isinstance(one, NormalizeReward)), None)

    def answer(*, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        mask_received.append("reset_mask" in (options or {}))
        return create_empty_array(inner.single_observation_space, inner.num_envs, fn=np.zeros), {}

    try:
        inner.reset = answer
        for wrapper in [] if faulty else chain[-2::-1]:
            mask_received.clear()
            with suppress(Exception):  # one that raises does so before the environment is called
                wrapper.reset(options={"reset_mask": np.arange(env.num_envs) == 0})
            if mask_received != [True]:
                faulty = wrapper
                break
    finally:
        del inner.reset
    if faulty is not None:
        name = type(faulty).__name__
        raise ConfigError(
            f"{name} is around a VectorEnv whose ended rows are begun anew one by one (autoreset_mode "
            f"{env.metadata['autoreset_mode'].name}), and it does not pass a reset of some rows on, or forgets the others with it. "
            f"Put its like around the single environments instead, gymnasium.wrappers.{name} in env_fns."
        )


def _cart_pole(env: CartPoleVectorEnv, rows: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
    """What CartPoleVectorEnv's next step would do with environments that ended."""
    env.state[:, rows] = env.np_random.uniform(env.low, env.high, (4, int(rows.sum())))
    env.steps[rows] = 0
    env.prev_done[rows] = False
    return env.state.T.astype(np.float32), {}


def _class_names(wrapper: type) -> set[str]:
    """The names of a class and of those derived from it."""
    return {wrapper.__name__}.union(*map(_class_names, wrapper.__subclasses__()))


def _infos_per_env(infos: dict[str, Any] | list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """A dict for each environment, of Gymnasium's dict of arrays with masks: `_key` says which have `key`."""
    if not isinstance(infos, dict):  # DictInfoToList is around it
        return [dict(info) for info in infos]
    rows: list[dict[str, Any]] = [{} for _ in range(count)]
    for key, value in infos.items():
        if key.startswith("_") and key[1:] in infos:
            continue
        have = np.asarray(infos.get(f"_{key}", np.ones(count, bool)))
        values = _infos_per_env(value, count) if isinstance(value, dict) else value
        if not isinstance(values, np.ndarray) and getattr(values, "ndim", 0):  # of torch or JAX
            values = np.asarray(values)
        if not isinstance(values, np.ndarray | list | tuple) or len(values) != count:
            values = [value] * count  # one value for all environments
        for i in np.flatnonzero(have).tolist():
            rows[i][key] = values[i]
    return rows
