"""Recipes that see what an environment renders, and nothing else."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import generator
from small_runs import merged

from worldmodel import train
from worldmodel.config import Config
from worldmodel.data import Sampling
from worldmodel.envs.make import EnvConfig, make_env
from worldmodel.errors import ConfigError
from worldmodel.storage.run import Run

RECIPES = {"cartpole_pixels": "cartpole", "pendulum_pixels": "pendulum"}
SHORT = {"train.prefill": 24, "eval.every": 0, "eval.episodes": 1, "env.max_episode_steps": 8}
SHORT |= {"model.encoder.depth": 2, "model.decoder.depth": 2, "model.dynamics.latent": {"kind": "gaussian", "size": 3}}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_from_pixels_sees_the_rendered_picture_and_nothing_else(recipe):
    seen, known = Config.from_recipe(recipe), Config.from_recipe(RECIPES[recipe])
    assert seen.env.id == known.env.id and seen.eval.threshold == known.eval.threshold
    env, plain = make_env(seen.env, seed=3), gym.make(seen.env.id, render_mode="rgb_array")
    assert env.observation_space.shape == (64, 64, 3) and env.observation_space.dtype == np.uint8
    obs, _ = env.reset(seed=3)
    plain.reset(seed=3)
    whole = plain.render()
    assert obs.shape == (64, 64, 3) and obs.mean() == pytest.approx(whole.mean(), abs=1.0)
    moved = [env.step(env.action_space.sample())[0] for _ in range(8)]
    assert any(not np.array_equal(obs, frame) for frame in moved), "what moves is large enough to be seen"


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_short_run_from_pixels_learns_plays_and_dreams_pictures(recipe, tmp_path):
    options = {k: v for k, v in merged(SHORT).items() if not k.startswith("model.dynamics.latent.")}
    result = train(recipe, steps=36, seed=0, run_dir=tmp_path / "run", overrides=options, device="cpu")
    agent = Run.open(tmp_path / "run").agent(device="cpu")
    assert result.updates == agent.learner.updates > 1 and agent.learner.skipped == 0
    world = agent.policy.world.eval()
    (key,) = world.decoder.spec.keys
    feature = torch.randn(4, world.decoder.in_features, generator=generator())
    drawn = world.decoder.sample(feature, Sampling(generator=generator()))[key]
    assert drawn.shape == (4, 3, 64, 64) and 0 <= float(drawn.min().detach()) and float(drawn.max().detach()) <= 1


def test_an_environment_that_renders_no_pictures_is_refused_with_what_to_do():
    with pytest.raises(ConfigError, match=r"render_mode 'rgb_array'.*Pass render_mode"):
        make_env(EnvConfig(id="CartPole-v1", pixels=64, kwargs={"render_mode": None}))
