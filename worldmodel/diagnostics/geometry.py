"""The shape of the latent space: what each part of the code carries, and what changes when it is moved."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from worldmodel.data import Episodes, Sampling, Trace
from worldmodel.model import WorldModel


@torch.no_grad()
def beliefs(world: WorldModel, episodes: Episodes) -> Trace:
    """The trace [1, R] of whole episodes by the beliefs' modes: what the model thinks at each row, noise left out."""
    world.eval()
    rows = episodes.rows.to(world.device)
    return world.trace(rows.with_obs(world.inputs(rows.obs)), None, Sampling(mode=True))


@dataclass(frozen=True)
class Usage:
    """How much of a code is used.

    rate    [V] mean KL of each variable of the code against the transition (or initial) law, in nats per step; None where
            that law has no closed form, or does not split by variable
    active  variables that say different things about different rows (`WorldModel.active_units`)
    total   [] mean rate of the whole code, in nats per step
    """

    rate: Float[Tensor, " V"] | None
    active: int
    total: float


@torch.no_grad()
def usage(world: WorldModel, episodes: Episodes, trace: Trace) -> Usage:
    """What each variable of the code carries on these episodes."""
    given = getattr(world.dynamics.transition, "given", None)
    rate = None
    if given is not None and hasattr(trace.posterior, "kl_elements"):
        inside = ~episodes.rows.is_first.to(trace.h.device)
        rate = trace.posterior.index(inside).kl_elements(given(trace.h[inside])).mean(0).cpu()
    return Usage(rate, world.active_units(trace), float(trace.rates["rate"].mean()))


@torch.no_grad()
def traversal(world: WorldModel, trace: Trace, row: int, steps: int = 7, width: float = 2.5) -> Float[Tensor, "V S F"]:
    """The features of one row with one variable of its code moved at a time, over what the code does on the whole trace.

    Real numbers go over `width` deviations to both sides of their mean, categories through their classes (the first `steps`).
    """
    codes = trace.z[0]
    moved = world.dynamics.latent.traverse(codes[row], codes, steps, width)
    carry = trace.h[0, row].expand(*moved.shape[:2], -1)
    return torch.cat([carry, moved], -1)


def interpolation(one: Float[Tensor, " F"], other: Float[Tensor, " F"], steps: int = 9) -> Float[Tensor, "S F"]:
    """Features on the straight line between two; categorical codes pass through mixtures of their categories."""
    return torch.lerp(one, other, torch.linspace(0, 1, steps, device=one.device).unsqueeze(-1))
