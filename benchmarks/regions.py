"""Whether samples look like real observations: nearest-neighbour regions, holes, and the smoothness of a decoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

AT_ONCE = 1 << 24
"""Distances that are held in memory together."""


def nearest(x: Float[Tensor, "N D"], reference: Float[Tensor, "M D"]) -> Float[Tensor, " N"]:
    """The distance of each sample of `x` to the nearest of `reference`."""
    rows = max(1, AT_ONCE // max(1, len(reference)))
    return torch.cat([torch.cdist(part, reference).amin(1) for part in x.split(rows)]) if len(x) else x.new_zeros(0)


@dataclass(frozen=True)
class Region:
    """The region of real observations: all points within `radius` of one of them.

    reference  [M, D] held-out observations
    radius     within which the given share of other held-out observations have a neighbour in `reference`

    The radius shrinks with more observations, so that regions are comparable at equal sizes only.
    """

    reference: Float[Tensor, "M D"]
    radius: float

    @classmethod
    def of(cls, reference: Float[Tensor, "M D"], others: Float[Tensor, "N D"], share: float = 0.99) -> Region:
        """The region around `reference` that holds `share` of `others`. Raises ValueError where one of them is empty."""
        if not len(reference) or not len(others):
            raise ValueError(f"A region needs real observations on both sides, not {len(reference)} and {len(others)}.")
        return cls(reference, float(nearest(others, reference).quantile(share)))

    def contains(self, x: Float[Tensor, "N D"]) -> Bool[Tensor, " N"]:
        """Whether each sample lies in the region; the share of a prior's samples that do not is its hole mass."""
        return nearest(x, self.reference) <= self.radius


def decoder_sensitivity(
    decode: Callable[[Tensor], Tensor], z: Float[Tensor, "N Z"], *, probes: int = 8, generator: torch.Generator | None = None
) -> Float[Tensor, " N"]:
    """Root mean square change of `decode` [N, Z] -> [N, D] per unit step of z: ||J||_F / sqrt(Z) at each sample.

    Hutchinson's estimate with `probes` random signs: E |J v|^2 = ||J||_F^2 for E v v' = I.
    """
    total = torch.zeros(len(z), device=z.device)
    for _ in range(probes):
        v = torch.randint(0, 2, z.shape, generator=generator, device=z.device).to(z) * 2 - 1
        _, change = torch.func.jvp(decode, (z,), (v,))
        total += change.flatten(1).square().sum(1)
    return (total / probes / z.shape[1]).sqrt()


def path_ratio(
    decode: Callable[[Tensor], Tensor], one: Float[Tensor, "N Z"], other: Float[Tensor, "N Z"], steps: int = 16
) -> Float[Tensor, " N"]:
    """Length of the decoded straight line between two latents over the distance of its ends, at least 1."""
    share = torch.linspace(0, 1, steps + 1, device=one.device).view(-1, 1, 1)
    path = decode(torch.lerp(one, other, share).flatten(0, 1)).flatten(1).unflatten(0, (steps + 1, len(one)))
    straight = (path[-1] - path[0]).norm(dim=-1)
    return path.diff(dim=0).norm(dim=-1).sum(0) / straight.clamp_min(1e-6)
