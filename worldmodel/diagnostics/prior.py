"""Whether the prior in a slot is right: what other forms gain on it in nats, and whether its draws look like inferred latents."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from worldmodel import registry
from worldmodel.data import Sampling
from worldmodel.diagnostics.evidence import Evidence, Figure, Section, Slot, SlotLatents, bootstrap, joined, prior_of, slot_latents
from worldmodel.diagnostics.geometry import FilteredStates
from worldmodel.diagnostics.two_sample import classifier_test, kolmogorov_smirnov, mmd, sliced_wasserstein, thinned
from worldmodel.distributions import ConditionalDistribution, PosteriorSource, likelihood
from worldmodel.errors import ConfigError
from worldmodel.model import WorldModel
from worldmodel.storage.weights import cpu_randomness

FORMS: Mapping[str, dict[str, Any]] = {
    "mixture": {"components": 8, "units": 64},
    "flow": {"units": 64},
    "vamp": {"components": 32, "pseudo_inputs": "feature"},
}
"""Kinds of candidates, and their options."""
ITSELF = "itself"
"""The candidate that is the prior, trained on."""
STEPS = 300
PACE: Mapping[str, tuple[float, float]] = {"mixture": (3e-2, 1.0), "flow": (5e-3, 0.4), "vamp": (5e-3, 1.0), ITSELF: (1e-3, 1.0)}
"""Learning rate, and share of the steps: components have to travel, and a flow, which costs most, starts close."""
ROWS_TO_FIT, ROWS_TO_SCORE, ROWS_TO_COMPARE = 3000, 2000, 600
FEWEST_ROWS, FEWEST_EPISODES = 20, 5
"""Of 5 episodes the smallest p-value is 1 / 32."""
DRAWS = 16
"""Of the prior at each row, whose spread is the unit of its errors."""
DRAWS_OF_FIRST_ROWS = 8
"""Of the posterior, as an episode has only one first row."""
DIRECTIONS_OF_H = 8
"""Principal directions of the recurrent state that the tests see."""
NATS_THAT_MATTER = 0.1
AUC_THAT_MATTERS = 0.55
P_THAT_MATTERS = 0.05

LogScore = Callable[[SlotLatents], Tensor]
"""Rows -> ln p of their inferred latents [R], in nats."""


def prior(evidence: Evidence, slot: Slot, *, steps: int = STEPS) -> Section:
    """The prior in a slot against inferred latents of held-out episodes. Figures, each named after the slot:

    _regret                    nats per latent that the best other form gains (`regret`)
    _auc, _auc_p               of a classifier of inferred and drawn latents; its p-value
    _mmd, _mmd_p               squared maximum mean discrepancy; its p-value
    _sliced_w2, .._floor       sliced Wasserstein distance, squared deviations; the same of samples that differ by chance only
    _ks_share                  share of the latent's numbers whose distributions differ

    Draws of the transition are compared given h, in deviations of the transition itself: what it explains does not count.
    steps   of each candidate's fit
    """
    world, distribution = evidence.world, prior_of(evidence.world, slot)
    if distribution is None:
        return Section(skipped=f"The {slot} prior was not judged because the model has none.")
    fitted, validation, test = (
        _rows(world, seen, slot, evidence.generator(number), limit)
        for number, (seen, limit) in enumerate(
            [(evidence.fitted, ROWS_TO_FIT), (evidence.validation, ROWS_TO_SCORE), (evidence.test, ROWS_TO_SCORE)]
        )
    )
    episodes = len(test.episode.unique())
    if episodes < 2 or min(len(fitted.episode), len(test.episode)) < FEWEST_ROWS:
        return Section(
            skipped=f"The {slot} prior was not judged because its slot has {len(fitted.episode)} fitted rows, and "
            f"{len(test.episode)} held-out ones of {episodes} episodes; {FEWEST_ROWS} of each are needed, of 2 episodes."
        )
    found, why = _regret_of(evidence, slot, distribution, (fitted, validation, test), steps)
    if episodes < FEWEST_EPISODES:
        compared = Section(
            skipped=f"Draws of the {slot} prior were not compared because labels are swapped by whole episodes, of which there are "
            f"{episodes}, and {FEWEST_EPISODES} are needed."
        )
    else:
        compared = compare(distribution, test, evidence.generator(3), slot)
    regretted = Section({} if found is None else {f"{slot}_regret": found.nats}, why)
    figures = joined([regretted, compared])
    return replace(figures, sentences=_sentences(evidence, slot, found, figures.figures))


def _rows(world: WorldModel, seen: FilteredStates, slot: Slot, generator: torch.Generator, limit: int) -> SlotLatents:
    """At most so many rows of the slot, evenly spread over episodes; an episode's first row with several draws of its posterior."""
    parts = [slot_latents(world, seen, slot, generator)]
    for _ in range(DRAWS_OF_FIRST_ROWS - 1 if slot == "initial" else 0):
        parts.append(slot_latents(world, seen, slot, generator))
        if torch.equal(parts[0].inferred, parts[-1].inferred):  # points
            parts.pop()
            break
    kept = thinned(parts[0].episode, limit)
    parts = [_some(part, kept) for part in parts]
    context = None if parts[0].context is None else torch.cat([part.context for part in parts])
    inferred, drawn, episode = (torch.cat([getattr(part, name) for part in parts]) for name in ("inferred", "drawn", "episode"))
    return SlotLatents(inferred, drawn, context, episode)


