"""The standard decoder: elements of an observation are independent given the feature."""

from __future__ import annotations

import math
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from worldmodel.config import Frozen
from worldmodel.data import Loss, Obs, Sampling
from worldmodel.errors import ConfigError
from worldmodel.nn.moments import RunningMoments
from worldmodel.nn.networks import ConvDecoder, SkipMLP, by_group, negative_log_likelihood, one_hot_sample
from worldmodel.registry import register
from worldmodel.spaces import ObsSpec


class DecoderConfig(Frozen):
    """Vectors are Gaussian, categories categorical, bits Bernoulli; images as `image` says."""

    kind: Literal["standard"] = "standard"
    units: int = Field(128, ge=1, description="width of the perceptron for vectors")
    layers: int = Field(2, ge=0, description="layers of the perceptron for vectors")
    depth: int = Field(16, ge=1, description="channels of the last but one convolution")
    reads: Literal["feature", "latent"] = Field("feature", description="the whole feature, or the latent alone as in a plain VAE")
    image: Literal["gaussian", "logistic", "bernoulli"] = Field(
        "gaussian", description="distribution of a pixel: gaussian; logistic: of its discrete levels; bernoulli: black or white"
    )
    levels: int = Field(256, ge=2, description="logistic: levels of a pixel, evenly spaced from 0 to 1")
    sigma: Literal["fitted", "learned"] = Field(
        "fitted", description="deviation: the error's own size (sigma-VAE), or a free parameter"
    )
    min_sigma: float = Field(0.05, gt=0, description="smallest deviation of vectors, in units of the scaled observation")
    min_sigma_image: float = Field(
        0.001, gt=0, description="smallest deviation of pixels in [0, 1]; a byte's levels are 0.004 apart"
    )
    weight_sigma_image: float = Field(
        0.5, gt=0, description="the gradient of pixels is as if their deviation were at least this: else pictures drown rewards"
    )
    image_weight: float | None = Field(
        None,
        gt=0,
        description="factor on the gradient of pictures' nats, whatever their deviation, which then acts on what is learned; "
        "null: as weight_sigma_image says",
    )


