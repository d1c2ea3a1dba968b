"""Environments in processes of their own, whose errors come home."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import gymnasium as gym
import numpy as np
from stable_baselines3.common.vec_env import SubprocVecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn

from worldmodel.errors import EnvError, MissingExtraError

FAULT = "worldmodel.fault"
"""The info key under which a worker reports an error: (class name, message)."""
ERRORS: dict[str, type[Exception]] = {"EnvError": EnvError, "MissingExtraError": MissingExtraError}


class ReportFaults(gym.Wrapper):
    """In the worker: an error ends as a report in the info, because an exception there would only end the process."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        try:
            return self.env.reset(seed=seed, options=options)
        except Exception as error:
            return self.observation_space.sample(), _report(error)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        try:
            return self.env.step(action)
        except Exception as error:
            return self.observation_space.sample(), 0.0, False, True, _report(error)


class WorkerVecEnv(SubprocVecEnv):
    """SB3's SubprocVecEnv that raises its workers' errors here, and an EnvError where a worker's process is gone.

    The environments must be wrapped in ReportFaults. After an error the batch of that step is lost; `close` never hangs.
    """

    def __init__(self, env_fns: Sequence[Callable[[], gym.Env]], start_method: str | None = None):
        try:
            super().__init__(list(env_fns), start_method=start_method)
        except (EOFError, OSError) as error:
            self._gone(error)

    def reset(self) -> VecEnvObs:
        try:
            obs = super().reset()
        except (EOFError, OSError) as error:
            self._gone(error)
        self._raise(self.reset_infos)
        return obs

    def step_async(self, actions: np.ndarray) -> None:
        try:
            super().step_async(actions)
        except (EOFError, OSError) as error:
            self._gone(error)

    def step_wait(self) -> VecEnvStepReturn:
        try:
            result = super().step_wait()
        except (EOFError, OSError) as error:
            self._gone(error)
        self._raise(result[3])
        self._raise(self.reset_infos)
        return result

    def close(self) -> None:
        if self.closed:
            return
        for remote in self.remotes:
            try:
                if self.waiting and remote.poll(5):
                    remote.recv()
                remote.send(("close", None))
            except (EOFError, OSError):
                continue
        for process in self.processes:
            process.join(timeout=5)
            if process.is_alive():
                process.terminate()
        self.closed = True

    def _raise(self, infos: Sequence[dict[str, Any] | None]) -> None:
        for info in infos:
            if info and FAULT in info:
                name, message = info[FAULT]
                raise ERRORS.get(name, EnvError)(message)

    def _gone(self, error: Exception) -> NoReturn:
        # The pipe breaks a moment before the process is reaped.
        for process in self.processes:
            process.join(timeout=0.2)
        dead = [f"environment {i} (exit code {p.exitcode})" for i, p in enumerate(self.processes) if not p.is_alive()]
        raise EnvError(
            f"The process of {', '.join(dead) or 'an environment'} is gone; expected an answer from it. Run with "
            "env.vectorize=dummy to see what it printed."
        ) from error


def _report(error: Exception) -> dict[str, Any]:
    return {FAULT: (type(error).__name__, str(error) if type(error).__name__ in ERRORS else f"{type(error).__name__}: {error}")}
