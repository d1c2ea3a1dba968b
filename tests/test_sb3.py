"""SB3 algorithms learn in the dream by their own learn(), act in reality, and come back from files as they were."""

from __future__ import annotations

import json
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import CHAIN, SMALL_WORLD
from small_runs import small_train
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from test_imagined import LEARNS
from typer.testing import CliRunner

from worldmodel.agents import DreamPolicy, SB3Agent, train_in_dream
from worldmodel.agents.evaluation import FINAL_SEED, evaluate
from worldmodel.agents.sb3.algorithms import ALGORITHMS, algorithm_class, seeded_globals
from worldmodel.cli import app
from worldmodel.commands.train import train
from worldmodel.envs import make_vec
from worldmodel.errors import ConfigError, MissingExtraError, TrustError
from worldmodel.storage.run import Run

PENDULUM = {**SMALL_WORLD, "agent": "random", "eval.every": 0, "eval.episodes": 1, "log.tensorboard": False, "checkpoint.every": 0}
PENDULUM |= {"env.max_episode_steps": 30}
FITS = {name: "pendulum" if name in ("sac", "td3", "tqc") else "chain" for name in ALGORITHMS}
SLIM = {"net_arch": [16, 16]}
QUICK = {"sac": SLIM, "td3": SLIM, "qrdqn": {"n_quantiles": 10}, "tqc": {**SLIM, "n_quantiles": 5}}
"""Policies' options by algorithm: by SB3's own sizes an update of the continuous ones takes ten times as long."""


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> str:
    """A run that has learned Chain."""
    folder = tmp_path_factory.mktemp("chain") / "run"
    small_train(folder, 300, options=LEARNS)
    return str(folder)


@pytest.fixture(scope="module")
def pendulum(tmp_path_factory) -> str:
    """A run that knows Pendulum's spaces, and little more."""
    folder = tmp_path_factory.mktemp("pendulum") / "run"
    train("Pendulum-v1", steps=60, run_dir=folder, overrides=PENDULUM, device="cpu")
    return str(folder)


# A finished world -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALGORITHMS)
def test_each_algorithm_learns_acts_in_reality_and_acts_the_same_once_loaded(name, chain, pendulum, tmp_path):
    made = algorithm_class(name)
    before = []

    class Watched(made):
        def _setup_model(self):
            super()._setup_model()
            before.append(torch.cat([p.detach().flatten().clone() for p in self.policy.parameters()]))

    Watched.__name__ = made.__name__
    run = chain if FITS[name] == "chain" else pendulum
    options = {"algo_kwargs": {"policy_kwargs": QUICK[name]} if name in QUICK else None, "episodes": 2}
    policy = train_in_dream(Watched, run, total_timesteps=512, worlds=16, horizon=4, **options)
    after = torch.cat([p.detach().flatten() for p in policy.algorithm.policy.parameters()])
    assert policy.algorithm._n_updates >= 2 and (after - before[0]).abs().max() > 1e-4
    assert policy.result.real_steps == 0 and policy.result.imagined_steps >= 512
    assert policy.result.algorithm == made.__name__ and np.isfinite([policy.result.real_return, policy.result.gap]).all()
    policy.save(tmp_path / "policy")
    loaded = DreamPolicy.load(tmp_path / "policy", trust=True)
    assert loaded.result == policy.result and type(loaded.algorithm) is made
    venv = make_vec(policy.env, 3, seed=0)
    obs, state, other = venv.reset(), None, None
    for _ in range(3):
        action, state = policy.predict(obs, state, np.zeros(3, bool), deterministic=True)
        same, other = loaded.predict(obs, other, np.zeros(3, bool), deterministic=True)
        np.testing.assert_array_equal(action, same)
        obs = venv.step(action)[0]
    mean, _ = evaluate_policy(loaded, venv, n_eval_episodes=3, warn=False)
    assert np.isfinite(mean)


@pytest.mark.parametrize("observation", ["latent", "decoded"])
@pytest.mark.parametrize("name", ["ppo", "dqn"])
def test_what_was_learned_in_the_dream_alone_is_best_in_reality(name, observation, chain):
    policy = train_in_dream(name, chain, total_timesteps=8192, worlds=32, horizon=6, observation=observation, episodes=4)
    assert policy.result.real_return == pytest.approx(0.4) and abs(policy.result.gap) < 0.2, policy.result


