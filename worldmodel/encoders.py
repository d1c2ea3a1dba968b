"""From canonical observations to embeddings, and the scaling of vectors that encoder and decoder share."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from worldmodel import renamed
from worldmodel.config import Frozen
from worldmodel.data import Obs
from worldmodel.errors import NumericsError, UnsupportedSpaceError
from worldmodel.nn.moments import RunningMoments
from worldmodel.nn.networks import MLP, ConvEncoder, symexp, symlog
from worldmodel.registry import register
from worldmodel.spaces import ObsSpec
from worldmodel.spaces.keys import FLOAT32_MAX, KeySpec

RANGE = 20.0
"""Deviations within which a standardised number is as it is; beyond them it grows with the logarithm of what is beyond."""


class VectorScaling(nn.Module):
    """Vectors on a scale that a squared error can see; images and categories pass unchanged.

    standardise: by running mean and deviation of all that was collected, kept with the model (CartPole's pole angle
    lives within 0.2 rad: unscaled, an error in it is hardly seen); what is further than RANGE deviations away is compressed.
    symlog: sign(x) ln(1 + |x|). raw: unchanged.
    The statistics are kept whatever the scale: errors of predictions are given in these deviations.
    Numbers become float32 here, after the mean is taken off: a clock's seconds are lost in 1.7e9 of float32.
    """

    def __init__(self, kind: Literal["standardise", "symlog", "raw"], spec: ObsSpec):
        super().__init__()
        self.kind = kind
        self.vectors = [name for name, key in spec.keys.items() if key.kind == "vector"]
        self.types = {name: spec.keys[name].canonical_dtype for name in self.vectors}
        self.moments = nn.ModuleList(RunningMoments(spec.keys[name].shape) for name in self.vectors)
        self.register_buffer("none", torch.zeros((), dtype=torch.float64), persistent=False)

    @torch.no_grad()
    def update(self, obs: Obs) -> None:
        """Take new observations [N, D] into the running statistics.

        NumericsError where one is not finite: it would never leave them again. Then nothing is taken in.
        """
        if nonfinite := [name for name in self.vectors if not obs[name].isfinite().all()]:
            raise NumericsError(
                f"Observation '{nonfinite[0]}' is not finite, so it was kept out of the statistics. Check what it comes from."
            )
        for name, moments in zip(self.vectors, self.moments, strict=True):
            moments.update(obs[name])

    @property
    def count(self) -> Tensor:
        """Observations that the statistics are of; 0 where no vector is among them."""
        return self.moments[0].count if self.vectors else self.none

    def statistics(self, index: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, deviation) of one vector; a constant number keeps deviation 1."""
        moments = self.moments[index]
        std = moments.variance.sqrt()
        return moments.mean.to(like), torch.where(std > 1e-6, std, torch.ones_like(std)).to(like)

    def deviation(self, name: str) -> Tensor:
        """The unit [D] in which an error of this key is given: 1 for pixels, categories and bits."""
        if name not in self.vectors:
            return torch.ones((), device=self.count.device)
        return self.statistics(self.vectors.index(name), torch.zeros((), device=self.count.device))[1]

    def forward(self, obs: Obs) -> Obs:
        """Canonical observations on the inner scale."""
        return self._each(obs, symlog, _standardised, dict.fromkeys(self.vectors, torch.float32))

    def inverse(self, obs: Obs) -> Obs:
        """From the inner scale to canonical observations."""
        return self._each(obs, symexp, _unstandardised, self.types)

    def compressed_fraction(self, obs: Obs) -> Float[Tensor, ""] | None:
        """The share of numbers on the inner scale that are compressed; None where none can be."""
        if self.kind != "standardise" or not self.vectors:
            return None
        return torch.cat([obs[name].abs().flatten() > RANGE for name in self.vectors]).float().mean()

    def _load_from_state_dict(self, state_dict, prefix, *rest) -> None:
        renamed.take_over_statistics(self, state_dict, prefix)  # torch reads SB3's zips itself, without storage.weights
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _each(self, obs: Obs, log, affine, types: dict[str, torch.dtype]) -> Obs:
        out = dict(obs)
        for i, name in enumerate(self.vectors):
            x = obs[name]
            if self.kind != "raw":
                x = x.to(torch.float64)
                x = log(x) if self.kind == "symlog" else affine(x, *self.statistics(i, x))
            out[name] = x.to(types[name])
        return out


def convolution(key: KeySpec, depth: int) -> ConvEncoder:
    """What sees the pictures of a key; UnsupportedSpaceError where they are too small for that."""
    try:
        return ConvEncoder(key.shape, depth)
    except ValueError as error:
        raise UnsupportedSpaceError(f"The observation space at '{key.name}' ({key.space}): {error}") from None


def _standardised(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """In deviations, compressed beyond RANGE; what is not finite is NaN, lest an infinity pass for a number."""
    x = (x - mean) / std
    compressed = x.abs() - RANGE
    x = torch.where(compressed > 0, x.sign() * (RANGE + compressed.clamp_min(0).log1p()), x)
    return torch.where(x.isfinite(), x, torch.nan)


def _unstandardised(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Inverse of `_standardised`; nothing that a network says is beyond float32."""
    compressed = x.abs() - RANGE
    x = torch.where(compressed > 0, x.sign() * (RANGE + compressed.clamp(0, MAX_LOG).expm1()), x)
    return (x * std + mean).clamp(-FLOAT32_MAX, FLOAT32_MAX)


MAX_LOG = 200.0
"""More than the logarithm of what float32 holds in deviations of any size."""


class EncoderConfig(Frozen):
    """A convolution for each image, one perceptron for everything else, and that itself, put side by side."""

    kind: Literal["standard"] = "standard"
    units: int = Field(128, ge=1, description="width of the perceptron")
    layers: int = Field(2, ge=0, description="layers of the perceptron")
    depth: int = Field(16, ge=1, description="channels of the first convolution; they double at each of the next three")


@register("encoder", "standard", EncoderConfig)
class Encoder(nn.Module):
    """Scaled canonical observations [N, ...] -> embedding [N, E]."""

    def __init__(self, config: EncoderConfig, spec: ObsSpec):
        super().__init__()
        self.images = [name for name, key in spec.keys.items() if key.kind == "image"]
        self.vectors = [name for name, key in spec.keys.items() if key.kind != "image"]
        self.convolutions = nn.ModuleList(convolution(spec.keys[name], config.depth) for name in self.images)
        self.out_features = sum(c.out_features for c in self.convolutions)
        if self.vectors:
            width = sum(spec.keys[name].shape[0] for name in self.vectors)
            self.perceptron = MLP(width, config.units, config.layers, norm=False)
            self.out_features += self.perceptron.out_features + width

    def forward(self, obs: Obs) -> Float[Tensor, "N E"]:
        parts = [conv(obs[name]) for name, conv in zip(self.images, self.convolutions, strict=True)]
        if self.vectors:
            x = torch.cat([obs[name] for name in self.vectors], -1)
            parts += [self.perceptron(x), x]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)
