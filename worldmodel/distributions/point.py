"""Codes that are known and not believed: what an encoder without a posterior gives (JEPA)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from worldmodel.config import Frozen
from worldmodel.distributions.base import Latent, Posterior, UndefinedRate
from worldmodel.distributions.gaussian import GaussianLatent, GaussianLatentConfig
from worldmodel.registry import register


@dataclass(frozen=True)
class PointPosterior(Posterior):
    """All belief at one code. It has no density, so that a rate against a law does not exist."""

    mean_: Float[Tensor, "*N Z"]

    @property
    def mean(self) -> Tensor:
        return self.mean_

    @property
    def mode(self) -> Tensor:
        return self.mean_

    def sample(self, noise: Tensor, temperature: float = 1.0) -> Tensor:
        return self.mean_

    def log_prob(self, z: Tensor) -> Tensor:
        raise self._undefined("density")

    def entropy(self) -> Tensor:
        raise self._undefined("entropy")

    def kl(self, other: Posterior) -> Tensor:
        raise self._undefined("rate against a law")

    def map(self, fn) -> PointPosterior:
        return PointPosterior(fn(self.mean_))

    @staticmethod
    def _undefined(what: str) -> UndefinedRate:
        return UndefinedRate(
            f"A point has no closed form of, and in fact no, {what}: codes of kind 'point' are fitted by prediction alone. "
            "Use model.dynamics.latent.kind=gaussian where nats are asked for."
        )


class PointLatentConfig(Frozen):
    """Real-valued codes without a belief around them."""

    kind: Literal["point"] = "point"
    size: int = Field(16, ge=1, description="numbers in a code")


@register("latent", "point", PointLatentConfig)
class PointLatent(Latent):
    """The network's output is the code."""

    kind = "point"
    continuous = True
    deterministic = True
    axis = -1

    def __init__(self, config: PointLatentConfig):
        self.size = self.parameters = self.variables = config.size

    @property
    def family(self) -> Latent:
        return GaussianLatent(GaussianLatentConfig(size=self.size))

    def noise(self, shape, generator, device) -> Tensor:
        return torch.empty(*shape, 0, device=device)

    def distribution(self, parameters: Tensor) -> PointPosterior:
        return PointPosterior(parameters.float())

    def part(self, variables: int) -> PointLatent:
        return PointLatent(PointLatentConfig(size=variables))

    def traverse(self, z, latents, steps, width) -> Tensor:
        return self.family.traverse(z, latents, steps, width)
