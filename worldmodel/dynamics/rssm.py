"""The recurrent state-space model: a deterministic carry h and a stochastic code z.

    h_t = GRU(h_{t-1}, z_{t-1}, a_{t-1}, s_t)
    s_t = GRU(s_{t-1}, h_{t-1}, z_{t-1}) every k-th step since the episode began, else s_{t-1}: the slow level, where there is one
    posterior   q(z_t | h_t, x_t)  filtering,   or  q(z_t | x_t)  observation: a plain VAE encoder
    transition  p(z_t | h_t),      or the initial distribution p(z_0) where an episode begins

Source: Hafner et al. 2019 (PlaNet) for the model, 2021 (DreamerV2) for categorical codes and the balanced KL; Saxena et al. 2021
(Clockwork VAE), section 3, for levels that tick at their own pace (here the slow one is deterministic).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn

from worldmodel.config import Frozen, Part
from worldmodel.data import Loss, Sampling, State, Trace
from worldmodel.distributions import CategoricalLatentConfig, ConditionalDistribution, Inputs, Posterior, Source
from worldmodel.networks import MLP, BlockGRU, StraightMLP, linear, offset_linear
from worldmodel.registry import build, register


class RSSMConfig(Frozen):
    """Sizes, the kind of code, and what the posterior may look at."""

    kind: Literal["rssm"] = "rssm"
    deter: int = Field(128, ge=1, description="size of the deterministic carry h")
    units: int = Field(128, ge=1, description="width of the layers around it")
    blocks: int = Field(1, ge=1, description="blocks of the recurrent weights; 1: dense")
    latent: Part["latent"] = Field(CategoricalLatentConfig(), description="the kind of code z")
    posterior: Literal["filtering", "observation"] = Field("filtering", description="q(z | h, x), or q(z | x) alone")
    posterior_layers: int = Field(1, ge=1, description="hidden layers of an observation-only posterior")
    slow: int = Field(0, ge=0, description="size of a second carry that changes every few steps only; 0: none")
    slow_every: int = Field(4, ge=1, description="steps between its ticks, counted from an episode's first")
    free_nats: float = Field(0.1, ge=0, description="rate in nats per step below which the KL is not pushed further down")


class SlowLevel(nn.Module):
    """A carry s that ticks every k-th step, driven by the fast level's carry and code, and heard by it at every step."""

    def __init__(self, size: int, every: int, deter: int, code: int, units: int):
        super().__init__()
        self.size, self.every = size, every
        self.below = offset_linear(deter + code, units)
        self.gru = BlockGRU(units, size)
        self.heard = linear(size, units, bias=False)

    def forward(
        self, s: Float[Tensor, "N S"], clock: Float[Tensor, "N 1"], h: Float[Tensor, "N D"], z: Float[Tensor, "N Z"]
    ) -> tuple[Float[Tensor, "N S"], Float[Tensor, "N 1"]]:
        """(the next s, the next clock): the clock says for how many steps s has stood; it ticks at 0."""
        ticks = clock < 1
        moved = self.gru(self.gru.inputs(nn.functional.silu(self.below(torch.cat([h, z], -1)))), s)
        return torch.where(ticks, moved, s), torch.where(clock + 1 < self.every, clock + 1, 0.0)


