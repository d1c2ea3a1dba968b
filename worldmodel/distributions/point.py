"""Deterministic latents: those of an encoder without a posterior (JEPA)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from worldmodel.config import Frozen
from worldmodel.distributions.gaussian import GaussianLatent, GaussianLatentConfig
from worldmodel.distributions.latent import Latent, Posterior, UndefinedRate
from worldmodel.registry import register


@dataclass(frozen=True)
class PointPosterior(Posterior):
    """All probability at one latent: no density, so no KL against a prior."""

    mean: Float[Tensor, "*N Z"]

    def sample(self, noise: Tensor, temperature: float = 1.0) -> Tensor:
        return self.mean

    def log_prob(self, z: Tensor) -> Tensor:
        raise self._undefined("density")

    def entropy(self) -> Tensor:
        raise self._undefined("entropy")

    def kl_elements(self, other: Posterior) -> Tensor:
        raise self._undefined("rate against a prior")

    def map(self, fn: Callable[[Tensor], Tensor]) -> PointPosterior:
        return PointPosterior(fn(self.mean))

    @staticmethod
    def _undefined(what: str) -> UndefinedRate:
        return UndefinedRate(
            f"A point has no closed form of, and in fact no, {what}: latents of kind 'point' are fitted by prediction alone. "
            "Use model.dynamics.latent.kind=gaussian where nats are asked for."
        )


class PointLatentConfig(Frozen):
    """Real-valued latents without a posterior."""

    kind: Literal["point"] = "point"
    size: int = Field(16, ge=1, description="numbers in a latent")


@register("latent", "point", PointLatentConfig)
class PointLatent(Latent):
    """The network's output is the latent."""

    kind = "point"
    continuous = True
    deterministic = True
    axis = -1

    def __init__(self, config: PointLatentConfig):
        self.size = self.parameters = self.variables = config.size

    @property
    def family(self) -> Latent:
        return GaussianLatent(GaussianLatentConfig(size=self.size))

    def noise(self, shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device | str | None) -> Tensor:
        return torch.empty(*shape, 0, device=device)

    def distribution(self, parameters: Tensor) -> PointPosterior:
        return PointPosterior(parameters.float())

    def part(self, variables: int) -> PointLatent:
        return PointLatent(PointLatentConfig(size=variables))

    def traverse(self, z: Tensor, latents: Tensor, steps: int, width: float) -> Tensor:
        return self.family.traverse(z, latents, steps, width)
