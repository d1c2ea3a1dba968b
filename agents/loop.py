"""Collect -> learn -> improve: the one loop that every agent with a world model shares, as an SB3 algorithm.

An agent differs in two things only: its `controller`, which turns a belief into an action, and its `behaviour`, which learns
from a world-model batch. Evaluation, checkpoints and stopping are SB3 callbacks.

Each real step adds `train.ratio` to the updates that are due; whole ones are made at once, and the rest is carried over.
"""

from __future__ import annotations

import logging
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import MaybeCallback
from stable_baselines3.common.utils import safe_mean
from stable_baselines3.common.vec_env import VecEnv

from worldmodel.agents.actor_critic import ActorCriticLearner
from worldmodel.agents.arguments import (
    find_device,
    fitting_policy,
    refuse_normalization,
    reject_unknown_arguments,
    require_own_policy,
    resolve_config,
    with_masks_if_any,
    with_spec_layout,
)
from worldmodel.agents.belief import BeliefPolicy, Controller, keep_legal
from worldmodel.agents.episodes import EpisodeStatistics
from worldmodel.agents.experience import fit_scaling, new_replay, replay_capacity, rows_before_reset
from worldmodel.agents.exploration import Exploration
from worldmodel.agents.saving import SavedAlgorithm
from worldmodel.config import Config
from worldmodel.data import State
from worldmodel.envs.make import as_vec_env, seed_envs
from worldmodel.envs.masks import MaskedVecEnv, warn_of_unread_masks
from worldmodel.envs.vectors.restarts import Restarts, restarted
from worldmodel.envs.vectors.workers import drain
from worldmodel.errors import ConfigError, EnvError
from worldmodel.learner import Learner
from worldmodel.model import WorldModel, tensors
from worldmodel.spaces import ActionSpec, ObsSpec
from worldmodel.spaces.names import signal_names
from worldmodel.spaces.specs import ACTION_MASK
from worldmodel.storage.replay import Replay
from worldmodel.storage.weights import cpu_randomness

_log = logging.getLogger(__name__)
LOG_STEPS = 500
"""Real steps after which a log entry is due where no episode has ended."""


