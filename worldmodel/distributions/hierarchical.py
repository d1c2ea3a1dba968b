"""Two levels in one latent: an upper part, and a lower part given the upper one."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from worldmodel.config import Frozen, Part
from worldmodel.data import Loss, Sampling
from worldmodel.distributions.base import ConditionalDistribution, PosteriorSource
from worldmodel.distributions.latent import Latent, Posterior
from worldmodel.errors import ConfigError
from worldmodel.registry import build, config_class, part, register


class HierarchicalConfig(Frozen):
    """Where a latent is split in two, and the form of each level."""

    kind: Literal["hierarchical"] = "hierarchical"
    top: int = Field(4, ge=1, description="variables of the latent that make up the upper level; the others are the lower one")
    upper: Annotated[Any, Part("distribution")] | None = Field(None, description="p(z1 | context); none: the latent's own family")
    lower: Annotated[Any, Part("distribution")] | None = Field(
        None, description="p(z2 | context, z1); none: the latent's own family"
    )
    units: int = Field(128, ge=1, description="width of the networks of levels that are of the latent's own family")
    layers: int = Field(1, ge=0, description="hidden layers of these networks")


@register("distribution", "hierarchical", HierarchicalConfig)
class Hierarchical(ConditionalDistribution):
    """p(z1, z2 | c) = p(z1 | c) p(z2 | c, z1), each level of any exact form: given c, a latent's variables depend on one another.

    The posterior stays mean-field, q(z1) q(z2), so the rate is the sum of the levels' rates, each in closed form where it has one,
    the lower one given the drawn z1. Its gradient reaches the posterior through z1 too.
    Source: Soenderby et al. 2016 (Ladder VAE), eq. 1 to 5, for the order from the top down.
    """

    density = "exact"
    slots = frozenset({"initial", "transition"})
    latent_kinds = frozenset({"gaussian", "categorical"})

    def __init__(self, config: HierarchicalConfig, latent: Latent, context_dim: int, source: PosteriorSource | None = None):
        super().__init__(latent, context_dim)
        self.check(config, latent, "transition" if context_dim else "initial", "hierarchical")
        self.top = config.top
        own = config_class("distribution", latent.kind)(units=config.units, layers=config.layers)
        one, two = latent.part(config.top), latent.part(latent.variables - config.top)
        self.cut = one.size
        self.upper: ConditionalDistribution = build("distribution", config.upper or own, one, context_dim)
        self.lower: ConditionalDistribution = build("distribution", config.lower or own, two, context_dim + one.size)

    @classmethod
    def check(cls, config: Any, latent: Latent, slot: str, where: str) -> None:
        super().check(config, latent, slot, where)
        rest = latent.variables - config.top
        if rest < 1:
            raise ConfigError(
                f"{where}.top={config.top} leaves nothing for the lower level of a latent of {latent.variables} variables: "
                f"at most {latent.variables - 1}."
            )
        for name, size, inner in (("upper", config.top, slot), ("lower", rest, "transition")):
            level = getattr(config, name)
            if level is None:
                continue
            level_class = part("distribution", level.kind)
            if level_class.density != "exact":
                raise ConfigError(
                    f"{where}.{name}.kind={level.kind} has no exact density, so the levels' rates would not add up: "
                    "take another form."
                )
            if level_class.of_posteriors:
                raise ConfigError(
                    f"{where}.{name}.kind={level.kind} is made of posteriors over whole latents, and a level is a part of one: "
                    "take another form, such as mixture."
                )
            level_class.check(level, latent.part(size), inner, f"{where}.{name}")

    def _split(self, x: Float[Tensor, "*N D"]) -> tuple[Tensor, Tensor]:
        """(z1, z2) of a latent."""
        return x.tensor_split([self.cut], -1)

    def _lower_context(self, z1: Tensor, context: Tensor | None) -> Tensor:
        return z1 if context is None else torch.cat([context, z1], -1)

    def sample(self, context: Tensor | None, count: int = 1, sampling: Sampling | None = None) -> Float[Tensor, "K N D"]:
        """First the upper level; options of sampling hold at both."""
        sampling = replace(sampling or Sampling(), noise=None)
        z1 = self.upper.sample(context, count, sampling)
        below = self._lower_context(z1, None if context is None else context.expand(count, *context.shape))
        z2 = self.lower.sample(below.flatten(0, -2), 1, sampling)[0]
        return torch.cat([z1, z2.view(*z1.shape[:-1], -1)], -1)

    def log_prob(self, x: Float[Tensor, "*N D"], context: Tensor | None) -> Float[Tensor, "*N"]:
        z1, z2 = self._split(x)
        return self.upper.log_prob(z1, context) + self.lower.log_prob(z2, self._lower_context(z1, context))

    def forward(self, posterior: Posterior, z: Tensor, context: Tensor | None, **options: Any) -> Tensor:
        z1, z2 = self._split(z)
        axis, rest = self.latent.axis, self.latent.variables - self.top
        q1 = posterior.map(lambda p: p.narrow(axis, 0, self.top))
        q2 = posterior.map(lambda p: p.narrow(axis, self.top, rest))
        return self.upper.rate(q1, z1, context) + self.lower.rate(q2, z2, self._lower_context(z1, context))

    def loss(
        self, x: Tensor, context: Tensor | None, *, sampling: Sampling | None = None, rows: Tensor | None = None
    ) -> dict[str, Loss]:
        """The terms of each level, "upper/" and "lower/" in front of their names."""
        (z1, z2), options = self._split(x), {"sampling": sampling, "rows": rows}
        return _named(self.upper.loss(z1, context, **options), self.lower.loss(z2, self._lower_context(z1, context), **options))

    def fit(self, latents: Tensor, context: Tensor | None = None, **options) -> float:
        """The upper level and then the lower one, each by itself."""
        z1, z2 = self._split(latents.detach())
        return self.upper.fit(z1, context, **options) + self.lower.fit(z2, self._lower_context(z1, context), **options)

    def measures(self, x: Float[Tensor, "N D"], context: Float[Tensor, "N C"] | None) -> dict[str, float]:
        """Those of each level."""
        z1, z2 = self._split(x)
        return _named(self.upper.measures(z1, context), self.lower.measures(z2, self._lower_context(z1, context)))


def _named(upper: dict[str, Any], lower: dict[str, Any]) -> dict[str, Any]:
    return {f"upper/{name}": x for name, x in upper.items()} | {f"lower/{name}": x for name, x in lower.items()}
