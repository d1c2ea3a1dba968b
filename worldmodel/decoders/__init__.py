"""From features back to observations: p(x | feature) for every kind of observation."""

from worldmodel.decoders.diffusion import (
    DiffusionDecoder,
    DiffusionDecoderConfig,
    LatentDiffusionDecoder,
    LatentDiffusionDecoderConfig,
)
from worldmodel.decoders.standard import Decoder, DecoderConfig

__all__ = [
    "Decoder",
    "DecoderConfig",
    "DiffusionDecoder",
    "DiffusionDecoderConfig",
    "LatentDiffusionDecoder",
    "LatentDiffusionDecoderConfig",
]
