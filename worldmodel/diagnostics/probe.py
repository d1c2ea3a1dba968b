"""What decoded pictures show, in the environment's own numbers: a probe reads its state off them.

The probe is fitted to real pictures of one half of the held-out episodes, and measured on the other half.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from worldmodel.data import Batch, Episodes
from worldmodel.diagnostics.evidence import Evidence, Figure, Section, Slot, bootstrap
from worldmodel.diagnostics.fidelity import rolled, root
from worldmodel.diagnostics.holes import (
    CLEAR,
    CLEAR_OF_RANGE,
    LARGEST_STEP,
    MIN_ROWS,
    another_prior,
    decodes_draws,
    holes_between,
    pictures_of,
    slot_features,
)
from worldmodel.diagnostics.rollouts import spaced_starts
from worldmodel.diagnostics.usage import spaced
from worldmodel.model import WorldModel

ROWS, STARTS, SAMPLES = 1000, 60, 4
"""Pictures that the probe is fitted to, and as many that it is measured on; roll-outs' starts at most, and draws of each."""
HORIZONS = (1, 5, 15)
RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
SHOWN = 0.8
"""Share of a number's variance from which pictures are said to tell it."""
LOST = 0.7
"""Deviations of the state from which dreams have lost it: more than half of its variance. A constant errs by 1."""


@dataclass(frozen=True)
class States:
    """The environment's numbers at the rows of held-out episodes [R, S], in its units, and their names."""

    numbers: Float[Tensor, "R S"]
    names: tuple[str, ...]


class Probe:
    """Kernel ridge regression from pictures to numbers, with a Gaussian kernel as wide as pictures are apart (median).

    The ridge is the one of RIDGES whose leave-one-out error is least. Pictures unlike all known ones give the numbers' mean.
    Source: Rasmussen and Williams 2006, eqs. 2.25 and 5.12.
    """

    def __init__(self, pictures: Float[Tensor, "N D"], numbers: Float[Tensor, "N S"]):
        self.pictures, self.mean, self.deviation = pictures, numbers.mean(0), numbers.std(0)
        apart = torch.cdist(pictures, pictures)
        self.width = apart.median().clamp_min(1e-6)
        kernel, target = self._kernel(apart), self.standard(numbers)
        best = torch.inf
        for ridge in RIDGES:
            inverse = torch.linalg.inv(kernel + ridge * torch.eye(len(kernel), device=kernel.device))
            weights = inverse @ target
            error = float((weights / inverse.diagonal().unsqueeze(-1)).square().mean())
            if error < best:
                best, self.weights = error, weights

    def _kernel(self, apart: Tensor) -> Float[Tensor, "N M"]:
        return (-0.5 * (apart / self.width).square()).exp().double()

    def standard(self, numbers: Float[Tensor, "*N S"]) -> Float[Tensor, "*N S"]:
        """In deviations from the mean of those that it was fitted to."""
        return (numbers - self.mean) / self.deviation.clamp_min(1e-9)

    def __call__(self, pictures: Float[Tensor, "*N D"]) -> Float[Tensor, "*N S"]:
        """The numbers that pictures show, in deviations."""
        flat = pictures.flatten(0, -2)
        found = torch.cat([self._kernel(torch.cdist(part, self.pictures)) @ self.weights for part in flat.split(4096)])
        return found.unflatten(0, pictures.shape[:-1])


@dataclass(frozen=True)
class Read:
    """A probe, what it was fitted and measured on, and which numbers pictures tell.

    shown   [S]     share of each number's variance that the probe explains in other episodes
    which  [T]     the numbers of which that is enough
    """

    probe: Probe
    world: WorldModel
    states: States
    episodes: Episodes
    shown: Float[Tensor, " S"]
    which: Int[Tensor, " T"]

    @cached_property
    def columns(self) -> Episodes:
        """The held-out episodes with the shown numbers, in deviations, in place of observations."""
        numbers = self.probe.standard(self.states.numbers.to(self.probe.mean))[:, self.which].cpu()
        return Episodes(self.episodes.rows.with_obs({"state": numbers.unsqueeze(0)}))

    def of(self, pictures: Float[Tensor, "*N D"]) -> Float[Tensor, "*N T"]:
        """The shown numbers of pictures, in deviations."""
        return self.probe(pictures)[..., self.which]


