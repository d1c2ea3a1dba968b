"""From canonical observations to embeddings, and the scaling of vectors that encoder and decoder share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

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
"""Deviations up to which a standardised number is unchanged; what exceeds them is compressed to ln(1 + excess)."""
MAX_LOG = 200.0
"""An excess that is larger than any float32, in deviations of any size."""


class VectorScaling(nn.Module):
    """Scales vectors for networks and squared errors; images and categories pass unchanged.

    standardise  by the running mean and deviation of all collected observations; beyond RANGE deviations compressed
    symlog       sign(x) ln(1 + |x|)
    raw          unchanged

    The statistics are kept for every kind: prediction errors are reported in these deviations. They are in float64, and the
    result is float32: a clock's seconds would be lost in 1.7e9 of float32.
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
        """Update the running statistics with observations [N, D]; NumericsError, and no update, where one is not finite."""
        if nonfinite := [name for name in self.vectors if not obs[name].isfinite().all()]:
            raise NumericsError(
                f"Observation '{nonfinite[0]}' is not finite, so it was kept out of the statistics. Check what it comes from."
            )
        for name, moments in zip(self.vectors, self.moments, strict=True):
            moments.update(obs[name])

    @property
    def count(self) -> Tensor:
        """Number of observations in the statistics; 0 where there are no vectors."""
        return self.moments[0].count if self.vectors else self.none

    def statistics(self, index: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, deviation) of one vector; a constant number has deviation 1."""
        moments = self.moments[index]
        std = moments.variance.sqrt()
        return moments.mean.to(like), torch.where(std > 1e-6, std, 1.0).to(like)

    def deviation(self, name: str) -> Tensor:
        """The unit [D] of errors of this key: 1 for pixels, categories and bits."""
        one = torch.ones((), device=self.count.device)
        return self.statistics(self.vectors.index(name), one)[1] if name in self.vectors else one

    def forward(self, obs: Obs) -> Obs:
        """Canonical observations -> scaled ones."""
        return self._map(obs, symlog, _standardised, dict.fromkeys(self.vectors, torch.float32))

    def inverse(self, obs: Obs) -> Obs:
        """Scaled observations -> canonical ones."""
        return self._map(obs, symexp, _unstandardised, self.types)

    def compressed_fraction(self, obs: Obs) -> Float[Tensor, ""] | None:
        """The fraction of numbers in scaled observations that are compressed; None where none can be."""
        if self.kind != "standardise" or not self.vectors:
            return None
        return torch.cat([obs[name].abs().flatten() > RANGE for name in self.vectors]).float().mean()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest) -> None:
        renamed.take_over_statistics(self, state_dict, prefix)  # torch reads SB3's zips itself, without storage.weights
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _map(self, obs: Obs, log: Callable[[Tensor], Tensor], affine: Callable[..., Tensor], types: dict[str, torch.dtype]) -> Obs:
        out = dict(obs)
        for i, name in enumerate(self.vectors):
            x = obs[name].double()
            if self.kind != "raw":
                x = log(x) if self.kind == "symlog" else affine(x, *self.statistics(i, x))
            out[name] = x.to(types[name])
        return out


def _standardised(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """In deviations, compressed beyond RANGE; NaN where x is not finite, so that an infinity is noticed."""
    x = (x - mean) / std
    excess = x.abs() - RANGE
    x = torch.where(excess > 0, x.sign() * (RANGE + excess.clamp_min(0).log1p()), x)
    return torch.where(x.isfinite(), x, torch.nan)


def _unstandardised(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Inverse of `_standardised`, within float32 whatever a network predicts."""
    excess = x.abs() - RANGE
    x = torch.where(excess > 0, x.sign() * (RANGE + excess.clamp(0, MAX_LOG).expm1()), x)
    return (x * std + mean).clamp(-FLOAT32_MAX, FLOAT32_MAX)


def convolution(key: KeySpec, depth: int) -> ConvEncoder:
    """The convolutions for a key of images; UnsupportedSpaceError where these are too small."""
    try:
        return ConvEncoder(key.shape, depth)
    except ValueError as error:
        raise UnsupportedSpaceError(f"The observation space at '{key.name}' ({key.space}): {error}") from None


class EncoderConfig(Frozen):
    """Convolutions for each image; a perceptron for everything else, and its input beside its output."""

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
