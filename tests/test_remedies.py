"""Every error names what is wrong, and the remedy that it names is done here, and helps."""

import multiprocessing
import re
import sys
import types
from pathlib import Path

import gymnasium
import numpy
import numpy as np
import pytest
import tomllib
from conftest import small_world
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers.vector import NormalizeObservation

from worldmodel.envs import (
    EnvConfig,
    FlattenSpaces,
    GymVecEnvAdapter,
    ImaginedVectorEnv,
    as_vec_env,
    extras,
    make_vec,
    minari,
    sources,
)
from worldmodel.envs.make import find_spec, make_env
from worldmodel.envs.vectors import workers
from worldmodel.envs.vectors.workers import WorkerVecEnv
from worldmodel.envs.wrappers import RenderObservation
from worldmodel.errors import ConfigError, EnvError, MissingExtraError, UnsupportedSpaceError
from worldmodel.spaces import ActionSpec, ObsSpec
from worldmodel.storage.recording import Recording

BOX = spaces.Box(-1, 1, (2,), np.float32)


class Env(gymnasium.Env):
    """Observes elements of its space, or what it is given."""

    def __init__(self, obs=BOX, act=None, given=None, render_mode=None):
        self.observation_space, self.action_space, self.given = obs, act or spaces.Discrete(2), given
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self._obs(), {}

    def step(self, action):
        return self._obs(), 1.0, False, False, {}

    def _obs(self):
        return self.observation_space.sample() if self.given is None else self.given

    def render(self):
        return np.zeros((40, 40, 3), np.uint8)


def plays(env):
    """Steps it as training would, and reads what it returns."""
    venv = as_vec_env(env)
    spec, action = ObsSpec.from_space(venv.observation_space), ActionSpec.from_space(venv.action_space)
    spec.check(spec.to_raw(venv.reset()))
    spec.check(spec.to_raw(venv.step(action.decode(action.sample(1, np.random.default_rng(0))))[0]))


def observed(space, layout=None):
    return ObsSpec.from_space(space, layout)


def image(*shape, low=0, high=255, dtype=np.uint8):
    return spaces.Box(low, high, shape, dtype)


NESTED = spaces.Dict(a=spaces.Dict(b=BOX))
TEXT = spaces.Dict(a=BOX, t=spaces.Text(4))
WIDE = spaces.Box(-np.inf, np.inf, (2,), np.float32)
FAR = np.array([1e39, 0])
w = gymnasium.wrappers
REFUSALS = (ConfigError, EnvError, UnsupportedSpaceError)


def halves():
    return Env(image(2), given=np.array([0.5, 1.0]))


def several(mode, **options):
    return gymnasium.make_vec("CartPole-v1", 2, vectorization_mode=mode, **options)


def imagined(**options):
    return ImaginedVectorEnv(small_world(), 2, 1, start="prior", **options)


def over(begin):
    env = imagined(autoreset_mode=AutoresetMode.DISABLED)
    env.reset()
    *_, terminated, truncated, _ = env.step(np.zeros(2, np.int64))
    begin(env, terminated, truncated)
    env.step(np.zeros(2, np.int64))


