"""What environments and scripts for SB3 usually do, with our environments."""

import copy
import pickle

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import small_dreamer, small_world, stored
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnvWrapper

from worldmodel.envs import CheckedEnv, GymVecEnvAdapter, ImaginedVecEnv, check_vec_env
from worldmodel.errors import ConfigError, EnvError
from worldmodel.spaces.casts import warn_once

BOX = spaces.Box(-2, 2, (2,), np.float32)
PIXELS = spaces.Box(0, 255, (2,), np.uint8)


class Loose(gym.Env):
    """Returns the given values; its `reset` takes no options."""

    def __init__(self, obs=(0.5, 1.0), space=BOX, reward=1.0, terminated=False, truncated=False):
        self.observation_space, self.action_space = space, spaces.Discrete(2)
        self.obs, self.rest = obs, (reward, terminated, truncated)

    def reset(self, seed=None):
        return self.obs, {}

    def step(self, action):
        return self.obs, *self.rest, {}


@pytest.fixture(autouse=True)
def warnings_again():
    warn_once.cache_clear()


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
    with pytest.warns(UserWarning, match=name) as warned:
        env.reset()
        for _ in range(3):
            obs, reward, terminated, truncated, _ = env.step(0)
    np.testing.assert_equal(obs, expected)
    for x, y in [(obs, expected)] if not isinstance(obs, dict) else [(obs["arm"]["angle"], expected["arm"]["angle"])]:
        assert np.asarray(x).dtype == np.asarray(y).dtype
    assert (type(reward), reward, terminated, truncated) == (float, 1.0, False, False)
    assert len(warned) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"obs": np.array([1, 2], np.int64), "space": PIXELS},
        {"obs": HALVES.astype(np.float16)},
        {"obs": HALVES, "reward": np.int8(1)},
    ],
    ids=["whole numbers", "narrower", "reward"],
)
def test_a_lossless_conversion_gives_no_warning(options, recwarn):
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
    with pytest.warns(UserWarning, match="'obs' comes as float64") as warned:
        agent = small_dreamer(Reports(DummyVecEnv([lambda: gym.make("CartPole-v1", max_episode_steps=6)])))
        agent.learn(20)
    rows = stored(agent)
    assert rows.obs["obs"].dtype == torch.float32 and rows.is_last.dtype == torch.bool and int(rows.is_last.sum()) == 3
    assert [episode["l"] for episode in agent.ep_info_buffer] == [6, 6, 6]
    assert sum("float64" in str(one.message) for one in warned) == 1


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


# Imagined worlds as Gymnasium takes them --------------------------------------------------------------------------------

IMAGINED = "worldmodel.envs:Imagined-v0"
SAME, NEXT, NEVER = AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED


def vector(num_envs=3, horizon=4, **options):
    return gym.make_vec(IMAGINED, num_envs, run=small_world(), horizon=horizon, **{"start": "prior", "seed": 0, **options})


@pytest.mark.parametrize("limit, length", [(2, 2), (9, 4)])
def test_a_limit_of_steps_is_a_horizon_where_it_is_the_shorter_one(limit, length):
    env = vector(64, max_episode_steps=limit)
    env.reset(seed=0)
    ends = np.array([env.step(np.zeros(64, np.int64))[3].any() for _ in range(length)])
    assert ends.tolist() == [False] * (length - 1) + [True]


@pytest.mark.parametrize("mode", [SAME, NEXT, NEVER, "NextStep"])
def test_imagined_worlds_are_reset_as_the_mode_says(mode):
    env, same = vector(autoreset_mode=mode), vector()
    assert env.metadata["autoreset_mode"] is AutoresetMode(mode)
    obs, _ = env.reset(seed=1)
    assert np.array_equal(obs, same.reset(seed=1)[0])
    actions, over = np.zeros(3, np.int64), np.zeros(3, bool)
    for _ in range(12):
        if AutoresetMode(mode) is NEVER and over.any():
            with pytest.raises(ConfigError, match=r"have ended.*reset_mask"):
                env.step(actions)
            before = obs
            obs, _ = env.reset(options={"reset_mask": over})
            assert np.array_equal(obs[~over], before[~over]) and not (obs[over] == before[over]).all(-1).any()
            assert (env.worlds.age[torch.from_numpy(over)] == 0).all()
            over = np.zeros(3, bool)
        obs, reward, terminated, truncated, infos = env.step(actions)
        assert ("final_obs" in infos) == (AutoresetMode(mode) is SAME and bool((terminated | truncated).any()))
        if AutoresetMode(mode) is NEXT:
            assert not (terminated | truncated)[over].any() and (reward[over] == 0).all()
            assert (env.worlds.age.numpy()[over] == 0).all() and (env.worlds.age.numpy()[~over] > 0).all()
        over = terminated | truncated
    assert AutoresetMode(mode) is SAME or env.worlds.age.max() <= 4


