"""Mean and variance of numbers that keep coming: the one way in which the parts follow them."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn


class RunningMoments(nn.Module):
    """Mean and variance [*D] of rows [N, *D], in float64 and kept with the weights.

    memory  None: every row counts the same, for ever. Else the share that what was known keeps at each batch; until that is
            reached it is the plain average of the batches so far, so that the first one counts in full
    before  the mean before anything was seen; the variance is 1 then

    Of a batch that is not all finite nothing enters: it would not leave again, and an update that is skipped leaves nothing
    behind. Buffers are replaced and not changed, since a loss that is yet to be differentiated may hold them.
    Source: Chan et al. 1979 (parallel variance).
    """

    def __init__(self, shape: tuple[int, ...] | int, memory: float | None = None, initial_mean: float = 0.0):
        super().__init__()
        shape = (shape,) if isinstance(shape, int) else shape
        self.memory = memory
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.full(shape, initial_mean, dtype=torch.float64))
        self.register_buffer("variance", torch.ones(shape, dtype=torch.float64))

    @torch.no_grad()
    def update(self, batch: Float[Tensor, "N *D"]) -> None:
        """Take rows in. `count` is that of rows or, with a memory, of batches."""
        if not len(batch):
            return
        x = batch.detach().to(self.mean)
        mean, variance = x.mean(0), x.var(0, correction=0)
        finite = (mean.isfinite() & variance.isfinite()).all()  # of the batch: an overflow of squares is not taken in either
        total = self.count + (len(x) if self.memory is None else 1)
        share = (total - self.count) / total
        if self.memory is not None:
            share = share.clamp_min(1 - self.memory)
        spread = torch.lerp(self.variance, variance, share) + share * (1 - share) * (mean - self.mean).square()
        self.variance = torch.where(finite, spread, self.variance)
        self.mean = torch.where(finite, torch.lerp(self.mean, mean, share), self.mean)
        self.count = torch.where(finite, total, self.count)

    @torch.no_grad()
    def reset_to(self, batch: Float[Tensor, "N *D"]) -> None:
        """From now on those of these rows, which weigh as much as the memory holds: what comes later moves them no faster."""
        initial_mean, self.count = self.count, torch.zeros_like(self.count)
        self.update(batch)
        after = self.count if self.memory is None else torch.full_like(self.count, round(1 / (1 - self.memory)))
        self.count = torch.where(self.count > 0, after, initial_mean)

    def deviation(self, min_value: float) -> Tensor:
        """float32 [*D], at least `least`."""
        return self.variance.sqrt().clamp_min(min_value).float()
