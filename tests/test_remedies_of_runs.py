"""The remedies that errors of runs, configs, agents, dreams and files name, done as they say: each helps."""

from __future__ import annotations

import re
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
from conftest import CHAIN, small_dreamer
from small_runs import small_train
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from worldmodel.agents import Dreamer, DynaCallback, JointWorldModel, latent_policy_kwargs, train_in_dream
from worldmodel.agents.guidance import Guidance
from worldmodel.commands.data import export_data
from worldmodel.commands.dream import dream
from worldmodel.config import Config
from worldmodel.envs import Chain, ImaginedVecEnv, make_vec
from worldmodel.errors import ConfigError, EnvError, StorageError
from worldmodel.storage.recording import Recording
from worldmodel.storage.run import Run


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> SimpleNamespace:
    """A finished run of the chain, a fresh folder, and what the remedies need beside it."""
    folder = tmp_path_factory.mktemp("made")
    small_train(folder / "run", 40, options={"eval.every": 0})
    return SimpleNamespace(run=folder / "run", folder=folder)


def agent(**config) -> Dreamer:
    return small_dreamer(**config)


def dqn(**options) -> DQN:
    return DQN("MlpPolicy", make_vec(CHAIN, 1, 0), buffer_size=100, learning_starts=1, policy_kwargs={"net_arch": [8]}, **options)


def normalised(norm_obs: bool) -> VecNormalize:
    return VecNormalize(DummyVecEnv([Chain]), norm_obs=norm_obs)


def short_dreams(made, **options) -> None:
    train_in_dream("a2c", made.run, total_timesteps=32, worlds=4, episodes=0, **options)


def joint(made, mode: str) -> None:
    kwargs = latent_policy_kwargs(made.run, mode=mode) if mode else {}
    model = A2C("MlpPolicy", make_vec(CHAIN, 1, 0), policy_kwargs={"net_arch": [8], **kwargs}, n_steps=4)
    model.learn(8, callback=JointWorldModel(made.run, ratio=0.0))


def recorded(made) -> Recording:
    run, loaded = Run.open(made.run), Dreamer.load(made.run)
    return Recording.from_replay(run.replay(), loaded.obs_spec, loaded.action_spec)


def written(made, name: str) -> None:
    (made.folder / name).unlink(missing_ok=True)
    recorded(made).write(made.folder / name)


def twice(made, name: str) -> None:
    written(made, name)
    recorded(made).write(made.folder / name)


PPO_SMALL = {"n_steps": 16, "batch_size": 16, "policy_kwargs": {"net_arch": [8]}}

