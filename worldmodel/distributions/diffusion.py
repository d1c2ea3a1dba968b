"""Diffusion over latents: a distribution given by a denoiser."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from worldmodel.config import Frozen
from worldmodel.data import Loss, Sampling
from worldmodel.distributions.base import PosteriorSource
from worldmodel.distributions.latent import Latent, Posterior
from worldmodel.distributions.whitening import Whitened
from worldmodel.nn.diffusion import (
    EDM,
    SIGMA_DATA,
    Denoiser,
    fixed_samples,
    log_prob_bound,
    low_discrepancy,
    ode_log_prob,
)
from worldmodel.nn.moments import RunningMoments
from worldmodel.nn.networks import DenoisingMLP, SkipMLP
from worldmodel.registry import register

MAX_BATCH = 1 << 16
"""Noisy samples that are denoised together by `log_prob`."""


class DiffusionConfig(Frozen):
    """The noise levels, the denoising network, and how many steps a draw takes."""

    kind: Literal["diffusion"] = "diffusion"
    units: int = Field(128, ge=1, description="width of the denoising network")
    layers: int = Field(2, ge=1, description="its hidden layers")
    steps: int = Field(4, ge=1, description="steps of a draw; sampling.steps overrides it")
    sampler: Literal["multistep", "euler", "heun"] = Field(
        "multistep",
        description="multistep: second order with one evaluation a step; euler: first order; heun: two evaluations a step",
    )
    sigma_max: float = Field(5.0, gt=0, description="noise that a draw starts from, beside latents of deviation 0.5")
    sigma_min: float = Field(0.02, gt=0, description="noise of the last step")
    log_sigma_mean: float = Field(-1.2, description="mean of ln(noise) in training")
    log_sigma_std: float = Field(1.8, gt=0, description="its deviation, wide enough for distributions that are nearly points")
    draws: int = Field(4, ge=1, description="noise levels at which each latent is denoised in an update")
    rate_samples: int = Field(4, ge=1, description="noisy samples of each latent that estimate the rate in training")
    levels: int = Field(16, ge=1, description="noise levels of log_prob, each with 4 noisy samples per number of the latent")
    memory: float = Field(0.99, ge=0, lt=1, description="share that the running mean and variance of latents keep at each update")


@register("distribution", "diffusion", DiffusionConfig)
class Diffusion(Whitened):
    """p(x | context) by denoising whitened latents. Slots: initial, transition, marginal.

    The whitening's frame learns by its own likelihood: a network that has to find mean(h) at every noise level rolls out badly. A
    draw follows the deterministic ODE from its noise, so that the same noise gives the same latent; temperature scales that
    noise, and the mode starts from none.

    loss      denoising, all levels weighed alike, and with a context the frame's nats: own parameters and context
    rate      the evidence bound, in which levels weigh by their information: trains the posterior.
              Source of training the two by different weights: Vahdat et al. 2021 (LSGM), section 3.2
    log_prob  that bound from fixed noise; `ode_log_prob` is the exact likelihood of the ODE
    """

    density = "bound"
    slots = frozenset({"initial", "transition", "marginal"})
    latent_kinds = frozenset({"gaussian"})
    MIN_STD = 1e-4

    def __init__(self, config: DiffusionConfig, latent: Latent, context_dim: int, source: PosteriorSource | None = None):
        super().__init__(latent, context_dim)
        self.config = config
        self.edm = EDM(config.log_sigma_mean, config.log_sigma_std, config.sigma_min, config.sigma_max)
        self.network = DenoisingMLP(latent.size, context_dim, config.units, config.layers)
        if context_dim:
            self.frame = SkipMLP(context_dim, config.units, 1, latent.parameters)
        self.moments = RunningMoments(latent.size, config.memory)

    def _units(self, context: Tensor | None) -> tuple[Float[Tensor, "*N D"], Float[Tensor, "*N D"]]:
        """(mean, unit): (x - mean) / unit has the deviation that EDM expects of data."""
        frame = self.whitening(context)
        return frame.mean, frame.std / SIGMA_DATA

    def _denoiser(self, context: Float[Tensor, "N C"] | None) -> Denoiser:
        return partial(self.edm.denoised, lambda x, level: self.network(x, level, context))

    def sample(self, context: Tensor | None, count: int = 1, sampling: Sampling | None = None) -> Float[Tensor, "K N D"]:
        sampling = sampling or Sampling()
        if sampling.mode and count > 1:  # not computed side by side, where rows are rounded differently
            return self.sample(context, 1, sampling).repeat_interleave(count, 0)
        shape = (count, *((1,) if context is None else context.shape[:-1]), self.latent.size)
        noise = self.noise(shape, sampling).reshape(-1, self.latent.size)
        context = None if context is None else context.expand(count, *context.shape).flatten(0, -2)
        mean, unit = self._units(context)
        x = self.edm.sample(self._denoiser(context), noise, sampling.steps or self.config.steps, self.config.sampler)
        return (x * unit + mean).view(shape)

    def loss(
        self, x: Float[Tensor, "*N D"], context: Tensor | None, *, sampling: Sampling | None = None, rows: Tensor | None = None
    ) -> dict[str, Loss]:
        """{"denoise": squared error of the network, summed over the latent, a mean over `draws` noise levels [*N]}; with a
        context also {"frame": -ln of the whitening Gaussian, in nats}, which the denoiser does not train."""
        latents, context = _flat(x, context)
        terms = {}
        if self.frame is not None:
            terms["frame"] = Loss(-self.whitening(context).log_prob(latents).view(x.shape[:-1]))
        self.update_moments(latents)
        with torch.no_grad():
            mean, unit = self._units(context)
        draws, generator = self.config.draws, None if sampling is None else sampling.generator
        context = None if context is None else context.repeat(draws, 1)
        network = lambda x, level: self.network(x, level, context)  # noqa: E731
        value = self.edm.training_loss(network, ((latents - mean) / unit).repeat(draws, 1), generator)
        return {"denoise": Loss(value.view(draws, *x.shape[:-1]).mean(0), "score"), **terms}

    def forward(
        self, posterior: Posterior, z: Tensor, context: Tensor | None, *, sampling: Sampling | None = None, **options: Any
    ) -> Float[Tensor, "*N"]:
        """An upper bound of KL(posterior || self) in expectation, from `rate_samples` noisy samples of z, differentiable in z."""
        generator = None if sampling is None else sampling.generator
        samples, (latents, context) = self.config.rate_samples, _flat(z, context)
        uniform = low_discrepancy(samples * len(latents), generator, latents.device).view(len(latents), samples).T
        noise = torch.randn(samples, *latents.shape, generator=generator, device=latents.device)
        log_prior = self._bound(latents, context, uniform, noise, torch.full_like(uniform, 1 / samples))
        return posterior.log_prob(z) - log_prior.view(z.shape[:-1])

    def log_prob(self, x: Float[Tensor, "*N D"], context: Tensor | None) -> Float[Tensor, "*N"]:
        """A lower bound of ln p(x | context) in nats, but for the error of averaging over fixed noise."""
        latents, context = _flat(x, context)
        fixed = [part.to(latents).unsqueeze(1) for part in fixed_samples(self.config.levels, self.latent.size)]
        parts = []
        for start in range(0, len(latents), size := max(1, MAX_BATCH // len(fixed[0]))):
            rows = slice(start, start + size)
            samples = [part.expand(-1, len(latents[rows]), *part.shape[2:]) for part in fixed]
            parts.append(self._bound(latents[rows], None if context is None else context[rows], *samples))
        return torch.cat(parts).view(x.shape[:-1])

    def _bound(
        self, latents: Tensor, context: Tensor | None, uniform: Tensor, noise: Tensor, weight: Tensor
    ) -> Float[Tensor, " N"]:
        """`log_prob_bound` of latents [N, D]."""
        mean, unit = self._units(context)
        context = None if context is None else context.expand(len(uniform), *context.shape).flatten(0, 1)
        return log_prob_bound(self._denoiser(context), (latents - mean) / unit, uniform, noise, weight) - unit.log().sum(-1)

    @torch.no_grad()
    def ode_log_prob(self, x: Float[Tensor, "*N D"], context: Tensor | None, steps: int = 32) -> Float[Tensor, "*N"]:
        """ln p(x | context) of the ODE that draws follow, in nats, with the exact trace; no gradient.

        4 size steps backward passes: meant for latents of at most 64 numbers. ValueError beyond.
        """
        if self.latent.size > 64:
            raise ValueError(f"ode_log_prob takes one backward pass per number, and {self.latent.size} numbers are more than 64.")
        latents, context = _flat(x, context)
        mean, unit = self._units(context)
        value = ode_log_prob(self._denoiser(context), (latents - mean) / unit, steps) - unit.log().sum(-1)
        return value.view(x.shape[:-1])

    @torch.no_grad()
    def measures(self, x: Float[Tensor, "N D"], context: Tensor | None) -> dict[str, float]:
        """narrowest, widest: deviation of one number of the whitened latents, in units of the expected one.

        1: statistics and latents agree. Far from 1 latents move faster than the statistics follow, or others are scored.
        """
        if len(x) < 2:
            return {}
        frame = self.whitening(context)
        deviation = ((x - frame.mean) / frame.std).std(0)
        return {"narrowest": float(deviation.min()), "widest": float(deviation.max())}


def _flat(x: Float[Tensor, "*N D"], context: Tensor | None) -> tuple[Float[Tensor, "M D"], Float[Tensor, "M C"] | None]:
    """Latents and the context of each as rows."""
    return x.flatten(0, -2), None if context is None else context.expand(*x.shape[:-1], -1).flatten(0, -2)
