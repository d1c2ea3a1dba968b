"""A world model beside an SB3 algorithm: its callback records the steps that the algorithm takes."""

from __future__ import annotations

from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecNormalize, unwrap_vec_wrapper

from worldmodel.agents.random import RandomAgent
from worldmodel.envs.imagined import part
from worldmodel.envs.vectors.workers import drain
from worldmodel.errors import ConfigError


class ObservingCallback(BaseCallback):
    """Base of callbacks with a world model.

    agent  the world model's learner and replay, as a RandomAgent that never acts; None: nothing is recorded

    SB3 assigns its `_last_obs` after the callbacks of a step. Where an exception or a callback ended the last `learn` in between,
    a `learn` that resets nothing would go on from an observation that the environments have left: they are reset then.
    """

    agent: RandomAgent | None = None

    def __init__(self, verbose: int = 0):
        super().__init__(verbose)
        self._in_sync, self._newest_obs = True, []

    def _init_callback(self) -> None:
        if unwrap_vec_wrapper(self.training_env, VecNormalize) is not None:
            raise ConfigError(
                "VecNormalize is around the environment, but a world model is about plain observations and rewards. Take it off; "
                "the world model standardises vectors itself."
            )

    def _on_training_start(self) -> None:
        model = self.model
        if not self._in_sync and any(model._last_obs is obs for obs in self._newest_obs):
            drain(model.env)
            model._last_obs = model.env.reset()
            model._last_episode_starts = np.ones(model.n_envs, bool)
        self._in_sync, self._newest_obs = False, [model._last_obs]
        if self.agent is not None:
            self.agent.set_logger(self.logger)
            self.agent.start_episodes(self._raw(model._last_obs))

    def _on_step(self) -> bool:
        step = self.locals
        self._newest_obs = [self.model._last_obs, step["new_obs"]]
        if self.agent is not None:
            action = np.asarray(step.get("clipped_actions", step["actions"]))  # what the environments got
            infos = [self._raw_info(info) for info in step["infos"]]
            self.agent.num_timesteps = self.num_timesteps
            self.agent.record(action, self._raw(step["new_obs"]), step["rewards"], step["dones"], infos)
        return True

    def _on_training_end(self) -> None:
        self._in_sync = self.model._last_obs is self._newest_obs[-1]

    def _raw(self, obs: Any) -> Any:
        """The agent's observations [N, ...] of the algorithm's."""
        return obs

    def _raw_info(self, info: dict[str, Any]) -> dict[str, Any]:
        if "terminal_observation" not in info:
            return info
        return {**info, "terminal_observation": part(self._raw(part(info["terminal_observation"], None)), 0)}