class WorldModelAlgorithm(SavedAlgorithm):
    """Base of Dreamer and its like: a world model learned from the replay, and a controller that acts on its beliefs.

    env     id string, gymnasium environment, VectorEnv or VecEnv (VecNormalize is refused: observations are standardised inside)
    policy  "MlpPolicy", "CnnPolicy" or "MultiInputPolicy", after the observations, or BeliefPolicy, which is all of them
    recipe  name or path; without it, the recipe made for the environment's id, else defaults from its spaces
    config  dotted overrides, e.g. {"train.ratio": 1.0} or ["model=vae"]
    stats_window_size  episodes over which returns, lengths and success are averaged in the log
    seed    of environments, weights and draws; None: drawn from numpy's global state, as SB3's set_random_seed leaves it
    trust   opens files that options name although that can run code (agent.path of agent=sb3); they are refused otherwise
    """

    kind: ClassVar[str]
    replay_folder: pathlib.Path | None = None
    """Where a run keeps experience; None outside of a run."""
    should_continue: Callable[[], bool] = staticmethod(lambda: True)
    """Asked between updates: where it says no they end, and the others stay pending. A run asks for signals there."""
    policy: BeliefPolicy
    behaviour: ActorCriticLearner | None = None
    """The actor-critic's learner, which trains the controller on each batch (Dreamer, Planner); None: nothing of it is trained."""
    ratio: float
    """Updates per real step: `train.ratio`, but where a run follows the clock (`train.minutes`)."""
    kept_rows: int = 0
    """Rows that the replay began with, of another run: `train.prefill` counts those after them."""
    improves: bool = True
    """Whether an update also improves the controller, on states of the averaged model."""
    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = dict.fromkeys(
        ("MlpPolicy", "CnnPolicy", "MultiInputPolicy"), BeliefPolicy
    )

    def __init__(
        self,
        policy: str | type[BasePolicy],
        env: str | gym.Env | gym.vector.VectorEnv | VecEnv | None,
        *,
        recipe: str | pathlib.Path | None = None,
        config: Config | Mapping | Sequence[str] | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: torch.device | str = "auto",
        trust: bool = False,
        _init_setup_model: bool = True,
        **others: Any,
    ):
        require_own_policy(type(self).__name__, policy)
        self.trust = trust
        self.config = resolve_config(self.kind, recipe, config, env)
        reject_unknown_arguments(type(self), others, self.config)
        seed = int(np.random.randint(2**31)) if seed is None else seed
        if env is not None:  # before SB3's own checks, so that the error for a space without support says what to do
            env, self.config = with_masks_if_any(env, self.config, seed, is_complete=isinstance(config, Config))
            self.obs_spec = ObsSpec.from_space(env.observation_space, self.config.env.layout)
            self.action_spec = ActionSpec.from_space(env.action_space)
            if isinstance(policy, str) and self.obs_spec.keys.keys() == {"obs", ACTION_MASK}:
                policy = "MultiInputPolicy"  # by SB3's rule: the mask made a Dict of the observation that the name was for
        super().__init__(
            policy,
            env,
            learning_rate=self.config.train.lr,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            device=find_device(device),
            support_multi_env=True,
            seed=seed,
        )
        if verbose and not isinstance(config, Config):
            print(f"Recipe: {self.config.recipe or 'none was made for this environment; defaults from its spaces'}")
        self.policy_name = policy
        if env is not None and _init_setup_model:
            self._check_window()
            self._setup_model()

    @staticmethod
    def _wrap_env(env: Any, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        """SB3's hook; images are not transposed, since ObsSpec knows their layout."""
        env = as_vec_env(env)
        refuse_normalization(env)
        return env

    def set_env(self, env: gym.Env | VecEnv, force_reset: bool = True) -> None:
        """SB3's; the environment's images may also have their channels at the other end."""
        env, own = self._wrap_env(env, self.verbose), self.observation_space
        env = MaskedVecEnv.around(env, self.world.is_masked)
        if with_spec_layout(self.obs_spec, env.observation_space) == own:
            self.observation_space = env.observation_space  # with which SB3 compares
        try:
            super().set_env(env, force_reset)
        finally:
            self.observation_space = own

    def _check_window(self) -> None:
        """ConfigError where the replay can never hold one sequence: nothing would be learned, without a word."""
        train = self.config.train
        kept, needed = replay_capacity(train, self.obs_spec, self.action_spec) // self.n_envs, self._sequence_rows
        if kept < needed:
            also = "" if train.replay_gib is None else f" and train.replay_gib (now {train.replay_gib})"
            raise ConfigError(
                f"The replay keeps {kept} steps of each of {self.n_envs} environments, but one sequence needs {needed}. "
                f"Raise train.capacity (now {train.capacity}){also}, or lower train.batch_length (now {train.batch_length})."
            )

    # Building -------------------------------------------------------------------------------------------------------

    def _setup_model(self) -> None:
        signal_names(self.obs_spec, self.config.env.names)  # raises now, not at the first figure
        self.policy_name = fitting_policy(self.policy_name, self.obs_spec, self.observation_space)
        with cpu_randomness(self.seed):
            self.world = WorldModel(self.config.model, self.obs_spec, self.action_spec).to(self.device)
            self.controller = self._make_controller().to(self.device)
        self.learner = Learner(self.world, self.config.train)
        self.policy = BeliefPolicy(self.observation_space, self.action_space, self.learner.ema, self.controller, self.seed)
        self.generator = torch.Generator(device=self.device).manual_seed(self.seed + 1)
        self.rng = np.random.default_rng(self.seed)
        self.replay: Replay | None = None
        self.ratio = self.config.train.ratio
        self._updates_due, self._restarts, self._logged_at, self._warned_no_last_obs = 0.0, 0, 0, False
        self._belief: State | None = None
        self.exploration = Exploration(self.action_spec)

    def predict(
        self,
        observation: Any,
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
        action_masks: np.ndarray | None = None,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """SB3's, and sb3-contrib's with masks: see `BeliefPolicy.predict`."""
        return self.policy.predict(observation, state, episode_start, deterministic, action_masks)

    def _make_controller(self) -> Controller:
        raise NotImplementedError

    def set_random_seed(self, seed: int | None = None) -> None:
        """SB3's: seeds the process, the environments from their next reset on, and all draws of this model."""
        super().set_random_seed(seed)
        if seed is not None:
            self.policy.generator.manual_seed(seed)
            self.generator.manual_seed(seed + 1)
            self.rng = np.random.default_rng(seed)

    @property
    def _sequence_rows(self) -> int:
        """Rows of one sequence of a batch."""
        return self.config.train.burn_in + self.config.train.batch_length

    @property
    def prefill_rows(self) -> int:
        """Rows in the replay up to which experience is collected at random, before anything is learned."""
        return self.config.train.prefill + self.kept_rows

    # Learning -------------------------------------------------------------------------------------------------------

    def learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int | None = 4,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> WorldModelAlgorithm:
        """Collect `total_timesteps` real steps and learn from them; SB3's signature.

        log_interval  episodes between log entries; there is one at least every LOG_STEPS steps, and one at the end unless a
                      callback stops the training

        After an exception anywhere in it the next `learn` begins new episodes, and open ones end as by truncation.
        """
        if self.env is None:
            raise ConfigError(f"{type(self).__name__} has no environment to learn in. Call set_env(env) first.")
        fresh = reset_num_timesteps or self._last_obs is None  # when SB3 resets the environments, as after set_env
        if self._last_obs is None:
            drain(self.env)
        try:
            total_timesteps, callback = self._setup_learn(
                total_timesteps, callback, reset_num_timesteps, tb_log_name or type(self).__name__, progress_bar
            )
            if self.replay is None and not self.num_timesteps and self.config.env.action_masks is None:
                warn_of_unread_masks(self.env)
            if fresh or self.replay is None or self._belief is None:
                self.start_episodes(self._last_obs)
            self._logged_at = self.num_timesteps
            callback.on_training_start(locals(), globals())
            goes_on = True
            while goes_on and self.num_timesteps < total_timesteps:
                goes_on = self._step_and_learn(callback, log_interval)
        except BaseException:  # perhaps between the environments' step and the replay: the next row would not follow its last
            self._last_obs = None
            raise
        if goes_on and log_interval is not None and self._logged_at < self.num_timesteps:
            self.dump_logs()
        callback.on_training_end()
        return self

    def _step_and_learn(self, callback: Any, log_interval: int | None) -> bool:
        """One step of every environment, the updates that are then due, and the callbacks."""
        callback.on_rollout_start()
        self._update_current_progress_remaining(self.num_timesteps, self._total_timesteps)  # before any update reads it
        actions, new_obs, rewards, dones, infos = self._collect()
        env, replay_buffer = self.env, self.replay  # for the callbacks, which know these names from SB3
        self.num_timesteps += env.num_envs
        self.learn_from_replay()
        self._episode_num += (ended := int(dones.sum()))
        self._update_info_buffer(infos, dones)
        callback.update_locals(locals())
        goes_on = callback.on_step()
        if goes_on:
            callback.on_rollout_end()
        if log_interval is not None and (
            self._episode_num // log_interval > (self._episode_num - ended) // log_interval
            or self.num_timesteps - self._logged_at >= LOG_STEPS
        ):
            self.dump_logs()
        return goes_on

    # Experience -----------------------------------------------------------------------------------------------------

    def start_episodes(self, obs: Any) -> None:
        """Open episodes end as by truncation, and the first observation of each environment goes into the replay."""
        if self.replay is None:
            self.replay = self._new_replay()
        elif self.replay.num_envs != self.n_envs:
            raise ConfigError(
                f"The replay was collected with {self.replay.num_envs} environments, the new VecEnv has {self.n_envs}. "
                "Use as many, or a fresh agent."
            )
        else:
            self.replay.truncate_open_episodes()
        self.exploration.begin(self.n_envs, self.replay)
        self._store_first(self._rows(obs), np.arange(self.n_envs))
        self._belief = self.policy.initial_belief(self.n_envs)
        self._episode_statistics = None if self.env is None else EpisodeStatistics(self.env)  # None: others call `record`
        self._last_episode_starts = np.ones(self.n_envs, bool)

    def recover(self, folder: pathlib.Path, log: Callable[[str], object]) -> None:
        """Begins with the experience that lies in a folder, as far as it is intact."""
        self.replay = self._new_replay()
        self.replay.recover(folder, log)
        fit_scaling(self.world, self.replay)

    def _new_replay(self) -> Replay:
        self.kept_rows = 0
        return new_replay(self.config.train, self.obs_spec, self.action_spec, self.n_envs, self.replay_folder)

    def restart_episodes(self, seed: int) -> None:
        """Open episodes end as by truncation, and new ones begin in environments seeded with seed, seed + 1, ..."""
        seed_envs(self.env, seed)
        self._last_obs = self.env.reset()
        self.start_episodes(self._last_obs)

    def _rows(self, obs: Any) -> dict[str, np.ndarray]:
        rows = self.obs_spec.to_raw(obs, self._location)
        self.obs_spec.check(rows, self._location)
        return rows

    def _location(self, env: int = 0) -> str:
        return f"environment {env}, episode {self._episode_num}, real step {self.num_timesteps}"

    def _store_first(self, rows: dict[str, np.ndarray], envs: np.ndarray) -> None:
        n = len(envs)
        no, yes = np.zeros(n, bool), np.ones(n, bool)
        self._store(rows, np.zeros((n, self.action_spec.dim), np.float32), np.zeros(n, np.float32), yes, no, no, envs)

    def _store(
        self,
        rows: dict[str, np.ndarray],
        prev_action: np.ndarray,
        reward: np.ndarray,
        first: np.ndarray,
        last: np.ndarray,
        terminal: np.ndarray,
        envs: np.ndarray,
    ) -> None:
        """One row [n, ...] of each of `envs` into the replay and the running statistics."""
        self.replay.add(rows, prev_action, reward, first, last, terminal, streams=envs)
        canonical = self.obs_spec.canonical(tensors(rows, self.device))
        self.world.scaling.update(canonical)
        self.world.heads.scale.update(torch.as_tensor(reward))
        self.exploration.add(prev_action, reward, first, terminal, envs, canonical)

    def _collect(self) -> tuple[np.ndarray, Any, np.ndarray, np.ndarray, Sequence[dict]]:
        """One step of every environment into the replay: (actions, new observations, rewards, dones, infos)."""
        rows = self._rows(self._last_obs)
        if self.learner.updates == 0 and self.replay.added < self.prefill_rows:
            action = self._random_action()
        else:
            action, self._belief = self.policy.filter_and_act(self._belief, rows, self._last_episode_starts, deterministic=False)
            if self.config.train.explore:
                is_random, random_action = self.exploration.act(self._last_episode_starts, self.rng)
                action = np.where(is_random[:, None], random_action, action)
        action = keep_legal(self.world, action, None, self.rng, rows)
        self._belief = State({**self._belief, "prev_action": torch.as_tensor(action, device=self.device)})
        env_action = self.action_spec.decode(action)
        new_obs, rewards, dones, infos = self.env.step(env_action)
        rewards, dones = np.asarray(rewards), np.asarray(dones, bool)
        infos = self._episode_statistics.with_episode_info(rewards, dones, infos)
        self.record(env_action, new_obs, rewards, dones, infos)
        self._last_obs, self._last_episode_starts = new_obs, dones.copy()
        return env_action, new_obs, rewards, dones, infos

    def record(self, env_action: np.ndarray, new_obs: Any, rewards: np.ndarray, dones: np.ndarray, infos: Sequence[dict]) -> None:
        """Adds a step of the VecEnv, whoever took it, to the replay. Raises EnvError, with nothing stored, on invalid numbers.

        Of an environment that failed and was made anew the episode ends before the step, and the new one's first row is stored.
        """
        action = self.action_spec.encode(env_action)
        if not np.isfinite(rewards).all():
            env = int(np.flatnonzero(~np.isfinite(rewards))[0])
            raise EnvError(
                f"{self._location(env)}: the reward is {rewards[env]}. A finite number was expected; the step was not stored."
            )
        new_rows = self._rows(new_obs)
        rows, terminal = rows_before_reset(new_rows, dones, infos, self._rows, self._previous_row)
        failed = restarted(infos)
        self.replay.truncate_open_episodes(np.flatnonzero(failed).tolist())
        if not failed.all():
            kept = np.flatnonzero(~failed)
            rows = {name: x[kept] for name, x in rows.items()}
            self._store(rows, action[kept], rewards[kept], np.zeros(len(kept), bool), dones[kept], terminal[kept], kept)
        if dones.any():
            ended = np.flatnonzero(dones)
            self._store_first({name: x[ended] for name, x in new_rows.items()}, ended)

    def _previous_row(self, env: int) -> dict[str, np.ndarray]:
        """The newest row of one environment [...]: the stand-in for an episode's last observation where its info lacks that."""
        if not self._warned_no_last_obs:
            self._warned_no_last_obs = True
            _log.warning(
                "%s: an episode ended without 'terminal_observation' in its info, so that its last observation is unknown; the one "
                "before stands in for it, here and wherever it is missing. SB3's VecEnvs give it; a wrapper must keep it.",
                self._location(env),
            )
        held = self.replay.lengths[env]
        return {name: x[0] for name, x in self.replay.observations(env, held - 1, held).items()}

    def _random_action(self) -> np.ndarray:
        """Uniform actions [N, A]; each is kept for `train.random_action_repeat` steps on average, at most until its episode ends.

        White noise averages out: an Acrobot that is pushed at random at every step never swings up in 500 steps,
        one whose pushes last five steps does so in every second episode. Source: Dabney et al. 2021 (temporally
        extended exploration), with a geometric duration.
        """
        fresh = self.action_spec.sample(self.env.num_envs, self.rng)
        redraw = self._last_episode_starts | (self.rng.random(self.env.num_envs) * self.config.train.random_action_repeat < 1)
        return np.where(redraw[:, None], fresh, self._belief["prev_action"].cpu().numpy())

    # Updates --------------------------------------------------------------------------------------------------------

    def learn_from_replay(self) -> None:
        """The updates for the step just taken, once the replay holds the prefill and one sequence."""
        if self._is_ready:
            self.update_for_steps(self.n_envs)

    @property
    def _is_ready(self) -> bool:
        replay = self.replay
        return replay is not None and replay.added >= self.prefill_rows and max(replay.lengths) >= self._sequence_rows

    @property
    def _is_pretraining(self) -> bool:
        return self.learner.updates < self.config.train.pretrain

    @property
    def has_pending_updates(self) -> bool:
        """Whether updates are due that have not been made, as where `should_continue` ended them."""
        return self._is_ready and (self._is_pretraining or self._updates_due >= 1)

    def update_for_steps(self, steps: int) -> None:
        """Makes the updates of the newest `steps` real steps; a fraction of one stays due."""
        self._updates_due += self.ratio * steps + self.config.train.early_updates(self.num_timesteps - steps, self.num_timesteps)
        self.run_updates()

    def run_updates(self) -> bool:
        """The pending updates: those of `train.pretrain`, then those that are due. False where `should_continue` ended them."""
        while (pretraining := self._is_pretraining) or self._updates_due >= 1:
            if not self.should_continue():
                return False
            self._updates_due -= 0 if pretraining else 1
            self.update(improve=not (pretraining or self.exploration.is_blind))
        return True

    def update(self, improve: bool = True) -> dict[str, float]:
        """One gradient step of the world model and, with `improve`, of the controller; the metrics are logged."""
        train = self.config.train
        windows = self.replay.sample(
            train.batch_size,
            self._sequence_rows,
            self.rng,
            recent_fraction=train.recent_fraction,
            terminal_fraction=train.terminal_fraction,
        )
        windows = self.learner.prepare(windows)
        metrics, trace, batch = self.learner.update(windows, self.generator)  # without the burn-in rows
        metrics = {f"world/{name}": value for name, value in metrics.items()}
        if improve and self.improves and self.behaviour is not None:
            if self.learner.ema is not self.world:
                trace = self.learner.ema_trace(windows, self.generator)
            metrics |= self.behaviour.update(trace, batch, self.generator, self.exploration.intrinsic)
        self._n_updates += 1
        if self._logger is not None:
            for name, value in metrics.items():
                self.logger.record_mean(name, value)
        return metrics

    # Logs -----------------------------------------------------------------------------------------------------------

    def dump_logs(self) -> None:
        """Writes what was recorded under SB3's usual names."""
        if self.exploration.is_on:
            self.logger.record("rollout/exploration_found", self.exploration.found)
        seconds = max((time.time_ns() - self.start_time) / 1e9, 1e-9)
        if self.ep_info_buffer:
            self.logger.record("rollout/ep_rew_mean", safe_mean([info["r"] for info in self.ep_info_buffer]))
            self.logger.record("rollout/ep_len_mean", safe_mean([info["l"] for info in self.ep_info_buffer]))
        if self.ep_success_buffer:
            self.logger.record("rollout/success_rate", safe_mean(self.ep_success_buffer))
        if self.restarts:
            self.logger.record("env/restarts", self.restarts)
        self.logger.record("time/episodes", self._episode_num, exclude="tensorboard")
        self.logger.record("time/fps", int((self.num_timesteps - self._num_timesteps_at_start) / seconds))
        self.logger.record("time/time_elapsed", int(seconds), exclude="tensorboard")
        self.logger.record("time/total_timesteps", self.num_timesteps, exclude="tensorboard")
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.logger.dump(step=self.num_timesteps)
        self._logged_at = self.num_timesteps

    @property
    def restarts(self) -> int:
        """Environments that failed and were made anew, those before a resume included."""
        here = getattr(self.env, "restarts", None)
        return self._restarts + (here.count if isinstance(here, Restarts) else 0)

    @property
    def parameter_count(self) -> int:
        """Trainable parameters of world model and controller together."""
        return sum(p.numel() for module in (self.world, self.controller) for p in module.parameters() if p.requires_grad)