# what is wrong: (what raises, the remedy in its words, the remedy done)
REMEDIES = {
    "ambiguous: hwc": (lambda: observed(image(3, 64, 3)), "env.layout=hwc", lambda: observed(image(3, 64, 3), "hwc")),
    "ambiguous: chw": (lambda: observed(image(3, 64, 3)), "chw", lambda: observed(image(3, 64, 3), "chw")),
    "ambiguous: vector": (lambda: observed(image(3, 64, 3)), "or vector", lambda: observed(image(3, 64, 3), "vector")),
    "no channels": (lambda: observed(image(24, 20, 17)), "env.layout=hwc", lambda: observed(image(24, 20, 17), "hwc")),
    "four sides": (lambda: observed(image(2, 20, 24, 3)), "env.layout=vector", lambda: observed(image(2, 20, 24, 3), "vector")),
    "bounds of a picture": (
        lambda: plays(Env(image(20, 20, 3, low=-1, high=1, dtype=np.float32))),
        "RescaleObservation",
        lambda: plays(w.RescaleObservation(Env(image(20, 20, 3, low=-1, high=1, dtype=np.float32)), np.float32(0), np.float32(1))),
    ),
    "dtype of a picture": (
        lambda: plays(Env(image(20, 20, 3, dtype=np.int32))),
        "Convert it with gymnasium.wrappers.TransformObservation",
        lambda: plays(
            w.TransformObservation(Env(image(20, 20, 3, dtype=np.int32)), lambda x: x.astype(np.uint8), image(20, 20, 3))
        ),
    ),
    "nothing in it": (
        lambda: plays(Env(spaces.Dict(a=BOX, b=image(0)))),
        "FilterObservation",
        lambda: plays(w.FilterObservation(Env(spaces.Dict(a=BOX, b=image(0))), ["a"])),
    ),
    "text": (lambda: plays(Env(TEXT)), "FilterObservation", lambda: plays(w.FilterObservation(Env(TEXT), ["a"]))),
    "nested": (lambda: observed(NESTED), "worldmodel.envs.FlattenSpaces", lambda: plays(FlattenSpaces(Env(NESTED)))),
    "actions without bounds": (
        lambda: plays(Env(act=WIDE)),
        r"gymnasium.wrappers.TransformAction with a bounded Box, for example Box(-1, 1)",
        lambda: plays(w.TransformAction(Env(act=WIDE), lambda a: a, BOX)),
    ),
    "too far": (
        lambda: plays(Env(given=FAR)),
        "Rescale the observation",
        lambda: plays(w.TransformObservation(Env(given=FAR), lambda x: x / 1e39, BOX)),
    ),
    "no whole numbers": (
        lambda: plays(halves()),
        "gymnasium.wrappers.DtypeObservation",
        lambda: plays(w.DtypeObservation(halves(), np.float32)),
    ),
    "pixels of what does not render": (
        lambda: RenderObservation(Env()),
        "Pass render_mode='rgb_array'",
        lambda: plays(RenderObservation(Env(render_mode="rgb_array"))),
    ),
    "begun one step late": (
        lambda: GymVecEnvAdapter(gymnasium.wrappers.vector.TransformReward(several("vector_entry_point"), abs)),
        "vectorization_mode='sync', vector_kwargs={'autoreset_mode': ...}",
        lambda: GymVecEnvAdapter(several("sync", vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP})).reset(),
    ),
    "rows that cannot begin alone": (
        lambda: GymVecEnvAdapter(NormalizeObservation(several("sync"))).reset(),
        "gymnasium.wrappers.NormalizeObservation in env_fns",
        lambda: GymVecEnvAdapter(SyncVectorEnv([lambda: w.NormalizeObservation(gymnasium.make("CartPole-v1"))] * 2)).reset(),
    ),
    "worlds that are over": (
        lambda: over(lambda *_: None),
        "reset(options={'reset_mask': terminated | truncated})",
        lambda: over(lambda env, terminated, truncated: env.reset(options={"reset_mask": terminated | truncated})),
    ),
    "an unknown mode": (
        lambda: imagined(autoreset_mode="NextStp"),
        "Did you mean 'NextStep'",
        lambda: imagined(autoreset_mode="NextStep"),
    ),
}


@pytest.mark.parametrize("raises, remedy, done", REMEDIES.values(), ids=list(REMEDIES))
def test_the_remedy_that_an_error_names_helps(raises, remedy, done):
    with pytest.raises(REFUSALS, match=re.escape(remedy)):
        raises()
    done()


FRAMES = {
    "frames first, channels last": ((2, 20, 24, 3), lambda x: np.concatenate(list(x), -1)),
    "frames first, channels second": ((2, 3, 20, 24), lambda x: np.concatenate(list(x), 0)),
    "frames last": ((20, 24, 3, 2), lambda x: np.stack([x[..., c, f] for c in range(3) for f in range(2)], -1)),
}


