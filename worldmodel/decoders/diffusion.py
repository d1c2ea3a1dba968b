"""Decoders that draw by diffusion: the differences to the standard decoder's mean, or the latents of an autoencoder.

A mean of many possible pictures is blurred where they differ; these decoders draw one of them, in a few steps.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from worldmodel.data import Loss, Obs, Sampling
from worldmodel.decoders.standard import Decoder, DecoderConfig
from worldmodel.distributions import (
    Diffusion,
    DiffusionConfig,
    Gaussian,
    GaussianConfig,
    GaussianLatent,
    GaussianLatentConfig,
    Posterior,
)
from worldmodel.nn.diffusion import EDM, SIGMA_DATA, Network
from worldmodel.nn.moments import RunningMoments
from worldmodel.nn.networks import ConvEncoder, DenoisingMLP, SkipMLP, linear
from worldmodel.nn.unet import DenoisingUNet
from worldmodel.registry import register
from worldmodel.spaces import ObsSpec


class DiffusionDecoderConfig(DecoderConfig):
    """The standard decoder, and networks that refine its mean."""

    kind: Literal["diffusion"] = "diffusion"
    gradient: Literal["stop", "full"] = Field("stop", description="whether denoising trains the refiner alone, or the feature too")
    steps: int = Field(3, ge=1, description="steps of a draw; sampling.steps overrides it")
    sampler: Literal["multistep", "euler", "heun"] = Field("euler", description="see the sampler of a diffusion prior")
    refine_depth: int = Field(16, ge=1, description="channels of the U-Net that refines pictures")
    refine_units: int = Field(128, ge=1, description="width of the perceptron that refines vectors")
    frames: int = Field(64, ge=1, description="pictures of each batch that the U-Net is trained on, drawn at random")
    sigma_max: float = Field(5.0, gt=0, description="noise that a draw starts from, beside data of deviation 0.5")
    sigma_min: float = Field(0.05, gt=0, description="noise of the last step")
    log_sigma_mean: float = Field(-0.4, description="mean of ln(noise) in training")
    log_sigma_std: float = Field(1.2, gt=0, description="its deviation")


@register("decoder", "diffusion", DiffusionDecoderConfig)
class DiffusionDecoder(Decoder):
    """p(x | feature) as generator and refiner: the standard decoder's mean, and a draw by EDM given that and the feature.

    The mean is trained by the ELBO, and no gradient of the refiner reaches it: unless gradient=full, latents are the same with
    and without a refiner. What is drawn is the difference to the mean: of each picture by a U-Net, of all vectors together by a
    perceptron. Categories and bits are drawn as in the standard decoder.
    Sources: Pandey et al. 2022 (DiffuseVAE), formulation 1; noise levels: Alonso et al. 2024 (DIAMOND), table 3.
    """

    def __init__(self, config: DiffusionDecoderConfig, spec: ObsSpec, feature_dim: int, latent_dim: int):
        super().__init__(config, spec, feature_dim, latent_dim)
        self.pixelwise_noise = []  # what is drawn here are pictures
        self.edm = EDM(config.log_sigma_mean, config.log_sigma_std, config.sigma_min, config.sigma_max)
        shapes = [spec.keys[name].shape for name in self.images]
        self.unets = nn.ModuleList(DenoisingUNet(s[0], s[0], self.in_features, tuple(s[1:]), config.refine_depth) for s in shapes)
        for i in range(len(self.images)):
            self.register_module(f"differences{i}", RunningMoments((), self.MEMORY, initial_mean=1.0))
        self.vector_sizes = {name: spec.keys[name].shape[0] for name in self.vectors if spec.keys[name].kind == "vector"}
        width = sum(self.vector_sizes.values())
        self.refiner = DenoisingMLP(width, width + self.in_features, config.refine_units, 2) if width else None

    def loss(self, feature: Float[Tensor, "N F"], obs: Obs, sampling: Sampling | None = None) -> dict[str, Loss]:
        """{"observation": as of the standard decoder, "denoise": squared error of the refiners, a mean over elements} [N]."""
        out, generator = self.output(feature), None if sampling is None else sampling.generator
        terms = {"observation": Loss(self._nll(out, obs))}
        condition = feature[..., -self.in_features :]
        condition = condition.detach() if self.config.gradient == "stop" else condition
        total, device = condition.new_zeros(len(condition)), condition.device
        frames = torch.randperm(len(condition), generator=generator, device=device)[: self.config.frames]
        means = self._refined({name: x.detach() for name, x in self._means(out).items()})
        for i, (x, mean) in enumerate(zip(self._refined(obs), means, strict=True)):
            rows = frames if i < len(self.images) else torch.arange(len(total), device=device)
            difference = x[rows] - mean[rows]
            if self.training and i < len(self.images):
                getattr(self, f"differences{i}").update(difference.square().flatten(1).mean(1))
            data = difference / self._unit(i)
            network = self._network(i, mean[rows], condition[rows])
            error = self.edm.training_loss(network, data, generator) / data[0].numel()
            total = total.index_add(0, rows, error * (len(condition) / len(rows)))  # the mean over all rows is that of these
        return terms | {"denoise": Loss(total, "score")}

    def sample(self, feature: Float[Tensor, "N F"], sampling: Sampling) -> Obs:
        """A draw by the ODE from the generator's noise, scaled by the temperature; with `sampling.mode` from no noise."""
        out, condition = self.output(feature), feature[..., -self.in_features :]
        drawn, means = self._sample_from(out, replace(sampling, temperature=0.0)), self._refined(self._means(out))
        refined = [
            mean + self._draw(self._network(i, mean, condition), mean, sampling) * self._unit(i) for i, mean in enumerate(means)
        ]
        drawn |= {name: x.clamp(0, 1) for name, x in zip(self.images, refined, strict=False)}
        if self.refiner is not None:
            drawn |= dict(zip(self.vector_sizes, refined[-1].split(list(self.vector_sizes.values()), -1), strict=True))
        return drawn

    def _refined(self, obs: Obs) -> list[Tensor]:
        """What is refined of an observation: each picture, and the vectors side by side."""
        vectors = [torch.cat([obs[name] for name in self.vector_sizes], -1)] if self.vector_sizes else []
        return [*(obs[name] for name in self.images), *vectors]

    def _network(self, i: int, mean: Tensor, condition: Float[Tensor, "N F"]) -> Network:
        """The network that refines item i of `_refined`."""
        if i < len(self.images):
            return lambda x, level: self.unets[i](x, level, 2 * mean - 1, condition)
        context = torch.cat([mean, condition], -1)
        return lambda x, level: self.refiner(x, level, context)

    def _unit(self, i: int) -> Tensor:
        """The deviation of item i of `_refined` from its mean, over that of data: the running one, or the likelihood's."""
        if i < len(self.images):
            return getattr(self, f"differences{i}").mean.sqrt().float().clamp_min(1e-3) / SIGMA_DATA
        return torch.cat([self.log_std(name).detach().exp() for name in self.vector_sizes]) / SIGMA_DATA

    def _draw(self, network: Network, like: Tensor, sampling: Sampling) -> Tensor:
        noise = torch.zeros_like(like)
        if not sampling.mode:
            noise = sampling.temperature * torch.randn(like.shape, generator=sampling.generator, device=like.device)
        return self.edm.sample(partial(self.edm.denoised, network), noise, sampling.steps or self.config.steps, self.config.sampler)


