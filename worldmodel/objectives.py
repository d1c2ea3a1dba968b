"""Objectives: what ties latents and features to observations."""

from __future__ import annotations

import copy
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from worldmodel.config import Frozen
from worldmodel.data import Batch, Loss, Sampling, Trace
from worldmodel.nn.networks import MLP, flatten
from worldmodel.registry import register


class ReconstructionConfig(Frozen):
    """The evidence lower bound: decode every observation from its feature."""

    kind: Literal["reconstruction"] = "reconstruction"


@register("objective", "reconstruction", ReconstructionConfig)
class Reconstruction(nn.Module):
    """-ln p(obs | feature) at every row: with the rates, the negative ELBO in nats per step.

    Where latents are points, which have no rate, the transition's own loss takes its place; an episode's first row has none.
    Sources: Kingma and Welling 2014, eq. 2; over time, Hafner et al. 2019 (PlaNet), eq. 3.
    """

    def __init__(self, config: ReconstructionConfig, decoder: nn.Module, encoder: nn.Module, dynamics: nn.Module, action_dim: int):
        super().__init__()
        self.decoder = decoder
        self.deterministic = dynamics.latent.deterministic

    def forward(self, trace: Trace, batch: Batch, sampling: Sampling, dynamics: nn.Module) -> dict[str, Loss]:
        losses = decoder_losses(self.decoder, trace.feature, batch, sampling)
        if self.deterministic:
            own = dynamics.predict(trace, batch, trace.z.detach(), sampling)
            losses |= {f"prior/transition/{name}": Loss(term.value, term.unit, ~batch.is_first) for name, term in own.items()}
        return losses


def decoder_losses(decoder: nn.Module, feature: Float[Tensor, "B T F"], batch: Batch, sampling: Sampling) -> dict[str, Loss]:
    """The decoder's losses of every row's observation, [B, T]."""
    obs = {name: flatten(x) for name, x in batch.obs.items()}
    terms = decoder.loss(flatten(feature), obs, sampling.substream("decoder"))
    return {name: Loss(term.value.view(batch.shape), term.unit) for name, term in terms.items()}


class PredictiveConfig(Frozen):
    """What predicts latents from latents, and prevents their collapse."""

    points: ClassVar[bool] = True
    """Needs point latents of single observations."""

    anti_collapse: Literal["sigreg", "vicreg", "none"] = Field(
        "sigreg", description="what keeps all latents from becoming one; none: nothing"
    )
    slices: int = Field(64, ge=1, description="sigreg: random directions of each update")
    covariance: float = Field(1.75, ge=0, description="vicreg: weight of the covariance beside the variance's 1")
    inverse: bool = Field(True, description="a perceptron predicts the action from the latents before and after it")
    units: int = Field(128, ge=1, description="width of that perceptron")
    ema_decay: float = Field(0.0, ge=0, lt=1, description="decay of a target encoder, whose latents are predicted; 0: none")


class JepaConfig(PredictiveConfig):
    """Predict the next latent, decode nothing."""

    kind: Literal["jepa"] = "jepa"
    probe: bool = Field(True, description="a decoder that nothing upstream learns from, so that latents can be seen")


