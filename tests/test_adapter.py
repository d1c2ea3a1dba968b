"""Gymnasium's vector environments as SB3 VecEnvs: every transition is one, in each autoreset mode."""

from __future__ import annotations

import copy

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import CHAIN, IMAGE, TWO_ACTIONS, VECTOR, Toy, small_dreamer, small_world, stored
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.vector.utils import batch_space
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnvWrapper, VecMonitor

from worldmodel.envs import GymVecEnvAdapter, ImaginedVectorEnv, LatentVecEnv, check_vec_env
from worldmodel.envs.make import as_vec_env, id_of
from worldmodel.errors import ConfigError, EnvError, UnsupportedSpaceError

DICT = spaces.Dict({"a": VECTOR, "b": spaces.Discrete(3)})
SAME, NEXT, NEVER = AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED


def toy(i: int, observation=VECTOR):
    """Episodes of 3 + i steps at most, which terminate and are truncated in turn; the info counts."""
    return lambda: gym.wrappers.TimeLimit(Counted(copy.deepcopy(observation), spaces.Box(-1, 1, (2,), np.float32)), 3 + i)


class Counted(Toy):
    gravity = 9.8

    def reset(self, *, seed=None, options=None):
        obs, _ = super().reset(seed=seed)
        return obs, {"episode_number": self.episode, "asked": (options or {}).get("asked", 0), "of_reset": True}

    def step(self, action):
        obs, _, *rest, _ = super().step(action)
        return obs, float(action.sum()), *rest, {"steps": self.steps}

    def add(self, a, b=0):
        return self.episode + a + b


def native(max_episode_steps: int = 12, num_envs: int = 3) -> VectorEnv:
    return gym.make_vec("CartPole-v1", num_envs, vectorization_mode="vector_entry_point", max_episode_steps=max_episode_steps)


def play(env, steps: int = 16):
    env.seed(5)
    env.action_space.seed(0)
    story = [env.reset()]
    for _ in range(steps):
        obs, rewards, dones, infos = env.step(np.stack([env.action_space.sample() for _ in range(env.num_envs)]))
        assert not any("of_reset" in info for info in infos)  # a step's info is not the next episode's
        ends = [(i["terminal_observation"], i["TimeLimit.truncated"]) if "terminal_observation" in i else None for i in infos]
        story.append((obs, rewards, dones, ends, [i["steps"] for i in infos]))
    return story


