"""What SB3 scripts do out of habit, done with Dreamer."""

import io

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env

from worldmodel.agents import Dreamer
from worldmodel.agents.evaluation import own_randomness
from worldmodel.agents.sb3 import globals_from
from worldmodel.errors import ConfigError, CorruptError, EnvError
from worldmodel.model import WorldModel
from worldmodel.weights import cpu_randomness

NANO = {"size": "nano", "train.prefill": 40, "train.pretrain": 1, "train.ratio": 0.02, "train.batch_length": 8}


class Groups(gym.Env):
    """Observes two categories of 3 and 4 values."""

    observation_space, action_space = spaces.MultiDiscrete([3, 4]), spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.array([2, 3]), {}

    def step(self, action):
        return np.array([0, 1]), 0.0, False, False, {}


def dreamer(env="CartPole-v1", **options):
    return Dreamer("MlpPolicy", env, device="cpu", seed=0, config=NANO, **options)


def test_a_model_saved_into_a_stream_is_loaded_from_it():
    model, stream = dreamer(), io.BytesIO()
    model.save(stream)
    again, obs = Dreamer.load(stream), np.array([0.1, -0.2, 0.03, 0.4], np.float32)
    assert again.predict(obs, deterministic=True)[0] == model.predict(obs, deterministic=True)[0]
    for name, x in model.world.state_dict().items():
        assert torch.equal(x, again.world.state_dict()[name])


def test_a_model_saved_into_an_open_file_is_loaded_by_path_and_by_file(tmp_path):
    model = dreamer()
    with (tmp_path / "a.zip").open("wb") as file:
        model.save(file)
    with (tmp_path / "a.zip").open("rb") as file:
        by_file = Dreamer.load(file)
    assert by_file.seed == Dreamer.load(tmp_path / "a").seed == 0


def test_a_stream_that_holds_something_else_is_refused_as_damaged():
    with pytest.raises(CorruptError, match="the stream is no intact zip"):
        Dreamer.load(io.BytesIO(b"not a zip"))


def test_set_parameters_reads_a_stream():
    model, other, stream = dreamer(), Dreamer("MlpPolicy", "CartPole-v1", device="cpu", seed=1, config=NANO), io.BytesIO()
    model.save(stream)
    other.set_parameters(stream)
    assert all(torch.equal(x, y) for x, y in zip(model.world.parameters(), other.world.parameters(), strict=True))


@pytest.mark.parametrize("ill", [np.nan, np.inf])
def test_predict_refuses_an_observation_that_is_not_finite_and_leaves_the_belief_alone(ill):
    model = dreamer()
    _, belief = model.predict(np.zeros(4, np.float32))
    before = [x.copy() for x in belief]
    with pytest.raises(EnvError, match="finite"):
        model.predict(np.array([0, ill, 0, 0], np.float32), belief)
    assert all(np.array_equal(x, y) for x, y in zip(belief, before, strict=True))


def test_predict_refuses_a_category_that_the_space_does_not_have():
    with pytest.raises(EnvError, match="predict"):
        dreamer(Groups()).predict(np.array([3, 0]))


def test_predict_of_what_reset_returns_says_which_part_of_it_is_wanted():
    with pytest.raises(EnvError, match=r"reset\(\)\[0\]"):
        dreamer().predict(gym.make("CartPole-v1").reset())


SOME = [0.5, -0.25, 0.125, 0.0]


@pytest.mark.parametrize("given", [SOME, tuple(SOME), np.array(SOME), [1, 0, -1, 0]], ids=["list", "tuple", "float64", "whole"])
def test_predict_takes_numbers_in_whatever_form_they_come(given):
    model = dreamer()
    assert model.predict(given, deterministic=True)[0] == model.predict(np.array(given, np.float32), deterministic=True)[0]


def test_predict_refuses_numbers_that_the_space_cannot_represent():
    with pytest.raises(EnvError, match="int64"):
        dreamer(Groups()).predict(np.array([0.5, 1.0]))


@pytest.mark.parametrize("made", [lambda: "CartPole-v1", lambda: gym.make("CartPole-v1"), lambda: make_vec_env("CartPole-v1", 2)])
def test_an_environment_finds_its_recipe_however_it_was_made(made, capsys):
    model = dreamer(made(), verbose=1)
    assert model.config.recipe == "cartpole"
    assert "Recipe: cartpole" in capsys.readouterr().out


def test_a_recipe_inside_config_is_refused_with_the_argument_that_takes_it():
    with pytest.raises(ConfigError, match="recipe='cartpole'"):
        Dreamer("MlpPolicy", "CartPole-v1", config={"recipe": "cartpole"})


@pytest.mark.parametrize("inside", ["cpu_randomness", "globals_from", "own_randomness", "from_spaces", "Dreamer"])
def test_seeding_leaves_the_process_s_cuda_generators_alone(inside, monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    monkeypatch.setattr(torch.cuda, "manual_seed", seeded.append)
    before = torch.get_rng_state()
    if inside == "cpu_randomness":
        with cpu_randomness(3):
            first = torch.rand(2)
        assert torch.equal(first, torch.rand(2, generator=torch.Generator().manual_seed(3)))
    elif inside == "globals_from":
        with globals_from(torch.Generator().manual_seed(0)):
            torch.rand(2)
    elif inside == "own_randomness":
        with own_randomness(None, 3):
            torch.rand(2)
    elif inside == "from_spaces":
        WorldModel.from_spaces(spaces.Box(-1, 1, (2,)), spaces.Discrete(2), seed=3)
    else:
        dreamer()._setup_model()
    if inside != "Dreamer":
        assert torch.equal(torch.get_rng_state(), before)
    assert not seeded
