"""The recurrent state-space model: a deterministic carry h and a stochastic code z.

    h_t = GRU(h_{t-1}, z_{t-1}, a_{t-1})
    posterior   q(z_t | h_t, x_t)  filtering,   or  q(z_t | x_t)  observation: a plain VAE encoder
    transition  p(z_t | h_t),      or the initial distribution p(z_0) where an episode begins

Source: Hafner et al. 2019 (PlaNet) for the model, 2021 (DreamerV2) for categorical codes and the balanced KL.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from worldmodel.data import State
from worldmodel.distributions import Posterior
from worldmodel.dynamics.base import Carry, DynamicsConfig, Recurrent
from worldmodel.networks import BlockGRU, linear, offset_linear
from worldmodel.registry import register


class RSSMConfig(DynamicsConfig):
    """What the posterior may look at, and the blocks of the GRU."""

    kind: Literal["rssm"] = "rssm"
    blocks: int = Field(1, ge=1, description="blocks of the recurrent weights; 1: dense")
    posterior: Literal["filtering", "observation"] = Field("filtering", description="q(z | h, x), or q(z | x) alone")


@register("dynamics", "rssm", RSSMConfig)
class RSSM(Recurrent):
    """A GRU carries what codes and actions leave behind."""

    @property
    def entry(self) -> int:
        return self.config.units

    def _make_carry(self) -> None:
        units = self.config.units
        self.bend = nn.SiLU() if self.latent.metric else nn.Sequential(nn.LayerNorm(units), nn.SiLU())
        self.gru = BlockGRU(units, self.config.deter, self.config.blocks)

    def _make_posterior(self, embed_dim: int) -> int:
        self.filtering = self.config.posterior == "filtering"
        if not self.filtering:
            return super()._make_posterior(embed_dim)
        units, straight = self.config.units, self.latent.metric
        self.embed_in = linear(embed_dim, units, bias=False)
        self.carry_in = offset_linear(self.config.deter, units)
        norm = [] if straight else [nn.LayerNorm(units)]
        self.posterior_out = nn.Sequential(*norm, nn.SiLU(), linear(units, self.latent.parameters))
        self.embed_out = linear(embed_dim, self.latent.parameters, bias=False) if straight else None
        return self.config.deter

    def initial_carry(self, batch_size: int) -> Carry:
        return {"h": self.code_in.weight.new_zeros(batch_size, self.config.deter)}

    def project(self, entered: Float[Tensor, "*N X"]) -> Float[Tensor, "*N G"]:
        return self.gru.inputs(self.bend(entered))

    def cell(self, projected: Float[Tensor, "N G"], carry: Carry) -> Carry:
        return {"h": self.gru(projected, carry["h"])}

    def compile_step(self) -> None:
        self.gru.compile()

    def posterior(self, embed: Float[Tensor, "*N E"], h: Float[Tensor, "*N D"]) -> Posterior:
        """The belief about z from an embedding; `h` is not looked at by an observation-only posterior."""
        if not self.filtering:
            return super().posterior(embed, h)
        raw = self.posterior_out(self.embed_in(embed) + self.carry_in(h))
        return self.latent.belief(raw if self.embed_out is None else raw + self.embed_out(embed))

    def scan(self, state: State, embed, prev_action, is_first, noise, sampling) -> tuple[Posterior, Tensor, Carry]:
        """A filtering posterior sees the carry, so that each step waits for the one before."""
        if not self.filtering:
            return super().scan(state, embed, prev_action, is_first, noise, sampling)
        actions, embeds = self.action_in(prev_action), self.embed_in(embed)
        straight = None if self.embed_out is None else self.embed_out(embed)
        keep = (~is_first).to(embeds).unsqueeze(-1)
        resets = is_first.any(0).tolist()
        h, z = state["h"], state["z"]
        hs, zs, parameters = [], [], []
        for t in range(is_first.shape[1]):
            if resets[t]:
                h, z = h * keep[:, t], z * keep[:, t]
            h = self.gru(self.gru.inputs(self.bend(self.code_in(z) + actions[:, t])), h)
            raw = self.posterior_out(embeds[:, t] + self.carry_in(h))
            raw = raw if straight is None else raw + straight[:, t]
            belief = self.latent.belief(raw)
            z = belief.mode if noise is None else belief.sample(noise[:, t], sampling.temperature)
            hs.append(h)
            zs.append(z)
            parameters.append(raw)
        return self.latent.belief(torch.stack(parameters, 1)), torch.stack(zs, 1), {"h": torch.stack(hs, 1)}