@pytest.mark.parametrize("mode", AutoresetMode)
@pytest.mark.parametrize("observation", [VECTOR, IMAGE, spaces.Discrete(4), DICT], ids=str)
def test_every_mode_gives_what_sb3_gives(mode, observation):
    makers = [toy(i, observation) for i in range(3)]
    adapter = GymVecEnvAdapter(SyncVectorEnv(makers, autoreset_mode=mode))
    ours, theirs = play(adapter), play(DummyVecEnv(makers))
    np.testing.assert_equal(ours, theirs)
    assert all(a[1].dtype == b[1].dtype for a, b in zip(ours[1:], theirs[1:]))
    assert sum(dones.sum() for _, _, dones, *_ in ours[1:]) > 6
    assert [info["episode_number"] for info in adapter.reset_infos] == [1 + 16 // min(3 + i, 5) for i in range(3)]


@pytest.mark.parametrize(
    "make",
    [
        lambda: SyncVectorEnv([toy(0), toy(1)], autoreset_mode=NEXT, copy=False),
        lambda: SyncVectorEnv([toy(0, DICT), toy(1, DICT)], autoreset_mode=SAME),
        lambda: AsyncVectorEnv([toy(0), toy(1)], autoreset_mode=NEXT, context="fork"),
        lambda: AsyncVectorEnv([toy(0, DICT), toy(1, DICT)], autoreset_mode=NEVER, shared_memory=False, context="fork"),
        lambda: gym.wrappers.vector.RescaleAction(SyncVectorEnv([toy(0), toy(1)], autoreset_mode=NEXT), *np.float32([0, 1])),
        native,
        lambda: ImaginedVectorEnv(small_world(), 3, 4, start="prior"),
    ],
)
def test_what_comes_out_is_a_sound_vec_env(make):
    env = GymVecEnvAdapter(make())
    check_vec_env(env, steps=40)
    env.reset()
    _, rewards, dones, infos = env.step(np.stack([env.action_space.sample() for _ in range(env.num_envs)]))
    assert rewards.shape == dones.shape == (len(infos),) == (env.num_envs,)
    env.close()


def test_gymnasiums_native_cartpole_makes_real_transitions_only():
    env, truth = GymVecEnvAdapter(native(max_episode_steps=12, num_envs=8)), gym.make("CartPole-v1").unwrapped
    env.seed(0)
    truth.reset()
    obs, age, rng = env.reset(), np.zeros(8, int), np.random.default_rng(0)
    ends = []
    for _ in range(60):
        actions = rng.integers(0, 2, 8)
        before, (obs, rewards, dones, infos) = obs, env.step(actions)
        age += 1
        for i in range(8):
            truth.state, truth.steps_beyond_terminated = before[i].astype(np.float64), None
            arrived, _, terminated, *_ = truth.step(int(actions[i]))
            np.testing.assert_allclose(infos[i].get("terminal_observation", obs[i]), arrived, atol=1e-5)
            assert rewards[i] == 1 and dones[i] == (terminated or age[i] == 12)
            if dones[i]:
                ends.append(infos[i]["TimeLimit.truncated"])
                assert infos[i]["TimeLimit.truncated"] == (not terminated) and np.abs(obs[i]).max() <= 0.05
        age[dones] = 0
    assert True in ends and False in ends


def test_sb3_and_our_agents_learn_in_it():
    PPO("MlpPolicy", VecMonitor(GymVecEnvAdapter(native())), n_steps=8, batch_size=12, n_epochs=1, device="cpu").learn(48)
    DQN("MlpPolicy", GymVecEnvAdapter(native()), learning_starts=10, device="cpu").learn(40)
    agent = small_dreamer(gym.make_vec(CHAIN, 1, vectorization_mode="sync", length=3, limit=4), **{"train.prefill": 30})
    agent.learn(28)
    rows = stored(agent)
    cells = rows.obs["obs"].argmax(-1)
    assert rows.is_first.sum() > 5 and (cells[rows.is_first] == 0).all()
    for t in range(1, len(cells)):
        if not rows.is_first[t]:
            assert cells[t] == (cells[t - 1] + 2 * int(rows.prev_action[t].argmax()) - 1).clamp(0, 2)
    assert {episode["l"] for episode in agent.ep_info_buffer} <= {2, 3, 4}


def test_attributes_of_single_environments_are_read_and_set():
    env = GymVecEnvAdapter(SyncVectorEnv([toy(0), toy(1)]))
    assert env.get_attr("gravity") == [9.8, 9.8] and env.get_attr("gravity", 1) == [9.8] and not env.has_attr("mass")
    env.set_attr("gravity", 1.6, [1])
    assert env.get_attr("gravity") == [9.8, 1.6]
    env.reset()
    assert env.env_method("add", 1, b=2, indices=[0]) == [4]
    assert env.env_is_wrapped(gym.wrappers.TimeLimit) == [True, True] and env.env_is_wrapped(Monitor, 0) == [False]
    one_array = GymVecEnvAdapter(native())
    assert one_array.get_attr("gravity", 2) == [9.8]
    for ask in (lambda: one_array.env_method("render"), lambda: one_array.set_attr("gravity", 1)):
        with pytest.raises(NotImplementedError, match="no single environments"):
            ask()


def test_options_reach_the_environments_once():
    env = GymVecEnvAdapter(SyncVectorEnv([toy(0), toy(1)]))
    env.set_options({"asked": 7})
    for asked in (7, 0):
        env.reset()
        assert [info["asked"] for info in env.reset_infos] == [asked, asked]
    env.set_options([{"asked": 1}, {}])
    with pytest.raises(ConfigError, match="one `options` for all"):
        env.reset()


@pytest.mark.parametrize("mode", AutoresetMode)
def test_infos_go_to_the_environment_that_they_are_about(mode):
    env = GymVecEnvAdapter(SyncVectorEnv([toy(0), toy(2)], autoreset_mode=mode))
    env.reset()
    actions = np.zeros((2, 2), np.float32)
    for t in range(1, 5):
        *_, infos = env.step(actions)
        assert [info["steps"] for info in infos] == [(t - 1) % 3 + 1, t]
        assert not any(key.startswith(("_", "final")) for info in infos for key in info)


class Native(VectorEnv):
    """Two counters to 3 as one array, which reset one step late."""

    metadata = {"autoreset_mode": NEXT}
    num_envs = 2
    single_observation_space, single_action_space = spaces.Box(0, 9, (1,), np.float32), TWO_ACTIONS
    observation_space, action_space = batch_space(single_observation_space, 2), batch_space(single_action_space, 2)

    def reset(self, *, seed=None, options=None):
        self.count = np.arange(2.0, dtype=np.float32)
        return self.count[:, None].copy(), {"where": "everywhere"}

    def step(self, actions):
        self.count = np.where(self.count >= 3, 0, self.count + 1).astype(np.float32)
        return self.count[:, None].copy(), np.ones(2), self.count >= 3, np.zeros(2, bool), {}


def reset_rows(env, rows):
    env.count[rows] = 0
    return env.count[:, None].copy(), {}


def test_reset_rows_says_how_rows_begin_anew():
    env = GymVecEnvAdapter(Native(), reset_rows)
    env.reset()
    assert env.reset_infos == [{"where": "everywhere"}] * 2
    seen = [env.step(np.zeros(2, int)) for _ in range(4)]
    assert [step[0][:, 0].tolist() for step in seen] == [[1, 2], [2, 0], [0, 1], [1, 2]]
    assert seen[1][3][1] == {"terminal_observation": np.array([3], np.float32), "TimeLimit.truncated": False}


class Silent(Native):
    metadata = {"autoreset_mode": SAME}


def test_an_end_without_its_last_observation_is_named():
    env = GymVecEnvAdapter(Silent())
    env.reset()
    with pytest.raises(EnvError, match="environment 1: it ended, and its info holds no 'final_obs'"):
        [env.step(np.zeros(2, int)) for _ in range(3)]


class Unsaid(Native):
    metadata = {}


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (Native, ConfigError, "one step late .*SAME_STEP.*or pass reset_rows"),
        (lambda: gym.wrappers.vector.TransformReward(native(), abs), ConfigError, "one step late"),
        (lambda: AsyncVectorEnv([toy(0)], shared_memory=False, context="fork"), ConfigError, "one step late"),
        (Unsaid, ConfigError, "autoreset_mode.* is None"),
        (lambda: Toy(), ConfigError, "got Toy"),
        (lambda: SyncVectorEnv([toy(0, spaces.Tuple([VECTOR]))]), UnsupportedSpaceError, "does not take the space Tuple"),
    ],
)
def test_what_cannot_be_right_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        GymVecEnvAdapter(make())