def test_a_recurrent_policy_remembers_within_an_episode_and_forgets_at_its_start(chain):
    policy = train_in_dream("recurrent_ppo", chain, total_timesteps=256, worlds=8, horizon=4, episodes=0)
    obs = make_vec(CHAIN, 2).reset()
    _, state = policy.predict(obs, None, None, deterministic=True)
    _, later = policy.predict(obs, state, np.array([False, True]), deterministic=True)
    names = list(policy.policy.initial_belief(2))
    h = {name: x for name, x in zip(names, later)}["lstm_h"]
    first = {name: x for name, x in zip(names, state)}["lstm_h"]
    assert not np.allclose(h[0], first[0]) and np.allclose(h[1], first[1], atol=1e-6)


def test_a_callback_of_sb3_is_asked_at_each_imagined_step(chain):
    class Count(BaseCallback):
        calls = 0

        def _on_step(self) -> bool:
            self.calls += 1
            return True

    count = Count()
    train_in_dream(PPO, chain, total_timesteps=512, worlds=32, callback=count, episodes=0)
    assert count.calls == 512 / 32


def test_nothing_of_the_processes_random_states_changes_and_the_same_seed_gives_the_same_policy(chain):
    torch.manual_seed(3)
    np.random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    policies = [train_in_dream("dqn", chain, total_timesteps=256, seed=s, episodes=0).algorithm.policy for s in (5, 5, 6)]
    weights = [torch.cat([p.detach().flatten() for p in policy.parameters()]) for policy in policies]
    assert torch.equal(before[0], torch.get_rng_state()) and np.array_equal(before[1], np.random.get_state()[1])
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_draws_of_sb3_follow_the_generator():
    def draw(seed: int):
        with seeded_globals(torch.Generator().manual_seed(seed)):
            return torch.rand(2).tolist(), np.random.rand(2).tolist()

    assert draw(1) == draw(1) != draw(2)


# Alternating ------------------------------------------------------------------------------------------------------------

SMALL = {**SMALL_WORLD, "train.batch_size": 2}
VISITS = {"agent.every": 20, "agent.imagined": 128, "agent.worlds": 8, "agent.horizon": 4}


def test_in_rounds_the_policy_collects_the_world_learns_and_the_algorithm_dreams():
    policy = train_in_dream("ppo", CHAIN, steps=60, rounds=4, total_timesteps=512, worlds=8, horizon=4, overrides=SMALL, episodes=2)
    assert policy.result.real_steps == 60 and policy.result.imagined_steps == 4 * 128
    assert policy.world.scaling.count > 60


def test_off_policy_experience_of_an_older_world_is_forgotten_unless_it_is_decoded():
    held = {}
    for observation in ("latent", "decoded"):
        config = {**SMALL, **VISITS, "agent.algo": "dqn", "agent.observation": observation}
        agent = SB3Agent("MlpPolicy", CHAIN, config=config, seed=0, device="cpu")
        agent.learn(64)
        held[observation] = agent.algorithm.replay_buffer.size() * 8
        assert agent.imagined_steps > 128
    assert held == {"latent": 128, "decoded": agent.imagined_steps}


class Mine(PPO):
    """A user's own class."""


def test_a_class_derived_from_sb3s_gets_what_suits_the_dream(chain):
    policy = train_in_dream(Mine, chain, total_timesteps=128, worlds=8, episodes=0)
    assert (policy.algorithm.n_steps, policy.algorithm.num_timesteps) == (16, 128)


@pytest.mark.parametrize(("steps", "rounds", "environments"), [(60, 1, 1), (50, 18, 1), (60, 3, 4), (90, 1, 8)])
def test_there_are_as_many_rounds_as_were_asked_for(steps, rounds, environments):
    overrides = {**SMALL, "env.num_envs": environments}
    options = {"steps": steps, "rounds": rounds, "total_timesteps": 64 * rounds, "worlds": 8, "horizon": 4, "episodes": 1}
    policy = train_in_dream("dqn", CHAIN, overrides=overrides, **options)
    assert policy.result.imagined_steps == 64 * rounds


def test_rounds_in_a_world_that_has_learned_nothing_are_refused():
    with pytest.raises(ConfigError, match="taught the world model nothing"):
        train_in_dream("ppo", CHAIN, steps=24, total_timesteps=64, overrides={**SMALL, "env.num_envs": 8}, episodes=0)
    with pytest.raises(ConfigError, match="1 rounds need as many real steps"):
        train_in_dream("ppo", CHAIN, steps=15, total_timesteps=64, overrides=SMALL, episodes=0)