class LatentDiffusionDecoderConfig(DecoderConfig):
    """An autoencoder of observations (units, layers and depth are of both halves), and a prior of its latents."""

    kind: Literal["latent_diffusion"] = "latent_diffusion"
    gradient: Literal["stop", "full"] = Field("full", description="whether denoising trains the prior alone, or the feature too")
    size: int = Field(16, ge=1, description="numbers of the autoencoder's latent")
    kl: float = Field(1e-6, ge=0, description="weight of the latent's rate against N(0, I), which only bounds its size")
    prior: DiffusionConfig = Field(DiffusionConfig(layers=3), description="p(latent | feature)")


@register("decoder", "latent_diffusion", LatentDiffusionDecoderConfig)
class LatentDiffusionDecoder(nn.Module):
    """p(x | feature) by latents of the decoder's own, which are drawn by diffusion given the feature, then decoded.

    The autoencoder does not see the feature, which learns by predicting the autoencoder's latents (gradient=full).
    Source: Rombach et al. 2022 (LDM), section 3, and appendix G for the weight of the rate.
    """

    def __init__(self, config: LatentDiffusionDecoderConfig, spec: ObsSpec, feature_dim: int, latent_dim: int):
        super().__init__()
        self.config, self.spec = config, spec
        self.in_features = feature_dim if config.reads == "feature" else latent_dim
        self.latent = GaussianLatent(GaussianLatentConfig(size=config.size))
        self.images = [name for name, key in spec.keys.items() if key.kind == "image"]
        self.vectors = [name for name, key in spec.keys.items() if key.kind != "image"]
        self.convolutions = nn.ModuleList(ConvEncoder(spec.keys[name].shape, config.depth) for name in self.images)
        width = sum(spec.keys[name].shape[0] for name in self.vectors)
        self.perceptron = SkipMLP(width, config.units, config.layers, config.units) if width else None
        embedded = sum(c.out_features for c in self.convolutions) + (config.units if width else 0)
        self.posterior = linear(embedded, self.latent.parameters)
        self.autodecoder = Decoder(config, spec, config.size, config.size)
        self.standard = Gaussian(GaussianConfig(standard=True), self.latent, 0)
        self.prior = Diffusion(config.prior, self.latent, self.in_features)

    def _encode(self, obs: Obs) -> Posterior:
        parts = [conv(obs[name]) for name, conv in zip(self.images, self.convolutions, strict=True)]
        if self.perceptron is not None:
            parts.append(self.perceptron(torch.cat([obs[name] for name in self.vectors], -1)))
        return self.latent.distribution(self.posterior(torch.cat(parts, -1)))

    def loss(self, feature: Float[Tensor, "N F"], obs: Obs, sampling: Sampling | None = None) -> dict[str, Loss]:
        """{"observation": of the autoencoder, "denoise/...": of the prior} [N]; scores, for they are no part of the ELBO."""
        sampling, posterior = sampling or Sampling(), self._encode(obs)
        z = self.latent.draw(posterior, sampling, (len(feature),), feature.device)
        nll = self.autodecoder.loss(z, obs)["observation"].value
        rate = posterior.kl(self.standard.given(None))
        condition = feature[..., -self.in_features :]
        condition = condition.detach() if self.config.gradient == "stop" else condition
        terms = {f"denoise/{name}": term.value for name, term in self.prior.loss(z.detach(), condition, sampling=sampling).items()}
        return {name: Loss(value, "score") for name, value in {"observation": nll + self.config.kl * rate, **terms}.items()}

    def mean(self, feature: Float[Tensor, "N F"]) -> Obs:
        """The decoded expected latent: one step of denoising from no noise."""
        z = self.prior.sample(feature[..., -self.in_features :], 1, Sampling(mode=True, steps=1))[0]
        return self.autodecoder.mean(z)

    def sample(self, feature: Float[Tensor, "N F"], sampling: Sampling) -> Obs:
        """A drawn latent, decoded; the autoencoder's own noise is not drawn."""
        z = self.prior.sample(feature[..., -self.in_features :], 1, replace(sampling, noise=None))[0]
        return self.autodecoder.sample(z, replace(sampling, mode=True))