def pictures_at(world: WorldModel, rows: Batch, index: Tensor) -> Float[Tensor, "N D"]:
    """The pictures of some rows of a Batch [1, R]."""
    return pictures_of(world, world.obs.canonical({name: x[0, index].to(world.device) for name, x in rows.obs.items()}))


def fitted(evidence: Evidence, states: States) -> tuple[Read, Int[Tensor, " N"]] | str:
    """(the probe, the rows that it was measured on); or why there is none."""
    world, episodes = evidence.world, evidence.episodes
    number = episodes.rows.is_first[0].cumsum(0) - 1
    learn, test = (spaced((number % 2 == half).nonzero()[:, 0], ROWS) for half in (1, 0))
    if min(len(learn), len(test)) < MIN_ROWS:
        return f"because {len(learn)} pictures are too few to fit a probe to; {MIN_ROWS} are needed"
    numbers = states.numbers.to(world.device)
    probe = Probe(pictures_at(world, episodes.rows, learn), numbers[learn])
    away = (probe(pictures_at(world, episodes.rows, test)) - probe.standard(numbers[test])).square().mean(0)
    varies = probe.standard(numbers[test]).var(0)
    shown = torch.where(varies > 1e-6, 1 - away / varies.clamp_min(1e-6), 0.0).cpu()
    which = (shown >= SHOWN).nonzero()[:, 0]
    if not len(which):
        return f"because single pictures tell {float(shown.max()):.2g} of the variance of a state's number at most"
    return Read(probe, world, states, episodes, shown, which), test


# The section ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def probed(evidence: Evidence, slot: Slot, states: States | str, context: int = 5, horizon: int = 15) -> Section:
    """Errors of reconstructions and dreams in the environment's own numbers, and whether those of draws and dreams can be.

    states   at all rows of `evidence.episodes`, or why they are not known
    """
    what = "What pictures show was not measured in the environment's own numbers,"
    if not any(key.kind == "image" for key in evidence.world.obs.keys.values()):
        return Section()  # decoded vectors have these units themselves
    if evidence.world.decoder is None:
        return Section(skipped=f"{what} because there is no decoder.")
    found = states if isinstance(states, str) else fitted(evidence, states)
    if isinstance(found, str):
        return Section(skipped=f"{what} {found}.")
    read, test = found
    figures, sentences = _dreams(evidence, read, test, context, horizon)
    invalid = _invalid(evidence, read, slot) if decodes_draws(evidence.world, slot) else None
    if invalid is not None:
        figures[f"{slot} invalid state"] = invalid
        if invalid.surely_above(CLEAR):
            text = (
                f"Pictures that the {slot} prior draws show a state that no real one shows, in a share of {invalid}; another form"
            )
            sentences.append(f"{text} may help: {another_prior(evidence, slot)}.")
    return Section(figures, None, tuple(sentences))


def _names(read: Read) -> list[str]:
    return [read.states.names[i] for i in read.which.tolist()]


def _invalid(evidence: Evidence, read: Read, slot: Slot) -> Figure | None:
    """The share of draws whose pictures show numbers where none of real latents' pictures do; None for too few rows."""
    world, rows = evidence.world, slot_features(evidence.world, evidence.test, slot, evidence.generator(61), ROWS)
    if rows is None:
        return None
    made, own = (read.of(pictures_of(world, world.decode(x))).float() for x in (rows.drawn, rows.inferred))
    found = holes_between(own, made, rows.episode)
    return None if found is None else bootstrap(found.hole, rows.episode, evidence.seed, "of the draws, less the floor")


