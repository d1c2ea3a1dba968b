"""Pictures of observations, real and imagined."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from worldmodel.data import Obs
from worldmodel.spaces import ObsSpec
from worldmodel.spaces.names import KNOWN, Names, signal_names
from worldmodel.view import pictures

Point = tuple[float, float]
Colour = tuple[int, int, int]

GROUND, LINE, BODY = (16, 16, 32), (84, 88, 120), (64, 192, 255)
POLE, ALARM, GOAL = (255, 208, 64), (255, 80, 72), (96, 224, 144)

FINE = 3
"""Shapes are drawn on a grid this many times finer than the picture, since Pillow rounds their corners to whole pixels."""
MAX_DRAWN = 1e6
"""Larger numbers are drawn as this one."""

TRACK_LIMIT, POLE_LIMIT = 2.4, math.radians(12)
"""Where an episode of CartPole ends: metres from the middle of the track, radians from upright."""
SWEEP_SECONDS = 0.2
"""The Pendulum's arc is the angle that it turns through in this time: 92 degrees at its maximum speed of 8 rad/s."""


@dataclass(frozen=True)
class Scene:
    """The drawing of a vector observation.

    names  of its D numbers, with units
    draw   one observation [D] in the environment's own units -> uint8 [H, W, 3] of a fixed size. Any numbers can be drawn: NaN
           counts as 0, and a cart that leaves the view is drawn at its border.
    """

    names: tuple[str, ...]
    draw: Callable[[np.ndarray], np.ndarray]


def scene(env_id: str) -> Scene | None:
    """The scene of a registered id, with or without a "module:" in front; None where there is none."""
    return _SCENES.get(env_id.rpartition(":")[2])


class Viewer:
    """Observations as pictures: images as they are, vectors of known environments drawn, nothing for all others.

    names     {key: names of its D canonical numbers}, for all keys but images: `env.names`, or else those of `signal_names`
    can_draw  whether `frames` gives pictures
    """

    def __init__(self, env_id: str, spec: ObsSpec, names: Names | None = None):
        known = scene(env_id)
        images = [key.name for key in spec.keys.values() if key.kind == "image"]
        fitting = [key.name for key in spec.keys.values() if known and key.kind == "vector" and key.shape == (len(known.names),)]
        self._draw = None if images or not known else known.draw
        self._key = next(iter(images or fitting), None)
        self.can_draw = self._key is not None
        self.names = signal_names(spec, names, env_id)

    def frames(self, obs: Mapping[str, np.ndarray | Tensor]) -> np.ndarray | None:
        """Canonical observations {key: [N, *shape]}, as `ObsSpec.canonical` gives them -> uint8 [N, H, W, 3], or None.

        The first image is shown in its own size: the newest frame of a stack, in colour where the channels come in threes.
        Four channels are taken for four grey frames, not RGBA.
        """
        if self._key is None:
            return None
        x = obs[self._key]
        x = x.detach().float().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)
        if self._draw is None:
            return _pixels(x)
        drawn = [self._draw(row) for row in x] or [self._draw(np.zeros(x.shape[1:]))]
        return np.stack(drawn)[: len(x)]

    @property
    def labels(self) -> list[str]:
        """The names of all D numbers, key after key."""
        return [label for labels in self.names.values() for label in labels]

    def numbers(self, obs: Obs) -> np.ndarray:
        """Canonical observations {key: [*N, ...]} without the images, side by side [*N, D]."""
        return torch.cat([obs[name] for name in self.names], -1).cpu().numpy()

    def signals(self, observed: Obs | None, imagined: Obs | None, context: int = 0) -> np.ndarray | None:
        """All numbers over time as frames uint8 [T, H, W, 3]: `observed` {key: [T, D]} and samples `imagined` {key: [K, T, D]}.

        Either may be None. `context` rows were seen before imagining. None where observations are images alone.
        """
        if not self.names:
            return None
        true = None if observed is None else self.numbers(observed)
        samples = np.full((1, *true.shape), np.nan) if imagined is None else self.numbers(imagined)
        true = np.full(samples.shape[1:], np.nan) if true is None else true
        return pictures.signal_frames(true, samples, self.labels, context)


