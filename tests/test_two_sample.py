"""Two-sample tests: their level on equal distributions, their power on four others, and density ratios whose truth is known."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import generator

from worldmodel.diagnostics.two_sample import (
    Groups,
    Outcome,
    _ks_statistics,
    classifier_test,
    density_ratio,
    kolmogorov_smirnov,
    mmd,
    relabelled,
    sliced_wasserstein,
    step_down,
    thinned,
)

N, DRAWS, PERMUTATIONS = 60, 200, 99


def p_of_classifier(x, y, rng, group: Groups | None = None) -> float:
    return classifier_test(x, y, rng, group, PERMUTATIONS).auc.p


def p_of_mmd(x, y, rng, group: Groups | None = None) -> float:
    return mmd(x, y, rng, group, PERMUTATIONS).p


def p_of_sliced(x, y, rng, group: Groups | None = None) -> float:
    return sliced_wasserstein(x, y, rng, group, PERMUTATIONS, directions=8).p


def p_of_ks(x, y, rng, group: Groups | None = None) -> float:
    return float(kolmogorov_smirnov(x, y, rng, group, PERMUTATIONS).min())  # that any number differs


TESTS = [p_of_classifier, p_of_mmd, p_of_sliced, p_of_ks]


def normal(rng: torch.Generator, rows: int = N, size: int = 2) -> torch.Tensor:
    return torch.randn(rows, size, generator=rng)


def shifted(x: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    return x + torch.tensor([0.7, 0.0])


def scaled(x: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    return x * torch.tensor([2.0, 1.0])


def correlated(x: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    return torch.stack([x[:, 0], 0.9 * x[:, 0] + 0.19**0.5 * x[:, 1]], 1)


def ring(x: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Mean 0 and covariance I, as of the normal distribution."""
    angle = 2 * math.pi * torch.rand(len(x), generator=rng)
    return 2**0.5 * torch.stack([angle.cos(), angle.sin()], 1)


def episodes(rng: torch.Generator, rows: int = 6, count: int = 20) -> tuple[torch.Tensor, torch.Tensor, Groups]:
    """(N(0, I) latents that hardly move within an episode, independent ones of the same distribution, their episodes)."""
    each = torch.arange(count).repeat_interleave(rows)
    return 0.9 * normal(rng, count)[each] + 0.19**0.5 * normal(rng, rows * count), normal(rng, rows * count), (each, each)


# Level ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p_of", TESTS)
def test_equal_distributions_are_rejected_as_often_as_the_level_says(p_of):
    rng = generator(7)
    rejected = sum(p_of(normal(rng), normal(rng), rng) <= 0.05 for _ in range(DRAWS))
    assert 0.02 * DRAWS <= rejected <= 0.08 * DRAWS


