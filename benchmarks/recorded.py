"""Recorded episodes of one environment: 2,000 real steps to learn from, and fresh episodes under three policies to be measured on.

What is learned from is a fixed mixture, the same for every model: half of the steps are random play, half are played by a policy
that Stable-Baselines3 trained a little (PPO or SAC, some thousand steps, that seed), with a random action in one step of five.
An agent's own replay would take minutes for each seed, and would differ from model to model. Held-out episodes are

own       of that policy, with as many random actions
random    of random play
stranger  of a policy that no model has seen: trained from another seed and for longer, and without random actions

Policies see the whole observation, also where only some of its numbers are recorded (`Task.shown`). The recordings lie in a folder
named by a hash of the code and the versions that made them, so that all models and all calls share them.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces
from rows import HERE, executed, say

from worldmodel.envs.heating import Heating
from worldmodel.envs.make import make_env
from worldmodel.storage.recording import Recording

CACHE = HERE / ".cache"
TRAINING = "training"
HELD_OUT = ("own", "random", "stranger")
HELD_OUT_SEED = 40_000
"""Environment seed of the first held-out episode; each set has a thousand of its own."""
EPISODES, LONGEST = 20, 300
"""Held-out episodes of each set, and their steps at most."""
RANDOM_SHARE = 0.2
"""Share of random actions in what a trained policy plays, as in `agents.held_out`."""
STRANGER = 1000
"""Seed of the stranger's policy, less the seed of the row."""


@dataclass(frozen=True)
class Player:
    """How a policy is trained: an algorithm of Stable-Baselines3, steps, and the algorithm's options."""

    algorithm: str
    steps: int
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Thermostat:
    """A policy of the heated house: `gain` times the degrees below `target`; `saves` times as little where the tariff is high."""

    target: float
    gain: float
    saves: float = 1.0

    def predict(self, obs: np.ndarray, deterministic: bool = True) -> tuple[np.ndarray, None]:
        share = self.gain * (self.target - obs[1]) / (self.saves if obs[5] > 0.25 else 1.0)
        return np.clip(np.float32([share]), 0, 1), None


@dataclass(frozen=True)
class Task:
    """An environment, who plays in it, and what of it is recorded.

    env       Gymnasium id
    own       the policy that half of the rows are of
    stranger  the policy that no model sees
    rows      real steps to learn from
    shown     the numbers of the observation that are recorded; None: all
    """

    env: str
    own: Player | Thermostat
    stranger: Player | Thermostat
    rows: int = 2000
    shown: tuple[int, ...] | None = None

    @property
    def hides(self) -> bool:
        """Whether one observation tells less than the state: it is masked, or a house, whose walls nobody measures."""
        return self.shown is not None or isinstance(self.own, Thermostat)

    @property
    def name(self) -> str:
        """The id that recordings carry: of what is not shown whole, another one."""
        module, _, name = self.env.rpartition(":")
        return self.env if self.shown is None else f"{module}{':' if module else ''}Masked{name}"


def _ppo(steps: int, **options: Any) -> Player:
    return Player("PPO", steps, {"n_steps": 512, **options})


def _sac(steps: int, **options: Any) -> Player:
    small = {"batch_size": 128, "policy_kwargs": {"net_arch": [64, 64]}}  # twice as fast as SB3's own, and as good on so few steps
    return Player("SAC", steps, {"learning_starts": 500, **small, **options})


_CAR = {
    **{"learning_starts": 0, "ent_coef": 0.1, "batch_size": 512, "train_freq": 32, "gradient_steps": 32, "gamma": 0.9999},
    **{"tau": 0.01, "use_sde": True, "policy_kwargs": {"log_std_init": -3.67, "net_arch": [64, 64]}},
}
"""What rl-baselines3-zoo publishes for MountainCarContinuous."""

TASKS = {
    "CartPole-v1": Task("CartPole-v1", _ppo(8_000), _ppo(20_000)),
    "Pendulum-v1": Task("Pendulum-v1", _sac(3_500, learning_rate=1e-3), _sac(5_000, learning_rate=1e-3)),
    "Acrobot-v1": Task("Acrobot-v1", _ppo(20_000), _ppo(50_000)),
    "MountainCarContinuous-v0": Task("MountainCarContinuous-v0", _sac(5_000, **_CAR), _sac(15_000, **_CAR)),
    "LunarLander-v3": Task("LunarLander-v3", _ppo(30_000), _ppo(80_000)),
    "InvertedPendulum-v5": Task("InvertedPendulum-v5", _ppo(15_000), _ppo(40_000)),
    "Hopper-v5": Task("Hopper-v5", _sac(4_000), _sac(10_000)),
    "HalfCheetah-v5": Task("HalfCheetah-v5", _sac(4_000), _sac(10_000)),
    "masked CartPole-v1": Task("CartPole-v1", _ppo(8_000), _ppo(20_000), shown=(0, 2)),
    "masked Pendulum-v1": Task("Pendulum-v1", _sac(3_500, learning_rate=1e-3), _sac(5_000, learning_rate=1e-3), shown=(0, 1)),
    "Heating-v0": Task("worldmodel.envs:Heating-v0", Thermostat(21, 10), Thermostat(22.5, 0.4, saves=3), rows=3000),
}
"""All environments; of the masked ones positions and angles are recorded, and no velocities. A house is heated by thermostats: one
that is on or off, and a stranger that keeps it warmer, gently, and saves where electricity is dear."""


