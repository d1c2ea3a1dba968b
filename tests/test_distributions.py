"""Gaussian and categorical latents: what only they promise."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import generator, small, small_latent

from worldmodel import registry
from worldmodel.data import Sampling
from worldmodel.distributions import CategoricalPosterior, GaussianPosterior


def test_a_categorical_draw_inverts_the_cumulative_distribution():
    posterior = CategoricalPosterior(torch.tensor([[0.25, 0.5, 0.25]]).expand(7, 1, 3))
    noise = torch.tensor([0.0, 0.249, 0.25, 0.5, 0.749, 0.75, 1 - 2**-24]).view(7, 1)
    assert posterior.sample(noise).argmax(-1).tolist() == [0, 0, 1, 1, 1, 2, 2]


def test_a_gaussian_draw_inverts_the_cumulative_distribution():
    latent = small_latent("gaussian", size=1)
    posterior = latent.distribution(torch.tensor([[0.3, -0.7]]).expand(9, 2))
    u = torch.linspace(0.1, 0.9, 9).view(9, 1)
    noise = torch.distributions.Normal(0.0, 1.0).icdf(u)
    torch.testing.assert_close(posterior.sample(noise), torch.distributions.Normal(posterior.mean, posterior.std).icdf(u))


def test_a_categorical_draw_is_one_hot_with_the_gradient_of_its_probabilities():
    latent = small_latent("categorical")
    raw = torch.randn(8, latent.parameters, generator=generator()).requires_grad_()
    pull = torch.randn(8, latent.size, generator=generator(1))
    z = latent.distribution(raw).sample(latent.noise((8,), generator(2), "cpu"))
    assert set(z.unique().tolist()) == {0.0, 1.0} and (z.unflatten(-1, (2, 3)).sum(-1) == 1).all()
    (through,) = torch.autograd.grad((z * pull).sum(), raw)
    (straight,) = torch.autograd.grad((latent.distribution(raw).mean * pull).sum(), raw)
    torch.testing.assert_close(through, straight)
    assert through.abs().sum() > 0


def test_a_gaussian_draw_has_the_gradient_of_its_mean_and_deviation():
    mean, std = torch.zeros(4, 2, requires_grad=True), torch.full((4, 2), 1.5, requires_grad=True)
    noise = torch.randn(4, 2, generator=generator())
    by_mean, by_std = torch.autograd.grad(GaussianPosterior(mean, std).sample(noise).sum(), (mean, std))
    torch.testing.assert_close(by_mean, torch.ones(4, 2))
    torch.testing.assert_close(by_std, noise)


def test_no_class_is_ever_impossible_so_rates_are_bounded():
    latent = small_latent("categorical", unimix=0.03)
    sure, opposite = (latent.distribution(sign * torch.tensor([[500.0, -500.0, 0.0] * 2])) for sign in (1, -1))
    assert float(sure.probs.min()) == pytest.approx(0.03 / 3)
    torch.testing.assert_close(sure.probs.sum(-1), torch.ones(1, 2))
    assert float(sure.kl(opposite)) <= 2 * math.log(3 / 0.03)


def test_no_gaussian_posterior_is_narrower_than_its_floor_and_an_untrained_one_is_standard():
    latent = small_latent("gaussian", min_std=0.2)
    assert float(latent.distribution(torch.full((1, 4), -100.0)).std.min()) == pytest.approx(0.2)
    assert float(latent.distribution(torch.zeros(1, 4)).std.max()) == pytest.approx(1.2)


@pytest.mark.parametrize("context", [None, torch.ones(5, 3)], ids=["alone", "given h"])
def test_a_standard_gaussian_has_nothing_to_learn_whatever_the_context(context):
    rows, width = (1, 0) if context is None else context.shape
    prior = registry.build("distribution", small("distribution", "gaussian", standard=True), small_latent("gaussian"), width)
    assert not list(prior.parameters()) and not prior.state_dict()
    torch.testing.assert_close(prior.log_prob(torch.zeros(rows, 2), context), torch.full((rows,), -math.log(2 * math.pi)))
    assert prior.sample(context, 4, Sampling(generator=generator())).shape == (4, rows, 2)


def test_a_fitted_gaussian_learns_its_mean_by_squares_and_its_deviation_from_what_is_left():
    torch.manual_seed(0)
    prior = registry.build("distribution", small("distribution", "gaussian", std="fitted", layers=0), small_latent("gaussian"), 1)
    g = generator()
    context = torch.randn(2000, 1, generator=g)
    latents = torch.cat([2 * context, -context], 1) + torch.tensor([0.5, 0.1]) * torch.randn(2000, 2, generator=g)
    prior.train().fit(latents, context, steps=300, lr=0.03, generator=g)
    posterior = prior.eval().given(context)
    assert (posterior.mean - torch.cat([2 * context, -context], 1)).abs().mean() < 0.05
    assert torch.allclose(posterior.std[0], torch.tensor([0.5, 0.1]), rtol=0.1)
    before = prior.variance.clone()
    prior.loss(latents + 9, context)
    assert torch.equal(prior.variance, before)  # outside training nothing is learned


def test_a_deviation_is_fitted_by_every_way_in_which_the_prior_learns():
    def fresh():
        config = small("distribution", "gaussian", std="fitted")
        return registry.build("distribution", config, small_latent("gaussian"), 0).train()

    x = 3 * torch.randn(500, 2, generator=generator())
    posterior = GaussianPosterior(x, torch.full_like(x, 0.1))
    still, ways = fresh(), {name: fresh() for name in ("rate", "rates", "loss", "fit")}
    ways["rate"].rate(posterior, x, None)
    ways["rates"].rates(posterior, x, None)
    ways["loss"].loss(x, None)
    ways["fit"].eval().fit(x, steps=1, generator=generator())
    assert {name for name, prior in ways.items() if (prior.variance > 1.2).all()} == set(ways)
    assert (ways["fit"].variance - 9).abs().max() < 2
    still.rate(posterior, x, None, frozen=True)
    still.requires_grad_(False).rate(posterior, x, None)
    assert torch.equal(still.variance, torch.ones(2))


def test_a_fit_draws_its_batches_where_the_latents_are(monkeypatch):
    prior = registry.build("distribution", small("distribution", "gaussian"), small_latent("gaussian"), 0)
    places, randint = [], torch.randint

    def drawn(*args, **options):
        places.append(options.get("device"))
        return randint(*args, **options)

    monkeypatch.setattr(torch, "randint", drawn)
    latents = torch.randn(9, prior.latent.size, generator=generator())
    prior.fit(latents, steps=2, generator=generator())
    assert places == [latents.device] * 2
