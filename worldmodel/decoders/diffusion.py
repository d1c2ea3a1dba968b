"""Decoders that draw: pictures refined by diffusion, and an autoencoder's latents drawn by diffusion.

A mean of many possible pictures is blurred where they differ. These decoders draw one of them instead, in a few steps.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from worldmodel.data import Loss, Obs, Sampling
from worldmodel.decoders.standard import Decoder, DecoderConfig
from worldmodel.decoders.unet import DenoisingUNet
from worldmodel.distributions import (
    Diffusion,
    DiffusionConfig,
    Gaussian,
    GaussianConfig,
    GaussianLatent,
    GaussianLatentConfig,
    Posterior,
)
from worldmodel.nn.diffusion import EDM, SAMPLERS, SIGMA_DATA, Network
from worldmodel.nn.moments import RunningMoments
from worldmodel.nn.networks import ConvEncoder, DenoisingMLP, SkipMLP, linear
from worldmodel.registry import register
from worldmodel.spaces import ObsSpec


class DiffusionDecoderConfig(DecoderConfig):
    """The standard decoder, and networks that refine what it expects."""

    kind: Literal["diffusion"] = "diffusion"
    gradient: Literal["stop", "full"] = Field("stop", description="whether denoising trains the refiner alone, or the feature too")
    steps: int = Field(3, ge=1, description="steps of a draw; sampling.steps overrides it")
    sampler: Literal["multistep", "euler", "heun"] = Field("euler", description="as of a diffusion law")
    refine_depth: int = Field(16, ge=1, description="channels of the U-Net that refines pictures")
    refine_units: int = Field(128, ge=1, description="width of the perceptron that refines vectors")
    frames: int = Field(64, ge=1, description="pictures of each batch that the U-Net is trained on, drawn at random")
    sigma_max: float = Field(5.0, gt=0, description="noise that a draw starts from, beside data of deviation 0.5")
    sigma_min: float = Field(0.05, gt=0, description="noise of the last step")
    log_sigma_mean: float = Field(-0.4, description="mean of ln(noise) in training")
    log_sigma_std: float = Field(1.2, gt=0, description="its deviation")


@register("decoder", "diffusion", DiffusionDecoderConfig)
class DiffusionDecoder(Decoder):
    """p(x | feature) as generator and refiner: what the standard decoder expects, and a draw by EDM given that and the feature.

    The expected observation is trained by the ELBO, as ever, and what the refiner sees of it carries no gradient; so the code
    is the same with and without a refiner, unless gradient=full. What is drawn is the difference to it: of pictures by a U-Net
    that has the expected picture as more channels, of vectors together by a perceptron; categories and bits are drawn as ever.
    Source of the form: Pandey et al. 2022 (DiffuseVAE), formulation 1; of the levels: Alonso et al. 2024 (DIAMOND), table 3.
    """

    def __init__(self, config: DiffusionDecoderConfig, spec: ObsSpec, feature_dim: int, latent_dim: int):
        super().__init__(config, spec, feature_dim, latent_dim)
        self.pixelwise_noise = []  # what is drawn here are pictures
        self.path = EDM(config.log_sigma_mean, config.log_sigma_std, config.sigma_min, config.sigma_max)
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
        expected = {name: x.detach() for name, x in self._means(out).items()}
        condition = feature[..., -self.in_features :]
        condition = condition.detach() if self.config.gradient == "stop" else condition
        total = condition.new_zeros(len(condition))
        chosen = torch.randperm(len(condition), generator=generator, device=condition.device)[: self.config.frames]
        for i, (name, unet) in enumerate(zip(self.images, self.unets, strict=True)):
            mean_x = expected[name][chosen]
            difference = obs[name][chosen] - mean_x
            if self.training:
                getattr(self, f"differences{i}").update(difference.square().flatten(1).mean(1))
            error = self._denoise(_picture_network(unet, mean_x, condition[chosen]), difference / self._picture_unit(i), generator)
            total = total.index_add(0, chosen, error * (len(condition) / len(chosen)))  # the mean over rows is that of these
        if self.refiner is not None:
            mean_x = self._concat_vectors(expected)
            network = self._vector_network(mean_x, condition)
            total = total + self._denoise(network, (self._concat_vectors(obs) - mean_x) / self._unit(), generator)
        return terms | {"denoise": Loss(total, "score")}

    def _denoise(self, network: Network, data: Tensor, generator: torch.Generator | None) -> Float[Tensor, " N"]:
        return self.path.training_loss(network, data, generator) / data[0].numel()

    def _picture_unit(self, i: int) -> Tensor:
        """By what pictures differ from what is expected, root mean square."""
        return getattr(self, f"differences{i}").mean.sqrt().float().clamp_min(1e-3) / SIGMA_DATA

    def _vector_network(self, mean_x: Tensor, condition: Tensor) -> Network:
        given = torch.cat([mean_x, condition], -1)
        return lambda x, level: self.refiner(x, level, given)

    def _concat_vectors(self, obs: Obs) -> Float[Tensor, "N D"]:
        """All vectors side by side."""
        return torch.cat([obs[name] for name in self.vector_sizes], -1)

    def _unit(self) -> Float[Tensor, " D"]:
        """By what vectors differ from what is expected, as the likelihood has it: refined by nothing they are drawn from it."""
        return torch.cat([self.log_std(name).detach().exp() for name in self.vector_sizes]) / SIGMA_DATA

    def sample(self, feature: Float[Tensor, "N F"], sampling: Sampling) -> Obs:
        """A draw that follows the ODE from the generator's noise, scaled by the temperature; `sampling.mode`: from none."""
        out = self.output(feature)
        drawn, expected = self._sample_from(out, replace(sampling, temperature=0.0)), self._means(out)
        condition = feature[..., -self.in_features :]
        for i, (name, unet) in enumerate(zip(self.images, self.unets, strict=True)):
            mean_x = expected[name]
            draw = self._draw(_picture_network(unet, mean_x, condition), mean_x, sampling)
            drawn[name] = (mean_x + draw * self._picture_unit(i)).clamp(0, 1)
        if self.refiner is not None:
            mean_x = self._concat_vectors(expected)
            draw = mean_x + self._draw(self._vector_network(mean_x, condition), mean_x, sampling) * self._unit()
            drawn |= dict(zip(self.vector_sizes, draw.split(list(self.vector_sizes.values()), -1), strict=True))
        return drawn

    def _draw(self, network: Network, like: Tensor, sampling: Sampling) -> Tensor:
        noise = torch.zeros_like(like)
        if not sampling.mode:
            noise = sampling.temperature * torch.randn(like.shape, generator=sampling.generator, device=like.device)
        levels = self.path.grid(sampling.steps or self.config.steps).to(noise)
        denoise = lambda x, level: self.path.denoised(network, x, level)  # noqa: E731
        return SAMPLERS[self.config.sampler](denoise, self.path.start(noise, levels[0]), levels)


