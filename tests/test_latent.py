"""Features of real environments are those of the world model's own filter."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import CHAIN, IMAGE, VECTOR, Toy, small_world
from gymnasium import spaces
from small_runs import small_train
from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnvWrapper

from worldmodel.data import Sampling
from worldmodel.envs import ImaginedVecEnv, LatentVecEnv, check_vec_env, make_vec
from worldmodel.errors import ConfigError
from worldmodel.storage.replay import Replay
from worldmodel.storage.run import Run

SPACES = [
    (VECTOR, spaces.Discrete(2)),
    (IMAGE, spaces.Box(-2, 2, (2,), np.float32)),
    (spaces.Discrete(5), spaces.MultiDiscrete([2, 3])),
    (spaces.Dict({"a": VECTOR, "b": spaces.MultiBinary(3)}), spaces.MultiBinary(2)),
]


def toys(observation: spaces.Space, action: spaces.Space, count: int) -> DummyVecEnv:
    """Environments of random observations, whose episodes have different lengths."""
    env = DummyVecEnv([lambda i=i: gym.wrappers.TimeLimit(Toy(observation, action), 3 + i) for i in range(count)])
    env.seed(0)
    return env


class Recorder(VecEnvWrapper):
    """Keeps what passes as rows of one replay for each environment: an episode's last observation is a row of its own."""

    def __init__(self, venv, world):
        super().__init__(venv)
        self.world = world
        self.replays = [Replay(100, world.obs.store, world.action.dim, 1) for _ in range(venv.num_envs)]

    def _row(self, i, obs, action, reward, first, last, terminal):
        one = {name: np.asarray(x)[None] for name, x in obs.items()} if isinstance(obs, dict) else np.asarray(obs)[None]
        flags = (np.array([flag]) for flag in (first, last, terminal))
        self.replays[i].add(self.world.obs.to_raw(one), action, np.array([reward]), *flags)

    def _each(self, obs):
        return [{name: x[i] for name, x in obs.items()} if isinstance(obs, dict) else obs[i] for i in range(self.num_envs)]

    def reset(self):
        obs = self.venv.reset()
        for i, one in enumerate(self._each(obs)):
            self._row(i, one, np.zeros((1, self.world.action.dim)), 0.0, True, False, False)
        return obs

    def step_async(self, actions):
        self.taken = self.world.action.encode(actions)
        self.venv.step_async(actions)

    def step_wait(self):
        obs, rewards, dones, infos = self.venv.step_wait()
        for i, one in enumerate(self._each(obs)):
            arrived = infos[i]["terminal_observation"] if dones[i] else one
            terminal = dones[i] and not infos[i]["TimeLimit.truncated"]
            self._row(i, arrived, self.taken[i : i + 1], rewards[i], False, dones[i], terminal)
            if dones[i]:
                self._row(i, one, np.zeros((1, self.world.action.dim)), 0.0, True, False, False)
        return obs, rewards, dones, infos


@pytest.mark.parametrize(("observation", "action"), SPACES, ids=str)
@pytest.mark.parametrize("dynamics", [{"posterior": "filtering"}, {"posterior": "observation"}, {"kind": "anchored"}], ids=str)
def test_the_filtered_state_is_that_of_training_row_by_row(observation, action, dynamics):
    world = small_world(observation, action, latent="gaussian", dynamics=dynamics)
    recorder = Recorder(toys(observation, action, 3), world)
    env = LatentVecEnv(recorder, world)
    action.seed(0)
    features_of = [[feature] for feature in env.reset()]
    for _ in range(14):
        obs, _, dones, infos = env.step(np.stack([action.sample() for _ in range(3)]))
        for i in range(3):
            features_of[i] += [infos[i]["terminal_observation"], obs[i]] if dones[i] else [obs[i]]
    for replay, features in zip(recorder.replays, features_of):
        batch = replay.sample(1, len(replay), np.random.default_rng(0))
        assert batch.is_first.sum() > 2 and batch.is_last.any()
        with torch.no_grad():
            trace = world.trace(batch.with_obs(world.preprocess(batch.obs)), None, Sampling(mode=True))
        np.testing.assert_allclose(np.stack(features), trace.feature[0].numpy(), atol=1e-5)


def test_the_filtered_state_is_deterministic_and_its_latent_the_mode():
    world = small_world(latent="categorical")
    env = LatentVecEnv(toys(VECTOR, spaces.Discrete(2), 2), world)
    latent = env.reset()[:, -world.dynamics.latent.size :]
    assert set(np.unique(latent)) == {0.0, 1.0}


def test_it_is_a_sound_vec_env_of_the_dreams_own_space():
    world = small_world()
    env = LatentVecEnv(toys(VECTOR, spaces.Discrete(2), 3), world)
    check_vec_env(env, steps=40)
    assert env.observation_space == ImaginedVecEnv(world, 2, start="prior").observation_space


def test_what_was_trained_in_the_dream_plays_in_reality(tmp_path):
    small_train(tmp_path / "run", 40, CHAIN)
    run = Run.open(tmp_path / "run")
    model = PPO("MlpPolicy", ImaginedVecEnv(run, 4, seed=0), n_steps=8, batch_size=16, seed=0, device="cpu").learn(32)
    env = LatentVecEnv(make_vec(run.config.env, 2, seed=0), run)
    returns, lengths = evaluate_policy(model, env, 4, return_episode_rewards=True)
    assert all(0 < n <= 20 for n in lengths) and all(-8.01 < r < 0.41 for r in returns)
    model.set_env(LatentVecEnv(make_vec(run.config.env, 4, seed=0), run))
    model.learn(32)


@pytest.mark.parametrize(
    ("observation", "action", "message"),
    [
        (spaces.Box(-1, 1, (3,), np.float32), spaces.Discrete(2), r"observation space is Box\(.*\(3,\)"),
        (VECTOR, spaces.Discrete(3), r"action space is Discrete\(3\); the world model was trained on Discrete\(2\)"),
    ],
)
def test_environments_of_other_spaces_are_refused(observation, action, message):
    with pytest.raises(ConfigError, match=message):
        LatentVecEnv(toys(observation, action, 1), small_world())