def test_schedules_follow_the_real_steps_and_not_each_training_in_the_dream():
    rates = []

    def rate(remaining: float) -> float:
        rates.append(remaining)
        return 1e-3 * remaining

    agent = SB3Agent("MlpPolicy", CHAIN, config={**SMALL, **VISITS}, algo_kwargs={"learning_rate": rate}, seed=0, device="cpu")
    agent.learn(100)
    left = sorted(set(rates), reverse=True)
    assert left[0] == 1 and 0 < left[-1] < 0.2 and len(left) == agent.dreams + 1  # SB3 asks once as it is made


@pytest.mark.parametrize(("name", "observation"), [("ppo", "latent"), ("dqn", "latent"), ("dqn", "decoded")])
def test_with_a_fence_a_resumed_run_equals_an_unbroken_one_bit_for_bit(name, observation, tmp_path):
    options = {**SMALL, **VISITS, "agent.kind": "sb3", "agent.algo": name, "agent.observation": observation, "eval.every": 0}
    options |= {"eval.episodes": 1, "log.tensorboard": False, "checkpoint.fence": True, "checkpoint.every": 50}
    train(CHAIN, steps=100, run_dir=tmp_path / "whole", overrides=options, device="cpu")
    train(CHAIN, steps=50, run_dir=tmp_path / "parts", overrides=options, device="cpu")
    train(CHAIN, steps=100, run_dir=tmp_path / "parts", overrides=options, device="cpu", resume=True)
    whole, parts = (Run.open(tmp_path / name) for name in ("whole", "parts"))
    np.testing.assert_array_equal(whole.replay().stream(0).prev_action, parts.replay().stream(0).prev_action)
    ours, theirs = (run.agent().algorithm.policy.state_dict() for run in (whole, parts))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_no_file_holds_must_be_given_again(tmp_path):
    given = {"algorithm": PPO, "algo_kwargs": {"policy_kwargs": {"activation_fn": torch.nn.ReLU}}}
    agent = SB3Agent("MlpPolicy", CHAIN, config=SMALL, seed=0, device="cpu", **given)
    agent.save(tmp_path / "agent")
    with pytest.raises(ConfigError, match=r"SB3Agent\.load\(path, algorithm="):
        SB3Agent.load(tmp_path / "agent")
    loaded = SB3Agent.load(tmp_path / "agent", **given)
    obs = make_vec(CHAIN, 2, seed=0).reset()
    np.testing.assert_array_equal(loaded.predict(obs, deterministic=True)[0], agent.predict(obs, deterministic=True)[0])


def test_what_sb3_writes_into_policy_kwargs_is_not_in_the_config_or_in_the_users_mapping(tmp_path):
    """A2C adds optimizer_class to its policy_kwargs, a class that no config can hold."""
    given = {"policy_kwargs": {"net_arch": [4]}}
    config = {**SMALL, "agent.kind": "sb3", "agent.algo": "a2c"}
    SB3Agent("MlpPolicy", CHAIN, config=config, algo_kwargs=given, device="cpu")
    assert given == {"policy_kwargs": {"net_arch": [4]}}
    SB3Agent("MlpPolicy", CHAIN, config={**config, "agent.options": given}, device="cpu").save(tmp_path / "agent")
    loaded = SB3Agent.load(tmp_path / "agent")
    assert loaded.config.agent.options == given and loaded.algorithm.policy.net_arch == [4]


def test_dict_observations_alternate_too():
    env = gym.spaces.Dict({"a": gym.spaces.Box(-1, 1, (2,), np.float32), "b": gym.spaces.Discrete(3)})
    gym.register("DictInRounds-v0", lambda: FakeDict(env))
    policy = train_in_dream("ppo", "DictInRounds-v0", steps=60, total_timesteps=128, worlds=8, overrides=SMALL, episodes=1)
    assert policy.result.imagined_steps == 128


class FakeDict(gym.Env):
    """Random observations of a Dict space; episodes of ten steps."""

    action_space = gym.spaces.Discrete(2)

    def __init__(self, space: gym.spaces.Dict):
        self.observation_space = space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        self.left = 10
        return self.observation_space.sample(), {}

    def step(self, action):
        self.left -= 1
        return self.observation_space.sample(), 0.0, False, self.left == 0, {}


