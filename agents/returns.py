"""Lambda-returns, weights and the return scale: pure functions of an imagined rollout."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def lambda_return(
    reward: Float[Tensor, "B H"], discount: Float[Tensor, "B H"], value: Float[Tensor, "B H+1"], lam: float = 0.95
) -> Float[Tensor, "B H"]:
    """TD(lambda) return of every imagined step, in the unit of the rewards.

    R[t] = reward[t] + discount[t] * ((1 - lam) * value[t+1] + lam * R[t+1]),   R[H] = value[H]
    reward[t], discount[t]: on arriving at step t+1; discount = gamma * P(not ended), in [0, 1]. value has H+1 columns.
    Source: Hafner et al. 2023 (DreamerV3), eq. 7; Sutton and Barto 2018, section 12.1.
    """
    returns = [value[:, -1]]
    interim = reward + discount * (1 - lam) * value[:, 1:]
    for t in reversed(range(reward.shape[1])):
        returns.append(interim[:, t] + discount[:, t] * lam * returns[-1])
    return torch.stack(returns[:0:-1], 1)


def weights(start: Float[Tensor, " B"], discount: Float[Tensor, "B H"]) -> Float[Tensor, "B H+1"]:
    """How likely each imagined step is reached, discounted: start * cumulative product of the discounts before it.

    start is 0 for a state in which the world has ended: imagination from there counts for nothing.
    """
    return torch.cumprod(torch.cat([start.unsqueeze(1), discount], 1), 1)


class ReturnScale:
    """Running 5th to 95th percentile range of the returns, at least 1 (of the unit they come in): what an advantage is divided by.

    `low` and `high` are in rewards, since the unit that returns come in may move.
    Source: Hafner et al. 2023 (DreamerV3), eq. 12.
    """

    def __init__(self, rate: float = 0.01):
        self.rate = rate
        self.low: float | None = None
        self.high: float | None = None

    def update(self, returns: Float[Tensor, "..."], unit: float = 1.0) -> float:
        """Take returns in, which come in units of so many rewards; gives the scale in those.

        Returns that are not all finite are left out: they would never leave it again.
        """
        if not returns.isfinite().all():
            return self.value(unit)
        ends = torch.tensor([0.05, 0.95], device=returns.device)
        low, high = (unit * x for x in torch.quantile(returns.detach().flatten().float(), ends).tolist())
        self.low = low if self.low is None else self.low + self.rate * (low - self.low)
        self.high = high if self.high is None else self.high + self.rate * (high - self.high)
        return self.value(unit)

    def value(self, unit: float = 1.0) -> float:
        """The scale in units of so many rewards."""
        return 1.0 if self.low is None else max(1.0, (self.high - self.low) / unit)
