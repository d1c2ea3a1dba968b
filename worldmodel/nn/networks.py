"""Perceptrons, convolutional stacks, the block GRU, the two-hot distribution, and the functions that they share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def symlog(x: Tensor) -> Tensor:
    """sign(x) ln(1 + |x|). Source: Hafner et al. 2023 (DreamerV3), eq. 9."""
    return torch.sign(x) * torch.log1p(torch.abs(x))


def symexp(x: Tensor) -> Tensor:
    """Inverse of `symlog`."""
    return torch.sign(x) * torch.expm1(torch.abs(x))


def initialise(module: nn.Module, scale: float = 1.0) -> nn.Module:
    """Truncated-normal fan-in weights (standard deviation scale / sqrt(fan in) after truncation), zero biases; in place."""
    for m in module.modules():
        if isinstance(m, nn.Linear | nn.Conv2d | nn.ConvTranspose2d | BlockLinear):
            fan_in = m.in_features // m.blocks if isinstance(m, BlockLinear) else m.weight[0].numel()
            if isinstance(m, nn.ConvTranspose2d):
                fan_in = m.in_channels * math.prod(m.kernel_size) // math.prod(m.stride)
            std = scale / math.sqrt(fan_in) / 0.8796  # undoes the truncation at two standard deviations
            if scale == 0:
                nn.init.zeros_(m.weight)
            else:
                nn.init.trunc_normal_(m.weight, std=std, a=-2 * std, b=2 * std)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
    return module


def clip_each_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Clips each parameter's own gradient to a norm of at most `max_norm`; returns the norm of all of them together before that.
    Where it is not finite nothing is changed.

    With one factor for all parameters, parts that a stop-gradient separates would shorten each other's steps.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients))
    norm = norms.norm()
    factors = torch.where(norm.isfinite(), (max_norm / norms).clamp(max=1.0), 1.0)
    torch._foreach_mul_(gradients, factors.unbind())
    return norm


def linear(inputs: int, outputs: int, *, bias: bool = True, scale: float = 1.0) -> nn.Linear:
    """An initialised linear layer; with `scale=0` the first output is exactly 0."""
    return initialise(nn.Linear(inputs, outputs, bias=bias), scale)


def offset_linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer with random biases, so that a normalisation after it keeps the length of its input."""
    layer = linear(inputs, outputs)
    nn.init.uniform_(layer.bias, -1.0, 1.0)
    return layer


class MLP(nn.Sequential):
    """`layers` x [linear, layer norm, SiLU] of width `units`; with `outputs`, a linear layer after them.

    The first layer's biases do not start at 0: LayerNorm(W x) is the same for x and 2 x (docs/learning.md). LayerNorm and not
    RMSNorm, for which torch has no fused kernel on CPUs. `norm=False` leaves it out.
    """

    def __init__(self, inputs: int, units: int, layers: int, outputs: int | None = None, *, scale: float = 1.0, norm: bool = True):
        blocks: list[nn.Module] = []
        width = inputs
        for _ in range(layers):
            blocks.append(offset_linear(width, units) if not blocks else linear(width, units))
            blocks += [nn.LayerNorm(units), nn.SiLU()] if norm else [nn.SiLU()]
            width = units
        if outputs is not None:
            blocks.append(linear(width, outputs, scale=scale))
        super().__init__(*blocks)
        self.out_features = width if outputs is None else outputs


class SkipMLP(nn.Module):
    """y = W x + MLP(x), without normalisation: a normalised perceptron saturates outside of its training data."""

    def __init__(self, inputs: int, units: int, layers: int, outputs: int):
        super().__init__()
        self.bent = MLP(inputs, units, layers, outputs, norm=False)
        self.straight = linear(inputs, outputs, bias=False)
        self.out_features = outputs

    def forward(self, x: Float[Tensor, "*N I"]) -> Float[Tensor, "*N O"]:
        return self.straight(x) + self.bent(x)