def load(task: Task, seed: int, cache: Path) -> dict[str, Recording]:
    """The recordings of a task and seed, by name: TRAINING and HELD_OUT. They are made where `cache` lacks them, which takes up to
    some minutes; tasks that show different numbers of one environment share them. Raises MissingExtraError."""
    folder = cache / f"{task.env.rpartition(':')[2]}-s{seed}-{fingerprint(task)}"
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".making-") as made:
            whole = Path(made) / "whole"
            whole.mkdir()
            for name, recording in _record(task, seed).items():
                recording.write(whole / f"{name}.npz")
            with contextlib.suppress(OSError):  # somebody else made the same in the meantime
                whole.rename(folder)
    return {name: _shown(task, Recording.read(folder / f"{name}.npz")) for name in (TRAINING, *HELD_OUT)}


def _shown(task: Task, recording: Recording) -> Recording:
    """The recording with the numbers of its observations that the task shows."""
    if task.shown is None:
        return recording
    shown, space = list(task.shown), recording.obs_spec.space
    episodes = [recording.episode(number) for number in range(recording.episodes)]
    episodes = [{**episode, "observations": episode["observations"][:, shown]} for episode in episodes]
    part = spaces.Box(space.low[shown], space.high[shown], dtype=space.dtype)
    return Recording.from_episodes(part, recording.action_spec, episodes, env_id=task.name, origin=task.name)


def digest(recordings: dict[str, Recording]) -> str:
    """A hash of all observations and actions, 12 hex digits: of rows with equal ones everybody saw the same."""
    found = hashlib.sha256()
    for name, recording in recordings.items():
        for array in (*recording.obs.values(), recording.action, recording.lengths):
            found.update(name.encode() + np.ascontiguousarray(array).tobytes())
    return found.hexdigest()[:12]


def fingerprint(task: Task) -> str:
    """Of all that decides what is recorded, 12 hex digits."""
    packages = [version(name) for name in ("gymnasium", "stable_baselines3", "torch", "numpy")]
    own_world = (Thermostat, Heating) if isinstance(task.own, Thermostat) else ()
    made_by = [executed(inspect.getsource(part)) for part in (_record, _trained, _play, _recording, *own_world)]
    limits = HELD_OUT_SEED, EPISODES, LONGEST, RANDOM_SHARE, STRANGER
    return hashlib.sha256(f"{replace(task, shown=None)}{packages}{made_by}{limits}".encode()).hexdigest()[:12]


def _record(task: Task, seed: int) -> dict[str, Recording]:
    say(f"recording {task.env}, seed {seed}")
    own, stranger = _trained(task, task.own, seed), _trained(task, task.stranger, STRANGER + seed)
    half = task.rows // 2
    rows = [*_play(task, own, 2 * seed, RANDOM_SHARE, steps=half), *_play(task, None, 2 * seed + 1, 1.0, steps=task.rows - half)]
    found = {TRAINING: _recording(task, rows)}
    for number, (name, policy, share) in enumerate(
        (("own", own, RANDOM_SHARE), ("random", None, 1.0), ("stranger", stranger, 0.0))
    ):
        found[name] = _recording(task, _play(task, policy, HELD_OUT_SEED + 1000 * number, share, episodes=EPISODES))
    return found


def _trained(task: Task, player: Player | Thermostat, seed: int) -> Any:
    """What plays: anything with SB3's `predict`."""
    if isinstance(player, Thermostat):
        return player
    import stable_baselines3

    env = make_env(task.env, seed=seed)
    try:
        model = getattr(stable_baselines3, player.algorithm)("MlpPolicy", env, seed=seed, device="cpu", **player.options)
        return model.learn(player.steps)
    finally:
        env.close()


def _play(
    task: Task, policy: Any, seed: int, share: float, *, steps: int | None = None, episodes: int | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """Episodes with the environment's seeds from `seed` on: until there are so many, or so many steps in all (the last is cut).

    policy  None: random actions alone
    share   of the steps in which the action is random
    """
    rng, env = np.random.default_rng(seed), make_env(task.env, seed=seed)
    env.action_space.seed(seed)
    left, number = steps, 0
    try:
        while left if episodes is None else number < episodes:
            obs, _ = env.reset(seed=seed + number)
            rows: dict[str, list] = {"observations": [obs], "actions": [], "rewards": [], "terminations": [], "truncations": []}
            most = LONGEST if left is None else left
            over = False
            while len(rows["actions"]) < most and not over:
                draws = policy is None or rng.random() < share
                action = env.action_space.sample() if draws else policy.predict(obs, deterministic=True)[0]
                obs, reward, terminated, truncated, _ = env.step(action)
                for name, value in zip(rows, (obs, action, reward, terminated, truncated), strict=True):
                    rows[name].append(value)
                over = terminated or truncated
            number += 1
            left = None if left is None else left - len(rows["actions"])
            yield {name: np.stack(values) for name, values in rows.items()}
    finally:
        env.close()


def _recording(task: Task, episodes: Iterator[dict[str, np.ndarray]]) -> Recording:
    env = make_env(task.env)
    env.close()
    return Recording.from_episodes(env.observation_space, env.action_space, episodes, env_id=task.env, origin=task.env)
