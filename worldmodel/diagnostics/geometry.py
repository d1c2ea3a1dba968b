"""The shape of the latent space: what each part of the code carries, and what changes when it is moved."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from worldmodel.data import Batch, Episodes, Sampling
from worldmodel.distributions import Posterior
from worldmodel.model import WorldModel


@dataclass(frozen=True)
class FilteredStates:
    """What a model thinks at R rows of episodes, noise left out.

    episode, step  [R]  where the rows are
    rows           Batch [R, 1], raw
    belief         posterior [R]
    code, carry    its mode [R, Z]; the carry before the row was seen [R, D]
    feature        [R, F]
    rate           mean KL of the posteriors against the transition or initial law, in nats per step; NaN of point codes
    active         variables of the code that say different things about different rows (`WorldModel.active_units`)
    """

    episode: Int[Tensor, " R"]
    step: Int[Tensor, " R"]
    rows: Batch
    posterior: Posterior
    z: Float[Tensor, "R Z"]
    h: Float[Tensor, "R D"]
    feature: Float[Tensor, "R F"]
    rate: float
    active: int


@torch.no_grad()
def filter_episodes(world: WorldModel, episodes: Episodes, max_steps: int = 100) -> FilteredStates:
    """The beliefs about the first `most` rows of each episode."""
    world.eval()
    each = torch.arange(len(episodes.lengths))
    window, inside = episodes.windows(each, torch.zeros_like(each), min(max_steps, int(episodes.lengths.max())))
    rows = window.to(world.device)
    batch = rows.with_obs(world.preprocess(rows.obs))
    trace = world.trace(batch, None, Sampling(mode=True))
    draws = Sampling(generator=torch.Generator(world.device).manual_seed(0))  # what is only looked at moves no random state
    rate = world.dynamics.losses(trace, batch, draws).get("dyn")
    episode, step = inside.nonzero(as_tuple=True)
    return FilteredStates(
        episode,
        step,
        window.map(lambda x: x[inside].unsqueeze(1)),
        trace.posterior.index(inside),
        trace.z[inside],
        trace.h[inside],
        trace.feature[inside],
        math.nan if rate is None else float(rate.value[inside].mean()),
        world.active_units(trace),
    )


@torch.no_grad()
def usage(world: WorldModel, seen: FilteredStates) -> Float[Tensor, " V"] | None:
    """Mean KL of each variable of the code against the transition law, in nats per step, over rows that open no episode.

    None where that law has no closed form, or does not split by variable.
    """
    prior = world.dynamics.transition
    if prior is None or not prior.closed_form or world.dynamics.latent.deterministic:
        return None
    later = seen.step > 0
    return seen.posterior.index(later).kl_elements(prior.given(seen.h[later])).mean(0).cpu()


@torch.no_grad()
def traversal(world: WorldModel, seen: FilteredStates, row: int, steps: int = 7, width: float = 2.5) -> Float[Tensor, "V S F"]:
    """The features of one row with one variable of its code moved at a time, over what the code does in all rows.

    Real numbers go over `width` deviations to both sides of their mean, categories through their classes (the first `steps`).
    """
    moved = world.dynamics.latent.traverse(seen.z[row], seen.z, steps, width)
    prefix = seen.feature[row, : -moved.shape[-1]]  # a feature ends in its code
    return torch.cat([prefix.expand(*moved.shape[:2], -1), moved], -1)


def interpolation(one: Float[Tensor, " F"], other: Float[Tensor, " F"], steps: int = 9) -> Float[Tensor, "S F"]:
    """Features on the straight line between two; categorical codes pass through mixtures of their categories."""
    return torch.lerp(one, other, torch.linspace(0, 1, steps, device=one.device).unsqueeze(-1))


def spherical(
    one: Float[Tensor, "*#N Z"], other: Float[Tensor, "*#N Z"], share: float | Float[Tensor, "*#N 1"]
) -> Float[Tensor, "*N Z"]:
    """Codes on the arc from one to the other, `share` of the way, whose length goes evenly from one's to the other's.

    Where codes are normal in many dimensions, all lie near a sphere, and the straight line leaves it. Source: Shoemake 1985;
    White 2016, section 2.1. Codes on one line through 0 have no arc: they get the line.
    """
    lengths = one.norm(dim=-1, keepdim=True), other.norm(dim=-1, keepdim=True)
    a, b = (x / length.clamp_min(1e-12) for x, length in zip((one, other), lengths, strict=True))
    angle = torch.arccos((a * b).sum(-1, keepdim=True).clamp(-1, 1))
    direction = (torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b) / angle.sin().clamp_min(1e-4)
    return torch.where(angle.sin() < 1e-4, torch.lerp(one, other, share), direction * torch.lerp(*lengths, share))
