"""Whether dreams know what they do not know: the spread of drawn observations against their error, by horizon."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from worldmodel.data import Episodes
from worldmodel.diagnostics.rollouts import NUMBERS_AT_ONCE, ROLLOUTS_AT_ONCE, roll_out, spaced_starts
from worldmodel.errors import ConfigError
from worldmodel.model import WorldModel

SAMPLES = 19
"""Draws for each start. The observation is as likely in each of the 20 gaps between and beside 19 draws, so that the central
intervals of 50 and of 90 % end exactly at draws: nothing is interpolated."""
EVERY = 40
"""Rows between starts: coverage wants many draws rather than many starts that overlap."""
MIN_STARTS = 3
"""Fewer starts have no slope."""


# Estimators -----------------------------------------------------------------------------------------------------------


def fair_crps(draws: Float[Tensor, "S K *N"], observed: Float[Tensor, "S *N"]) -> Float[Tensor, "S *N"]:
    """Continuous ranked probability score, in the unit of the draws; K of them, at least 2, estimate it without bias.

    mean |x_i - y| - sum_ij |x_i - x_j| / (2 K (K - 1)). Lower is better; of a point it would be the absolute error.
    Source: Ferro 2014, "Fair scores for ensemble forecasts", eq. 6.
    """
    count = draws.shape[1]
    away = (draws - observed.unsqueeze(1)).abs().mean(1)
    weight = torch.arange(count, device=draws.device, dtype=draws.dtype) * 2 - (count - 1)
    apart = (draws.sort(1).values * weight.view(1, -1, *[1] * (draws.ndim - 2))).sum(1)  # half the sum over pairs, sorted
    return away - apart / (count * (count - 1))


def coverage(draws: Float[Tensor, "S K *N"], observed: Float[Tensor, "S *N"], level: float) -> Float[Tensor, "S *N"]:
    """The share of each observation that lies within the central interval of probability `level`; its mean is the coverage.

    Where y is distributed like the K draws, its rank among them is uniform, whatever the distribution: the mean is `level` for
    every K. Rank r stands for the probabilities from r / (K + 1) to (r + 1) / (K + 1), of which the part within the interval
    counts; ties share their ranks. The parts are whole where (K + 1) (1 - level) / 2 is; with fewer draws an interval reaches
    into the gaps beside all draws, and an observation that is out there counts in part (8 draws, 90 %: 0.55).
    Sources: Hamill 2001 (rank histogram); Czado, Gneiting, Held 2009, eq. 2 (PIT without randomisation).
    """
    count, tail = draws.shape[1] + 1, (1 - level) / 2
    y = observed.unsqueeze(1)
    low = (draws < y).sum(1) / count
    high = ((draws <= y).sum(1) + 1) / count
    within = high.clamp_max(1 - tail) - low.clamp_min(tail)
    return within.clamp_min(0) / (high - low)


def spread_skill(variance: Float[Tensor, "S *N"], square: Float[Tensor, "S *N"], samples: int) -> Float[Tensor, ""]:
    """Root mean square spread over that of the mean's error: 1 of a calibrated sampler, below it of an over-confident one.

    variance, square   of the draws (unbiased), and squared error of their mean
    samples            K draws; their mean has a variance of its own, which the factor (K + 1) / K allows for

    Source: Fortin et al. 2014, "Why should ensemble spread match the RMSE of the ensemble mean?", eq. 15.
    """
    return ((samples + 1) / samples * variance.mean() / square.mean()).sqrt()


def spread_knows(variance: Float[Tensor, "S D"], square: Float[Tensor, "S D"], samples: int) -> Float[Tensor, ""]:
    """Slope of the squared error on the variance over S starts, once `spread_skill` is taken out: does the spread know the error?

    1: where the spread is larger, so is the error, in proportion, as far as the draws tell spreads apart. About 0, and at most
    1 / (K + 1), which the mean's own variance adds: the spread means nothing, be its size right on average or not. Where all starts
    are equally uncertain, there is nothing to know, and a calibrated sampler reads 0 as well. NaN where all spreads are the same.

    Each number's slope is fitted with the ranks of its variances as instrument, which a few large ones do not decide, and numbers
    weigh by how far their spreads differ.
    Sources: Leutbecher & Palmer 2008, section 4 (spread-error relation over bins of spread); Durbin 1954 (ranks as instrument).
    """
    rank = ranks(variance)
    rank = rank - rank.mean(0)
    differs = (rank * variance).sum()
    slope = (rank * square).sum() / torch.where(differs > 0, differs, torch.nan) * samples / (samples + 1)
    return slope * spread_skill(variance, square, samples).square()


def ranks(x: Float[Tensor, "S D"]) -> Float[Tensor, "S D"]:
    """Ranks over S from 0.5 on; ties share theirs."""
    x = x.T.contiguous()
    ordered = x.sort(-1).values
    return (torch.searchsorted(ordered, x) + torch.searchsorted(ordered, x, right=True)).T.double() / 2


# Of a world model -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Calibration:
    """Draws against reality at horizons 1..H, over all starts and numbers; NaN where nothing is measured.

    samples      draws for each start
    count        [H]  starts at which the horizon fits
    crps         [H]  `fair_crps`, in deviations
    coverage50   [H]  `coverage` of the central interval of 50 %
    coverage90   [H]  of 90 %
    spread_skill [H]  `spread_skill`
    spread_knows [H]  `spread_knows`
    """

    samples: int
    count: Int[Tensor, " H"]
    crps: Float[Tensor, " H"]
    coverage50: Float[Tensor, " H"]
    coverage90: Float[Tensor, " H"]
    spread_skill: Float[Tensor, " H"]
    spread_knows: Float[Tensor, " H"]

    @classmethod
    def unknown(cls, horizon: int, samples: int = SAMPLES) -> Calibration:
        """Of a model without a decoder, of pictures alone, or without anything real to compare with."""
        return cls(samples, torch.zeros(horizon, dtype=torch.int64), *torch.full((5, horizon), torch.nan))

    def columns(self) -> dict[str, Float[Tensor, " H"]]:
        """The five measures by the names that `worldmodel dream` and TensorBoard give them."""
        return {
            "crps": self.crps,
            "coverage50": self.coverage50,
            "coverage90": self.coverage90,
            "spread_skill": self.spread_skill,
            "spread_knows": self.spread_knows,
        }


@torch.no_grad()
def calibrate(
    world: WorldModel,
    episodes: Episodes,
    context: int = 5,
    horizon: int = 15,
    *,
    samples: int = SAMPLES,
    every: int = EVERY,
    generator: torch.Generator | None = None,
) -> Calibration:
    """Calibration of open-loop predictions up to `horizon` steps ahead, from every `every`-th row as in `open_loop`.

    What is drawn is the *observation*: a sampled roll-out of the latent, and the decoder's own noise on it (`decoder.sample`).
    Numbers are compared in deviations (`scaling.deviation`). Pictures are left out: their pixels are no independent numbers.

    samples  draws for each start, at least 2; 19, 39, ... read coverage without interpolation (`coverage`)

    Raises ConfigError.
    """
    if samples < 2 or every < 1:
        raise ConfigError(
            f"calibrate: samples={samples}, every={every}. Expected at least 2 samples, whose spread is compared with the "
            "error, and a start every 1 row or more."
        )
    keys = [name for name, key in world.obs.keys.items() if key.kind != "image"]
    if world.decoder is None or not keys:
        return Calibration.unknown(horizon, samples)
    episode, start = spaced_starts(episodes, context, every)
    size = sum(math.prod(key.shape) for key in world.obs.keys.values())
    at_once = max(1, min(ROLLOUTS_AT_ONCE, NUMBERS_AT_ONCE // (horizon * size)) // samples)
    parts = []
    for rows in torch.arange(len(episode)).split(at_once) if len(episode) else ():
        options = {"samples": samples, "generator": generator, "draw": True}
        roll = roll_out(world, episodes, episode[rows], start[rows], context, horizon, **options)
        errors = [
            ((roll.imagined[name] - roll.truth[name][:, None, context:]) / world.scaling.deviation(name)).flatten(3)
            for name in keys
        ]
        parts.append([x.cpu() for x in (roll.inside[:, context:], *draw_scores(torch.cat(errors, -1).float()))])
    if not parts:
        return Calibration.unknown(horizon, samples)
    return _by_horizon(samples, *(torch.cat(column) for column in zip(*parts)))


def draw_scores(errors: Float[Tensor, "S K H D"]) -> tuple[Tensor, Tensor, Tensor]:
    """(CRPS and coverages [S, H, 3], squared errors of the mean [S, H, D], variances [S, H, D]) of draws less the observation."""
    observed = torch.zeros_like(errors[:, 0])
    scores = [fair_crps(errors, observed), coverage(errors, observed, 0.5), coverage(errors, observed, 0.9)]
    return torch.stack([x.mean(-1) for x in scores], -1), errors.mean(1).square(), errors.var(1)


def _by_horizon(
    samples: int,
    inside: Bool[Tensor, "S H"],
    scores: Float[Tensor, "S H 3"],
    square: Float[Tensor, "S H D"],
    variance: Float[Tensor, "S H D"],
) -> Calibration:
    """The measures of each horizon over the starts at which it fits."""
    found = torch.full((5, inside.shape[1]), torch.nan)
    for h, fits in enumerate(inside.T):
        if fits.any():
            error, spread = square[fits, h], variance[fits, h]
            found[:3, h] = scores[fits, h].mean(0)
            found[3, h] = spread_skill(spread, error, samples)
        if int(fits.sum()) >= MIN_STARTS:
            found[4, h] = spread_knows(spread, error, samples)
    return Calibration(samples, inside.sum(0), *found)
