"""How features are tied to the world that was observed."""

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

    Source: Kingma and Welling 2014, eq. 2; over time, Hafner et al. 2019 (PlaNet), eq. 3.
    """

    def __init__(self, config: ReconstructionConfig, decoder: nn.Module, encoder: nn.Module, dynamics: nn.Module, action_dim: int):
        super().__init__()
        self.decoder = decoder
        self.deterministic = dynamics.latent.deterministic

    def forward(self, trace: Trace, batch: Batch, sampling: Sampling, dynamics: nn.Module) -> dict[str, Loss]:
        losses = decoder_losses(self.decoder, trace.feature, batch, sampling)
        if self.deterministic:  # points have no rate that would train the transition
            losses |= prior_losses(trace, batch, sampling, dynamics)
        return losses


def decoder_losses(decoder: nn.Module, feature: Float[Tensor, "B T F"], batch: Batch, sampling: Sampling) -> dict[str, Loss]:
    """What a decoder makes of every row's observation, [B, T]."""
    obs = {name: flatten(x) for name, x in batch.obs.items()}
    terms = decoder.loss(flatten(feature), obs, sampling.substream("decoder"))
    return {name: Loss(term.value.view(batch.shape), term.unit) for name, term in terms.items()}


def prior_losses(trace: Trace, batch: Batch, sampling: Sampling, dynamics: nn.Module) -> dict[str, Loss]:
    """The transition's own losses at codes that it does not shape; where an episode opens there is none."""
    own = dynamics.predict(trace, batch, trace.z.detach(), sampling)
    return {f"prior/transition/{name}": Loss(term.value, term.unit, ~batch.is_first) for name, term in own.items()}


# Codes that are predicted, not decoded ---------------------------------------------------------------------------------


class PredictiveConfig(Frozen):
    """What predicts codes from codes, and keeps them apart."""

    points: ClassVar[bool] = True
    """Needs point codes of single observations."""

    anti_collapse: Literal["sigreg", "vicreg", "none"] = Field(
        "sigreg", description="what keeps all codes from becoming one; none: nothing"
    )
    slices: int = Field(64, ge=1, description="sigreg: random directions of each update")
    covariance: float = Field(1.75, ge=0, description="vicreg: weight of the covariance beside the variance's 1")
    inverse: bool = Field(True, description="a perceptron tells the action from the codes before and after it")
    units: int = Field(128, ge=1, description="width of that perceptron")
    ema_decay: float = Field(0.0, ge=0, lt=1, description="share that a slow encoder keeps, whose codes are predicted; 0: none")


class JepaConfig(PredictiveConfig):
    """Predict the next code, decode nothing."""

    kind: Literal["jepa"] = "jepa"
    probe: bool = Field(True, description="a decoder that nothing upstream learns from, so that codes can be seen")


