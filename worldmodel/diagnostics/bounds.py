"""The likelihood of observations in nats per step: rate, distortion, and importance-weighted bounds, by the prior of each slot."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from worldmodel.data import Obs, Sampling
from worldmodel.diagnostics.evidence import Curve, Evidence, Figure, Section, Slot, bootstrap, joined, prior_of, rows_of
from worldmodel.diagnostics.geometry import FilteredStates
from worldmodel.diagnostics.likelihood import Importance, concatenated, importance
from worldmodel.diagnostics.usage import decoded_keys, observed_numbers, reads_off, scaled_rows, spaced
from worldmodel.distributions import ConditionalDistribution
from worldmodel.model import WorldModel

DRAWS, ROWS = 256, 200
"""Draws of the posterior for each row, and rows, at most."""
FEWEST_DRAWS, FEWEST_ROWS = 16, 32
NUMBERS_TO_DECODE = 1 << 24
"""Which both are cut to for large pictures."""
FEW = 0.05
"""Effective share of the draws below which the bound is still far from the likelihood."""
LEVELS = 256


# Estimators -----------------------------------------------------------------------------------------------------------


def draws_and_rows(size: int, draws: int = DRAWS, rows: int = ROWS) -> tuple[int, int]:
    """(draws, rows) for observations of so many numbers, so that no more than NUMBERS_TO_DECODE are decoded if it can be."""
    for _ in range(16):
        if draws * rows * size <= NUMBERS_TO_DECODE:
            break
        draws, rows = max(FEWEST_DRAWS, draws // 2), max(FEWEST_ROWS, rows * 2 // 3)
    return draws, rows


def bits_per_dimension(nats: float | None, size: int, likelihood: str) -> Figure:
    """-ln p(x) of a picture of `size` numbers in [0, 1] as bits per number, with the kind of p in the unit.

    logistic, bernoulli   of probabilities
    gaussian              of a density times the width of one of 256 levels: no bound for whole levels, as no noise is added to them

    Source: Theis, van den Oord and Bethge 2016, section 3.1.
    """
    if nats is None:
        return Figure(None)
    bits = nats / size / math.log(2)
    if likelihood == "gaussian":
        return Figure(bits + math.log2(LEVELS), unit="bits per number, density at 256 levels, no bound")
    kinds = {"logistic": "discretised logistic", "bernoulli": "bernoulli"}
    return Figure(bits, unit=f"bits per number, {kinds[likelihood]}, upper bound")


@torch.no_grad()
def weighed(
    world: WorldModel,
    seen: FilteredStates,
    slot: Slot,
    rows: Int[Tensor, " R"],
    draws: int,
    generator: torch.Generator,
    chunk: int = 32,
) -> Importance:
    """`importance` of some rows, with p(z) of a slot, given h for the transition, and the decoder's p(x|h, z).

    Of numbers that are their own latent p(z) is p(x); only pictures beside them are decoded.
    """
    prior, latent, obs, parts = prior_of(world, slot), world.dynamics.latent, scaled_rows(world, seen), []
    for some in rows.split(chunk):
        feature, posterior = seen.feature[some], seen.posterior.index(some)
        observed = seen.z[some, : observed_numbers(world)]
        density = _likelihood(world, feature, {name: x[some] for name, x in obs.items()})
        given = _prior_density(prior, seen.h[some] if slot == "transition" else None)
        log_prior, log_likelihood = (partial(_of_whole, function, observed) for function in (given, density))
        own = getattr(posterior, "code", posterior)
        code = getattr(latent, "code", latent)
        parts.append(importance(own, code, log_prior, log_likelihood, draws, generator, chunk=16))
    return concatenated(parts)


def _of_whole(density: Callable[[Tensor], Tensor], observed: Float[Tensor, "N W"], z: Float[Tensor, "K N Y"]) -> Tensor:
    """The density of latents whose first numbers are observed, and the others drawn."""
    return density(torch.cat([observed.expand(len(z), *observed.shape), z], -1))


def _prior_density(prior: ConditionalDistribution, context: Tensor | None) -> Callable[[Tensor], Tensor]:
    """Latents [k, N, Z] -> ln p(z) [k, N]."""

    def density(z: Float[Tensor, "K N Z"]) -> Float[Tensor, "K N"]:
        return prior.log_prob(z, None if context is None else context.expand(*z.shape[:-1], -1))

    return density


def _likelihood(world: WorldModel, feature: Float[Tensor, "N F"], obs: Obs) -> Callable[[Tensor], Tensor]:
    """Latents [k, N, Z] -> ln p(x_n|h_n, z) [k, N], 0 where the observation is read off the latent."""

    def density(z: Float[Tensor, "K N Z"]) -> Float[Tensor, "K N"]:
        if not decoded_keys(world):
            return z.new_zeros(z.shape[:-1])
        prefix = feature[:, : -z.shape[-1]].expand(*z.shape[:-1], -1)
        repeated = {name: x.expand(len(z), *x.shape).flatten(0, 1) for name, x in obs.items()}
        terms = world.decoder.loss(torch.cat([prefix, z], -1).flatten(0, 1), repeated, Sampling(generator=_fixed(world)))
        return -terms["observation"].value.view(z.shape[:-1])

    return density


def _fixed(world: WorldModel) -> torch.Generator:
    """Of the losses beside the likelihood, which are not used: they draw from no other generator."""
    return torch.Generator(world.device).manual_seed(0)


def _kind_of_decoder(world: WorldModel, seen: FilteredStates) -> str | None:
    """The unit of the decoder's loss: nats, or score where it is no likelihood; None where it has nothing to learn."""
    if not decoded_keys(world):
        return None
    obs = {name: x[:1] for name, x in scaled_rows(world, seen).items()}
    with torch.no_grad():
        return world.decoder.loss(seen.feature[:1], obs, Sampling(generator=_fixed(world)))["observation"].unit


