"""An ensemble that predicts the next embedding: its members disagree where the world model has few data."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field, field_validator
from torch import Tensor, nn

from worldmodel.config import Frozen
from worldmodel.data import Loss
from worldmodel.nn.moments import RunningMoments
from worldmodel.nn.networks import EnsembleLinear
from worldmodel.registry import register


class EnsembleConfig(Frozen):
    """Without members there is no ensemble, and dreams have no uncertainty."""

    kind: Literal["standard"] = "standard"
    members: int = Field(0, ge=0, description="predictors of the next embedding, whose disagreement is the uncertainty; 0: none")
    units: int = Field(64, ge=1, description="width of each")
    layers: int = Field(2, ge=1, description="hidden layers of each")

    @field_validator("members")
    @classmethod
    def _one_cannot_disagree(cls, members: int) -> int:
        if members == 1:
            raise ValueError("one predictor cannot disagree with itself: use 0, or at least 2 (5 is usual)")
        return members


@register("ensemble", "standard", EnsembleConfig)
class Ensemble(nn.Module):
    """Predictors of the next embedding from feature and action, which differ in their initial weights alone.

    Uncertainty is the deviation between their predictions, in deviations of the embedding (1: as between random embeddings),
    so that it is comparable whatever the latent. No gradient leaves the ensemble.
    Source: Sekar et al. 2020 (Plan2Explore), section 3; Lakshminarayanan et al. 2017.
    """

    MEMORY = 0.99
    """Decay of the embedding's running mean and variance."""

    def __init__(self, config: EnsembleConfig, feature_dim: int, action_dim: int, embed_dim: int):
        super().__init__()
        widths = [feature_dim + action_dim, *[config.units] * config.layers, embed_dim]
        self.members = config.members
        self.layers = nn.ModuleList(EnsembleLinear(config.members, *pair) for pair in pairwise(widths))
        self.moments = RunningMoments(embed_dim, self.MEMORY)

    def forward(self, feature: Float[Tensor, "N F"], action: Float[Tensor, "N A"]) -> Float[Tensor, "K N E"]:
        """Each member's prediction of the standardised embedding."""
        x = torch.cat([feature, action], -1).expand(self.members, -1, -1)
        for layer in self.layers[:-1]:
            x = nn.functional.silu(layer(x))
        return self.layers[-1](x)

    def loss(
        self,
        feature: Float[Tensor, "B T F"],
        action: Float[Tensor, "B T A"],
        next_embed: Float[Tensor, "B T E"],
        mask: Bool[Tensor, "B T"],
    ) -> Loss:
        """Half the squared error, summed over members and averaged over the embedding, where the mask holds."""
        target = next_embed.detach().flatten(0, 1).float()
        if self.training and len(rows := target[mask.flatten()]) > 1:  # a single row has no deviation
            self.moments.update(rows)
        target = (target - self.moments.mean.float()) / self.moments.deviation(1e-3)
        error = self(feature.detach().flatten(0, 1), action.flatten(0, 1)) - target
        return Loss(0.5 * error.square().mean(-1).sum(0).view(mask.shape), "score", mask)

    def disagreement(self, feature: Float[Tensor, "*N F"], action: Float[Tensor, "*N A"]) -> Float[Tensor, "*N"]:
        """Deviation between the members' predictions, a root mean square over the embedding."""
        spread = self(feature.flatten(0, -2), action.flatten(0, -2)).var(0)
        return spread.mean(-1).sqrt().view(feature.shape[:-1])
