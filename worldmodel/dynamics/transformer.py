"""A transformer world model: h attends to the latents and actions of a window instead of summing them up step by step.

    h_t = transformer over the tokens (z_{t-1}, a_{t-1}), (z_{t-2}, a_{t-2}), ...: of this episode, within the window
    posterior   q(z_t | x_t)
    transition  p(z_t | h_t)

No step waits for the one before, so that a window is learned from at once. While acting and imagining, the keys and values of
the last tokens are part of the state: in each layer window - 1 rows of 2 deter numbers, 15 x 256 x 2 layers x 4 bytes = 30 KB a
state at default sizes. The states of a trace are views into one tensor a layer; what is taken from them is copied.

Sources: Chen et al. 2022 (TransDreamer); Zhang et al. 2023 (STORM), section 3.1, whose posterior also sees x alone.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from worldmodel.dynamics.base import Dynamics, DynamicsConfig, RecurrentState
from worldmodel.nn.attention import CausalTransformer
from worldmodel.registry import register


class TransformerConfig(DynamicsConfig):
    """Layers, heads and window; tokens are `deter` wide, the perceptrons 2 `units`."""

    kind: Literal["transformer"] = "transformer"
    layers: int = Field(2, ge=1, description="blocks of attention and perceptron")
    heads: int = Field(4, ge=1, description="heads of attention; they divide `deter`")
    window: int = Field(16, ge=2, description="tokens that each layer sees, the newest among them")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of each block's output that is dropped in training")

    @model_validator(mode="after")
    def _heads_divide(self) -> TransformerConfig:
        if self.deter % self.heads:
            raise ValueError(f"deter={self.deter} must divide by heads={self.heads}: change one of them.")
        return self


@register("dynamics", "transformer", TransformerConfig)
class Transformer(Dynamics):
    """Recurrent state: h, the keys and values of each layer's last window - 1 tokens, and how many of them are of this episode.

    A token is a linear map of latent and action, not normalised, so that the residual stream keeps the size of numbers beyond the
    range of the training data. h is normalised where latents are categorical.
    """

    @property
    def combined_dim(self) -> int:
        return self.config.deter

    def _make_recurrence(self) -> None:
        config = self.config
        options = {name: getattr(config, name) for name in ("layers", "heads", "window", "dropout")}
        self.core = CausalTransformer(config.deter, 2 * config.units, **options)
        self.norm = nn.Identity() if self.latent.continuous else nn.LayerNorm(config.deter)
        self.past = config.window - 1
        self.names = [f"memory{layer}" for layer in range(config.layers)]

    def zero_recurrent(self, batch_size: int) -> RecurrentState:
        zeros = self.z_in.weight.new_zeros
        memory = dict(zip(self.names, self.core.initial(batch_size), strict=True))
        return {"h": zeros(batch_size, self.config.deter), **memory, "age": zeros(batch_size)}

    def advance(self, recurrent: RecurrentState, combined: Float[Tensor, "N X"]) -> RecurrentState:
        goes_on = torch.zeros(len(combined), 1, dtype=torch.bool, device=combined.device)
        return {name: x[:, 0] for name, x in self.unroll(recurrent, combined.unsqueeze(1), goes_on, None).items()}

    def unroll(
        self, recurrent: RecurrentState, combined: Float[Tensor, "B T X"], is_first: Tensor, generator: torch.Generator | None
    ) -> RecurrentState:
        seen = self._seen(recurrent["age"], is_first)
        memory = [recurrent[name] for name in self.names]
        h, memory_all = self.core(combined.to(recurrent["h"]), memory, seen, generator)
        windows = {name: self._windows(x) for name, x in zip(self.names, memory_all, strict=True)}
        return {"h": self.norm(h).to(recurrent["h"]), **windows, "age": (seen + 1).clamp_max(self.past)}

    def compile_step(self) -> None:
        self.core.compile()

    def _seen(self, age: Float[Tensor, " B"], is_first: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        """How many tokens before each one are of its episode, at most window - 1."""
        steps = torch.arange(is_first.shape[1], device=age.device).expand(is_first.shape)
        opened = torch.where(is_first, steps, -1).cummax(1).values
        return torch.where(opened < 0, steps + age.unsqueeze(1), steps - opened).clamp_max(self.past)

    def _windows(self, memory_all: Float[Tensor, "B S V"]) -> Float[Tensor, "B T M V"]:
        """The last M rows after each of the T = S - M new tokens: views, not copies."""
        return memory_all.unfold(1, self.past, 1)[:, 1:].movedim(-1, 2)
