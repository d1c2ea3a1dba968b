"""What a diagnosis is made of: filtered episodes to look at, and the figures and sentences that come of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from worldmodel.data import Episodes, Sampling
from worldmodel.diagnostics.geometry import FilteredStates
from worldmodel.distributions import ConditionalDistribution
from worldmodel.model import WorldModel

Slot = Literal["initial", "transition", "marginal"]
LEVEL = 0.95
"""Probability of every interval in a diagnosis."""
RESAMPLES = 1000


# Figures --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    """One measured number, and its interval of LEVEL where it has one. None: it could not be measured."""

    value: float | None
    low: float | None = None
    high: float | None = None
    unit: str = ""

    def __post_init__(self) -> None:
        for name in ("value", "low", "high"):
            number = getattr(self, name)
            object.__setattr__(self, name, float(number) if number is not None and math.isfinite(number) else None)

    @property
    def known(self) -> bool:
        return self.value is not None

    def surely_above(self, bound: float) -> bool:
        """Whether the whole interval lies above; without an interval the value itself."""
        lowest = self.value if self.low is None else self.low
        return lowest is not None and lowest > bound

    def surely_below(self, bound: float) -> bool:
        """Whether the whole interval lies below; without an interval the value itself."""
        highest = self.value if self.high is None else self.high
        return highest is not None and highest < bound

    def __str__(self) -> str:
        if self.value is None:
            return "-"
        unit = f" {self.unit}" if self.unit else ""
        interval = "" if self.low is None or self.high is None else f" ({self.low:.3g} to {self.high:.3g})"
        return f"{self.value:.3g}{unit}{interval}"


@dataclass(frozen=True)
class Curve:
    """Lines over one axis, for a plot: {name: values}, None where a value is unknown."""

    x: list[float]
    lines: dict[str, list[float | None]]
    x_label: str
    y_label: str


@dataclass(frozen=True)
class Section:
    """One part of a diagnosis.

    figures    {name: Figure}, by names that no other section has
    skipped    why the section, or a part of it, was not measured
    sentences  what the figures say, plainly, each citing its figure and, where something is wrong, the command that mends it
    curves     {title: Curve} to be drawn
    """

    figures: dict[str, Figure] = field(default_factory=dict)
    skipped: str | None = None
    sentences: tuple[str, ...] = ()
    curves: dict[str, Curve] = field(default_factory=dict)


# Evidence -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evidence:
    """What the sections read. The model has learned from `fitted` alone; where it could not be otherwise, a diagnosis says so.

    world       the model in eval mode
    run         name of the run's folder, for the commands in sentences
    fitted      replayed episodes, which the model learned from
    validation  held-out episodes that choices are made on
    test        held-out episodes that figures are of
    episodes    all held-out episodes, raw
    seed        of every generator
    """

    world: WorldModel
    run: str
    fitted: FilteredStates
    validation: FilteredStates
    test: FilteredStates
    episodes: Episodes
    seed: int = 0

    @property
    def train_longer(self) -> str:
        """The command that goes on with the run's training."""
        return f"`worldmodel train {self.run} --resume --steps N`, with N above the run's steps"

    def generator(self, number: int = 0) -> torch.Generator:
        """A generator of its own for each use: equal numbers give equal draws."""
        return torch.Generator(self.world.device).manual_seed(self.seed + number)


@dataclass(frozen=True)
class SlotLatents:
    """Latents at R rows, as inferred from the observation and as the prior of a slot draws them in their place.

    inferred  [R, Z]  draws of the posterior
    drawn     [R, Z]  draws of the prior, at the same contexts
    context   [R, C]  what the prior is conditioned on; None: nothing
    episode   [R]     number of the row's episode
    """

    inferred: Float[Tensor, "R Z"]
    drawn: Float[Tensor, "R Z"]
    context: Float[Tensor, "R C"] | None
    episode: Int[Tensor, " R"]


def prior_of(world: WorldModel, slot: Slot) -> ConditionalDistribution | None:
    """The prior in a slot; None where there is none."""
    return {
        "initial": getattr(world.dynamics, "initial_prior", None),
        "transition": world.dynamics.transition,
        "marginal": world.marginal,
    }[slot]


