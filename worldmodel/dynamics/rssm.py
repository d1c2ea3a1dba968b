"""The recurrent state-space model: a recurrent state h and a stochastic latent z.

    h_t = GRU(h_{t-1}, z_{t-1}, a_{t-1})
    posterior   q(z_t | h_t, x_t)  filtering,   or  q(z_t | x_t)  observation: a plain VAE encoder
    prior       the transition p(z_t | h_t), or the initial distribution p(z_0) where an episode begins

Source: Hafner et al. 2019 (PlaNet) for the model, 2021 (DreamerV2) for categorical latents and the balanced KL.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from worldmodel.data import Sampling, State
from worldmodel.distributions import Posterior
from worldmodel.dynamics.base import DynamicsConfig, RecurrentDynamics, RecurrentState, stacked
from worldmodel.nn.networks import BlockGRU, linear, offset_linear
from worldmodel.registry import register


class RSSMConfig(DynamicsConfig):
    """What the posterior reads, the blocks of the GRU, and a slow level."""

    kind: Literal["rssm"] = "rssm"
    blocks: int = Field(1, ge=1, description="blocks of the recurrent weights; 1: dense")
    posterior: Literal["filtering", "observation"] = Field("filtering", description="q(z | h, x), or q(z | x) alone")
    slow: int = Field(0, ge=0, description="size of a second recurrent state that changes every few steps only; 0: none")
    slow_every: int = Field(4, ge=1, description="steps between its updates, counted from an episode's first")


class SlowLevel(nn.Module):
    """A recurrent state s that is updated every k-th step from the fast level, which reads it at every step.

    Source: Saxena et al. 2021 (CW-VAE), section 3, its deterministic path.
    """

    def __init__(self, size: int, every: int, deter: int, units: int):
        super().__init__()
        self.size, self.every = size, every
        self.below = offset_linear(deter + units, units)
        self.gru = BlockGRU(units, size)
        self.heard = linear(size, units, bias=False)

    def forward(
        self, s: Float[Tensor, "N S"], clock: Float[Tensor, "N 1"], h: Float[Tensor, "N D"], combined: Float[Tensor, "N X"]
    ) -> tuple[Float[Tensor, "N S"], Float[Tensor, "N 1"]]:
        """(the next s, the next clock): the clock counts the steps since the last update, which falls where it is 0."""
        moved = self.gru(self.gru.inputs(nn.functional.silu(self.below(torch.cat([h, combined], -1)))), s)
        return torch.where(clock < 1, moved, s), torch.where(clock + 1 < self.every, clock + 1, 0.0)


@register("dynamics", "rssm", RSSMConfig)
class RSSM(RecurrentDynamics):
    """h moves by a GRU; with `slow`, beside a second recurrent state that is updated every few steps."""

    def __init__(self, config: RSSMConfig, *parts):
        super().__init__(config, *parts)
        self.feature_dim += config.slow

    @property
    def combined_dim(self) -> int:
        return self.config.units

    def _make_recurrence(self) -> None:
        units = self.config.units
        self.bend = nn.SiLU() if self.latent.continuous else nn.Sequential(nn.LayerNorm(units), nn.SiLU())
        self.gru = BlockGRU(units, self.config.deter, self.config.blocks)
        slow = self.config.slow
        self.slow = SlowLevel(slow, self.config.slow_every, self.config.deter, units) if slow else None

    def _make_posterior(self, embed_dim: int) -> int:
        self.filtering = self.config.posterior == "filtering"
        if not self.filtering:
            return super()._make_posterior(embed_dim)
        units, continuous = self.config.units, self.latent.continuous
        self.embed_in = linear(embed_dim, units, bias=False)
        self.h_in = offset_linear(self.config.deter, units)
        norm = [] if continuous else [nn.LayerNorm(units)]
        self.posterior_out = nn.Sequential(*norm, nn.SiLU(), linear(units, self.latent.parameters))
        self.embed_out = linear(embed_dim, self.latent.parameters, bias=False) if continuous else None
        return self.config.deter

    def zero_recurrent(self, batch_size: int) -> RecurrentState:
        sizes = {"h": self.config.deter, **({"slow": self.config.slow, "clock": 1} if self.slow else {})}
        return {name: self.z_in.weight.new_zeros(batch_size, size) for name, size in sizes.items()}

    def feature(self, state: State) -> Float[Tensor, "*N F"]:
        return torch.cat([state[name] for name in ("h", "slow", "z") if name in state], -1)

    def project(self, combined: Float[Tensor, "*N X"]) -> Float[Tensor, "*N G"]:
        return self.gru.inputs(self.bend(combined))

    def cell(self, projected: Float[Tensor, "N G"], recurrent: RecurrentState) -> RecurrentState:
        return {"h": self.gru(projected, recurrent["h"])}

    def advance(self, recurrent: RecurrentState, combined: Float[Tensor, "N X"]) -> RecurrentState:
        if self.slow is None:
            return super().advance(recurrent, combined)
        slow, clock = self.slow(recurrent["slow"], recurrent["clock"], recurrent["h"], combined)
        return {**super().advance(recurrent, combined + self.slow.heard(slow)), "slow": slow, "clock": clock}

    def unroll(
        self, recurrent: RecurrentState, combined: Tensor, is_first: Tensor, generator: torch.Generator | None
    ) -> RecurrentState:
        if self.slow is None:
            return super().unroll(recurrent, combined, is_first, generator)
        keep, steps = (~is_first).to(combined).unsqueeze(-1), []
        for t in range(is_first.shape[1]):
            recurrent = self.advance({name: x * keep[:, t] for name, x in recurrent.items()}, combined[:, t])
            steps.append(recurrent)
        return stacked(steps)

    def compile_step(self) -> None:
        self.gru.compile()

    def posterior(self, embed: Float[Tensor, "*#N E"], h: Float[Tensor, "*#N D"]) -> Posterior:
        """q(z | h, x) from an embedding of x, or q(z | x), which does not use `h`. Batches may broadcast."""
        if not self.filtering:
            return super().posterior(embed, h)
        raw = self.posterior_out(self.embed_in(embed) + self.h_in(h))
        return self.latent.distribution(raw if self.embed_out is None else raw + self.embed_out(embed))

    def scan(
        self, state: State, embed: Tensor, prev_action: Tensor, is_first: Tensor, noise: Tensor | None, sampling: Sampling | None
    ) -> tuple[Posterior, Tensor, RecurrentState]:
        """As `Dynamics.scan`; a filtering posterior reads h, so that each step waits for the one before."""
        if not self.filtering:
            return super().scan(state, embed, prev_action, is_first, noise, sampling)
        actions, embeds = self.action_in(prev_action), self.embed_in(embed)
        from_embed = None if self.embed_out is None else self.embed_out(embed)
        keep = (~is_first).to(embeds).unsqueeze(-1)
        resets = is_first.any(0).tolist()
        recurrent, z = self._recurrent(state), state["z"]
        steps, zs, parameters = [], [], []
        for t in range(is_first.shape[1]):
            if resets[t]:
                recurrent, z = {name: x * keep[:, t] for name, x in recurrent.items()}, z * keep[:, t]
            recurrent = self.advance(recurrent, self.z_in(z) + actions[:, t])
            raw = self.posterior_out(embeds[:, t] + self.h_in(recurrent["h"]))
            raw = raw if from_embed is None else raw + from_embed[:, t]
            posterior = self.latent.distribution(raw)
            z = posterior.mode if noise is None else posterior.sample(noise[:, t], sampling.temperature)
            steps.append(recurrent)
            zs.append(z)
            parameters.append(raw)
        return self.latent.distribution(torch.stack(parameters, 1)), torch.stack(zs, 1), stacked(steps)