def _some(latents: SlotLatents, rows: Int[Tensor, " K"]) -> SlotLatents:
    context = None if latents.context is None else latents.context[rows.to(latents.context.device)]
    at = rows.to(latents.inferred.device)
    return SlotLatents(latents.inferred[at], latents.drawn[at], context, latents.episode[rows.to(latents.episode.device)])


# Regret ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Regret:
    """nats: gain per latent of the best candidate; kind: its form, ITSELF for the prior trained on, None where none gains."""

    nats: Figure
    kind: str | None


def regret(
    distribution: ConditionalDistribution,
    candidates: Mapping[str, tuple[str, LogScore]],
    validation: SlotLatents,
    test: SlotLatents,
    generator: torch.Generator,
) -> Regret | None:
    """Mean over test rows of ln p_candidate(z | h) - ln p(z | h), in nats per latent; None where the prior has no density.

    It is KL(q || p) - KL(q || p_candidate) of inferred latents q: in expectation never above KL(q || p). Any density may be a
    candidate, and the better the best of them is, the nearer it comes. The candidate is chosen on validation rows; where all of
    them are worse there than the prior, the regret is 0, and its interval reaches up to what the test rows leave open. Intervals
    are over episodes.

    candidates   {name: (kind, its log-score)}
    """
    own = [log_scores(distribution, rows.inferred, rows.context, generator) for rows in (validation, test)]
    if own[0] is None or not candidates:
        return None
    gains = {name: float((score(validation) - own[0]).double().mean()) for name, (_, score) in candidates.items()}
    finite = {name: gain for name, gain in gains.items() if gain == gain}
    if not finite:
        return None
    best = max(finite, key=finite.get)
    figure = bootstrap(candidates[best][1](test) - own[1], test.episode, unit="nats")
    if finite[best] <= 0 and figure.value is not None:
        return Regret(Figure(0.0, 0.0, max(0.0, figure.value if figure.high is None else figure.high), "nats"), None)
    return Regret(figure, candidates[best][0])


@torch.no_grad()
def log_scores(
    distribution: ConditionalDistribution,
    latents: Float[Tensor, "R Z"],
    context: Float[Tensor, "R C"] | None,
    generator: torch.Generator,
) -> Float[Tensor, " R"] | None:
    """Normalised ln p(z | context) in nats, None without a density: of a bound that of its ODE, of an unnormalised density with an
    estimate of ln Z, by annealing where importance sampling has too few effective samples."""
    if distribution.density == "none":
        return None
    if distribution.density == "bound":
        return torch.cat(
            [
                distribution.ode_log_prob(latents[rows], None if context is None else context[rows])
                for rows in torch.arange(len(latents), device=latents.device).split(256)
            ]
        )
    if distribution.density == "exact":
        return distribution.log_prob(latents, context)
    sampling = Sampling(generator=generator)
    if context is None:
        log_z, size = distribution.log_z(None, 10_000, sampling)
        if float(size) < 1000:
            log_z, size = distribution.log_z(None, 1000, sampling, ais=True)
        return likelihood(distribution, latents, None, log_z)
    return torch.cat(
        [
            likelihood(distribution, latents[rows], context[rows], distribution.log_z(context[rows], 200, sampling)[0])
            for rows in torch.arange(len(latents), device=latents.device).split(256)
        ]
    )