@register("decoder", "standard", DecoderConfig)
class Decoder(nn.Module):
    """p(x | feature), independent over keys and elements; losses are summed over elements, in nats per step.

    likelihoods   {key: kind of its elements' distribution}. Nats of densities (gaussian) and of probabilities (all others) are
                  not comparable

    A Gaussian of fixed deviation 1 makes the posterior collapse; here the deviation is the running root mean square error (of
    each number of a vector, one for an image) or a parameter. The gradient of pictures is weighted, the loss is not: by
    `image_weight`, or where that is null and pixels' deviation s is below w = `weight_sigma_image`, by (s / w)^2.
    Sources: Rybkin et al. 2021 (sigma-VAE), eq. 7, for `fitted`; Seitzer et al. 2022 (beta-NLL) for the weight.
    """

    MEMORY = 0.95
    """Decay of the fitted deviations."""

    def __init__(self, config: DecoderConfig, spec: ObsSpec, feature_dim: int, latent_dim: int):
        super().__init__()
        self.config, self.spec = config, spec
        self.in_features = feature_dim if config.reads == "feature" else latent_dim
        self.images = [name for name, key in spec.keys.items() if key.kind == "image"]
        self.vectors = [name for name, key in spec.keys.items() if key.kind != "image"]
        self.pixelwise_noise = list(self.images)  # keys whose draws have independent noise in each pixel
        self.convolutions = nn.ModuleList(ConvDecoder(self.in_features, spec.keys[n].shape, config.depth) for n in self.images)
        self.widths = [spec.keys[name].shape[0] for name in self.vectors]
        if self.vectors:
            self.perceptron = SkipMLP(self.in_features, config.units, config.layers, sum(self.widths))
        kinds = {"image": config.image, "vector": "gaussian", "binary": "bernoulli", "categorical": "categorical"}
        self.likelihoods = {name: kinds[key.kind] for name, key in spec.keys.items()}
        self.with_sigma = [name for name, likelihood in self.likelihoods.items() if likelihood in ("gaussian", "logistic")]
        for i, name in enumerate(self.with_sigma):
            width = 1 if name in self.images else spec.keys[name].shape
            if config.sigma == "learned":
                self.register_parameter(f"log_std{i}", nn.Parameter(torch.zeros(width)))
            else:
                self.register_module(f"errors{i}", RunningMoments(width, self.MEMORY, initial_mean=1.0))

    def output(self, feature: Float[Tensor, "N F"]) -> Obs:
        """Means of Gaussian keys, locations of logistic ones, logits of all others, on the scale of scaled observations."""
        x = feature[..., -self.in_features :]
        out = {name: conv(x) for name, conv in zip(self.images, self.convolutions, strict=True)}
        if self.vectors:
            out |= dict(zip(self.vectors, self.perceptron(x).split(self.widths, -1), strict=True))
        return {name: y.float() for name, y in out.items()}  # likelihoods lose too much in bf16

    def log_std(self, name: str) -> Tensor:
        """ln of the deviation of a Gaussian or logistic key, at least its minimum."""
        floor = math.log(self.config.min_sigma_image if name in self.images else self.config.min_sigma)
        i = self.with_sigma.index(name)
        if self.config.sigma == "learned":
            return getattr(self, f"log_std{i}").clamp_min(floor)
        return (0.5 * getattr(self, f"errors{i}").mean.log()).float().clamp_min(floor)

    def loss(self, feature: Float[Tensor, "N F"], obs: Obs, sampling: Sampling | None = None) -> dict[str, Loss]:
        """{"observation": -ln p(obs | feature)} [N] of scaled observations.

        Raises ConfigError where image=bernoulli and pixels lie outside [0, 1].
        """
        return {"observation": Loss(self._nll(self.output(feature), obs))}

    def _nll(self, out: Obs, obs: Obs) -> Float[Tensor, " N"]:
        """-ln p(obs) given `output`; in training the deviations are fitted."""
        total = torch.zeros((), device=next(iter(out.values())).device)
        for name, likelihood in self.likelihoods.items():
            x, y = obs[name], out[name]
            if name in self.with_sigma and self.training and self.config.sigma == "fitted":
                self._update_sigma(name, x, y if likelihood == "gaussian" else y.clamp(0, 1))
            if name in self.images and (weight := self._weight(name)) is not None:  # a learned deviation keeps its whole gradient
                y = y.detach().lerp(y, weight)
            if likelihood == "categorical":
                nats = -x * by_group(partial(torch.log_softmax, dim=-1), self.spec.keys[name].sizes, y)
            elif likelihood == "bernoulli":
                if name in self.images:
                    _check_unit_range(name, x)
                nats = F.binary_cross_entropy_with_logits(y, x, reduction="none")
            elif likelihood == "gaussian":
                nats = negative_log_likelihood(x, y, self._each(name, x).log())
            else:
                nats = discrete_logistic(x, y, self._each(name, x) * LOGISTIC, self.config.levels)
            total = total + nats.flatten(1).sum(-1)
        return total

    def _weight(self, name: str) -> float | Tensor | None:
        """The factor on the gradient of an image's nats; None: it is 1."""
        if self.config.image_weight is not None:
            return self.config.image_weight
        if name not in self.with_sigma:
            return None
        return (self.log_std(name).detach().exp() / self.config.weight_sigma_image).square().clamp_max(1)

    def _each(self, name: str, like: Tensor) -> Tensor:
        """The deviation of each element of a key, in a shape that multiplies `like`."""
        return self.log_std(name).exp().view(1, -1, *[1] * (like.ndim - 2))

    @torch.no_grad()
    def _update_sigma(self, name: str, x: Tensor, mean: Tensor) -> None:
        error = (x - mean).square()
        error = error.flatten(1).mean(1, keepdim=True) if name in self.images else error
        getattr(self, f"errors{self.with_sigma.index(name)}").update(error)

    def mean(self, feature: Float[Tensor, "N F"]) -> Obs:
        """The expected observation: probabilities for categorical and Bernoulli keys."""
        return self._means(self.output(feature))

    def _means(self, out: Obs) -> Obs:
        means = {}
        for name, y in out.items():
            if self.likelihoods[name] == "categorical":
                y = by_group(partial(torch.softmax, dim=-1), self.spec.keys[name].sizes, y)
            elif self.likelihoods[name] == "bernoulli":
                y = torch.sigmoid(y)
            elif self.likelihoods[name] == "logistic":
                y = logistic_mean(y, self._each(name, y) * LOGISTIC)
            means[name] = y
        return means

    def sample(self, feature: Float[Tensor, "N F"], sampling: Sampling) -> Obs:
        """A drawn observation; with `sampling.mode` the mean, one-hot categories and bits.

        Pixels are in [0, 1]: Gaussian ones are drawn given that they are.
        """
        return self._sample_from(self.output(feature), sampling)

    def _sample_from(self, out: Obs, sampling: Sampling) -> Obs:
        drawn = self._means(out)
        for name, likelihood in self.likelihoods.items():
            x = drawn[name]
            draw = None if sampling.mode else torch.rand(x.shape, generator=sampling.generator, device=x.device)
            if likelihood == "categorical":
                drawn[name] = one_hot_sample(x, self.spec.keys[name].sizes, draw)
            elif likelihood == "bernoulli" and (draw is not None or name not in self.images):
                drawn[name] = (x > (0.5 if draw is None else draw)).to(x)
            elif likelihood == "gaussian" and draw is not None:
                noise = torch.randn(x.shape, generator=sampling.generator, device=x.device)
                scale = sampling.temperature * self._each(name, x)
                drawn[name] = truncated_normal(x.clamp(0, 1), scale, noise) if name in self.images else x + scale * noise
            elif likelihood == "logistic" and draw is not None:
                scale, steps = sampling.temperature * self._each(name, x) * LOGISTIC, self.config.levels - 1
                drawn[name] = ((out[name] + scale * draw.clamp(1e-6, 1 - 1e-6).logit()).clamp(0, 1) * steps).round() / steps
        return drawn | {name: drawn[name].clamp(0, 1) for name in self.images}