# What a VecEnv need not have ---------------------------------------------------------------------------------------------


class Forgets(VecEnvWrapper):
    """Keeps nothing of the infos."""

    def reset(self):
        return self.venv.reset()

    def step_wait(self):
        obs, rewards, dones, _ = self.venv.step_wait()
        return obs, rewards, dones, [{} for _ in dones]


def chains(count: int = 2, limit: int = 4):
    return DummyVecEnv([lambda: gym.make(CHAIN, length=3, limit=limit)] * count)


def test_where_the_last_observation_is_not_told_the_one_before_stands_in_with_one_warning(caplog):
    agent = small_dreamer(Forgets(chains()), **{"train.prefill": 60})
    agent.learn(40)
    rows = stored(agent)
    ends = np.flatnonzero(rows.is_last)
    assert len(ends) > 3
    for name, x in rows.obs.items():
        assert all(torch.equal(x[t], x[t - 1]) for t in ends), name
    assert [record.message.count("terminal_observation") for record in caplog.records] == [1]


def test_a_policy_on_latents_plays_where_the_last_observation_is_missing():
    world = small_world(chains().observation_space, chains().action_space)
    env = LatentVecEnv(Forgets(chains()), world)
    env.reset()
    steps = [env.step(np.zeros(2, np.int64)) for _ in range(6)]
    assert any(dones.any() for _, _, dones, _ in steps)
    assert not any("terminal_observation" in info for *_, infos in steps for info in infos)


@pytest.mark.parametrize("error", [AttributeError, NotImplementedError, TypeError])
def test_a_vec_env_that_cannot_be_seeded_is_learned_in_and_told_of(error, caplog):
    class Unseeded(DummyVecEnv):
        def seed(self, seed=None):
            raise error("no seed")

    agent = small_dreamer(Unseeded([lambda: gym.make(CHAIN)]))
    agent.learn(5)
    agent.restart_episodes(3)
    assert agent.num_timesteps == 5
    assert all("Unseeded) cannot be seeded" in record.message for record in caplog.records) and len(caplog.records) == 2


def monitored():
    return Monitor(Toy(VECTOR, TWO_ACTIONS))


@pytest.mark.parametrize(
    "make",
    [
        lambda: gym.wrappers.TimeLimit(monitored(), 4),
        lambda: DummyVecEnv([lambda: gym.wrappers.TimeLimit(monitored(), 4)]),
        lambda: DummyVecEnv([lambda: gym.wrappers.TimeLimit(monitored().env, 4)]),
        lambda: Forgets(DummyVecEnv([lambda: gym.wrappers.TimeLimit(monitored().env, 4)])),
    ],
    ids=["inside a time limit", "in a VecEnv", "none", "none and no infos"],
)
def test_episodes_are_counted_wherever_the_monitor_stands(make):
    agent = small_dreamer(make())
    agent.learn(20)
    assert [(episode["l"], episode["r"]) for episode in agent.ep_info_buffer] == [(4, 4.0)] * 5


