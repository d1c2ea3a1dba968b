"""Whether two samples of latents are of one distribution: a classifier, MMD, sliced Wasserstein distance, Kolmogorov-Smirnov.

Latents x [N, D] and y [M, D]. Rows of one episode are dependent, so that a test which takes them for independent ones rejects
too often. Where each row's episode is given (`group`), labels are permuted by whole episodes: an episode that has rows in both
samples swaps them with probability 1/2, one that has rows in a single sample trades places with another such. Rows of one episode
are never in both the training and the test rows of a classifier, and are never compared with one another by MMD. The level of the
tests then holds as far as there are many episodes: with G of them no p-value is below 1 / 2^G.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from worldmodel.diagnostics.calibration import ranks
from worldmodel.diagnostics.evidence import interval

PERMUTATIONS = 200
FOLDS = 5
BANDWIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Of the kernels, in median distances between rows."""
NOISE = 1.0
"""Variance of a label beside that of the classifier's function, which is 1."""
LANDMARKS = 200
"""Rows that the functions of `density_ratio` are made of."""
LOGIT_VARIANCE = 3.0
"""Of the functions of `density_ratio`, before any row is seen."""
NEWTON_STEPS = 12
DIRECTIONS = 64
"""Random projections of the sliced distance."""
QUANTILES = 1000
"""At most so many quantiles are compared in each projection."""
DIMENSIONS_AT_ONCE = 16
NUMBERS_AT_ONCE = 2_000_000

Groups = tuple[Int[Tensor, " N"], Int[Tensor, " M"]]
"""The episode of each row of x and of y."""


@dataclass(frozen=True)
class Outcome:
    """A statistic of two samples, and what it is where both are of one distribution.

    value      of the samples
    mean       over permutations of the labels: the floor, which two samples of one distribution have
    low, high  central interval of LEVEL over the permutations
    p          share of the permutations, the samples' own labels among them, whose statistic is as large
    """

    value: float
    mean: float
    low: float
    high: float
    p: float

    @classmethod
    def of(cls, statistics: Float[Tensor, " P"]) -> Outcome:
        """Of the statistic with the true labels, which comes first, and with permuted ones. Source: Phipson and Smyth 2010."""
        statistics = statistics.double().cpu()
        null = statistics[1:]
        as_large = null >= statistics[0] - 1e-9 * statistics.abs().max()  # equal but for rounding
        return cls(float(statistics[0]), float(null.mean()), *interval(null), float((1 + as_large.sum()) / len(statistics)))


# Rows and labels ------------------------------------------------------------------------------------------------------


