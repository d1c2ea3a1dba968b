"""Holes: where a prior draws latents that no observation has, and what observations have that it never draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from worldmodel.data import Episodes, Obs, Sampling
from worldmodel.diagnostics.evidence import (
    Evidence,
    Figure,
    Section,
    Slot,
    bootstrap,
    joined,
    posterior_draws,
    prior_of,
    resampled,
    rows_of,
)
from worldmodel.diagnostics.geometry import FilteredStates
from worldmodel.diagnostics.rollouts import ROLLOUTS_AT_ONCE, spaced_starts
from worldmodel.diagnostics.usage import reads_off, spaced, with_latent
from worldmodel.distributions import Posterior
from worldmodel.model import WorldModel

DISTANCES_AT_ONCE = 1 << 24
"""Distances that are held in memory together."""
NEIGHBOURS = 5
SHARE = 0.99
"""Of real latents that lie within the radius: the rest is what the figures subtract."""
CLEAR, CLEAR_OF_RANGE = 0.05, 0.01
"""Shares that are called wrong, where the whole interval lies above. Rows of an episode lie near one another, so that a few
episodes show a part of where latents can be: ten short ones leave 3 % of a right prior's independent draws outside."""
MOVED, FAR = 1.2, 0.5
"""Ratio and distance from which draws do not come back from decoding and encoding."""
GREY = 1 / 255
"""One grey level: smaller changes of a picture are none, and real pictures count as at least so far from one another."""
MIN_ROWS = 40
"""Rows, of two episodes or more, below which there is no saying what is near."""
MAX_ROWS, MAX_PICTURES = 2000, 500
CONTEXT, HORIZON, EVERY = 5, 15, 3
"""Rows that are seen before latents are imagined, steps that they are imagined on, and rows between two starts."""
MARGIN = 0.1
"""Of a number's range, to both of its sides, before it counts as outside."""
LARGEST_STEP = 0.999
"""Quantile of real steps above which one is a teleport."""


# Estimators -----------------------------------------------------------------------------------------------------------


