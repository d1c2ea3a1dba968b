"""Sampling where a density is known up to a factor: Langevin chains, gradient ascent, and a prior tilted by a score."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from worldmodel.data import Sampling
from worldmodel.distributions.base import ConditionalDistribution

LogDensity = Callable[[Tensor], Tensor]
"""Points [*N, D] -> ln of a density there, up to a constant [*N]."""
CLIP = 10.0
"""Largest gradient in a step, per unit of its scale."""


def value_and_drift(level: LogDensity, z: Tensor, scale: Tensor, clip: float = CLIP) -> tuple[Tensor, Tensor]:
    """(level [*N], drift [*N D] of a Langevin step of size `scale`); clipped, without a graph."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        value = level(z)
        (gradient,) = torch.autograd.grad(value.sum(), z)
    return value.detach(), 0.5 * scale * (scale * gradient).clamp(-clip, clip)


@torch.no_grad()
def langevin(
    level: LogDensity,
    z: Float[Tensor, "*N D"],
    scale: Tensor,
    steps: int,
    generator: torch.Generator | None,
    clip: float = CLIP,
) -> Float[Tensor, "*N D"]:
    """Metropolis-adjusted Langevin steps from z: chains whose stationary distribution is that of `level`.

    z' = z + scale^2 / 2 grad level(z) + scale xi. Source: Roberts and Tweedie 1996.
    """
    z = z.detach()
    value, drift = value_and_drift(level, z, scale, clip)
    for _ in range(steps):
        noise = torch.randn(z.shape, generator=generator, device=z.device)
        proposal = z + drift + scale * noise
        new_value, new_drift = value_and_drift(level, proposal, scale, clip)
        back = (z - proposal - new_drift) / scale
        gain = new_value - value + 0.5 * (noise.square() - back.square()).sum(-1)
        accepted = torch.rand(gain.shape, generator=generator, device=z.device).log() < gain
        value = torch.where(accepted, new_value, value)
        z, drift = (torch.where(accepted.unsqueeze(-1), new, old) for new, old in ((proposal, z), (new_drift, drift)))
    return z


@torch.no_grad()
def gradient_ascent(
    level: LogDensity, z: Float[Tensor, "*N D"], scale: Tensor, steps: int, clip: float = CLIP
) -> Float[Tensor, "*N D"]:
    """Gradient ascent; a step that does not lead upwards is rejected, and the next ones are half as long."""
    scale = scale.expand_as(z)
    value, drift = value_and_drift(level, z, scale, clip)
    for _ in range(steps):
        new_value, onward = value_and_drift(level, z + drift, scale, clip)
        accepted = (new_value > value).unsqueeze(-1)
        z, value = torch.where(accepted, z + drift, z), torch.maximum(new_value, value)
        drift, scale = torch.where(accepted, onward, drift / 4), torch.where(accepted, scale, scale / 2)
    return z


@torch.no_grad()
def tilted(
    prior: ConditionalDistribution,
    score: LogDensity,
    count: int,
    strength: float,
    sampling: Sampling | None = None,
    *,
    pool: int = 2000,
    steps: int = 20,
) -> tuple[Float[Tensor, "K D"], float]:
    """(K draws of p(x) exp(strength * score(x)) / Z, effective sample size) from an unconditional prior of any form.

    K of `pool` weighted draws are taken; where the prior has a density of real numbers, each then goes `steps` Langevin steps, so
    that equal ones separate. A small effective sample size says that the prior hardly ever draws what the score asks for, and that
    the strength should be lower. Source: Rubin 1987 (resampling).
    """
    sampling = sampling or Sampling()
    drawn = prior.sample(None, max(pool, count), sampling)[:, 0]
    weight = (strength * score(drawn)).softmax(0)
    first = torch.rand((), generator=sampling.generator, device=drawn.device)
    uniforms = (first + torch.arange(count, device=drawn.device)) / count
    chosen = torch.searchsorted(weight.cumsum(0), uniforms).clamp_max(len(drawn) - 1)  # systematic: one in each K-th of the weight
    x, size = drawn[chosen], float(1 / weight.square().sum())
    if prior.density != "none" and prior.latent.continuous and steps:
        scale = 0.3 * drawn.std(0).clamp_min(1e-6)
        x = langevin(lambda z: prior.log_prob(z, None) + strength * score(z), x, scale, steps, sampling.generator)
    return x, size
