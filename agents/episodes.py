"""Returns and lengths of the episodes in which an algorithm acts."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv, VecMonitor, is_vecenv_wrapped

from worldmodel.envs.vectors.restarts import RESTARTED


class EpisodeStatistics:
    """Returns and lengths of episodes, reported as SB3's Monitor reports them where it does not.

    It does not where there is none, and at truncations by a time limit around it. Other ends that a Monitor does not report
    are left alone: the lost lives of Atari end episodes outside of it on purpose.
    """

    def __init__(self, venv: VecEnv):
        self.monitored = is_vecenv_wrapped(venv, VecMonitor)
        try:
            self.monitored |= all(venv.env_is_wrapped(Monitor))
        except (AttributeError, NotImplementedError):  # a VecEnv need not know
            pass
        self.start_time = time.time()
        self.returns, self.lengths = np.zeros(venv.num_envs), np.zeros(venv.num_envs, np.int64)

    def with_episode_info(self, rewards: np.ndarray, dones: np.ndarray, infos: Any) -> list[dict[str, Any]]:
        """The infos of a step, one dict for each environment, with `episode` in each that ended one."""
        infos = list(infos) if infos is not None and len(infos) == len(dones) else [{} for _ in dones]
        self.returns += rewards
        self.lengths += 1
        for i in np.flatnonzero(dones).tolist():
            ours = not self.monitored or infos[i].get("TimeLimit.truncated", False)
            if "episode" not in infos[i] and ours and RESTARTED not in infos[i]:
                episode = {"r": float(self.returns[i]), "l": int(self.lengths[i]), "t": round(time.time() - self.start_time, 6)}
                infos[i] = {**infos[i], "episode": episode}
            if "episode" in infos[i] or not self.monitored or RESTARTED in infos[i]:
                self.returns[i] = self.lengths[i] = 0
        return infos
