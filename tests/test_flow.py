"""Spline flows: what only they promise."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from conftest import generator, small, small_latent

from worldmodel import registry
from worldmodel.data import Sampling
from worldmodel.distributions import Flow

every_shape = pytest.mark.parametrize(("context", "size"), [(0, 1), (0, 2), (0, 5), (3, 1), (3, 2), (3, 5)])


def prior(context: int = 0, size: int = 2, seed: int = 0, bend: float = 0.0, **options) -> Flow:
    """A flow whose splines do nothing yet, or with `bend` something at random."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        form = registry.build(
            "distribution", small("distribution", "flow", **options), small_latent("gaussian", size=size), context
        )
        for p in form.splines.parameters():
            p.data += bend * torch.randn(p.shape)
    return form


def given(context: int, rows: int = 4) -> torch.Tensor | None:
    return torch.randn(rows, context, generator=generator(9)) if context else None


@every_shape
def test_a_flow_starts_as_the_gaussian_in_front(context, size):
    form, x = prior(context, size), torch.randn(4, size, generator=generator())
    frame = form.whitening(given(context))
    torch.testing.assert_close(form.log_prob(x, given(context)), frame.log_prob(x))
    drawn = form.sample(given(context), 3, Sampling(mode=True))
    torch.testing.assert_close(drawn, frame.mean.expand(3, -1, -1), rtol=0, atol=1e-5)


@every_shape
def test_scoring_undoes_sampling_and_its_determinant_is_that_of_the_jacobian(context, size):
    form, g = prior(context, size, bend=0.4), given(context, 1)
    x = form.sample(g, 1, Sampling(generator=generator()))[0].detach()
    noise = form.latent.noise((1, 1), generator(), "cpu")[0]

    def to_noise(one):
        frame = form.whitening(g)
        return form.splines(g)((one.unsqueeze(0) - frame.mean) / frame.std)[0]

    torch.testing.assert_close(to_noise(x[0]), noise[0], rtol=0, atol=1e-3)
    jacobian = torch.autograd.functional.jacobian(to_noise, x[0])
    normal = -0.5 * (to_noise(x[0]).square().sum() + size * math.log(2 * math.pi))
    torch.testing.assert_close(form.log_prob(x, g)[0], normal + jacobian.det().abs().log(), rtol=0, atol=1e-3)


def test_a_density_of_one_number_integrates_to_one():
    form, x = prior(3, 1, bend=0.4), torch.linspace(-15, 15, 20_001)
    for row in given(3):
        nats = form.log_prob(x.unsqueeze(-1), row.expand(len(x), 3))
        assert float(torch.trapezoid(nats.exp(), x).detach()) == pytest.approx(1, abs=1e-3)


def test_other_seeds_give_other_flows_and_the_same_seed_the_same():
    weights = [torch.cat([p.flatten() for p in prior(3, seed=seed).splines.parameters()]) for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@every_shape
def test_the_callers_noise_is_the_draw(context, size):
    form, g = prior(context, size, bend=0.4), given(context)
    noise = torch.randn(3, 4 if context else 1, size, generator=generator())
    drawn = form.sample(g, 3, Sampling(noise=noise, generator=generator(99)))
    assert torch.equal(drawn, form.sample(g, 3, Sampling(generator=generator())))


# Whitening -------------------------------------------------------------------------------------------------------------


def latents(n: int = 400, shift: float = 30.0) -> torch.Tensor:
    return torch.randn(n, 2, generator=generator()) * torch.tensor([5.0, 0.1]) + shift


def posterior(n: int = 400):
    return small_latent("gaussian").distribution(torch.zeros(n, 4))


def test_whitening_follows_the_latents_of_training_and_stands_still_in_eval():
    form = prior()
    form.eval().loss(latents(), None)
    form.rate(posterior(), latents(), None)
    assert int(form.moments.count) == 0
    form.train().loss(latents(), None)
    torch.testing.assert_close(form.moments.mean.float(), latents().mean(0))
    torch.testing.assert_close(form.moments.variance.float(), latents().var(0, correction=0))
    form.rates(posterior(), latents(shift=0.0), None)
    assert int(form.moments.count) == 2
    torch.testing.assert_close(form.moments.mean.float(), (latents().mean(0) + latents(shift=0.0).mean(0)) / 2)
    torch.testing.assert_close(form.moments.variance.float(), torch.cat([latents(), latents(shift=0.0)]).var(0), rtol=0.02, atol=0)
    form.rate(posterior(), latents(), None, frozen=True)
    form.requires_grad_(False).loss(latents(), None)
    assert int(form.moments.count) == 2


def test_the_two_rates_are_equal_though_the_whitening_moves_on():
    form = prior(bend=0.3).train()
    dyn, rep = form.rates(posterior(), latents(), None)
    torch.testing.assert_close(dyn, rep)
    assert int(form.moments.count) == 1


def test_fitting_whitens_by_all_latents_and_leaves_the_flow_in_training():
    form = prior().train()
    form.fit(latents(), steps=2, generator=generator())
    torch.testing.assert_close(form.moments.mean.float(), latents().mean(0))
    assert form.training and form.outside(latents(), None) == 0


def test_latents_that_are_not_finite_leave_the_whitening_as_it_is():
    form = prior().train()
    form.loss(torch.tensor([[1.0, torch.nan], [1.0, 2.0]]), None)
    assert form.moments.mean.tolist() == [0, 0] and form.moments.variance.tolist() == [1, 1] and int(form.moments.count) == 0


def test_training_after_a_fit_hardly_moves_the_whitening_that_was_fitted():
    form = prior().train()
    form.fit(latents(), steps=1, generator=generator())
    form.loss(latents(shift=130.0), None)
    torch.testing.assert_close(form.moments.mean.float(), latents(shift=31.0).mean(0), atol=0.1, rtol=0)


@pytest.mark.filterwarnings("error")
def test_latents_beyond_the_splines_are_reported_with_what_to_do():
    form = prior()
    far = torch.tensor([[0.0, 9.0], [1.0, -7.0], [0.0, 0.0], [2.0, 1.0]])
    assert form.outside(far, None) == 0.25 and form.outside(far + 40, None) == 1
    with pytest.raises(RuntimeWarning, match=r"25% .* beyond 5.*`fit`"):
        form.measures(far, None)
    assert form.measures(far[2:], None) == {"outside": 0.0}


def test_a_narrow_transition_is_within_the_splines_reach_and_may_have_two_modes():
    form, n = prior(3).train(), 1000
    context = torch.randn(n, 3, generator=generator())
    side = (torch.rand(n, 1, generator=generator(1)) < 0.5).float() * 2 - 1
    x = 10 * context[:, :2] + 0.3 * side + 0.03 * torch.randn(n, 2, generator=generator(2))
    gaussian = registry.build("distribution", small("distribution", "gaussian"), small_latent("gaussian"), 3)
    for one in (form, gaussian):
        one.fit(x, context, steps=150, batch=128, lr=4e-2, generator=generator())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert form.measures(x, context)["outside"] < 0.01
    gain = form.log_prob(x, context).mean() - gaussian.log_prob(x, context).mean()
    assert float(gain.detach()) > 0.5