def _pixels(x: np.ndarray) -> np.ndarray:
    """[N, C, H, W] in [0, 1] -> uint8 [N, H, W, 3]."""
    x = x[:, -3:] if x.shape[1] % 3 == 0 else x[:, -1:]
    x = np.rint(np.clip(np.nan_to_num(x), 0, 1) * 255).astype(np.uint8).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(np.broadcast_to(x, (*x.shape[:3], 3)))


# Drawing ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _View:
    """A picture of `width` x `height` pixels; the origin lies at pixel (x, y), `unit` pixels are one unit, y points up."""

    width: int
    height: int
    x: float
    y: float
    unit: float

    def sheet(self, background: Image.Image | None = None) -> _Sheet:
        size = (self.width * FINE, self.height * FINE)
        return _Sheet(self, Image.new("RGB", size, GROUND) if background is None else background.copy())


class _Sheet:
    """An unfinished picture. Points and widths are in the view's units, angles in radians counter-clockwise from right."""

    def __init__(self, view: _View, image: Image.Image):
        self.view, self.image, self.pen = view, image, ImageDraw.Draw(image)

    def rod(self, start: Point, end: Point, width: float, colour: Colour) -> None:
        """A thick line with round ends."""
        angle = math.atan2(end[1] - start[1], end[0] - start[0])
        dx, dy = -math.sin(angle) * width / 2, math.cos(angle) * width / 2
        corners = [self._fine(x + side * dx, y + side * dy) for side, (x, y) in ((1, start), (1, end), (-1, end), (-1, start))]
        self.pen.polygon(corners, colour)
        for point in (start, end):
            self.disc(point, width / 2, colour)

    def disc(self, centre: Point, radius: float, colour: Colour) -> None:
        self.box((centre[0] - radius, centre[1] - radius), (centre[0] + radius, centre[1] + radius), colour, self.pen.ellipse)

    def box(self, low: Point, high: Point, colour: Colour, shape: Callable | None = None) -> None:
        """The rectangle (or another `shape`) between the corners at the lower left and the upper right."""
        (left, bottom), (right, top) = self._fine(*low), self._fine(*high)
        (shape or self.pen.rectangle)((left, top, max(left, right - 1), max(top, bottom - 1)), colour)

    def arc(self, radius: float, start: float, sweep: float, width: float, colour: Colour) -> None:
        """Part of a circle around the origin, from angle `start` on by `sweep`, which may be negative."""
        (left, bottom), (right, top) = self._fine(-radius, -radius), self._fine(radius, radius)
        # Pillow turns clockwise, and draws from the smaller angle to the larger one.
        angles = sorted(-math.degrees(angle) for angle in (start, start + sweep))
        self.pen.arc((left, top, right, bottom), *angles, fill=colour, width=round(width * self.view.unit * FINE))

    def picture(self) -> np.ndarray:
        """uint8 [H, W, 3], every pixel the mean of its FINE x FINE parts."""
        return np.array(self.image.reduce(FINE))

    def _fine(self, x: float, y: float) -> tuple[int, int]:
        view = self.view
        return round((view.x + x * view.unit) * FINE), round((view.y - y * view.unit) * FINE)


def _drawable(obs: np.ndarray) -> list[float]:
    numbers = (float(number) for number in obs)
    return [0.0 if math.isnan(number) else min(max(number, -MAX_DRAWN), MAX_DRAWN) for number in numbers]


# CartPole ---------------------------------------------------------------------------------------------------------------

_TRACK = _View(144, 96, x=72, y=68, unit=22.5)
_TRACK_END = _TRACK.x / _TRACK.unit
# Cart and pole are drawn at twice the track's scale: the angle of a pole of 22 pixels could not be seen.
_CART_WIDTH, _CART_HEIGHT, _POLE_LENGTH = 0.8, 0.44, 2.0


