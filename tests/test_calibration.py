"""Estimators of calibration against samplers whose truth is known, and against a world model that is one of them."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import generator, small_world
from gymnasium import spaces
from test_diagnostics import LINE, line_episodes

from worldmodel.data import Dream, Sampling, State
from worldmodel.diagnostics.calibration import (
    MIN_STARTS,
    Calibration,
    calibrate,
    coverage,
    fair_crps,
    spread_knows,
    spread_skill,
)
from worldmodel.errors import ConfigError

STARTS = 40_000


def gaussians(samples: int, spread: float = 1.0, bias: float = 0.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(draws [S, K], observed [S]): observed ~ N(0, 1), draws ~ N(bias, spread^2)."""
    rng = generator(seed)
    return bias + spread * torch.randn(STARTS, samples, generator=rng), torch.randn(STARTS, generator=rng)


def measured(draws: torch.Tensor, observed: torch.Tensor) -> SimpleNamespace:
    square = (draws.mean(1) - observed).square()
    return SimpleNamespace(
        crps=float(fair_crps(draws, observed).mean()),
        coverage50=float(coverage(draws, observed, 0.5).mean()),
        coverage90=float(coverage(draws, observed, 0.9).mean()),
        ratio=float(spread_skill(draws.var(1), square, draws.shape[1])),
        knows=float(spread_knows(draws.var(1, keepdim=True), square.unsqueeze(1), draws.shape[1])),
    )


# Estimators -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [2, 8, 19, 32])
def test_a_calibrated_sampler_reads_its_nominal_numbers_with_any_count_of_draws(samples):
    found = measured(*gaussians(samples))
    assert found.coverage50 == pytest.approx(0.5, abs=0.01) and found.coverage90 == pytest.approx(0.9, abs=0.01)
    assert found.ratio == pytest.approx(1, abs=0.02)
    assert found.crps == pytest.approx(1 / math.sqrt(math.pi), abs=0.01)  # of N(0, 1), Gneiting & Raftery 2007, eq. 21
    assert abs(found.knows) < 0.05  # every start is as uncertain as any other: nothing to know


def test_coverage_is_exact_for_skewed_and_for_discrete_samplers():
    rng = generator(1)
    for law in (lambda n: torch.rand(n, generator=rng).log().square(), lambda n: (torch.rand(n, generator=rng) < 0.1).float()):
        both = law(STARTS * 9).view(STARTS, 9)
        for level in (0.5, 0.9):
            assert float(coverage(both[:, :8], both[:, 8], level).mean()) == pytest.approx(level, abs=0.01)


def test_a_confident_sampler_covers_too_little_and_a_timid_one_too_much():
    sure, timid = measured(*gaussians(19, spread=0.3)), measured(*gaussians(19, spread=3))
    assert sure.coverage50 < 0.25 and sure.coverage90 < 0.5 and sure.ratio == pytest.approx(0.3, abs=0.02)
    assert timid.coverage50 > 0.85 and timid.coverage90 > 0.99 and timid.ratio > 2
    best = 1 / math.sqrt(math.pi)
    assert sure.crps > best + 0.05 and timid.crps > best + 0.05


def test_draws_that_never_vary_cover_nothing_with_19_of_them():
    draws, observed = torch.zeros(1000, 19), torch.randn(1000, generator=generator())
    assert float(coverage(draws, observed, 0.9).abs().max()) < 1e-6
    assert fair_crps(draws, observed).sub(observed.abs()).abs().max() < 1e-6  # the score of a point
    assert float(coverage(torch.zeros(1000, 8), observed, 0.9).mean()) == pytest.approx(0.55)


def test_a_biased_sampler_reads_as_one_that_is_too_sure():
    found = measured(*gaussians(19, bias=2.0))
    assert found.coverage90 < 0.5 and found.ratio == pytest.approx(1 / math.sqrt(4.2) * math.sqrt(20 / 19), abs=0.05)


@pytest.mark.parametrize("samples", [8, 19])
def test_a_spread_that_means_nothing_is_told_from_one_that_knows_the_error(samples):
    """Both have the right spread on average, so that the ratio cannot tell them apart."""
    rng = generator(2)
    sizes = (torch.randn(STARTS, generator=rng) / 2).exp()
    observed = sizes * torch.randn(STARTS, generator=rng)
    noise = torch.randn(STARTS, samples, generator=rng)
    knows = measured(sizes.unsqueeze(1) * noise, observed)
    shuffled = sizes[torch.randperm(STARTS, generator=rng)].unsqueeze(1)
    guesses = measured(shuffled * noise, observed)
    assert knows.ratio == pytest.approx(1, abs=0.03) and guesses.ratio == pytest.approx(1, abs=0.03)
    assert 0.7 < knows.knows < 1.05 and -0.02 < guesses.knows < 1 / (samples + 1) + 0.02
    assert knows.crps < guesses.crps - 0.02 and knows.coverage90 == pytest.approx(0.9, abs=0.01)
    sure, timid = (measured(scale * sizes.unsqueeze(1) * noise, observed) for scale in (0.5, 2.0))
    assert sure.knows == pytest.approx(knows.knows, abs=0.1) and timid.knows == pytest.approx(knows.knows, abs=0.1)
    assert sure.ratio < 0.6 and timid.ratio > 1.7


def test_the_fair_score_is_the_sum_over_pairs():
    draws, observed = torch.randn(3, 5, 2, generator=generator()), torch.randn(3, 2, generator=generator(1))
    pairs = (draws.unsqueeze(1) - draws.unsqueeze(2)).abs().sum((1, 2)) / (2 * 5 * 4)
    expected = (draws - observed.unsqueeze(1)).abs().mean(1) - pairs
    torch.testing.assert_close(fair_crps(draws, observed), expected)


