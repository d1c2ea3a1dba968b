"""The data types and their shapes: batches, episodes, states, losses, traces and dreams.

B batch, T time, H imagined steps, K samples, A action, E embedding, F feature, Z latent, C context,
N any flattened batch, D event size. The order is always [B, T, ...].

Alignment: row t holds what is known on ARRIVAL at obs[t], then the action taken THERE. Action t moves
state t to state t+1; reward and continue belong to t+1.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Obs = dict[str, Tensor]
"""Canonical observation: key -> float tensor; images CHW in [0, 1], vectors flat, categories one-hot."""


@dataclass(frozen=True)
class Batch:
    """Windows of replayed experience.

    obs          {key: [B T ...]}  raw dtype of the store (uint8 stays uint8); the learner makes it canonical
    action       [B T A]  taken at t; 0 where is_last, and on the newest row of the store (it is not known yet)
    prev_action  [B T A]  taken at t-1; 0 where is_first
    reward       [B T]    received on arriving at t; padding where is_first
    is_first     [B T]    the first row of an episode
    is_last      [B T]    the last row of an episode, by termination or by truncation
    is_terminal  [B T]    the episode terminated here; never set by truncation
    row          [B T]    the row's number in the store, the same in every window that holds it; None where there is no store
    weight       [B T]    importance weight of the row, where windows are not sampled uniformly (see `Replay.sample`); None: all 1
    """

    obs: dict[str, Tensor]
    action: Float[Tensor, "B T A"]
    prev_action: Float[Tensor, "B T A"]
    reward: Float[Tensor, "B T"]
    is_first: Bool[Tensor, "B T"]
    is_last: Bool[Tensor, "B T"]
    is_terminal: Bool[Tensor, "B T"]
    row: Int[Tensor, "B T"] | None = None
    weight: Float[Tensor, "B T"] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T)."""
        return self.reward.shape[0], self.reward.shape[1]

    def map(self, fn: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with `fn` applied to every tensor."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        obs = {k: fn(v) for k, v in values.pop("obs").items()}
        return Batch(obs=obs, **{k: v if v is None else fn(v) for k, v in values.items()})

    def to(self, device: torch.device | str) -> Batch:
        return self.map(lambda x: x.to(device, non_blocking=True))

    def window(self, start: int, stop: int | None = None) -> Batch:
        """Rows start..stop of every sequence."""
        return self.map(lambda x: x[:, start:stop])

    def with_obs(self, obs: Obs) -> Batch:
        return replace(self, obs=obs)


@dataclass(frozen=True)
class Episodes:
    """Whole episodes, one after the other: raw rows, Batch [1, R]."""

    rows: Batch

    @cached_property
    def offsets(self) -> Int[Tensor, " N"]:
        """The first row of each episode."""
        return self.rows.is_first[0].nonzero().squeeze(-1)

    @cached_property
    def lengths(self) -> Int[Tensor, " N"]:
        """Rows of each episode: one more than its steps."""
        return torch.diff(self.offsets, append=self.offsets.new_tensor([self.rows.shape[1]]))

    def windows(self, episode: Int[Tensor, " S"], start: Int[Tensor, " S"], length: int) -> tuple[Batch, Bool[Tensor, "S L"]]:
        """(rows start..start+length of some episodes [S, L], which of them exist); after an end the last row is repeated."""
        steps = start.unsqueeze(-1) + torch.arange(length, device=start.device)
        inside = steps < self.lengths[episode].unsqueeze(-1)
        rows = self.offsets[episode].unsqueeze(-1) + torch.minimum(steps, self.lengths[episode].unsqueeze(-1) - 1)
        return self.rows.map(lambda x: x[0, rows]), inside


@dataclass(frozen=True)
class State(Mapping[str, Tensor]):
    """The state of a dynamics model: named tensors, batch first, never changed in place."""

    values_: dict[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.values_[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_)

    def __len__(self) -> int:
        return len(self.values_)

    @property
    def batch_size(self) -> int:
        return next(iter(self.values_.values())).shape[0]

    def map(self, fn: Callable[[Tensor], Tensor]) -> State:
        return State({k: fn(v) for k, v in self.values_.items()})

    def index(self, rows: Any) -> State:
        """The states of some rows of the batch (slice, integer or boolean index)."""
        return self.map(lambda x: x[rows])

    def reset(self, mask: Bool[Tensor, " B"]) -> State:
        """Zeros where `mask` is true."""
        return self.map(lambda x: torch.where(mask.view(-1, *[1] * (x.ndim - 1)), torch.zeros_like(x), x))

    def detach(self) -> State:
        return self.map(torch.Tensor.detach)

    def to(self, device: torch.device | str) -> State:
        return self.map(lambda x: x.to(device))

    def numpy(self) -> tuple[np.ndarray, ...]:
        """SB3's `state`: a tuple of arrays in the order of the names."""
        return tuple(v.detach().cpu().numpy() for v in self.values_.values())

    def like(self, arrays: tuple[np.ndarray, ...]) -> State:
        """The state that `numpy()` gave, with this state's names and device."""
        pairs = zip(self.values_.items(), arrays, strict=True)
        return State({k: torch.as_tensor(a.copy(), device=v.device) for (k, v), a in pairs})


@dataclass(frozen=True)
class Sampling:
    """Options of every draw.

    generator    the only source of randomness; None: torch's default one
    mode         no noise: the mean or mode
    temperature  scales the deviation of the draw (1: as learned)
    steps        steps of iterative samplers
    noise        standard draws by the caller instead of the generator's, in the distribution's shape; distributions that choose
                 or refine (mixture, vamp, hierarchical, energy) draw from the generator all the same
    update       number of the update that a loss belongs to; None: of none
    uncertainty  whether dreams come with the disagreement of a transition's members, which takes all of them
    """

    generator: torch.Generator | None = None
    mode: bool = False
    temperature: float = 1.0
    steps: int | None = None
    noise: Tensor | None = None
    update: int | None = None
    uncertainty: bool = True

    def substream(self, name: str) -> Sampling:
        """The options for a part from which no gradient reaches others: within an update it draws from a generator of its own, so
        that no other draw depends on whether the part is there."""
        if self.generator is None or self.update is None:
            return self
        key = np.random.SeedSequence((self.generator.initial_seed(), self.update, zlib.crc32(name.encode())))
        own = torch.Generator(self.generator.device).manual_seed(int(key.generate_state(1, np.uint64)[0] >> 1))
        return replace(self, generator=own)


@dataclass(frozen=True)
class Loss:
    """One term: value [B, T] or a scalar (batch statistics), in "nats" or as a "score"; mask [B, T] of the rows that count.

    weight [B, T] is `Batch.weight`, for terms that must be unbiased under uniform sampling. Only nats add up to the ELBO.
    `mean` divides by all rows, masked ones included, so that terms on different rows are comparable per step; and not by the sum
    of the weights, whose mean over batches is 1, so that it has no bias.
    """

    value: Tensor
    unit: Literal["nats", "score"] = "nats"
    mask: Tensor | None = None
    weight: Tensor | None = None

    def mean(self) -> Tensor:
        value = self.value
        for factor in (self.mask, self.weight):
            value = value if factor is None else value * factor
        return value.mean()


@dataclass(frozen=True)
class Trace:
    """Posteriors and states of one pass of the world model over a batch; every tensor [B, T, ...].

    embed      encoder output
    posterior  q(z_t | obs[t], ...)
    z          its draw
    h          the recurrent state, which does not depend on obs[t]
    feature    the input of heads, decoders and agents
    start      State before the first row
    last       State after the last row
    states     State of every row [B, T, ...]
    """

    embed: Tensor
    posterior: object
    z: Tensor
    h: Tensor
    feature: Tensor
    start: State
    last: State
    states: State


@dataclass(frozen=True)
class Dream:
    """An imagined rollout (`WorldModel.imagine`).

    action       [B H A]    action[:, h] is taken at feature[:, h]
    reward       [B H]      on arriving at step h+1
    cont         [B H]      P(no termination) on arriving at step h+1
    uncertainty  [B H]      on arriving at step h+1, zeros where the model has no ensemble
    feature      [B H+1 F]  feature[:, 0] is the start
    last         State after the last step
    legal        [B H A]    which actions its policy chose from at feature[:, h]; None without masks
    """

    action: Float[Tensor, "B H A"]
    reward: Float[Tensor, "B H"]
    cont: Float[Tensor, "B H"]
    uncertainty: Float[Tensor, "B H"]
    feature: Float[Tensor, "B H+1 F"]
    last: State
    legal: Bool[Tensor, "B H A"] | None = None
