"""Diffusion and flow matching over codes: a law known by how it denoises."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from worldmodel.config import Frozen
from worldmodel.data import Loss, Sampling
from worldmodel.distributions.base import ConditionalDistribution, Latent, Posterior, PosteriorSource
from worldmodel.nn import diffusion as denoising
from worldmodel.nn.diffusion import SIGMA_DATA
from worldmodel.nn.moments import RunningMoments
from worldmodel.nn.networks import DenoisingMLP, SkipMLP
from worldmodel.registry import register

MAX_BATCH = 1 << 16
"""Noisy views that are denoised together by `log_prob`."""


class DiffusionConfig(Frozen):
    """The path to noise, the network that leads back, and how many steps it takes."""

    kind: Literal["diffusion"] = "diffusion"
    path: Literal["edm", "cfm"] = Field("edm", description="diffusion with EDM's preconditioning, or conditional flow matching")
    units: int = Field(128, ge=1, description="width of the denoising network")
    layers: int = Field(2, ge=1, description="its hidden layers")
    steps: int = Field(4, ge=1, description="steps of a draw; sampling.steps overrides it")
    sampler: Literal["multistep", "euler", "heun"] = Field(
        "multistep",
        description="multistep: second order with one evaluation a step; euler: first order; heun: two evaluations a step",
    )
    sigma_max: float = Field(5.0, gt=0, description="edm: noise that a draw starts from, beside codes of deviation 0.5")
    sigma_min: float = Field(0.02, gt=0, description="edm: noise of the last step")
    log_sigma_mean: float = Field(-1.2, description="edm: mean of ln(noise) in training")
    log_sigma_std: float = Field(1.8, gt=0, description="edm: its deviation, wide enough for laws that are nearly points")
    draws: int = Field(4, ge=1, description="noise levels at which each code is denoised in an update")
    rate_samples: int = Field(4, ge=1, description="noisy looks at each code that estimate the rate in training")
    levels: int = Field(16, ge=1, description="noise levels of log_prob, at each of which it looks 4 times per number of the code")
    memory: float = Field(0.99, ge=0, lt=1, description="share that the running mean and variance of codes keep at each update")


@register("distribution", "diffusion", DiffusionConfig)
class Diffusion(ConditionalDistribution):
    """p(x | context) by denoising. Slots: initial, transition, marginal.

    Codes are standardised to the deviation that the mathematics expects: without a context by their running mean and deviation,
    which are part of the weights and stand still in eval mode; with one by a Gaussian mean(h), std(h) that learns from its own
    likelihood, since a transition is far narrower than all codes together, and a network that has to find mean(h) at every level
    rolls out badly. A draw follows the deterministic ODE from its own noise, so that the same noise gives the same code;
    temperature scales that noise, and the mode starts from none.

    loss      denoising, all levels weighed alike, and with a context the Gaussian's nats: own parameters and context
    rate      the evidence bound, in which levels weigh by their information: what trains the posterior.
              Source of training the two by different weights: Vahdat et al. 2021 (LSGM), section 3.2
    log_prob  that bound from a fixed set of looks; `ode_log_prob` is the exact likelihood of the ODE
    """

    density = "bound"
    slots = frozenset({"initial", "transition", "marginal"})
    latent_kinds = frozenset({"gaussian"})

    def __init__(self, config: DiffusionConfig, latent: Latent, context_dim: int, source: PosteriorSource | None = None):
        super().__init__(latent, context_dim)
        self.config = config
        self.path = denoising.cfm()
        if config.path == "edm":
            self.path = denoising.edm(config.log_sigma_mean, config.log_sigma_std, config.sigma_min, config.sigma_max)
        self.network = DenoisingMLP(latent.size, context_dim, config.units, config.layers)
        self.frame = SkipMLP(context_dim, config.units, 1, latent.parameters) if context_dim else None
        self.moments = RunningMoments(latent.size, config.memory)

    # Codes <-> data of deviation DATA

    def whitening(self, context: Tensor | None) -> tuple[Float[Tensor, "*N D"], Float[Tensor, "*N D"]]:
        """(mean, what one unit of standardised data is in the code), for each row or for all."""
        if self.frame is None:
            return self.moments.mean.float(), self.moments.deviation(1e-4) / SIGMA_DATA
        distribution = self.latent.distribution(self.frame(context))
        return distribution.mean, distribution.std / SIGMA_DATA

    @torch.no_grad()
    def update_moments(self, latents: Float[Tensor, "N D"]) -> None:
        """Take codes into the running statistics. The first ones set them: there is nothing to be remembered before."""
        if len(latents) > 1:
            self.moments.update(latents)

    def _network(self, context: Tensor | None) -> denoising.Network:
        """F given the context [N, C]."""
        return lambda x, level: self.network(x, level, context)

    # The contract

    def sample(self, context: Tensor | None, count: int = 1, sampling: Sampling | None = None) -> Float[Tensor, "K N D"]:
        sampling = sampling or Sampling()
        if sampling.mode and count > 1:  # not computed side by side, where rows are rounded differently
            return self.sample(context, 1, sampling).repeat_interleave(count, 0)
        batch = (1,) if context is None else context.shape[:-1]
        shape = (count, *batch, self.latent.size)
        if sampling.mode:
            noise = torch.zeros(shape, device=self.moments.mean.device)
        elif sampling.noise is not None:
            noise = sampling.noise.expand(shape)
        else:
            noise = torch.randn(shape, generator=sampling.generator, device=self.moments.mean.device)
        levels = self.path.grid(sampling.steps or self.config.steps).to(noise)
        start = self.path.start(sampling.temperature * noise, levels[0]).reshape(-1, self.latent.size)
        rows = None if context is None else context.expand(count, *context.shape).flatten(0, -2)
        mean, unit = self.whitening(rows)
        network = self._network(rows)
        denoise = lambda x, level: self.path.denoised(network, x, level)  # noqa: E731
        x = denoising.SAMPLERS[self.config.sampler](denoise, start, levels)
        return (x * unit + mean).view(shape)

    def loss(
        self,
        x: Float[Tensor, "*N D"],
        context: Tensor | None,
        *,
        sampling: Sampling | None = None,
        rows: Int[Tensor, "*N"] | None = None,
    ) -> dict[str, Loss]:
        """{"denoise": squared error of the network, summed over the code, a mean over `draws` levels for each row [*N]};
        with a context also {"frame": -ln of the Gaussian in front, in nats}, which the denoiser does not move."""
        generator = None if sampling is None else sampling.generator
        latents = x.flatten(0, -2)
        context_rows, terms = None if context is None else context.flatten(0, -2), {}
        if self.frame is not None:
            nats = -self.latent.distribution(self.frame(context_rows)).log_prob(latents)
            terms["frame"] = Loss(nats.view(x.shape[:-1]))
        elif self.training:
            self.update_moments(latents)
        with torch.no_grad():
            mean, unit = self.whitening(context_rows)
        draws = self.config.draws
        data = ((latents - mean) / unit).repeat(draws, 1)
        context_rows = None if context_rows is None else context_rows.repeat(draws, 1)
        level = self.path.drawn(denoising.low_discrepancy(len(data), generator, data.device))
        noise = torch.randn(data.shape, generator=generator, device=data.device)
        value = self.path.loss(self._network(context_rows), data, noise, level)
        return {"denoise": Loss(value.view(draws, *x.shape[:-1]).mean(0), "score"), **terms}

    def rate(
        self,
        posterior: Posterior,
        z: Float[Tensor, "*N D"],
        context: Tensor | None,
        *,
        frozen: bool = False,
        sampling: Sampling | None = None,
        rows: Int[Tensor, "*N"] | None = None,
    ) -> Float[Tensor, "*N"]:
        """An upper bound of KL(posterior || self) in expectation, from `looks` noisy looks at z, differentiable in z."""
        generator = None if sampling is None else sampling.generator
        rate_samples, latents = self.config.rate_samples, z.flatten(0, -2)
        uniform = (
            denoising.low_discrepancy(rate_samples * len(latents), generator, latents.device).view(len(latents), rate_samples).T
        )
        noise = torch.randn(rate_samples, *latents.shape, generator=generator, device=latents.device)
        weight = torch.full_like(uniform, 1 / rate_samples)
        context_rows = None if context is None else context.flatten(0, -2)
        own = dict(self.named_parameters())
        if frozen:
            own, context_rows = (
                {name: p.detach() for name, p in own.items()},
                None if context_rows is None else context_rows.detach(),
            )
        # functional_call replaces parameters inside `forward` alone
        log_prior = torch.func.functional_call(self, own, (latents, context_rows, uniform, noise, weight))
        return posterior.log_prob(z) - log_prior.view(z.shape[:-1])

    def log_prob(self, x: Float[Tensor, "*N D"], context: Tensor | None) -> Float[Tensor, "*N"]:
        """A lower bound of ln p(x | context) in nats, but for the error of averaging over a fixed set of looks."""
        return self(x, context)

    def forward(
        self,
        x: Float[Tensor, "*N D"],
        context: Tensor | None,
        uniform: Float[Tensor, "K N"] | None = None,
        noise: Float[Tensor, "K N D"] | None = None,
        weight: Float[Tensor, "K N"] | None = None,
    ) -> Float[Tensor, "*N"]:
        """The bound from given looks at N rows, by default from the fixed ones of `log_prob`."""
        latents = x.flatten(0, -2)
        context_rows = None if context is None else context.expand(*x.shape[:-1], -1).flatten(0, -2)
        if uniform is not None:
            return self._bound(latents, context_rows, uniform, noise, weight).view(x.shape[:-1])
        rate_samples = [part.to(latents).unsqueeze(1) for part in denoising.fixed_samples(self.config.levels, self.latent.size)]
        parts = []
        for start in range(0, len(latents), size := max(1, MAX_BATCH // len(rate_samples[0]))):
            rows = slice(start, start + size)
            own = latents[rows]
            fixed = [part.expand(-1, len(own), *part.shape[2:]) for part in rate_samples]
            parts.append(self._bound(own, None if context_rows is None else context_rows[rows], *fixed))
        return torch.cat(parts).view(x.shape[:-1])

    def _bound(
        self, latents: Tensor, context: Tensor | None, uniform: Tensor, noise: Tensor, weight: Tensor
    ) -> Float[Tensor, " N"]:
        mean, unit = self.whitening(context)
        data = (latents - mean) / unit
        s, nats = denoising.sigma_of_information(uniform)
        count = len(s)
        context_rows = None if context is None else context.expand(count, *context.shape).flatten(0, 1)
        denoise = denoising.in_sigmas(self.path, self._network(context_rows))
        bounds = denoising.bound(denoise, data.expand(count, *data.shape).flatten(0, 1), s.flatten(), noise.flatten(0, 1))
        gain = nats * (weight * bounds.view(s.shape)).sum(0)
        return denoising.gaussian_log_prob(data) + gain - unit.log().sum(-1)

    def ode_log_prob(self, x: Float[Tensor, "*N D"], context: Tensor | None, steps: int = 32) -> Float[Tensor, "*N"]:
        """ln p(x | context) of the ODE that draws follow, in nats, with the exact trace; no gradient.

        4 size steps backward passes: meant for codes of at most 64 numbers. ValueError beyond.
        """
        if self.latent.size > 64:
            raise ValueError(f"ode_log_prob takes one backward pass per number of a code, and {self.latent.size} are more than 64.")
        latents = x.detach().flatten(0, -2)
        context_rows = None if context is None else context.detach().expand(*x.shape[:-1], -1).flatten(0, -2)
        denoise = denoising.in_sigmas(self.path, self._network(context_rows))
        with torch.no_grad():
            mean, unit = self.whitening(context_rows)
        value = denoising.ode_log_prob(denoise, (latents - mean) / unit, steps) - unit.log().sum(-1)
        return value.view(x.shape[:-1])

    @torch.no_grad()
    def measures(self, x: Float[Tensor, "N D"], context: Tensor | None) -> dict[str, float]:
        """narrowest, widest: deviation of one number of the standardised codes, in units of the one that is expected.

        1: statistics and codes agree. Far from 1 codes move faster than the statistics follow, or other codes are scored.
        """
        if len(x) < 2:
            return {}
        mean, unit = self.whitening(context)
        deviation = ((x - mean) / unit).std(0) / SIGMA_DATA
        return {"narrowest": float(deviation.min()), "widest": float(deviation.max())}

    def fit(self, latents, context=None, **options) -> float:
        """As every law's; the statistics are those of all codes, and stand still while the network learns."""
        if self.frame is None:
            self.moments.reset_to(latents)
        training = self.training
        self.eval()
        try:
            return super().fit(latents, context, **options)
        finally:
            self.train(training)