LOGISTIC = math.sqrt(3) / math.pi
"""Scale of a logistic distribution of deviation 1."""


def discrete_logistic(x: Tensor, location: Tensor, scale: Tensor, levels: int) -> Tensor:
    """-ln P(x) in nats, of numbers in [0, 1] rounded to `levels` evenly spaced ones; the tails belong to the end levels.

    Source: Salimans et al. 2017 (PixelCNN++), eq. 2, with one component.
    """
    half = 0.5 / (levels - 1)
    x = (x * (levels - 1)).round() / (levels - 1)
    above, below = (x + half - location) / scale, (x - half - location) / scale
    # sigmoid(b) - sigmoid(a) = sigmoid(b) sigmoid(-a) (1 - exp(a - b)), without underflow
    inside = F.logsigmoid(above) + F.logsigmoid(-below) + torch.log(-torch.expm1(-2 * half / scale))
    return -torch.where(x <= 0, F.logsigmoid(above), torch.where(x >= 1, F.logsigmoid(-below), inside))


def logistic_mean(location: Tensor, scale: Tensor) -> Tensor:
    """Mean of a logistic distribution clamped to [0, 1]; rounding to levels shifts it by less than half a level."""
    return scale * (F.softplus(location / scale) - F.softplus((location - 1) / scale))


def truncated_normal(mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
    """Draws of a normal distribution given that they lie in [0, 1], which has the means: standard-normal noise, by quantiles.

    Where the range is far away from the mean that is mean + std * noise; where it is near nothing piles up at its ends.
    """
    cdf, size = torch.special.ndtr, std.clamp_min(1e-9)  # a temperature of 0 draws the mean
    low, high = cdf(-mean / size), cdf((1 - mean) / size)
    quantile = low + cdf(noise) * (high - low)
    return (mean + std * torch.special.ndtri(quantile.clamp(1e-7, 1 - 1e-7))).clamp(0, 1)  # of roundings alone


def _check_unit_range(name: str, x: Tensor) -> None:
    if bool((x < 0).any() | (x > 1).any()):
        raise ConfigError(
            f"model.decoder.image=bernoulli needs pixels in [0, 1], and those of '{name}' go from {float(x.min()):g} to "
            f"{float(x.max()):g}. Use image=gaussian, or image=logistic for discrete levels."
        )