def _picture_network(unet: DenoisingUNet, mean_x: Tensor, condition: Tensor) -> Network:
    """The U-Net's F, with the expected picture beside the noisy error."""
    return lambda x, level: unet(x, level, 2 * mean_x - 1, condition)


class LatentDiffusionDecoderConfig(DecoderConfig):
    """An autoencoder of observations (units, layers and depth are of both its halves), and a law of its latents."""

    kind: Literal["latent_diffusion"] = "latent_diffusion"
    gradient: Literal["stop", "full"] = Field("full", description="whether denoising trains the law alone, or the feature too")
    size: int = Field(16, ge=1, description="numbers of the autoencoder's latent")
    kl: float = Field(1e-6, ge=0, description="weight of the latent's rate against N(0, I): keeps its size bounded, no more")
    prior: DiffusionConfig = Field(DiffusionConfig(layers=3), description="p(latent | feature)")


@register("decoder", "latent_diffusion", LatentDiffusionDecoderConfig)
class LatentDiffusionDecoder(nn.Module):
    """p(x | feature) by way of latents that belong to the decoder: they are drawn by diffusion given the feature, then decoded.

    The autoencoder knows nothing of the feature, and the feature learns by predicting the autoencoder's latents (gradient=full).
    Source: Rombach et al. 2022 (LDM), section 3 and appendix G for the weight of the rate.
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
        own = {name: getattr(config, name) for name in DecoderConfig.model_fields if name not in ("kind", "reads")}
        self.autodecoder = Decoder(DecoderConfig(**own), spec, config.size, config.size)
        self.standard = Gaussian(GaussianConfig(standard=True), self.latent, 0)
        self.prior = Diffusion(config.prior, self.latent, self.in_features)

    def _encode(self, obs: Obs) -> Posterior:
        parts = [conv(obs[name]) for name, conv in zip(self.images, self.convolutions, strict=True)]
        if self.perceptron is not None:
            parts.append(self.perceptron(torch.cat([obs[name] for name in self.vectors], -1)))
        return self.latent.distribution(self.posterior(torch.cat(parts, -1)))

    def loss(self, feature: Float[Tensor, "N F"], obs: Obs, sampling: Sampling | None = None) -> dict[str, Loss]:
        """{"observation": of the autoencoder; "denoise/...": of its latents' law} [N]: scores, no part of the feature's ELBO."""
        sampling, posterior = sampling or Sampling(), self._encode(obs)
        z = self.latent.draw(posterior, sampling, (len(feature),), feature.device)
        nll = self.autodecoder.loss(z, obs)["observation"].value
        rate = posterior.kl(self.standard.given(None))
        condition = feature[..., -self.in_features :]
        condition = condition.detach() if self.config.gradient == "stop" else condition
        terms = {f"denoise/{name}": term.value for name, term in self.prior.loss(z.detach(), condition, sampling=sampling).items()}
        return {name: Loss(value, "score") for name, value in {"observation": nll + self.config.kl * rate, **terms}.items()}

    def mean(self, feature: Float[Tensor, "N F"]) -> Obs:
        """What the latent decodes to that is expected given the feature: one step of denoising, from no noise."""
        z = self.prior.sample(feature[..., -self.in_features :], 1, Sampling(mode=True, steps=1))[0]
        return self.autodecoder.mean(z)

    def sample(self, feature: Float[Tensor, "N F"], sampling: Sampling) -> Obs:
        """What a drawn latent decodes to; the noise that the autoencoder could not explain is not drawn."""
        z = self.prior.sample(feature[..., -self.in_features :], 1, replace(sampling, noise=None))[0]
        return self.autodecoder.sample(z, replace(sampling, mode=True))
