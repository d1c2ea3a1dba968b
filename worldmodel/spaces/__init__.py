"""Whole observations and actions <-> canonical tensors, both ways; no other module converts them."""

from worldmodel.spaces.specs import ActionSpec, ObsSpec

__all__ = ["ActionSpec", "ObsSpec"]
