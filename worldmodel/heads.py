"""Heads that predict the reward, the end of an episode and which actions are legal, from a feature."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from worldmodel.config import Frozen
from worldmodel.nn.moments import RunningMoments
from worldmodel.nn.networks import MLP, TwoHot
from worldmodel.registry import register


class HeadsConfig(Frozen):
    """Reward as a two-hot distribution in symlog space, in units of the rewards' own size; continue and legal as Bernoullis."""

    kind: Literal["standard"] = "standard"
    units: int = Field(128, ge=1, description="width")
    layers: int = Field(1, ge=0, description="hidden layers of each head")
    bins: int = Field(127, ge=3, description="bins of the reward's distribution (odd)")
    limit: float = Field(10.0, gt=0, description="largest symlog reward that the bins reach, in units of the rewards' own size")
    gradient: Literal["full", "stop"] = Field("full", description="whether their losses train what is upstream too")


class RewardScale(nn.Module):
    """The unit in which rewards are learned: the root mean square of all rewards so far that are not 0; 1 before any.

    So rewards of 1e6 and of 1e-6 are the same to the bins. Zeros do not count: a rare goal is no smaller for that.
    """

    MIN = 1e-30
    """The smallest unit: dividing by a smaller one overflows float32."""

    def __init__(self):
        super().__init__()
        self.squares = RunningMoments((), initial_mean=1.0)

    @torch.no_grad()
    def update(self, reward: Float[Tensor, "*N"]) -> None:
        """Take in rewards as float32, as they are stored; none of them where one is not finite."""
        reward = reward.detach().flatten().float().to(torch.float64)
        self.squares.update(reward[reward != 0].square())

    @property
    def value(self) -> Float[Tensor, ""]:
        """The unit: float32, above 0."""
        return self.squares.mean.sqrt().float().clamp_min(self.MIN)


@register("heads", "standard", HeadsConfig)
class Heads(nn.Module):
    """feature [*N, F] -> expected reward [*N] and P(continue) [*N], both on arrival at that feature, and P(legal) of actions.

    scale   the unit that rewards are learned in; arguments and results are rewards of the environment
    masked  A, the number of actions of which the environment says whether they are legal; 0: it does not say
    """

    def __init__(self, config: HeadsConfig, feature_dim: int, masked: int = 0):
        super().__init__()
        self.stop = config.gradient == "stop"
        self.scale = RewardScale()
        self.two_hot = TwoHot(config.bins, config.limit)
        self.reward_net = MLP(feature_dim, config.units, config.layers, config.bins, scale=0)
        self.cont_net = MLP(feature_dim, config.units, config.layers, 1)
        self.legal_net = MLP(feature_dim, config.units, config.layers, masked) if masked else None

    def reward(self, feature: Float[Tensor, "*N F"]) -> Float[Tensor, "*N"]:
        return self.two_hot.mean(self.reward_net(feature)) * self.scale.value

    def cont(self, feature: Float[Tensor, "*N F"]) -> Float[Tensor, "*N"]:
        return torch.sigmoid(self.cont_net(feature)).squeeze(-1)

    def legal(self, feature: Float[Tensor, "*N F"]) -> Float[Tensor, "*N A"]:
        """The probability that each action may be taken there; only where masks are known."""
        return torch.sigmoid(self.legal_net(feature).float())

    def reward_loss(self, feature: Float[Tensor, "*N F"], target: Float[Tensor, "*N"]) -> Float[Tensor, "*N"]:
        return self.two_hot.loss(self.reward_net(self._read(feature)), target / self.scale.value)

    def cont_loss(self, feature: Float[Tensor, "*N F"], target: Float[Tensor, "*N"]) -> Float[Tensor, "*N"]:
        return F.binary_cross_entropy_with_logits(self.cont_net(self._read(feature)).float().squeeze(-1), target, reduction="none")

    def legal_loss(self, feature: Float[Tensor, "*N F"], mask: Float[Tensor, "*N A"]) -> Float[Tensor, "*N"]:
        """-ln p(mask) in nats, summed over actions."""
        logits = self.legal_net(self._read(feature)).float()
        return F.binary_cross_entropy_with_logits(logits, mask, reduction="none").sum(-1)

    def _read(self, feature: Tensor) -> Tensor:
        return feature.detach() if self.stop else feature