def _dreams(
    evidence: Evidence, read: Read, test: Int[Tensor, " N"], context: int, horizon: int
) -> tuple[dict[str, Figure], list[str]]:
    """Errors of the state by horizon, and steps of dreams that are larger than real ones; and what they say."""
    world, seed, episodes = evidence.world, evidence.seed, evidence.episodes
    truth = read.columns.rows.obs["state"][0]
    number = (episodes.rows.is_first[0].cumsum(0) - 1).cpu()
    unit = "deviations of the state"
    own = read.of(pictures_at(world, episodes.rows, test)).cpu() - truth[test]
    figures = {
        "state shown by pictures": Figure(float(read.shown[read.which].mean()), unit="of its variance"),
        "state numbers shown": Figure(len(read.which), unit=f"of {len(read.shown)}"),
        "state error of real pictures": root(bootstrap(own.square().mean(1), number[test], seed, unit)),
    }
    episode, start = spaced_starts(episodes, context, 1)
    index = spaced((episode % 2 == 0).nonzero()[:, 0], STARTS)
    starts, parts = (episode[index], start[index]), []
    for roll in rolled(world, episodes, starts, context, horizon, SAMPLES, evidence.generator(62)):
        images = [name for name, key in world.obs.keys.items() if key.kind == "image"]
        seen, made = (
            torch.cat([x[name].clamp(0, 1).flatten(lead) for name in images], -1)
            for x, lead in ((roll.seen, 2), (roll.imagined, 3))
        )
        parts.append((read.of(seen[:, -1]).cpu(), read.of(made).cpu(), roll.inside[:, context:].cpu()))
    if not parts:
        return figures, [f"A probe tells {', '.join(_names(read))} from real pictures; no episode has more than {context} rows."]
    seen, made, inside = (torch.cat(x) for x in zip(*parts))
    window = read.columns.windows(*starts, context + horizon)[0].obs["state"]
    figures["state error of decoded pictures"] = root(
        bootstrap((seen - window[:, context - 1]).square().mean(1), starts[0], seed, unit)
    )
    square = (made.mean(1) - window[:, context:]).square()
    known = [h for h in HORIZONS if h <= horizon and bool(inside[:, h - 1].any())]
    for h in known:
        rows = inside[:, h - 1]
        figures[f"state error at {h}"] = root(bootstrap(square[rows, h - 1].mean(1), starts[0][rows], seed, unit))
    rows, last = inside[:, known[-1] - 1], known[-1]
    scale = read.probe.deviation.cpu()[read.which]
    each = {
        f"state {number} error at {last}": root(bootstrap(square[rows, last - 1, i] * scale[i] ** 2, starts[0][rows], seed, name))
        for i, (number, name) in enumerate(zip(read.which.tolist(), _names(read)))
    }
    figures |= each
    jumps = figures["state teleports"] = _jumps(read, seen, made, inside, starts[0], seed)
    return figures, list(_verdicts(evidence, figures, each, last, jumps))


def _jumps(read: Read, seen: Tensor, made: Tensor, inside: Tensor, episode: Tensor, seed: int) -> Figure:
    """The share of imagined steps whose numbers move farther than real ones do, as the probe reads them, less the floor."""
    rows = spaced(torch.arange(read.episodes.rows.shape[1] - 1), 2 * ROWS)
    rows = rows[~read.episodes.rows.is_first[0, rows + 1].cpu()]
    one, other = (read.of(pictures_at(read.world, read.episodes.rows, x)).cpu() for x in (rows, rows + 1))
    largest = (other - one).norm(dim=-1).quantile(LARGEST_STEP)
    path = torch.cat([seen.unsqueeze(1).unsqueeze(1).expand(-1, made.shape[1], 1, -1), made], 2)
    far = (path.diff(dim=2).norm(dim=-1) > largest).float().mean(1)
    known = inside.any(1)
    share = (far * inside).sum(1)[known] / inside.sum(1)[known]
    return bootstrap(share - (1 - LARGEST_STEP), episode[known], seed, "of the imagined steps, less the floor")


def _verdicts(evidence: Evidence, figures: dict[str, Figure], each: dict[str, Figure], last: int, jumps: Figure) -> list[str]:
    """How far dreams are off, and whether they jump."""
    listed = ", ".join(f"{figure.value:.3g} {figure.unit}" for figure in each.values())
    text = f"In the environment's own numbers, pictures imagined {last} steps on are off by: {listed}"
    error, floor = figures[f"state error at {last}"], figures["state error of real pictures"]
    text += f"; that is {error}, where reading them off real pictures errs by {floor.value:.2g}"
    found = [f"{text}; learn for longer: {evidence.train_longer}." if error.surely_above(LOST) else f"{text}."]
    if jumps.surely_above(CLEAR_OF_RANGE):
        text = f"What imagined pictures show moves farther than it ever does in a share of {jumps} of the steps; learn for longer:"
        found.append(f"{text} {evidence.train_longer}.")
    return found
