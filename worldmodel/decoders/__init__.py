"""From features back to observations: p(x | feature) for every kind of observation."""

from worldmodel.decoders.standard import Decoder, DecoderConfig

__all__ = ["Decoder", "DecoderConfig"]
