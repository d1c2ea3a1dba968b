"""What all dynamics share: a code z beside a deterministic carry h, and the laws that tie the two together.

h_t = f(h_{t-1}, z_{t-1}, a_{t-1}),  where an episode begins f(0, 0, 0)
posterior   q(z_t | x_t): a plain VAE encoder, unless a form says otherwise
transition  p(z_t | h_t), or the initial distribution p(z_0) where an episode begins
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn

from worldmodel.config import Frozen, Part
from worldmodel.data import Batch, Loss, Sampling, State, Trace
from worldmodel.distributions import CategoricalLatentConfig, ConditionalDistribution, EncoderInterface, Posterior, PosteriorSource
from worldmodel.nn.networks import MLP, SkipMLP, linear, offset_linear
from worldmodel.registry import build

RecurrentState = dict[str, Tensor]
"""What is carried from step to step beside the code: named tensors, batch first, with "h" among them."""


class DynamicsConfig(Frozen):
    """What every dynamics is told: sizes, and the kind of code."""

    kind: str
    deter: int = Field(128, ge=1, description="size of the deterministic carry h")
    units: int = Field(128, ge=1, description="width of the layers around it")
    latent: Part["latent"] = Field(CategoricalLatentConfig(), description="the kind of code z")
    posterior: Literal["observation"] = Field("observation", description="q(z | x): codes are known without the carry")
    posterior_layers: int = Field(1, ge=1, description="hidden layers of an observation-only posterior")
    free_nats: float = Field(0.1, ge=0, description="rate in nats per step below which the KL is not pushed further down")


class Dynamics(nn.Module, ABC):
    """Dynamics over [B, T]; owns its posterior, its transition and initial distributions, their rates and free nats.

    A form says how its carry moves, by `advance` and `unroll`, which must agree. Both read codes and actions as `enter` adds
    them up, in a width `entry` that the form chooses.
    """

    stop_gradient: ClassVar[bool] = False
    """Whether the carry learns from codes without shaping them: no gradient goes from it into the codes before."""

    def __init__(self, config: DynamicsConfig, encoder: EncoderInterface, action_dim: int, transition: Frozen, initial: Frozen):
        super().__init__()
        self.config = config
        self.latent = build("latent", config.latent)
        self.feature_dim = config.deter + self.latent.size
        self.action_in = linear(action_dim, self.combined_dim, bias=False)
        self.z_in = offset_linear(self.latent.size, self.combined_dim)
        self._make_recurrence()
        reads = self._make_posterior(encoder.size)
        self.source = PosteriorSource(encoder, reads, self.posterior)
        self.transition: ConditionalDistribution = build("distribution", transition, self.latent.family, config.deter, self.source)
        self.initial_prior: ConditionalDistribution = build("distribution", initial, self.latent.family, 0, self.source)

    # What a form says ----------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def combined_dim(self) -> int:
        """X: the width in which code and action are added up."""

    @abstractmethod
    def _make_recurrence(self) -> None:
        """Makes the modules that move the carry."""

    @abstractmethod
    def zero_recurrent(self, batch_size: int) -> RecurrentState:
        """Zeros: nothing came before."""

    @abstractmethod
    def advance(self, recurrent: RecurrentState, combined: Float[Tensor, "N X"]) -> RecurrentState:
        """The carry [N, ...] one step on."""

    @abstractmethod
    def unroll(
        self,
        recurrent: RecurrentState,
        combined: Float[Tensor, "B T X"],
        is_first: Bool[Tensor, "B T"],
        generator: torch.Generator | None,
    ) -> RecurrentState:
        """The carry after each of T steps, [B, T, ...]; `is_first` forgets what came before. `generator` is that of dropout."""

    @abstractmethod
    def compile_step(self) -> None:
        """Compiles what is called at each step."""

    def _make_posterior(self, embed_dim: int) -> int:
        """Makes the posterior's modules; how many numbers of the carry it reads."""
        net = SkipMLP if self.latent.continuous else MLP
        self.posterior_net = net(embed_dim, self.config.units, self.config.posterior_layers, self.latent.parameters)
        return 0

    def posterior(self, embed: Float[Tensor, "*#N E"], h: Float[Tensor, "*#N D"]) -> Posterior:
        """The belief about z from an embedding; `h` is not looked at."""
        return self.latent.distribution(self.posterior_net(embed))

    def scan(
        self,
        state: State,
        embed: Float[Tensor, "B T E"],
        prev_action: Float[Tensor, "B T A"],
        is_first: Bool[Tensor, "B T"],
        noise: Tensor | None,
        sampling: Sampling,
    ) -> tuple[Posterior, Float[Tensor, "B T Z"], RecurrentState]:
        """(beliefs, codes, carries) at each row. The posterior needs no carry, so that all codes are known at once."""
        posterior = self.latent.distribution(self.posterior_net(embed))
        z = posterior.mode if noise is None else posterior.sample(noise, sampling.temperature)
        previous = torch.cat([state["z"].unsqueeze(1), z[:, :-1]], 1) * (~is_first).to(z).unsqueeze(-1)
        combined = self.combine(previous.detach() if self.stop_gradient else previous, prev_action)
        return posterior, z, self.unroll(self._recurrent(state), combined, is_first, sampling.generator)

    # What follows --------------------------------------------------------------------------------------------------------

    def combine(self, z: Float[Tensor, "*N Z"], action: Float[Tensor, "*N A"]) -> Float[Tensor, "*N X"]:
        """Code and action as the carry reads them."""
        return self.z_in(z) + self.action_in(action)

    def initial(self, batch_size: int) -> State:
        """The state before the first observation: zeros."""
        return State({**self.zero_recurrent(batch_size), "z": self.z_in.weight.new_zeros(batch_size, self.latent.size)})

    def feature(self, state: State) -> Float[Tensor, "*N F"]:
        return torch.cat([state["h"], state["z"]], -1)

    def z_of(self, feature: Float[Tensor, "*N F"]) -> Float[Tensor, "*N Z"]:
        """The code within a feature."""
        return feature[..., -self.latent.size :]

    def first_recurrent(self, batch_size: int) -> RecurrentState:
        """An episode's first carry, f(0, 0, 0)."""
        start = self.initial(batch_size)
        action = start["z"].new_zeros(batch_size, self.action_in.in_features)
        return self.advance(self._recurrent(start), self.combine(start["z"], action))

    def sample_initial(self, batch_size: int, sampling: Sampling) -> State:
        """A state from nothing: an episode's first carry, and a code from the initial distribution."""
        return State({**self.first_recurrent(batch_size), "z": self.initial_prior.sample(None, batch_size, sampling)[:, 0]})

    def imagine(self, state: State, action: Float[Tensor, "N A"], sampling: Sampling) -> State:
        """One step without looking."""
        recurrent = self.advance(self._recurrent(state), self.combine(state["z"], action))
        return State({**recurrent, "z": self.transition.sample(recurrent["h"], 1, sampling)[0]})

    def correct(self, state: State, embed: Float[Tensor, "N E"], sampling: Sampling) -> State:
        """The state with its code replaced by what an observation of the same moment says."""
        posterior = self.posterior(embed, state["h"])
        return State({**state, "z": self.latent.draw(posterior, sampling, embed.shape[:-1], embed.device)})

    def observe(
        self,
        state: State,
        embed: Float[Tensor, "B T E"],
        prev_action: Float[Tensor, "B T A"],
        is_first: Bool[Tensor, "B T"],
        sampling: Sampling,
    ) -> tuple[State, Trace]:
        """The belief after each observation; `is_first` forgets the state. The state returned is the last one.

        No law is asked for a rate: what acts needs none.
        """
        noise = None
        if not sampling.mode:
            noise = sampling.noise
            noise = self.latent.noise(is_first.shape, sampling.generator, embed.device) if noise is None else noise
        posterior, z, recurrent = self.scan(state, embed, prev_action, is_first, noise, sampling)
        states = State({**recurrent, "z": z})
        last = states.index((slice(None), -1))
        return last, Trace(embed, posterior, z, recurrent["h"], self.feature(states), state, last, states)

    @staticmethod
    def _recurrent(state: State) -> RecurrentState:
        return {name: x for name, x in state.items() if name != "z"}

    # What it learns from -------------------------------------------------------------------------------------------------

    def losses(self, trace: Trace, batch: Batch, sampling: Sampling) -> dict[str, Loss]:
        """The rate of each row against the transition, and where an episode begins against the initial law.

        "dyn" and "rep" are its two sides, of equal value, in nats; points have none. "prior/<slot>/<term>" is what forms without
        an exact density minimise, while gradients are recorded. Each law sees its own rows alone.
        """
        sampling, deterministic, losses = replace(sampling, noise=None), self.latent.deterministic, {}
        posterior, z, is_first = trace.posterior, trace.z, batch.is_first
        dyn, rep = (torch.zeros_like(z[..., 0]) for _ in range(2))
        for slot, prior, where, context in (
            ("transition", self.transition, ~is_first, trace.h),
            ("initial", self.initial_prior, is_first, None),
        ):
            if not where.any():
                continue
            context, options = None if context is None else context[where], {"sampling": sampling}
            options["rows"] = None if batch.row is None else batch.row[where]
            if not deterministic:
                here = posterior.index(where)
                both = [prior.rates(here, z_of, context, **options) for z_of in prior.antithetic(here, z[where])]
                own, other = (sum(side) / len(both) for side in zip(*both, strict=True))
                dyn, rep = (
                    dyn.masked_scatter(where, self._free_nats(prior, own)),
                    rep.masked_scatter(where, self._free_nats(prior, other)),
                )
            # Points have no rate: what the transition learns from is the objective's matter.
            if torch.is_grad_enabled() and (
                (deterministic and slot == "initial") or (not deterministic and prior.density != "exact")
            ):
                options["sampling"] = sampling.substream(slot)
                own = spread(prior.loss(z[where].detach(), context, **options), where)
                losses |= {f"prior/{slot}/{name}": term for name, term in own.items()}
        return losses if deterministic else {"dyn": Loss(dyn), "rep": Loss(rep), **losses}

    def predict(self, trace: Trace, batch: Batch, z: Float[Tensor, "B T Z"], sampling: Sampling) -> dict[str, Loss]:
        """The transition's own losses at codes z given h, with gradients into all of it.

        It never sees rows that open an episode, where nothing was predicted and the loss is 0.
        """
        later, sampling = ~batch.is_first, replace(sampling, noise=None)
        rows = None if batch.row is None else batch.row[later]
        return spread(self.transition.loss(z[later], trace.h[later], sampling=sampling, rows=rows), later)

    def _free_nats(self, prior: ConditionalDistribution, rate: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """Free nats: the rate itself, without a gradient where it lies below them.

        Closed forms are held row by row, a sampled rate on the batch mean, for the mean of a maximum is biased. Where none are
        free nothing is held: a sampled rate is below 0 by its noise alone.
        """
        if not self.config.free_nats:
            return rate
        compared = rate if prior.closed_form else rate.mean()
        return torch.where(compared < self.config.free_nats, rate.detach(), rate)


def spread(terms: dict[str, Loss], where: Bool[Tensor, "B T"]) -> dict[str, Loss]:
    """Terms of some rows [N] as terms of all of them [B, T], 0 elsewhere; a batch's statistic stays what it is."""

    def wide(value: Tensor) -> Tensor:
        return value.new_zeros(where.shape).masked_scatter(where, value) if value.ndim else value

    return {name: Loss(wide(term.value), term.unit, where if term.value.ndim else None) for name, term in terms.items()}


def stacked(steps: list[RecurrentState]) -> RecurrentState:
    """One carry [B, T, ...] of T carries [B, ...]."""
    return {name: torch.stack([step[name] for step in steps], 1) for name in steps[0]}


class RecurrentDynamics(Dynamics):
    """A carry that moves by a cell, one step after the other."""

    @abstractmethod
    def project(self, combined: Float[Tensor, "*N X"]) -> Float[Tensor, "*N G"]:
        """The share of the cell's gates that needs no carry."""

    @abstractmethod
    def cell(self, projected: Float[Tensor, "N G"], recurrent: RecurrentState) -> RecurrentState:
        """The next carry."""

    def advance(self, recurrent: RecurrentState, combined: Float[Tensor, "N X"]) -> RecurrentState:
        return self.cell(self.project(combined), recurrent)

    def unroll(self, recurrent, combined, is_first, generator) -> RecurrentState:
        projected, keep = self.project(combined), (~is_first).to(combined).unsqueeze(-1)
        resets = is_first.any(0).tolist()
        steps: list[RecurrentState] = []
        for t in range(is_first.shape[1]):
            if resets[t]:
                recurrent = {name: x * keep[:, t] for name, x in recurrent.items()}
            recurrent = self.cell(projected[:, t], recurrent)
            steps.append(recurrent)
        return stacked(steps)