# What is fitted to the same latents -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Standard:
    """(x - mean) / std, by number; what did not vary stays 0 but for its changes."""

    mean: Float[Tensor, " D"]
    std: Float[Tensor, " D"]

    @classmethod
    def of(cls, x: Float[Tensor, "R D"]) -> Standard:
        std = x.std(0)
        return cls(x.mean(0), torch.where(std > 1e-6 * (1 + x.abs().amax(0)), std, torch.ones_like(std)))

    def __call__(self, x: Float[Tensor, "R D"]) -> Float[Tensor, "R D"]:
        return (x - self.mean) / self.std


@torch.no_grad()
def residuals(
    distribution: ConditionalDistribution, latents: SlotLatents, generator: torch.Generator
) -> tuple[Float[Tensor, "R Z"], Float[Tensor, "R Z"]]:
    """(shift, scale) of each row: the prior's mode at its context, and the spread of DRAWS draws around it.

    Functions of the context alone, so that (z - shift) / scale has a density wherever z has. Of latents without a scale, and of the
    categories and bits in front of an anchored one, the draws' mean and 1.
    """
    context = latents.context
    draws = distribution.sample(context, DRAWS, Sampling(generator=generator)).float()
    if not distribution.latent.continuous:
        return draws.mean(0), torch.ones_like(draws[0])
    shift = distribution.sample(context, 1, Sampling(generator=generator, mode=True))[0].float()
    scale = (draws - shift).square().mean(0).sqrt()
    scale = torch.maximum(scale, 1e-6 * (1 + shift.abs()))
    scale[:, : _discrete(distribution)] = 1.0
    return shift, scale


def _discrete(distribution: ConditionalDistribution) -> int:
    """Numbers in front of a latent that are categories or bits of the observation."""
    return getattr(getattr(distribution.latent, "anchor", None), "discrete", 0)


def form_candidate(
    distribution: ConditionalDistribution,
    kind: str,
    fitted: SlotLatents,
    generator: torch.Generator,
    steps: int = STEPS,
    conditional: bool = True,
) -> LogScore:
    """Another form over the same latents, fitted to them in units in which it starts near the prior (`residuals`).

    Without a context the units are the latents' own deviations. Latents without a scale are taken as they are.
    conditional   whether the form sees the context; else only the errors of the prior as a whole are mended
    """
    latent = distribution.latent.family
    seen = fitted.context is not None and conditional
    contexts = Standard.of(fitted.context) if seen else None
    residual_seed = generator.initial_seed()

    def framed(rows: SlotLatents) -> tuple[Tensor, Tensor, Tensor | None]:
        """(latents in the prior's units, ln of the units' volume, context)."""
        volume = rows.inferred.new_zeros(len(rows.inferred))
        x, context = rows.inferred, contexts(rows.context) if seen else None
        if latent.continuous and rows.context is not None:
            own = torch.Generator(generator.device).manual_seed(residual_seed)
            shift, scale = residuals(distribution, rows, own)
            x, volume = (x - shift) / scale, scale.log().sum(-1)
        return x, volume, context

    x, _, context = framed(fitted)
    standard = Standard.of(x) if latent.continuous else Standard(torch.zeros_like(x[0]), torch.ones_like(x[0]))
    config = registry.config_class("distribution", kind)(kind=kind, **FORMS[kind])
    with cpu_randomness(residual_seed):
        form = registry.build("distribution", config, latent, fitted.context.shape[1] if seen else 0, None)
    form = form.to(x.device).eval()
    lr, share = PACE[kind]
    with torch.enable_grad():
        form.fit(standard(x), context, steps=math.ceil(share * steps), lr=lr / 3 if seen else lr, generator=generator)

    @torch.no_grad()
    def score(rows: SlotLatents) -> Tensor:
        x, volume, context = framed(rows)
        return form.log_prob(standard(x), context) - standard.std.log().sum() - volume

    return score