@pytest.mark.parametrize("name", ["ppo", "dqn", "sac"])
def test_as_an_agent_of_a_run_it_is_saved_without_pickle_and_resumed(name, tmp_path):
    recipe = CHAIN if name != "sac" else "Pendulum-v1"
    options = {**SMALL, **VISITS, "agent.kind": "sb3", "agent.algo": name, "eval.every": 0, "eval.episodes": 1}
    options |= {"log.tensorboard": False, "env.max_episode_steps": 30}
    result = train(recipe, steps=40, run_dir=tmp_path / "run", overrides=options, device="cpu")
    assert result.real_steps == 40 and result.parameters > 0
    run = Run.open(tmp_path / "run")
    agent = run.agent()
    optimizers = [x for x in agent.optimizers_by_name.values() if x.state_dict()["state"]]
    assert len(optimizers) >= 2 and agent.algorithm.num_timesteps == agent.imagined_steps > 0
    longer = train(recipe, steps=60, run_dir=tmp_path / "run", overrides=options, device="cpu", resume=True)
    resumed = Run.open(tmp_path / "run").agent()
    assert longer.real_steps == 60 and resumed.imagined_steps > agent.imagined_steps
    assert len(evaluate(resumed, run.config.env, 2)[0]) == 2
    assert all(file.suffix in (".safetensors", ".json") for file in (tmp_path / "run/checkpoints").rglob("*") if file.is_file())


# A policy from a file ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def right(tmp_path_factory) -> str:
    """SB3's file of a policy that always walks to the right."""
    model = PPO("MlpPolicy", make_vec(CHAIN, 1), n_steps=8, batch_size=8, device="cpu", seed=0)
    with torch.no_grad():
        model.policy.action_net.bias.copy_(torch.tensor([-40.0, 40.0]))
    path = tmp_path_factory.mktemp("right") / "ppo.zip"
    model.save(path)
    return str(path)


COLLECTS = {**SMALL, "agent.kind": "sb3", "agent.algo": "ppo", "eval.every": 0, "eval.episodes": 2, "log.tensorboard": False}


def test_a_policy_from_a_file_collects_from_the_first_step_acts_and_does_not_learn(right, tmp_path):
    options = {**COLLECTS, "agent.path": right}
    result = train(CHAIN, steps=50, run_dir=tmp_path / "run", overrides=options, device="cpu", trust=True)
    run = Run.open(tmp_path / "run")
    agent = run.agent(trust=True)
    taken = run.replay().stream(0)
    assert (taken.prev_action[0, ~taken.is_first[0]].argmax(-1) == 1).all() and result.updates > 0
    before, after = PPO.load(right, device="cpu").policy.state_dict(), agent.algorithm.policy.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before) and agent.imagined_steps == 0
    obs = make_vec(CHAIN, 2, seed=0).reset()
    np.testing.assert_array_equal(agent.predict(obs, deterministic=True)[0], [1, 1])
    longer = train(CHAIN, steps=60, run_dir=tmp_path / "run", overrides=options, device="cpu", trust=True, resume=True)
    assert longer.real_steps == 60 and longer.updates > result.updates


def test_a_policy_from_a_file_sees_what_is_there_and_not_what_the_model_makes_of_it(right):
    agent = SB3Agent("MlpPolicy", CHAIN, config={**SMALL, "agent.path": right}, seed=0, device="cpu", trust=True)
    observed, predict = [], agent.algorithm.predict
    agent.algorithm.predict = lambda obs, *args: (observed.append(np.array(obs)), predict(obs, *args))[1]
    obs = make_vec(CHAIN, 2, seed=0).reset()
    agent.predict(obs, deterministic=True)
    np.testing.assert_array_equal(observed[0], obs)


def test_without_trust_a_file_is_not_opened_and_nothing_is_left_behind(right, tmp_path):
    options = {**COLLECTS, "agent.path": right}
    with pytest.raises(TrustError, match=r"unpickles.*--trust"):
        train(CHAIN, steps=50, run_dir=tmp_path / "run", overrides=options, device="cpu")
    assert not (tmp_path / "run").exists()
    words = [f"{key}={value}" for key, value in options.items()]
    result = CliRunner().invoke(app, ["train", CHAIN, *words, "--run", str(tmp_path / "run"), "--steps", "50"])
    assert result.exit_code == 2 and "--trust" in result.stderr and not (tmp_path / "run").exists()
    trusted = ["train", CHAIN, *words, "--run", str(tmp_path / "run"), "--steps", "50", "--trust", "--device", "cpu"]
    assert CliRunner().invoke(app, trusted).exit_code == 0
    for command in (["eval", "--episodes", "1"], ["dream", "--horizon", "2"], ["info"]):
        words = [command[0], str(tmp_path / "run"), *command[1:]]
        assert CliRunner().invoke(app, words).exit_code == 2
        assert CliRunner().invoke(app, [*words, "--trust"]).exit_code == 0


