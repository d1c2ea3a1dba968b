"""Pictures of observations: they show what the numbers say, whatever the numbers are."""

from __future__ import annotations

import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces

from worldmodel.envs.draw import ALARM, BODY, GOAL, POLE, Viewer, scene
from worldmodel.spaces import ObsSpec

CARTPOLE, PENDULUM, ACROBOT = "CartPole-v1", "Pendulum-v1", "Acrobot-v1"
USUAL = {
    CARTPOLE: [0.3, 0.1, 0.05, -0.2],
    PENDULUM: [math.cos(0.6), math.sin(0.6), 2.0],
    ACROBOT: [math.cos(0.5), math.sin(0.5), math.cos(0.8), math.sin(0.8), 0.1, 0.2],
}
DRAWN = {CARTPOLE: (0, 2), PENDULUM: (0, 1, 2), ACROBOT: (0, 1, 2, 3)}
"""Places of the numbers that a still picture shows."""


def draw(env_id, *numbers):
    return scene(env_id).draw(np.array(numbers, np.float32))


def middle(picture, colour):
    """Mean (column, row) of the pixels of exactly this colour."""
    rows, columns = np.nonzero((picture == colour).all(-1))
    assert len(rows), "no pixel has this colour"
    return columns.mean(), rows.mean()


def count(picture, colour):
    return int((picture == colour).all(-1).sum())


def canonical(spec, rows):
    return spec.canonical({name: torch.as_tensor(x) for name, x in rows.items()})


# Scenes -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("env_id", USUAL)
def test_a_scene_fits_what_its_environment_observes(env_id):
    names, space = scene(env_id).names, gym.make(env_id).observation_space
    assert space.shape == (len(names),) and len(set(names)) == len(names)
    picture = draw(env_id, *USUAL[env_id])
    assert picture.dtype == np.uint8 and picture.shape == (96, 144 if env_id == CARTPOLE else 96, 3)


@pytest.mark.parametrize("env_id, place", [(env_id, place) for env_id, places in DRAWN.items() for place in places])
def test_the_picture_changes_with_each_number_that_is_drawn(env_id, place):
    moved = list(USUAL[env_id])
    moved[place] += 0.1
    assert (draw(env_id, *moved) != draw(env_id, *USUAL[env_id])).any()


@pytest.mark.parametrize("env_id", USUAL)
def test_the_same_observation_gives_the_same_bytes(env_id):
    first = draw(env_id, *USUAL[env_id])
    kept = first.copy()
    first[:] = 0
    draw(env_id, *np.zeros(len(USUAL[env_id])))
    assert (draw(env_id, *USUAL[env_id]) == kept).all()


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf, 1e30, -1e30], ids=str)
@pytest.mark.parametrize("env_id", USUAL)
def test_absurd_numbers_are_drawn_all_the_same(env_id, wrong):
    usual = USUAL[env_id]
    for numbers in ([wrong] * len(usual), *([*usual[:i], wrong, *usual[i + 1 :]] for i in range(len(usual)))):
        assert draw(env_id, *numbers).shape == draw(env_id, *usual).shape
    if math.isnan(wrong):
        assert (draw(env_id, *[wrong] * len(usual)) == draw(env_id, *[0] * len(usual))).all()


def test_the_pole_stands_on_the_cart_and_leans_right_for_a_positive_angle():
    cart, pole = (middle(draw(CARTPOLE, 0, 0, 0, 0), colour) for colour in (BODY, POLE))
    assert pole[0] == pytest.approx(cart[0], abs=1) and pole[1] < cart[1] - 10
    assert middle(draw(CARTPOLE, 0, 0, 0.15, 0), POLE)[0] > cart[0] + 2
    assert middle(draw(CARTPOLE, 0, 0, -0.15, 0), POLE)[0] < cart[0] - 2


def test_the_cart_moves_right_with_its_position_and_stays_in_view():
    columns = [middle(draw(CARTPOLE, x, 0, 0, 0), BODY)[0] for x in (-9, -2, 0, 2, 9)]
    assert columns == sorted(columns)
    widths = [count(draw(CARTPOLE, x, 0, 0, 0), BODY) for x in (-9, 9)]
    assert min(widths) > 0.8 * count(draw(CARTPOLE, 0, 0, 0, 0), BODY)


