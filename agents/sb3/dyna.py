"""Dyna: imagined transitions in an SB3 algorithm's own replay buffer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.buffers import DictReplayBuffer, ReplayBuffer
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.vec_env import VecTransposeImage, unwrap_vec_wrapper

from worldmodel.agents.arguments import read_config
from worldmodel.agents.random import RandomAgent
from worldmodel.agents.sb3.observing import ObservingCallback
from worldmodel.config import Config
from worldmodel.envs.imagined import ImaginedWorld, Source, latent_space, learned_world, part
from worldmodel.envs.make import id_of
from worldmodel.envs.vectors.plain import COUNT_FROM_0, plain_action, plain_obs
from worldmodel.errors import ConfigError, require_whole
from worldmodel.model import needs_ensemble
from worldmodel.spaces import ActionSpec, ObsSpec
from worldmodel.spaces.casts import stack
from worldmodel.storage.replay import Replay

REFILTER_EVERY = 25
"""Updates of a world model in training after which roll-outs begin at states that its new weights have filtered."""


class DynaCallback(ObservingCallback):
    """Adds `ratio` imagined transitions for each real one to the ReplayBuffer of DQN, SAC, TD3 and their like.

        SAC("MlpPolicy", "Pendulum-v1", gradient_steps=4).learn(1000, callback=DynaCallback(ratio=10))

    world            a finished world model: a Run, a run folder or a WorldModel (that needs `replay`); None: one is trained along,
                     on the algorithm's experience
    ratio            imagined transitions per real step
    horizon          steps of each roll-out, which begins at the filtered state of a recorded row and follows the algorithm's policy
    every            real steps (of each environment) between roll-outs; a world model that is trained along makes none before its
                     first update, after `train.prefill` rows
    max_uncertainty  a roll-out ends where the ensemble's disagreement is larger (needs model.ensemble.members)
    replay           recorded experience to begin from, instead of the run's
    recipe, config   of the world model that is trained along: as those of Dreamer, e.g. config={"train.ratio": 1.0}
    seed             of that model, and of all draws here

    The observations are decoded where the algorithm observes the environment, and features where it observes a LatentVecEnv.
    Source: Sutton 1991 (Dyna); Janner et al. 2019 (MBPO, algorithm 2), whose short branches from real states these are.
    Raises ConfigError for algorithms without such a buffer, for other spaces, and for numbers out of range.
    """

    def __init__(
        self,
        world: Source | None = None,
        *,
        ratio: float = 10.0,
        horizon: int = 1,
        every: int = 10,
        max_uncertainty: float | None = None,
        replay: Replay | None = None,
        recipe: str | Path | None = None,
        config: Config | Mapping | Sequence[str] | None = None,
        seed: int = 0,
    ):
        super().__init__()
        require_whole("DynaCallback: ", horizon=horizon, every=every)
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not (np.isfinite(ratio) and ratio >= 0):
            raise ConfigError(f"DynaCallback: ratio is {ratio!r}; expected imagined transitions per real step, 0 or more.")
        if max_uncertainty is not None and not max_uncertainty > 0:
            raise ConfigError(f"DynaCallback: max_uncertainty is {max_uncertainty!r}; expected a number above 0, or None: nowhere.")
        if world is not None and (recipe is not None or config is not None):
            raise ConfigError("DynaCallback: recipe and config are for a world that learns along. Leave them out, or the world.")
        if world is None and replay is not None:
            raise ConfigError("DynaCallback: replay is for a finished world; one that learns along has its own. Leave it out.")
        if recipe is not None and isinstance(config, Config):
            raise ConfigError("DynaCallback: a whole Config leaves nothing to a recipe. Give one of them, or only what differs.")
        self.source, self.ratio, self.horizon, self.every = world, float(ratio), horizon, every
        self.max_uncertainty, self.seed, self.recorded = max_uncertainty, seed, replay
        self.recipe, self.config = recipe, config
        self.imagined = 0
        self._transitions_due, self._leftover = 0.0, []
        self.generator = torch.Generator().manual_seed(seed)

    # Beginning ------------------------------------------------------------------------------------------------------

    def _init_callback(self) -> None:
        super()._init_callback()
        model = self.model
        if not isinstance(model, OffPolicyAlgorithm):
            raise ConfigError(
                f"Dyna fills a replay buffer, and {type(model).__name__} has none. Use DQN, SAC, TD3, TQC or QRDQN; on-policy "
                "algorithms learn inside the world: train_in_dream."
            )
        if type(model.replay_buffer) not in (ReplayBuffer, DictReplayBuffer):
            raise ConfigError(
                f"Dyna adds single transitions, and {type(model.replay_buffer).__name__} takes neighbours for one episode. Use "
                "SB3's ReplayBuffer or DictReplayBuffer: n_steps=1, and no HER."
            )
        if getattr(model.replay_buffer, "optimize_memory_usage", False):
            raise ConfigError("Dyna: with optimize_memory_usage=True a buffer cannot hold single transitions. Leave it out.")
        if self.source is None and self.agent is None:
            self.agent = self._make_learner()
        self.world, run = (self.agent.learner.ema, None) if self.agent is not None else learned_world(self.source)
        needs_ensemble(self.world, "max_uncertainty", self.max_uncertainty)
        self._transposed, self._worlds, self._filtered_at = None, None, 0
        known, acts = plain_obs(self.world.obs).space, plain_action(self.world.action).space
        observed, wrapper = model.observation_space, unwrap_vec_wrapper(self.training_env, VecTransposeImage)
        if wrapper is not None and known == wrapper.venv.observation_space:
            observed, self._transposed = known, wrapper
        self._latent = observed == latent_space(self.world)
        if (not self._latent and observed != known) or model.action_space != acts:
            raise ConfigError(
                f"The world model is of another environment: it knows {known} and {acts}, the algorithm {model.observation_space} "
                f"and {model.action_space}. Pass a run of this environment. {COUNT_FROM_0}"
            )
        if self.agent is None and self.recorded is None and run is not None:
            self.recorded = run.replay()

    def _make_learner(self) -> RandomAgent:
        """The world model that is trained along, with its replay."""
        env, config = self.training_env, self.config
        if not isinstance(config, Config):
            overrides = {**config, "agent": "random"} if isinstance(config, Mapping) else [*(config or []), "agent=random"]
            config = read_config(self.recipe, overrides, id_of(env) or "custom", env)
        specs = ObsSpec.from_space(env.observation_space, config.env.layout), ActionSpec.from_space(env.action_space)
        return RandomAgent.from_specs("MlpPolicy", *specs, num_envs=env.num_envs, config=config, seed=self.seed)

    # At each step ---------------------------------------------------------------------------------------------------

    def _on_step(self) -> bool:
        super()._on_step()
        if self.agent is not None:
            self.agent.learn_from_replay()
            if not self.agent.learner.updates:
                return True
        if self.n_calls % self.every == 0:
            self._transitions_due += self.ratio * self.every * self.training_env.num_envs
            starts = int(self._transitions_due / self.horizon)
            self._transitions_due -= starts * self.horizon
            if starts:
                self._add(self.roll_out(starts))
        return True

    def roll_out(self, starts: int) -> list[tuple[Any, Any, np.ndarray, np.ndarray, np.ndarray]]:
        """(obs, next obs, action, reward, done) [n, ...] of each step; ended roll-outs are left out of the next ones."""
        worlds = self._imagined(starts)
        obs, active, steps = self._for_algorithm(worlds.to_observations(worlds.reset())), np.arange(starts), []
        for _ in range(self.horizon):
            action = self.model.predict(obs, deterministic=False)[0]
            step_result = worlds.step(worlds.encode(action))
            next_obs = self._for_algorithm(worlds.to_observations(step_result.feature))
            reward, done, truncated = (x.cpu().numpy() for x in (step_result.reward, step_result.terminated, step_result.truncated))
            steps.append(tuple(part(x, active) for x in (obs, next_obs, action, reward, done)))
            active = active[~(done | truncated)[active]]
            obs = next_obs
            if not len(active):
                break
        return steps

    def _imagined(self, starts: int) -> ImaginedWorld:
        """At least so many worlds, the same object each time: starts are reused until the model has made REFILTER_EVERY updates."""
        updates = 0 if self.agent is None else self.agent.learner.updates
        if self._worlds is None or self._worlds.num_envs < starts:
            self._worlds = ImaginedWorld(
                self.world,
                starts,
                self.horizon,
                observation="latent" if self._latent else "decoded",
                seed=int(torch.randint(2**31, (), generator=self.generator)),
                replay=self.recorded if self.agent is None else self.agent.replay,
                max_uncertainty=self.max_uncertainty,
                plain=True,
            )
            self._filtered_at = updates
        elif updates >= self._filtered_at + REFILTER_EVERY:
            self._worlds.seed(None)
            self._filtered_at = updates
        return self._worlds

    def _for_algorithm(self, obs: Any) -> Any:
        """As the algorithm observes it: with transposed images."""
        return obs if self._transposed is None else self._transposed.transpose_observations(obs)

    def _add(self, steps: list[tuple[Any, Any, np.ndarray, np.ndarray, np.ndarray]]) -> None:
        """Into the buffer, as many transitions at a time as it has environments; the remainder waits for the next call."""
        buffer, envs = self.model.replay_buffer, self.training_env.num_envs
        transitions = self._leftover + [tuple(part(x, i) for x in step) for step in steps for i in range(len(step[3]))]
        for at in range(0, len(transitions) - envs + 1, envs):
            obs, next_obs, action, reward, done = (stack(column) for column in zip(*transitions[at : at + envs]))
            if self.world.action.kind == "continuous":
                action = self.model.policy.scale_action(action)  # as SB3 stores its own actions
            buffer.add(obs, next_obs, action, reward, done, [{} for _ in range(envs)])
            self.imagined += envs
        self._leftover = transitions[len(transitions) - len(transitions) % envs :]
        self.logger.record("dyna/imagined", self.imagined)