@pytest.mark.parametrize("shape, right", FRAMES.values(), ids=list(FRAMES))
def test_the_wrapper_named_for_stacked_colour_frames_leaves_each_pixel_at_its_place(shape, right):
    frames = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    env = Env(image(*shape), given=frames)
    with pytest.raises(REFUSALS) as error:
        plays(env)
    code = re.search(r"gymnasium\.wrappers\.\w+\(env.*\)", str(error.value))[0]
    wrapped = eval(code, {"env": env, "gymnasium": gymnasium, "numpy": numpy})
    plays(wrapped)
    np.testing.assert_array_equal(wrapped.reset()[0], right(frames))


OTHER_FILES = {"HDF5": b"\x89HDF\r\n\x1a\n", "NumPy": b"\x93NUMPY", "pickle": b"\x80\x05", "gzip": b"\x1f\x8b", "Parquet": b"PAR1"}


@pytest.mark.parametrize("kind", OTHER_FILES)
def test_a_file_of_another_kind_is_named_so_and_not_called_damaged(kind, tmp_path):
    (tmp_path / "hopper.data").write_bytes(OTHER_FILES[kind] + bytes(99))
    with pytest.raises(ConfigError, match=rf"is an? .*{kind}") as error:
        sources.recording(tmp_path / "hopper.data")
    assert "copy" not in str(error.value)


def test_both_ways_from_hdf5_to_a_recording_are_open(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    (tmp_path / "hopper.hdf5").write_bytes(OTHER_FILES["HDF5"])
    with pytest.raises(ConfigError, match=r"minari:ID.*from_episodes\(observation_space, action_space, episodes\)\.write\(FILE\)"):
        sources.recording(tmp_path / "hopper.hdf5")
    episode = {"observations": np.zeros((4, 2), np.float32), "actions": np.zeros(3, np.int64), "rewards": np.ones(3)}
    episode |= {"terminations": np.array([False, False, True]), "truncations": np.zeros(3, bool)}
    Recording.from_episodes(BOX, spaces.Discrete(2), [episode]).write(tmp_path / "a.npz")
    recording = sources.recording(tmp_path / "a.npz")
    minari.write("toy/some-v0", recording)
    assert sources.recording("minari:toy/some-v0").lengths.tolist() == recording.lengths.tolist() == [3]


SCRIPT = "import multiprocessing\n{}multiprocessing.get_context('spawn').Process(target=print).start()\n"


@pytest.mark.parametrize("guard, helps", [("", False), ("if __name__ == '__main__': ", True)], ids=["without", "with"])
def test_a_script_without_a_main_guard_is_named_and_the_guard_helps(guard, helps, tmp_path, monkeypatch):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(guard))
    main = types.ModuleType("__main__")
    main.__file__ = str(script)
    monkeypatch.setitem(sys.modules, "__main__", main)
    process = multiprocessing.get_context("spawn").Process(target=int)  # light: workers are started in the same way
    process.start()
    process.join()
    assert process.exitcode == (0 if helps else 1)
    if helps:
        assert workers.main_guard_hint(None) == ""
    else:
        with pytest.raises(EnvError, match=r"runs script\.py from its top.*if __name__ == \"__main__\":.*env\.vectorize=dummy"):
            WorkerVecEnv([gymnasium.envs.classic_control.CartPoleEnv], start_method="spawn")
        make_vec(EnvConfig(id="CartPole-v1", vectorize="dummy"), 1).close()
    assert multiprocessing.active_children() == []


EXTRAS = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["optional-dependencies"]


@pytest.mark.parametrize("module", extras.EXTRAS)
def test_an_extra_is_named_only_where_its_package_is_absent(module, monkeypatch):
    gone = ModuleNotFoundError(f"No module named '{module}'", name=module)
    wrapped = gymnasium.error.DependencyNotInstalled(f"{module} is not installed, run `pip install gymnasium[x]`")
    monkeypatch.setitem(sys.modules, module, None)
    for error in (gone, wrapped):
        extra = re.search(r"pip install 'worldmodel\[(\w+)\]'", str(extras.missing_extra(error)))[1]
        assert EXTRAS[extra], "the extra brings nothing"
    there = types.ModuleType(module)
    there.__spec__ = types.SimpleNamespace(name=module)
    monkeypatch.setitem(sys.modules, module, there)
    assert extras.missing_extra(gone) is None and extras.missing_extra(wrapped) is None