class DenoisingMLP(nn.Module):
    """F(x, level, context): the network of a denoiser of vectors. Its first output is exactly 0.

    The level scales and shifts each hidden layer (Perez et al. 2018, FiLM), and gates a linear path from x and context to the
    output, as in `SkipMLP`.
    """

    FREQUENCIES = 4

    def __init__(self, size: int, context_dim: int, units: int, layers: int):
        super().__init__()
        self.layers = nn.ModuleList(
            offset_linear(size + context_dim, units) if layer == 0 else linear(units, units) for layer in range(layers)
        )
        self.films = nn.ModuleList(linear(1 + 2 * self.FREQUENCIES, 2 * units, scale=0.1) for _ in range(layers))
        self.straight = linear(size + context_dim, size, bias=False, scale=0)
        self.gate = linear(1 + 2 * self.FREQUENCIES, size)
        self.out = linear(units, size, scale=0)

    def forward(self, x: Float[Tensor, "N D"], level: Float[Tensor, " N"], context: Tensor | None) -> Float[Tensor, "N D"]:
        level = fourier_features(level, self.FREQUENCIES)
        x = hidden = x if context is None else torch.cat([x, context], -1)
        for layer, film in zip(self.layers, self.films, strict=True):
            scale, shift = film(level).chunk(2, -1)
            hidden = F.silu(torch.addcmul(shift, layer(hidden), 1 + scale))
        return self.out(hidden) + (1 + self.gate(level)) * self.straight(x)


def fourier_features(level: Float[Tensor, " N"], count: int) -> Float[Tensor, "N W"]:
    """[level, sin(k pi level), cos(k pi level)] for k = 1 .. `count`; W = 1 + 2 count."""
    turns = level.unsqueeze(-1) * torch.arange(1, count + 1, device=level.device) * math.pi
    return torch.cat([level.unsqueeze(-1), turns.sin(), turns.cos()], -1)


class EnsembleLinear(nn.Module):
    """K linear layers side by side: [K, N, I] -> [K, N, O]."""

    def __init__(self, members: int, inputs: int, outputs: int, *, offset: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(members, inputs, outputs) / math.sqrt(inputs))
        self.bias = nn.Parameter(torch.zeros(members, 1, outputs))
        if offset:  # as `offset_linear`
            nn.init.uniform_(self.bias, -1.0, 1.0)

    def forward(self, x: Float[Tensor, "K N I"]) -> Float[Tensor, "K N O"]:
        return torch.baddbmm(self.bias, x, self.weight)