@pytest.mark.parametrize(
    "x, angle, over",
    [(0, 0.2, False), (0, 0.22, True), (0, -0.22, True), (2.35, 0, False), (2.45, 0, True), (-2.45, 0, True)],
)
def test_the_pole_turns_red_where_an_episode_ends(x, angle, over):
    picture = draw(CARTPOLE, x, 0, angle, 0)
    assert (count(picture, POLE) == 0) == over
    assert (count(picture, ALARM) > count(draw(CARTPOLE, 0, 0, 0, 0), ALARM) + 20) == over


@pytest.mark.parametrize("angle, side", [(0, (0, -1)), (math.pi / 2, (-1, 0)), (math.pi, (0, 1)), (-math.pi / 2, (1, 0))])
@pytest.mark.parametrize("length", [1, 0.2, 7])
def test_the_pendulum_stands_at_angle_zero_and_turns_counter_clockwise_at_any_length_of_the_pair(angle, side, length):
    column, row = middle(draw(PENDULUM, length * math.cos(angle), length * math.sin(angle), 0), POLE)
    assert (column - 47.5, row - 47.5) == pytest.approx((18 * side[0], 18 * side[1]), abs=2)


def test_the_pendulums_arc_points_where_it_turns_to_and_grows_with_its_speed():
    still, slow, fast, back = (draw(PENDULUM, 1, 0, speed) for speed in (0, 2, 8, -8))
    assert count(still, BODY) == 0 < count(slow, BODY) < count(fast, BODY)
    assert middle(fast, BODY)[0] < 48 < middle(back, BODY)[0]


@pytest.mark.parametrize(
    "first, second, link, tip",
    [
        (0, 0, (0, 0.5), (0, 1.5)),
        (math.pi / 2, 0, (0.5, 0), (1.5, 0)),
        (math.pi / 2, math.pi / 2, (0.5, 0), (1, -0.5)),
        (0, -math.pi / 2, (0, 0.5), (-0.5, 1)),
    ],
)
def test_the_acrobot_hangs_at_angle_zero_and_its_second_angle_is_relative(first, second, link, tip):
    picture = draw(ACROBOT, math.cos(first), math.sin(first), math.cos(second), math.sin(second), 0, 0)
    for colour, (x, y) in ((BODY, link), (POLE, tip)):
        column, row = middle(picture, colour)
        assert (column - 47.5, row - 47.5) == pytest.approx((21.5 * x, 21.5 * y), abs=4)


def test_the_acrobots_tip_turns_green_above_the_line():
    line = count(draw(ACROBOT, 1, 0, 1, 0, 0, 0), GOAL)
    assert line > 20
    assert count(draw(ACROBOT, -1, 0, 1, 0, 0, 0), GOAL) > line + 10
    assert count(draw(ACROBOT, math.cos(2), math.sin(2), 1, 0, 0, 0), GOAL) <= line


def test_a_module_in_front_of_an_id_makes_no_difference():
    assert scene("gymnasium.envs:CartPole-v1") is scene("CartPole-v0") is scene(CARTPOLE)


@pytest.mark.parametrize("env_id", ["MountainCar-v0", "cartpole", "", "CartPole-v1:", "worldmodel.envs:Chain-v0"])
def test_other_ids_have_no_scene(env_id):
    assert scene(env_id) is None


# The viewer -------------------------------------------------------------------------------------------------------------

RNG = np.random.default_rng(0)
COLOUR, GREY = (RNG.integers(0, 256, (3, 20, 24, c), np.uint8) for c in (3, 1))
BYTE = {"low": 0, "high": 255, "dtype": np.uint8}


@pytest.mark.parametrize("env_id", ["CartPole-v1", "worldmodel.envs:Catch-v0"])
def test_pictures_pass_as_they_are(env_id):
    spec = ObsSpec.from_space(spaces.Box(shape=(20, 24, 3), **BYTE))
    viewer = Viewer(env_id, spec)
    assert viewer.can_draw and viewer.names == {}
    assert (viewer.frames(canonical(spec, {"obs": COLOUR})) == COLOUR).all()
    arrays = {name: x.numpy() for name, x in canonical(spec, {"obs": COLOUR}).items()}
    assert (viewer.frames(arrays) == COLOUR).all()


@pytest.mark.parametrize("shape", [(20, 24, 1), (20, 24)])
def test_grey_pictures_become_three_equal_channels(shape):
    spec = ObsSpec.from_space(spaces.Box(shape=shape, **BYTE))
    frames = Viewer("", spec).frames(canonical(spec, {"obs": GREY.reshape(3, *shape)}))
    assert frames.flags.writeable and (frames == np.repeat(GREY, 3, -1)).all()