@register("objective", "jepa", JepaConfig)
class Jepa(nn.Module):
    """Joint-embedding prediction: the code of the next observation is told from what came before it, and nothing is decoded.

    | loss | what | gradient reaches |
    |---|---|---|
    | prediction | the transition's own loss at the code that came | encoder (both sides), dynamics, transition |
    | collapse/sigreg | mean of T / N over random directions (`epps_pulley`) | encoder |
    | collapse/variance, collapse/covariance | `variance`, `covariance` (vicreg) | encoder |
    | inverse | half the squared error of the action told from both codes; one-hot: the Brier score | encoder, own parameters |
    | observation | the probe decoder | the decoder alone |

    Sources: Maes et al. 2026 (LeWM) for prediction and SIGReg without a slow encoder; Sobal et al. 2025 (PLDM) for VICReg and
    inverse dynamics, without which an encoder may keep only what changes slowly; Assran et al. 2023 (I-JEPA) for `ema`.
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
        """All that a code depends on: no carry and no law."""
        return nn.ModuleList([encoder, dynamics.posterior_net])

    @torch.no_grad()
    def update_target_encoder(self, encoder: nn.Module, dynamics: nn.Module) -> None:
        """The slow encoder takes a step towards the encoder."""
        if self.slow is not None:
            online = self._latent_modules(encoder, dynamics).parameters()
            torch._foreach_lerp_(list(self.slow.parameters()), list(online), 1 - self.config.ema_decay)

    def decoder_input(self, feature: Tensor) -> Tensor:
        """The feature as the decoder gets it."""
        return feature.detach()

    def forward(self, trace: Trace, batch: Batch, sampling: Sampling, dynamics: nn.Module) -> dict[str, Loss]:
        not_first = ~batch.is_first
        predicted = list(dynamics.predict(trace, batch, self._targets(trace, batch), sampling).values())
        unit = "nats" if all(term.unit == "nats" for term in predicted) else "score"
        terms = {"prediction": Loss(sum(term.value for term in predicted), unit, not_first)}
        latents = flatten(trace.z).float()
        if self.config.anti_collapse == "sigreg":
            directions = torch.randn(latents.shape[1], self.config.slices, generator=sampling.generator, device=latents.device)
            statistic = epps_pulley(latents, directions / directions.norm(dim=0)).mean()
            terms["collapse/sigreg"] = Loss(statistic / len(latents), "score")
        elif self.config.anti_collapse == "vicreg":
            terms["collapse/variance"] = Loss(variance(latents), "score")
            terms["collapse/covariance"] = Loss(self.config.covariance * covariance(latents), "score")
        if self.inverse is not None:
            action = self.inverse(torch.cat([trace.z[:, :-1], trace.z[:, 1:]], -1))
            error = 0.5 * (action - batch.prev_action[:, 1:]).square().sum(-1)
            terms["inverse"] = Loss(error, "score", not_first[:, 1:])
        if self.decoder is not None:
            terms |= decoder_losses(self.decoder, self.decoder_input(trace.feature), batch, sampling)
        return terms

    def _targets(self, trace: Trace, batch: Batch) -> Float[Tensor, "B T Z"]:
        """The codes to be predicted, [B, T, Z]."""
        if self.slow is None:
            return trace.z
        encoder, posterior = self.slow
        with torch.no_grad():
            embed = encoder({name: flatten(x) for name, x in batch.obs.items()})
            return self.latent.distribution(posterior(embed)).mean.view(trace.z.shape)


class HybridConfig(PredictiveConfig):
    """Predict the next code, and decode the observation."""

    kind: Literal["hybrid"] = "hybrid"
    decoder_grad: Literal["full", "stop"] = Field("full", description="whether reconstruction trains what is upstream too")


@register("objective", "hybrid", HybridConfig)
class Hybrid(Jepa):
    """`Jepa`, and -ln p(obs | feature), which by `decoder_grad` reaches all upstream or the decoder alone."""

    def decoder_input(self, feature: Tensor) -> Tensor:
        return feature if self.config.decoder_grad == "full" else feature.detach()


def epps_pulley(latents: Float[Tensor, "N Z"], directions: Float[Tensor, "Z S"]) -> Float[Tensor, " S"]:
    """How far codes are from N(0, I) along each direction of unit length: the Epps-Pulley statistic T.

        T = N * integral over t of |phi(t) - exp(-t^2 / 2)|^2 exp(-t^2 / 2),   phi the codes' characteristic function

    by the trapezoidal rule on 17 knots of [0, 3], twice, as the integrand is even. For Gaussian codes E[T] = 1.052
    whatever N and Z are; where all codes are one point at the origin T = 0.402 N. Source: Epps and Pulley 1983; Balestriero
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
    """How far the numbers' deviations stay below 1, on average. Source: Bardes et al. 2022 (VICReg), eq. 1 and 2."""
    return (1 - (latents.var(0) + 1e-4).sqrt()).clamp_min(0).mean()


def covariance(latents: Float[Tensor, "N Z"]) -> Tensor:
    """Squared covariances between different numbers, summed over pairs, per number. Source: Bardes et al. 2022, eq. 3 and 4."""
    table = (latents - latents.mean(0)).T @ (latents - latents.mean(0)) / (len(latents) - 1)
    return (table.square().sum() - table.diagonal().square().sum()) / latents.shape[1]
