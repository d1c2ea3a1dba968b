"""How features are tied to the world that was observed."""

from __future__ import annotations

from typing import Literal

from torch import nn

from worldmodel.config import Frozen
from worldmodel.data import Batch, Loss, Sampling, Trace
from worldmodel.networks import flatten
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
        self.autoencoder = dynamics.latent.certain

    def forward(self, trace: Trace, batch: Batch, sampling: Sampling) -> dict[str, Loss]:
        obs = {name: flatten(x) for name, x in batch.obs.items()}
        terms = self.decoder.loss(flatten(trace.feature), obs, sampling)
        losses = {name: Loss(term.value.view(batch.shape), term.unit) for name, term in terms.items()}
        if self.autoencoder:  # points have no rate that would train the transition
            own = trace.predict(trace.z.detach())
            losses |= {f"fit/transition/{name}": Loss(t.value, t.unit, ~batch.is_first) for name, t in own.items()}
        return losses