@pytest.mark.parametrize("wrapper", ["NormalizeObservation", "NormalizeReward", "RecordEpisodeStatistics"])
def test_gymnasium_s_vector_wrappers_take_imagined_worlds(wrapper):
    env = getattr(gym.wrappers.vector, wrapper)(vector(autoreset_mode=NEXT))
    env.reset(seed=0)
    lengths = [env.step(np.zeros(3, np.int64))[4].get("episode", {}).get("l", np.zeros(1)).max() for _ in range(12)]
    assert wrapper != "RecordEpisodeStatistics" or 1 <= max(lengths) <= 4


@pytest.mark.parametrize("mode", AutoresetMode)
def test_sb3_takes_imagined_worlds_in_every_mode(mode):
    env = GymVecEnvAdapter(vector(autoreset_mode=mode))
    check_vec_env(env, steps=30)
    env.reset()
    ends = sum(env.step(np.zeros((3, *env.action_space.shape), env.action_space.dtype))[2] for _ in range(30))
    assert (ends > 0).all()  # every world ended, and went on


@pytest.mark.parametrize("mask", [[True, False], np.zeros(3, bool), np.ones(3)], ids=["short", "nobody", "no flags"])
def test_a_reset_mask_that_names_no_worlds_is_refused(mask):
    env = vector()
    env.reset()
    with pytest.raises(ConfigError, match=r"reset_mask.*expected 3 flags"):
        env.reset(options={"reset_mask": mask})


def test_an_unknown_autoreset_mode_is_refused_with_those_there_are():
    with pytest.raises(ConfigError, match="Did you mean 'NextStep'"):
        vector(autoreset_mode="NextStp")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))], ids=["deepcopy", "pickle"])
def test_imagined_worlds_that_start_at_the_prior_are_copied_and_pickled(copied):
    env = ImaginedVecEnv(small_world(), 2, 4, start="prior", seed=0)
    env.reset()
    again, actions = copied(env), np.zeros(2, np.int64)
    for _ in range(6):
        np.testing.assert_equal(again.step(actions), env.step(actions))


@pytest.mark.parametrize(
    "space, mode", [(BOX, None), (spaces.Box(0, 255, (16, 16, 3), np.uint8), "rgb_array")], ids=["vector", "picture"]
)
def test_imagined_worlds_say_that_they_draw_only_where_they_can(space, mode):
    world = small_world(space)
    venv = ImaginedVecEnv(world, 2, start="prior")
    assert venv.render_mode == mode and venv.get_attr("render_mode") == [mode, mode]
    options = {"run": world, "start": "prior", "render_mode": "rgb_array"}
    for make in (lambda: gym.make(IMAGINED, **options), lambda: gym.make_vec(IMAGINED, 2, **options)):
        if mode is None:
            with pytest.raises(ConfigError, match="render_mode is 'rgb_array'"):
                make()
        else:
            assert make().unwrapped.metadata["render_modes"] == ["rgb_array"]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_adapter_says_what_its_environments_are_wrapped_in(asynchronous):
    class Ours(Monitor):
        pass

    makers = [lambda: Monitor(gym.make("CartPole-v1")), lambda: Ours(gym.make("CartPole-v1"))]
    form = (lambda fns: AsyncVectorEnv(fns, context="fork")) if asynchronous else SyncVectorEnv
    env = GymVecEnvAdapter(form(makers))
    assert env.env_is_wrapped(Monitor) == [True, True] and env.env_is_wrapped(Ours) == [False, True]
    assert env.env_is_wrapped(gym.wrappers.TimeLimit, [1]) == [True]
    assert env.env_is_wrapped(gym.wrappers.RescaleAction) == [False, False]
    env.close()
