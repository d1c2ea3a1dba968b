"""Environments that people bring: their wrappers, keys that are left out, integers that are categories."""

from __future__ import annotations

import json
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit
from small_runs import CHAIN, OPTIONS, small_train

from worldmodel.config import Config
from worldmodel.envs import FlattenSpaces, sources
from worldmodel.envs.make import EnvConfig, make_env, make_vec
from worldmodel.envs.minari import _env_spec
from worldmodel.envs.wrappers import CheckedEnv
from worldmodel.errors import ConfigError, EnvError, MissingExtraError, UnsupportedSpaceError
from worldmodel.spaces import ObsSpec
from worldmodel.storage.run import Run

MODULE = """
import gymnasium as gym
import numpy as np

class Add(gym.ObservationWrapper):
    def __init__(self, env, by, *, times=1.0):
        super().__init__(env)
        self.by = by * times
        self.observation_space = gym.spaces.Box(-99, 99, env.observation_space.shape, np.float32)

    def observation(self, obs):
        return np.float32(np.asarray(obs) + self.by)

class Double(Add):
    def __init__(self, env):
        super().__init__(env, 0)

    def observation(self, obs):
        return np.float32(2 * np.asarray(obs))

class Spoils(gym.ObservationWrapper):
    def observation(self, obs):
        return np.full_like(obs, np.nan)

class Refuses(gym.Wrapper):
    def __init__(self, env):
        env.closed_by_wrapping = []
        env.close = lambda: closed.append(env)
        raise AssertionError("not around this one")

class Lacks(gym.Wrapper):
    def __init__(self, env):
        import nosuchpkg

closed = []
def function(env):
    called.append(env)
    return env
called = []
"""


@pytest.fixture(autouse=True)
def own(tmp_path, monkeypatch):
    """A module of wrappers beside the user, and the environment that stands in for MiniGrid's."""
    (tmp_path / "own_wrappers.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_wrappers", raising=False)
    names = ("MiniGrid-Small-v0", "Small-v0")
    for name in names:
        gym.register(name, Grid, max_episode_steps=8)
    yield
    for name in names:  # the others stay: a package registers its own only when it is first imported
        gym.registry.pop(name)
    sys.modules.pop("own_wrappers", None)


class Grid(gym.Env):
    """Observes a grid of 2x2 cells (kind, colour, state), a direction, and a text that is no element of its space."""

    action_space = spaces.Discrete(3)

    def __init__(self, kind=10):
        self.kind = kind
        self.observation_space = spaces.Dict(
            image=spaces.Box(0, 255, (2, 2, 3), np.uint8), direction=spaces.Discrete(4), mission=spaces.Text(4)
        )

    def _observed(self):
        image = self.np_random.integers(0, [self.kind + 1, 6, 3], (2, 2, 3)).astype(np.uint8)
        return {"image": image, "direction": 3, "mission": "go to the door, please"}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self._observed(), {}

    def step(self, action):
        return self._observed(), float(action == 1), False, False, {}


def chain(*wrappers, **options):
    return EnvConfig(id=CHAIN, wrappers=list(wrappers), **options)


# Wrappers ---------------------------------------------------------------------------------------------------------------


def test_wrappers_stand_around_the_environment_in_their_order():
    bare, _ = make_env(CHAIN).reset(seed=0)
    adds_first = make_env(chain({"own_wrappers:Add": {"by": 3, "times": 2.0}}, "own_wrappers:Double"))
    doubles_first = make_env(chain("own_wrappers:Double", {"own_wrappers:Add": {"by": 6}}))
    np.testing.assert_allclose(adds_first.reset(seed=0)[0], 2 * (bare + 6))
    np.testing.assert_allclose(doubles_first.reset(seed=0)[0], 2 * bare + 6)
    assert ObsSpec.from_space(adds_first.observation_space).keys["obs"].kind == "vector"


