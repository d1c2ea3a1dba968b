"""From features back to observations: p(x | feature) for every kind of observation."""

from worldmodel.decoders.diffusion import DiffusionDecoderConfig, LatentDiffusionDecoderConfig
from worldmodel.decoders.standard import DecoderConfig

__all__ = ["DecoderConfig", "DiffusionDecoderConfig", "LatentDiffusionDecoderConfig"]
