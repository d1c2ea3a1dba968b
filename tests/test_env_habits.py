"""What environments and scripts for SB3 do out of habit, done with ours."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import small_dreamer, stored
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnvWrapper

from worldmodel.casts import tell
from worldmodel.envs import CheckedEnv
from worldmodel.errors import EnvError

BOX = spaces.Box(-2, 2, (2,), np.float32)
PIXELS = spaces.Box(0, 255, (2,), np.uint8)


class Loose(gym.Env):
    """Gives what it is told to; its `reset` takes no options."""

    def __init__(self, obs=(0.5, 1.0), space=BOX, reward=1.0, terminated=False, truncated=False):
        self.observation_space, self.action_space = space, spaces.Discrete(2)
        self.obs, self.rest = obs, (reward, terminated, truncated)

    def reset(self, seed=None):
        return self.obs, {}

    def step(self, action):
        return self.obs, *self.rest, {}


@pytest.fixture(autouse=True)
def untold():
    tell.cache_clear()


HALVES, ONES = np.array([0.5, 1.0], np.float32), np.ones(2, np.uint8)
CONVERTED = {
    "float64": ({"obs": HALVES.astype(np.float64)}, HALVES, "'obs'"),
    "digits are lost": ({"obs": np.array([1 / 3, 0])}, np.array([1 / 3, 0], np.float32), "'obs'"),
    "list of floats": ({"obs": [0.5, 1.0]}, HALVES, "'obs'"),
    "tensor": ({"obs": torch.tensor([0.5, 1.0], dtype=torch.float64)}, HALVES, "'obs'"),
    "int64 as floats": ({"obs": np.array([1, 2])}, np.array([1, 2], np.float32), "'obs'"),
    "floats as bytes": ({"obs": np.array([1.0, 1.0]), "space": PIXELS}, ONES, "'obs'"),
    "float as category": ({"obs": 2.0, "space": spaces.Discrete(3)}, np.int64(2), "'obs'"),
    "array as category": ({"obs": np.array([2]), "space": spaces.Discrete(3)}, np.int64(2), "'obs'"),
    "floats as categories": ({"obs": np.array([1.0, 0.0]), "space": spaces.MultiDiscrete([2, 2])}, np.array([1, 0]), "'obs'"),
    "floats as bits": ({"obs": np.array([1.0, 0.0]), "space": spaces.MultiBinary(2)}, np.array([1, 0], np.int8), "'obs'"),
    "in a nested key": (
        {"obs": {"arm": {"angle": HALVES.astype(float)}}, "space": spaces.Dict(arm=spaces.Dict(angle=BOX))},
        {"arm": {"angle": HALVES}},
        "'arm.angle'",
    ),
    "reward as array": ({"obs": HALVES, "reward": np.ones(1)}, HALVES, "the reward"),
    "reward as bool": ({"obs": HALVES, "reward": True}, HALVES, "the reward"),
    "flag as number": ({"obs": HALVES, "terminated": 0}, HALVES, "'terminated'"),
    "flag as array": ({"obs": HALVES, "truncated": np.array([0.0])}, HALVES, "'truncated'"),
}


@pytest.mark.parametrize("options, expected, name", CONVERTED.values(), ids=list(CONVERTED))
def test_numbers_in_another_form_are_converted_with_one_warning_that_names_the_key(options, expected, name):
    env = CheckedEnv(Loose(**options))
    with pytest.warns(UserWarning, match=name) as told:
        env.reset()
        for _ in range(3):
            obs, reward, terminated, truncated, _ = env.step(0)
    np.testing.assert_equal(obs, expected)
    for x, y in [(obs, expected)] if not isinstance(obs, dict) else [(obs["arm"]["angle"], expected["arm"]["angle"])]:
        assert np.asarray(x).dtype == np.asarray(y).dtype
    assert (type(reward), reward, terminated, truncated) == (float, 1.0, False, False)
    assert len(told) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"obs": np.array([1, 2], np.int64), "space": PIXELS},
        {"obs": HALVES.astype(np.float16)},
        {"obs": HALVES, "reward": np.int8(1)},
    ],
    ids=["whole numbers", "narrower", "reward"],
)
def test_a_form_that_loses_nothing_needs_no_word(options, recwarn):
    env = CheckedEnv(Loose(**options))
    env.reset()
    env.step(0)
    assert not recwarn.list


class Reports(VecEnvWrapper):
    """A VecEnv that gives floats of 64 bits, whole numbers for flags, and no infos."""

    def reset(self):
        return self.venv.reset().astype(np.float64)

    def step_wait(self):
        obs, rewards, dones, _ = self.venv.step_wait()
        return obs.astype(np.float64), rewards.tolist(), dones.astype(int), []


def test_a_vec_env_may_give_wide_floats_numbers_for_flags_and_an_empty_list_of_infos():
    with pytest.warns(UserWarning, match="'obs' comes as float64") as told:
        agent = small_dreamer(Reports(DummyVecEnv([lambda: gym.make("CartPole-v1", max_episode_steps=6)])))
        agent.learn(20)
    rows = stored(agent)
    assert rows.obs["obs"].dtype == torch.float32 and rows.is_last.dtype == torch.bool and int(rows.is_last.sum()) == 3
    assert [episode["l"] for episode in agent.ep_info_buffer] == [6, 6, 6]
    assert sum("float64" in str(one.message) for one in told) == 1


def test_a_vec_env_that_gives_what_its_space_cannot_hold_is_named():
    class Far(Reports):
        def reset(self):
            return super().reset() + 1e39

    with pytest.raises(EnvError, match="'obs' has dtype float64 and holds numbers"):
        small_dreamer(Far(DummyVecEnv([lambda: gym.make("CartPole-v1")]))).learn(5)


def test_a_reset_need_not_take_options():
    agent = small_dreamer(Loose(HALVES))
    agent.learn(5)
    assert agent.num_timesteps == 5


def test_options_reach_a_reset_that_takes_them():
    class Takes(Loose):
        def reset(self, seed=None, options=None):
            self.asked = options
            return HALVES, {}

    env = Takes()
    CheckedEnv(env).reset(options={"level": 3})
    assert env.asked == {"level": 3}