@pytest.mark.parametrize("channels, seen", [(2, [1, 1, 1]), (4, [3, 3, 3]), (6, [3, 4, 5]), (9, [6, 7, 8]), (10, [9, 9, 9])])
def test_of_stacked_pictures_the_newest_is_seen(channels, seen):
    stack = RNG.integers(0, 256, (2, 20, 24, channels), np.uint8)
    spec = ObsSpec.from_space(spaces.Box(shape=(20, 24, channels), **BYTE), layout="hwc")
    assert (Viewer("", spec).frames(canonical(spec, {"obs": stack})) == stack[..., seen]).all()


def test_imagined_pixels_are_rounded_and_clipped():
    spec = ObsSpec.from_space(spaces.Box(shape=(16, 16, 1), **BYTE))
    x = torch.zeros(1, 1, 16, 16)
    x[0, 0, 0, :6] = torch.tensor([-1, 2, math.nan, math.inf, 0.5 / 255 + 1e-4, 1 / 255])
    assert Viewer("", spec).frames({"obs": x})[0, 0, :6, 0].tolist() == [0, 255, 0, 255, 1, 1]


def test_a_dict_is_seen_through_its_image():
    space = spaces.Dict(a=spaces.Box(-1, 1, (2,)), pixels=spaces.Box(shape=(20, 24, 3), **BYTE), z=spaces.Discrete(2))
    spec = ObsSpec.from_space(space)
    viewer = Viewer("Unknown-v0", spec)
    rows = {"a": np.zeros((3, 2), np.float32), "pixels": COLOUR, "z": np.zeros(3, np.int64)}
    assert (viewer.frames(canonical(spec, rows)) == COLOUR).all()
    assert set(viewer.names) == {"a", "z"}


@pytest.mark.parametrize("env_id", USUAL)
def test_known_vectors_are_drawn(env_id):
    space, known = gym.make(env_id).observation_space, scene(env_id)
    viewer = Viewer(env_id, ObsSpec.from_space(space))
    assert viewer.can_draw and viewer.names == {"obs": known.names}
    rows = np.array([USUAL[env_id], np.zeros(len(known.names))], np.float32)
    for obs in (rows, torch.from_numpy(rows).requires_grad_()):
        assert (viewer.frames({"obs": obs}) == np.stack([known.draw(row) for row in rows])).all()
    assert viewer.frames({"obs": rows[:0]}).shape == (0, *known.draw(rows[0]).shape)


@pytest.mark.parametrize("env_id", ["Unknown-v0", CARTPOLE])
def test_vectors_that_nobody_has_drawn_give_no_pictures(env_id):
    viewer = Viewer(env_id, ObsSpec.from_space(spaces.Box(-1, 1, (2,))))
    assert not viewer.can_draw and viewer.frames({"obs": np.zeros((1, 2))}) is None
    assert viewer.names == {"obs": ("obs[0]", "obs[1]")}


NAMES = {
    "Box": (spaces.Box(-1, 1, (2,)), {"obs": ("obs[0]", "obs[1]")}),
    "Box of rows": (spaces.Box(-1, 1, (1, 2)), {"obs": ("obs[0,0]", "obs[0,1]")}),
    "Box of one number": (spaces.Box(-1, 1, ()), {"obs": ("obs",)}),
    "Discrete": (spaces.Discrete(3, start=-1), {"obs": ("obs=-1", "obs=0", "obs=1")}),
    "MultiDiscrete": (spaces.MultiDiscrete([2, 1]), {"obs": ("obs[0]=0", "obs[0]=1", "obs[1]=0")}),
    "MultiBinary": (spaces.MultiBinary(2), {"obs": ("obs[0]", "obs[1]")}),
    "Dict": (
        spaces.Dict(at=spaces.Discrete(2), image=spaces.Box(shape=(16, 16, 3), **BYTE), speed=spaces.Box(-1, 1, (1,))),
        {"at": ("at=0", "at=1"), "speed": ("speed[0]",)},
    ),
    "Dict of a known vector": (
        spaces.Dict(state=spaces.Box(-1, 1, (3,)), bit=spaces.MultiBinary(1)),
        {"state": scene(PENDULUM).names, "bit": ("bit[0]",)},
    ),
}


@pytest.mark.parametrize("space, names", NAMES.values(), ids=list(NAMES))
def test_every_canonical_number_has_a_name(space, names):
    spec = ObsSpec.from_space(space)
    viewer = Viewer(PENDULUM, spec)
    assert viewer.names == names
    assert {name: (len(found),) for name, found in viewer.names.items()} == {name: spec.keys[name].shape for name in names}