def refitted(
    distribution: ConditionalDistribution, fitted: SlotLatents, generator: torch.Generator, steps: int = STEPS
) -> LogScore | None:
    """The prior itself, trained on; None where it has nothing to learn, no exact density, or is made of the model's posteriors."""
    if distribution.density != "exact" or distribution.of_posteriors or not any(p.requires_grad for p in distribution.parameters()):
        return None
    own = copy.deepcopy(distribution)
    with torch.enable_grad():
        own.fit(fitted.inferred, fitted.context, steps=steps, lr=PACE[ITSELF][0], generator=generator)
    return lambda rows: log_scores(own, rows.inferred, rows.context, generator)


def vamp_candidate(
    world: WorldModel, seen: FilteredStates, slot: Slot, fitted: SlotLatents, generator: torch.Generator, steps: int = STEPS
) -> LogScore:
    """A mixture of the model's posteriors at learned embeddings, which start at rows of the slot; of slots without a context.

    Source: Tomczak and Welling 2018. The model itself is not changed.
    """
    source: PosteriorSource = world.dynamics.source
    rows = (seen.step == 0 if slot == "initial" else seen.step >= 0).nonzero().squeeze(-1)
    count = min(FORMS["vamp"]["components"], len(rows))
    rows = rows[torch.randperm(len(rows), generator=generator, device=generator.device)[:count].to(rows.device)]
    config = registry.config_class("distribution", "vamp")(kind="vamp", **{**FORMS["vamp"], "components": count})
    with cpu_randomness(generator.initial_seed()), _fixed(world):
        form = registry.build("distribution", config, world.dynamics.latent.family, 0, source).to(world.device).eval()
        obs = {name: x[rows.to(x.device), 0].to(world.device) for name, x in seen.rows.obs.items()}
        form.init_pseudo_inputs(world.preprocess(obs), seen.h[rows.to(seen.h.device)])
        with torch.enable_grad():
            form.fit(fitted.inferred, steps=steps, lr=PACE["vamp"][0], generator=generator)
    return lambda given: log_scores(form, given.inferred, None, generator)


@contextmanager
def _fixed(world: WorldModel) -> Iterator[None]:
    """No parameter of the model gets a gradient in here."""
    learned = [p for p in world.parameters() if p.requires_grad]
    try:
        for p in learned:
            p.requires_grad_(False)
        yield
    finally:
        for p in learned:
            p.requires_grad_(True)


def forms_for(world: WorldModel, slot: Slot) -> list[str]:
    """The kinds of FORMS that a config could name in this slot."""
    latent, kinds = registry.build("latent", world.config.dynamics.latent), []
    for kind in FORMS:
        try:
            registry.part("distribution", kind).check(registry.config_class("distribution", kind)(), latent, slot, f"model.{slot}")
        except ConfigError:
            continue
        kinds.append(kind)
    return kinds


def _regret_of(
    evidence: Evidence, slot: Slot, distribution: ConditionalDistribution, rows: tuple[SlotLatents, ...], steps: int
) -> tuple[Regret | None, str | None]:
    """(regret of the slot's prior, why it or a part of it was not measured)."""
    if distribution.density == "none":
        return None, f"The regret of the {slot} prior was not measured because the prior has no density."
    fitted, validation, test = rows
    if not len(validation.episode):
        return None, f"The regret of the {slot} prior was not measured because no validation rows are there to choose a form on."
    candidates: dict[str, tuple[str, LogScore]] = {}
    if (own := refitted(distribution, fitted, evidence.generator(4), steps)) is not None:
        candidates[ITSELF] = ITSELF, own
    for kind in forms_for(evidence.world, slot) if not _discrete(distribution) else []:
        if kind == "vamp":
            if fitted.context is None:
                score = vamp_candidate(evidence.world, evidence.fitted, slot, fitted, evidence.generator(5), steps)
                candidates[kind] = kind, score
            continue
        sees = [False, True] if fitted.context is not None and distribution.latent.family.continuous else [True]
        for conditional in sees:
            score = form_candidate(distribution, kind, fitted, evidence.generator(6), steps, conditional)
            candidates[f"{kind} {conditional}"] = kind, score
    found = regret(distribution, candidates, validation, test, evidence.generator(7))
    if found is None:
        return None, f"The regret of the {slot} prior was not measured because no other form fits its latents."
    if _discrete(distribution):
        why = f"The {slot} prior was compared with itself, trained on, and with no other form, because its latents hold categories."
        return found, why
    return found, None


# Draws against inferred latents ---------------------------------------------------------------------------------------