@pytest.mark.parametrize("p_of", TESTS)
def test_rows_of_one_episode_are_no_independent_ones(p_of):
    rng = generator(11)
    samples = [episodes(rng) for _ in range(DRAWS // 2)]
    grouped = sum(p_of(x, y, rng, group) <= 0.05 for x, y, group in samples)
    assert grouped <= 0.1 * len(samples)
    ungrouped = sum(p_of(x, y, rng) <= 0.05 for x, y, _ in samples[:30])
    assert ungrouped >= 0.3 * 30


# Power ------------------------------------------------------------------------------------------------------------------


PAIRS = [(p_of, other) for p_of in TESTS for other in (shifted, scaled, correlated, ring)]
PAIRS.remove((p_of_ks, correlated))  # each number on its own is distributed as before


@pytest.mark.parametrize(("p_of", "other"), PAIRS)
def test_other_distributions_are_told_apart(p_of, other):
    rng = generator(3)
    assert p_of(normal(rng, 300), other(normal(rng, 300), rng), rng) <= 0.02


def test_whole_episodes_of_another_distribution_are_told_apart():
    rng = generator(4)
    x, y, group = episodes(rng)
    assert all(p_of(x + 1.5, y, rng, group) <= 0.02 for p_of in TESTS)
    assert p_of_mmd(x + 1.5, y, rng, (group[0], group[1] + 100)) <= 0.02  # episodes that have rows in one sample only


def test_the_auc_of_a_shift_comes_near_that_of_the_best_classifier():
    rng, values = generator(5), []
    for shift in (0.0, 0.5, 1.0, 2.0):
        x, y = normal(rng, 500), normal(rng, 500) + torch.tensor([shift, 0.0])
        found = classifier_test(x, y, rng, permutations=50)
        values.append(found.auc.value)
        best = 0.5 * math.erfc(-shift / 2)  # P(N(shift, 1) > N(0, 1))
        assert found.auc.value == pytest.approx(best, abs=0.05)
        halves = found.each[:500].mean(), found.each[500:].mean()
        assert float(sum(halves)) / 2 == pytest.approx(found.auc.value, abs=0.01)
    assert values == sorted(values)
    assert found.auc.low < 0.5 < found.auc.high < values[-1]


def test_no_row_is_scored_by_a_classifier_that_knows_its_episode():
    rng = generator(6)
    each = torch.arange(30).repeat_interleave(10)
    x, y = (5 * normal(rng, 30)[each] + 0.01 * normal(rng, 300) for _ in range(2))
    assert classifier_test(x, y, rng, (each, each + 30), 20).auc.value < 0.65  # by rows it would know each episode's place
    assert classifier_test(x, y, rng, None, 20).auc.value > 0.8


# Values -----------------------------------------------------------------------------------------------------------------


def test_mmd_is_unbiased_and_grows_with_the_difference():
    rng = generator(8)
    none = torch.tensor([mmd(normal(rng), normal(rng), rng, permutations=1).value for _ in range(200)])
    assert abs(float(none.mean())) < 3 * float(none.std()) / 200**0.5
    values = [mmd(normal(rng, 200), normal(rng, 200) + shift, rng, permutations=1).value for shift in (0.0, 0.5, 1.0, 2.0)]
    assert values == sorted(values) and abs(values[0]) < 0.02 < values[1]


def test_the_sliced_distance_of_shifted_gaussians_is_that_of_their_means_above_its_floor():
    rng = generator(9)
    x, y = normal(rng, 1000, 4), normal(rng, 1000, 4) + torch.tensor([3.0, 0.0, 0.0, 4.0])
    found = sliced_wasserstein(x, y, rng, permutations=1, directions=1000)
    assert found.value == pytest.approx(25, rel=0.1)
    same = [sliced_wasserstein(normal(rng, 200), normal(rng, 200), rng, permutations=20, directions=32) for _ in range(20)]
    floor, value = (sum(getattr(one, name) for one in same) / 20 for name in ("mean", "value"))
    assert value == pytest.approx(floor, rel=0.3) and floor > 0


def test_only_the_numbers_that_differ_have_small_p_values():
    rng = generator(10)
    x, y = normal(rng, 200, 12), normal(rng, 200, 12)
    y[:, [2, 7]] += 0.8
    p = kolmogorov_smirnov(x, y, rng)
    assert (p <= 0.05).nonzero().squeeze(-1).tolist() == [2, 7]


def test_statistics_of_kolmogorov_and_smirnov_are_those_of_scipy_ties_included():
    scipy = pytest.importorskip("scipy.stats")
    rng = generator(12)
    for x, y in ((normal(rng, 40, 3), normal(rng, 70, 3)), (normal(rng, 50, 2).round(), normal(rng, 50, 2).round())):
        labels = (torch.arange(len(x) + len(y)) < len(x)).unsqueeze(0)
        found = _ks_statistics(torch.cat([x, y]).double().T, labels)[0]
        wanted = [scipy.ks_2samp(a, b).statistic for a, b in zip(x.double().T, y.double().T)]
        assert found.tolist() == pytest.approx(wanted)


def test_step_down_corrects_the_largest_by_all_and_the_smallest_by_itself():
    null = torch.tensor([[5.0, 0.0], [0.0, 3.0], [0.0, 0.0]])
    p = step_down(torch.cat([torch.tensor([[4.0, 1.0]]), null]))
    assert p.tolist() == [0.5, 0.5]  # (1 + 1) / 4, and the other is never below it
    assert step_down(torch.cat([torch.tensor([[6.0, 4.0]]), null])).tolist() == [0.25, 0.25]


# Density ratios ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 16])
def test_log_ratios_follow_the_true_ones(size):
    rng = generator(13)
    x, y = normal(rng, 600, size), normal(rng, 800, size)
    y[:, 0] = 2 * y[:, 0] + 0.5
    at_x, at_y = density_ratio(x, y, rng)
    one, other = torch.distributions.Normal(0.0, 1.0), torch.distributions.Normal(0.5, 2.0)
    true = [one.log_prob(z[:, 0]) - other.log_prob(z[:, 0]) for z in (x, y)]
    found, truth = torch.cat([at_x, at_y]), torch.cat(true)
    assert float(torch.corrcoef(torch.stack([found, truth]))[0, 1]) > 0.9
    assert float((found * truth).mean() / truth.square().mean()) == pytest.approx(0.9, abs=0.2)
    where_x_is_rare = float((at_y < math.log(0.1)).float().mean()), float((true[1] < math.log(0.1)).float().mean())
    assert where_x_is_rare[0] == pytest.approx(where_x_is_rare[1], abs=0.05)


def test_log_ratios_of_equal_distributions_are_near_0_and_never_fitted_to_their_own_rows():
    rng = generator(14)
    at_x, at_y = density_ratio(normal(rng, 400), normal(rng, 400), rng)
    assert abs(float(at_x.mean() - at_y.mean())) < 0.1  # rows that were fitted would have larger ratios at x
    assert float(torch.cat([at_x, at_y]).abs().quantile(0.9)) < 0.8


# Rows and labels --------------------------------------------------------------------------------------------------------


def test_labels_are_permuted_by_whole_episodes():
    group = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 2])
    labels = relabelled(4, 3, 50, generator(15), group)
    assert labels[0].tolist() == [True] * 4 + [False] * 3
    assert (labels[:, 0] == labels[:, 1]).all() and (labels[:, 0] != labels[:, 4]).all()  # both of episode 0, on either side
    assert (labels[:, 2] == labels[:, 3]).all() and 5 < int(labels[:, 0].sum()) < 46
    plain = relabelled(4, 3, 50, generator(15))
    assert (plain.sum(1) == 4).all() and len(plain.unique(dim=0)) > 15


def test_thinned_rows_are_spread_over_episodes_and_within_them():
    group = torch.tensor([0] * 100 + [1] * 3 + [2] * 50)
    rows = thinned(group, 33)
    assert group[rows].bincount().tolist() == [15, 3, 15]
    assert rows[:15].diff().min() >= 6 and rows[:15].diff().max() <= 7
    assert group[thinned(group, 1000, 5)].bincount().tolist() == [5, 3, 5]
    assert thinned(group, 1000).tolist() == list(range(153))
    assert len(thinned(torch.arange(50), 10)) == 10


def test_samples_of_one_point_are_equal_and_nothing_fails():
    x, rng = torch.zeros(20, 3), generator(16)
    assert classifier_test(x, x, rng, permutations=20).auc.value == 0.5
    assert all(p_of(x, x, rng) == 1 for p_of in TESTS)
    assert float(density_ratio(x, x, rng)[0].abs().max()) < 0.1


def test_a_p_value_counts_the_true_labels_too():
    found = Outcome.of(torch.tensor([3.0, 1.0, 2.0, 4.0]))
    assert found.p == 0.5 and found.mean == pytest.approx(7 / 3) and found.low < found.mean < found.high