# The section ----------------------------------------------------------------------------------------------------------


def likelihood(evidence: Evidence, draws: int | None = None) -> Section:
    """Rate, distortion and bounds of ln p(x) on test rows, in nats per step, by the transition and by the marginal.

    p(x) is that of the next scaled observation given the recurrent state, or, by the marginal, of an observation by itself. Where
    latents are the observation itself the rate is its exact negative log-likelihood.

    draws   of the posterior for each row; None: as many as the observation's size allows
    """
    world, seen = evidence.world, evidence.test
    what = "The likelihood was not measured, because"
    if world.dynamics.latent.deterministic:
        none = " and the model has no decoder" if world.decoder is None else ""
        return Section(skipped=f"{what} latents are points, which have no density{none}.")
    if world.decoder is None:
        return Section(skipped=f"{what} the model has no decoder.")
    if not len(seen.z) or _kind_of_decoder(world, seen) == "score":
        why = "the decoder draws without a density" if len(seen.z) else "there are no test rows"
        return Section(skipped=f"{what} {why}.")
    slots: list[Slot] = ["transition"]
    if world.marginal is not None and (world.decoder.in_features == world.dynamics.latent.size or not decoded_keys(world)):
        slots.append("marginal")
    return joined([_of_slot(evidence, slot, draws) for slot in slots])


def _of_slot(evidence: Evidence, slot: Slot, draws: int | None) -> Section:
    world, seen = evidence.world, evidence.test
    prior, what = prior_of(world, slot), f"The likelihood by the {slot} prior was not measured, because"
    if prior is None:
        return Section(skipped=f"{what} the model has none.")
    if prior.density not in ("exact", "bound"):
        density = "has no density" if prior.density == "none" else "has a density up to a constant only"
        return Section(skipped=f"{what} it {density}.")
    rows = rows_of(seen, slot).nonzero()[:, 0]
    limit = draws_and_rows(sum(math.prod(key.shape) for key in world.obs.keys.values()))
    rows, exact = spaced(rows, limit[1]), reads_off(world)
    if not len(rows):
        return Section(skipped=f"{what} there are no rows for it.")
    found = weighed(world, seen, slot, rows.to(seen.z.device), 1 if exact else draws or limit[0], evidence.generator(41))
    return _exact(evidence, slot, found, rows) if exact else _bounds(evidence, slot, found, rows)


