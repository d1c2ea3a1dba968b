"""Recipes that see, and one that draws: what they train on is what is rendered, and each verb answers with pictures."""

from __future__ import annotations

import sys

import gymnasium as gym
import numpy as np
import pytest
import torch

from worldmodel.commands.dream import dream
from worldmodel.commands.train import train
from worldmodel.config import Config
from worldmodel.data import Sampling
from worldmodel.decoders.diffusion import LatentDiffusionDecoder
from worldmodel.envs import make_env
from worldmodel.envs.make import EnvConfig
from worldmodel.errors import ConfigError, MissingExtraError
from worldmodel.storage.run import Run

TINY = {
    "size": "nano",
    "train.prefill": 24,
    "train.random_action_repeat": 1.0,
    "train.pretrain": 2,
    "train.ratio": 0.125,
    "train.batch_size": 2,
    "train.batch_length": 6,
    "train.capacity": 200,
    "eval.every": 0,
    "eval.episodes": 1,
    "log.tensorboard": False,
    "log.held_out": 2,
    "model.encoder.depth": 2,
    "model.decoder.depth": 2,
}
PLANS = {
    "agent.kind": "planner",
    "agent.plan.samples": 6,
    "agent.plan.elites": 2,
    "agent.plan.proposals": 2,
    "agent.plan.horizon": 2,
}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Run:
    """Catch, planned in rollouts of pictures that the latent-diffusion decoder draws."""
    folder = tmp_path_factory.mktemp("runs") / "drawn"
    form = {"model": "latent_diffusion_decoder", "model.rollouts": "observation", "model.decoder.prior.units": 16}
    train("catch", steps=32, run_dir=folder, overrides={**TINY, **PLANS, **form}, device="cpu")
    return Run.open(folder)


def test_the_latent_diffusion_decoder_learns_catch_and_a_planner_sees_what_it_draws(drawn, monkeypatch):
    assert drawn.manifest()["step"] == 32 and drawn.config.model.decoder.kind == "latent_diffusion"
    seen, draw = [], LatentDiffusionDecoder.sample
    monkeypatch.setattr(LatentDiffusionDecoder, "sample", lambda *given: seen.append(len(given[1])) or draw(*given))
    action, _ = drawn.agent().predict(np.zeros((1, 64, 64, 3), np.uint8), deterministic=True)
    plan = drawn.config.agent.plan
    assert action.shape == (1,) and seen == [plan.samples] * plan.horizon * plan.iterations


def test_its_dream_is_pictures_whose_errors_are_numbers(drawn, tmp_path):
    found = dream(drawn.path, context=2, horizon=3, episodes=1, out=tmp_path / "dream.gif")
    assert np.isfinite(found["ratio"]).all() and (tmp_path / "dream.gif").stat().st_size > 0


def test_its_draws_differ_by_their_noise_and_are_inside_the_range(drawn):
    world = drawn.world_model().eval()
    feature = torch.randn(4, world.dynamics.feature_dim, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        one, same, other = (
            world.decoder.sample(feature, Sampling(generator=torch.Generator().manual_seed(seed)))["obs"] for seed in (1, 1, 2)
        )
    assert one.shape == (4, 3, 64, 64) and 0 <= one.min() and one.max() <= 1
    assert torch.equal(one, same) and not torch.equal(one, other)


@pytest.mark.parametrize("recipe", ["cartpole_pixels", "pendulum_pixels"])
def test_a_control_task_is_learned_from_its_rendered_picture(recipe, tmp_path):
    pytest.importorskip("pygame")
    config = Config.from_recipe(recipe)
    env, folder = make_env(config.env, seed=0), tmp_path / "run"
    first, _ = env.reset()
    rows = [env.step(env.action_space.sample())[0] for _ in range(6)]
    assert first.shape == (64, 64, 3) and first.dtype == np.uint8 and first.std() > 5, "something is seen"
    assert any((row != first).any() for row in rows), "and it moves"
    train(recipe, steps=28, run_dir=folder, overrides={**TINY, "env.max_episode_steps": 8, "log.held_out": 1}, device="cpu")
    run = Run.open(folder)
    found = dream(folder, context=2, horizon=2, episodes=1)
    assert run.manifest()["step"] == 28 and run.config.model.dynamics.posterior == "filtering" and np.isfinite(found["ratio"]).all()
    assert run.agent().predict(first[None])[0].shape == (1, *env.action_space.shape)


class Unseen(gym.Env):
    """One that renders nothing; its constructor may know of render modes."""

    observation_space, action_space = gym.spaces.Box(-1, 1, (2,), np.float32), gym.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        return np.zeros(2, np.float32), {}

    def step(self, action):
        return np.zeros(2, np.float32), 0.0, False, False, {}


class Promising(Unseen):
    def __init__(self, render_mode: str | None = None):
        self.render_mode = render_mode


gym.register("Unseen-v0", Unseen)
gym.register("Promising-v0", Promising)


@pytest.mark.parametrize("name", ["Unseen-v0", "Promising-v0"])
def test_pixels_of_an_environment_that_renders_nothing_are_refused_with_a_remedy(name):
    with pytest.raises(ConfigError, match=f"env.pixels observes what '{name}' renders .* Leave env.pixels out"):
        make_env(EnvConfig(id=name, pixels=32)).reset()
    with pytest.raises(ConfigError, match="do not fit 'Unseen-v0'"):
        make_env(EnvConfig(id="Unseen-v0", pixels=32, kwargs={"wheels": 3}))


def test_pixels_without_pygame_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pygame", None)
    with pytest.raises(MissingExtraError, match=r"worldmodel\[render\]"):
        make_env(EnvConfig(id="CartPole-v1", pixels=32)).reset()
