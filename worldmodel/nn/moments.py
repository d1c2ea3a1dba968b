"""Running mean and variance: of all data, or an exponential average."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn


class RunningMoments(nn.Module):
    """Mean and variance [*D] of rows [N, *D], in float64 and kept with the weights.

    memory        None: all rows weigh the same. Else the share that the statistics keep at each batch; at first less, so that they
                  are the plain average of the batches so far
    initial_mean  the mean before any data; the variance is 1 then

    A batch that is not all finite is left out. Buffers are replaced and not changed in place, since a loss that is yet to be
    differentiated may hold them.
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
        """Takes rows in. `count` is that of rows or, with a memory, of batches."""
        if not len(batch):
            return
        x = batch.detach().to(self.mean)
        mean, variance = x.mean(0), x.var(0, correction=0)
        finite = (mean.isfinite() & variance.isfinite()).all()  # an overflow of squares is left out too
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
        """The statistics of these rows alone, at full memory: later batches then move them no faster than usual."""
        before, self.count = self.count, torch.zeros_like(self.count)
        self.update(batch)
        after = self.count if self.memory is None else torch.full_like(self.count, round(1 / (1 - self.memory)))
        self.count = torch.where(self.count > 0, after, before)

    def deviation(self, min_value: float) -> Tensor:
        """float32 [*D], at least `min_value`."""
        return self.variance.sqrt().clamp_min(min_value).float()