@register("objective", "jepa", JepaConfig)
class Jepa(nn.Module):
    """Joint-embedding prediction: the latent of the next observation is predicted, and nothing is decoded.

    | loss | what | gradient reaches |
    |---|---|---|
    | prediction | the transition's own loss at the observed latent | encoder (both sides), dynamics, transition |
    | collapse/sigreg | mean of T / N over random directions (`epps_pulley`) | encoder |
    | collapse/variance, collapse/covariance | `variance`, `covariance` (vicreg) | encoder |
    | inverse | half the squared error of the action that both latents predict; one-hot: the Brier score | encoder, own parameters |
    | observation | the probe decoder | the decoder alone |

    Sources: Maes et al. 2026 (LeWM) for prediction and SIGReg without a target encoder; Sobal et al. 2025 (PLDM) for VICReg and
    inverse dynamics, without which an encoder may keep only what changes slowly; Assran et al. 2023 (I-JEPA) for `ema_decay`.
    """

    def __init__(self, config: PredictiveConfig, decoder: nn.Module, encoder: nn.Module, dynamics: nn.Module, action_dim: int):
        super().__init__()
        self.config = config
        self.decoder = decoder if getattr(config, "probe", True) else None
        self.inverse = MLP(2 * dynamics.latent.size, config.units, 1, action_dim) if config.inverse else None
        self.latent = dynamics.latent
        self.slow = copy.deepcopy(self._latent_modules(encoder, dynamics)).requires_grad_(False) if config.ema_decay else None

    @staticmethod
    def _latent_modules(encoder: nn.Module, dynamics: nn.Module) -> nn.ModuleList:
        """The modules from an observation to its latent."""
        return nn.ModuleList([encoder, dynamics.posterior_net])

    @torch.no_grad()
    def update_target_encoder(self, encoder: nn.Module, dynamics: nn.Module, decay: float | None = None) -> None:
        """One step of the exponential average; `decay`: None: that of the config."""
        if self.slow is not None:
            online = self._latent_modules(encoder, dynamics).parameters()
            decay = self.config.ema_decay if decay is None else decay
            torch._foreach_lerp_(list(self.slow.parameters()), list(online), 1 - decay)

    def decoder_input(self, feature: Tensor) -> Tensor:
        return feature.detach()

    def forward(self, trace: Trace, batch: Batch, sampling: Sampling, dynamics: nn.Module) -> dict[str, Loss]:
        not_first = ~batch.is_first
        predicted = list(dynamics.predict(trace, batch, self._targets(trace, batch), sampling).values())
        unit = "nats" if all(term.unit == "nats" for term in predicted) else "score"
        terms = {"prediction": Loss(sum(term.value for term in predicted), unit, not_first)}
        terms |= {f"collapse/{name}": Loss(x, "score") for name, x in self._collapse(flatten(trace.z).float(), sampling).items()}
        if self.inverse is not None:
            action = self.inverse(torch.cat([trace.z[:, :-1], trace.z[:, 1:]], -1))
            error = 0.5 * (action - batch.prev_action[:, 1:]).square().sum(-1)
            terms["inverse"] = Loss(error, "score", not_first[:, 1:])
        if self.decoder is not None:
            terms |= decoder_losses(self.decoder, self.decoder_input(trace.feature), batch, sampling)
        return terms

    def _targets(self, trace: Trace, batch: Batch) -> Float[Tensor, "B T Z"]:
        """The latents to be predicted."""
        if self.slow is None:
            return trace.z
        encoder, posterior = self.slow
        with torch.no_grad():
            embed = encoder({name: flatten(x) for name, x in batch.obs.items()})
            return self.latent.distribution(posterior(embed)).mean.view(trace.z.shape)

    def _collapse(self, latents: Float[Tensor, "N Z"], sampling: Sampling) -> dict[str, Tensor]:
        """The statistics that keep latents apart."""
        if self.config.anti_collapse == "sigreg":
            directions = torch.randn(latents.shape[1], self.config.slices, generator=sampling.generator, device=latents.device)
            return {"sigreg": epps_pulley(latents, directions / directions.norm(dim=0)).mean() / len(latents)}
        if self.config.anti_collapse == "vicreg":
            return {"variance": variance(latents), "covariance": self.config.covariance * covariance(latents)}
        return {}


class HybridConfig(PredictiveConfig):
    """Predict the next latent, and decode the observation."""

    kind: Literal["hybrid"] = "hybrid"
    decoder_grad: Literal["full", "stop"] = Field("full", description="whether reconstruction trains what is upstream too")


@register("objective", "hybrid", HybridConfig)
class Hybrid(Jepa):
    """`Jepa`, and -ln p(obs | feature), which by `decoder_grad` trains everything upstream or the decoder alone."""

    def decoder_input(self, feature: Tensor) -> Tensor:
        return feature if self.config.decoder_grad == "full" else feature.detach()


def epps_pulley(latents: Float[Tensor, "N Z"], directions: Float[Tensor, "Z S"]) -> Float[Tensor, " S"]:
    """How far latents are from N(0, I) along each direction of unit length: the Epps-Pulley statistic T.

        T = N * integral over t of |phi(t) - exp(-t^2 / 2)|^2 exp(-t^2 / 2),   phi the latents' characteristic function

    by the trapezoidal rule on 17 knots of [0, 3], twice, as the integrand is even. For Gaussian latents E[T] = 1.052
    whatever N and Z are; where all latents are the origin T = 0.402 N. Source: Epps and Pulley 1983; Balestriero
    and LeCun 2025 (LeJEPA, SIGReg).
    """
    knots = torch.linspace(0, 3, 17, device=latents.device)
    weight = torch.full_like(knots, 2 * 3 / 16)
    weight[[0, -1]] /= 2
    normal = torch.exp(-knots.square() / 2)
    angle = (latents @ directions).unsqueeze(-1) * knots
    gap = (angle.cos().mean(0) - normal).square() + angle.sin().mean(0).square()
    return len(latents) * gap @ (weight * normal)


def variance(latents: Float[Tensor, "N Z"]) -> Tensor:
    """How far deviations are below 1, a mean over the latent's numbers. Source: Bardes et al. 2022 (VICReg), eq. 1 and 2."""
    return (1 - (latents.var(0) + 1e-4).sqrt()).clamp_min(0).mean()


def covariance(latents: Float[Tensor, "N Z"]) -> Tensor:
    """Squared covariances between different numbers, summed over pairs, per number. Source: Bardes et al. 2022, eq. 3 and 4."""
    table = (latents - latents.mean(0)).T @ (latents - latents.mean(0)) / (len(latents) - 1)
    return (table.square().sum() - table.diagonal().square().sum()) / latents.shape[1]