def test_what_a_wrapper_gives_is_checked_and_the_time_limit_stays_outside():
    env = make_env(chain("own_wrappers:Spoils", max_episode_steps=3), index=2)
    with pytest.raises(EnvError, match=r"^environment 2, episode 1, step 0: observation 'obs' holds NaN"):
        env.reset()
    env, found = make_env(chain("own_wrappers:Double", max_episode_steps=3)), []
    while isinstance(env, gym.Wrapper):
        found.append(type(env).__name__)
        env = env.env
    assert found[1:4] == ["TimeLimit", "CheckedEnv", "Double"]


def test_wrappers_of_gymnasium_reach_every_copy():
    stack = [{"gymnasium.wrappers:FrameStackObservation": {"stack_size": 3}}, "gymnasium.wrappers:FlattenObservation"]
    venv = make_vec(EnvConfig(id="CartPole-v1", wrappers=stack), 2, seed=0)
    assert venv.reset().shape == (2, 12)
    venv.close()


WRONG = {
    "no list": ("own_wrappers:Add", ConfigError, r"'wrappers': should be a list of module:Class"),
    "no class": (["Add"], ConfigError, "'Add' names no class.*module:Class"),
    "of gymnasium": (["ClipAction"], ConfigError, "Did you mean 'gymnasium.wrappers:ClipAction'"),
    "two at once": ([{"a:B": {}, "c:D": {}}], ConfigError, "names no wrapper"),
    "number": ([3], ConfigError, "3 names no wrapper"),
    "arguments": ([{"own_wrappers:Add": 3}], ConfigError, "has 3 for arguments"),
    "no module": (
        ["own_wrapers:Add"],
        ConfigError,
        r"'own_wrapers' could not be imported.*Did you mean 'own_wrappers'.*own_wrapers\.py",
    ),
    "no submodule": (["gymnasium.wraper:ClipAction"], ConfigError, "Did you mean 'gymnasium.wrappers'"),
    "no attribute": (["own_wrappers:Ad"], ConfigError, "has no attribute 'Ad'.*Did you mean 'Add'"),
    "renamed": (["gymnasium.wrappers:FrameStack"], ConfigError, "has been renamed.*'FrameStackObservation'"),
    "function": (["own_wrappers:function"], ConfigError, "is of type function; expected a subclass of gymnasium.Wrapper"),
    "another class": (["subprocess:Popen"], ConfigError, "is the class Popen; expected a subclass"),
    "unknown argument": (
        [{"own_wrappers:Add": {"buy": 1}}],
        ConfigError,
        "'buy': 1.*Did you mean 'by'.*Expected values for by, times",
    ),
    "missing argument": (["own_wrappers:Add"], ConfigError, "missing a required argument: 'by'"),
    "constructor": (
        ["own_wrappers:Refuses"],
        EnvError,
        "environment 0: '.*Chain-v0' could not be wrapped in own_wrappers:Refuses: it raised AssertionError: not around this one",
    ),
    "package": (["own_wrappers:Lacks"], EnvError, r"raised ModuleNotFoundError.*Install 'nosuchpkg'\."),
}


@pytest.mark.parametrize("wrappers, error, said", WRONG.values(), ids=list(WRONG))
def test_a_wrapper_that_does_not_fit_is_an_error_with_a_remedy(wrappers, error, said):
    with pytest.raises(error, match=said):
        make_env(EnvConfig(id=CHAIN, wrappers=wrappers))
    module = sys.modules.get("own_wrappers")
    assert module is None or not module.called, "a function was called"
    assert "could not be wrapped" not in said or len(module.closed) == 1, "the environment was left open"


def test_an_absent_package_of_a_wrapper_is_named_with_our_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(MissingExtraError, match=r"worldmodel\[atari\]"):
        make_env(EnvConfig(id="CartPole-v1", wrappers=["gymnasium.wrappers:AtariPreprocessing"]))