def rows_of(seen: FilteredStates, slot: Slot) -> Bool[Tensor, " R"]:
    """The rows that a slot's prior is for: the first ones of episodes, all others, or all."""
    first = seen.step == 0
    return {"initial": first, "transition": ~first, "marginal": torch.ones_like(first)}[slot]


def posterior_draws(world: WorldModel, seen: FilteredStates, generator: torch.Generator) -> Float[Tensor, "R Z"]:
    """One draw of each row's posterior, which is the latent itself where latents are points."""
    return world.dynamics.latent.draw(seen.posterior, Sampling(generator=generator), seen.z.shape[:1], seen.z.device)


@torch.no_grad()
def slot_latents(world: WorldModel, seen: FilteredStates, slot: Slot, generator: torch.Generator) -> SlotLatents | None:
    """The latents of the rows that a slot's prior is for; None without a prior."""
    prior = prior_of(world, slot)
    if prior is None:
        return None
    rows = rows_of(seen, slot)
    inferred = posterior_draws(world, seen, generator)[rows]
    context = seen.h[rows] if slot == "transition" else None
    sampling = Sampling(generator=generator)
    drawn = prior.sample(context, 1, sampling)[0] if context is not None else prior.sample(None, len(inferred), sampling)[:, 0]
    return SlotLatents(inferred, drawn, context, seen.episode[rows])


def bootstrap(
    values: Float[Tensor, " R"], episode: Int[Tensor, " R"], seed: int = 0, unit: str = "", weight: Tensor | None = None
) -> Figure:
    """The weighted mean of rows, and its interval by resampling episodes: rows of one episode are no independent ones.

    Of one episode there is no interval. Source: Efron and Tibshirani 1993, chapter 8 (blocks).
    """
    values, weight = values.double().cpu(), torch.ones(len(values)).double() if weight is None else weight.double().cpu()
    if not len(values):
        return Figure(None, unit=unit)
    which = episode.cpu().unique(return_inverse=True)[1]
    count = int(which.max()) + 1
    sums, weights = (torch.zeros(count, dtype=torch.float64).index_add_(0, which, x) for x in (values * weight, weight))
    mean = sums.sum() / weights.sum()
    if count < 2:
        return Figure(float(mean), unit=unit)
    drawn = torch.randint(count, (RESAMPLES, count), generator=torch.Generator().manual_seed(seed))
    return Figure(float(mean), *interval(sums[drawn].sum(1) / weights[drawn].sum(1)), unit)


def resampled(
    statistic: Callable[[Tensor], float], episode: Int[Tensor, " R"], seed: int = 0, unit: str = "", resamples: int = RESAMPLES
) -> Figure:
    """A number of rows [M] that is no mean, such as a quantile, and its interval by resampling episodes.

    statistic   of the numbers of rows, which may come several times

    Source: Efron and Tibshirani 1993, chapter 8 (blocks).
    """
    if not len(episode):
        return Figure(None, unit=unit)
    value, groups = statistic(torch.arange(len(episode))), [(episode.cpu() == x).nonzero()[:, 0] for x in episode.cpu().unique()]
    if len(groups) < 2:
        return Figure(value, unit=unit)
    drawn = torch.randint(len(groups), (resamples, len(groups)), generator=torch.Generator().manual_seed(seed)).tolist()
    return Figure(value, *interval(torch.tensor([statistic(torch.cat([groups[i] for i in x])) for x in drawn])), unit)


def interval(resampled: Float[Tensor, " K"]) -> tuple[float, float]:
    """The central interval of LEVEL of resampled figures."""
    low, high = torch.as_tensor(resampled, dtype=torch.float64).nanquantile(
        torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    )
    return float(low), float(high)


def joined(sections: Sequence[Section]) -> Section:
    """Several sections as one; reasons for what was skipped are listed."""
    reasons = [section.skipped for section in sections if section.skipped]
    return Section(
        {name: figure for section in sections for name, figure in section.figures.items()},
        " ".join(reasons) or None,
        tuple(text for section in sections for text in section.sentences),
        {name: curve for section in sections for name, curve in section.curves.items()},
    )
