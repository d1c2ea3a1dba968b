"""A causal transformer with a window: the same outputs whether it is run over a sequence or step by step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from worldmodel.nn.networks import linear, offset_linear


class WindowAttention(nn.Module):
    """Multi-head attention of T new tokens to themselves and to the M tokens before them, whose keys and values are `memory`."""

    def __init__(self, width: int, heads: int, scale: float):
        super().__init__()
        if width % heads:
            raise ValueError(f"WindowAttention: a width of {width} must divide by {heads} heads.")
        self.width, self.heads = width, heads
        self.inputs = linear(width, 3 * width, bias=False)
        self.out = linear(width, width, bias=False, scale=scale)

    def forward(
        self, x: Float[Tensor, "B T D"], memory: Float[Tensor, "B M V"], mask: Float[Tensor, "B H T S"]
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B S V"]]:
        """(outputs of the new tokens, keys and values of all S = M + T tokens); V = 2 D."""
        query, new = self.inputs(x).split([self.width, 2 * self.width], -1)
        memory = torch.cat([memory, new], 1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (query, *memory.chunk(2, -1)))  # [B, H, *, D/H]
        y = F.scaled_dot_product_attention(q, k.to(q), v.to(q), attn_mask=mask.to(q))
        return self.out(y.transpose(1, 2).flatten(2)), memory


class GatedMLP(nn.Module):
    """W_o (SiLU(W_g x) * W_x x). Source: Shazeer 2020 (GLU variants), eq. 6: SwiGLU."""

    def __init__(self, width: int, units: int, scale: float):
        super().__init__()
        self.inputs = offset_linear(width, 2 * units)
        self.out = linear(units, width, scale=scale)

    def forward(self, x: Float[Tensor, "*N D"]) -> Float[Tensor, "*N D"]:
        gate, value = self.inputs(x).chunk(2, -1)
        return self.out(F.silu(gate) * value)


class Block(nn.Module):
    """x + attention(LayerNorm(x)), then x + MLP(LayerNorm(x)): pre-norm."""

    def __init__(self, width: int, units: int, heads: int, scale: float, dropout: float):
        super().__init__()
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = WindowAttention(width, heads, scale)
        self.mlp = GatedMLP(width, units, scale)
        self.dropout = dropout

    def forward(
        self, x: Tensor, memory: Tensor, mask: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B S V"]]:
        gathered, memory = self.attention(self.before_attention(x), memory, mask)
        x = x + self._drop(gathered, generator)
        return x + self._drop(self.mlp(self.before_mlp(x)), generator), memory

    def _drop(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        """Dropout by the caller's generator, which torch's own does not take; without one nothing is dropped."""
        if not (self.dropout and self.training and generator is not None):
            return x
        keep = torch.rand(x.shape, generator=generator, device=x.device) >= self.dropout
        return x * keep / (1 - self.dropout)


class CausalTransformer(nn.Module):
    """Blocks in which a token attends to itself and to at most window - 1 tokens before it.

    Positions are relative: a learned bias by head and distance is added to each score, shared by all layers and initialised at
    -distance * 2^(-8 head / heads). So outputs do not depend on where the sequence began, and keys and values can be cached: with
    those of the last M = window - 1 tokens as `memory`, one pass over T tokens equals T passes over one.

    Sources: Vaswani et al. 2017; Press et al. 2022 (ALiBi) for the first biases; Raffel et al. 2020 (T5) for learning them.
    """

    def __init__(self, width: int, units: int, *, layers: int, heads: int, window: int, dropout: float = 0.0):
        super().__init__()
        self.width, self.window = width, window
        scale = (2 * layers) ** -0.5  # the residual stream's variance does not grow with depth
        self.blocks = nn.ModuleList(Block(width, units, heads, scale, dropout) for _ in range(layers))
        slopes = 2.0 ** (-8 * torch.arange(1, heads + 1) / heads)
        self.bias = nn.Parameter(-slopes.unsqueeze(-1) * torch.arange(window))

    def initial(self, batch_size: int) -> list[Float[Tensor, "B M V"]]:
        """The memory of each layer before the first token: zeros, which are masked where `seen` is 0."""
        return [self.bias.new_zeros(batch_size, self.window - 1, 2 * self.width) for _ in self.blocks]

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        memory: list[Tensor],
        seen: Int[Tensor, "B T"] | Float[Tensor, "B T"],
        generator: torch.Generator | None = None,
    ) -> tuple[Float[Tensor, "B T D"], list[Tensor]]:
        """(outputs, keys and values of the memory's tokens and the new ones, [B, M+T, 2 D] for each layer).

        memory     [B, M, 2 D] for each layer: `initial`, or the last M rows of those returned before
        seen       how many tokens before itself each token attends to, 0 where a sequence opens; more than M counts as M
        generator  of dropout, in training; None: no dropout
        """
        mask, memories = self._mask(seen), []
        for block, past in zip(self.blocks, memory, strict=True):
            x, past = block(x, past, mask, generator)
            memories.append(past)
        return x, memories

    def _mask(self, seen: Tensor) -> Float[Tensor, "B H T S"]:
        """Added to the score of each of the S = M + T tokens: its bias, or -infinity where it is masked."""
        steps, past = seen.shape[1], self.window - 1
        position = torch.arange(past + steps, device=seen.device)
        distance = position[past:].unsqueeze(-1) - position
        clipped = distance.clamp(0, past)
        visible = (distance == clipped) & (clipped <= seen.unsqueeze(-1))  # [B, T, S]
        bias = self.bias.index_select(1, clipped.flatten()).unflatten(1, clipped.shape)  # [H, T, S]
        return torch.where(visible.unsqueeze(1), bias, -torch.inf)
