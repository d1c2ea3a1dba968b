"""Whether samples look like real observations: nearest-neighbour regions."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from worldmodel.diagnostics.holes import nearest


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
