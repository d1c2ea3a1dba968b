"""Walks on a density that is known up to a factor: chains, ascents, and a law tilted by a score."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from worldmodel.data import Sampling
from worldmodel.distributions.base import ConditionalDistribution

Level = Callable[[Tensor], Tensor]
"""Points [*N, D] -> ln of a density there, up to a constant [*N]."""
CLIP = 10.0
"""Greatest gradient in a step, per unit of its scale."""


def slope(level: Level, z: Tensor, scale: Tensor, clip: float = CLIP) -> tuple[Tensor, Tensor]:
    """(level [*N], drift [*N D] of a Langevin step of size `scale`); clipped, without a graph."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        height = level(z)
        (up,) = torch.autograd.grad(height.sum(), z)
    return height.detach(), 0.5 * scale * (scale * up).clamp(-clip, clip)


@torch.no_grad()
def langevin(
    level: Level,
    z: Float[Tensor, "*N D"],
    scale: Tensor,
    steps: int,
    generator: torch.Generator | None,
    clip: float = CLIP,
) -> Float[Tensor, "*N D"]:
    """Metropolis-adjusted Langevin steps from z: chains whose law is that of `level`, however long they are.

    z' = z + scale^2 / 2 grad level(z) + scale xi. Source: Roberts and Tweedie 1996.
    """
    z = z.detach()
    height, drift = slope(level, z, scale, clip)
    for _ in range(steps):
        noise = torch.randn(z.shape, generator=generator, device=z.device)
        proposal = z + drift + scale * noise
        there, returning = slope(level, proposal, scale, clip)
        back = (z - proposal - returning) / scale
        gain = there - height + 0.5 * (noise.square() - back.square()).sum(-1)
        taken = torch.rand(gain.shape, generator=generator, device=z.device).log() < gain
        height = torch.where(taken, there, height)
        z, drift = (torch.where(taken.unsqueeze(-1), new, old) for new, old in ((proposal, z), (returning, drift)))
    return z


@torch.no_grad()
def uphill(level: Level, z: Float[Tensor, "*N D"], scale: Tensor, steps: int, clip: float = CLIP) -> Float[Tensor, "*N D"]:
    """Gradient ascent without noise; a step that does not lead upwards is not taken, and the next ones are half as long."""
    scale = scale.expand_as(z)
    height, drift = slope(level, z, scale, clip)
    for _ in range(steps):
        there, onward = slope(level, z + drift, scale, clip)
        taken = (there > height).unsqueeze(-1)
        z, height = torch.where(taken, z + drift, z), torch.maximum(there, height)
        drift, scale = torch.where(taken, onward, drift / 4), torch.where(taken, scale, scale / 2)
    return z


@torch.no_grad()
def tilted(
    law: ConditionalDistribution,
    score: Level,
    count: int,
    strength: float,
    sampling: Sampling | None = None,
    *,
    pool: int = 2000,
    steps: int = 20,
) -> tuple[Float[Tensor, "K D"], float]:
    """(K draws of p(x) exp(strength * score(x)) / Z, effective sample size) from an unconditional law of any form.

    `pool` draws of the law are weighed and K of them taken; where the law has a density of real numbers, each then goes `steps`
    Langevin steps, so that equal ones part. The size counts the draws of the pool that matter: when it is small, the law
    hardly ever draws what the score asks for, and the strength should be lower. Source: Rubin 1987 (resampling).
    """
    sampling = sampling or Sampling()
    drawn = law.sample(None, max(pool, count), sampling)[:, 0]
    weight = (strength * score(drawn)).softmax(0)
    lots = (torch.rand((), generator=sampling.generator, device=drawn.device) + torch.arange(count, device=drawn.device)) / count
    chosen = torch.searchsorted(weight.cumsum(0), lots).clamp_max(len(drawn) - 1)  # systematic: one lot in each K-th
    x, size = drawn[chosen], float(1 / weight.square().sum())
    if law.density != "none" and law.latent.metric and steps:
        scale = 0.3 * drawn.std(0).clamp_min(1e-6)
        x = langevin(lambda z: law.log_prob(z, None) + strength * score(z), x, scale, steps, sampling.generator)
    return x, size
