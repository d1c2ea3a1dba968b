"""The user's space is what `predict`, evaluations and environments speak, wherever categories begin and however it is nested."""

from __future__ import annotations

import copy

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import SMALL_WORLD, Toy, small_dreamer, small_world
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from small_runs import small_train
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import Tensor
from typer.testing import CliRunner

from worldmodel.agents.belief import Controller
from worldmodel.agents.dreamer import Dreamer
from worldmodel.agents.evaluation import evaluate
from worldmodel.agents.held_out import collect
from worldmodel.agents.random import RandomAgent
from worldmodel.agents.sb3.agent import SB3Agent
from worldmodel.agents.sb3.dyna import DynaCallback
from worldmodel.agents.sb3.extractor import latent_policy_kwargs
from worldmodel.agents.sb3.joint import JointWorldModel
from worldmodel.cli import app
from worldmodel.data import State
from worldmodel.envs import ImaginedEnv, ImaginedVecEnv, LatentVecEnv, PlainVecEnv, as_vec_env, make, make_vec
from worldmodel.errors import ConfigError, EnvError
from worldmodel.spaces import ObsSpec
from worldmodel.storage.run import Run

BOX = spaces.Box(-1, 1, (2,), np.float32)
TWO = spaces.Discrete(2, start=10)

SHIFTED = spaces.Discrete(4, start=3)
CASES = {
    "action from 10": (BOX, TWO),
    "observation from 3": (SHIFTED, spaces.Discrete(2)),
    "both": (SHIFTED, spaces.Discrete(3, start=-2)),
    "groups": (spaces.MultiDiscrete([3, 5], start=[-1, 7]), spaces.MultiDiscrete([2, 3], start=[4, -6])),
    "grid": (spaces.MultiDiscrete([[2, 3], [3, 2]]), spaces.MultiDiscrete([[2, 3]], start=[[1, 1]])),
    "bits": (spaces.MultiBinary((2, 3)), spaces.MultiBinary((2, 2))),
    "boxes": (spaces.Box(-1, 1, (3, 2), np.float32), spaces.Box(np.float32([[0, 2]]), np.float32([[1, 9]]))),
    "no dimensions": (spaces.Box(-1, 1, (), np.float32), spaces.Box(-3, 4, (), np.float32)),
    "dict": (spaces.Dict(where=BOX, gear=SHIFTED), TWO),
    "nested": (spaces.Dict(arm=spaces.Dict(angle=BOX, lamps=spaces.MultiBinary(2)), gear=SHIFTED), TWO),
    "tuple": (spaces.Tuple([SHIFTED, BOX]), TWO),
    "tuple of dicts": (spaces.Tuple([SHIFTED, spaces.Dict(a=BOX, b=spaces.Tuple([SHIFTED]))]), TWO),
}


class OneStep(gym.Env):
    """One of two observations, and one action that is right for it: its reward is 1, that of any other 0.

    ValueError for an action that is not of the space.
    """

    def __init__(self, case: str):
        self.observation_space, self.action_space = CASES[case]
        self.observation_space.seed(0), self.action_space.seed(0)
        self.observations = [self.observation_space.sample() for _ in range(2)]
        self.right = [self.action_space.sample() for _ in range(2)]
        while _equal(*self.observations):
            self.observations[1] = self.observation_space.sample()
        while _equal(*self.right):
            self.right[1] = self.action_space.sample()

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.which = int(self.np_random.integers(2))
        return copy.deepcopy(self.observations[self.which]), {}

    def step(self, action):
        if not self.action_space.contains(action):
            raise ValueError(f"{action!r} is not of {self.action_space}")
        return (
            copy.deepcopy(self.observations[self.which]),
            float(np.allclose(action, self.right[self.which], atol=1e-5)),
            True,
            False,
            {},
        )


for name in CASES:
    gym.register(f"OneStep-{name.replace(' ', '-')}-v0", entry_point=OneStep, kwargs={"case": name}, max_episode_steps=5)


def id_of(case: str) -> str:
    return f"OneStep-{case.replace(' ', '-')}-v0"


def _equal(one, other) -> bool:
    if isinstance(one, dict):
        return all(_equal(one[k], other[k]) for k in one)
    if isinstance(one, tuple):
        return all(_equal(a, b) for a, b in zip(one, other))
    return np.array_equal(one, other)


