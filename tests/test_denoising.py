"""EDM diffusion against data whose exact denoiser is known: Gaussians and mixtures of them."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from conftest import generator
from torch import Tensor

from worldmodel.nn.diffusion import (
    EDM,
    SAMPLERS,
    SIGMA_DATA,
    euler,
    fixed_samples,
    gaussian_log_prob,
    heun,
    information_gain,
    multistep,
    ode_log_prob,
    per_row,
    sigma_of_information,
)

PAPER = EDM()
MEAN, STD = torch.tensor([0.6, -0.4]), torch.tensor([0.3, 0.1])


def exact(x: Tensor, sigma: Tensor) -> Tensor:
    """The denoiser of N(MEAN, STD^2)."""
    return MEAN + STD**2 / (STD**2 + per_row(sigma, x) ** 2) * (x - MEAN)


def w2(x: Tensor, mean: Tensor = MEAN, std: Tensor = STD) -> float:
    """Wasserstein distance of Gaussians with the samples' moments to the target."""
    return float(((x.mean(0) - mean).square() + (x.std(0) - std).square()).sum().sqrt())


def drawn(sampler, steps: int, edm: EDM = PAPER) -> Tensor:
    sigmas, noise = edm.grid(steps), torch.randn(4000, 2, generator=generator())
    return sampler(exact, edm.start(noise, sigmas[0]), sigmas)


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_more_steps_come_nearer_to_the_target(sampler):
    errors = [w2(drawn(sampler, steps)) for steps in (4, 12, 36)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.04


def test_heun_beats_euler_with_equally_many_evaluations():
    for steps in (18, 36):  # EDM's own is 18: 35 evaluations
        assert w2(drawn(heun, steps)) < w2(drawn(euler, 2 * steps - 1))


def test_multistep_beats_euler_with_five_evaluations():
    edm = EDM(sigma_min=0.02, sigma_max=5.0)
    assert w2(drawn(multistep, 5, edm)) < 0.7 * w2(drawn(euler, 5, edm))


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_samplers_evaluate_as_often_as_they_say(sampler):
    calls = []

    def counted(x, level):
        calls.append(float(level[0]))
        return torch.zeros_like(x)

    sampler(counted, torch.ones(3, 2), PAPER.grid(4))
    assert len(calls) == (7 if sampler is heun else 4) and 0.0 not in calls


def test_the_grid_is_that_of_the_paper():
    """Levels 0, 1 and 17 of 18, and the 0 behind them. Source: Karras et al. 2022, eq. 5."""
    levels = PAPER.grid(18)
    assert levels.shape == (19,) and levels[-1] == 0
    torch.testing.assert_close(levels[[0, 17]], torch.tensor([80.0, 0.002]))
    one = (80 ** (1 / 7) + (0.002 ** (1 / 7) - 80 ** (1 / 7)) / 17) ** 7
    assert float(levels[1]) == pytest.approx(one)


def test_preconditioning_keeps_inputs_and_targets_of_the_network_at_variance_one():
    """Whatever the level, for data of deviation DATA. Source: Karras et al. 2022, appendix B.6."""
    n = 200_000
    x, noise = (torch.randn(n, 1, generator=generator(seed)) for seed in (0, 1))
    for level in (0.01, 0.5, 0.97):
        levels = torch.full((n,), level)
        mixed = SIGMA_DATA * x + level * noise
        skip = PAPER.denoised(lambda scaled, c: torch.zeros_like(scaled), mixed, levels)
        scaled = PAPER.denoised(lambda scaled, c: scaled, mixed, levels) - skip
        one = PAPER.denoised(lambda scaled, c: torch.ones_like(scaled), mixed, levels) - skip
        assert float((scaled / one).var()) == pytest.approx(1, rel=0.02)
        assert float(((SIGMA_DATA * x - skip) / one).var()) == pytest.approx(1, rel=0.02)


def test_edm_weighs_all_levels_alike():
    level = torch.tensor([0.01, 0.5, 20.0])
    x, noise = (torch.randn(100_000, 1, generator=generator(seed)) for seed in (0, 1))
    losses = [PAPER.loss(lambda s, c: torch.zeros_like(s), SIGMA_DATA * x, noise, s.expand(100_000)).mean() for s in level]
    torch.testing.assert_close(torch.stack(losses), torch.ones(3), rtol=0.02, atol=0)


def test_levels_of_training_are_log_normal():
    uniform = torch.linspace(0.001, 0.999, 999)
    logs = EDM(log_sigma_mean=-0.4, log_sigma_std=1.3).training_levels(uniform).log()
    assert float(logs.median()) == pytest.approx(-0.4, abs=1e-5)
    assert float((logs < -0.4 - 1.3).float().mean()) == pytest.approx(0.1587, abs=2e-3)


def test_the_loss_is_least_at_the_exact_denoiser():
    """The network that gives it, against the same with a small error."""
    x = MEAN + STD * torch.randn(5000, 2, generator=generator(1))
    noise, level = torch.randn(5000, 2, generator=generator(2)), PAPER.training_levels(torch.rand(5000, generator=generator(3)))
    mixed = x + per_row(level, x) * noise
    best = exact(mixed, level)
    zero, one = (PAPER.denoised(lambda x, c, v=v: torch.full_like(x, v), mixed, level) for v in (0.0, 1.0))
    ideal = (best - zero) / (one - zero)  # D is linear in what the network gives
    losses = [PAPER.loss(lambda x, c, e=e: ideal + e, x, noise, level).mean() for e in (0.0, -0.1, 0.1)]
    assert losses[0] < losses[1] and losses[0] < losses[2]


# Likelihood -------------------------------------------------------------------------------------------------------------

MEANS = torch.tensor([[-0.5, 0.2], [0.5, -0.2]])
WIDTH = 0.12


def mixture(x: Tensor, s: Tensor) -> Tensor:
    """The exact denoiser of two equal Gaussians, for x + s e."""
    s = per_row(s, x)
    total = WIDTH**2 + s**2
    apart = x.unsqueeze(1) - MEANS
    share = torch.softmax(-0.5 * apart.square().sum(-1) / total, 1).unsqueeze(-1)
    return (share * (MEANS + (WIDTH**2 / total).unsqueeze(1) * apart)).sum(1)


def mixture_log_prob(x: Tensor) -> Tensor:
    return torch.logsumexp(torch.distributions.Normal(MEANS, WIDTH).log_prob(x.unsqueeze(1)).sum(-1), 1) - math.log(2)


def mixture_samples(n: int) -> Tensor:
    which = torch.rand(n, generator=generator(1)) < 0.5
    return MEANS[which.long()] + WIDTH * torch.randn(n, 2, generator=generator(2))


def bounds(denoise, x: Tensor, samples: int) -> Tensor:
    uniform, noise, weight = fixed_samples(samples, x.shape[1])
    s, nats = sigma_of_information(uniform)
    each = [information_gain(denoise, x, s[i].expand(len(x)), noise[i].expand_as(x)) for i in range(len(s))]
    return gaussian_log_prob(x) + nats * weight @ torch.stack(each)


def test_the_bound_of_an_exact_denoiser_is_the_likelihood_on_average():
    x = mixture_samples(500)
    assert float(bounds(mixture, x, 32).mean()) == pytest.approx(float(mixture_log_prob(x).mean()), abs=0.05)


def test_the_bound_of_a_wrong_denoiser_lies_below_the_likelihood():
    x = mixture_samples(500)
    wrong = lambda x, s: mixture(x, s) + 0.2 * gaussian_scale(s, x)  # noqa: E731
    gap = mixture_log_prob(x).mean() - bounds(wrong, x, 32).mean()
    assert float(gap) == pytest.approx(2 * 0.04 * sigma_of_information(torch.zeros(1))[1], abs=0.2)


def gaussian_scale(s: Tensor, x: Tensor) -> Tensor:
    return per_row(s * SIGMA_DATA / (s**2 + SIGMA_DATA**2).sqrt(), x)


def test_the_bound_of_an_untrained_network_is_exactly_a_gaussian():
    x = mixture_samples(20)
    untrained = partial(PAPER.denoised, lambda x, c: torch.zeros_like(x))
    torch.testing.assert_close(bounds(untrained, x, 4), gaussian_log_prob(x), atol=2e-3, rtol=0)
    torch.testing.assert_close(ode_log_prob(untrained, x, 4), gaussian_log_prob(x), atol=1e-3, rtol=0)


def test_the_likelihood_of_the_ode_is_exact_for_an_exact_denoiser():
    x = mixture_samples(200)
    torch.testing.assert_close(ode_log_prob(mixture, x, 40), mixture_log_prob(x), atol=0.03, rtol=0)


def test_levels_of_the_bound_hide_equal_shares_of_information():
    s, nats = sigma_of_information(torch.tensor([0.0, 0.5, 1.0]))
    hidden = 0.5 * torch.log1p((SIGMA_DATA / s) ** 2)
    torch.testing.assert_close(s[[0, 2]], torch.tensor([0.002, 80.0]), rtol=1e-3, atol=0)
    torch.testing.assert_close(hidden[0] - hidden[1], hidden[1] - hidden[2])
    assert float(hidden[0] - hidden[2]) == pytest.approx(nats, rel=1e-4)


@pytest.mark.parametrize("size", [1, 2, 8])
def test_even_samples_have_the_moments_of_normal_noise(size):
    uniform, noise, weight = fixed_samples(6, size)
    assert uniform.unique().numel() == 6 and float(weight.sum()) == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(weight @ noise, torch.zeros(size), atol=1e-5, rtol=0)
    torch.testing.assert_close(noise.T @ (weight.unsqueeze(1) * noise), torch.eye(size), atol=1e-5, rtol=0)
    assert float(weight @ noise.square().sum(1).square()) == pytest.approx(size * (size + 2), rel=1e-4)
