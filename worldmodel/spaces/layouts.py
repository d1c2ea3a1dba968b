"""Which Boxes are images, and which of their sides are the channels."""

from __future__ import annotations

from typing import Literal

from gymnasium.spaces import Box

from worldmodel.errors import UnsupportedSpaceError

Layout = Literal["hwc", "chw", "vector"]

IMAGE_SIDE = 16
"""A 2-D Box with both sides at least this long is a grey image."""
IMAGE_CHANNELS = (1, 3, 4)


def image_layout(name: str, space: Box, layout: Layout | None) -> Literal["hwc", "chw", "hw"] | None:
    """The layout of an image, None for a vector; UnsupportedSpaceError where the shape leaves it open."""
    shape = space.shape
    if layout not in (None, "hwc", "chw", "vector"):
        raise UnsupportedSpaceError(f"'{name}': layout '{layout}' is none of hwc, chw, vector.")
    if layout == "vector" or len(shape) < 2:
        return None
    if len(shape) == 2:
        return "hw" if min(shape) >= IMAGE_SIDE else None
    what = f"'{name}' is a Box of shape {shape}"
    if len(shape) > 3:
        raise UnsupportedSpaceError(
            f"{what}: {len(shape)} dimensions are neither a vector nor an image. Declare env.layout=vector to flatten "
            f"it{_frame_stack_hint(space)}."
        )
    if layout is not None:
        return layout
    last, first = _are_channels(shape[-1], shape[:-1]), _are_channels(shape[0], shape[1:])
    if last and first:
        raise UnsupportedSpaceError(
            f"{what}: ambiguous, its first and its last side could both be channels. Declare env.layout=hwc, chw or vector."
        )
    if not (last or first):
        raise UnsupportedSpaceError(
            f"{what}: neither its first nor its last side is a number of channels (1, 3, 4, or of stacked frames). "
            "Declare env.layout=hwc, chw or vector."
        )
    return "hwc" if last else "chw"


def _are_channels(side: int, others: tuple[int, ...]) -> bool:
    """Whether a side can only be channels: 1, 3 or 4, or stacked frames, far fewer than a picture has pixels a side."""
    return side in IMAGE_CHANNELS or (min(others) >= IMAGE_SIDE and 2 * side <= min(others))


def _frame_stack_hint(space: Box) -> str:
    """How stacked frames become the channels of one image, pixels staying where they are."""
    into_channels = ", or put the frames into the channels with gymnasium.wrappers."
    a, b, c, d = space.shape if len(space.shape) == 4 and space.is_bounded() else (0, 0, 0, 0)
    if min(b, c) >= IMAGE_SIDE and d in IMAGE_CHANNELS:  # frames, height, width, channels: no reshaping brings these together
        shape = f"({b}, {c}, {a * d})"
        box = f"gymnasium.spaces.Box({space.low.min()}, {space.high.max()}, {shape}, numpy.{space.dtype})"
        return f"{into_channels}TransformObservation(env, lambda x: numpy.moveaxis(x, 0, 2).reshape{shape}, {box})"
    if min(c, d) >= IMAGE_SIDE and b in IMAGE_CHANNELS:
        return f"{into_channels}ReshapeObservation(env, ({a * b}, {c}, {d}))"
    if min(a, b) >= IMAGE_SIDE:
        return f"{into_channels}ReshapeObservation(env, ({a}, {b}, {c * d}))"
    return ", or make one image of it with gymnasium.wrappers.TransformObservation"
