"""Mixtures over whole latents: several distributions of the latent's own family, each with its weight."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from worldmodel.config import Frozen
from worldmodel.data import Sampling
from worldmodel.distributions.base import Explicit, PosteriorSource
from worldmodel.distributions.latent import Latent, Posterior
from worldmodel.nn.networks import MLP, SkipMLP
from worldmodel.registry import register


@dataclass(frozen=True)
class Components:
    """p(x) = sum_k w_k p_k(x) over whole latents, for each row of a batch [*N].

    log_weights    ln w_k [*N K]; a mixture that is the same for all rows has batch shape [1]
    distributions  p_k, with batch shape [*N K] or one that broadcasts to it
    """

    log_weights: Float[Tensor, "*N K"]
    distributions: Posterior

    def log_prob(self, x: Float[Tensor, "*M Z"]) -> Float[Tensor, "*M"]:
        """In nats. The sum over components is outside the product over a latent's numbers: one component explains all of them."""
        return torch.logsumexp(self.log_weights + self.distributions.log_prob_each(x), -1)

    def sample(self, latent: Latent, count: int, sampling: Sampling) -> Float[Tensor, "S *N Z"]:
        """A component by its weight, then a draw of it; `temperature` sharpens the weights and narrows the components.

        Differentiable in the drawn component's parameters, not in the weights. `mode`: the mode of the heaviest component.
        """
        batch = torch.broadcast_shapes(self.log_weights.shape, self.distributions.mean.shape[:-1])[:-1]
        log_weights = self.log_weights.detach().expand(*batch, -1)
        if sampling.mode:
            chosen = log_weights.argmax(-1).expand(count, *batch)
        else:
            passed = torch.softmax(log_weights / sampling.temperature, -1).cumsum(-1)[..., :-1]
            u = torch.rand(count, *batch, 1, generator=sampling.generator, device=passed.device)
            chosen = (passed < u).sum(-1)
        axis = self.distributions.mean.ndim - 1

        def pick(p: Tensor) -> Tensor:
            own = p.shape[axis:]  # the axes after the components'
            index = chosen.view(*chosen.shape, 1, *[1] * len(own))
            return torch.take_along_dim(p.expand(1, *batch, -1, *own), index, chosen.ndim).squeeze(chosen.ndim)

        return latent.draw(self.distributions.map(pick), replace(sampling, noise=None), chosen.shape, chosen.device)

    def shares(self, x: Float[Tensor, "*M Z"]) -> Float[Tensor, "*M K"]:
        """How likely each component is to have made x."""
        return torch.softmax(self.log_weights + self.distributions.log_prob_each(x), -1)

    def spread(self) -> Float[Tensor, ""]:
        """KL between two different components, in nats, averaged over all pairs; 0 where there is one only."""
        axis, k = self.distributions.mean.ndim - 1, self.distributions.mean.shape[-2]
        one, other = self.distributions.map(lambda p: p.unsqueeze(axis)), self.distributions.map(lambda p: p.unsqueeze(axis - 1))
        return one.kl(other).sum((-2, -1)).mean() / max(1, k * (k - 1))

    def detach(self) -> Components:
        return Components(self.log_weights.detach(), self.distributions.detach())


class MixtureForm(Explicit):
    """Forms whose p(x | context) is a mixture: an exact density, and rates estimated at z."""

    slots = frozenset({"initial", "transition", "marginal"})
    latent_kinds = frozenset({"gaussian", "categorical"})

    @abstractmethod
    def given(self, context: Tensor | None, rows: Tensor | None = None) -> Components: ...

    def sample(self, context: Tensor | None, count: int = 1, sampling: Sampling | None = None) -> Float[Tensor, "K N D"]:
        return self.given(context).sample(self.latent, count, sampling or Sampling())

    @torch.no_grad()
    def measures(self, x: Float[Tensor, "N D"], context: Float[Tensor, "N C"] | None) -> dict[str, float]:
        """used: exp(entropy of the components' mean share), 1 where all but one are dead.
        spread: KL between two components, in nats; near 0 all are alike."""
        share = self.given(context).shares(x).mean(0)
        some = self.given(None if context is None else context[:16])  # every pair of components for each row
        return {"used": float(torch.exp(-torch.xlogy(share, share).sum())), "spread": float(some.spread())}


def network(latent: Latent, inputs: int, units: int, layers: int, outputs: int) -> nn.Module:
    """From a context to parameters of a latent: with a linear path where its numbers have a scale."""
    return (SkipMLP if latent.continuous else MLP)(inputs, units, layers, outputs)


class MixtureConfig(Frozen):
    """Several components, free or given by a network from the context."""

    kind: Literal["mixture"] = "mixture"
    components: int = Field(8, ge=1, description="components of the mixture")
    floor: float = Field(0.01, gt=0, lt=1, description="share of equal weights mixed into the weights, so that no component dies")
    units: int = Field(128, ge=1, description="width of the network from context to weights and components")
    layers: int = Field(1, ge=0, description="hidden layers of that network")


@register("distribution", "mixture", MixtureConfig)
class Mixture(MixtureForm):
    """Without a context a mixture with free parameters, with one a mixture density network.

    Components start apart, each about as wide as N(0, 1); the latent's own floor keeps them from narrowing onto single points.
    Source: Bishop 1994 (mixture density networks); Ha and Schmidhuber 2018 (as a transition, temperature on weights and width).
    """

    def __init__(self, config: MixtureConfig, latent: Latent, context_dim: int, source: PosteriorSource | None = None):
        super().__init__(latent, context_dim)
        self.count, self.floor = config.components, config.floor
        if context_dim:
            outputs = config.components * (1 + latent.parameters)
            self.net = network(latent, context_dim, config.units, config.layers, outputs)
        self.raw = nn.Parameter(torch.randn(config.components, latent.parameters))
        self.logits = nn.Parameter(torch.zeros(config.components))

    def given(self, context: Tensor | None, rows: Tensor | None = None) -> Components:
        raw, logits = self.raw.unsqueeze(0), self.logits.unsqueeze(0)
        if self.context_dim:
            moved = self.net(context)
            logits = logits + moved[..., : self.count]
            raw = raw + moved[..., self.count :].unflatten(-1, raw.shape[-2:])
        weights = torch.softmax(logits.float(), -1) * (1 - self.floor) + self.floor / self.count
        return Components(weights.log(), self.latent.distribution(raw))