class BlockLinear(nn.Module):
    """A linear layer whose weight matrix is block-diagonal.

    Source: Hafner et al. 2025 (Nature version of DreamerV3), block-diagonal recurrent weights.
    """

    def __init__(self, inputs: int, outputs: int, blocks: int, *, bias: bool = True):
        super().__init__()
        if inputs % blocks or outputs % blocks:
            raise ValueError(f"BlockLinear: {inputs} inputs and {outputs} outputs must both divide by {blocks} blocks.")
        self.in_features, self.out_features, self.blocks = inputs, outputs, blocks
        self.weight = nn.Parameter(torch.empty(blocks, inputs // blocks, outputs // blocks))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        initialise(self)

    def forward(self, x: Float[Tensor, "N I"]) -> Float[Tensor, "N O"]:
        grouped = x.view(x.shape[0], self.blocks, -1).transpose(0, 1)  # [G, N, I/G]
        y = torch.bmm(grouped, self.weight).transpose(0, 1).reshape(x.shape[0], self.out_features)
        return y if self.bias is None else y + self.bias


class BlockGRU(nn.Module):
    """A GRU cell with layer-normalised gates and block-diagonal recurrent weights.

        r, c, u = LayerNorm(W x + U h),  U block-diagonal
        h' = sigmoid(u - 1) * tanh(sigmoid(r) * c) + (1 - sigmoid(u - 1)) * h

    W x has no recurrence: `inputs` computes it for all time steps at once where x is known.
    Source: Hafner et al. 2020, 2025 (DreamerV2, DreamerV3).
    """

    def __init__(self, inputs: int, units: int, blocks: int = 1):
        super().__init__()
        self.units = units
        self.inputs = linear(inputs, 3 * units, bias=False)
        self.recurrent = linear(units, 3 * units, bias=False) if blocks == 1 else BlockLinear(units, 3 * units, blocks, bias=False)
        self.norm = nn.LayerNorm(3 * units)
        self.blocks = blocks

    def forward(self, projected: Float[Tensor, "N G"], h: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        """The next h from `self.inputs(x)` and the last h."""
        recurrent = self.recurrent(h)
        if self.blocks > 1:  # each block emits its own r, c, u: bring equal gates together
            recurrent = recurrent.view(-1, self.blocks, 3, self.units // self.blocks).transpose(1, 2).reshape(-1, 3 * self.units)
        reset, candidate, update = self.norm((projected + recurrent).to(h.dtype)).chunk(3, -1)
        candidate = torch.tanh(torch.sigmoid(reset) * candidate)
        return torch.lerp(h, candidate, torch.sigmoid(update - 1))


class ParallelGRU(nn.Module):
    """K GRU cells side by side, each with weights and a normalisation of its own: [K, N, I] -> [K, N, D]; else as `BlockGRU`."""

    def __init__(self, count: int, inputs: int, units: int):
        super().__init__()
        self.inputs = EnsembleLinear(count, inputs, 3 * units)
        self.recurrent = nn.Parameter(torch.randn(count, units, 3 * units) / math.sqrt(units))
        self.gain = nn.Parameter(torch.ones(count, 1, 3 * units))
        self.shift = nn.Parameter(torch.zeros(count, 1, 3 * units))

    def forward(self, projected: Float[Tensor, "K N G"], h: Float[Tensor, "K N D"]) -> Float[Tensor, "K N D"]:
        """The next h from `self.inputs(x)` and the last h."""
        gates = F.layer_norm(torch.baddbmm(projected, h, self.recurrent), self.gain.shape[-1:]).to(h.dtype)
        reset, candidate, update = torch.addcmul(self.shift, gates, self.gain).chunk(3, -1)
        candidate = torch.tanh(torch.sigmoid(reset) * candidate)
        return torch.lerp(h, candidate, torch.sigmoid(update - 1))


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of an image, at each pixel; cheap where the memory format is channels_last."""

    def forward(self, x: Float[Tensor, "N C H W"]) -> Float[Tensor, "N C H W"]:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def halved_sizes(size: tuple[int, int], min_side: int = 4) -> list[tuple[int, int]]:
    """Image sizes before and after each 4x4 convolution of stride 2, while the shorter side is at least `min_side`."""
    sizes = [size]
    while min(sizes[-1]) // 2 >= min_side:
        sizes.append((sizes[-1][0] // 2, sizes[-1][1] // 2))
    if len(sizes) == 1:
        raise ValueError(
            f"An image of {size[0]}x{size[1]} pixels is too small: a convolution needs at least 8x8. Declare "
            "env.layout=vector, or env.categories where its numbers are kinds of things."
        )
    return sizes


CHUNK = 128
"""Images in one call of a convolution on a CPU: activations then fit into caches and below the allocator's threshold."""


def in_chunks(function: Callable[[Tensor], Tensor], x: Tensor, *others: Tensor | None) -> Tensor:
    """`function` of the rows of some tensors: on a CPU in chunks, elsewhere at once."""
    if x.device.type != "cpu" or len(x) <= CHUNK:
        return function(x, *others)
    parts = [[None] * -(-len(x) // CHUNK) if y is None else y.split(CHUNK) for y in (x, *others)]
    return torch.cat([function(*part) for part in zip(*parts, strict=True)])


class ConvEncoder(nn.Module):
    """4x4 convolutions of stride 2, channels `depth` x 1, 2, 4, 8, ...; flattened."""

    def __init__(self, shape: tuple[int, int, int], depth: int):
        super().__init__()
        channels, height, width = shape
        self.sizes = halved_sizes((height, width))
        layers: list[nn.Module] = []
        for stage in range(len(self.sizes) - 1):
            out = depth * 2 ** min(stage, 3)
            layers += [nn.Conv2d(channels, out, 4, 2, 1), ChannelNorm(out), nn.SiLU()]
            channels = out
        self.layers = initialise(nn.Sequential(*layers)).to(memory_format=torch.channels_last)
        nn.init.uniform_(self.layers[0].bias, -1.0, 1.0)  # as in MLP: else the normalisation removes the brightness
        self.out_features = channels * math.prod(self.sizes[-1])

    def forward(self, image: Float[Tensor, "N C H W"]) -> Float[Tensor, "N E"]:
        return in_chunks(self._encode, image)

    def _encode(self, image: Tensor) -> Tensor:
        return self.layers((image - 0.5).contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1).flatten(1)


class ConvDecoder(nn.Module):
    """`ConvEncoder` mirrored: a linear layer, then 4x4 transposed convolutions of stride 2; output around 0.5."""

    def __init__(self, features: int, shape: tuple[int, int, int], depth: int):
        super().__init__()
        channels, height, width = shape
        self.sizes = halved_sizes((height, width))[::-1]
        stages = len(self.sizes) - 1
        widths = [depth * 2 ** min(stage, 3) for stage in range(stages)][::-1]
        self.top = (widths[0], *self.sizes[0])
        self.project = linear(features, math.prod(self.top))
        layers: list[nn.Module] = [ChannelNorm(widths[0]), nn.SiLU()]
        for stage in range(stages):
            pad = tuple(big - 2 * small for small, big in zip(self.sizes[stage], self.sizes[stage + 1], strict=True))
            last = stage == stages - 1
            out = channels if last else widths[stage + 1]
            layers.append(nn.ConvTranspose2d(widths[stage], out, 4, 2, 1, output_padding=pad, bias=last))
            if not last:
                layers += [ChannelNorm(out), nn.SiLU()]
        self.layers = initialise(nn.Sequential(*layers)).to(memory_format=torch.channels_last)

    def forward(self, feature: Float[Tensor, "N F"]) -> Float[Tensor, "N C H W"]:
        return in_chunks(self._decode, feature)

    def _decode(self, feature: Tensor) -> Tensor:
        channels, height, width = self.top
        top = self.project(feature).view(-1, height, width, channels).permute(0, 3, 1, 2)
        return self.layers(top) + 0.5


class TwoHot(nn.Module):
    """A real number as a categorical over `bins` values, evenly spaced in symlog space from -limit to limit.

    Targets beyond go to the end bins. The mean is summed in symmetric pairs, so that zero logits give exactly 0.
    Source: Hafner et al. 2023 (DreamerV3), eq. 10, and the authors' code for the pairs.
    """

    def __init__(self, bins: int, limit: float):
        super().__init__()
        if bins % 2 == 0 or bins < 3:
            raise ValueError(f"TwoHot: bins must be odd and at least 3, not {bins}: the middle bin stands for 0.")
        half = symexp(torch.linspace(-limit, 0, bins // 2 + 1))
        self.register_buffer("values", torch.cat([half, -half[:-1].flip(0)]), persistent=False)
        self.bins = bins

    def mean(self, logits: Float[Tensor, "*N K"]) -> Float[Tensor, "*N"]:
        p = torch.softmax(logits.float(), -1)
        half = self.bins // 2
        return ((p[..., half + 1 :] - p[..., :half].flip(-1)) * self.values[half + 1 :]).sum(-1)

    def cross_entropy(self, log_probs: Float[Tensor, "*N K"], target: Float[Tensor, "*N"]) -> Float[Tensor, "*N"]:
        """In nats, of the target split between its two neighbouring bins."""
        target = target.detach().clamp(self.values[0], self.values[-1]).contiguous()
        above = torch.searchsorted(self.values, target).clamp(1, self.bins - 1)
        low, high = self.values[above - 1], self.values[above]
        share = (target - low) / (high - low)
        near = log_probs.gather(-1, torch.stack([above - 1, above], -1))
        return -torch.lerp(near[..., 0], near[..., 1], share)

    def loss(self, logits: Float[Tensor, "*N K"], target: Float[Tensor, "*N"]) -> Float[Tensor, "*N"]:
        """`cross_entropy` from logits."""
        return self.cross_entropy(torch.log_softmax(logits.float(), -1), target)


def flatten(x: Tensor) -> Tensor:
    """[B, T, ...] -> [B*T, ...]."""
    return x.flatten(0, 1)


def negative_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """-ln N(x; mean, exp(log_std)^2) of each element, normalised, in nats."""
    return 0.5 * ((x - mean) * torch.exp(-log_std)).square() + log_std + 0.5 * math.log(2 * math.pi)


@cache
def shortest_pattern(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The beginning of `sizes` that, repeated, is all of them: (11, 6, 3) of a grid of cells with three categories each."""
    count = len(sizes)
    return next(sizes[:n] for n in range(1, count + 1) if count % n == 0 and sizes[:n] * (count // n) == sizes)


def by_group(function: Callable[..., Tensor], sizes: tuple[int, ...], *columns: Tensor) -> Tensor:
    """`function` of each group of columns [..., sum(sizes)], its results [..., R] side by side.

    It is called with all repetitions of a group [..., K, size] at once: a grid has hundreds of groups.
    """
    pattern = shortest_pattern(sizes)
    parts = [x.unflatten(-1, (len(sizes) // len(pattern), sum(pattern))).split(pattern, -1) for x in columns]
    return torch.cat([function(*group) for group in zip(*parts, strict=True)], -1).flatten(-2)


def one_hot_sample(probs: Tensor, sizes: tuple[int, ...], draw: Tensor | None) -> Tensor:
    """One-hot vectors side by side: the most likely of each group or, given uniform numbers, a draw (the Gumbel-max trick)."""
    scores = probs.log() if draw is None else probs.log() - (-draw.clamp(1e-9, 1 - 1e-7).log()).log()
    return by_group(lambda part: torch.zeros_like(part).scatter(-1, part.argmax(-1, keepdim=True), 1.0), sizes, scores)
