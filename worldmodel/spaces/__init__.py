"""Whole observations and actions <-> canonical tensors, both ways; nobody else converts."""

from worldmodel.spaces.specs import ActionSpec, ObsSpec

__all__ = ["ActionSpec", "ObsSpec"]
