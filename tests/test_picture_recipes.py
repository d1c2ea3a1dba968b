"""Recipes that see, and one that draws: what they train on is what is rendered, and each verb answers with pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from worldmodel.commands.dream import dream
from worldmodel.commands.train import train
from worldmodel.data import Sampling
from worldmodel.decoders.diffusion import LatentDiffusionDecoder
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
