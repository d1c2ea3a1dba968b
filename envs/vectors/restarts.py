"""Replaces environments that failed by new ones.

An environment in `ReportFaults` reports its errors instead of raising them. A VecEnv of such environments replaces one that failed
by a new one, as often as its `Restarts` allow, and raises the error after that.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn
from stable_baselines3.common.vec_env.patch_gym import _patch_env

from worldmodel.envs.vectors.batches import copied, take, write
from worldmodel.errors import EnvError, MissingExtraError

_log = logging.getLogger(__name__)

FAULT = "worldmodel.fault"
"""The info key under which an environment reports an error: (class name, message)."""
RESTARTED = "worldmodel.restarted"
"""The info key of a step in which an environment failed and was made anew: the error's message. Such a step is no transition."""
ERRORS: dict[str, type[Exception]] = {"EnvError": EnvError, "MissingExtraError": MissingExtraError}


class ReportFaults(gym.Wrapper):
    """Reports errors in the info. The reset that VecEnvs make after a failed step repeats the report without a call."""

    _fault: dict[str, Any] | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        report, self._fault = self._fault, None
        if report is None:
            try:
                return self.env.reset(seed=seed, options=options)
            except Exception as error:
                report = _fault_info(error)
        return zero_observation(self.observation_space), report

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        try:
            return self.env.step(action)
        except Exception as error:
            self._fault = _fault_info(error)
            return zero_observation(self.observation_space), 0.0, False, True, dict(self._fault)


class Restarts:
    """Limits how often environments are made anew: `limit` times within `window` seconds, over all of a VecEnv; `count` so far."""

    def __init__(self, limit: int = 0, window: float = 300.0):
        self.limit, self.window, self.count = limit, window, 0
        self._times: deque[float] = deque()

    def record_failure(self, error: Exception) -> None:
        """Counts a restart for this error; raises it where none is left, and where a new environment would fail as well."""
        now = time.monotonic()
        while self._times and now - self._times[0] > self.window:
            self._times.popleft()
        if isinstance(error, MissingExtraError) or not self.limit:
            raise error
        if len(self._times) >= self.limit:
            raise EnvError(f"{error} It was made anew {self.limit} times within {self.window:g} s, as env.restarts allows.")
        self._times.append(now)
        self.count += 1
        _log.warning("%s It is made anew: restart %d.", error, self.count)


class RestartingVecEnv(VecEnv):
    """Mixin of VecEnvs whose environments are in ReportFaults: replaces those that failed by new ones.

    A step in which one failed is no transition: its info holds RESTARTED and nothing else of the environment, and for SB3 the
    episode is truncated at its last good observation, with reward 0. Where only the reset after an episode's end failed, the step
    counts. The new environment is reset with a seed from the VecEnv's, its number and the number of its failures.
    """

    restarts: Restarts
    _base: int | None = None

    def _recreate(self, index: int, seed: int | None) -> tuple[Any, dict[str, Any]]:
        """The result of the reset of a new environment with this number. Raises EnvError."""
        raise NotImplementedError

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        seeds = super().seed(seed)
        self._base, self._failures = seeds[0], [0] * self.num_envs
        return seeds

    def reset(self) -> VecEnvObs:
        obs = super().reset()
        self.reset_infos = list(self.reset_infos)
        for i, info in enumerate(self.reset_infos):
            if FAULT in info:
                self._write_first(obs, i, *self._restart(i, info[FAULT]))
        self._last = obs
        return obs

    def step_wait(self) -> VecEnvStepReturn:
        obs, rewards, dones, infos = super().step_wait()
        infos, self.reset_infos = list(infos), list(self.reset_infos)
        for i, info in enumerate(infos):
            if FAULT in info:
                infos[i] = {
                    RESTARTED: info[FAULT][1],
                    "TimeLimit.truncated": True,
                    "terminal_observation": copied(take(self._last, i)),
                }
                rewards[i], dones[i] = 0, True
                self._write_first(obs, i, *self._restart(i, info[FAULT]))
            elif dones[i] and FAULT in self.reset_infos[i]:
                self._write_first(obs, i, *self._restart(i, self.reset_infos[i][FAULT]))
        self._last = obs
        return obs, rewards, dones, infos

    def _restart(self, index: int, fault: tuple[str, str] | None) -> tuple[Any, dict[str, Any]]:
        while fault is not None:
            name, message = fault
            self.restarts.record_failure(ERRORS.get(name, EnvError)(message))
            self._failures[index] += 1
            seed = None
            if self._base is not None:
                seed = int(np.random.SeedSequence([self._base, index, self._failures[index]]).generate_state(1)[0])
            try:
                obs, info = self._recreate(index, seed)
                fault = info.get(FAULT)
            except EnvError as error:
                fault = ("EnvError", str(error))
        return obs, info

    def _write_first(self, obs: VecEnvObs, index: int, first: Any, info: dict[str, Any]) -> None:
        """Writes the first observation of an episode into those of all environments."""
        write(obs, index, first)
        self.reset_infos[index] = info


class LocalVecEnv(RestartingVecEnv, DummyVecEnv):
    """SB3's DummyVecEnv of environments that are made anew; `env_fns` make them in ReportFaults."""

    def __init__(self, env_fns: Sequence[Callable[[], gym.Env]], restarts: Restarts):
        self.restarts, self._env_fns = restarts, list(env_fns)
        self._failures = [0] * len(self._env_fns)
        super().__init__(self._env_fns)

    def _recreate(self, index: int, seed: int | None) -> tuple[Any, dict[str, Any]]:
        with contextlib.suppress(Exception):  # a broken environment may fail to close
            self.envs[index].close()
        self.envs[index] = _patch_env(self._env_fns[index]())
        return self.envs[index].reset(seed=seed)


def restarted(infos: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Which environments [N] were made anew in this step, which is no transition there."""
    return np.array([RESTARTED in info for info in infos], bool)


def zero_observation(space: gym.Space) -> Any:
    """Zeros in the place of an observation."""
    if isinstance(space, gym.spaces.Dict):
        return {key: zero_observation(sub) for key, sub in space.items()}
    return np.zeros(space.shape, space.dtype)


def _fault_info(error: Exception) -> dict[str, Any]:
    return {FAULT: (type(error).__name__, str(error) if type(error).__name__ in ERRORS else f"{type(error).__name__}: {error}")}