def nearest(x: Float[Tensor, "N D"], reference: Float[Tensor, "M D"], neighbours: int = 1) -> Float[Tensor, " N"]:
    """The distance of each point to the k-th nearest of `reference`, or the farthest where there are fewer."""
    rows, k = max(1, DISTANCES_AT_ONCE // max(1, len(reference))), min(neighbours, len(reference))
    parts = [torch.cdist(part, reference).topk(k, largest=False).values[:, -1] for part in x.split(rows)]
    return torch.cat(parts) if len(x) else x.new_zeros(0)


def outside(
    x: Float[Tensor, "N D"],
    like: Float[Tensor, "L D"],
    reference: Float[Tensor, "M D"],
    neighbours: int = NEIGHBOURS,
    share: float = SHARE,
) -> tuple[Bool[Tensor, " N"], Bool[Tensor, " L"]]:
    """Whether points of `x`, and of `like`, are farther from `reference` than `share` of `like` are, by the k-th neighbour.

    Where `like` is independent of `reference` and distributed as it is, the second mean is the floor 1 - share, and so is that of
    `x` where it has the same distribution too. Source: Kynkaanniemi et al. 2019, eq. 1, with one radius for all.
    """
    own, radius_of = nearest(x, reference, neighbours), nearest(like, reference, neighbours)
    radius = radius_of.quantile(share)
    return own > radius, radius_of > radius


@dataclass(frozen=True)
class Holes:
    """Of each of R rows: 1 or 0 where the row's draw, and where its real latent, lies outside.

    Less the floor, which is what the same rows of the other side read: rows of the same distribution have a mean of 0.
    """

    hole: Float[Tensor, " R"]
    missed: Float[Tensor, " R"]


def holes_between(
    inferred: Float[Tensor, "R Z"], drawn: Float[Tensor, "R Z"], episode: Int[Tensor, " R"], *, scaled: bool = True
) -> Holes | None:
    """Draws outside the region of real latents (holes), and real latents outside the region of draws (missed).

    Each half of the episodes is judged by the other: all three samples have one size, and nothing is its own neighbour. None for
    fewer than MIN_ROWS rows, or one episode.

    scaled   numbers count in deviations of the real latents; not those of categories, whose rare classes would outweigh all others
    """
    episode = episode.to(inferred.device)
    if len(inferred) < MIN_ROWS or len(episode.unique()) < 2:
        return None
    unit = inferred.std(0) if scaled else torch.ones_like(inferred[0])
    unit = torch.where(unit > 1e-6, unit, 1.0)
    real, made = inferred / unit, drawn / unit
    half = _second_half(episode)
    hole, missed = (torch.zeros(len(real), device=real.device) for _ in range(2))
    for judged in (half, ~half):
        far, floor = outside(made[judged], real[judged], real[~judged])
        hole[judged] = far.float() - floor.float()
        far, floor = outside(real[judged], made[judged], made[~judged])
        missed[judged] = far.float() - floor.float()
    return Holes(hole, missed)


def _second_half(episode: Int[Tensor, " R"]) -> Bool[Tensor, " R"]:
    """Every other episode, in an order in which both halves come to about the same number of rows."""
    number, count = episode.unique(return_counts=True)
    order = count.argsort(descending=True, stable=True)
    return torch.isin(episode, number[order[1::2]])


@torch.no_grad()
def cycle_distance(posterior: Posterior, z: Float[Tensor, "N Z"], unit: Float[Tensor, " Z"]) -> Float[Tensor, " N"]:
    """How far latents are from the posterior of what they decode to: root mean square over their numbers, in its deviations.

    unit   deviations in their place where posteriors are points; numbers of unit and deviation 0 are left out

    Of categorical latents, which have no distance: -ln q(z) per variable, in nats.
    """
    if hasattr(posterior, "probs"):
        return -posterior.log_prob(z) / posterior.probs.shape[-2]
    std = posterior.std if hasattr(posterior, "std") else unit.expand_as(z)
    counted = std > 0
    squares = torch.where(counted, ((z - posterior.mean) / torch.where(counted, std, 1.0)).square(), 0.0)
    return (squares.sum(-1) / counted.sum(-1).clamp_min(1)).sqrt()


@torch.no_grad()
def imagined_latents(
    world: WorldModel, episodes: Episodes, generator: torch.Generator, context: int = CONTEXT, horizon: int = HORIZON
) -> tuple[Float[Tensor, "S H+1 F"], Float[Tensor, "S H+1 F"], Int[Tensor, " S"]]:
    """(features as imagined under the recorded actions, as filtered at the same rows, episodes) from starts all over episodes.

    The first of H+1 features is the start, the same in both. Windows that do not fit into their episode are left out.
    """
    episode, start = spaced_starts(episodes, context, EVERY)
    fits = start + context + horizon <= episodes.lengths[episode]
    index = spaced(fits.nonzero()[:, 0], MAX_ROWS)
    made, real = [], []
    for rows in index.split(ROLLOUTS_AT_ONCE // 4) if len(index) else ():
        window = episodes.windows(episode[rows], start[rows], context + horizon)[0].to(world.device)
        trace = world.trace(window.with_obs(world.preprocess(window.obs)), None, Sampling(generator=generator))
        state, action = trace.states.map(lambda x: x[:, context - 1]), window.action[:, context - 1 :]
        dream = world.imagine(state, lambda feature, step, action=action: action[:, step], horizon, Sampling(generator=generator))
        made.append(dream.feature)
        real.append(trace.feature[:, context - 1 :])
    empty = torch.zeros(0, horizon + 1, world.feature_dim, device=world.device)
    return torch.cat(made) if made else empty, torch.cat(real) if real else empty, episode[index]


def out_of_range(x: Float[Tensor, "*N D"], real: Float[Tensor, "M D"], margin: float = MARGIN) -> Bool[Tensor, "*N"]:
    """Whether any number lies outside min..max of the real ones by more than `margin` of that range."""
    low, high = real.amin(0), real.amax(0)
    slack = margin * (high - low)
    return ((x < low - slack) | (x > high + slack)).any(-1)


# Of a world model -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SlotRows:
    """Features [R, F] at the rows of a slot, with the posterior's draw as latent and with the prior's; [R] numbers of episodes.

    context   h of each row [R, D]
    """

    inferred: Float[Tensor, "R F"]
    drawn: Float[Tensor, "R F"]
    context: Float[Tensor, "R D"]
    episode: Int[Tensor, " R"]


@torch.no_grad()
def slot_features(world: WorldModel, seen: FilteredStates, slot: Slot, generator: torch.Generator, limit: int) -> SlotRows | None:
    """Features at the rows that a slot's prior is for, at most so many; None without a prior.

    Draws stand beside the h of their row. The marginal's do not belong to that h: only what reads the latent alone may read them.
    """
    prior = prior_of(world, slot)
    if prior is None:
        return None
    index, sampling = spaced(rows_of(seen, slot).nonzero()[:, 0], limit), Sampling(generator=generator)
    feature, h = seen.feature[index], seen.h[index]
    inferred = posterior_draws(world, seen, generator)[index]
    drawn = prior.sample(h, 1, sampling)[0] if slot == "transition" else prior.sample(None, len(index), sampling)[:, 0]
    prefix = feature[:, : -inferred.shape[-1]]
    return SlotRows(torch.cat([prefix, inferred], -1), torch.cat([prefix, drawn], -1), h, seen.episode[index])


def decodes_draws(world: WorldModel, slot: Slot) -> bool:
    """Whether the decoder can read a prior's draws: those of the marginal come without an h."""
    return world.decoder is not None and (slot != "marginal" or world.decoder.in_features == world.dynamics.latent.size)


def vector_keys(world: WorldModel) -> list[str]:
    """The keys whose numbers have a scale."""
    return [name for name, key in world.obs.keys.items() if key.kind == "vector"]


def pictures_of(world: WorldModel, obs: Obs) -> Float[Tensor, "N D"]:
    """All pixels of canonical observations side by side, in [0, 1]; D is 0 where there are no pictures."""
    images = [name for name, key in world.obs.keys.items() if key.kind == "image"]
    some = next(iter(obs.values()))
    return torch.cat([some.new_zeros(len(some), 0), *(obs[name].float().clamp(0, 1).flatten(1) for name in images)], -1)


@torch.no_grad()
def decoded_vectors(world: WorldModel, feature: Float[Tensor, "*N F"]) -> Float[Tensor, "*N D"]:
    """The vectors of decoded expected observations side by side, in deviations of the run's own."""
    obs = world.decode(feature.flatten(0, -2))
    return _vectors(world, obs).unflatten(0, feature.shape[:-1])


def _vectors(world: WorldModel, obs: dict[str, Tensor]) -> Float[Tensor, "N D"]:
    return torch.cat([(obs[name] / world.scaling.deviation(name)).float() for name in vector_keys(world)], -1)


def _observed_vectors(world: WorldModel, seen: FilteredStates) -> Float[Tensor, "R D"]:
    """The vectors of filtered rows side by side, in deviations."""
    return _vectors(world, world.obs.canonical({name: x[:, 0].to(world.device) for name, x in seen.rows.obs.items()}))


# The section ----------------------------------------------------------------------------------------------------------


def holes(evidence: Evidence, slot: Slot) -> Section:
    """Whether draws of a slot's prior are latents that observations have, and decode to observations that could be real.

    Figures begin with the slot's name. Shares are less the floor of 1 % that real latents have against one another: 0 is right.
    The transition's draws are measured one step on and HORIZON steps on, under the recorded actions of held-out episodes.
    """
    world = evidence.world
    if prior_of(world, slot) is None:
        return Section(skipped=f"Holes of the {slot} prior were not measured, because the model has none.")
    rows = slot_features(world, evidence.test, slot, evidence.generator(21), MAX_ROWS)
    z_of = world.dynamics.z_of
    scaled = world.dynamics.latent.continuous
    found = None if rows is None else holes_between(z_of(rows.inferred), z_of(rows.drawn), rows.episode, scaled=scaled)
    if found is None:
        count = 0 if rows is None else len(rows.episode)
        reason = f"because {count} test rows of two episodes or more are too few; {MIN_ROWS} are needed."
        return Section(skipped=f"Holes of the {slot} prior were not measured, {reason}")
    sections = [_regions(evidence, slot, found, rows.episode), _cycle(evidence, slot, rows), _validity(evidence, slot, rows)]
    sections.append(_pictures(evidence, slot, rows))
    if slot == "transition":
        sections.append(_imagined(evidence))
    return joined(sections)


def another_prior(evidence: Evidence, slot: Slot) -> str:
    """The command that gives the slot a prior of another form."""
    if evidence.world.dynamics.latent.continuous:
        return f"`worldmodel fit-prior {evidence.run} --slot {slot} --kind flow`"
    return f"`worldmodel fit-prior {evidence.run} --slot {slot} --kind categorical`"


def _regions(evidence: Evidence, slot: Slot, found: Holes, episode: Tensor) -> Section:
    hole = bootstrap(found.hole, episode, evidence.seed, "of the draws, less the floor")
    missed = bootstrap(found.missed, episode, evidence.seed, "of the latents, less the floor")
    sentences = []
    if hole.surely_above(CLEAR):
        text = f"{100 * hole.value:.1f} % of the draws of the {slot} prior fall where no observation's latent is; another form may "
        sentences.append(f"{text}help: {another_prior(evidence, slot)}.")
    if missed.surely_above(CLEAR):
        text = (
            f"{100 * missed.value:.1f} % of the observations' latents are where the {slot} prior does not draw; another form may "
        )
        sentences.append(f"{text}help: {another_prior(evidence, slot)}.")
    if not sentences:
        text = f"The {slot} prior draws where latents are: {max(0, 100 * hole.value):.1f} % of its draws fall into holes"
        sentences.append(f"{text}, and it misses {max(0, 100 * missed.value):.1f} %.")
    return Section({f"{slot} hole mass": hole, f"{slot} missed mass": missed}, None, tuple(sentences))


def _cycle(evidence: Evidence, slot: Slot, rows: SlotRows) -> Section:
    """Decode and encode again: how far draws come back from themselves, beside how far real latents do."""
    world = evidence.world
    if reads_off(world):
        return Section(skipped="Decoding and encoding again was not measured: the decoder reads the observation off the latent.")
    if not decodes_draws(world, slot):
        why = "the model has no decoder" if world.decoder is None else "its decoder reads h, which these draws come without"
        return Section(skipped=f"Draws of the {slot} prior were not decoded and encoded again, because {why}.")
    unit = world.dynamics.z_of(rows.inferred).std(0)
    far, changed = zip(*(_back(world, feature, rows.context, unit) for feature in (rows.drawn, rows.inferred)))

    def ratio(index: Tensor) -> float:
        made, real = (x[index].median() for x in far)
        return float(made / real.clamp_min(1e-6))

    kind = "nats per variable" if hasattr(world.dynamics.latent, "classes") else "deviations"
    distance = resampled(lambda index: float(far[0][index].median()), rows.episode, evidence.seed, kind)
    figure = resampled(ratio, rows.episode, evidence.seed, "times the distance of real latents")
    moved = f"they move {distance.value:.2g} {kind}, {figure.value:.2g} times as far as real latents"
    if figure.surely_above(MOVED) and distance.surely_above(FAR):
        text = f"Draws of the {slot} prior do not survive decoding and encoding: {moved}; another form may help: "
        text += f"{another_prior(evidence, slot)}."
    else:
        text = f"Draws of the {slot} prior survive decoding and encoding: {moved}."
    section = Section({f"{slot} cycle distance": distance, f"{slot} cycle ratio": figure}, None, (text,))
    return section if changed[0] is None else joined([section, _redrawn(evidence, slot, changed, rows.episode)])


def _redrawn(evidence: Evidence, slot: Slot, changed: Sequence[Float[Tensor, " R"]], episode: Int[Tensor, " R"]) -> Section:
    """How much the pictures of draws, and of real latents, change where they are encoded and decoded again."""
    made, real = changed
    change = bootstrap(made, episode, evidence.seed, "grey levels of 0 to 1")
    over = _over(made, real, episode, evidence.seed, "times the change of real latents' pictures")
    figures, moved = {f"{slot} picture cycle": change, f"{slot} picture cycle ratio": over}, f"they change by {change}, {over}"
    if change.surely_above(GREY) and over.surely_above(MOVED):
        text = f"Pictures of draws of the {slot} prior become others where they are encoded and decoded again: {moved}; another "
        return Section(figures, None, (f"{text}form may help: {another_prior(evidence, slot)}.",))
    return Section(
        figures, None, (f"Pictures of draws of the {slot} prior stay where they are encoded and decoded again: {moved}.",)
    )


def _over(made: Float[Tensor, " R"], real: Float[Tensor, " R"], episode: Int[Tensor, " R"], seed: int, unit: str) -> Figure:
    """The mean of one over that of the other, which counts as one grey level at least."""
    return resampled(lambda index: float(made[index].mean() / real[index].mean().clamp_min(GREY)), episode, seed, unit)


@torch.no_grad()
def _back(
    world: WorldModel, feature: Float[Tensor, "R F"], h: Float[Tensor, "R D"], unit: Float[Tensor, " Z"]
) -> tuple[Float[Tensor, " R"], Float[Tensor, " R"] | None]:
    """(`cycle_distance` of latents in features from what their decoded means are encoded to, mean change of a pixel from there to
    what is decoded then; None without pictures)."""
    decoded = world.decoder.mean(feature)
    posterior = world.dynamics.posterior(world.encoder(decoded), h)
    far, before = cycle_distance(posterior, world.dynamics.z_of(feature), unit).cpu(), pictures_of(world, decoded)
    if not before.shape[1]:
        return far, None
    again = pictures_of(world, world.decoder.mean(with_latent(feature, posterior.mode)))
    return far, (again - before).abs().mean(1).cpu()


def _validity(evidence: Evidence, slot: Slot, rows: SlotRows) -> Section:
    """Whether decoded draws have numbers that real observations have."""
    world = evidence.world
    if not vector_keys(world) or not decodes_draws(world, slot):
        if decodes_draws(world, slot) and pictures_of(world, world.decode(rows.drawn[:1])).shape[1]:
            return Section()  # `_pictures` measures them
        why = "observations have no vectors" if not vector_keys(world) else "these draws cannot be decoded"
        return Section(skipped=f"Whether draws of the {slot} prior decode to valid observations was not measured, because {why}.")
    real = _observed_vectors(world, evidence.fitted)
    made, own = (decoded_vectors(world, x) for x in (rows.drawn, rows.inferred))
    beyond, floor = (out_of_range(x, real).float() for x in (made, own))
    figures = {f"{slot} out of range": bootstrap(beyond - floor, rows.episode, evidence.seed, "of the draws, less reconstructions")}
    found = holes_between(own, made, rows.episode)
    if found is not None:
        figures[f"{slot} invalid"] = bootstrap(found.hole, rows.episode, evidence.seed, "of the decoded draws, less the floor")
    bounds = (CLEAR_OF_RANGE, CLEAR)
    wrong = {name: figure for (name, figure), bound in zip(figures.items(), bounds) if figure.surely_above(bound)}
    what = {"range": "leave the range of the run's observations", "invalid": "are far from all that real latents decode to"}
    sentences = tuple(
        f"{100 * figure.value:.1f} % of the observations that the {slot} prior draws {what[name.split()[-1]]}; another form may "
        f"help: {another_prior(evidence, slot)}."
        for name, figure in wrong.items()
    )
    value = figures[f"{slot} out of range"].value
    well = f"Observations that the {slot} prior draws stay where real ones are: {max(0, 100 * value):.1f} % leave their range."
    return Section(figures, None, sentences or (well,))


@torch.no_grad()
def _pictures(evidence: Evidence, slot: Slot, rows: SlotRows) -> Section:
    """How far decoded draws are from the nearest replayed picture, beside real pictures and reconstructions of the same rows."""
    world, seen, fitted, seed = evidence.world, evidence.test, evidence.fitted, evidence.seed
    if not decodes_draws(world, slot):
        return Section()  # `_validity` says why
    index = spaced(torch.arange(len(rows.episode)), MAX_PICTURES)
    made, own = (pictures_of(world, world.decode(x[index])) for x in (rows.drawn, rows.inferred))
    if not made.shape[1]:
        return Section()
    observed = spaced(rows_of(seen, slot).nonzero()[:, 0], MAX_ROWS)[index]
    real, reference = (
        _real_pictures(world, seen, observed),
        _real_pictures(world, fitted, spaced(torch.arange(len(fitted.step)), MAX_ROWS // 2)),
    )
    far, blurred, floor = (nearest(x, reference).cpu() / made.shape[1] ** 0.5 for x in (made, own, real))
    episode = rows.episode[index]
    figures = {
        f"{slot} picture distance": bootstrap(far, episode, seed, "grey levels of 0 to 1, root mean square"),
        f"{slot} picture distance over real": _over(far, floor, episode, seed, "times that of real pictures"),
        f"{slot} picture distance over decoded": _over(far, blurred, episode, seed, "times that of real latents' pictures"),
    }
    distance, over_real, over = figures.values()
    text = f"from the nearest real one by {distance}, {over_real} and {over}"
    if over.surely_above(MOVED):
        text = f"Pictures that the {slot} prior draws are none of the run's: they differ {text}; another form may help:"
        return Section(figures, None, (f"{text} {another_prior(evidence, slot)}.",))
    return Section(
        figures,
        None,
        (f"Pictures that the {slot} prior draws are as near to real ones as those of real latents: they differ {text}.",),
    )


def _real_pictures(world: WorldModel, seen: FilteredStates, index: Int[Tensor, " N"]) -> Float[Tensor, "N D"]:
    """The pictures of some filtered rows."""
    return pictures_of(world, world.obs.canonical({name: x[index, 0].to(world.device) for name, x in seen.rows.obs.items()}))


def _imagined(evidence: Evidence) -> Section:
    """Latents imagined HORIZON steps on against real ones at those rows, and steps of decoded dreams against real steps."""
    world = evidence.world
    made, real, episode = imagined_latents(world, evidence.episodes, evidence.generator(22))
    z_of, scaled = world.dynamics.z_of, world.dynamics.latent.continuous
    found = holes_between(z_of(real[:, -1]), z_of(made[:, -1]), episode, scaled=scaled)
    if found is None:
        why = f"{len(made)} starts have {CONTEXT} rows before and {HORIZON} steps after them, which are too few."
        return Section(skipped=f"Holes of imagined latents were not measured, because {why}")
    unit = f"of latents {HORIZON} steps on, less the floor"
    figures = {
        "imagined hole mass": bootstrap(found.hole, episode, evidence.seed, unit),
        "imagined missed mass": bootstrap(found.missed, episode, evidence.seed, unit),
    }
    hole, missed = figures.values()
    sentences = []
    if hole.surely_above(CLEAR):
        text = f"{100 * hole.value:.1f} % of the latents imagined {HORIZON} steps on are where no real one is; learn for longer: "
        sentences.append(f"{text}{evidence.train_longer}.")
    if missed.surely_above(CLEAR):
        text = f"Dreams of {HORIZON} steps miss {100 * missed.value:.1f} % of the real latents; learn for longer: "
        sentences.append(f"{text}{evidence.train_longer}.")
    if not sentences:
        sentences.append(
            f"After {HORIZON} imagined steps latents are where real ones are: {max(0, 100 * hole.value):.1f} % are in holes."
        )
    return joined([Section(figures, None, tuple(sentences)), _teleports(evidence, made, episode)])


def _teleports(evidence: Evidence, made: Float[Tensor, "S H+1 F"], episode: Tensor) -> Section:
    """The share of steps of decoded dreams that are larger than almost all real ones."""
    world, seen = evidence.world, evidence.fitted
    if world.decoder is None or not vector_keys(world):
        return Section(skipped="Steps of decoded dreams were not measured, because there is no decoder of vectors.")
    observed = _observed_vectors(world, seen)
    follows = (seen.episode[1:] == seen.episode[:-1]) & (seen.step[1:] == seen.step[:-1] + 1)
    steps = observed.diff(dim=0)[follows.to(observed.device)].norm(dim=-1)
    if len(steps) < MIN_ROWS:
        return Section(skipped=f"Steps of decoded dreams were not measured, because there are {len(steps)} real steps.")
    largest = steps.quantile(LARGEST_STEP)
    jumps = (decoded_vectors(world, made).diff(dim=1).norm(dim=-1) > largest).float().mean(1)
    figure: Figure = bootstrap(jumps - (1 - LARGEST_STEP), episode, evidence.seed, "of the imagined steps, less the floor")
    if figure.surely_above(CLEAR_OF_RANGE):
        text = f"{100 * figure.value:.1f} % of the imagined steps are larger than real ones ever are; learn for longer: "
        text += f"{evidence.train_longer}."
    else:
        text = f"Imagined steps are as large as real ones: {max(0, 100 * figure.value):.1f} % are larger."
    return Section({"teleports": figure}, None, (text,))
