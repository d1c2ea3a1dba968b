"""Gaussian latents with a diagonal covariance, and the Gaussian form of every slot."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from worldmodel.config import Frozen
from worldmodel.data import Loss, Sampling
from worldmodel.distributions.base import ClosedForm, PosteriorSource
from worldmodel.distributions.latent import Latent, Posterior
from worldmodel.nn.moments import RunningMoments
from worldmodel.nn.networks import SkipMLP
from worldmodel.registry import register


@dataclass(frozen=True)
class GaussianPosterior(Posterior):
    """N(mean, std^2), independent over the latent's numbers."""

    MATMUL_FROM: ClassVar[int] = 1024
    """K Z, from which on all K densities are taken by matrix products."""

    mean: Float[Tensor, "*N Z"]
    std: Float[Tensor, "*N Z"]

    def sample(self, noise: Tensor, temperature: float = 1.0) -> Tensor:
        return torch.addcmul(self.mean, self.std * temperature, noise)

    def mirror(self, z: Tensor) -> Tensor:
        return 2 * self.mean - z

    def log_prob(self, z: Tensor) -> Tensor:
        return -(0.5 * ((z - self.mean) / self.std).square() + self.std.log() + 0.5 * math.log(2 * math.pi)).sum(-1)

    def log_prob_each(self, x: Tensor) -> Tensor:
        """By matrix products where there are many numbers and one row.

        In double precision, which autocast leaves alone too: squares cancel, and narrow components would be off by nats.
        """
        mean, std = self.mean.double(), self.std.double()
        if mean.shape[:-2].numel() != 1 or mean.shape[-2:].numel() < self.MATMUL_FROM:
            return super().log_prob_each(x)
        mean, std = mean.reshape(mean.shape[-2:]), std.reshape(std.shape[-2:])
        precision, x = std**-2, x.double()
        distance = x.square() @ precision.T - 2 * x @ (mean * precision).T + (mean.square() * precision).sum(-1)
        return (-0.5 * distance - (std.log() + 0.5 * math.log(2 * math.pi)).sum(-1)).to(self.mean)

    def entropy(self) -> Tensor:
        return (self.std.log() + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)

    def kl_elements(self, other: Posterior) -> Float[Tensor, "*N Z"]:
        if not isinstance(other, GaussianPosterior):
            raise TypeError(f"KL of a Gaussian against a {type(other).__name__} has no closed form.")
        ratio = (self.std / other.std).square()
        return 0.5 * (ratio + ((self.mean - other.mean) / other.std).square() - 1 - ratio.log())

    def map(self, fn: Callable[[Tensor], Tensor]) -> GaussianPosterior:
        return GaussianPosterior(fn(self.mean), fn(self.std))


class GaussianLatentConfig(Frozen):
    """Real-valued latents: those of a VAE."""

    kind: Literal["gaussian"] = "gaussian"
    size: int = Field(16, ge=1, description="numbers in a latent")
    min_std: float = Field(0.01, gt=0, description="minimum standard deviation of a posterior")


@register("latent", "gaussian", GaussianLatentConfig)
class GaussianLatent(Latent):
    """std = softplus(raw + ln(e - 1)) + min_std: an untrained network gives about N(0, 1)."""

    kind = "gaussian"
    continuous = True
    axis = -1

    def __init__(self, config: GaussianLatentConfig):
        self.size = self.variables = config.size
        self.parameters, self.min_std = 2 * config.size, config.min_std

    def noise(self, shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device | str | None) -> Tensor:
        return torch.randn(*shape, self.size, generator=generator, device=device)

    def distribution(self, parameters: Tensor) -> GaussianPosterior:
        mean, raw = parameters.float().chunk(2, -1)  # KLs lose too much in bf16
        return GaussianPosterior(mean, F.softplus(raw + math.log(math.e - 1)) + self.min_std)

    def part(self, variables: int) -> GaussianLatent:
        return GaussianLatent(GaussianLatentConfig(size=variables, min_std=self.min_std))

    def traverse(self, z: Tensor, latents: Tensor, steps: int, width: float) -> Tensor:
        """S evenly spaced values, up to `width` deviations to both sides of each number's mean."""
        values = latents.mean(0) + latents.std(0) * torch.linspace(-width, width, steps, device=z.device).unsqueeze(-1)
        moved = z.expand(self.size, steps, -1).clone()
        each = torch.arange(self.size, device=z.device)
        moved[each, :, each] = values.T
        return moved


