"""Whether latents are used: by the encoder, which can put nothing into them, and by the decoder, which can read nothing of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributions import MultivariateNormal

from worldmodel.data import Obs
from worldmodel.diagnostics.evidence import Curve, Evidence, Figure, Section, bootstrap, joined, posterior_draws, resampled
from worldmodel.diagnostics.geometry import FilteredStates, usage
from worldmodel.distributions import Latent, Posterior
from worldmodel.model import WorldModel, active_units

NUMBERS_AT_ONCE = 1 << 22
"""Numbers of the table of all latents under all posteriors that are held in memory together."""
RESAMPLES = 200
"""Of figures that are no means, each of which is computed anew."""
SATURATED = 0.5
"""Nats below ln N within which the lower bound of N rows says nothing but that there is more."""
USED_NATS = 0.1
"""KL of a variable from which it counts as used. Source: Vahdat et al. 2021 (LSGM), who leave out what is below."""
DEAD_SHARE = 0.1
"""Of a class's even share, 1 / C, below which it is dead; the uniform part of a posterior alone gives it 0.01."""
CLEARLY = 1.1
"""Ratio of reconstruction errors from which a decoder reads the latent."""


# Estimators -----------------------------------------------------------------------------------------------------------


def effective_rank(latents: Float[Tensor, "N Z"]) -> float:
    """exp(entropy of the covariance's normalised eigenvalues): 1 where latents lie on a line, Z where they are isotropic.

    NaN where all latents are the same. Source: Roy and Vetterli 2007.
    """
    squares = torch.linalg.svdvals((latents - latents.mean(0)).double()).square()
    share = squares / squares.sum()
    return float(torch.special.entr(share).sum().exp()) if float(squares.sum()) > 1e-12 else math.nan


@dataclass(frozen=True)
class Information:
    """Bounds of the mutual information of rows and latents, in nats; their means over the N rows are the bounds.

    lower    [N]  at most ln N
    upper    [N]  infinite or NaN where all rows are of one episode
    ceiling       ln N
    """

    lower: Float[Tensor, " N"]
    upper: Float[Tensor, " N"]
    ceiling: float

    @property
    def saturated(self) -> bool:
        return float(self.lower.mean()) > self.ceiling - SATURATED


