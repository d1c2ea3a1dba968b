"""Model-free baselines under the same protocol as our own runs; `control.py` calls them.

Hyperparameters are those that rl-baselines3-zoo publishes for the environment, SB3's defaults where it publishes none; for DQN on
Catch, those that solved it soonest. Where one observation does not tell the state, the baseline sees stacked frames, since our side
has memory. `updates_per_step` replaces the ratio of gradient updates to real steps; learning then starts no later than in the
recipe that it is compared with.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from sb3_contrib import TQC, CrossQ
from stable_baselines3 import DQN, PPO, SAC
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import StackedObservations, VecFrameStack, VecNormalize

from worldmodel.agents.evaluation import CONFIRMATION_SEED, EVALUATION_SEED, FINAL_SEED, evaluate, threshold
from worldmodel.config import Config
from worldmodel.envs.make import make_env, make_vec


@dataclass(frozen=True)
class Baseline:
    """An SB3 algorithm with its hyperparameters.

    steps       the length that its schedules assume
    frames      how many it sees at once
    normalises  whether VecNormalize scales what it sees and earns
    """

    algorithm: type
    steps: int
    options: dict[str, Any] = field(default_factory=dict)
    num_envs: int = 1
    policy: str = "MlpPolicy"
    frames: int = 1
    normalises: bool = False

    @property
    def updates_per_step(self) -> float | None:
        """Gradient updates per real step; None for algorithms that do not learn from a replay."""
        if self.algorithm is PPO:
            return None
        every = self.options.get("train_freq", 4 if self.algorithm is DQN else 1)
        count = self.options.get("gradient_steps", 1)
        return (every if count == -1 else count) / every


def _falling(value: float) -> Callable[[float], float]:
    return lambda remaining: remaining * value


_SWINGS = {
    **{"learning_rate": 3e-4, "buffer_size": 50_000, "batch_size": 512, "ent_coef": 0.1, "train_freq": 32, "gradient_steps": 32},
    **{"gamma": 0.9999, "tau": 0.01, "learning_starts": 0, "use_sde": True},
    "policy_kwargs": {"log_std_init": -3.67, "net_arch": [64, 64]},
}
_STEADY_DQN = Baseline(
    DQN,
    100_000,
    {
        **{"learning_rate": 6.3e-4, "batch_size": 128, "buffer_size": 50_000, "learning_starts": 0, "gamma": 0.99},
        **{"target_update_interval": 250, "train_freq": 4, "gradient_steps": -1},
        **{"exploration_fraction": 0.12, "exploration_final_eps": 0.1, "policy_kwargs": {"net_arch": [256, 256]}},
    },
)
DEFAULTS = {
    "ppo": Baseline(PPO, 100_000),
    "dqn": Baseline(DQN, 100_000),
    "sac": Baseline(SAC, 50_000),
    "tqc": Baseline(TQC, 50_000),
    "crossq": Baseline(CrossQ, 50_000),
}
"""SB3's own hyperparameters."""
BASELINES = {
    ("CartPole-v1", "ppo"): Baseline(
        PPO,
        100_000,
        {
            **{"n_steps": 32, "batch_size": 256, "n_epochs": 20, "gamma": 0.98, "gae_lambda": 0.8, "ent_coef": 0.0},
            **{"learning_rate": _falling(1e-3), "clip_range": _falling(0.2)},
        },
        num_envs=8,
    ),
    ("CartPole-v1", "dqn"): Baseline(
        DQN,
        50_000,
        {
            **{"learning_rate": 2.3e-3, "batch_size": 64, "buffer_size": 100_000, "learning_starts": 1000, "gamma": 0.99},
            **{"target_update_interval": 10, "train_freq": 256, "gradient_steps": 128},
            **{"exploration_fraction": 0.16, "exploration_final_eps": 0.04, "policy_kwargs": {"net_arch": [256, 256]}},
        },
    ),
    ("Pendulum-v1", "sac"): Baseline(SAC, 20_000, {"learning_rate": 1e-3}),
    ("Acrobot-v1", "dqn"): _STEADY_DQN,
    ("Acrobot-v1", "ppo"): Baseline(
        PPO,
        1_000_000,
        {"n_steps": 256, "gae_lambda": 0.94, "gamma": 0.99, "n_epochs": 4, "ent_coef": 0.0},
        num_envs=16,
        normalises=True,
    ),
    ("MountainCarContinuous-v0", "sac"): Baseline(SAC, 50_000, _SWINGS),
    ("MountainCarContinuous-v0", "tqc"): Baseline(TQC, 50_000, _SWINGS),
    ("LunarLander-v3", "dqn"): _STEADY_DQN,
    ("LunarLander-v3", "ppo"): Baseline(
        PPO,
        1_000_000,
        {"n_steps": 1024, "batch_size": 64, "gae_lambda": 0.98, "gamma": 0.999, "n_epochs": 4, "ent_coef": 0.01},
        num_envs=16,
    ),
    ("MiniGrid-DoorKey-5x5-v0", "ppo"): Baseline(
        PPO,
        100_000,
        {
            **{"n_steps": 128, "batch_size": 64, "gae_lambda": 0.95, "gamma": 0.99, "n_epochs": 10, "ent_coef": 0.0},
            **{"learning_rate": 2.5e-4, "clip_range": 0.2},
        },
        num_envs=8,
        normalises=True,
    ),
    ("worldmodel.envs:Catch-v0", "dqn on 2 frames"): Baseline(  # one does not show where the ball drifts
        DQN,
        16_000,
        {
            **{"learning_rate": 5e-4, "batch_size": 64, "buffer_size": 20_000, "learning_starts": 500, "gamma": 0.99},
            **{"target_update_interval": 100, "train_freq": 1, "gradient_steps": 1},
            **{"exploration_fraction": 0.3, "exploration_final_eps": 0.1, "policy_kwargs": {"net_arch": [256]}},
        },
        policy="CnnPolicy",
        frames=2,
    ),
}


