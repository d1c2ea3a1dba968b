"""What all dynamics share: a latent z beside a recurrent state h, and the KL between posterior and prior that they learn from.

h_t = f(h_{t-1}, z_{t-1}, a_{t-1}),  f(0, 0, 0) where an episode begins
posterior   q(z_t | x_t): a plain VAE encoder, unless a subclass says otherwise
prior       the transition p(z_t | h_t), or the initial distribution p(z_0) where an episode begins
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn

from worldmodel.config import Frozen, Part
from worldmodel.data import Batch, Loss, Sampling, State, Trace
from worldmodel.distributions import (
    CategoricalLatentConfig,
    ConditionalDistribution,
    EncoderInterface,
    Latent,
    Posterior,
    PosteriorSource,
)
from worldmodel.nn.networks import MLP, SkipMLP, linear, offset_linear
from worldmodel.registry import build

RecurrentState = dict[str, Tensor]
"""What goes from step to step beside the latent: named tensors, batch first, with "h" among them."""


class DynamicsConfig(Frozen):
    """Sizes, and the kind of latent."""

    kind: str
    deter: int = Field(128, ge=1, description="size of the recurrent state h")
    units: int = Field(128, ge=1, description="width of the layers around it")
    latent: Annotated[Any, Part("latent")] = Field(CategoricalLatentConfig(), description="the kind of latent z")
    posterior: Literal["observation"] = Field("observation", description="q(z | x): the posterior does not depend on h")
    posterior_layers: int = Field(1, ge=1, description="hidden layers of an observation-only posterior")
    free_nats: float = Field(0.1, ge=0, description="KL in nats per step below which it is not pushed further down")


class Dynamics(nn.Module, ABC):
    """Dynamics over [B, T]; owns the posterior, the transition and the initial distribution.

    A subclass says how h moves, by `advance` and `unroll`, which must agree. Both read latent and action as `combine` adds them
    up, in a width `combined_dim` that the subclass chooses.
    """

    stop_gradient: ClassVar[bool] = False
    """Whether no gradient flows from h into the latents that it reads."""

    def __init__(self, config: Frozen, encoder: EncoderInterface, action_dim: int, transition: Frozen, initial: Frozen):
        super().__init__()
        self.config, self.action_dim = config, action_dim
        self.latent = self._make_latent(encoder)
        self.feature_dim = self.h_dim + self.latent.size
        self._make_inputs(action_dim)
        self._make_recurrence()
        posterior_h_dim = self._make_posterior(encoder.size)
        self.source = PosteriorSource(encoder, posterior_h_dim, self.posterior)
        self.transition = self._make_prior(transition, self.h_dim)
        self.initial_prior = self._make_prior(initial, 0)

    # What a subclass defines ---------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def combined_dim(self) -> int:
        """X: the width in which latent and action are added up."""

    @abstractmethod
    def _make_recurrence(self) -> None:
        """Makes the modules that move h."""

    @abstractmethod
    def zero_recurrent(self, batch_size: int) -> RecurrentState:
        """Zeros: the state before an episode."""

    @abstractmethod
    def advance(self, recurrent: RecurrentState, combined: Float[Tensor, "N X"]) -> RecurrentState:
        """The recurrent state [N, ...] one step on."""

    @abstractmethod
    def unroll(
        self,
        recurrent: RecurrentState,
        combined: Float[Tensor, "B T X"],
        is_first: Bool[Tensor, "B T"],
        generator: torch.Generator | None,
    ) -> RecurrentState:
        """The recurrent state after each of T steps, [B, T, ...]; `is_first` resets it. `generator` is that of dropout."""

    @abstractmethod
    def compile_step(self) -> None:
        """Compiles what is called at each step."""

    def _make_latent(self, encoder: EncoderInterface) -> Latent:
        """The kind of latent, and its size."""
        return build("latent", self.config.latent)

    @property
    def h_dim(self) -> int:
        """D: numbers in h."""
        return self.config.deter

    def _make_inputs(self, action_dim: int) -> None:
        """Makes what `combine` needs."""
        self.action_in = linear(action_dim, self.combined_dim, bias=False)
        self.z_in = offset_linear(self.latent.size, self.combined_dim)

    def _make_prior(self, config: Frozen, context_dim: int) -> ConditionalDistribution:
        """The distribution of a slot, given h or, with `context_dim` 0, nothing."""
        return build("distribution", config, self.latent.family, context_dim, self.source)

    def _make_posterior(self, embed_dim: int) -> int:
        """Makes the posterior's modules; returns how many numbers of h it reads."""
        net = SkipMLP if self.latent.continuous else MLP
        self.posterior_net = net(embed_dim, self.config.units, self.config.posterior_layers, self.latent.parameters)
        return 0

    def posterior(self, embed: Float[Tensor, "*#N E"], h: Float[Tensor, "*#N D"]) -> Posterior:
        """q(z | x) from an embedding of x; `h` is not used."""
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
        """(posterior, latent, recurrent state) at each row; without `noise` the mode. All latents are known before h moves."""
        posterior = self.latent.distribution(self.posterior_net(embed))
        z = posterior.mode if noise is None else posterior.sample(noise, sampling.temperature)
        previous = torch.cat([state["z"].unsqueeze(1), z[:, :-1]], 1) * (~is_first).to(z).unsqueeze(-1)
        combined = self.combine(previous.detach() if self.stop_gradient else previous, prev_action)
        return posterior, z, self.unroll(self._recurrent(state), combined, is_first, sampling.generator)

    # One step, and a sequence --------------------------------------------------------------------------------------------

    def combine(self, z: Float[Tensor, "*N Z"], action: Float[Tensor, "*N A"]) -> Float[Tensor, "*N X"]:
        return self.z_in(z) + self.action_in(action)

    def initial(self, batch_size: int) -> State:
        """The state before the first observation: zeros."""
        recurrent = self.zero_recurrent(batch_size)
        return State({**recurrent, "z": recurrent["h"].new_zeros(batch_size, self.latent.size)})

    def feature(self, state: State) -> Float[Tensor, "*N F"]:
        return torch.cat([state["h"], state["z"]], -1)

    def z_of(self, feature: Float[Tensor, "*N F"]) -> Float[Tensor, "*N Z"]:
        """The latent within a feature."""
        return feature[..., -self.latent.size :]

    def first_recurrent(self, batch_size: int) -> RecurrentState:
        """An episode's first recurrent state, f(0, 0, 0)."""
        start = self.initial(batch_size)
        action = start["z"].new_zeros(batch_size, self.action_dim)
        return self.advance(self._recurrent(start), self.combine(start["z"], action))

    def sample_initial(self, batch_size: int, sampling: Sampling) -> State:
        """An episode's first state, its latent drawn from p(z_0)."""
        return State({**self.first_recurrent(batch_size), "z": self.initial_prior.sample(None, batch_size, sampling)[:, 0]})

    def imagine(self, state: State, action: Float[Tensor, "N A"], sampling: Sampling) -> State:
        """One step without an observation: z from the transition p(z | h)."""
        recurrent = self.advance(self._recurrent(state), self.combine(state["z"], action))
        return State({**recurrent, "z": self.transition.sample(recurrent["h"], 1, sampling)[0]})

    def correct(self, state: State, embed: Float[Tensor, "N E"], sampling: Sampling) -> State:
        """The state with z replaced by a draw of the posterior given an observation of the same moment."""
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
        """(the last state, posterior and state after each observation); `is_first` resets the state. No prior is evaluated."""
        noise = None if sampling.mode else sampling.noise
        if noise is None and not sampling.mode:
            noise = self.latent.noise(is_first.shape, sampling.generator, embed.device)
        posterior, z, recurrent = self.scan(state, embed, prev_action, is_first, noise, sampling)
        states = State({**recurrent, "z": z})
        last = states.index((slice(None), -1))
        return last, Trace(embed, posterior, z, recurrent["h"], self.feature(states), state, last, states)

    @staticmethod
    def _recurrent(state: State) -> RecurrentState:
        return {name: x for name, x in state.items() if name != "z"}

    # Losses --------------------------------------------------------------------------------------------------------------

    def losses(self, trace: Trace, batch: Batch, sampling: Sampling) -> dict[str, Loss]:
        """The KL (rate) of the posterior against the prior at each row, in nats, and the own losses of priors that need one.

            dyn  = KL(sg(q) || p)   trains the prior and h
            rep  = KL(q || sg(p))   trains the posterior
            prior/<slot>/<term>     the own losses, such as denoising, of priors without an exact density

        p is p(z_t | h_t), and p(z_0) where an episode begins; sg stops gradients. dyn and rep have the same value, and no gradient
        below the free nats; the learner weighs them (train.scales: 1 and 0.1). Deterministic latents have neither: their
        transition learns by `predict`. Own losses are computed only while gradients are recorded.
        Source: Hafner et al. 2023 (DreamerV3), eq. 5.
        """
        sampling, own = replace(sampling, noise=None), {}
        dyn, rep = (torch.zeros_like(trace.z[..., 0]) for _ in range(2))
        for slot, prior, where, context in (
            ("transition", self.transition, ~batch.is_first, trace.h),
            ("initial", self.initial_prior, batch.is_first, None),
        ):
            if not where.any():
                continue
            context, rows = (None if x is None else x[where] for x in (context, batch.row))  # `where`: rows of this slot
            posterior, z = trace.posterior.index(where), trace.z[where]
            if not self.latent.deterministic:
                kl = self._kl(posterior, z, prior, context, sampling=sampling, rows=rows)
                dyn, rep = (side.masked_scatter(where, value) for side, value in zip((dyn, rep), kl, strict=True))
            has_own_loss = slot == "initial" if self.latent.deterministic else prior.density != "exact"  # no KL trains it
            if has_own_loss and torch.is_grad_enabled():
                terms = prior.loss(z.detach(), context, sampling=sampling.substream(slot), rows=rows)
                own |= {f"prior/{slot}/{name}": term for name, term in scattered(terms, where).items()}
        return own if self.latent.deterministic else {"dyn": Loss(dyn), "rep": Loss(rep), **own}

    def _kl(
        self,
        posterior: Posterior,
        z: Float[Tensor, "N Z"],
        prior: ConditionalDistribution,
        context: Float[Tensor, "N D"] | None,
        **options: Any,
    ) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
        """(KL(sg(q) || p), KL(q || sg(p))) with free nats: in closed form (`Posterior.kl`), else a mean over antithetic draws."""
        sides = zip(*(prior.rates(posterior, draw, context, **options) for draw in prior.antithetic(posterior, z)), strict=True)
        dyn, rep = (self._free_nats(prior, sum(side) / len(side)) for side in sides)
        return dyn, rep

    def _free_nats(self, prior: ConditionalDistribution, rate: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """The KL, without a gradient where it lies below the free nats.

        It is compared per row where it is a closed form, and as the batch mean where it is estimated, since E[max(estimate, c)] is
        biased upwards. Without free nats nothing is stopped: an estimate may lie below 0.
        """
        if not self.config.free_nats:
            return rate
        compared = rate if prior.closed_form else rate.mean()
        return torch.where(compared < self.config.free_nats, rate.detach(), rate)

    def predict(self, trace: Trace, batch: Batch, z: Float[Tensor, "B T Z"], sampling: Sampling) -> dict[str, Loss]:
        """The transition's own losses at latents z given h, with gradients into both; 0 at rows that open an episode."""
        later, sampling = ~batch.is_first, replace(sampling, noise=None)
        rows = None if batch.row is None else batch.row[later]
        return scattered(self.transition.loss(z[later], trace.h[later], sampling=sampling, rows=rows), later)


def scattered(terms: dict[str, Loss], where: Bool[Tensor, "B T"]) -> dict[str, Loss]:
    """Terms of some rows [N] as terms of all rows [B, T], 0 elsewhere; scalars stay as they are."""

    def wide(value: Tensor) -> Tensor:
        return value.new_zeros(where.shape).masked_scatter(where, value) if value.ndim else value

    return {name: Loss(wide(term.value), term.unit, where if term.value.ndim else None) for name, term in terms.items()}


def stacked(steps: list[RecurrentState]) -> RecurrentState:
    """One recurrent state [B, T, ...] of T of them [B, ...]."""
    return {name: torch.stack([step[name] for step in steps], 1) for name in steps[0]}


class RecurrentDynamics(Dynamics):
    """Dynamics whose h moves by a cell, one step after the other."""

    @abstractmethod
    def project(self, combined: Float[Tensor, "*N X"]) -> Float[Tensor, "*N G"]:
        """The share of the cell that does not depend on the recurrent state, over all steps at once."""

    @abstractmethod
    def cell(self, projected: Float[Tensor, "N G"], recurrent: RecurrentState) -> RecurrentState:
        """The next recurrent state."""

    def advance(self, recurrent: RecurrentState, combined: Float[Tensor, "N X"]) -> RecurrentState:
        return self.cell(self.project(combined), recurrent)

    def unroll(
        self, recurrent: RecurrentState, combined: Tensor, is_first: Tensor, generator: torch.Generator | None
    ) -> RecurrentState:
        projected, keep = self.project(combined), (~is_first).to(combined).unsqueeze(-1)
        resets = is_first.any(0).tolist()
        steps: list[RecurrentState] = []
        for t in range(is_first.shape[1]):
            if resets[t]:
                recurrent = {name: x * keep[:, t] for name, x in recurrent.items()}
            recurrent = self.cell(projected[:, t], recurrent)
            steps.append(recurrent)
        return stacked(steps)
