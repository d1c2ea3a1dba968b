"""Normalising flows: a Gaussian bent by rational-quadratic splines into whatever shape the codes have."""

from __future__ import annotations

import math
import warnings
from typing import Literal

import torch
import zuko
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from worldmodel.config import Frozen
from worldmodel.data import Sampling
from worldmodel.distributions.base import ConditionalDistribution, Latent, PosteriorSource
from worldmodel.distributions.gaussian import GaussianPosterior
from worldmodel.nn.moments import RunningMoments
from worldmodel.nn.networks import SkipMLP
from worldmodel.registry import register


class FlowConfig(Frozen):
    """Sizes of the flow, and of the network that gives a Gaussian from the context in front of it."""

    kind: Literal["flow"] = "flow"
    transforms: int = Field(2, ge=1, description="spline transforms, one after the other; halves of the code take turns")
    bins: int = Field(8, ge=2, description="bins of each spline")
    units: int = Field(64, ge=1, description="width of the networks")
    layers: int = Field(2, ge=1, description="hidden layers of the networks that give the splines")


@register("distribution", "flow", FlowConfig)
class Flow(ConditionalDistribution):
    """x -> whitened y -> splines -> noise e ~ N(0, I):  ln p(x) = ln N(e) + ln |de/dy| - sum ln std.

    The splines act on [-5, 5] only and leave alone what lies outside, so numbers are whitened first: by the codes' running mean
    and deviation, or with a context by a Gaussian mean(h), std(h), since a transition is far narrower than all codes together.
    Couplings (of a code of one number: a spline on its own) make sampling as cheap as scoring. The splines start as the identity.
    Source: Durkan et al. 2019 (neural spline flows), with zuko's transforms.
    """

    density = "exact"
    slots = frozenset({"initial", "transition", "marginal"})
    latent_kinds = frozenset({"gaussian"})
    REACH = 5.0
    """The splines act on [-REACH, REACH]."""
    WARN_OUTSIDE = 0.05
    """The share of whitened numbers outside from which on `measures` warns."""
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
            final = list(transform.hyper[-1].parameters()) if hasattr(transform, "hyper") else transform.phi
            for parameter in final:
                nn.init.zeros_(parameter)

    def whitening(self, context: Tensor | None) -> GaussianPosterior:
        """The Gaussian in front, for each row of the context; without context its batch shape is [1]."""
        if self.context_dim:
            return self.latent.distribution(self.frame(context))
        return GaussianPosterior(self.moments.mean.float().unsqueeze(0), self.moments.deviation(1e-3).unsqueeze(0))

    def whitened(self, x: Float[Tensor, "*N D"], context: Tensor | None) -> Float[Tensor, "*N D"]:
        """What the splines are given."""
        frame = self.whitening(context)
        return (x - frame.mean) / frame.std

    def log_prob(self, x: Float[Tensor, "*N D"], context: Tensor | None) -> Float[Tensor, "*N"]:
        frame = self.whitening(context)
        with torch.autocast(x.device.type, enabled=False):  # splines and their inverse part ways in bf16
            noise, log_det = self.splines(context).call_and_ladj((x.float() - frame.mean) / frame.std)
        normal = -0.5 * (noise.square() + math.log(2 * math.pi)).sum(-1)
        return normal + log_det - frame.std.log().sum(-1)

    def sample(self, context: Tensor | None, count: int = 1, sampling=None) -> Float[Tensor, "K N D"]:
        """`temperature` scales the noise; `mode` is the image of the noise's centre, which need not be the most likely code."""
        frame = self.whitening(context)
        shape = (count, *frame.mean.shape[:-1])
        sampling = sampling or Sampling()
        if sampling.mode:
            noise = frame.mean.new_zeros(*shape, self.latent.size)
        elif sampling.noise is not None:
            noise = sampling.noise.expand(*shape, -1) * sampling.temperature
        else:
            noise = self.latent.noise(shape, sampling.generator, frame.mean.device) * sampling.temperature
        return frame.mean + frame.std * self.splines(context).inv(noise)

    def rate(self, posterior, z, context, *, frozen: bool = False, sampling=None, rows=None):
        nats = super().rate(posterior, z, context, frozen=frozen, sampling=sampling, rows=rows)
        if not frozen:
            self._update_moments(z)
        return nats

    def loss(self, x, context, *, sampling=None, rows=None):
        terms = super().loss(x, context, sampling=sampling, rows=rows)
        self._update_moments(x)
        return terms

    def fit(self, latents, context=None, **options) -> float:
        """As everywhere; the whitening is that of all the codes, and stays."""
        training = self.training
        if not self.context_dim:
            self.moments.reset_to(latents)
        self.eval()
        try:
            return super().fit(latents, context, **options)
        finally:
            self.train(training)

    @torch.no_grad()
    def _update_moments(self, x: Tensor) -> None:
        """Takes codes into the running statistics, after they were scored; nothing moves in eval mode or in frozen weights."""
        x = x.detach().flatten(0, -2)
        if self.context_dim or not self.training or len(x) < 2 or not next(self.parameters()).requires_grad:
            return
        self.moments.update(x)

    @torch.no_grad()
    def outside(self, x: Float[Tensor, "*N D"], context: Tensor | None) -> float:
        """The share of whitened numbers beyond the splines' reach, where the flow is no more than a Gaussian."""
        return float((self.whitened(x, context).abs() > self.REACH).float().mean())

    def measures(self, x: Float[Tensor, "N D"], context: Float[Tensor, "N C"] | None) -> dict[str, float]:
        """outside: see there; a warning from ALARM on."""
        share = self.outside(x, context)
        if share > self.WARN_OUTSIDE:
            warnings.warn(
                f"Flow: {share:.0%} of the whitened numbers lie beyond {self.REACH:g}, where splines do nothing. "
                "Lower train.lr, or fit the flow to frozen codes (`fit`), which whitens by all of them.",
                RuntimeWarning,
                stacklevel=2,
            )
        return {"outside": share}