def _exact(evidence: Evidence, slot: Slot, found: Importance, rows: Tensor) -> Section:
    """Of latents that are the observation itself."""
    rate = bootstrap(found.rate, evidence.test.episode[rows], evidence.seed, f"nats per step{_side(evidence, slot)}")
    size = evidence.world.dynamics.latent.size
    text = f"The next observation costs {rate.value:.3g} nats per step by the {slot}, of {size} numbers in deviations."
    if slot != "transition":
        text = f"An observation by itself costs {rate.value:.3g} nats by the {slot}, of {size} numbers in deviations."
    return Section({f"{slot} rate": rate}, None, (text,))


def _bounds(evidence: Evidence, slot: Slot, found: Importance, rows: Tensor) -> Section:
    """The rate, the distortion, and what more draws tell."""
    episode, seed, draws = evidence.test.episode[rows], evidence.seed, len(found.log_weight)
    gap = bootstrap(found.nats - found.bound(1), episode, seed, "nats per step")
    figures = {
        f"{slot} rate": bootstrap(found.rate, episode, seed, f"nats per step{_side(evidence, slot)}"),
        f"{slot} distortion": bootstrap(found.distortion, episode, seed, "nats per step"),
        f"{slot} elbo": bootstrap(found.bound(1), episode, seed, "nats per step, lower bound"),
        f"{slot} likelihood": bootstrap(found.nats, episode, seed, f"nats per step, lower bound of {draws} draws"),
        f"{slot} posterior gap": gap,
        f"{slot} effective draws": bootstrap(found.ess / draws, episode, seed, f"of {draws} draws"),
    }
    bound = figures[f"{slot} likelihood"]
    figures |= _bits(evidence.world, slot, bound)
    curve = found.curve()
    values: list[float | None] = list(curve.values())
    title = f"Bound of the likelihood by the {slot}"
    curves = {title: Curve([float(k) for k in curve], {"bound": values}, "draws", "nats per step")}
    rate, distortion = (figures[f"{slot} {name}"].value for name in ("rate", "distortion"))
    text = f"By the {slot} an observation costs {rate:.3g} nats as a latent and {distortion:.3g} given that"
    sentences = [f"{text}; ln p is at least {bound.value:.4g}."]
    effective = figures[f"{slot} effective draws"]
    if effective.surely_below(FEW):
        text = f"Of {draws} draws {effective.value * draws:.1f} count, so ln p may be far above that bound; a posterior that fits "
        sentences.append(f"{text}better learns for longer: {evidence.train_longer}.")
    elif gap.surely_above(1.0):
        text = f"The posterior does not fit the model: {draws} draws find {gap.value:.2g} nats more than one; learn for longer:"
        sentences.append(f"{text} {evidence.train_longer}.")
    return Section(figures, None, tuple(sentences), curves)


def _side(evidence: Evidence, slot: Slot) -> str:
    """What a rate is where the prior's density is a lower bound."""
    prior = prior_of(evidence.world, slot)
    return ", upper bound" if prior is not None and prior.density == "bound" else ""


def _bits(world: WorldModel, slot: str, bound: Figure) -> dict[str, Figure]:
    """Bits per number, where observations are one kind of pictures and nothing else."""
    likelihoods = getattr(getattr(world.decoder, "pictures", None) or world.decoder, "likelihoods", {})
    kinds = {likelihoods.get(name) for name, key in world.obs.keys.items()}
    if any(key.kind != "image" for key in world.obs.keys.values()) or len(kinds) != 1 or None in kinds:
        return {}
    size = sum(math.prod(key.shape) for key in world.obs.keys.values())
    value = None if bound.value is None else -bound.value
    return {f"{slot} bits": bits_per_dimension(value, size, kinds.pop())}