class Right(Controller):
    """Takes the right action of OneStep."""

    def __init__(self, env: OneStep, spec: ObsSpec):
        super().__init__()
        flat = as_vec_env(env).envs[0]
        self.observations, self.env = [], env
        for _ in range(50):
            self.observations.append((spec.to_raw(_batch(flat.reset()[0])), env.right[env.which]))

    def act(self, world, state, memory, deterministic, generator, rows=None) -> tuple[Tensor, State]:
        actions = []
        for i in range(state.batch_size):
            known = (right for given, right in self.observations if all(np.array_equal(given[k][0], rows[k][i]) for k in rows))
            actions.append(next(known))
        return torch.as_tensor(world.action.encode(np.stack(actions))), memory


@pytest.mark.parametrize("case", ["nested", "tuple", "tuple of dicts"])
def test_predict_takes_nested_observations_alone_and_many_at_once_and_refuses_what_reset_gives_as_a_whole(case):
    model, env = right_dreamer(case), OneStep(case)
    obs = env.reset(seed=0)[0]
    assert model.predict(_stacked(obs, obs))[0].tolist() == [int(model.predict(obs)[0])] * 2
    with pytest.raises(EnvError, match=r"reset\(\)\[0\]"):
        model.predict(env.reset())
    with pytest.raises(EnvError, match="missing observation keys"):
        model.predict(dict(model.get_env().reset(), extra=1) if case == "tuple" else {"arm": {}})
    assert set(model.world.obs.to_raw(_stacked(obs, obs))) == set(model.observation_space.spaces)


def _stacked(*many):
    """Observations as one of arrays [N, ...]."""
    first = many[0]
    if isinstance(first, dict):
        return {k: _stacked(*(obs[k] for obs in many)) for k in first}
    return tuple(map(_stacked, *many)) if isinstance(first, tuple) else np.stack(many)


def _batch(obs):
    return {k: np.asarray(x)[None] for k, x in obs.items()} if isinstance(obs, dict) else np.asarray(obs)[None]


def right_dreamer(case: str) -> Dreamer:
    policy = "MultiInputPolicy" if isinstance(CASES[case][0], spaces.Dict | spaces.Tuple) else "MlpPolicy"
    model = small_dreamer(gym.make(id_of(case)), policy)
    model.controller = model.policy.controller = Right(OneStep(case), model.obs_spec)
    return model


def sb3_takes(case: str) -> bool:
    """Whether SB3's DummyVecEnv holds such observations, which it makes of every single environment."""
    parts = getattr(CASES[case][0], "spaces", {})
    parts = parts.values() if isinstance(parts, dict) else parts
    return not any(isinstance(part, spaces.Dict | spaces.Tuple) for part in parts)


@pytest.mark.parametrize("case", CASES)
def test_a_right_policy_scores_full_marks_whoever_asks_it(case):
    model, env = right_dreamer(case), gym.make(id_of(case))
    for seed in range(4):
        obs, _ = env.reset(seed=seed)
        action, _ = model.predict(obs, deterministic=True)
        assert env.action_space.contains(action) and env.step(action)[1] == 1.0
    assert model.action_space == env.action_space
    theirs = env if sb3_takes(case) else as_vec_env(env)
    for asked in (model.get_env(), theirs, make_vec(id_of(case), 3)):
        assert evaluate_policy(model, asked, n_eval_episodes=6, warn=False)[0] == 1.0
    callback = EvalCallback(gym.make(id_of(case)) if sb3_takes(case) else make_vec(id_of(case)), n_eval_episodes=4, eval_freq=5)
    model.learn(10, callback)
    assert callback.last_mean_reward == 1.0
    assert evaluate(model, id_of(case), 6)[0] == [1.0] * 6
    held_out = collect(model, id_of(case), 6, random=0.0).rows
    assert float(held_out.reward.sum()) == 6.0


@pytest.mark.parametrize("case", ["both", "groups", "grid", "bits", "no dimensions", "dict"])
def test_every_action_that_a_world_model_agent_takes_is_of_the_users_space(case):
    observation, action = CASES[case]
    env = Toy(observation, action)
    policy = "MultiInputPolicy" if isinstance(observation, spaces.Dict) else "MlpPolicy"
    model = small_dreamer(env, policy, **{"train.prefill": 20, "train.pretrain": 1, "train.ratio": 0.1})
    model.learn(40)
    assert model.learner.updates and all(action.contains(x if action.shape else x[()]) for x in env.actions)