@torch.no_grad()
def information(posterior: Posterior, z: Float[Tensor, "N Z"], episode: Int[Tensor, " N"] | None = None) -> Information:
    """I(x; z) between bounds, from one draw z_i ~ q(z|x_i) of each row: ln q(z_i|x_i) - ln (mean over j of q(z_i|x_j)).

    lower: the mean over all rows. upper: over the rows of other episodes (without `episode`: over all other rows). Of rows that
    are near in time the first is too low rather than too high; they would spoil the second, which is why it leaves them out.
    Source: Poole et al. 2019, eqs. 12 and 13; the first is InfoNCE (van den Oord et al. 2018) with the known q as critic.
    """
    episode = torch.arange(len(z), device=z.device) if episode is None else episode.to(z.device)
    own, everyone, others = posterior.log_prob(z), [], []
    for rows in torch.arange(len(z), device=z.device).split(max(1, NUMBERS_AT_ONCE // max(1, z.numel()))):
        table = posterior.log_prob_each(z[rows])
        strange = episode[rows].unsqueeze(-1) != episode
        everyone.append(table.logsumexp(-1))
        others.append(table.masked_fill(~strange, -torch.inf).logsumexp(-1) - strange.sum(-1).log())
    lower = own - torch.cat(everyone) + math.log(len(z))
    return Information(lower, own - torch.cat(others), math.log(len(z)))


@torch.no_grad()
def variational_bound(
    latent: Latent, posterior: Posterior, z: Float[Tensor, "N Z"], fitted: Posterior, drawn: Float[Tensor, "M Z"]
) -> Float[Tensor, " N"]:
    """ln q(z_i|x_i) - ln r(z_i): its mean is at least I(x; z), whatever r is; it never saturates.

    r, of other rows with the posteriors `fitted` and their draws: a Gaussian with their mean and covariance, or for categories
    the product of their mean probabilities. Source: Alemi et al. 2017 (VIB), eq. 14; Poole et al. 2019, eq. 1.
    """
    if not latent.continuous:
        return posterior.log_prob(z) - fitted.map(lambda x: x.mean(0, keepdim=True)).log_prob(z)
    drawn = drawn.double()
    ridge = 1e-6 * drawn.var(0).clamp_min(1e-6)  # rows fewer than numbers have a singular covariance
    r = MultivariateNormal(drawn.mean(0), torch.cov(drawn.T).view(z.shape[1], z.shape[1]) + ridge.diag())
    return posterior.log_prob(z) - r.log_prob(z.double()).to(z)


def reconstruction_error(world: WorldModel, feature: Float[Tensor, "N F"], obs: Obs) -> Float[Tensor, " N"]:
    """Mean squared error of the decoder's mean, over the numbers of each scaled key of `obs` and then over keys."""
    seen = world.decoder.mean(feature)
    return torch.stack([(seen[name] - x).square().flatten(1).mean(1) for name, x in obs.items()]).mean(0)


@torch.no_grad()
def shuffled_errors(
    world: WorldModel, feature: Float[Tensor, "N F"], obs: Obs, generator: torch.Generator
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """(reconstruction errors of each row, and with another row's latent in place of its own): equal where nothing reads the latent.

    Numbers that are the observation's own stay with their row.
    """
    order = torch.randperm(len(feature), generator=generator, device=feature.device)
    other = torch.empty_like(order)
    other[order] = order.roll(1)  # no row is given its own
    z = world.dynamics.z_of(feature)[other]
    swapped = with_latent(feature, z[:, observed_numbers(world) :])
    return reconstruction_error(world, feature, obs), reconstruction_error(world, swapped, obs)


# What of a world model is measured ------------------------------------------------------------------------------------


def decoded_keys(world: WorldModel) -> list[str]:
    """The keys of an observation that a decoder learns; none without one, and not those that are read off the latent."""
    if world.decoder is None or next(world.decoder.parameters(), None) is None:
        return []
    anchor = getattr(world.dynamics.latent, "anchor", None)
    return [name for name in world.obs.keys if anchor is None or name not in anchor.keys]


def observed_numbers(world: WorldModel) -> int:
    """How many numbers at a latent's front are the observation's own, of which no posterior is a distribution."""
    anchor = getattr(world.dynamics.latent, "anchor", None)
    return 0 if anchor is None else anchor.size


def reads_off(world: WorldModel) -> bool:
    """Whether latents are the observation itself, which the decoder reads off them."""
    return world.decoder is not None and not decoded_keys(world)


def scaled_rows(world: WorldModel, seen: FilteredStates, keys: list[str] | None = None) -> Obs:
    """The scaled observations of filtered rows, {key: [R, ...]}."""
    obs = world.preprocess({name: x[:, 0].to(world.device) for name, x in seen.rows.obs.items()})
    return obs if keys is None else {name: obs[name] for name in keys}


def with_latent(feature: Float[Tensor, "*N F"], z: Float[Tensor, "*N Z"]) -> Float[Tensor, "*N F"]:
    """Features with other latents: a feature ends in its latent."""
    return torch.cat([feature[..., : -z.shape[-1]], z], -1)


def spaced(rows: Int[Tensor, " R"], limit: int) -> Int[Tensor, " M"]:
    """At most so many of some rows, evenly spaced."""
    return rows[:: max(1, -(-len(rows) // limit))]


def remedy(evidence: Evidence) -> str:
    """The command that trains anew with more in the latents."""
    if evidence.world.dynamics.latent.deterministic:
        return f"`worldmodel train {evidence.run}/config.yaml train.scales.collapse=25`"
    option = "model.dynamics.free_nats=1.0"
    if evidence.world.marginal is not None or observed_numbers(evidence.world):
        option = "train.scales.rep=0.01" if evidence.world.marginal is None else "train.scales.marginal=0.1"
    return f"`worldmodel train {evidence.run}/config.yaml {option}`"


# The section ----------------------------------------------------------------------------------------------------------


def latents(evidence: Evidence, rows: int = 2000) -> Section:
    """Use of latents on test rows: KL of each variable, active ones, rank, what the decoder reads, and mutual information.

    rows   rows that the mutual information is measured on; ln of their number is its ceiling

    Where latents are the observation itself only the rank of their covariance is measured.
    """
    seen = evidence.test
    if len(seen.z) < 2:
        return Section(skipped=f"The use of latents was not measured, because there are {len(seen.z)} test rows.")
    if reads_off(evidence.world):
        reason = "Whether latents are used was not measured, because they are the observation itself."
        return joined([_rank(evidence), Section(skipped=reason)])
    return joined([_variables(evidence), _rank(evidence), _shuffled(evidence), _information(evidence, rows)])


def _variables(evidence: Evidence) -> Section:
    """Active variables, KL of each to the transition, and dead classes."""
    world, seen = evidence.world, evidence.test
    latent, first, sentences, curves, skipped = world.dynamics.latent, observed_numbers(world), [], {}, None
    count, variables = seen.active, latent.variables
    if first:
        count, variables = active_units(seen.posterior.mean[:, first:]), variables - first
    figures = {"active variables": Figure(count / variables, unit="of the variables")}
    if count < 0.1 * variables:
        text = f"The latents have collapsed: {count} of {variables} variables depend on the observation"
        sentences.append(f"{text}; learn them again: {remedy(evidence)}.")
    else:
        sentences.append(f"{count} of {variables} latent variables depend on the observation.")
    kl = usage(world, seen)
    if kl is None or not len(kl) or not bool(kl.isfinite().all()):
        skipped = "The KL of each variable was not measured, because the transition has no closed form of it."
    else:
        figures["variables with news"] = Figure(float((kl > USED_NATS).float().mean()), unit=f"above {USED_NATS} nats per step")
        figures["largest kl"] = Figure(float(kl.max()), unit="nats per step")
        ordered = kl.sort(descending=True).values.tolist()
        x = [float(i + 1) for i in range(len(ordered))]
        curves["KL of each latent variable"] = Curve(x, {"KL": ordered}, "variable, by its KL", "nats per step")
        share = figures["variables with news"].value
        sentences.append(f"{100 * share:.0f} % of the variables tell something that the transition did not expect.")
    if hasattr(latent, "classes"):
        dead = (seen.posterior.probs.mean(0) < DEAD_SHARE / latent.classes).float().mean()
        figures["dead classes"] = Figure(float(dead), unit="of the classes")
        if float(dead) > 0.5:
            text = f"{100 * float(dead):.0f} % of the classes are never used; fewer do the same:"
            fewer = max(2, latent.classes // 2)
            sentences.append(f"{text} `worldmodel train {evidence.run}/config.yaml model.dynamics.latent.classes={fewer}`.")
    return Section(figures, skipped, tuple(sentences), curves)


def _rank(evidence: Evidence) -> Section:
    """The effective rank of the latents' means."""
    seen, latent = evidence.test, evidence.world.dynamics.latent
    mean = seen.posterior.mean.flatten(1).cpu()
    rows = spaced(torch.arange(len(mean)), 500)
    mean, resamples = mean[rows], RESAMPLES if mean.shape[1] <= 64 else 0
    if resamples:
        rank = resampled(lambda index: effective_rank(mean[index]), seen.episode[rows], evidence.seed, f"of {mean.shape[1]}")
    else:
        rank = Figure(effective_rank(mean), unit=f"of {mean.shape[1]}")
    if not rank.known:
        text = f"All latents are the same, so they have no rank; learn them again: {remedy(evidence)}."
    elif rank.surely_below(1.5) and latent.size > 1 and not reads_off(evidence.world):
        text = f"The latents lie on a line, with an effective rank of {rank}; learn them again: {remedy(evidence)}."
    else:
        text = f"The latents spread over as many directions as an effective rank of {rank} says."
    return Section({"effective rank": rank}, None, (text,))


def _shuffled(evidence: Evidence) -> Section:
    """How much worse the reconstruction is with another row's latent."""
    world, seen = evidence.world, evidence.test
    keys = decoded_keys(world)
    if not keys:
        return Section(skipped="What the decoder reads of latents was not measured, because no decoder learns to read them.")
    own, other = shuffled_errors(world, seen.feature, scaled_rows(world, seen, keys), evidence.generator(11))
    own = own.clamp_min(1e-12)
    ratio = bootstrap(other / own, seen.episode, evidence.seed, "times the error", weight=own)
    if ratio.surely_above(CLEARLY):
        text = f"The decoder reads the latent: with another row's its error is {ratio.value:.3g} times as large."
    elif world.dynamics.latent.deterministic:
        text = f"The decoder hardly reads the latent: with another row's its error is {ratio.value:.3g} times as large; let its "
        text += f"error train the latents too: `worldmodel train {evidence.run}/config.yaml model.objective.kind=hybrid`."
    else:
        text = f"The decoder hardly reads the latent: with another row's its error is {ratio.value:.3g} times as large; learn with "
        text += f"more in the latents: {remedy(evidence)}."
    return Section({"shuffled latent": ratio}, None, (text,))


def _information(evidence: Evidence, count: int) -> Section:
    """The bracket of I(x; z), and whether its lower end is saturated."""
    world, first = evidence.world, observed_numbers(evidence.world)
    if world.dynamics.latent.deterministic:
        return Section(skipped="The mutual information was not bounded, because latents are points, which tell of everything.")
    index = spaced(torch.arange(len(evidence.test.z)), count)
    posterior, episode = evidence.test.posterior.index(index), evidence.test.episode[index]
    z = posterior_draws(world, evidence.test, evidence.generator(12))[index]
    found = information(posterior, z, episode)
    lower = bootstrap(found.lower, episode, evidence.seed, "nats")
    upper = bootstrap(found.upper, episode, evidence.seed, "nats")
    if len(evidence.validation.z) > z.shape[1] + 1:
        drawn = posterior_draws(world, evidence.validation, evidence.generator(13))
        own, fitted = (getattr(x, "code", x) for x in (posterior, evidence.validation.posterior))
        bound = variational_bound(world.dynamics.latent, own, z[:, first:], fitted, drawn[:, first:])
        fixed = bootstrap(bound, episode, evidence.seed, "nats")
        below = upper.value is None or fixed.value is None or fixed.value < upper.value
        upper = fixed if below and (fixed.value or 0) >= (lower.value or 0) else upper
    figures = {
        "information at least": lower,
        "information at most": upper,
        "information ceiling": Figure(found.ceiling, unit="nats"),
    }
    if lower.value is None or upper.value is None:
        return Section(figures, "The upper bound of the mutual information needs test rows of two episodes.")
    if found.saturated:
        text = f"The lower bound of the mutual information is saturated at {lower.value:.2g} nats, of the {found.ceiling:.2g} that "
        return Section(figures, None, (text + f"{len(z)} rows can tell; it is at most {upper.value:.3g} nats.",))
    if upper.value < USED_NATS:
        text = f"Latents tell at most {upper.value:.2g} nats of the observation: the posterior has collapsed; learn it again: "
        return Section(figures, None, (text + f"{remedy(evidence)}.",))
    text = f"Latents tell between {lower.value:.3g} and {upper.value:.3g} nats of the observation and what preceded it."
    return Section(figures, None, (text,))
