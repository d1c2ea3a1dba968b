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
    imagined     {key: [S, K, H, ...]} expected observations of K sampled rollouts under the recorded actions; draws if asked for
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
    draw: bool = False,
) -> Rollout:
    """Filters `context` rows from each start, then imagines `horizon` steps under the recorded actions.

    draw   `imagined` are draws of the observation, with the decoder's own noise, instead of expected ones

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
        imagined=_decoded(world, dream.feature[:, 1:].unflatten(0, shape), sampling if draw else None),
        reward=dream.reward.unflatten(0, shape),
        cont=dream.cont.unflatten(0, shape),
        uncertainty=dream.uncertainty.unflatten(0, shape),
    )


def _decoded(world: WorldModel, feature: Float[Tensor, "*N F"], draws: Sampling | None = None) -> Obs:
    """Canonical observations, expected ones or draws, with the feature's leading dimensions; {} without a decoder."""
    flat = feature.flatten(0, -2)
    if world.decoder is None:
        obs = {}
    elif draws is None:
        obs = world.decode(flat)
    else:
        obs = world.scaling.inverse(world.decoder.sample(flat, draws))
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
    sums = torch.zeros(len(PARTS), horizon, 4 + 2 * sum(sizes.values()))
    episode, start = spaced_starts(episodes, context, every)
    part = torch.bucketize(start + context - 1, torch.tensor(list(PARTS.values())[1:]), right=True)
    at_once = max(1, min(ROLLOUTS_AT_ONCE, NUMBERS_AT_ONCE // (horizon * max(1, sum(sizes.values())))) // samples)
    for rows in torch.arange(len(episode)).split(at_once) if len(episode) else ():
        roll = roll_out(world, episodes, episode[rows], start[rows], context, horizon, samples=samples, generator=generator)
        errors = _errors(world, roll, context)
        for which in part[rows].unique().tolist():
            sums[which] += errors[(part[rows] == which).to(errors.device)].sum(0).cpu()
    has_ensemble = world.has_uncertainty
    parts = {name: _means(own, sizes, context, has_ensemble) for name, own in zip(PARTS, sums)}
    return replace(_means(sums.sum(0), sizes, context, has_ensemble), parts=parts)


def _errors(world: WorldModel, roll: Rollout, context: int) -> Float[Tensor, "S H C"]:
    """At each step: 1, squared errors of reward and continue, uncertainty, squared errors of all numbers of an observation, and the
    same of persistence; zeros after the episode's end."""
    inside, observed = roll.inside[:, context:].float(), roll.window.window(context)
    reward = (roll.reward.mean(1) - observed.reward).square()
    cont = (roll.cont.mean(1) - (~observed.is_terminal).float()).square()
    per_step = torch.stack([torch.ones_like(inside), reward, cont, roll.uncertainty.mean(1)], -1)
    squares, persistence = [], []
    for name, imagined in roll.imagined.items():
        truth, unit = roll.truth[name], world.scaling.deviation(name)
        squares.append(((imagined.mean(1) - truth[:, context:]) / unit).square().flatten(2))
        persistence.append(((truth[:, context - 1 : context] - truth[:, context:]) / unit).square().flatten(2))
    return inside.unsqueeze(-1) * torch.cat([per_step, *squares, *persistence], -1)


def _means(sums: Float[Tensor, "H C"], sizes: dict[str, int], context: int, has_ensemble: bool) -> OpenLoop:
    """The errors of `_errors` summed over rollouts -> their means, by observation key of so many numbers."""
    count, width = sums[:, 0], sum(sizes.values())
    per_step, *observations = (sums / count.unsqueeze(-1)).split([4, width, width], -1)
    _, reward, cont, uncertainty = per_step.unbind(-1)
    squares, persistence = (dict(zip(sizes, x.split(list(sizes.values()), -1))) if sizes else {} for x in observations)
    if not has_ensemble:
        uncertainty = torch.full_like(count, torch.nan)
    return OpenLoop(context, count.to(torch.int64), squares, persistence, reward.sqrt(), cont, uncertainty)


def spaced_starts(episodes: Episodes, context: int, every: int) -> tuple[Int[Tensor, " S"], Int[Tensor, " S"]]:
    """(episode, first row) of every window with room for its context and one more row."""
    firsts = [torch.arange(0, max(0, int(n) - context), every) for n in episodes.lengths]
    episode = torch.repeat_interleave(torch.arange(len(firsts)), torch.tensor([len(f) for f in firsts]))
    return episode, torch.cat(firsts)


def _pooled(squares: dict[str, Float[Tensor, "H D"]], horizons: int) -> Float[Tensor, " H"]:
    """Root mean square over the numbers of all keys; NaN without any."""
    if not squares:
        return torch.full((horizons,), torch.nan)
    return torch.cat(list(squares.values()), 1).mean(1).sqrt()
