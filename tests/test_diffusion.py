"""The prior of latents that is known by how it denoises: its draws, its bound, its exact likelihood and its steering."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from conftest import generator, small_latent
from test_contracts import two_moons
from torch import Tensor

from worldmodel.data import Sampling
from worldmodel.distributions import Diffusion, DiffusionConfig


def prior(size: int = 2, context: int = 0, **options) -> Diffusion:
    torch.manual_seed(0)
    options = {"units": 32, "layers": 2, **options}
    return Diffusion(DiffusionConfig(**options), small_latent("gaussian", size=size), context).eval()


MEAN, STD = torch.tensor([1.0, -3.0]), torch.tensor([0.5, 2.0])


def gaussian(n: int, seed: int = 0) -> Tensor:
    return MEAN + STD * torch.randn(n, 2, generator=generator(seed))


def gaussian_log_prob(x: Tensor) -> Tensor:
    return torch.distributions.Normal(MEAN, STD).log_prob(x).sum(-1)


@pytest.fixture(scope="module")
def fitted() -> Diffusion:
    """A prior that was fitted to a Gaussian."""
    one = prior()
    one.fit(gaussian(2000), steps=300, lr=5e-3, generator=generator())
    return one


def test_the_bound_lies_below_the_truth_and_the_likelihood_of_the_ode_near_it(fitted):
    x = gaussian(500, seed=9)
    truth, bound = gaussian_log_prob(x).mean(), fitted.log_prob(x, None).mean().detach()
    ode = fitted.ode_log_prob(x, None).mean()
    assert bound < truth
    assert abs(float(ode - truth)) < 0.1
    assert float(truth - bound) < 0.2


def test_the_bound_is_the_same_each_time(fitted):
    x = gaussian(7)
    one = fitted.log_prob(x, None)
    assert torch.equal(one, fitted.log_prob(x, None))
    torch.testing.assert_close(one[2:3], fitted.log_prob(x[2:3], None), atol=1e-4, rtol=0)


def test_the_rate_is_on_average_what_the_bound_says(fitted):
    one = fitted
    posterior = one.latent.distribution(torch.randn(64, 4, generator=generator()))
    z = posterior.sample(torch.randn(64, 2, generator=generator(1)))
    expected = (posterior.log_prob(z) - one.log_prob(z, None)).mean()
    sampled = torch.stack([one.rate(posterior, z, None, sampling=Sampling(generator=generator(s))).mean() for s in range(60)])
    assert float(sampled.mean().detach()) == pytest.approx(float(expected.detach()), abs=0.3)


def test_a_frozen_rate_moves_latents_towards_the_prior(fitted):
    """Its gradient is that of the negative log-likelihood, on average."""
    one, z = fitted, (MEAN + torch.tensor([0.6, 3.0])).expand(400, 2).clone().requires_grad_()
    posterior = one.latent.distribution(torch.zeros(400, 4))
    rate = one.rate(posterior, z, None, frozen=True, sampling=Sampling(generator=generator())) - posterior.log_prob(z)
    slope = torch.autograd.grad(rate.sum(), z)[0].mean(0)
    torch.testing.assert_close(slope, torch.tensor([0.6, 3.0]) / STD**2, rtol=0.25, atol=0.1)


def test_few_steps_draw_what_was_fitted(fitted):
    x = fitted.sample(None, 4000, Sampling(generator=generator(), steps=5))[:, 0].detach()
    torch.testing.assert_close(x.mean(0), MEAN, atol=0.25, rtol=0)
    torch.testing.assert_close(x.std(0), STD, rtol=0.2, atol=0)
    many = fitted.sample(None, 4000, Sampling(generator=generator(), steps=40))[:, 0].detach()
    assert ((many.std(0) / STD).log().abs() < (x.std(0) / STD).log().abs() + 0.02).all()


def test_two_moons_are_likelier_than_under_a_gaussian_by_the_exact_likelihood():
    one, train, test = prior(units=64), two_moons(2000, 0), two_moons(400, 10)
    one.fit(train, steps=500, lr=5e-3, generator=generator())
    best = torch.distributions.Normal(train.mean(0), train.std(0)).log_prob(test).sum(-1).mean()
    exact, bound = one.ode_log_prob(test, None).mean(), one.log_prob(test, None).mean()
    assert float(exact - best) > 0.3
    assert float((bound - best).detach()) > 0.2


def test_the_exact_likelihood_integrates_to_one():
    one = prior()
    one.fit(two_moons(500, 0), steps=100, lr=5e-3, generator=generator())
    side = torch.linspace(-3, 3, 41)
    mass = one.ode_log_prob(torch.cartesian_prod(side, side), None).exp().sum() * float(side[1] - side[0]) ** 2
    assert float(mass) == pytest.approx(1, abs=0.03)


# Statistics and noise ---------------------------------------------------------------------------------------------------


def test_latents_are_standardised_by_statistics_that_stand_still_while_evaluating():
    one, latents = prior(), gaussian(4000)
    before = copy.deepcopy(one.state_dict())
    one.loss(latents, None)
    assert all(torch.equal(x, before[name]) for name, x in one.state_dict().items())
    one.train()
    for part in latents.split(40):
        one.loss(part, None)
    torch.testing.assert_close(one.moments.mean.float(), MEAN, atol=0.3, rtol=0)
    torch.testing.assert_close(one.moments.variance.float().sqrt(), STD, rtol=0.1, atol=0)
    assert float(((latents - one.moments.mean.float()) / one._units(None)[1]).std()) == pytest.approx(0.5, rel=0.1)
    seen = one.measures(latents, None), one.measures(3 * latents, None)
    assert seen[0]["narrowest"] == pytest.approx(1, rel=0.1) and seen[1]["widest"] == pytest.approx(3, rel=0.1)


def test_a_number_that_is_not_finite_does_not_stay_in_the_statistics():
    one = prior().train()
    one.loss(torch.full((4, 2), torch.nan), None)
    assert one.moments.mean.isfinite().all() and one.moments.variance.isfinite().all()


def test_the_same_noise_gives_the_same_latent_and_no_noise_the_mode(fitted):
    noise = torch.randn(3, 1, 2, generator=generator())
    one, same = (fitted.sample(None, 3, Sampling(generator=generator(seed), noise=noise)) for seed in (0, 1))
    assert torch.equal(one, same)
    mode = fitted.sample(None, 1, Sampling(mode=True))
    assert torch.equal(mode, fitted.sample(None, 1, Sampling(noise=0 * noise[:1])))


def test_an_untrained_prior_is_a_gaussian_of_the_latents_mean_and_deviation():
    one = prior().train()
    one.update_moments(gaussian(1000))
    x = gaussian(50, seed=4)
    right = torch.distributions.Normal(one.moments.mean.float(), one.moments.deviation(0.0)).log_prob(x).sum(-1)
    torch.testing.assert_close(one.log_prob(x, None), right, atol=5e-3, rtol=0)


def test_too_large_a_latent_has_no_exact_likelihood():
    with pytest.raises(ValueError, match="64"):
        prior(size=65).ode_log_prob(torch.zeros(1, 65), None)


def test_the_loss_weighs_all_levels_alike_and_is_of_the_size_of_the_latent():
    one = prior(size=8).train()
    loss = one.loss(torch.randn(3000, 8, generator=generator()), None, sampling=Sampling(generator=generator(1)))["denoise"]
    assert loss.unit == "score" and loss.value.shape == (3000,)
    assert float(loss.value.mean().detach()) == pytest.approx(8, rel=0.05)
    assert math.isfinite(float(loss.value.detach().max()))
