"""The latent space: KL of each variable, traversals and interpolations."""

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
    """Posteriors and states at R rows of episodes, each z the posterior's mode.

    episode, step  [R]  where the rows are
    rows           Batch [R, 1], raw
    rate           mean KL of posterior and prior, in nats per step; NaN for deterministic latents
    active         latent variables that depend on the observation (`WorldModel.active_units`)
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
    """Posteriors and states at the first `max_steps` rows of each episode."""
    world.eval()
    index = torch.arange(len(episodes.lengths))
    window, inside = episodes.windows(index, torch.zeros_like(index), min(max_steps, int(episodes.lengths.max())))
    rows = window.to(world.device)
    batch = rows.with_obs(world.preprocess(rows.obs))
    trace = world.trace(batch, None, Sampling(mode=True))
    draws = Sampling(generator=torch.Generator(world.device).manual_seed(0))  # evaluation moves no random state
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
    """Mean KL of each latent variable to the transition, in nats per step, over rows that open no episode.

    None where the transition has no closed form, or its KL does not split by variable.
    """
    prior = world.dynamics.transition
    if prior is None or not prior.closed_form or world.dynamics.latent.deterministic:
        return None
    later = seen.step > 0
    return seen.posterior.index(later).kl_elements(prior.given(seen.h[later])).mean(0).cpu()


@torch.no_grad()
def traversal(world: WorldModel, seen: FilteredStates, row: int, steps: int = 7, width: float = 2.5) -> Float[Tensor, "V S F"]:
    """The features of one row with one latent variable moved at a time.

    Real numbers move `width` deviations over all rows to both sides of their mean, categories through their first `steps` classes.
    """
    moved = world.dynamics.latent.traverse(seen.z[row], seen.z, steps, width)
    prefix = seen.feature[row, : -moved.shape[-1]]  # a feature ends in its latent
    return torch.cat([prefix.expand(*moved.shape[:2], -1), moved], -1)


def interpolation(one: Float[Tensor, " F"], other: Float[Tensor, " F"], steps: int = 9) -> Float[Tensor, "S F"]:
    """Features on the straight line between two; categorical latents pass through mixtures of their categories."""
    return torch.lerp(one, other, torch.linspace(0, 1, steps, device=one.device).unsqueeze(-1))


def spherical(
    one: Float[Tensor, "*#N Z"], other: Float[Tensor, "*#N Z"], share: float | Float[Tensor, "*#N 1"]
) -> Float[Tensor, "*N Z"]:
    """Spherical interpolation of latents, `share` of the way, with the norm interpolated linearly.

    Normal latents in many dimensions lie near a sphere, which a straight line leaves. Latents on one line through 0 have no arc
    and are interpolated linearly. Source: Shoemake 1985; White 2016, section 2.1.
    """
    lengths = one.norm(dim=-1, keepdim=True), other.norm(dim=-1, keepdim=True)
    a, b = (x / length.clamp_min(1e-12) for x, length in zip((one, other), lengths, strict=True))
    angle = torch.arccos((a * b).sum(-1, keepdim=True).clamp(-1, 1))
    direction = (torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b) / angle.sin().clamp_min(1e-4)
    return torch.where(angle.sin() < 1e-4, torch.lerp(one, other, share), direction * torch.lerp(*lengths, share))
