"""A small convolutional network that denoises pictures, at the cost that a CPU can afford for each frame."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from worldmodel.nn.networks import fourier_features, in_chunks, initialise, linear

FREQUENCIES = 8


class Block(nn.Module):
    """x + conv(SiLU(norm(conv(SiLU(norm(x))))), the second norm scaled and shifted by a condition (AdaGN); first output x.

    Source: Dhariwal and Nichol 2021, section 3.1.
    """

    def __init__(self, channels: int, embedding: int):
        super().__init__()
        groups = max(1, channels // 8)
        self.first = nn.Sequential(nn.GroupNorm(groups, channels), nn.SiLU(), initialise(nn.Conv2d(channels, channels, 3, 1, 1)))
        self.norm = nn.GroupNorm(groups, channels)
        self.film = linear(embedding, 2 * channels, scale=0.1)
        self.second = initialise(nn.Conv2d(channels, channels, 3, 1, 1), 0)

    def forward(self, x: Float[Tensor, "N C H W"], embedding: Float[Tensor, "N E"]) -> Float[Tensor, "N C H W"]:
        scale, shift = self.film(embedding).unsqueeze(-1).unsqueeze(-1).chunk(2, 1)
        return x + self.second(F.silu(torch.addcmul(shift, self.norm(self.first(x)), 1 + scale)))


class DenoisingUNet(nn.Module):
    """F(noisy picture, level; other pictures, feature): other pictures are more input channels, the feature scales the norms.

    Pictures are folded into half their side and four times their channels, where 2 `depth` channels cost what `depth` / 2 would
    at full size; then halved and doubled up to twice more, as sizes allow, with skip connections.
    """

    def __init__(self, channels: int, conditioning: int, features: int, size: tuple[int, int], depth: int):
        super().__init__()
        self.size, embedding = size, 4 * depth
        folds = 1 + sum(min(size) >= side for side in (16, 32))
        self.multiple = 2**folds
        widths = [2 * depth, 4 * depth, 4 * depth][:folds]
        self.level_in = linear(1 + 2 * FREQUENCIES, embedding)
        self.feature_in = linear(features, embedding, bias=False) if features else None
        self.enter = nn.Conv2d(4 * (channels + conditioning), widths[0], 3, 1, 1)
        self.narrow = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1) for a, b in pairwise(widths))
        self.widen = nn.ModuleList(nn.Conv2d(b, a, 3, 1, 1) for a, b in pairwise(widths))
        self.down = nn.ModuleList(Block(width, embedding) for width in widths)
        self.up = nn.ModuleList(Block(width, embedding) for width in widths[:-1])
        self.gate = linear(embedding, channels, scale=0)
        self.leave = nn.Sequential(nn.GroupNorm(1, widths[0]), nn.SiLU(), nn.Conv2d(widths[0], 4 * channels, 3, 1, 1))
        for part in (self.enter, self.narrow, self.widen):
            initialise(part)
        initialise(self.leave, 0)
        self.to(memory_format=torch.channels_last)

    def forward(
        self,
        x: Float[Tensor, "N C H W"],
        level: Float[Tensor, " N"],
        conditioning: Tensor | None = None,
        feature: Tensor | None = None,
    ) -> Float[Tensor, "N C H W"]:
        return in_chunks(self._denoise, x, level, conditioning, feature)

    def _denoise(self, x: Tensor, level: Tensor, conditioning: Tensor | None, feature: Tensor | None) -> Tensor:
        embedding = self.level_in(fourier_features(level, FREQUENCIES))
        if self.feature_in is not None:
            embedding = embedding + self.feature_in(feature)
        embedding = F.silu(embedding)
        # Where the picture equals the one beside it, x is all noise: removing it needs an exact copy of x, which norms would blur.
        straight = self.gate(embedding).unsqueeze(-1).unsqueeze(-1) * x
        x = x if conditioning is None else torch.cat([x, conditioning], 1)
        height, width = self.size
        x = F.pad(x, (0, -width % self.multiple, 0, -height % self.multiple), mode="replicate")
        x = self.enter(F.pixel_unshuffle(x, 2).contiguous(memory_format=torch.channels_last))
        skips = []
        for i, block in enumerate(self.down):
            x = block(x if i == 0 else self.narrow[i - 1](x), embedding)
            skips.append(x)
        for i in reversed(range(len(self.up))):
            x = self.up[i](skips[i] + F.interpolate(self.widen[i](x), scale_factor=2, mode="nearest"), embedding)
        return straight + F.pixel_shuffle(self.leave(x), 2)[..., :height, :width]