def test_another_file_than_at_first_one_of_another_environment_and_one_that_is_none_are_refused(right, tmp_path):
    path = tmp_path / "policy.zip"
    path.write_bytes(Path(right).read_bytes())
    options = {**COLLECTS, "agent.path": str(path)}
    train(CHAIN, steps=50, run_dir=tmp_path / "run", overrides=options, device="cpu", trust=True)
    PPO("MlpPolicy", make_vec(CHAIN, 1), n_steps=8, batch_size=8, device="cpu", seed=1).save(path)
    with pytest.raises(ConfigError, match="another file than the one that this run began with"):
        Run.open(tmp_path / "run").agent(trust=True)
    PPO("MlpPolicy", make_vec("CartPole-v1", 1), n_steps=8, batch_size=8, device="cpu").save(path)
    with pytest.raises(ConfigError, match=r"was trained on .* but the environment has"):
        SB3Agent("MlpPolicy", CHAIN, config={**SMALL, "agent.path": str(path)}, device="cpu", trust=True)
    path.write_bytes(b"no zip")
    with pytest.raises(ConfigError, match=r"could not be opened as PPO.*check agent\.algo"):
        SB3Agent("MlpPolicy", CHAIN, config={**SMALL, "agent.path": str(path)}, device="cpu", trust=True)
    with pytest.raises(ConfigError, match=r"is no file.*suffix included"):
        SB3Agent("MlpPolicy", CHAIN, config={**SMALL, "agent.path": str(tmp_path / "absent")}, device="cpu", trust=True)


def test_a_policy_that_release_0_1_saved_opens_and_plays_as_it_did():
    folder = Path(__file__).parent / "runs_of_0_1" / "sb3"
    expected = json.loads((folder / "expected.json").read_text())["real_return"]
    policy = DreamPolicy.load(folder / "dream", trust=True)
    assert policy.result.real_return == expected
    assert np.mean(evaluate(policy, policy.env, 2, FINAL_SEED)[0]) == pytest.approx(expected)


# What does not fit ------------------------------------------------------------------------------------------------------


def test_sb3s_file_is_opened_with_trust_alone(chain, tmp_path):
    train_in_dream("a2c", chain, total_timesteps=256, episodes=0).save(tmp_path / "policy")
    with pytest.raises(TrustError, match=r"unpickles.*trust=True"):
        DreamPolicy.load(tmp_path / "policy")
    with pytest.raises(ConfigError, match=r"holds no world\.zip"):
        DreamPolicy.load(tmp_path, trust=True)


@pytest.mark.parametrize(
    ("algorithm", "options", "message"),
    [
        ("sac", {}, r"SAC does not fit.*continuous"),
        ("ppo", {"horizon": 0}, "horizon is 0"),
        ("ppo", {"rounds": 0}, "rounds is 0"),
        ("ppo", {"total_timesteps": True}, "total_timesteps is True"),
        ("ppo", {"rounds": 2}, "a run is a finished world"),
        ("ppo", {"uncertainty_penalty": 1.0}, r"uncertainty_penalty=1 needs uncertainty"),
        ("ppo", {"env": "CartPole-v1"}, r"The model observes .*CartPole-v1"),
        ("ppo", {"algo_kwargs": {"gama": 0.9}}, r"PPO refused its arguments.*gama"),
        ("trpo", {}, "algo"),
        ("ppo", {"max_uncertainty": 0.0}, "max_uncertainty is 0.0"),
        ("ppo", {"algo_kwargs": {"batch_size": -1}}, r"PPO refused its arguments.*batch_size"),
        ("ppo", {"episodes": -1}, "episodes is"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_way_out(algorithm, options, message, chain):
    with pytest.raises(ConfigError, match=message):
        train_in_dream(algorithm, chain, **{"total_timesteps": 128, "worlds": 8, **options})


def test_more_rounds_than_real_steps_are_refused():
    with pytest.raises(ConfigError, match="50 rounds need as many real steps behind the 20 random ones"):
        train_in_dream("ppo", CHAIN, steps=30, rounds=50, total_timesteps=100, overrides=SMALL)


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(ALGORITHMS, "tqc", ("sb3_contrib_that_is_absent", "TQC"))
    with pytest.raises(MissingExtraError, match=r"worldmodel\[contrib\]"):
        algorithm_class("tqc")


def test_a_package_that_is_there_and_broken_is_not_called_absent(monkeypatch, tmp_path):
    (tmp_path / "contrib_of_another_version.py").write_text("from stable_baselines3.common.utils import no_such_name")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(ALGORITHMS, "tqc", ("contrib_of_another_version", "TQC"))
    with pytest.raises(ConfigError, match=r"installed and cannot be imported: .*no_such_name"):
        algorithm_class("tqc")
