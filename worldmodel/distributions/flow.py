"""Normalising flows: a Gaussian transformed by rational-quadratic splines."""

from __future__ import annotations

import math
import warnings
from typing import Any, Literal

import torch
import zuko
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from worldmodel.config import Frozen
from worldmodel.data import Loss, Sampling
from worldmodel.distributions.base import Posterior, PosteriorSource
from worldmodel.distributions.latent import Latent
from worldmodel.distributions.whitening import Whitened
from worldmodel.nn.moments import RunningMoments
from worldmodel.nn.networks import SkipMLP
from worldmodel.registry import register


class FlowConfig(Frozen):
    """Sizes of the flow, and of the network that gives a Gaussian from the context in front of it."""

    kind: Literal["flow"] = "flow"
    transforms: int = Field(2, ge=1, description="spline transforms, one after the other; halves of the latent take turns")
    bins: int = Field(8, ge=2, description="bins of each spline")
    units: int = Field(64, ge=1, description="width of the networks")
    layers: int = Field(2, ge=1, description="hidden layers of the networks that give the splines")


@register("distribution", "flow", FlowConfig)
class Flow(Whitened):
    """x -> whitened y -> splines -> noise e ~ N(0, I):  ln p(x) = ln N(e) + ln |de/dy| - sum ln std.

    The splines act on [-REACH, REACH] only and are the identity outside, so latents are whitened first (see `Whitened`). Couplings
    (for a latent of one number: a spline on its own) make sampling as cheap as scoring. The splines start as the identity.
    Source: Durkan et al. 2019 (neural spline flows), with zuko's transforms.
    """

    density = "exact"
    slots = frozenset({"initial", "transition", "marginal"})
    latent_kinds = frozenset({"gaussian"})
    REACH = 5.0
    WARN_OUTSIDE = 0.05
    """The share of whitened numbers outside [-REACH, REACH] from which on `measures` warns."""
    MEMORY = 0.99
    """The share of the running statistics that stays at each update."""

    def __init__(self, config: FlowConfig, latent: Latent, context_dim: int, source: PosteriorSource | None = None):
        super().__init__(latent, context_dim)
        if context_dim:
            self.frame = SkipMLP(context_dim, config.units, 1, latent.parameters)
        else:
            self.moments = RunningMoments(latent.size, self.MEMORY)
        sizes = {"hidden_features": [config.units] * config.layers, "activation": nn.SiLU}
        splines = zuko.flows.NSF(latent.size, context_dim, config.bins, transforms=config.transforms, passes=2, **sizes)
        self.splines = splines.transform
        for transform in self.splines.transforms:
            final = transform.hyper[-1].parameters() if hasattr(transform, "hyper") else transform.phi
            for parameter in final:
                nn.init.zeros_(parameter)

    def log_prob(self, x: Float[Tensor, "*N D"], context: Tensor | None) -> Float[Tensor, "*N"]:
        frame = self.whitening(context)
        with torch.autocast(x.device.type, enabled=False):  # splines and their inverse disagree in bf16
            noise, log_det = self.splines(context).call_and_ladj((x.float() - frame.mean) / frame.std)
        normal = -0.5 * (noise.square() + math.log(2 * math.pi)).sum(-1)
        return normal + log_det - frame.std.log().sum(-1)

    def sample(self, context: Tensor | None, count: int = 1, sampling: Sampling | None = None) -> Float[Tensor, "K N D"]:
        """`temperature` scales the noise; `mode` is the image of noise 0, which need not be the most likely latent."""
        frame = self.whitening(context)
        noise = self.noise((count, *frame.mean.shape), sampling or Sampling())
        return frame.mean + frame.std * self.splines(context).inv(noise)

    def forward(self, posterior: Posterior, z: Tensor, context: Tensor | None, **options: Any) -> Tensor:
        nats = super().forward(posterior, z, context)
        self.update_moments(z)
        return nats

    def loss(
        self, x: Tensor, context: Tensor | None, *, sampling: Sampling | None = None, rows: Tensor | None = None
    ) -> dict[str, Loss]:
        terms = super().loss(x, context)
        self.update_moments(x)
        return terms

    @torch.no_grad()
    def outside(self, x: Float[Tensor, "*N D"], context: Tensor | None) -> float:
        """The share of whitened numbers beyond the splines' reach, where the flow is only a Gaussian."""
        frame = self.whitening(context)
        return float((((x - frame.mean) / frame.std).abs() > self.REACH).float().mean())

    def measures(self, x: Float[Tensor, "N D"], context: Float[Tensor, "N C"] | None) -> dict[str, float]:
        """outside: see there; a warning from WARN_OUTSIDE on."""
        share = self.outside(x, context)
        if share > self.WARN_OUTSIDE:
            warnings.warn(
                f"Flow: {share:.0%} of the whitened numbers lie beyond {self.REACH:g}, where splines do nothing. "
                "Lower train.lr, or fit the flow to frozen latents (`fit`), which whitens by all of them.",
                RuntimeWarning,
                stacklevel=2,
            )
        return {"outside": share}