def test_a_lost_life_outside_of_the_monitor_is_no_episode():
    class Lives(gym.Wrapper):
        def step(self, action):
            obs, reward, terminated, truncated, info = super().step(action)
            return obs, reward, terminated or self.env.unwrapped.steps % 2 == 0, truncated, info

        def reset(self, **kwargs):
            return self.env.reset(**kwargs) if self.env.unwrapped.over else (self.env.unwrapped.observation_space.sample(), {})

    class Whole(Toy):
        over = True

        def reset(self, **kwargs):
            self.over = False
            return super().reset(**kwargs)

        def step(self, action):
            obs, reward, terminated, truncated, info = super().step(action)
            self.over = terminated or truncated
            return obs, reward, terminated, truncated, info

    agent = small_dreamer(DummyVecEnv([lambda: Lives(Monitor(Whole(VECTOR, TWO_ACTIONS)))]))
    agent.learn(20)
    assert {episode["l"] for episode in agent.ep_info_buffer} == {5}


@pytest.mark.parametrize("form", [np.asarray, list, torch.as_tensor])
def test_last_observations_are_taken_in_whatever_arrays_they_come(form):
    class Tells(Silent):
        def step(self, actions):
            obs, *rest, _ = super().step(actions)
            ended = rest[1]
            if not ended.any():
                return form(obs), *rest, {}
            last = np.where(ended[:, None], obs, np.nan)
            return form(np.where(ended[:, None], 0, obs)), *rest, {"final_obs": form(last), "_final_obs": form(ended)}

        reset = lambda self, **_: (form(Silent.reset(self)[0]), {})  # noqa: E731

    env = GymVecEnvAdapter(Tells())
    env.reset()
    steps = [env.step(np.zeros(2, int)) for _ in range(3)]
    ends = [info["terminal_observation"] for *_, infos in steps for info in infos if info]
    assert all(isinstance(x, np.ndarray) for x in [*ends, steps[0][0]])
    assert [x.tolist() for x in ends] == [[3.0], [3.0]]


class Swallows(gym.vector.VectorWrapper):
    def reset(self, *, seed=None, options=None):
        return self.env.reset(seed=seed)


@pytest.mark.parametrize("wrapper", [Swallows, gym.wrappers.vector.NormalizeObservation, gym.wrappers.vector.NormalizeReward])
def test_a_wrapper_that_cannot_begin_some_rows_anew_is_refused_by_name_before_the_first_step(wrapper):
    outside = gym.wrappers.vector.RecordEpisodeStatistics(wrapper(SyncVectorEnv([toy(0), toy(1)])))
    with pytest.raises(ConfigError, match=f"{wrapper.__name__} is around a VectorEnv .*single environments"):
        GymVecEnvAdapter(outside).reset()


def test_wrappers_that_can_begin_some_rows_anew_change_nothing():
    def vector(wrap):
        return GymVecEnvAdapter(wrap(SyncVectorEnv([toy(0), toy(1)])))

    plain, wrapped = play(vector(lambda env: env)), play(vector(lambda env: gym.wrappers.vector.TransformReward(env, abs)))
    np.testing.assert_equal([step[0] for step in wrapped[1:]], [step[0] for step in plain[1:]])


@pytest.mark.parametrize("mode", [NEXT, NEVER])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda env: gym.wrappers.vector.FlattenObservation(env),
        lambda env: gym.wrappers.vector.FilterObservation(env, ["a"]),
        lambda env: gym.wrappers.vector.DictInfoToList(env),
    ],
    ids=["flattened", "filtered", "infos as a list"],
)
def test_wrappers_that_change_the_form_of_what_comes_are_taken(mode, wrap):
    env = GymVecEnvAdapter(wrap(SyncVectorEnv([toy(0, DICT), toy(1, DICT)], autoreset_mode=mode)))
    env.reset()
    ended = [env.step(np.zeros((2, 2), np.float32)) for _ in range(6)]
    assert any("terminal_observation" in info for *_, infos in ended for info in infos)
    assert all(info["steps"] for *_, infos in ended for info in infos)


def test_the_recipe_of_an_adapters_environments_is_known():
    vector = gym.make_vec("CartPole-v1", 2, vectorization_mode="sync")
    assert id_of(GymVecEnvAdapter(vector)) == id_of(as_vec_env(vector)) == id_of(vector) == "CartPole-v1"