def test_reading_a_config_imports_no_wrapper():
    config = Config.from_recipe(CHAIN, ["env.wrappers=[{own_wrappers:Add: {by: 3}}, own_wrappers:Double]"])
    assert config.env.wrappers == ({"own_wrappers:Add": {"by": 3}}, "own_wrappers:Double")
    assert Config.from_saved(config.to_yaml()) == config and "own_wrappers" not in sys.modules
    assert chain({"own_wrappers:Double": {}}) == chain({"own_wrappers:Double": None}) == chain("own_wrappers:Double")


def test_wrappers_keys_and_categories_belong_to_what_an_environment_is(tmp_path):
    wrappers = [{"own_wrappers:Add": {"by": 1}}]
    run = small_train(tmp_path / "run", 30, options={"env.wrappers": wrappers, "eval.every": 0}).run
    found = sources.recording(run)
    assert found.env_options == {"wrappers": wrappers} and _env_spec(found) is None
    found.write(tmp_path / "a.npz")
    assert sources.recording(tmp_path / "a.npz").env_options == {"wrappers": wrappers}
    with pytest.raises(ConfigError, match=r"env\.wrappers"):
        small_train(run, 60, resume=True, options={"env.wrappers": []})
    assert small_train(run, 40, resume=True, options={"env.wrappers": wrappers, "eval.every": 0}).real_steps == 40
    assert EnvConfig(id="A-v0", ignore=["a"], categories={"b": [2]}).options == {"ignore": ["a"], "categories": {"b": [2]}}


# Keys that are left out -------------------------------------------------------------------------------------------------


def grid(**options):
    return EnvConfig(id="Small-v0", **options)


def test_ignored_keys_are_neither_observed_nor_checked():
    with pytest.raises(UnsupportedSpaceError, match=r"'mission' is a Text.*env\.ignore=\[mission\]"):
        make_env(grid())
    env = make_env(grid(ignore=["mission"], layout="vector"), seed=0)
    obs, _ = env.reset()
    assert env.observation_space.spaces.keys() == obs.keys() == {"direction", "image"}
    assert env.observation_space.contains(env.step(0)[0])
    with pytest.raises(UnsupportedSpaceError) as single:
        FlattenSpaces(Spaced(spaces.Text(3)))
    assert "env.ignore" not in str(single.value)


class Spaced(gym.Env):
    action_space = spaces.Discrete(2)

    def __init__(self, space):
        self.observation_space = space


@pytest.mark.parametrize(
    ("ignore", "kept"),
    [
        (["arm.word"], ["arm.angle", "pair.0", "pair.1"]),
        (["arm"], ["pair.0", "pair.1"]),
        (["pair.0", "arm.word"], ["arm.angle", "pair.1"]),
    ],
)
def test_nested_keys_are_left_out_by_their_flat_names(ignore, kept):
    one = spaces.Discrete(2)
    nested = spaces.Dict(arm=spaces.Dict(angle=one, word=spaces.Text(3)), pair=spaces.Tuple([one, one]))
    checked = CheckedEnv(Spaced(nested), ignore=ignore)
    checked.env.reset = lambda seed: ({"arm": {"angle": 1, "word": "a long one"}, "pair": (0, 1)}, {})
    env = FlattenSpaces(checked, ignore=ignore)
    assert sorted(env.observation_space.spaces) == sorted(env.reset()[0]) == kept


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ignore": ["misson"]}, r"env.ignore: .* no key 'misson'\. Did you mean 'mission'\?"),
        ({"ignore": ["x"]}, "Known: direction, image, mission"),
        ({"ignore": ["image", "mission", "direction"]}, "all keys of the observation"),
        ({"id": "CartPole-v1", "ignore": ["mission"]}, "has no keys. Leave env.ignore out"),
        ({"pixels": 64, "ignore": ["mission"]}, "pixels replaces the observation, so ignore would do nothing"),
        ({"pixels": 64, "categories": {"image": [3]}}, "categories would do nothing"),
        ({"ignore": ["mission", "image"], "categories": {"image": [11, 6, 3]}}, "env.categories: .* no key 'image'"),
    ],
)
def test_keys_that_cannot_be_left_out_are_an_error(options, said):
    with pytest.raises(ConfigError, match=said):
        make_env(EnvConfig(**{"id": "Small-v0", **options}))


