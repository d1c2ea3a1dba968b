"""A feature that ends in a picture is read, not decoded."""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor, nn

from worldmodel.data import Obs, Sampling
from worldmodel.nn.networks import latent_to_picture


class PixelReader(nn.Module):
    """The picture at the end of a feature, {name: [N, C, H, W]} in [0, 1]; it has nothing to learn."""

    def __init__(self, name: str, shape: tuple[int, ...]):
        super().__init__()
        self.name, self.shape, self.in_features = name, shape, math.prod(shape)

    def mean(self, feature: Float[Tensor, "N F"]) -> Obs:
        return {self.name: latent_to_picture(feature[..., -self.in_features :], self.shape)}

    def sample(self, feature: Float[Tensor, "N F"], sampling: Sampling) -> Obs:
        """The same: what was drawn is the picture itself."""
        return self.mean(feature)
