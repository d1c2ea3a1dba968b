"""An ensemble of Gaussians: their spread is what the world leaves open, their disagreement what the data do."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from worldmodel.config import Frozen
from worldmodel.data import Loss, Sampling
from worldmodel.distributions.base import ConditionalDistribution, PosteriorSource
from worldmodel.distributions.latent import Latent, Posterior
from worldmodel.nn.moments import RunningMoments
from worldmodel.nn.networks import EnsembleLinear
from worldmodel.registry import register

LOG_STD = (-7.0, 1.5)
"""Bounds of ln(deviation), approached smoothly."""


class EnsembleGaussianConfig(Frozen):
    """Members that differ in their first weights."""

    kind: Literal["ensemble"] = "ensemble"
    members: int = Field(5, ge=2, description="networks from context to mean, and as many to deviation")
    units: int = Field(96, ge=1, description="width of each")
    layers: int = Field(3, ge=1, description="hidden layers of each")
    spread_units: int = Field(32, ge=1, description="width of the networks from context to deviation")


class EnsembleMLP(nn.Module):
    """K perceptrons side by side: [N, C] -> [K, N, O]; `straight`: each with a linear path beside it. First outputs are small."""

    def __init__(self, members: int, inputs: int, units: int, layers: int, outputs: int, *, straight: bool):
        super().__init__()
        self.members = members
        widths = [inputs, *[units] * layers]
        self.layers = nn.ModuleList(EnsembleLinear(members, *pair) for pair in pairwise(widths))
        self.out = EnsembleLinear(members, units, outputs)
        self.straight = EnsembleLinear(members, inputs, outputs) if straight else None
        for layer in (self.out, self.straight) if straight else (self.out,):
            layer.weight.data *= 0.1

    def forward(self, x: Float[Tensor, "N C"], rows: Int[Tensor, "K M"] | None = None) -> Float[Tensor, "K M O"]:
        """All members of all rows, or each member of its own `rows`."""
        x = hidden = x.expand(self.members, -1, -1) if rows is None else x[rows]
        for layer in self.layers:
            hidden = F.silu(layer(hidden))
        return self.out(hidden) if self.straight is None else self.out(hidden) + self.straight(x)


@register("distribution", "ensemble", EnsembleGaussianConfig)
class EnsembleGaussian(ConditionalDistribution):
    """K Gaussians with the same weight; each has its own network, and a linear path in it, so that it extrapolates.

    Each member learns alone. Its mean minimises the squared error; its deviation, from a network of its own, the negative
    log-likelihood. Where both share a likelihood, numbers that are badly predicted are given up (Seitzer et al. 2022); where they
    share layers, the deviation's gradient, whose size does not fall with the error, keeps the mean from being exact.
    Source: Lakshminarayanan et al. 2017; Chua et al. 2018 (PETS), section 4, for the use in dynamics.
    """

    density = "exact"
    slots = frozenset({"initial", "transition", "marginal"})
    latent_kinds = frozenset({"gaussian"})
    MEMORY = 0.95
    """Decay of the calibration: the mean squares of errors and of the deviations that were predicted for them."""

    def __init__(self, config: EnsembleGaussianConfig, latent: Latent, context_dim: int, source: PosteriorSource | None = None):
        super().__init__(latent, context_dim)
        self.members = config.members
        self.calibration = RunningMoments((2, latent.size), self.MEMORY, initial_mean=1.0)
        if not context_dim:
            self.free = nn.Parameter(0.1 * torch.randn(self.members, 1, 2 * latent.size))
            return
        self.means = EnsembleMLP(self.members, context_dim, config.units, config.layers, latent.size, straight=True)
        self.log_stds = EnsembleMLP(self.members, context_dim, config.spread_units, 1, latent.size, straight=False)

    def members_given(self, context: Float[Tensor, "*N C"] | None) -> tuple[Float[Tensor, "K *N D"], Float[Tensor, "K *N D"]]:
        """(means, deviations) of the members; without context N is [1]."""
        mean, std = self._uncalibrated(context)
        return mean, std * self._factor

    @property
    def _factor(self) -> Float[Tensor, " D"]:
        """By which deviations are too small."""
        errors, predicted = self.calibration.mean
        return (errors / predicted).sqrt().float()

    def _uncalibrated(self, context: Tensor | None) -> tuple[Tensor, Tensor]:
        if context is None:
            return self._bounded(*self.free.chunk(2, -1))
        rows = context.reshape(-1, context.shape[-1])
        shape = (self.members, *context.shape[:-1], -1)
        return self._bounded(self.means(rows).view(shape), self.log_stds(rows.detach()).view(shape))

    @staticmethod
    def _bounded(mean: Tensor, log_std: Tensor) -> tuple[Tensor, Tensor]:
        low, high = LOG_STD
        log_std = high - F.softplus(high - log_std.float())
        return mean.float(), (low + F.softplus(log_std - low)).exp()

    def _one_each(self, context: Float[Tensor, "N C"], member: Int[Tensor, " N"]) -> tuple[Tensor, Tensor]:
        """(mean, deviation) [N, D] of one member for each row: a K-th of the computation of all."""
        order, count = member.argsort(), member.bincount(minlength=self.members)
        place = torch.arange(len(member), device=member.device) - (count.cumsum(0) - count)[member[order]]
        rows = order.new_zeros(self.members, int(count.max()))
        rows[member[order], place] = order
        mean, std = self._bounded(self.means(context, rows), self.log_stds(context.detach(), rows))
        where = torch.empty_like(order)
        where[order] = place
        return mean[member, where], std[member, where] * self._factor

    @torch.no_grad()
    def calibrate(self, used: EnsembleGaussian, x: Float[Tensor, "N D"], context: Float[Tensor, "N C"] | None) -> None:
        """Takes in how large the errors of `used` are, and the deviations that it predicts for them.

        Deviations follow the errors of the weights that are trained; an average of these weights has smaller ones. The ratio is
        that of mean squares, so that the spread of draws is as large as their error; the mean of ratios would be that of the few
        rows whose errors are underestimated, and make the draws of all others too wide.
        """
        mean, std = (_wide(y, x) for y in used._uncalibrated(context))
        self.calibration.update(torch.stack([(x - mean).square(), std.square().expand(len(std), *x.shape)], 2).mean(0))

    def sample(self, context: Tensor | None, count: int = 1, sampling: Sampling | None = None) -> Float[Tensor, "K N D"]:
        """Each draw is of a member that is drawn first; the mode is the mean of all."""
        return self.draw(context, count, sampling)[0]

    def draw(
        self,
        context: Tensor | None,
        count: int = 1,
        sampling: Sampling | None = None,
        member: Int[Tensor, " N"] | None = None,
    ) -> tuple[Float[Tensor, "K N D"], Float[Tensor, "N D"]]:
        """(draws of the members that are given or drawn, variance between the means of all members).

        The variance is 0 where `sampling` wants no uncertainty and members are given: they alone are computed then.
        """
        sampling = sampling or Sampling()
        if member is not None and context is not None and not (sampling.uncertainty or sampling.mode):
            mean, std = self._one_each(context, member)
            noise = (
                self.latent.noise((count, len(mean)), sampling.generator, mean.device) if sampling.noise is None else sampling.noise
            )
            return torch.addcmul(mean, std * sampling.temperature, noise), torch.zeros_like(mean)
        means, stds = self.members_given(context)
        shape, between = (count, *means.shape[1:-1]), means.var(0)
        if sampling.mode:
            return means.mean(0).expand(*shape, -1), between
        if member is None:
            member = torch.randint(self.members, shape, generator=sampling.generator, device=means.device)
        index = member.expand(shape).unsqueeze(-1).expand(*shape, means.shape[-1])
        mean, std = (torch.gather(x, 0, index) for x in (means, stds))
        noise = sampling.noise
        if noise is None:
            noise = self.latent.noise(shape, sampling.generator, means.device)
        return torch.addcmul(mean, std * sampling.temperature, noise), between

    def log_prob(self, x: Float[Tensor, "*N D"], context: Tensor | None) -> Float[Tensor, "*N"]:
        mean, std = (_wide(y, x) for y in self.members_given(context))
        nats = 0.5 * ((x - mean) / std).square() + std.log() + 0.5 * math.log(2 * math.pi)
        return (-nats.sum(-1)).logsumexp(0) - math.log(self.members)

    def rates(self, posterior: Posterior, z: Tensor, context: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
        """The side that trains the members has the gradient of `loss`."""
        rep = self.rate(posterior, z, context, frozen=True, **options)
        own = self.loss(z.detach(), context)["nll"].value
        return rep.detach() + own - own.detach(), rep

    def loss(
        self, x: Float[Tensor, "*N D"], context: Tensor | None, *, sampling: Sampling | None = None, rows: Tensor | None = None
    ) -> dict[str, Loss]:
        """The mean over members of their negative log-likelihoods, with the gradient that the class describes."""
        mean, std = (_wide(y, x) for y in self._uncalibrated(context))
        error = (x - mean).square()
        nats = (0.5 * error.detach() / std.square() + std.log() + 0.5 * math.log(2 * math.pi)).sum(-1)
        means = 0.5 * error.sum(-1)
        return {"nll": Loss((nats + means - means.detach()).mean(0))}


def _wide(members: Float[Tensor, "K *M D"], x: Float[Tensor, "*N D"]) -> Float[Tensor, "K ... D"]:
    """Parameters of K members in a shape that broadcasts with `x`."""
    return members.view(len(members), *[1] * (x.ndim + 1 - members.ndim), *members.shape[1:])