def thinned(group: Int[Tensor, " N"], limit: int, per_group: int | None = None) -> Int[Tensor, " K"]:
    """Numbers of at most `limit` rows, evenly spread within each group, and at most `per_group` of each; sorted.

    Each group keeps as many rows as the others, as far as it has them. `limit` below the number of groups: so many groups.
    """
    _, which, sizes = group.unique(return_inverse=True, return_counts=True)
    cap = int(sizes.max()) if len(sizes) else 0
    cap = cap if per_group is None else min(cap, per_group)
    while cap > 1 and int(sizes.clamp_max(cap).sum()) > limit:
        cap -= 1
    order = which.argsort(stable=True)
    first = sizes.cumsum(0) - sizes
    place = torch.arange(len(group), device=group.device) - first[which[order]]
    size, kept = sizes[which[order]], sizes.clamp_max(cap)[which[order]]
    chosen = (place * kept) // size != ((place - 1) * kept).div(size, rounding_mode="floor")  # `kept` of `size` places
    rows = order[chosen]
    if len(rows) > limit:
        rows = rows[torch.arange(limit, device=rows.device) * len(rows) // limit]
    return rows.sort().values


def pooled(x: Float[Tensor, "N D"], y: Float[Tensor, "M D"]) -> Float[Tensor, "R D"]:
    """Both samples, x first, each dimension in deviations of all rows; what does not vary is 0."""
    z = torch.cat([x, y]).double()
    std = z.std(0)
    return (z - z.mean(0)) / torch.where(std > 1e-12 * (1 + z.abs().amax(0)), std, torch.inf)


def relabelled(
    count_x: int, count_y: int, permutations: int, generator: torch.Generator, group: Groups | None = None
) -> Bool[Tensor, "P R"]:
    """Which of R = N + M rows are of x: truly (the first), and by `permutations` permutations of labels, by group where given.

    Source of the swaps: Romano and Wolf 2005 and Cameron, Gelbach and Miller 2008 (signs that clusters share).
    """
    device = generator.device
    is_x = torch.arange(count_x + count_y, device=device) < count_x
    if group is None:
        order = torch.rand(permutations, len(is_x), generator=generator, device=device).argsort(-1)
        return torch.cat([is_x.unsqueeze(0), is_x[order]])
    names, which = torch.cat(group).to(device).unique(return_inverse=True)
    in_x, in_y = (
        torch.zeros(len(names), dtype=torch.bool, device=device).index_fill(0, which[rows], True) for rows in (is_x, ~is_x)
    )
    swapped = (torch.rand(permutations, len(names), generator=generator, device=device) < 0.5) & in_x & in_y
    single = (in_x ^ in_y).nonzero().squeeze(-1)
    if len(single):
        order = torch.rand(permutations, len(single), generator=generator, device=device).argsort(-1)
        swapped[:, single] = in_x[single][order] != in_x[single]
    return torch.cat([is_x.unsqueeze(0), is_x ^ swapped[:, which]])


def _rows_of_groups(count_x: int, count_y: int, group: Groups | None, device: torch.device) -> Int[Tensor, " R"]:
    """The group of each of R = N + M rows: a number from 0 on; without groups each row is its own."""
    if group is None:
        return torch.arange(count_x + count_y, device=device)
    return torch.cat(group).to(device).unique(return_inverse=True)[1]


# Kernels --------------------------------------------------------------------------------------------------------------


def median_distance(z: Float[Tensor, "R D"], limit: int = 1000) -> float:
    """The median distance between different rows, of at most `limit` evenly spaced ones; 1 where all are the same."""
    some = z[torch.arange(min(limit, len(z)), device=z.device) * len(z) // min(limit, len(z))]
    apart = torch.nn.functional.pdist(some)
    median = float(apart.median()) if len(apart) else 0.0
    if median == 0 and len(apart):  # more than half of the pairs are the same, as few categories are
        median = float(apart.mean())
    return median or 1.0


def kernel(z: Float[Tensor, "R D"], other: Float[Tensor, "S D"], median: float) -> Float[Tensor, "R S"]:
    """Mean of the Gaussian kernels exp(-d^2 / (2 w^2)) of all BANDWIDTHS w, which is 1 between equal rows."""
    square = torch.cdist(z, other).square_()
    total = torch.zeros_like(square)
    for width in BANDWIDTHS:
        total += torch.exp(square * (-0.5 / (width * median) ** 2))
    return total / len(BANDWIDTHS)


def _moments(z: Float[Tensor, "R D"]) -> Float[Tensor, "R E"]:
    """Numbers and their squares, of length about 1 for a standardised row: smooth kernels see little of one number among many."""
    return torch.cat([z, z.square() - 1], 1).clamp(-10, 10) / z.shape[1] ** 0.5


# Tests ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Classified:
    """A cross-fitted classifier of two samples.

    auc    probability that a row of x has a larger score than one of y: 0.5 where both are of one distribution
    each   [N + M]  its contributions by row: the share of the other sample's rows, within the same fold, that a row is on the right
           side of; over the rows of either sample their weighted mean is the AUC
    """

    auc: Outcome
    each: Float[Tensor, " R"]


def classifier_test(
    x: Float[Tensor, "N D"],
    y: Float[Tensor, "M D"],
    generator: torch.Generator,
    group: Groups | None = None,
    permutations: int = PERMUTATIONS,
) -> Classified:
    """Classifier two-sample test: how well the samples are separated by rows that the classifier was not fitted to.

    The classifier is a kernel ridge regression of the labels (the mean of a Gaussian process), by `kernel` and by products of the
    numbers and of their squares. Its scores are linear in the labels, so that it is fitted anew for each permutation at the cost of
    one product, and the level is exact. The AUC is that within folds, averaged over them by their numbers of pairs.
    Sources: Lopez-Paz and Oquab 2017 (C2ST); Kim, Lee and Lei 2019 (regression as a two-sample test).
    """
    z = pooled(x, y)
    labels = relabelled(len(x), len(y), permutations, generator, group).to(z.device)
    signs, each_moment = labels.double() * 2 - 1, _moments(z)
    k = kernel(z, z, median_distance(z)) + each_moment @ each_moment.T
    wins, pairs = z.new_zeros(len(labels)), z.new_zeros(len(labels))
    each = z.new_full((len(z),), torch.nan)
    for test in _folds(_rows_of_groups(len(x), len(y), group, z.device), generator):
        train = ~test
        matrix = k[train][:, train] + NOISE * torch.eye(int(train.sum()), dtype=k.dtype, device=k.device)
        known = signs[:, train] - signs[:, train].mean(1, keepdim=True)
        scores = torch.cholesky_solve(known.T, torch.linalg.cholesky(matrix)).T @ k[train][:, test]  # [P, rows of the fold]
        positive = labels[:, test]
        count, number = positive.sum(1), int(test.sum())
        wins += (ranks(scores.T).T.to(z) * positive).sum(1) - count.square() / 2
        pairs += count * (number - count)
        each[test] = _placements(scores[0], positive[0])
    return Classified(Outcome.of(wins / pairs.clamp_min(1)), each)


def _placements(score: Float[Tensor, " K"], positive: Bool[Tensor, " K"]) -> Float[Tensor, " K"]:
    """Of each row the share of the other label's rows that it is on the right side of; NaN without any. Ties count half."""
    out = torch.full_like(score, torch.nan)
    for own, side in ((positive, 1), (~positive, -1)):
        others = (side * score[~own]).sort().values
        mine = (side * score[own]).contiguous()
        if len(others):
            both = torch.searchsorted(others, mine) + torch.searchsorted(others, mine, right=True)
            out[own] = both.to(score) / (2 * len(others))
    return out


def _folds(group: Int[Tensor, " R"], generator: torch.Generator) -> Iterator[Bool[Tensor, " R"]]:
    """The test rows of each fold: whole groups, drawn without a look at labels, so that permutations of them stay exact."""
    count = int(group.max()) + 1
    fold = torch.randperm(count, generator=generator, device=generator.device).to(group.device) % FOLDS
    for number in range(min(FOLDS, count)):
        test = fold[group] == number
        if not test.all():
            yield test


def mmd(
    x: Float[Tensor, "N D"],
    y: Float[Tensor, "M D"],
    generator: torch.Generator,
    group: Groups | None = None,
    permutations: int = PERMUTATIONS,
) -> Outcome:
    """Unbiased squared maximum mean discrepancy of `kernel`, over pairs of rows of different groups.

    Source: Gretton et al. 2012, eq. 3, with a sum of bandwidths as in Li et al. 2015 (here their mean).
    """
    z = pooled(x, y)
    of_x = relabelled(len(x), len(y), permutations, generator, group).to(z.device).double()
    rows = _rows_of_groups(len(x), len(y), group, z.device)
    apart = (rows.unsqueeze(1) != rows).double()
    k, of_y = kernel(z, z, median_distance(z)) * apart, 1 - of_x

    def within_and_between(pairs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        right_x, right_y = of_x @ pairs, of_y @ pairs
        return (right_x * of_x).sum(1), (right_y * of_y).sum(1), (right_x * of_y).sum(1)

    sums, counts = within_and_between(k), within_and_between(apart)
    xx, yy, xy = (total / number.clamp_min(1) for total, number in zip(sums, counts, strict=True))
    return Outcome.of(xx + yy - 2 * xy)


def sliced_wasserstein(
    x: Float[Tensor, "N D"],
    y: Float[Tensor, "M D"],
    generator: torch.Generator,
    group: Groups | None = None,
    permutations: int = PERMUTATIONS,
    directions: int = DIRECTIONS,
) -> Outcome:
    """Squared Wasserstein-2 distance in random directions, averaged, times D: in squared units of the latents.

    Of two Gaussians that differ in their means alone it is the squared distance of the means. Its `mean` is the floor: finite
    samples of one distribution are apart, too. Source: Bonneel et al. 2015.
    """
    z = torch.cat([x, y]).double()
    axes = torch.randn(directions, z.shape[1], generator=generator, device=generator.device).to(z)
    ordered, order = (z @ (axes / axes.norm(dim=1, keepdim=True)).T).T.sort(-1)
    labels = relabelled(len(x), len(y), permutations, generator, group).to(z.device)
    counts, found = labels.sum(1), z.new_zeros(len(labels))
    for count in counts.unique().tolist():  # a few, as episodes are of equal or of different lengths
        for which in (counts == count).nonzero().squeeze(-1).split(max(1, NUMBERS_AT_ONCE // order.numel())):
            found[which] = _quantile_distances(ordered, labels[which][:, order], count) * z.shape[1]
    return Outcome.of(found)


def _quantile_distances(z: Float[Tensor, "S R"], of_x: Bool[Tensor, "P S R"], count: int) -> Float[Tensor, " P"]:
    """Mean squared difference of the quantiles of sorted rows that are of x (`count` of R) and of those that are not; 0 without."""
    rest = z.shape[1] - count
    number = min(count, rest, QUANTILES)
    at = (torch.arange(number, device=z.device) + 0.5).double() / max(number, 1)
    wide = z.expand_as(of_x)
    one, other = (wide[mask].view(*of_x.shape[:2], size)[..., (at * size).long()] for mask, size in ((of_x, count), (~of_x, rest)))
    return (one - other).square().mean((1, 2)).nan_to_num(0.0)


def kolmogorov_smirnov(
    x: Float[Tensor, "N D"],
    y: Float[Tensor, "M D"],
    generator: torch.Generator,
    group: Groups | None = None,
    permutations: int = PERMUTATIONS,
) -> Float[Tensor, " D"]:
    """p-value of each dimension's Kolmogorov-Smirnov statistic, corrected for there being D of them.

    Corrected as Holm does, from the largest difference down, but by the largest statistic that permutations give to the dimensions
    that are left, in place of Bonferroni's sum: p-values of K permutations are at least 1 / (K + 1), and D times that may be above
    every level. Source: Westfall and Young 1993, algorithm 4.1 (step-down maxT).
    """
    z = torch.cat([x, y]).double()
    labels = relabelled(len(x), len(y), permutations, generator, group).to(z.device)
    parts = [_ks_statistics(part, labels) for part in z.T.split(DIMENSIONS_AT_ONCE)]
    return step_down(torch.cat(parts, 1))


def _ks_statistics(z: Float[Tensor, "D R"], labels: Bool[Tensor, "P R"]) -> Float[Tensor, "P D"]:
    """Largest difference of the two distribution functions, for each labelling and dimension."""
    ordered, order = z.sort(-1)
    ends = torch.ones_like(ordered, dtype=torch.bool)
    ends[:, :-1] = ordered[:, 1:] != ordered[:, :-1]  # between equal numbers there is no step
    of_x = labels.double()
    weight = of_x / of_x.sum(1, keepdim=True).clamp_min(1) - (1 - of_x) / (1 - of_x).sum(1, keepdim=True).clamp_min(1)
    return torch.stack([(weight[:, rows].cumsum(1).abs() * end).amax(1) for rows, end in zip(order, ends, strict=True)], 1)


def step_down(statistics: Float[Tensor, "P D"]) -> Float[Tensor, " D"]:
    """Corrected p-values of D statistics: the true ones come first, then those of permutations. Source: see above."""
    true, null = statistics[0], statistics[1:]
    order = true.argsort()
    largest = null[:, order].cummax(1).values  # over this dimension and all whose difference is smaller
    p = (1 + (largest >= true[order] - 1e-12).sum(0)).double() / len(statistics)
    return torch.empty_like(p).scatter(0, order, p.flip(0).cummax(0).values.flip(0))


# Density ratio --------------------------------------------------------------------------------------------------------


def density_ratio(
    x: Float[Tensor, "N D"], y: Float[Tensor, "M D"], generator: torch.Generator, group: Groups | None = None
) -> tuple[Float[Tensor, " N"], Float[Tensor, " M"]]:
    """ln r at the rows of x and of y, in nats; r(z) = density of x / density of y. No row's ratio was fitted to that row.

    A logistic regression on `kernel` around LANDMARKS rows, on the numbers and on their squares. Its functions have the variance
    LOGIT_VARIANCE before any row is seen, so that ln r is too small rather than too large where there are few rows. The share of
    either label is taken out, so that N and M may differ.
    Source: Sugiyama, Suzuki and Kanamori 2012, section 4 (density ratios by logistic regression).
    """
    z, is_x = pooled(x, y), torch.arange(len(x) + len(y), device=x.device) < len(x)
    features = _features(z, generator)
    logits = z.new_zeros(len(z))
    for test in _folds(_rows_of_groups(len(x), len(y), group, z.device), generator):
        weights, offset = _logistic(features[~test], is_x[~test].double())
        odds = is_x[~test].double().mean().clamp(1e-6, 1 - 1e-6).logit()
        logits[test] = features[test] @ weights + offset - odds
    return logits[: len(x)].to(x.dtype), logits[len(x) :].to(x.dtype)


def _features(z: Float[Tensor, "R D"], generator: torch.Generator) -> Float[Tensor, "R L"]:
    """Numbers whose products are the kernel, as far as LANDMARKS rows tell (Williams and Seeger 2001, Nystroem)."""
    chosen = torch.randperm(len(z), generator=generator, device=generator.device)[:LANDMARKS].to(z.device)
    median = median_distance(z)
    values, vectors = torch.linalg.eigh(kernel(z[chosen], z[chosen], median))
    kept = values > 1e-6 * values.max()
    smooth = kernel(z, z[chosen], median) @ (vectors[:, kept] / values[kept].sqrt())
    return torch.cat([smooth, _moments(z)], 1)


def _logistic(features: Float[Tensor, "R L"], label: Float[Tensor, " R"]) -> tuple[Float[Tensor, " L"], Float[Tensor, ""]]:
    """(weights, offset) of the largest penalised likelihood, by NEWTON_STEPS Newton steps, each halved until the loss falls."""
    design = torch.cat([features, torch.ones_like(features[:, :1])], 1)
    penalty = torch.full((design.shape[1],), 1 / LOGIT_VARIANCE, dtype=design.dtype, device=design.device)
    penalty[-1] = 1e-6

    def loss(w: Tensor) -> float:
        logit = design @ w
        return float(torch.nn.functional.softplus(logit).sum() - (label * logit).sum() + 0.5 * (penalty * w.square()).sum())

    weights = torch.zeros_like(penalty)
    value = loss(weights)
    for _ in range(NEWTON_STEPS):
        p = torch.sigmoid(design @ weights)
        hessian = design.T @ (design * (p * (1 - p)).unsqueeze(1)) + penalty.diag()
        step = torch.linalg.solve(hessian, design.T @ (p - label) + penalty * weights)
        sizes = (0.5**n for n in range(10))
        size = next((size for size in sizes if loss(weights - size * step) < value), 0.0)
        before, weights = value, weights - size * step
        value = loss(weights)
        if before - value < 1e-6 * (1 + abs(value)):
            break
    return weights[:-1], weights[-1]