class GaussianConfig(Frozen):
    """A Gaussian whose mean and deviation a network gives from the context."""

    kind: Literal["gaussian"] = "gaussian"
    units: int = Field(128, ge=1, description="width of the network from context to parameters")
    layers: int = Field(1, ge=0, description="hidden layers of that network")
    standard: bool = Field(False, description="N(0, I) with nothing to learn, whatever the context")
    std: Literal["learned", "fitted"] = Field(
        "learned",
        description="deviation: the network's, or the running size of the mean's errors; the mean then learns by their square",
    )


@register("distribution", "gaussian", GaussianConfig)
class Gaussian(ClosedForm):
    """Independent normal numbers given the context.

    With `std` fitted the mean minimises half the squared error, and the deviation is the running root mean square of the errors:
    where latents are learned by being predicted, a likelihood would reward shrinking them.
    """

    slots = frozenset({"initial", "transition", "marginal"})
    latent_kinds = frozenset({"gaussian"})
    MEMORY = 0.95
    """The share of the fitted variance that stays at each update."""

    def __init__(self, config: GaussianConfig, latent: Latent, context_dim: int, source: PosteriorSource | None = None):
        super().__init__(latent, context_dim)
        self.standard, self.fitted = config.standard, config.std == "fitted" and not config.standard
        outputs = latent.size if self.fitted else latent.parameters
        if self.fitted:
            self.errors = RunningMoments(latent.size, self.MEMORY, initial_mean=1.0)
        if config.standard:
            self.register_buffer("origin", torch.zeros(1, latent.size), persistent=False)
        elif context_dim:
            self.net = SkipMLP(context_dim, config.units, config.layers, outputs)
        else:
            self.free = nn.Parameter(torch.zeros(1, outputs))

    def given(self, context: Tensor | None, rows: Tensor | None = None) -> GaussianPosterior:
        if self.standard:
            mean = self.origin if context is None else self.origin.expand(*context.shape[:-1], -1)
            return GaussianPosterior(mean, torch.ones_like(mean))
        raw = self.net(context) if self.context_dim else self.free
        if not self.fitted:
            return self.latent.distribution(raw)
        return GaussianPosterior(raw.float(), self.variance.sqrt().clamp_min(self.latent.min_std).expand(raw.shape))

    @property
    def variance(self) -> Float[Tensor, " Z"]:
        """The mean square of the errors so far, where `std` is fitted."""
        return self.errors.mean.float()

    def update_statistics(self, posterior: Any, prior: Any) -> None:
        self._update_variance((posterior.mean - prior.mean).square() + posterior.std.square())

    def loss(
        self, x: Tensor, context: Tensor | None, *, sampling: Sampling | None = None, rows: Tensor | None = None
    ) -> dict[str, Loss]:
        """The negative log-likelihood, or {"error": half the squared error, summed over the latent} where `std` is fitted."""
        if not self.fitted:
            return super().loss(x, context, sampling=sampling, rows=rows)
        error = (x - self.given(context).mean).square()
        self._update_variance(error)
        return {"error": Loss(0.5 * error.sum(-1), "score")}

    def fit(self, latents: Tensor, context: Tensor | None = None, **options) -> float:
        """As everywhere; a fitted deviation is then that of the errors at all latents."""
        value = super().fit(latents, context, **options)
        if self.fitted:
            with torch.no_grad():
                self.errors.reset_to((latents - self.given(context).mean).square().flatten(0, -2))
        return value

    @torch.no_grad()
    def _update_variance(self, error: Float[Tensor, "*N Z"]) -> None:
        """Takes squared errors into the fitted variance, in training only and not where weights are frozen."""
        if self.fitted and self.training and error.numel() and next(self.parameters()).requires_grad:
            self.errors.update(error.flatten(0, -2))
