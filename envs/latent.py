"""The real environment with the world model's filtered state as observation."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper

from worldmodel.data import Sampling, State
from worldmodel.envs.imagined import Source, latent_space, learned_world, part
from worldmodel.envs.vectors.plain import Plain, as_known
from worldmodel.errors import ConfigError
from worldmodel.model import tensors


class LatentVecEnv(VecEnvWrapper):
    """Real environments whose observation is the feature of the world model's filtered state, for policies from the dream.

    venv          the environments that the model was trained in, with the same wrappers
    run_or_model  a Run, a run folder or a WorldModel

    The observation is float32 [F] (recurrent state h and the latent's mode), as in ImaginedVecEnv with observation="latent". It
    depends on all past observations and actions of the episode, so that memoryless algorithms get memory.
    `terminal_observation` is the feature at the last observation, where the environment gives that. Actions count from 0 whatever
    the environments' begin at, as those of SB3's own algorithms. Raises ConfigError where the spaces differ.
    """

    def __init__(self, venv: VecEnv, run_or_model: Source):
        self.world, _ = learned_world(run_or_model)
        venv = as_known(venv, self.world.obs.space, self.world.action.space)
        for name, space, known in (
            ("observation", venv.observation_space, self.world.obs.space),
            ("action", venv.action_space, self.world.action.space),
        ):
            if space != known:
                raise ConfigError(
                    f"The environments' {name} space is {space}; the world model was trained on {known}. Pass environments made "
                    "as in its training: worldmodel.envs.make_vec(run.config.env)."
                )
        self._plain_action = Plain.of(venv.action_space, action=True)
        super().__init__(venv, observation_space=latent_space(self.world), action_space=self._plain_action.outer)
        self.device = self.world.device
        self._all = np.arange(self.num_envs)
        self._state = self.world.initial(self.num_envs)
        self._action = np.zeros((self.num_envs, self.world.action.dim), np.float32)

    def reset(self) -> np.ndarray:
        return self._begin(self.venv.reset(), self._all)

    def step_async(self, actions: np.ndarray) -> None:
        actions = self._plain_action.from_plain(actions)
        self._action = self.world.action.encode(actions)
        self.venv.step_async(actions)

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        obs, rewards, dones, infos = self.venv.step_wait()
        ended = np.flatnonzero(dones)
        with_terminal = [i for i in ended if infos[i].get("terminal_observation") is not None]
        raw = self.world.obs.to_raw(obs)
        for i in with_terminal:
            for name, x in self.world.obs.to_raw(part(infos[i]["terminal_observation"], None)).items():
                raw[name][i] = x[0]
        feature = self._filter(raw, self._all, first=False)
        if len(ended):
            for i in with_terminal:
                infos[i]["terminal_observation"] = feature[i].copy()
            feature[ended] = self._begin(part(obs, ended), ended)
        return feature, rewards, dones, infos

    def _begin(self, obs: Any, envs: np.ndarray) -> np.ndarray:
        """Features [n, F] of episodes' first observations."""
        return self._filter(self.world.obs.to_raw(obs), envs, first=True)

    def _filter(self, raw: dict[str, np.ndarray], envs: np.ndarray, first: bool) -> np.ndarray:
        """Filters observations of the environments with indices `envs` [n]; the features [n, F]."""
        at = torch.from_numpy(envs).to(self.device)
        state = self.world.observe(
            self._state.index(at),
            tensors(raw, self.device),
            torch.from_numpy(self._action[envs]).to(self.device),
            torch.full((len(envs),), first, device=self.device),
            Sampling(mode=True),
        )
        self._state = State({name: x.index_copy(0, at, state[name]) for name, x in self._state.items()})
        return self.world.dynamics.feature(state).cpu().numpy()