# what is wrong: (what raises, the remedy in its words, the remedy done)
REMEDIES = {
    "a name that is nearly an option": (
        lambda made: agent(**{"train.ration": 0.1}),
        "Did you mean 'ratio'",
        lambda made: agent(**{"train.ratio": 0.1}),
    ),
    "a kind that there is none of": (
        lambda made: agent(**{"model.transition.kind": "categorial"}),
        "Did you mean 'categorical'",
        lambda made: agent(**{"model.transition.kind": "categorical"}),
    ),
    "one override as a word": (
        lambda made: Config.from_recipe("cartpole", "train.ratio=2"),
        "Write ['train.ratio=2']",
        lambda made: Config.from_recipe("cartpole", ["train.ratio=2"]),
    ),
    "an override without a value": (
        lambda made: Config.from_recipe("cartpole", ["train.ratio"]),
        "Write it as key=value",
        lambda made: Config.from_recipe("cartpole", ["train.ratio=2"]),
    ),
    "a recipe inside of config": (
        lambda made: Dreamer("MlpPolicy", CHAIN, config={"recipe": "cartpole"}),
        "Use recipe='cartpole' beside config",
        lambda made: Dreamer("MlpPolicy", "CartPole-v1", recipe="cartpole", config={}),
    ),
    "an argument of SB3's": (
        lambda made: Dreamer("MlpPolicy", CHAIN, learning_rate=1e-3),
        "config={'train.lr': ...}",
        lambda made: agent(**{"train.lr": 1e-3}),
    ),
    "too small a replay": (
        lambda made: agent(**{"train.capacity": 5}),
        "Raise train.capacity",
        lambda made: agent(**{"train.capacity": 50}),
    ),
    "sequences that are too long": (
        lambda made: agent(**{"train.capacity": 5}),
        "lower train.batch_length",
        lambda made: agent(**{"train.capacity": 5, "train.batch_length": 4}),
    ),
    "a replay that no memory holds": (
        lambda made: small_dreamer(gym.make("CartPole-v1"), **{"train.capacity": 10**15, "train.replay_gib": None}).learn(1),
        "set train.replay_gib",
        lambda made: small_dreamer(gym.make("CartPole-v1"), **{"train.capacity": 10**15, "train.replay_gib": 0.01}).learn(1),
    ),
    "a picture's policy": (
        lambda made: small_dreamer(policy="CnnPolicy"),
        "Use MlpPolicy",
        lambda made: small_dreamer(policy="MlpPolicy"),
    ),
    "gradients through choices": (
        lambda made: agent(**{"agent.gradient": "dynamics"}),
        "Use agent.gradient=reinforce",
        lambda made: agent(**{"agent.gradient": "reinforce"}),
    ),
    "observations normalised outside": (
        lambda made: small_dreamer(normalised(norm_obs=True)),
        "take it off",
        lambda made: small_dreamer(normalised(norm_obs=True).venv),
    ),
    "rewards normalised outside": (
        lambda made: small_dreamer(normalised(norm_obs=False)),
        "take it off",
        lambda made: small_dreamer(normalised(norm_obs=False).venv),
    ),
    "no environment": (
        lambda made: Dreamer.load(made.run).learn(2),
        "Call set_env(env) first",
        lambda made: _with_env(Dreamer.load(made.run)),
    ),
    "what reset returns": (
        lambda made: agent().predict(Chain().reset(seed=0)),
        "Give it the observation: reset()[0]",
        lambda made: agent().predict(Chain().reset(seed=0)[0]),
    ),
    "a policy's own file": (
        lambda made: agent().policy.save(made.folder / "policy.zip"),
        "Save its agent: model.save(path)",
        lambda made: agent().save(made.folder / "agent.zip"),
    ),
    "nothing to save yet": (
        lambda made: agent().save_replay_buffer(made.folder / "replay.pkl"),
        "Call learn() first",
        lambda made: agent().learn(2).save_replay_buffer(made.folder / "replay.pkl"),
    ),
    "uncertainty without an ensemble": (
        lambda made: agent(**{"agent.uncertainty_penalty": 1.0}),
        "model.ensemble.members=5",
        lambda made: agent(**{"agent.uncertainty_penalty": 1.0, "model.ensemble.members": 5}),
    ),
    "no law of all codes": (
        lambda made: agent(**{"agent.typicality_penalty": 1.0}),
        "Train with model.marginal",
        lambda made: agent(**{"agent.typicality_penalty": 1.0, "model.marginal.kind": "mixture"}),
    ),
    "a run that is there": (
        lambda made: small_train(made.run, 40),
        "Continue it with --resume (resume=True)",
        lambda made: small_train(made.run, 42, options={"eval.every": 0}, resume=True),
    ),
    "a run in a recipe's place": (
        lambda made: small_train(None, 42, made.run),
        "add --resume (resume=True)",
        lambda made: small_train(None, 44, made.run, options={"eval.every": 0}, resume=True),
    ),
    "no run to resume": (
        lambda made: small_train(made.folder / "absent", 20, resume=True),
        "Expected the folder of a run",
        lambda made: small_train(made.run, 46, options={"eval.every": 0}, resume=True),
    ),
    "a step without a checkpoint": (
        lambda made: Run.open(made.run).world_model(7),
        "Choose one of them",
        lambda made: Run.open(made.run).world_model(Run.open(made.run).checkpoints[-1]),
    ),
    "led dreams of real episodes": (
        lambda made: dream(made.run, horizon=2, guide=Guidance("reward")),
        "start='prior'",
        lambda made: dream(made.run, horizon=2, guide=Guidance("reward"), start="prior"),
    ),
    "a recording's suffix": (
        lambda made: recorded(made).write(made.folder / "a.hdf5"),
        "Give a name that ends in it",
        lambda made: written(made, "suffix.npz"),
    ),
    "a recording that is there": (
        lambda made: twice(made, "taken.npz"),
        "Choose another name",
        lambda made: written(made, "another.npz"),
    ),
    "dreams of what is no run": (
        lambda made: export_data(str(made.folder / "another.npz"), str(made.folder / "dreams.npz"), dreamed=1),
        "Name a run",
        lambda made: export_data(str(made.run), str(made.folder / "dreams.npz"), dreamed=1, horizon=2),
    ),
    "rounds in a finished world": (
        lambda made: short_dreams(made, rounds=2),
        "Leave them out",
        lambda made: short_dreams(made),
    ),
    "an algorithm of another kind of action": (
        lambda made: train_in_dream("sac", made.run, total_timesteps=32, worlds=4, episodes=0),
        "ppo, a2c or recurrent_ppo take any actions",
        lambda made: short_dreams(made),
    ),
    "Dyna without a buffer": (
        lambda made: PPO("MlpPolicy", make_vec(CHAIN, 1, 0), **PPO_SMALL).learn(16, callback=DynaCallback(made.run)),
        "train_in_dream",
        lambda made: short_dreams(made),
    ),
    "Dyna and one array for two observations": (
        lambda made: dqn(optimize_memory_usage=True, replay_buffer_kwargs={"handle_timeout_termination": False}).learn(
            8, callback=DynaCallback(made.run)
        ),
        "Leave it out",
        lambda made: dqn().learn(8, callback=DynaCallback(made.run)),
    ),
    "no encoder to train along": (
        lambda made: joint(made, ""),
        "latent_policy_kwargs(run, mode='joint')",
        lambda made: joint(made, "joint"),
    ),
}


def _with_env(loaded: Dreamer) -> None:
    loaded.set_env(make_vec(CHAIN, 1, 0))
    loaded.learn(2)


@pytest.mark.parametrize("raises, remedy, done", REMEDIES.values(), ids=list(REMEDIES))
def test_the_remedy_that_an_error_names_helps(raises, remedy, done, made):
    with pytest.raises((ConfigError, EnvError, StorageError), match=re.escape(remedy)):
        raises(made)
    done(made)


def test_imagined_worlds_of_a_model_alone_begin_where_the_error_says(made):
    world = Run.open(made.run).world_model()
    with pytest.raises(ConfigError, match=r"start='prior'") as error:
        ImaginedVecEnv(world, 2)
    assert "replay" in str(error.value)
    for options in ({"start": "prior"}, {"replay": Run.open(made.run).replay()}):
        assert np.isfinite(ImaginedVecEnv(world, 2, **options).reset()).all()