# Integers that are categories -------------------------------------------------------------------------------------------


def test_integers_become_categories_and_stay_the_same_numbers():
    env = make_env(grid(ignore=["mission"], categories={"image": [11, 6, 3]}), seed=0)
    bare, obs = Grid().reset(seed=0)[0], env.reset()[0]
    key = ObsSpec.from_space(env.observation_space).keys["image"]
    assert key.kind == "categorical" and key.sizes == (11, 6, 3) * 4 and key.raw_dtype == np.uint8
    np.testing.assert_array_equal(obs["image"], bare["image"])
    assert obs["image"].dtype == np.uint8 and env.observation_space.contains(obs)
    one_hot = key.canonical(torch.as_tensor(obs["image"]))
    assert one_hot.sum() == 12
    np.testing.assert_array_equal(key.raw(one_hot), obs["image"])
    wild = key.raw(torch.randn(50, *key.shape, generator=torch.Generator().manual_seed(0)) * 1e4)
    assert all(env.observation_space["image"].contains(one) for one in wild)


def test_a_number_that_is_no_category_is_named_with_its_place():
    env = make_env(grid(ignore=["mission"], categories={"image": [3, 6, 3]}), seed=0)
    with pytest.raises(EnvError, match=r"step 0: observation 'image' (holds \d+ at \[|is \[\[\[)"):
        env.reset()
    grown = CheckedEnv(Spaced(spaces.Box(0, 255, (5, 5, 1), np.uint8)), categories=[3])
    grown.env.reset = lambda seed: (np.pad(np.full((1, 1, 1), 7, np.uint8), ((2, 2), (1, 3), (0, 0))), {})
    with pytest.raises(EnvError, match=r"'obs' holds 7 at \[2, 1, 0\]; expected 0 to 2 there.*env\.categories"):
        grown.reset()


FORMS = {
    "one size for all": (spaces.Box(0, 9, (2, 2), np.int32), [5], spaces.MultiDiscrete([[5, 5], [5, 5]], dtype=np.int32)),
    "from below zero": (spaces.Box(-2, 9, (2,), np.int8), [4, 12], spaces.MultiDiscrete([4, 12], np.int8, start=[-2, -2])),
    "a whole byte": (spaces.Box(0, 255, (2,), np.uint8), [256], spaces.MultiDiscrete([256, 256])),
    "no dimensions": (spaces.Box(1, 9, (), np.int64), [9], spaces.Discrete(9, start=1)),
}


@pytest.mark.parametrize("box, sizes, expected", FORMS.values(), ids=list(FORMS))
def test_sizes_are_counted_from_the_lower_bound_along_the_last_side(box, sizes, expected):
    env = FlattenSpaces(Spaced(box), plain=False, categories=sizes)
    assert env.observation_space == expected and ObsSpec.from_space(expected).keys["obs"].kind == "categorical"
    assert FlattenSpaces(Spaced(spaces.Dict(a=box)), plain=False, categories={"a": sizes}).observation_space["a"] == expected
    assert FlattenSpaces(Spaced(box), plain=False, categories={"obs": sizes}).observation_space == expected


