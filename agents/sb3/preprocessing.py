"""What SB3 makes of observations before a policy's networks see them, and the way from there to canonical tensors.

| | one image, stacked three times | a category of 4 | a vector |
|---|---|---|---|
| environment | uint8 [16, 16, 9] | int64 [] | float64 [2, 3] |
| policy (`VecTransposeImage`) | uint8 [9, 16, 16] | | |
| networks (`preprocess_obs`) | float32 [9, 16, 16] in [0, 1] | one-hot float32 [4] | float32 [2, 3] |
| here: canonical, frame by frame | float32 [3, 16, 16] in [0, 1] | one-hot float32 [4] | float32 [6] |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.vec_env import VecTransposeImage
from torch import Tensor

from worldmodel.envs.vectors.plain import COUNT_FROM_0
from worldmodel.errors import ConfigError
from worldmodel.spaces import ObsSpec
from worldmodel.spaces.keys import KeySpec


def transposed_space(space: spaces.Space) -> spaces.Space:
    """An image space with channels first, where SB3's VecTransposeImage changes it; any other space as it is."""
    if not is_image_space(space) or np.argmin(space.shape) == 0:
        return space
    return VecTransposeImage.transpose_space(space)


class PreprocessedObs:
    """How observations of the environment reach the networks of a policy.

    spec              of the environment's own observations
    space             the policy's: that of `spec`, stacked `frames` times, with images as SB3 transposes them
    normalize_images  whether SB3 divides images by 255
    preprocessed      the spec of one preprocessed frame; its canonical form is that of `spec`

    Raises ConfigError for another space.
    """

    def __init__(self, spec: ObsSpec, space: spaces.Space, frames: int, normalize_images: bool):
        self.spec, self.frames = spec, frames
        given = dict(space.spaces) if isinstance(space, spaces.Dict) else {"obs": space}
        if spec.single == isinstance(space, spaces.Dict) or given.keys() != spec.keys.keys():
            raise self._other_space(space)
        keys = {}
        for name, key in spec.keys.items():
            stacked = _stacked_space(key, frames)
            if given[name] != stacked and given[name] != transposed_space(stacked):
                raise self._other_space(space)
            keys[name] = _preprocessed_key(key, given[name], given[name] != stacked, normalize_images)
        self.preprocessed = ObsSpec(keys, spec.single)

    def canonical(self, obs: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Preprocessed observations [N, ...] -> canonical tensors [frames * N, ...], all oldest frames first."""
        named = {"obs": obs} if self.spec.single else obs
        frames = {}
        for name, key in self.preprocessed.keys.items():
            x = named[name]
            if self.frames == 1:
                frames[name] = x.reshape(len(x), *key.raw_shape)
            else:
                frames[name] = torch.cat(x.chunk(self.frames, dim=_stack_axis(key)))
        return self.preprocessed.canonical(frames)

    def newest_raw(self, obs: Any) -> Any:
        """The environments' own newest observations [N, ...] out of the policy's: one frame, images not transposed."""
        named = {"obs": obs} if self.spec.single else obs
        raw = {}
        for name, key in self.preprocessed.keys.items():
            x = np.split(np.asarray(named[name]), self.frames, axis=_stack_axis(key))[-1] if self.frames > 1 else named[name]
            raw[name] = np.moveaxis(x, -3, -1) if key.layout != self.spec.keys[name].layout else np.asarray(x)
        return raw["obs"] if self.spec.single else raw

    def _other_space(self, space: spaces.Space) -> ConfigError:
        hint = "; if a VecFrameStack is around the environments, say frames=N"
        if self.frames > 1:
            hint = f", stacked {self.frames} times"
        return ConfigError(
            f"The policy observes {space}, but the encoder was trained on {self.spec.space}{hint}. Use environments made as in the "
            f"run's training, worldmodel.envs.make_vec(run.config.env), or a run of this environment. {COUNT_FROM_0}"
        )


def _preprocessed_key(key: KeySpec, space: spaces.Space, transposed: bool, normalize_images: bool) -> KeySpec:
    """One key as SB3's preprocess_obs gives it to a features extractor."""
    scaled = normalize_images and is_image_space(space)
    if key.kind == "categorical":  # one-hot already
        return replace(key, kind="binary", raw_shape=key.shape)
    if key.kind == "image":
        layout, shape = ("chw", key.shape) if transposed else (key.layout, key.raw_shape)
        high = np.ones((), np.float32) if scaled else key.high
        return replace(key, layout=layout, raw_shape=shape, raw_dtype=np.dtype(np.float32), high=high)
    if transposed or scaled:
        raise ConfigError(
            f"'{key.name}' is a vector for the world model, but SB3 takes {key.space} for an image, which it transposes and "
            "divides by 255. Train the run with env.layout=hwc (or chw), or reshape the observation with "
            "gymnasium.wrappers.ReshapeObservation."
        )
    return key


def _stack_axis(key: KeySpec) -> int:
    return -3 if key.kind == "image" and key.layout == "chw" else -1


def _stacked_space(key: KeySpec, frames: int) -> spaces.Space:
    """A key's space in VecFrameStack; ConfigError for observations whose frames cannot be separated afterwards."""
    space = key.space
    if frames == 1:
        return space
    if key.low is None or len(key.raw_shape) not in (1, 3) or (key.kind != "image" and len(key.raw_shape) != 1):
        raise ConfigError(f"frames={frames}: '{key.name}' is {space}; only images with channels and flat Boxes are stacked.")
    low, high = (np.repeat(bound, frames, axis=_stack_axis(key)) for bound in (space.low, space.high))
    return spaces.Box(low, high, dtype=space.dtype.type)
