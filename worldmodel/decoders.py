"""From features back to observations: p(x | feature) for every kind of observation."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from worldmodel.config import Frozen
from worldmodel.data import Loss, Obs, Sampling
from worldmodel.networks import ConvDecoder, StraightMLP, negative_log_likelihood
from worldmodel.registry import register
from worldmodel.spaces import ObsSpec


class DecoderConfig(Frozen):
    """Gaussian for vectors and images, categorical and Bernoulli for the rest."""

    kind: Literal["standard"] = "standard"
    units: int = Field(128, ge=1, description="width of the perceptron for vectors")
    layers: int = Field(2, ge=0, description="layers of the perceptron for vectors")
    depth: int = Field(16, ge=1, description="channels of the last but one convolution")
    reads: Literal["feature", "latent"] = Field("feature", description="the whole feature, or the latent alone as in a plain VAE")
    sigma: Literal["fitted", "learned"] = Field(
        "fitted", description="deviation: the error's own size (sigma-VAE), or a free parameter"
    )
    min_sigma: float = Field(0.05, gt=0, description="least deviation of vectors, in units of the scaled observation")
    min_sigma_image: float = Field(0.5, gt=0, description="least deviation of pixels in [0, 1]: below it pictures drown rewards")


@register("decoder", "standard", DecoderConfig)
class Decoder(nn.Module):
    """p(x | feature), independent over keys and elements; losses are summed over elements, in nats per step.

    A Gaussian with a fixed deviation of 1 makes the posterior collapse; here the deviation is either the running root
    mean square error (per number of a vector, one per image) or a parameter.
    Source of `fitted`: Rybkin et al. 2021 (sigma-VAE), eq. 7.
    """

    def __init__(self, config: DecoderConfig, spec: ObsSpec, feature_dim: int, latent_dim: int):
        super().__init__()
        self.config, self.spec = config, spec
        self.inputs = feature_dim if config.reads == "feature" else latent_dim
        self.images = [name for name, key in spec.keys.items() if key.kind == "image"]
        self.vectors = [name for name, key in spec.keys.items() if key.kind != "image"]
        self.convolutions = nn.ModuleList(ConvDecoder(self.inputs, spec.keys[name].shape, config.depth) for name in self.images)
        self.widths = [spec.keys[name].shape[0] for name in self.vectors]
        if self.vectors:
            self.perceptron = StraightMLP(self.inputs, config.units, config.layers, sum(self.widths))
        self.gaussian = [name for name, key in spec.keys.items() if key.kind in ("image", "vector")]
        for i, name in enumerate(self.gaussian):
            log_std = torch.zeros(1 if name in self.images else spec.keys[name].shape[0])
            if config.sigma == "learned":
                self.register_parameter(f"log_std{i}", nn.Parameter(log_std))
            else:
                self.register_buffer(f"log_std{i}", log_std)

    def output(self, feature: Float[Tensor, "N F"]) -> Obs:
        """Means of Gaussian keys, logits of categorical and binary ones, on the scaled observation's scale."""
        x = feature[..., -self.inputs :]
        out = {name: conv(x) for name, conv in zip(self.images, self.convolutions, strict=True)}
        if self.vectors:
            out |= dict(zip(self.vectors, self.perceptron(x).split(self.widths, -1), strict=True))
        return {name: y.float() for name, y in out.items()}  # likelihoods lose too much in bf16

    def log_std(self, name: str) -> Tensor:
        """ln of the deviation of a Gaussian key, not below the floor."""
        floor = math.log(self.config.min_sigma_image if name in self.images else self.config.min_sigma)
        return getattr(self, f"log_std{self.gaussian.index(name)}").clamp_min(floor)

    def loss(self, feature: Float[Tensor, "N F"], obs: Obs, sampling: Sampling | None = None) -> dict[str, Loss]:
        """{"observation": -ln p(obs | feature)} [N]; `obs` on the inner scale."""
        out = self.output(feature)
        total = torch.zeros(feature.shape[0], device=feature.device)
        for name, key in self.spec.keys.items():
            x, y = obs[name], out[name]
            if key.kind == "categorical":
                logp = torch.cat([part.log_softmax(-1) for part in y.split(key.sizes, -1)], -1)
                total = total - (x * logp).sum(-1)
            elif key.kind == "binary":
                total = total + F.binary_cross_entropy_with_logits(y, x, reduction="none").sum(-1)
            else:
                if self.training and self.config.sigma == "fitted":
                    self._fit(name, x, y)
                shape = (1, -1, *[1] * (x.ndim - 2))
                total = total + negative_log_likelihood(x, y, self.log_std(name).view(shape)).flatten(1).sum(-1)
        return {"observation": Loss(total)}

    @torch.no_grad()
    def _fit(self, name: str, x: Tensor, mean: Tensor) -> None:
        error = (x - mean).square()
        error = error.mean().view(1) if name in self.images else error.mean(0)
        log_std = getattr(self, f"log_std{self.gaussian.index(name)}")
        # An update that is skipped because of NaN must not leave one behind here.
        log_std.lerp_(torch.where(error.isfinite(), 0.5 * error.clamp_min(1e-12).log(), log_std), 0.05)

    def mean(self, feature: Float[Tensor, "N F"]) -> Obs:
        """The expected observation: probabilities for categorical and binary keys."""
        out = self.output(feature)
        for name, key in self.spec.keys.items():
            if key.kind == "categorical":
                out[name] = torch.cat([part.softmax(-1) for part in out[name].split(key.sizes, -1)], -1)
            elif key.kind == "binary":
                out[name] = torch.sigmoid(out[name])
        return out

    def sample(self, feature: Float[Tensor, "N F"], sampling: Sampling) -> Obs:
        """A drawn observation; `sampling.mode` gives the mean, and one-hot categories."""
        out = self.mean(feature)
        for name, key in self.spec.keys.items():
            x = out[name]
            draw = None if sampling.mode else torch.rand(x.shape, generator=sampling.generator, device=x.device)
            if key.kind == "categorical":
                parts = x.split(key.sizes, -1)
                gumbel = (
                    [0.0] * len(parts)
                    if draw is None
                    else [-(-u.log()).log() for u in draw.clamp(1e-9, 1 - 1e-7).split(key.sizes, -1)]
                )
                out[name] = torch.cat([F.one_hot((p.log() + g).argmax(-1), n) for p, g, n in zip(parts, gumbel, key.sizes)], -1).to(
                    x
                )
            elif key.kind == "binary":
                out[name] = (x > (0.5 if draw is None else draw)).to(x)
            elif draw is not None:
                noise = torch.randn(x.shape, generator=sampling.generator, device=x.device)
                std = self.log_std(name).exp().view(1, -1, *[1] * (x.ndim - 2))
                out[name] = x + sampling.temperature * std * noise
        return out