@cache
def _track() -> Image.Image:
    sheet = _TRACK.sheet()
    sheet.box((-_TRACK_END, -0.05), (_TRACK_END, 0.05), LINE)
    for metre in range(-2, 3):
        sheet.box((metre - 0.03, -0.5), (metre + 0.03, -0.3 if metre else -0.22), LINE)
    for limit in (-TRACK_LIMIT, TRACK_LIMIT):
        sheet.box((limit - 0.035, -0.5), (limit + 0.035, 0.5), ALARM)
    return sheet.image


def _draw_cartpole(obs: np.ndarray) -> np.ndarray:
    x, _, angle, _ = _drawable(obs)
    over = abs(x) > TRACK_LIMIT or abs(angle) > POLE_LIMIT
    border = _TRACK_END - _CART_WIDTH / 2
    x = min(max(x, -border), border)
    sheet = _TRACK.sheet(_track())
    sheet.box((x - _CART_WIDTH / 2, -_CART_HEIGHT / 2), (x + _CART_WIDTH / 2, _CART_HEIGHT / 2), BODY)
    axle = (x, _CART_HEIGHT / 4)
    tip = (axle[0] + _POLE_LENGTH * math.sin(angle), axle[1] + _POLE_LENGTH * math.cos(angle))
    sheet.rod(axle, tip, 0.2, ALARM if over else POLE)
    sheet.disc(axle, 0.06, GROUND)
    return sheet.picture()


# Pendulum ---------------------------------------------------------------------------------------------------------------

_DIAL = _View(96, 96, x=48, y=48, unit=36)


@cache
def _dial() -> Image.Image:
    sheet = _DIAL.sheet()
    sheet.arc(1.2, 0, 2 * math.pi, 0.03, LINE)
    sheet.rod((0, 1.1), (0, 1.2), 0.06, GOAL)
    return sheet.image


def _draw_pendulum(obs: np.ndarray) -> np.ndarray:
    cosine, sine, speed = _drawable(obs)
    angle = math.atan2(sine, cosine) + math.pi / 2
    sheet = _DIAL.sheet(_dial())
    sheet.arc(0.6, angle, min(max(speed * SWEEP_SECONDS, -math.pi), math.pi), 0.1, BODY)
    sheet.rod((0, 0), (math.cos(angle), math.sin(angle)), 0.18, POLE)
    sheet.disc((0, 0), 0.05, GROUND)
    return sheet.picture()


# Acrobot ----------------------------------------------------------------------------------------------------------------

_BAR = _View(96, 96, x=48, y=48, unit=21.5)


@cache
def _bar() -> Image.Image:
    sheet = _BAR.sheet()
    end = _BAR.x / _BAR.unit
    for dash in np.arange(-end, end, 0.3):
        sheet.box((dash, 0.97), (dash + 0.18, 1.03), GOAL)
    return sheet.image


def _draw_acrobot(obs: np.ndarray) -> np.ndarray:
    cosine, sine, cosine_2, sine_2, *_ = _drawable(obs)
    first = math.atan2(sine, cosine) - math.pi / 2
    second = first + math.atan2(sine_2, cosine_2)
    elbow = (math.cos(first), math.sin(first))
    tip = (elbow[0] + math.cos(second), elbow[1] + math.sin(second))
    sheet = _BAR.sheet(_bar())
    sheet.rod((0, 0), elbow, 0.24, BODY)
    sheet.rod(elbow, tip, 0.2, POLE)
    sheet.disc((0, 0), 0.07, GROUND)
    sheet.disc(elbow, 0.07, GROUND)
    sheet.disc(tip, 0.16, GOAL if tip[1] > 1 else POLE)
    return sheet.picture()


_CARTPOLE = Scene(KNOWN["CartPole-v1"], _draw_cartpole)
_SCENES = {
    "CartPole-v0": _CARTPOLE,
    "CartPole-v1": _CARTPOLE,
    "Pendulum-v1": Scene(KNOWN["Pendulum-v1"], _draw_pendulum),
    "Acrobot-v1": Scene(KNOWN["Acrobot-v1"], _draw_acrobot),
}