@pytest.mark.parametrize(
    "error",
    [
        ImportError("mujoco v2 environments have moved: pip install gymnasium-robotics"),
        ModuleNotFoundError("No module named 'mujoco_maze'", name="mujoco_maze"),
        ModuleNotFoundError("No module named 'pygame_menu'", name="pygame_menu"),
        gymnasium.error.DependencyNotInstalled("mujocolike is not installed"),
    ],
)
def test_a_name_in_passing_is_no_absence(error, monkeypatch):
    for module in extras.EXTRAS:
        monkeypatch.setitem(sys.modules, module, None)
    assert extras.missing_extra(error) is None


def test_a_version_that_is_gone_names_the_newest_and_that_one_plays(monkeypatch):
    def gone(**_):
        raise ImportError("MuJoCo v2 environments have moved to gymnasium-robotics")

    registry = dict(gymnasium.registry)
    monkeypatch.setattr(gymnasium.envs.registration, "registry", registry)
    monkeypatch.setattr(gymnasium, "registry", registry)
    for version in (2, 4, 10):
        gymnasium.register(f"Cheetah-v{version}", Env if version == 10 else gone)
    with pytest.raises(EnvError, match=r"moved to gymnasium-robotics\. Use '([^']*)'") as error:
        make_env("Cheetah-v2")
    plays(make_env(re.search("Use '([^']*)'", str(error.value))[1]))


def test_what_an_environment_lacks_is_named_and_no_other_version_of_it(monkeypatch):
    def lacks(**_):
        raise ModuleNotFoundError("No module named 'nosuchpkg'", name="nosuchpkg")

    def broken(**_):
        raise RuntimeError("a bug")

    registry = dict(gymnasium.registry)
    monkeypatch.setattr(gymnasium.envs.registration, "registry", registry)
    monkeypatch.setattr(gymnasium, "registry", registry)
    gymnasium.register("Lacks-v0", lacks), gymnasium.register("Lacks-v1", lacks)
    gymnasium.register("Broken-v0", broken), gymnasium.register("Broken-v1", broken)
    with pytest.raises(EnvError, match=r"Install 'nosuchpkg'\.$"):
        make_env("Lacks-v0")
    with pytest.raises(EnvError, match=r"Correct the environment or env\.kwargs\.$"):
        make_env("Broken-v0")


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import nosuchpkg", r"is there, and importing it raised ModuleNotFoundError.*Install 'nosuchpkg'"),
        ("from numpy import nosuch", r"is there, and importing it raised ImportError.*Correct it"),
        ("def f(:", r"is there, and importing it raised SyntaxError.*Correct it"),
        ("x = undefined", r"is there, and importing it raised NameError.*Correct it"),
        ("raise SystemExit(3)", r"is there, and importing it raised SystemExit.*Correct it"),
    ],
)
def test_a_module_that_is_there_and_broken_is_not_called_absent(code, said, tmp_path, monkeypatch):
    (tmp_path / "own_and_broken.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(EnvError, match=said):
        find_spec("own_and_broken:Own-v0")


def test_a_package_that_is_there_and_broken_is_not_called_absent(tmp_path, monkeypatch):
    (tmp_path / "minigrid.py").write_text("raise ImportError('cannot load libGL.so')")
    monkeypatch.delitem(sys.modules, "minigrid", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(EnvError, match="'minigrid', which is installed and cannot be imported: cannot load libGL") as error:
        find_spec("MiniGrid-Nowhere-v0")
    assert not isinstance(error.value, MissingExtraError)
    (tmp_path / "minigrid.py").write_text("")
    with pytest.raises(ConfigError, match="not registered"):  # repaired, it registers nothing: another error, about the id
        find_spec("MiniGrid-Nowhere-v0")


def test_another_package_that_minari_lacks_is_named_itself():
    error = minari._missing(ModuleNotFoundError("No module named 'pyarrow'", name="pyarrow"))
    assert "'pyarrow'" in str(error) and "pip install pyarrow" in str(error)
