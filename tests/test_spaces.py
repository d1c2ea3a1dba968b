"""Spaces: what goes in comes out again, and what cannot is refused by name."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from gymnasium import spaces

from worldmodel.errors import EnvError, NumericsError, UnsupportedSpaceError
from worldmodel.spaces import ActionSpec, ObsSpec

INF = np.inf


def box(low, high, shape, dtype=np.float32):
    return spaces.Box(low, high, shape, dtype)


# name: (space, layout, kind, canonical shape) of the key "obs"
OBSERVATIONS = {
    "float32": (box(-1, 1, (3,)), None, "vector", (3,)),
    "float16": (box(-1, 1, (3,), np.float16), None, "vector", (3,)),
    "float64": (box(-1, 1, (3,), np.float64), None, "vector", (3,)),
    "unbounded": (box(-INF, INF, (4,), np.float64), None, "vector", (4,)),
    "half bounded": (spaces.Box(np.array([-INF, 0.0], np.float32), np.array([0.0, INF], np.float32)), None, "vector", (2,)),
    "per dimension": (spaces.Box(np.array([-4.8, -0.4], np.float32), np.array([4.8, 0.4], np.float32)), None, "vector", (2,)),
    "0-d float": (box(-2, 2, ()), None, "vector", (1,)),
    "0-d integer": (box(-2, 2, (), np.int64), None, "vector", (1,)),
    "one point": (box(2, 2, (2,)), None, "vector", (2,)),
    "uint8 memory": (box(0, 255, (128,), np.uint8), None, "vector", (128,)),
    "int8": (box(-128, 127, (3,), np.int8), None, "vector", (3,)),
    "int16": (box(-300, 300, (3,), np.int16), None, "vector", (3,)),
    "int32": (box(-5, 5, (3,), np.int32), None, "vector", (3,)),
    "int64": (box(-5, 5, (4, 2), np.int64), None, "vector", (8,)),
    "uint16": (box(0, 65535, (2,), np.uint16), None, "vector", (2,)),
    "uint32": (box(0, 2**24, (2,), np.uint32), None, "vector", (2,)),
    "bool": (box(0, 1, (3,), bool), None, "binary", (3,)),
    "bool grid": (box(0, 1, (20, 20), bool), None, "binary", (400,)),
    "small grid": (box(0, 1, (15, 40)), None, "vector", (600,)),
    "grey": (box(0, 255, (16, 20), np.uint8), None, "image", (1, 16, 20)),
    "grey as vector": (box(0, 255, (16, 16), np.uint8), "vector", "vector", (256,)),
    "grey float": (box(0, 1, (16, 16)), None, "image", (1, 16, 16)),
    "hwc": (box(0, 255, (16, 20, 3), np.uint8), None, "image", (3, 16, 20)),
    "chw": (box(0, 255, (3, 16, 20), np.uint8), None, "image", (3, 16, 20)),
    "one channel": (box(0, 255, (16, 20, 1), np.uint8), None, "image", (1, 16, 20)),
    "four channels": (box(0, 255, (4, 16, 20), np.uint8), None, "image", (4, 16, 20)),
    "symbolic": (box(0, 255, (7, 7, 3), np.uint8), None, "image", (3, 7, 7)),
    "declared hwc": (box(0, 255, (3, 20, 3), np.uint8), "hwc", "image", (3, 3, 20)),
    "declared chw": (box(0, 255, (3, 20, 3), np.uint8), "chw", "image", (3, 20, 3)),
    "two channels": (box(0, 255, (16, 20, 2), np.uint8), None, "image", (2, 16, 20)),
    "four stacked frames": (box(0, 255, (64, 64, 12), np.uint8), None, "image", (12, 64, 64)),
    "image as vector": (box(0, 255, (4, 5, 3), np.uint8), "vector", "vector", (60,)),
    "4-d as vector": (box(0, 1, (2, 2, 2, 2)), "vector", "vector", (16,)),
    "float image": (box(0, 1, (16, 20, 3)), None, "image", (3, 16, 20)),
    "float64 image": (box(0, 1, (16, 20, 3), np.float64), None, "image", (3, 16, 20)),
    "float image to 255": (box(0, 255, (3, 16, 20)), None, "image", (3, 16, 20)),
    "uint8 mask": (box(0, 1, (16, 16, 1), np.uint8), None, "image", (1, 16, 16)),
    "discrete": (spaces.Discrete(5), None, "categorical", (5,)),
    "discrete from 3": (spaces.Discrete(4, start=3), None, "categorical", (4,)),
    "discrete from -2": (spaces.Discrete(4, start=-2), None, "categorical", (4,)),
    "one category": (spaces.Discrete(1), None, "categorical", (1,)),
    "multidiscrete": (spaces.MultiDiscrete([3, 5, 2]), None, "categorical", (10,)),
    "multidiscrete of equals": (spaces.MultiDiscrete([4, 4]), None, "categorical", (8,)),
    "multidiscrete of one": (spaces.MultiDiscrete([4]), None, "categorical", (4,)),
    "multidiscrete 2-d": (spaces.MultiDiscrete([[3, 2], [1, 4]]), None, "categorical", (10,)),
    "multidiscrete with starts": (spaces.MultiDiscrete([3, 5], start=[-1, 7]), None, "categorical", (8,)),
    "multidiscrete int32": (spaces.MultiDiscrete([3, 5], dtype=np.int32), None, "categorical", (8,)),
    "multibinary": (spaces.MultiBinary(4), None, "binary", (4,)),
    "multibinary 2-d": (spaces.MultiBinary((2, 3)), None, "binary", (6,)),
}
DICT = spaces.Dict(
    camera=box(0, 255, (16, 16, 3), np.uint8),
    speed=box(-INF, INF, (2,)),
    gear=spaces.Discrete(5, start=-1),
    lamps=spaces.MultiBinary(3),
)

ACTIONS = {
    "unit": box(-1, 1, (2,)),
    "narrow": box(-0.4, 0.4, (3,)),
    "one-sided": box(0, 800, (1,)),
    "asymmetric": spaces.Box(np.array([-0.1, 3, -7], np.float32), np.array([2, 800, -6], np.float32)),
    "2-d": box(-2, 1, (2, 3)),
    "0-d": box(-2, 2, ()),
    "float64": box(-3, 3, (2,), np.float64),
    "float16": box(-0.3, 0.7, (2,), np.float16),
    "huge": box(-1e308, 1e308, (2,), np.float64),
    "frozen dimension": spaces.Box(np.array([-1, 2], np.float32), np.array([1, 2], np.float32)),
    "integer": box(-3, 4, (2,), np.int32),
    "uint8": box(0, 255, (2,), np.uint8),
    "int64 range": box(np.iinfo(np.int64).min, np.iinfo(np.int64).max, (2,), np.int64),
    "discrete": spaces.Discrete(4),
    "discrete from -2": spaces.Discrete(3, start=-2),
    "multidiscrete": spaces.MultiDiscrete([3, 1, 5]),
    "multidiscrete 2-d": spaces.MultiDiscrete([[3, 2], [4, 4]], start=[[0, 1], [-2, 0]]),
    "multibinary": spaces.MultiBinary(3),
    "multibinary 2-d": spaces.MultiBinary((2, 2)),
    "bool": box(0, 1, (2,), bool),
}


def batch(space, n=6):
    space.seed(0)
    samples = [space.sample() for _ in range(n)]
    if isinstance(space, spaces.Dict):
        return {key: np.stack([s[key] for s in samples]) for key in space.spaces}
    return np.stack([np.asarray(s) for s in samples])


def through_json(spec):
    return type(spec).from_json(json.loads(json.dumps(spec.to_json(), allow_nan=False)))


def tensors(rows):
    return {key: torch.as_tensor(value) for key, value in rows.items()}


@pytest.fixture(params=OBSERVATIONS, ids=list(OBSERVATIONS))
def case(request):
    return OBSERVATIONS[request.param]


@pytest.fixture(params=ACTIONS, ids=list(ACTIONS))
def action_space(request):
    return ACTIONS[request.param]


def test_an_observation_survives_the_way_there_and_back(case):
    space, layout, kind, shape = case
    spec = ObsSpec.from_space(space, layout)
    assert (spec.keys["obs"].kind, spec.keys["obs"].shape) == (kind, shape)
    rows = spec.to_raw(batch(space))
    spec.check(rows)
    canonical = spec.canonical(tensors(rows))["obs"]
    assert canonical.dtype == spec.keys["obs"].canonical_dtype and canonical.shape == (6, *shape)
    if kind != "vector":
        assert canonical.min() >= 0 and canonical.max() <= 1
    back = spec.raw({"obs": canonical})["obs"]
    assert back.dtype == rows["obs"].dtype and back.shape == rows["obs"].shape
    if back.dtype.kind == "f":
        np.testing.assert_allclose(back, rows["obs"], rtol=3e-7, atol=1e-7)
    else:
        np.testing.assert_array_equal(back, rows["obs"])


def test_any_leading_dimensions_give_the_same_numbers(case):
    space, layout, _, shape = case
    spec = ObsSpec.from_space(space, layout)
    rows = tensors(spec.to_raw(batch(space)))["obs"]
    flat = spec.canonical({"obs": rows})["obs"]
    folded = spec.canonical({"obs": rows.reshape(2, 3, *rows.shape[1:])})["obs"]
    assert folded.shape == (2, 3, *shape)
    assert torch.equal(folded.reshape(flat.shape), flat)
    assert torch.equal(spec.canonical({"obs": rows[0]})["obs"], flat[0])
    np.testing.assert_array_equal(spec.raw({"obs": folded})["obs"].reshape(rows.shape), spec.raw({"obs": flat})["obs"])


def test_json_gives_an_equal_spec_and_the_space_itself(case):
    space, layout, _, _ = case
    spec = ObsSpec.from_space(space, layout)
    again = through_json(spec)
    assert again == spec
    assert again.space == space
    assert again.keys["obs"].low is None or again.keys["obs"].low.dtype == spec.keys["obs"].low.dtype


def test_raw_stays_inside_the_bounds_whatever_the_model_predicts(case):
    space, layout, _, shape = case
    spec = ObsSpec.from_space(space, layout)
    wild = torch.randn(20, *shape, generator=torch.Generator().manual_seed(0)) * 1e4
    for row in spec.raw({"obs": wild})["obs"]:
        assert space.contains(np.asarray(row))


def test_a_dict_keeps_its_keys_and_converts_each():
    spec = ObsSpec.from_space(DICT)
    assert list(spec.keys) == list(DICT.spaces)
    assert {key: part.kind for key, part in spec.keys.items()} == {
        "camera": "image", "speed": "vector", "gear": "categorical", "lamps": "binary",
    }  # fmt: skip
    obs = batch(DICT)
    rows = spec.to_raw(obs)
    spec.check(rows)
    back = spec.raw(spec.canonical(tensors(rows)))
    for key in obs:
        np.testing.assert_allclose(back[key], obs[key])
    assert through_json(spec) == spec and spec.space == DICT
    assert spec.store["camera"] == ((16, 16, 3), np.uint8)
    layouts = ObsSpec.from_space(DICT, {"camera": "vector"})
    assert layouts.keys["camera"].kind == "vector" and layouts != spec


def test_the_dict_key_obs_is_not_the_single_observation():
    inner = box(-1, 1, (2,))
    assert ObsSpec.from_space(spaces.Dict(obs=inner)) != ObsSpec.from_space(inner)
    assert isinstance(ObsSpec.from_space(spaces.Dict(obs=inner)).to_env({"obs": 1}), dict)


def test_pixels_and_categories_land_where_they_belong():
    image = np.zeros((1, 16, 20, 3), np.uint8)
    image[0, 2, 5, 1] = 51
    canonical = ObsSpec.from_space(OBSERVATIONS["hwc"][0]).canonical({"obs": torch.as_tensor(image)})["obs"]
    assert canonical[0, 1, 2, 5] == pytest.approx(0.2) and canonical.count_nonzero() == 1
    spec = ObsSpec.from_space(spaces.MultiDiscrete([3, 5], start=[-1, 7]))
    canonical = spec.canonical({"obs": torch.tensor([[1, 8]])})["obs"]
    assert canonical.tolist() == [[0, 0, 1, 0, 1, 0, 0, 0]]
    assert spec.raw({"obs": torch.tensor([[0.1, 0.2, 0.3, 0.0, 0.0, 0.9, 0.0, 0.5]])})["obs"].tolist() == [[1, 9]]


def test_rows_are_copies():
    spec = ObsSpec.from_space(box(-1, 1, (3,)))
    buffer = np.zeros((2, 3), np.float32)
    rows = spec.to_raw(buffer)
    buffer[:] = 1
    assert (rows["obs"] == 0).all()


REFUSED = {
    "ambiguous image": (box(0, 255, (3, 64, 3), np.uint8), "env.layout"),
    "neither side channels": (box(0, 255, (24, 20, 17), np.uint8), "env.layout"),
    "video": (box(0, 255, (4, 16, 16, 3), np.uint8), "env.layout=vector"),
    "unbounded image": (box(-INF, INF, (16, 16, 3)), "env.layout=vector"),
    "signed image": (box(-1, 1, (16, 16)), "RescaleObservation"),
    "integer image": (box(0, 255, (16, 16, 3), np.int32), "TransformObservation"),
    "empty": (box(0, 1, (0,)), "FilterObservation"),
    "longdouble": (box(0, 1, (2,), np.longdouble), "TransformObservation"),
    "too many categories": (spaces.Discrete(2**40), "TransformObservation"),
    "nested dict": (spaces.Dict(a=spaces.Discrete(2)), "FlattenSpaces"),
    "tuple": (spaces.Tuple([spaces.Discrete(2)]), "FlattenSpaces"),
    "text": (spaces.Text(5), "FilterObservation"),
    "sequence": (spaces.Sequence(spaces.Discrete(2)), "TransformObservation"),
    "graph": (spaces.Graph(box(0, 1, (2,)), None), "TransformObservation"),
    "one of": (spaces.OneOf([spaces.Discrete(2), spaces.Discrete(3)]), "TransformObservation"),
    "no space": (object(), "gymnasium spaces"),
}


@pytest.mark.parametrize("space, remedy", REFUSED.values(), ids=list(REFUSED))
def test_a_space_without_a_canonical_form_is_refused_with_its_key_and_a_remedy(space, remedy):
    if not isinstance(space, spaces.Space):
        holder = spaces.Dict(fine=spaces.Discrete(2))
        holder.spaces["goal"] = space
    else:
        holder = spaces.Dict(fine=spaces.Discrete(2), goal=space)
    with pytest.raises(UnsupportedSpaceError, match="'goal'") as error:
        ObsSpec.from_space(holder)
    assert remedy in str(error.value)


def test_an_empty_dict_and_keys_that_are_no_strings_are_refused():
    with pytest.raises(UnsupportedSpaceError, match="at least one key"):
        ObsSpec.from_space(spaces.Dict())
    with pytest.raises(UnsupportedSpaceError, match="3"):
        ObsSpec.from_space(spaces.Dict({3: spaces.Discrete(2)}))


def place(row):
    return f"environment {row}, episode 12, step 40"


BAD_ROWS = {
    "NaN": ("speed", lambda x: x.__setitem__((4, 1), np.nan), "environment 4"),
    "infinity": ("speed", lambda x: x.__setitem__((2, 0), -np.inf), "environment 2"),
    "no category": ("gear", lambda x: x.__setitem__(5, 4), "environment 5"),
    "below the start": ("gear", lambda x: x.__setitem__(1, -2), "environment 1"),
    "no bit": ("lamps", lambda x: x.__setitem__((3, 0), 2), "environment 3"),
}


@pytest.mark.parametrize("key, spoil, where", BAD_ROWS.values(), ids=list(BAD_ROWS))
def test_check_names_the_environment_and_key_of_a_bad_row(key, spoil, where):
    spec = ObsSpec.from_space(DICT)
    rows = spec.to_raw(batch(DICT))
    spec.check(rows, place)
    spoil(rows[key])
    with pytest.raises(EnvError, match=f"{where}, episode 12, step 40: observation '{key}'"):
        spec.check(rows, place)


def test_check_refuses_what_a_32_bit_float_cannot_hold():
    spec = ObsSpec.from_space(box(-INF, INF, (2,), np.float64))
    spec.check({"obs": np.full((1, 2), 1e38)})
    with pytest.raises(EnvError, match="1e\\+39"):
        spec.check({"obs": np.full((1, 2), 1e39)})


def test_check_refuses_an_image_outside_its_bounds():
    spec = ObsSpec.from_space(box(0, 1, (16, 16)))
    with pytest.raises(EnvError, match=r"outside the space's bounds \[0, 1"):
        spec.check({"obs": np.full((1, 16, 16), 200, np.float32)})
    mask = ObsSpec.from_space(box(0, 1, (16, 16, 1), np.uint8))
    with pytest.raises(EnvError, match="outside"):
        mask.check({"obs": np.full((1, 16, 16, 1), 200, np.uint8)})


def test_missing_and_extra_keys_are_named():
    spec = ObsSpec.from_space(DICT)
    obs = batch(DICT)
    obs["lidar"] = obs.pop("speed")
    for function in (spec.to_raw, spec.check):
        with pytest.raises(EnvError, match=r"here: missing observation keys \['speed'\], extra keys \['lidar'\]"):
            function(obs, "here")
    with pytest.raises(EnvError, match="expected a dict"):
        spec.to_raw(obs["camera"])


@pytest.mark.parametrize(
    "value",
    [
        np.zeros((2, 4), np.float32),
        np.zeros(3, np.float32),
        np.float32(1),
        np.full((2, 3), 1e39),
        np.zeros((2, 3), object),
        [[0.0, 0.0, 0.0], [0.0]],
        None,
    ],
    ids=["shape", "no batch", "scalar", "too great", "object", "ragged", "none"],
)
def test_what_is_no_array_of_the_space_is_refused(value):
    spec = ObsSpec.from_space(box(-1, 1, (3,)))
    with pytest.raises(EnvError, match="here: observation 'obs'"):
        spec.to_raw(value, "here")


def test_casts_pass_that_lose_nothing_but_digits():
    spec = ObsSpec.from_space(box(0, 255, (2,), np.uint8))
    assert spec.to_raw(np.array([[1, 255]]))["obs"].dtype == np.uint8
    with pytest.raises(EnvError, match="uint8"):
        spec.to_raw(np.array([[1, 256]]))
    with pytest.raises(EnvError, match="uint8"):
        spec.to_raw(np.array([[1.5, 2.0]]))
    assert spec.to_raw(np.array([[1.0, 2.0]]))["obs"].tolist() == [[1, 2]]
    wide = ObsSpec.from_space(box(-1, 1, (2,), np.float64))
    assert wide.to_raw(np.zeros((1, 2), np.float32))["obs"].dtype == np.float64


def test_canonical_refuses_another_shape():
    spec = ObsSpec.from_space(box(-1, 1, (3,)))
    with pytest.raises(ValueError, match="shape"):
        spec.canonical({"obs": torch.zeros(5, 4)})
    with pytest.raises(ValueError, match="shape"):
        spec.raw({"obs": torch.zeros(5, 4)})


def test_decoded_actions_are_the_environments_and_come_back(action_space):
    spec = ActionSpec.from_space(action_space)
    actions = spec.sample(200, np.random.default_rng(0))
    assert actions.dtype == np.float32 and actions.shape == (200, spec.dim)
    decoded = spec.decode(actions)
    assert decoded.dtype == action_space.dtype and decoded.shape == (200, *action_space.shape)
    for action in decoded:
        assert action_space.contains(np.asarray(action))
    frozen = spec.key.low is not None and (spec.key.low == spec.key.high).reshape(-1)
    tolerance = 1e-3 if action_space.dtype == np.float16 else 1e-6
    np.testing.assert_allclose(spec.encode(decoded), np.where(frozen, 0, actions), atol=tolerance)


def test_what_is_stored_is_what_the_environment_got(action_space):
    spec = ActionSpec.from_space(action_space)
    wild = np.random.default_rng(0).normal(size=(200, spec.dim)).astype(np.float32) * 2
    got = spec.decode(wild)
    again = spec.decode(spec.encode(got))
    if got.dtype.kind == "f":
        span = np.maximum(np.abs(action_space.low), np.abs(action_space.high)).astype(np.float64)
        assert (np.abs(again.astype(np.float64) / 8 - got.astype(np.float64) / 8) <= span * np.finfo(np.float32).eps).all()
    elif got.dtype.itemsize < 8 or spec.kind != "continuous":
        np.testing.assert_array_equal(again, got)


def test_actions_never_leave_the_bounds(action_space):
    spec = ActionSpec.from_space(action_space)
    for value in (-1e30, -1.0, 1.0, 1e30):
        for action in spec.decode(np.full((1, spec.dim), value, np.float32)):
            assert action_space.contains(np.asarray(action))
    if spec.kind == "continuous":
        low, high = spec.decode(np.full((1, spec.dim), -1.0)), spec.decode(np.full((1, spec.dim), 1.0))
        np.testing.assert_array_equal(low[0], action_space.low)
        np.testing.assert_array_equal(high[0], action_space.high)


def test_samples_cover_every_choice_evenly(action_space):
    spec = ActionSpec.from_space(action_space)
    actions = spec.sample(4000, np.random.default_rng(0))
    assert np.array_equal(actions, spec.sample(4000, np.random.default_rng(0)))
    mean = actions.mean(0)
    if spec.kind == "categorical":
        expected = np.concatenate([np.full(n, 1 / n) for n in spec.sizes])
    else:
        expected = 0.5 if spec.kind == "binary" else 0.0
    np.testing.assert_allclose(mean, expected, atol=0.05)


def test_an_action_spec_survives_json(action_space):
    spec = ActionSpec.from_space(action_space)
    assert through_json(spec) == spec
    assert through_json(spec).space == action_space


def test_projection_clamps_continuous_actions_only():
    wild = torch.tensor([[3.0, -5.0]])
    assert ActionSpec.from_space(box(-9, 9, (2,))).project(wild).tolist() == [[1, -1]]
    assert ActionSpec.from_space(spaces.Discrete(2)).project(wild) is wild


def test_integer_boxes_are_sampled_evenly_to_their_ends():
    spec = ActionSpec.from_space(box(-1, 1, (1,), np.int32))
    counts = np.bincount(spec.decode(spec.sample(3000, np.random.default_rng(0))).reshape(-1) + 1)
    assert (np.abs(counts - 1000) < 150).all()


@pytest.mark.parametrize(
    "space, remedy",
    [
        (box(-INF, INF, (2,)), "Box(-1, 1)"),
        (spaces.Box(np.array([0.0, -1.0], np.float32), np.array([1.0, INF], np.float32)), "Box(-1, 1)"),
        (spaces.Dict(a=spaces.Discrete(2)), "TransformAction"),
        (spaces.Tuple([spaces.Discrete(2)]), "TransformAction"),
        (spaces.Text(3), "TransformAction"),
        (spaces.Sequence(spaces.Discrete(2)), "TransformAction"),
        (spaces.Discrete(2**40), "TransformAction"),
    ],
    ids=["unbounded", "half bounded", "dict", "tuple", "text", "sequence", "too many"],
)
def test_action_spaces_without_a_canonical_form_are_refused_with_a_remedy(space, remedy):
    with pytest.raises(UnsupportedSpaceError, match="action") as error:
        ActionSpec.from_space(space)
    assert remedy in str(error.value)


def test_broken_actions_are_refused():
    spec = ActionSpec.from_space(box(-1, 1, (2,)))
    with pytest.raises(NumericsError, match="NaN"):
        spec.decode(np.array([[0.0, np.nan]]))
    with pytest.raises(ValueError, match="shape"):
        spec.encode(np.zeros((1, 3)))
    with pytest.raises(ValueError, match="row 1"):
        ActionSpec.from_space(spaces.Discrete(3)).encode(np.array([0, 3]))


@pytest.mark.parametrize(
    ("space", "actions"),
    [
        (spaces.Discrete(3, start=5), [5.7]),
        (spaces.MultiBinary(2), [[0.5, 1]]),
        (spaces.MultiDiscrete([3, 2]), [[1.2, 0]]),
        (spaces.Box(-1, 1, (2,), np.float32), [[np.nan, 0]]),
    ],
    ids=["category", "bits", "categories", "numbers"],
)
def test_what_is_no_action_is_refused_and_not_rounded(space, actions):
    with pytest.raises(ValueError, match=re.escape(str(space))):
        ActionSpec.from_space(space).encode(np.array(actions))


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.int64])
def test_categories_keep_their_number_type(dtype):
    space = spaces.Discrete(3, dtype=dtype)
    for spec in (ActionSpec.from_space(space), ObsSpec.from_space(space)):
        again = type(spec).from_json(spec.to_json())
        assert again.space == spec.space == space and again.space.dtype == dtype