def test_vector_environments_of_gymnasium_get_their_own_numbers():
    toys = [Toy(*CASES["both"]) for _ in range(2)]
    vector = SyncVectorEnv([lambda toy=toy: toy for toy in toys], autoreset_mode=AutoresetMode.SAME_STEP)
    small_dreamer(vector).learn(20)
    assert all(toy.action_space.contains(x) for toy in toys for x in toy.actions)
    imagined = gym.make_vec("worldmodel.envs:Imagined-v0", 2, run=small_world(*CASES["both"]), start="prior", observation="decoded")
    venv = PlainVecEnv(as_vec_env(imagined))
    assert venv.action_space == spaces.Discrete(3) and set(venv.reset()) <= set(range(4))
    assert set(venv.step(np.array([0, 2]))[0]) <= set(range(4))


def test_a_run_of_nested_and_shifted_spaces_goes_on_and_is_evaluated_and_encoded(tmp_path):
    env_id, folder = id_of("tuple of dicts"), tmp_path / "run"
    small_train(folder, 24, env_id)
    assert small_train(folder, 30, env_id, resume=True).real_steps == 30
    assert CliRunner().invoke(app, ["eval", str(folder), "--episodes", "2"]).exit_code == 0
    obs = [gym.make(env_id).reset(seed=seed)[0] for seed in range(3)]
    assert len(Run.open(folder).encode(_stacked(*obs)).mean) == 3
    agent = Dreamer.load(folder)
    assert all(agent.action_space.contains(agent.predict(one)[0]) for one in obs) and agent.action_space == TWO


# Algorithms of SB3, which count from 0 -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def solved(tmp_path_factory):
    """(PPO that learned "both" itself, its zip)."""
    options = {"n_steps": 16, "batch_size": 64, "learning_rate": 1e-2, "seed": 0, "device": "cpu"}
    model = PPO("MlpPolicy", PlainVecEnv(make_vec(id_of("both"), 8)), **options)
    path = tmp_path_factory.mktemp("ppo") / "ppo.zip"
    model.learn(1000).save(path)
    return model, path


def test_ppo_learns_a_shifted_environment_and_scores_the_same_inside_the_loop(solved):
    model, path = solved
    env = gym.make(id_of("both"))
    assert model.action_space == spaces.Discrete(3) and model.observation_space == spaces.Discrete(4)
    assert evaluate(model, id_of("both"), 10)[0] == [1.0] * 10
    agent = SB3Agent("MlpPolicy", id_of("both"), config={"size": "nano", "agent.path": str(path)}, device="cpu", trust=True)
    assert env.action_space.contains(agent.predict(env.reset(seed=0)[0], deterministic=True)[0])
    assert evaluate_policy(agent, gym.make(id_of("both")), 10, warn=False)[0] == 1.0
    assert evaluate_policy(agent, agent.get_env(), 10)[0] == 1.0
    assert evaluate(agent, id_of("both"), 10)[0] == [1.0] * 10


@pytest.mark.parametrize("observation", ["latent", "decoded"])
def test_an_algorithm_in_the_dream_counts_from_0_and_the_environment_gets_its_own_numbers(observation):
    env = Toy(*CASES["groups"])
    options = {
        "agent.algo": "a2c",
        "agent.observation": observation,
        "agent.every": 10,
        "agent.imagined": 32,
        "agent.options": {"n_steps": 4},
        "agent.worlds": 4,
    }
    config = {"size": "nano", "train.prefill": 20, "train.pretrain": 1, "train.batch_length": 8, "train.batch_size": 2, **options}
    agent = SB3Agent("MlpPolicy", env, config=config, device="cpu", seed=0)
    agent.learn(45)
    assert agent.dreams and agent.algorithm.action_space == spaces.MultiDiscrete([2, 3])
    assert all(env.action_space.contains(x) for x in env.actions)
    assert env.action_space.contains(agent.predict(env.reset()[0])[0])


def test_imagined_worlds_speak_sb3s_form_to_sb3_and_the_users_to_gymnasium():
    world = small_world(*CASES["both"])
    venv = ImaginedVecEnv(world, 2, start="prior", observation="decoded", seed=0)
    assert venv.observation_space == spaces.Discrete(4) and venv.action_space == spaces.Discrete(3)
    assert set(venv.reset()) <= set(range(4)) and venv.step(np.array([0, 2]))
    env = ImaginedEnv(world, start="prior", observation="decoded", seed=0)
    assert (env.observation_space, env.action_space) == CASES["both"]
    assert env.observation_space.contains(env.reset()[0]) and env.observation_space.contains(env.step(-2)[0])
    PPO("MlpPolicy", venv, n_steps=8, batch_size=8, device="cpu").learn(16)


def test_latent_environments_take_actions_from_0():
    env = Toy(*CASES["both"])
    venv = LatentVecEnv(as_vec_env(env), small_world(*CASES["both"]))
    assert venv.action_space == spaces.Discrete(3)
    DQN("MlpPolicy", venv, learning_starts=5, device="cpu").learn(20)
    assert all(env.action_space.contains(x) for x in env.actions) and len(set(map(int, env.actions))) > 1