def test_equal_spreads_have_no_slope_and_the_order_of_starts_changes_none():
    rng = generator(6)
    variance, square = torch.rand(500, 2, generator=rng), torch.rand(500, 2, generator=rng)
    assert spread_knows(torch.ones(500, 2), square, 19).isnan()
    order = torch.randperm(500, generator=rng)
    torch.testing.assert_close(spread_knows(variance[order], square[order], 19), spread_knows(variance, square, 19))
    tied = variance.gt(0.5).float() + 1  # only two sizes: their ranks are shared, whatever the order of the starts
    torch.testing.assert_close(spread_knows(tied[order], square[order], 19), spread_knows(tied, square, 19))


# Of a world model -------------------------------------------------------------------------------------------------------

STEP, DEVIATION = torch.tensor([1.0, 10.0]), torch.tensor([2.0, 5.0])


def line_world(latent: float, noise: float):
    """A model that knows the line of `line_episodes`: its latent strays and its decoder adds noise, in deviations."""
    world, rng = small_world(LINE, vector_scaling="raw"), generator(3)

    def off(like: torch.Tensor, size: float) -> torch.Tensor:
        return size * DEVIATION * torch.randn(like.shape, generator=rng)

    def trace(batch, state=None, sampling=None):
        return SimpleNamespace(last=State({"x": batch.obs["obs"][:, -1]}), feature=batch.obs["obs"])

    def imagine(state, policy, horizon, sampling=None):
        x = state["x"].unsqueeze(1) + torch.arange(horizon + 1).view(1, -1, 1) * STEP
        x = x + off(x, latent)
        ones = torch.ones(len(x), horizon)
        return Dream(torch.zeros(len(x), horizon, 2), ones, ones, 0 * ones, x, State({"x": x[:, -1]}))

    world.trace, world.imagine, world.decode = trace, imagine, lambda feature: {"obs": feature}
    world.decoder.sample = lambda feature, sampling: {"obs": feature + off(feature, noise)}
    world.scaling.deviation = lambda name: DEVIATION
    return world


def noisy_line(size: float):
    """The line, observed with independent noise of so many deviations at each row but those of the context."""
    episodes = line_episodes(*[9] * 1500)
    rows = episodes.rows.obs["obs"]
    step = torch.arange(9).repeat(1500)
    rows += torch.where(step < 5, 0.0, size).view(1, -1, 1) * DEVIATION * torch.randn(rows.shape, generator=generator(4))
    return episodes


@pytest.mark.parametrize(("latent", "noise"), [(0.5, 0.0), (0.0, 0.5), (0.3, 0.4)])
@pytest.mark.parametrize("samples", [8, 19])
def test_latent_draws_and_the_decoders_noise_are_both_part_of_the_prediction(latent, noise, samples):
    found = calibrate(line_world(latent, noise), noisy_line(0.5), 5, 4, samples=samples)
    assert found.count.tolist() == [1500] * 4 and found.samples == samples
    torch.testing.assert_close(found.coverage50, torch.full((4,), 0.5), atol=0.03, rtol=0)
    torch.testing.assert_close(found.coverage90, torch.full((4,), 0.9), atol=0.03, rtol=0)
    torch.testing.assert_close(found.spread_skill, torch.ones(4), atol=0.05, rtol=0)
    torch.testing.assert_close(found.crps, torch.full((4,), 0.5 / math.sqrt(math.pi)), atol=0.02, rtol=0)
    assert found.spread_knows.abs().max() < 0.25


def test_a_model_that_is_too_sure_is_seen_at_every_horizon():
    found = calibrate(line_world(0.0, 0.1), noisy_line(0.5), 5, 4)
    assert (found.coverage90 < 0.45).all() and (found.spread_skill < 0.3).all()


def test_a_horizon_that_fits_nowhere_is_not_measured():
    found = calibrate(line_world(0.1, 0.1), line_episodes(8, 8, 7), 5, 5)
    assert found.count.tolist() == [3, 3, 2, 0, 0]
    assert all(column[3:].isnan().all() and column[:2].isfinite().all() for column in found.columns().values())
    assert MIN_STARTS == 3 and found.spread_knows[2].isnan() and found.crps[2].isfinite()
    assert calibrate(line_world(0.1, 0.1), line_episodes(3), 5, 2).crps.isnan().all()


def test_models_without_a_decoder_and_pictures_alone_have_no_calibration():
    blind = small_world(LINE)
    blind.decoder = None
    pictures = small_world(spaces.Box(0, 255, (16, 16, 3), "uint8"))
    for world in (blind, pictures):
        found = calibrate(world, line_episodes(12), 5, 3)
        assert found.count.tolist() == [0] * 3 and all(column.isnan().all() for column in found.columns().values())
    assert list(Calibration.unknown(2).columns()) == ["crps", "coverage50", "coverage90", "spread_skill", "spread_knows"]


def test_a_fresh_model_is_measured_through_its_own_decoder_and_repeats_itself():
    world = small_world(LINE)
    one, two = (calibrate(world, line_episodes(12, 25, 30), 5, 4, every=5, generator=generator(5)) for _ in range(2))
    for name, column in one.columns().items():
        assert column.isfinite().all() and torch.equal(column, two.columns()[name])
    sampled = world.decoder.sample(torch.zeros(2, world.feature_dim), Sampling(generator=generator()))
    assert sampled["obs"].shape == (2, 2)


def test_one_draw_is_refused_since_it_has_no_spread():
    with pytest.raises(ConfigError, match="at least 2 samples"):
        calibrate(line_world(0.1, 0.1), line_episodes(12), samples=1)