@register("dynamics", "rssm", RSSMConfig)
class RSSM(nn.Module):
    """Dynamics over [B, T]; owns its posterior, its transition and initial distributions, their rates and free nats."""

    def __init__(self, config: RSSMConfig, inputs: Inputs, action_dim: int, transition: Frozen, initial: Frozen):
        super().__init__()
        self.config, embed_dim = config, inputs.size
        self.latent = build("latent", config.latent)
        units, deter, size = config.units, config.deter, self.latent.size
        self.feature_dim = deter + config.slow + size
        self.action_in = linear(action_dim, units, bias=False)
        self.code_in = offset_linear(size, units)
        straight = self.latent.metric
        self.bend = nn.SiLU() if straight else nn.Sequential(nn.LayerNorm(units), nn.SiLU())
        self.gru = BlockGRU(units, deter, config.blocks)
        self.slow = SlowLevel(config.slow, config.slow_every, deter, size, units) if config.slow else None
        self.filtering = config.posterior == "filtering"
        if self.filtering:
            self.embed_in = linear(embed_dim, units, bias=False)
            self.carry_in = offset_linear(deter, units)
            norm = [] if straight else [nn.LayerNorm(units)]
            self.posterior_out = nn.Sequential(*norm, nn.SiLU(), linear(units, self.latent.parameters))
            self.embed_out = linear(embed_dim, self.latent.parameters, bias=False) if straight else None
        else:
            net = StraightMLP if straight else MLP
            self.posterior_net = net(embed_dim, units, config.posterior_layers, self.latent.parameters)
        self.source = Source(inputs, deter if self.filtering else 0, self.posterior)
        self.transition: ConditionalDistribution = build("distribution", transition, self.latent.family, deter, self.source)
        self.initial_law: ConditionalDistribution = build("distribution", initial, self.latent.family, 0, self.source)

    def initial(self, batch_size: int) -> State:
        """The state before the first observation: zeros."""
        sizes = {"h": self.config.deter, **({"slow": self.config.slow, "clock": 1} if self.slow else {}), "z": self.latent.size}
        return State({name: self.code_in.weight.new_zeros(batch_size, size) for name, size in sizes.items()})

    def feature(self, state: State) -> Float[Tensor, "*N F"]:
        return torch.cat([state[name] for name in ("h", "slow", "z") if name in state], -1)

    def code(self, feature: Float[Tensor, "*N F"]) -> Float[Tensor, "*N Z"]:
        """The code within a feature."""
        return feature[..., -self.latent.size :]

    def begin(self, batch_size: int, sampling: Sampling) -> State:
        """A state from nothing: an episode's first carry, and a code from the initial distribution."""
        start = self.initial(batch_size)
        carry = self._move(start, self.action_in(start["h"].new_zeros(batch_size, self.action_in.in_features)))
        return State({**carry, "z": self.initial_law.sample(None, batch_size, sampling)[:, 0]})

    def posterior(self, embed: Float[Tensor, "*#N E"], h: Float[Tensor, "*#N D"]) -> Posterior:
        """The belief about z from an embedding; `h` is not looked at by an observation-only posterior. Batches may broadcast."""
        if not self.filtering:
            return self.latent.belief(self.posterior_net(embed))
        raw = self.posterior_out(self.embed_in(embed) + self.carry_in(h))
        return self.latent.belief(raw if self.embed_out is None else raw + self.embed_out(embed))

    def imagine(self, state: State, action: Float[Tensor, "N A"], sampling: Sampling) -> State:
        """One step without looking."""
        carry = self._move(state, self.action_in(action))
        return State({**carry, "z": self.transition.sample(carry["h"], 1, sampling)[0]})

    def look(self, state: State, embed: Float[Tensor, "N E"], sampling: Sampling) -> State:
        """The state with its code replaced by what an observation of the same moment says."""
        belief = self.posterior(embed, state["h"])
        return State({**state, "z": self.latent.draw(belief, sampling, embed.shape[:-1], embed.device)})

    def observe(
        self,
        state: State,
        embed: Float[Tensor, "B T E"],
        prev_action: Float[Tensor, "B T A"],
        is_first: Bool[Tensor, "B T"],
        sampling: Sampling,
        rows: Int[Tensor, "B T"] | None = None,
    ) -> tuple[State, Trace]:
        """The belief after each observation; `is_first` forgets the state. The state returned is the last one."""
        shape = is_first.shape
        actions = self.action_in(prev_action)
        noise = None
        if not sampling.mode:
            noise = sampling.noise if sampling.noise is not None else self.latent.noise(shape, sampling.generator, embed.device)
        scan = self._filter if self.filtering else self._unroll
        belief, states = scan(state, embed, actions, is_first, noise, sampling.temperature)
        last, h, z = states.map(lambda x: x[:, -1]), states["h"], states["z"]
        rate, losses = self._losses(belief, z, h, is_first, sampling, rows)
        predict = partial(self.transition.loss, context=h, sampling=sampling, rows=rows)
        return last, Trace(embed, belief, z, h, self.feature(states), rate, losses, predict, last, states)

    def _move(self, state: Mapping[str, Tensor], action: Float[Tensor, "N U"]) -> dict[str, Tensor]:
        """The carries one step after a state; `action` as `action_in` gives it."""
        x, slow = self.code_in(state["z"]) + action, {}
        if self.slow is not None:
            slow["slow"], slow["clock"] = self.slow(state["slow"], state["clock"], state["h"], state["z"])
            x = x + self.slow.heard(slow["slow"])
        return {"h": self.gru(self.gru.inputs(self.bend(x)), state["h"]), **slow}

    def _filter(self, state, embed, actions, is_first, noise, temperature) -> tuple[Posterior, State]:
        """The posterior sees the carry, so that each step waits for the one before. The belief and the states [B, T, ...]."""
        embeds = self.embed_in(embed)
        straight = None if self.embed_out is None else self.embed_out(embed)
        keep = (~is_first).to(embeds).unsqueeze(-1)
        resets = is_first.any(0).tolist()
        steps, parameters = [], []
        for t in range(is_first.shape[1]):
            if resets[t]:
                state = {name: x * keep[:, t] for name, x in state.items()}
            carry = self._move(state, actions[:, t])
            raw = self.posterior_out(embeds[:, t] + self.carry_in(carry["h"]))
            raw = raw if straight is None else raw + straight[:, t]
            belief = self.latent.belief(raw)
            state = {**carry, "z": belief.mode if noise is None else belief.sample(noise[:, t], temperature)}
            steps.append(state)
            parameters.append(raw)
        return self.latent.belief(torch.stack(parameters, 1)), _stack(steps)

    def _unroll(self, state, embed, actions, is_first, noise, temperature) -> tuple[Posterior, State]:
        """The posterior needs no carry, so that all codes are known at once and only the recurrence is sequential."""
        belief = self.latent.belief(self.posterior_net(embed))
        z = belief.mode if noise is None else belief.sample(noise, temperature)
        keep = (~is_first).to(z).unsqueeze(-1)
        resets = is_first.any(0).tolist()
        previous = torch.cat([state["z"].unsqueeze(1), z[:, :-1]], 1) * keep
        inputs = None if self.slow else self.gru.inputs(self.bend(self.code_in(previous) + actions))
        carry, steps = {name: x for name, x in state.items() if name != "z"}, []
        for t in range(is_first.shape[1]):
            if resets[t]:
                carry = {name: x * keep[:, t] for name, x in carry.items()}
            if inputs is None:
                carry = self._move({**carry, "z": previous[:, t]}, actions[:, t])
            else:
                carry = {"h": self.gru(inputs[:, t], carry["h"])}
            steps.append(carry)
        return belief, State({**_stack(steps), "z": z})

    def _losses(
        self,
        belief: Posterior,
        z: Float[Tensor, "B T Z"],
        h: Float[Tensor, "B T D"],
        is_first: Bool[Tensor, "B T"],
        sampling: Sampling,
        rows: Int[Tensor, "B T"] | None,
    ) -> tuple[Float[Tensor, "B T"], dict[str, Loss]]:
        """(rate, losses): against the transition, and against the initial law where an episode begins."""
        sampling, begins = replace(sampling, noise=None), bool(is_first.any())
        first = {"sampling": sampling, "rows": None if rows is None else rows[is_first]}
        losses = self._own("initial", z[is_first], None, **first) if begins else {}
        if self.latent.certain:
            return torch.full_like(z[..., 0], torch.nan), losses
        dyn, rep = self.transition.rates(belief, z, h, sampling=sampling, rows=rows)
        if begins:
            own, other = self.initial_law.rates(belief.index(is_first), z[is_first], None, **first)
            dyn, rep = dyn.masked_scatter(is_first, own), rep.masked_scatter(is_first, other)
        later = ~is_first
        losses |= self._own("transition", z[later], h[later], sampling=sampling, rows=None if rows is None else rows[later])
        return dyn.detach(), {"dyn": Loss(self._free(dyn)), "rep": Loss(self._free(rep)), **losses}

    def _own(self, slot: str, z: Float[Tensor, "N Z"], context: Float[Tensor, "N D"] | None, **options) -> dict[str, Loss]:
        """What a law without an exact density, or of codes without a rate, learns from; nothing of it reaches the codes."""
        law = self.transition if slot == "transition" else self.initial_law
        if (law.density == "exact" and not self.latent.certain) or not len(z):
            return {}
        return {f"fit/{slot}/{name}": term for name, term in law.loss(z.detach(), context, **options).items()}

    def _free(self, rate: Tensor) -> Tensor:
        """Free nats: closed forms per row; a sampled rate on the batch mean, for the mean of a maximum is biased."""
        floor = self.config.free_nats
        if not floor:
            return rate
        if hasattr(self.transition, "given"):
            return rate.clamp_min(floor)
        return rate + (rate.mean().clamp_min(floor) - rate.mean())


def _stack(steps: list[dict[str, Tensor]]) -> State:
    """One state [B, T, ...] of T states [B, ...]."""
    return State({name: torch.stack([step[name] for step in steps], 1) for name in steps[0]})