def test_the_plain_form_of_environments_is_what_sb3_needs_and_nothing_where_that_is_so_already():
    plain = PlainVecEnv(
        as_vec_env(Toy(spaces.Dict(a=spaces.MultiDiscrete([[2, 3]]), b=BOX, c=SHIFTED), spaces.MultiBinary((2, 2))))
    )
    assert plain.observation_space == spaces.Dict(a=spaces.MultiDiscrete([2, 3]), b=BOX, c=spaces.Discrete(4))
    assert plain.action_space == spaces.MultiBinary(4)
    obs = plain.reset()
    for _ in range(6):
        assert all(plain.observation_space[k].contains(x[0]) for k, x in obs.items())
        obs, _, dones, infos = plain.step(np.array([[1, 0, 0, 1]]))
        assert not dones[0] or plain.observation_space.contains(infos[0]["terminal_observation"])
    assert all(action.tolist() == [[1, 0], [0, 1]] for action in plain.get_attr("actions")[0])
    already = DummyVecEnv([Toy])
    assert PlainVecEnv.around(already) is already


@pytest.fixture(scope="module")
def collected():
    """An agent that has collected at random in Toy."""
    agent = RandomAgent("MlpPolicy", Toy(*CASES["both"]), config={**SMALL_WORLD, "train.prefill": 40}, seed=0, device="cpu")
    return agent.learn(30)


def test_dyna_fills_the_buffer_of_an_algorithm_that_counts_from_0(collected):
    env = Toy(*CASES["both"])
    model = DQN("MlpPolicy", PlainVecEnv(as_vec_env(env)), learning_starts=5, train_freq=4, batch_size=8, seed=0, device="cpu")
    callback = DynaCallback(collected.world, replay=collected.replay, ratio=3, every=4)
    model.learn(24, callback=callback)
    buffer, n = model.replay_buffer, model.replay_buffer.size()
    assert callback.imagined > 0 and n == 24 + callback.imagined
    assert set(buffer.observations[:n].flat) <= set(range(4)) and set(buffer.actions[:n].flat) <= set(range(3))
    assert all(env.action_space.contains(x) for x in env.actions)
    with pytest.raises(ConfigError, match="PlainVecEnv"):
        DQN("MlpPolicy", as_vec_env(env), device="cpu").learn(8, callback=callback)


def test_an_encoder_inside_an_algorithm_that_counts_from_0_sees_what_the_world_model_sees(collected):
    world, plain = collected.world, PlainVecEnv(as_vec_env(Toy(*CASES["both"])))
    kwargs = latent_policy_kwargs(world, "joint", output="embedding")
    model = PPO("MlpPolicy", plain, policy_kwargs=kwargs, n_steps=8, batch_size=8, device="cpu")
    obs = np.arange(4)
    got = model.policy.extract_features(model.policy.obs_to_tensor(obs)[0], model.policy.pi_features_extractor)
    with torch.no_grad():
        torch.testing.assert_close(got.detach(), world.encoder(world.preprocess({"obs": torch.as_tensor(obs + 3)})))
    callback = JointWorldModel(world, config={"train.batch_size": 2, "train.batch_length": 4, "train.prefill": 8})
    model.learn(16, callback=callback)
    assert callback.agent.learner.updates > 0


# Runs of version 0.1 -----------------------------------------------------------------------------------------------------


@pytest.fixture
def old_run(tmp_path, monkeypatch):
    """A run as version 0.1 made it: the environment's spaces were shifted for the agent too."""
    with monkeypatch.context() as patched:
        wrap = make.FlattenSpaces.wrap
        patched.setattr(make.FlattenSpaces, "wrap", lambda env, **_: wrap(env))
        small_train(tmp_path / "run", 30, id_of("both"))
    return Run.open(tmp_path / "run")


def test_a_run_that_counted_from_0_is_evaluated_so_and_its_resume_says_why_not(old_run):
    agent = Dreamer.load(old_run.path)
    assert agent.action_space == spaces.Discrete(3)
    assert len(evaluate(agent, id_of("both"), 2)[0]) == 2
    assert Dreamer.load(old_run.path, env=id_of("both")).learn(5).num_timesteps > 0
    result = CliRunner().invoke(app, ["eval", str(old_run.path), "--episodes", "2"])
    assert result.exit_code == 0, result.output
    with pytest.raises(ConfigError, match="counted all categories from 0"):
        small_train(old_run.path, 60, id_of("both"), resume=True)
