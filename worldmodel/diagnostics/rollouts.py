"""Open-loop rollouts on held-out episodes: prediction errors by horizon."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from worldmodel.data import Batch, Episodes, Obs, Sampling
from worldmodel.model import WorldModel

NUMBERS_AT_ONCE = 1 << 23
"""Decoded numbers that are held in memory together."""
ROLLOUTS_AT_ONCE = 2048
PARTS = {"0-50": 0, "50-200": 50, "200-": 200}
"""Parts of an episode, by the step of the last context row, and where each begins."""


@dataclass(frozen=True)
class Rollout:
    """Predictions in S windows of C + H rows, of which the first C are the context.

    window       Batch [S, C+H]     raw rows, as observed
    inside       [S, C+H]           rows that belong to the window's episode
    truth        {key: [S, C+H, ...]} canonical observations, as observed
    seen         {key: [S, C, ...]} reconstructions of the context
    imagined     {key: [S, K, H, ...]} expected observations of K sampled rollouts under the recorded actions
    reward, cont [S, K, H]          as predicted on arrival
    uncertainty  [S, K, H]          the ensemble's disagreement; zeros without one
    """

    window: Batch
    inside: Bool[Tensor, "S L"]
    truth: Obs
    seen: Obs
    imagined: Obs
    reward: Float[Tensor, "S K H"]
    cont: Float[Tensor, "S K H"]
    uncertainty: Float[Tensor, "S K H"]


@torch.no_grad()
def roll_out(
    world: WorldModel,
    episodes: Episodes,
    episode: Int[Tensor, " S"],
    start: Int[Tensor, " S"],
    context: int,
    horizon: int,
    *,
    samples: int = 8,
    generator: torch.Generator | None = None,
) -> Rollout:
    """Filters `context` rows from each start, then imagines `horizon` steps under the recorded actions.

    A window that opens within an episode is filtered from zeros, as in training.
    """
    world.eval()
    window, inside = episodes.windows(episode, start, context + horizon)
    window, inside = window.to(world.device), inside.to(world.device)
    sampling = Sampling(generator=generator)
    seen = window.window(0, context).with_obs(world.preprocess({name: x[:, :context] for name, x in window.obs.items()}))
    trace = world.trace(seen.map(lambda x: x.repeat_interleave(samples, 0)), None, sampling)
    action = window.action[:, context - 1 :].repeat_interleave(samples, 0)
    dream = world.imagine(trace.last, lambda feature, step: action[:, step], horizon, sampling)
    shape = (len(episode), samples)
    return Rollout(
        window=window,
        inside=inside,
        truth=world.obs.canonical(window.obs),
        seen=_decoded(world, trace.feature.unflatten(0, shape)[:, 0]),
        imagined=_decoded(world, dream.feature[:, 1:].unflatten(0, shape)),
        reward=dream.reward.unflatten(0, shape),
        cont=dream.cont.unflatten(0, shape),
        uncertainty=dream.uncertainty.unflatten(0, shape),
    )


def _decoded(world: WorldModel, feature: Float[Tensor, "*N F"]) -> Obs:
    """Expected canonical observations, with the feature's leading dimensions; {} without a decoder."""
    obs = {} if world.decoder is None else world.decode(feature.flatten(0, -2))
    return {name: x.unflatten(0, feature.shape[:-1]) for name, x in obs.items()}


@dataclass(frozen=True)
class OpenLoop:
    """Errors at horizons 1..H; NaN at a horizon that fits into no episode, and for observations without a decoder.

    context      context rows of each rollout
    count        [H]          starts at which the horizon fits
    squares      {key: [H, D]} mean squared error of the mean prediction, in units of the run's deviation (pixels: of [0, 1])
    persistence  {key: [H, D]} the same of the last context observation, repeated
    reward       [H]          root mean square in reward units
    cont         [H]          Brier score of P(no termination)
    uncertainty  [H]          mean disagreement of the ensemble, in deviations of the embedding; NaN without one
    parts        the same of the rollouts that start in each of PARTS
    """

    context: int
    count: Int[Tensor, " H"]
    squares: dict[str, Float[Tensor, "H D"]]
    persistence: dict[str, Float[Tensor, "H D"]]
    reward: Float[Tensor, " H"]
    cont: Float[Tensor, " H"]
    uncertainty: Float[Tensor, " H"]
    parts: dict[str, OpenLoop] = field(default_factory=dict)

    @classmethod
    def unknown(cls, context: int, horizon: int) -> OpenLoop:
        """Of rollouts without real observations to compare with."""
        nothing = torch.full((horizon,), torch.nan)
        return cls(context, torch.zeros(horizon, dtype=torch.int64), {}, {}, nothing, nothing, nothing)

    @property
    def horizons(self) -> list[int]:
        return list(range(1, len(self.count) + 1))

    def error(self) -> Float[Tensor, " H"]:
        """Root mean square over starts and all numbers of an observation."""
        return _pooled(self.squares, len(self.count))

    def baseline(self) -> Float[Tensor, " H"]:
        """The same of persistence."""
        return _pooled(self.persistence, len(self.count))

    def ratio(self) -> Float[Tensor, " H"]:
        """Error over that of persistence; NaN where persistence has none."""
        baseline = self.baseline()
        return torch.where(baseline > 0, self.error() / baseline, torch.nan)

    def worst(self, horizon: int, keys: list[str]) -> tuple[str, int, float, float] | None:
        """(key, index, root mean square, ratio to persistence) of the number with the largest error, in deviations."""
        errors = [(float(self.squares[k][horizon - 1].max()), k, int(self.squares[k][horizon - 1].argmax())) for k in keys]
        if not errors or not self.count[horizon - 1]:
            return None
        square, key, index = max(errors)
        baseline = float(self.persistence[key][horizon - 1, index])
        return key, index, square**0.5, (square / baseline) ** 0.5 if baseline else float("nan")

    def longest(self, max_horizon: int) -> int | None:
        """The longest horizon up to `max_horizon` that fits anywhere."""
        return max((h for h, n in zip(self.horizons, self.count.tolist()) if n and h <= max_horizon), default=None)


