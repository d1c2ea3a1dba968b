"""Latents of several categorical variables, and the categorical form of the initial and transition slots."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from worldmodel.config import Frozen
from worldmodel.distributions.base import ClosedForm, PosteriorSource
from worldmodel.distributions.latent import Latent, Posterior
from worldmodel.nn.networks import MLP
from worldmodel.registry import register


@dataclass(frozen=True)
class CategoricalPosterior(Posterior):
    """V independent variables of C classes; a flat latent is their one-hot vectors, concatenated (Z = V C)."""

    probs: Float[Tensor, "*N V C"]

    @cached_property
    def log_probs(self) -> Float[Tensor, "*N V C"]:
        return self.probs.clamp_min(1e-30).log()

    @property
    def mean(self) -> Tensor:  # type: ignore[override]
        return self.probs.flatten(-2)

    @property
    def mode(self) -> Tensor:
        return torch.zeros_like(self.probs).scatter(-1, self.probs.argmax(-1, keepdim=True), 1.0).flatten(-2)

    def sample(self, noise: Tensor, temperature: float = 1.0) -> Tensor:
        """A one-hot draw by inverting the cumulative distribution, with the gradient of the probabilities (straight-through).

        noise [*N V] in [0, 1). Source of the gradient: Bengio et al. 2013; Hafner et al. 2021 (DreamerV2), alg. 1.
        """
        probs = self.probs if temperature == 1 else torch.softmax(self.log_probs / temperature, -1)
        with torch.no_grad():
            passed = probs.cumsum(-1)[..., :-1] > noise.unsqueeze(-1)  # the last class takes what rounding leaves over
            above = nn.functional.pad(passed.to(probs.dtype), (0, 1), value=1.0)
            one_hot = above - nn.functional.pad(above[..., :-1], (1, 0))
        if probs.requires_grad:
            one_hot = one_hot + (probs - probs.detach())
        return one_hot.flatten(-2)

    def log_prob(self, z: Tensor) -> Tensor:
        return (z.unflatten(-1, self.log_probs.shape[-2:]) * self.log_probs).sum((-2, -1))

    def entropy(self) -> Tensor:
        return -(self.probs * self.log_probs).sum((-2, -1))

    def kl_elements(self, other: Posterior) -> Float[Tensor, "*N V"]:
        if not isinstance(other, CategoricalPosterior):
            raise TypeError(f"KL of a categorical against a {type(other).__name__} has no closed form.")
        return (self.probs * (self.log_probs - other.log_probs)).sum(-1)

    def map(self, fn: Callable[[Tensor], Tensor]) -> CategoricalPosterior:
        return CategoricalPosterior(fn(self.probs))


class CategoricalLatentConfig(Frozen):
    """Categorical variables, as DreamerV2 and V3 use them."""

    kind: Literal["categorical"] = "categorical"
    variables: int = Field(16, ge=1, description="categorical variables in a latent")
    classes: int = Field(16, ge=2, description="classes of each variable")
    unimix: float = Field(0.01, ge=0, lt=1, description="share of the uniform distribution mixed into every posterior")


@register("latent", "categorical", CategoricalLatentConfig)
class CategoricalLatent(Latent):
    """probs = (1 - unimix) softmax(logits) + unimix / C: no class is impossible, so KLs stay bounded."""

    kind = "categorical"
    continuous = False
    axis = -2

    def __init__(self, config: CategoricalLatentConfig):
        self.variables, self.classes, self.unimix = config.variables, config.classes, config.unimix
        self.size = self.parameters = config.variables * config.classes

    def noise(self, shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device | str | None) -> Tensor:
        return torch.rand(*shape, self.variables, generator=generator, device=device)

    def distribution(self, parameters: Tensor) -> CategoricalPosterior:
        logits = parameters.float().unflatten(-1, (self.variables, self.classes))  # KLs lose too much in bf16
        probs = torch.softmax(logits, -1)
        return CategoricalPosterior(probs * (1 - self.unimix) + self.unimix / self.classes if self.unimix else probs)

    def part(self, variables: int) -> CategoricalLatent:
        return CategoricalLatent(CategoricalLatentConfig(variables=variables, classes=self.classes, unimix=self.unimix))

    def traverse(self, z: Tensor, latents: Tensor, steps: int, width: float) -> Tensor:
        """The first S classes of each variable, one after the other; `width` does not matter."""
        classes = min(steps, self.classes)
        moved = z.view(self.variables, self.classes).expand(self.variables, classes, -1, -1).clone()
        each = torch.arange(self.variables, device=z.device)
        moved[each, :, each] = torch.eye(self.classes, device=z.device)[:classes]
        return moved.flatten(-2)


class CategoricalConfig(Frozen):
    """Categorical variables whose logits a network gives from the context."""

    kind: Literal["categorical"] = "categorical"
    units: int = Field(128, ge=1, description="width of the network from context to logits")
    layers: int = Field(1, ge=0, description="hidden layers of that network")


@register("distribution", "categorical", CategoricalConfig)
class Categorical(ClosedForm):
    """Independent categorical variables given the context."""

    slots = frozenset({"initial", "transition"})
    latent_kinds = frozenset({"categorical"})

    def __init__(self, config: CategoricalConfig, latent: Latent, context_dim: int, source: PosteriorSource | None = None):
        super().__init__(latent, context_dim)
        if context_dim:
            self.net = MLP(context_dim, config.units, config.layers, latent.parameters)
        else:
            self.free = nn.Parameter(torch.zeros(1, latent.parameters))

    def given(self, context: Tensor | None, rows: Tensor | None = None) -> CategoricalPosterior:
        return self.latent.distribution(self.net(context) if self.context_dim else self.free)