@torch.no_grad()
def compare(distribution: ConditionalDistribution, latents: SlotLatents, generator: torch.Generator, slot: str) -> Section:
    """Two-sample tests of inferred against drawn latents of one slot: figures without sentences.

    Given a context, latents are compared in the units of `residuals`, beside the principal directions of the context.
    """
    rows = _some(latents, thinned(latents.episode, ROWS_TO_COMPARE))
    x, y, beside = rows.inferred.float(), rows.drawn.float(), principal(rows.context)
    if rows.context is None:
        standard = Standard.of(x)
        x, y = standard(x), standard(y)
    else:
        shift, scale = residuals(distribution, rows, generator)
        x, y = ((z - shift) / scale for z in (x, y))
    group = rows.episode.to(generator.device), rows.episode.to(generator.device)
    wide_x, wide_y = (torch.cat([beside, z.asinh()], 1) if beside is not None else z for z in (x, y))  # asinh: no row decides alone
    classified = classifier_test(wide_x, wide_y, generator, group)
    apart, distance = mmd(wide_x, wide_y, generator, group), sliced_wasserstein(x, y, generator, group)
    one, other = classified.each.split(len(x))
    p = kolmogorov_smirnov(x, y, generator, group)
    figures = {
        "auc": _within_1(bootstrap((one + other - classified.auc.value).nan_to_num(classified.auc.value), rows.episode)),
        "auc_p": Figure(classified.auc.p),
        "mmd": Figure(apart.value),
        "mmd_p": Figure(apart.p),
        "sliced_w2": Figure(distance.value, unit="squared deviations"),
        "sliced_w2_floor": Figure(distance.mean, distance.low, distance.high, "squared deviations"),
        "ks_share": Figure(float((p <= P_THAT_MATTERS).double().mean())),
    }
    return Section({f"{slot}_{name}": figure for name, figure in figures.items()})


def _within_1(figure: Figure) -> Figure:
    return Figure(*(None if x is None else min(max(x, 0.0), 1.0) for x in (figure.value, figure.low, figure.high)))


def principal(context: Float[Tensor, "R C"] | None) -> Float[Tensor, "R K"] | None:
    """The context along its DIRECTIONS_OF_H principal directions, each with deviation 1; None without a context."""
    if context is None:
        return None
    x = Standard.of(context.double())(context.double())
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    kept = torch.arange(len(values), device=values.device) >= len(values) - DIRECTIONS_OF_H
    kept &= values > 1e-6 * values.max().clamp_min(1e-12)
    return (x @ vectors[:, kept] / values[kept].sqrt()).to(context.dtype)


# Sentences ------------------------------------------------------------------------------------------------------------


def _sentences(evidence: Evidence, slot: Slot, found: Regret | None, figures: Mapping[str, Figure]) -> tuple[str, ...]:
    """What regret and AUC say of the prior, and what mends it."""
    auc, p = (figures.get(f"{slot}_{name}", Figure(None)) for name in ("auc", "auc_p"))
    loses = found is not None and found.kind is not None and found.nats.surely_above(NATS_THAT_MATTER)
    differs = auc.surely_above(AUC_THAT_MATTERS) and p.surely_below(P_THAT_MATTERS)
    kinds = forms_for(evidence.world, slot)
    kind = found.kind if loses else next((kind for kind in ("flow", *kinds) if kind in kinds), None)
    if loses and kind == ITSELF:
        mend = f"; with more steps it may learn them: `worldmodel train {evidence.run} --resume --steps STEPS`"
    else:
        mend = f"; another form may help: `worldmodel fit-prior {evidence.run} --slot {slot} --kind {kind}`" if kind else ""
    sentences = []
    if loses:
        to = "itself, trained on at the same latents" if kind == ITSELF else f"a {kind} fitted to the same latents"
        sentences.append(f"The {slot} prior loses {found.nats} per latent to {to}{mend}.")
    if differs:
        sentences.append(
            f"Draws of the {slot} prior are distinguished from inferred latents with an AUC of {auc}, by chance 0.5{mend}."
        )
    if sentences:
        return tuple(sentences)
    right = [f"no other form gains much on it (regret {found.nats})"] if found is not None else []
    right += [f"its draws are hardly distinguished from inferred latents (AUC {auc})"] if auc.known else []
    return (f"The {slot} prior is right as far as this can tell: {' and '.join(right)}.",) if right else ()