def baseline_of(env_id: str, name: str) -> Baseline:
    """That of an environment, or the algorithm's defaults; KeyError where there is neither."""
    return BASELINES[env_id, name] if (env_id, name) in BASELINES else DEFAULTS[name]


class Random:
    """Uniform actions, with SB3's predict()."""

    def __init__(self, space: gym.Space, seed: int):
        self.space = space
        self.space.seed(seed)

    def predict(
        self, obs: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[np.ndarray, None]:
        return np.stack([self.space.sample() for _ in range(len(episode_start))]), None


class Protocol(BaseCallback):
    """Evaluates, confirms and stops exactly as `worldmodel.train` does; the time of it is kept apart.

    acting  model -> what plays the evaluation episodes
    """

    def __init__(self, config: Config, max_steps: int, max_seconds: float, acting: Callable[[Any], Any] = lambda model: model):
        super().__init__()
        self.config, self.threshold = config, threshold(config.eval, config.env.id)
        self.max_steps, self.max_seconds, self.acting = max_steps, max_seconds, acting
        self.evaluations: list[dict[str, Any]] = []
        self.eval_seconds, self.evaluated, self.solved_at, self.stopped = 0.0, 0, None, None

    def _on_training_start(self) -> None:
        self._since = time.perf_counter()

    def _on_step(self) -> bool:
        step, every = self.model.num_timesteps, self.config.eval.every
        if every and step // every > self.evaluated // every:
            self._evaluate(step)
        if self.config.eval.stop_when_solved and self.solved_at is not None:
            return False
        if time.perf_counter() - self._since > self.max_seconds:
            self.stopped = "time"
        return self.stopped is None and step < self.max_steps

    def _evaluate(self, step: int) -> None:
        returns = self.measure(EVALUATION_SEED)
        mean = float(np.mean(returns))
        if self.threshold is not None and mean >= self.threshold and self.solved_at is None:
            self.solved_at = step if float(np.mean(self.measure(CONFIRMATION_SEED))) >= self.threshold else None
        self.evaluated = step
        row = {"real_steps": step, "mean_return": mean, "std_return": float(np.std(returns)), "episodes": len(returns)}
        self.evaluations.append(row)

    def measure(self, seed: int) -> list[float]:
        """Returns of greedy episodes with environment seeds from `seed` on."""
        since = time.perf_counter()
        try:
            return evaluate(self.acting(self.model), self.config.env, self.config.eval.episodes, seed)[0]
        finally:
            self.eval_seconds += time.perf_counter() - since

    def learn(self, model: Any, steps: int, callbacks: Sequence[BaseCallback] = ()) -> dict[str, Any]:
        """Trains under this protocol; gives the keys of `worldmodel train --json`, and `stopped`: "time" where that ended it."""
        since = time.perf_counter()
        model.learn(steps, callback=[*callbacks, self])
        seconds = time.perf_counter() - since - self.eval_seconds
        return {
            "real_steps": model.num_timesteps,
            "updates": updates_of(model),
            "wall_seconds": seconds,
            "parameters": sum(p.numel() for name, p in model.policy.named_parameters() if p.requires_grad and "target" not in name),
            "threshold": self.threshold,
            "solved_at": self.solved_at,
            "final_return": float(np.mean(self.measure(FINAL_SEED))),
            "eval_seconds": self.eval_seconds,
            "evaluations": self.evaluations,
            "stopped": self.stopped,
        }


class Stacked:
    """A policy of stacked frames of `space` that stacks by itself what `see` makes of the environment's single ones."""

    def __init__(self, model: Any, space: spaces.Box, frames: int, see: Callable[[np.ndarray], np.ndarray] = np.asarray):
        self.model, self.space, self.frames, self.see = model, space, frames, see

    def predict(self, obs: np.ndarray, state: Any = None, episode_start: Any = None, deterministic: bool = False) -> tuple:
        """SB3's; the state is the stack."""
        obs = self.see(obs)
        if state is None:
            state = StackedObservations(len(obs), self.frames, self.space)
            stack = state.reset(obs)
        else:
            stack, _ = state.update(obs, np.asarray(episode_start), [{"terminal_observation": x} for x in obs])
        return self.model.predict(stack, deterministic=deterministic)[0], state


class Normalised:
    """A policy that sees single observations as VecNormalize shows them."""

    def __init__(self, model: Any, venv: VecNormalize):
        self.model, self.venv = model, venv

    def predict(self, obs: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False) -> tuple:
        """SB3's."""
        return self.model.predict(self.venv.normalize_obs(obs), state, episode_start, deterministic)


def run_random(config: Config, seed: int) -> dict[str, Any]:
    """Uniform actions: only the final return is measured."""
    env = make_env(config.env)
    try:
        agent = Random(env.action_space, seed)
        final = float(np.mean(evaluate(agent, config.env, config.eval.episodes, FINAL_SEED)[0]))
    finally:
        env.close()
    counts = {"real_steps": 0, "updates": 0, "wall_seconds": 0.0, "eval_seconds": 0.0, "parameters": 0}
    counts |= {"threshold": threshold(config.eval, config.env.id), "solved_at": None}
    return {**counts, "final_return": final, "evaluations": [], "stopped": None}


def run(
    config: Config,
    name: str,
    seed: int,
    updates_per_step: float | None,
    max_steps: int | None,
    max_seconds: float,
    callbacks: Sequence[BaseCallback] = (),
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The result of one baseline run, as `Protocol.learn` gives it.

    callbacks   called before the protocol
    options     of the algorithm, over those of the baseline
    """
    if name == "random":
        return run_random(config, seed)
    baseline = baseline_of(config.env.id, name)
    matched: dict[str, Any] = {}
    if updates_per_step is not None:
        ratio = Fraction(updates_per_step).limit_denominator(64)
        matched = {"train_freq": ratio.denominator, "gradient_steps": ratio.numerator}
        matched["learning_starts"] = min(baseline.options.get("learning_starts", 100), config.train.prefill)
    venv, acting = make_vec(config.env, baseline.num_envs, seed), lambda model: model
    if baseline.frames > 1:
        acting = partial(Stacked, space=venv.observation_space, frames=baseline.frames)
        venv = VecFrameStack(venv, baseline.frames)
    if baseline.normalises:
        venv = VecNormalize(venv)
        acting = partial(Normalised, venv=venv)
    protocol = Protocol(config, min(baseline.steps, max_steps or baseline.steps), max_seconds, acting)
    given = {**baseline.options, **matched, **(options or {})}
    try:
        model = baseline.algorithm(baseline.policy, venv, seed=seed, device="cpu", **given)
        return protocol.learn(model, baseline.steps, callbacks)
    finally:
        venv.close()


def updates_of(model: Any) -> int:
    """Gradient updates so far; SB3 counts epochs for PPO and RecurrentPPO."""
    if hasattr(model, "n_epochs"):
        return model._n_updates * -(-model.n_steps * model.n_envs // model.batch_size)
    return model._n_updates