def open_loop(
    world: WorldModel,
    episodes: Episodes,
    context: int = 5,
    horizon: int = 15,
    *,
    samples: int = 8,
    every: int = 10,
    generator: torch.Generator | None = None,
) -> OpenLoop:
    """Errors of open-loop predictions up to `horizon` steps ahead, and of persistence.

    The prediction is the mean of the decoder's means over `samples` rollouts. A rollout starts at every `every`-th row of an
    episode where context and at least one step fit, and counts at the horizons that fit.
    """
    sizes = {} if world.decoder is None else {name: math.prod(key.shape) for name, key in world.obs.keys.items()}
    sums = [_Sums(horizon, sizes) for _ in PARTS]
    episode, start = _starts(episodes, context, every)
    part = torch.bucketize(start + context - 1, torch.tensor(list(PARTS.values())[1:]), right=True)
    at_once = max(1, min(ROLLOUTS_AT_ONCE, NUMBERS_AT_ONCE // (horizon * max(1, sum(sizes.values())))) // samples)
    for rows in torch.arange(len(episode)).split(at_once) if len(episode) else ():
        roll = roll_out(world, episodes, episode[rows], start[rows], context, horizon, samples=samples, generator=generator)
        for which in part[rows].unique().tolist():
            sums[which].add(world, roll, torch.nonzero(part[rows] == which)[:, 0].to(world.device), context)
    total = _Sums(horizon, sizes)
    for own in sums:
        total.merge(own)
    has_ensemble = world.ensemble is not None
    parts = {name: own.means(context, has_ensemble) for name, own in zip(PARTS, sums)}
    return replace(total.means(context, has_ensemble), parts=parts)


class _Sums:
    """Squared errors of rollouts, summed by horizon."""

    def __init__(self, horizon: int, sizes: dict[str, int]):
        self.squares, self.persistence = ({name: torch.zeros(horizon, d) for name, d in sizes.items()} for _ in range(2))
        self.columns = torch.zeros(4, horizon)  # count, reward, continue, uncertainty

    def add(self, world: WorldModel, roll: Rollout, chosen: Int[Tensor, " N"], context: int) -> None:
        """Adds the rollouts of some of the starts."""
        inside, observed = roll.inside[chosen, context:].float(), roll.window.window(context)
        reward = (roll.reward[chosen].mean(1) - observed.reward[chosen]).square()
        cont = (roll.cont[chosen].mean(1) - (~observed.is_terminal[chosen]).float()).square()
        per_step = torch.stack([torch.ones_like(inside), reward, cont, roll.uncertainty[chosen].mean(1)])
        self.columns += (inside * per_step).sum(1).cpu()
        for name in self.squares:
            x, unit = roll.truth[name][chosen], world.scaling.deviation(name)
            weight = inside.view(*inside.shape, *[1] * (x.ndim - 2))
            error = weight * ((roll.imagined[name][chosen].mean(1) - x[:, context:]) / unit).square()
            persistence_error = weight * ((x[:, context - 1 : context] - x[:, context:]) / unit).square()
            self.squares[name] += error.sum(0).flatten(1).cpu()
            self.persistence[name] += persistence_error.sum(0).flatten(1).cpu()

    def merge(self, other: _Sums) -> None:
        self.columns += other.columns
        for mine, theirs in ((self.squares, other.squares), (self.persistence, other.persistence)):
            for name, x in theirs.items():
                mine[name] += x

    def means(self, context: int, has_ensemble: bool) -> OpenLoop:
        count, reward, cont, uncertainty = self.columns
        squares, persistence = ({k: x / count.unsqueeze(-1) for k, x in s.items()} for s in (self.squares, self.persistence))
        uncertainty = uncertainty / count if has_ensemble else torch.full_like(count, torch.nan)
        return OpenLoop(context, count.to(torch.int64), squares, persistence, (reward / count).sqrt(), cont / count, uncertainty)


def _starts(episodes: Episodes, context: int, every: int) -> tuple[Int[Tensor, " S"], Int[Tensor, " S"]]:
    """(episode, first row) of every window with room for its context and one more row."""
    firsts = [torch.arange(0, max(0, int(n) - context), every) for n in episodes.lengths]
    episode = torch.repeat_interleave(torch.arange(len(firsts)), torch.tensor([len(f) for f in firsts]))
    return episode, torch.cat(firsts)


def _pooled(squares: dict[str, Float[Tensor, "H D"]], horizons: int) -> Float[Tensor, " H"]:
    """Root mean square over the numbers of all keys; NaN without any."""
    if not squares:
        return torch.full((horizons,), torch.nan)
    return torch.cat(list(squares.values()), 1).mean(1).sqrt()