@pytest.mark.parametrize(
    ("categories", "said"),
    [
        ({"imag": [3]}, "no key 'imag'. Did you mean 'image'"),
        ({"mission": [3]}, "env.categories.mission: Text.* is no Box of integers"),
        ({"direction": [4]}, r"env.categories.direction: Discrete\(4\) is no Box of integers"),
        ({"image": [11, 6]}, r"is \[11, 6\]; expected at least 1 category for each of the 3 numbers"),
        ({"image": [11, 6, 0]}, "at least 1 category"),
        ({"image": []}, "at least 1 category"),
        ({"image": [257, 6, 3]}, "exceeds the bounds"),
        ([11, 6, 3], r"is a list, and the observation has the keys \['direction', 'image', 'mission'\]"),
        ({"image": [1.5]}, "'categories"),
    ],
)
def test_sizes_that_do_not_fit_are_an_error(categories, said):
    with pytest.raises(ConfigError, match=said):
        make_env(grid(ignore=["mission"], categories=categories))


def test_minigrids_own_observations_are_categories_and_wrapped_ones_are_left_alone():
    own = EnvConfig(id="MiniGrid-Small-v0", ignore=["mission"])
    assert ObsSpec.from_space(make_env(own).observation_space).keys["image"].sizes == (11, 6, 3) * 4
    for other in ({"categories": {}}, {"wrappers": ["gymnasium:Wrapper"]}):
        assert isinstance(make_env(own.model_copy(update=other)).observation_space["image"], spaces.Box)
    assert list(make_env(EnvConfig(id="MiniGrid-Small-v0", ignore=["mission", "image"])).observation_space.spaces) == ["direction"]


@pytest.mark.parametrize("kind", [{}, {"model": "anchored"}], ids=["dreamer", "anchored"])
def test_a_world_model_predicts_categories_and_decodes_valid_integers(kind, tmp_path):
    options = {**OPTIONS, "env.ignore": ["mission", "direction"], "eval.every": 0}
    options = {key: value for key, value in options.items() if not (kind and key.startswith("model."))} | kind
    folder = small_train(tmp_path / "run", 30, "MiniGrid-Small-v0", options=options).run
    world = Run.open(folder).world_model()
    key = world.obs.keys["image"]
    feature = world.feature(world.initial(6)) if not hasattr(world, "dynamics") else world.dynamics.feature(world.initial(6))
    probs = world.decoder.mean(feature)["image"]
    for part in probs.split(key.sizes, -1):
        torch.testing.assert_close(part.sum(-1), torch.ones(6))
    decoded = key.raw(probs)
    assert decoded.shape == (6, 2, 2, 3) and decoded.dtype == np.uint8 and (decoded < [11, 6, 3]).all()
    assert world.decoder.likelihoods["image"] == "categorical"
    assert json.loads(json.dumps(sources.recording(folder).env_options)) == {"ignore": ["mission", "direction"]}


def test_minigrid_itself_plays():
    pytest.importorskip("minigrid")
    with pytest.raises(UnsupportedSpaceError, match=r"env\.ignore=\[mission\]"):
        make_env("MiniGrid-DoorKey-5x5-v0")
    env = make_env(EnvConfig(id="MiniGrid-DoorKey-5x5-v0", ignore=["mission"]), seed=0)
    obs, _ = env.reset()
    for _ in range(50):
        assert env.observation_space.contains(obs) and obs["image"].shape == (7, 7, 3)
        obs, _, terminated, truncated, _ = env.step(env.action_space.sample())
        obs = env.reset()[0] if terminated or truncated else obs
    from minigrid.core.constants import COLOR_TO_IDX, OBJECT_TO_IDX, STATE_TO_IDX

    sizes = ObsSpec.from_space(env.observation_space).keys["image"].sizes[:3]
    assert sizes == (len(OBJECT_TO_IDX), len(COLOR_TO_IDX), len(STATE_TO_IDX))


def test_the_limit_of_a_registered_environment_counts_around_wrappers():
    env = make_env(EnvConfig(id="Small-v0", ignore=["mission"], wrappers=["gymnasium:Wrapper"]), seed=0)
    env.reset()
    assert [env.step(0)[3] for _ in range(8)] == [False] * 7 + [True]
    assert isinstance(env, gym.Wrapper) and TimeLimit.__name__ in str(env)
