"""Sources of recorded experience: Minari's data sets, NPZ files, folders and runs."""

from __future__ import annotations

import dataclasses
import sys

import gymnasium as gym
import numpy as np
import pytest
from conftest import CHAIN, IMAGE, VECTOR, Toy
from gymnasium import spaces
from small_runs import small_train
from test_recording import ACTIONS, OBSERVATIONS, assert_same, toy_recording

from worldmodel.envs import minari, sources
from worldmodel.envs.make import EnvConfig, as_vec_env
from worldmodel.errors import ConfigError, CorruptError, MissingExtraError, UnsupportedSpaceError
from worldmodel.storage.recording import Recording


@pytest.fixture(autouse=True)
def _datasets(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setitem(sys.modules, "jax", None)  # importing it is an error from here on


FORMS = {**OBSERVATIONS, "picture": spaces.Box(0, 255, (40, 40, 3), np.uint8)}


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("observation", FORMS)
def test_file_minari_and_file_again_are_equal(observation, action, tmp_path):
    recording = toy_recording(FORMS[observation], ACTIONS[action], env_id=CHAIN)
    recording.write(tmp_path / "a.npz")
    minari.write("toy/random-v0", sources.recording(tmp_path / "a.npz"))
    back = sources.recording("minari:toy/random-v0")
    assert back.origin == "minari:toy/random-v0" and back.env_id == CHAIN
    back.write(tmp_path / "b.npz")
    assert_same(recording, Recording.read(tmp_path / "b.npz"))


def test_minari_itself_reads_what_was_written():
    import minari as library

    recording = toy_recording(OBSERVATIONS["dict"], ACTIONS["box"], env_id=CHAIN)
    minari.write("toy/random-v0", recording)
    dataset = library.load_dataset("toy/random-v0")
    assert dataset.total_episodes == 3 and dataset.total_steps == 15
    assert dataset.observation_space == recording.obs_spec.space and dataset.action_space == ACTIONS["box"]
    assert dataset.recover_environment().unwrapped.length == 5
    episode = next(iter(dataset.iterate_episodes()))
    np.testing.assert_array_equal(episode.observations["camera"], recording.obs["camera"][:6])
    np.testing.assert_array_equal(episode.rewards, [0, 0.5, 1, 1.5, 2])
    assert episode.terminations.tolist() == [False] * 4 + [True] and not episode.truncations.any()


def library_dataset(observation, action, observations, actions, **given):
    """A data set of one episode of 3 steps as others write it: float64 rewards, no flag at the end."""
    import minari as library
    from minari.data_collector.episode_buffer import EpisodeBuffer

    no = np.zeros(3, bool)
    episode = EpisodeBuffer(observations=observations, actions=actions, rewards=[0.1, 0.2, 0.3], terminations=no, truncations=no)
    library.create_dataset_from_buffers(
        "others/set-v0", [episode], observation_space=observation, action_space=action, description="", **given
    )


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_nested_spaces_arrive_flat_and_categories_as_the_environment_gives_them():
    observation = spaces.Dict({"arm": spaces.Dict({"q": VECTOR}), "grip": spaces.Tuple([spaces.Discrete(3, start=1)])})
    action = spaces.Discrete(2, start=5)
    q = np.arange(16, dtype=np.float32).reshape(4, 4) / 16
    library_dataset(observation, action, {"arm": {"q": q}, "grip": (np.array([1, 2, 3, 1]),)}, np.array([5, 6, 5]))
    found = sources.recording("minari:others/set-v0")
    env = as_vec_env(Toy(observation, action))
    assert found.obs_spec.space == env.observation_space and found.action_spec.space == action
    np.testing.assert_array_equal(found.obs["arm.q"], q)
    np.testing.assert_array_equal(found.obs["grip.0"], [1, 2, 3, 1])
    assert found.action.tolist() == [5, 6, 5] and found.truncated.tolist() == [False, False, True]
    assert found.reward.dtype == np.float32 and found.env_id is None


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_minaris_data_are_seen_as_the_environment_is():
    observation = spaces.Dict(image=spaces.Box(0, 255, (2, 2, 3), np.uint8), speed=VECTOR)
    image = np.arange(48, dtype=np.uint8).reshape(4, 2, 2, 3) % 3
    library_dataset(observation, spaces.Discrete(2), {"image": image, "speed": np.zeros((4, 4))}, np.array([0, 1, 0]))
    env = EnvConfig(id="MiniGrid-Any-v0", ignore=["speed"])
    for declared, sizes in ((env, (11, 6, 3)), (env.model_copy(update={"categories": {"image": (3,)}}), (3, 3, 3))):
        found = sources.recording("minari:others/set-v0", None, declared.declared)
        assert list(found.obs_spec.keys) == ["image"] and found.obs_spec.keys["image"].sizes == sizes * 4
        np.testing.assert_array_equal(found.obs["image"], image)
    narrow = env.model_copy(update={"categories": {"image": (2,)}})
    with pytest.raises(ConfigError, match="episode 0, step 0: observation 'image' holds 2"):
        sources.recording("minari:others/set-v0", None, narrow.declared)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_ambiguous_picture_asks_for_its_layout_and_takes_it():
    observation = spaces.Box(0, 255, (4, 40, 4), np.uint8)
    library_dataset(observation, spaces.Discrete(2), np.zeros((4, 4, 40, 4), np.uint8), np.array([0, 1, 0]))
    with pytest.raises(UnsupportedSpaceError, match=r"layout=hwc"):
        sources.recording("minari:others/set-v0")
    assert sources.recording("minari:others/set-v0", "chw").obs_spec.keys["obs"].layout == "chw"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_nan_in_minari_is_refused_with_its_place():
    obs = np.zeros((4, 4), np.float32)
    obs[2, 1] = np.nan
    library_dataset(VECTOR, spaces.Discrete(2), obs, np.array([0, 1, 0]))
    with pytest.raises(ConfigError, match="minari:others/set-v0: episode 0, step 2: observation 'obs' is not a finite"):
        sources.recording("minari:others/set-v0")


def test_an_absent_data_set_names_near_ones(tmp_path):
    with pytest.raises(ConfigError, match=r"There is none.*minari download.*MINARI_DATASETS_PATH"):
        sources.recording("minari:toy/random-v0")
    minari.write("toy/random-v0", toy_recording())
    with pytest.raises(ConfigError, match=r"Did you mean 'toy/random-v0'\?"):
        sources.recording("minari:toy/randm-v0")
    with pytest.raises(ConfigError, match="There are 1: toy/random-v0"):
        sources.recording("minari:quite/another-v3")


def test_a_data_set_that_is_there_is_not_overwritten_and_a_malformed_id_is_refused():
    minari.write("toy/random-v0", toy_recording())
    with pytest.raises(ConfigError, match="not overwritten"):
        minari.write("toy/random-v0", toy_recording())
    with pytest.raises(ConfigError, match="no id of Minari"):
        minari.write("no id!", toy_recording())
    with pytest.raises(ConfigError, match="no id of Minari"):
        minari.write("without-version", toy_recording())


def test_a_data_set_makes_the_environment_again_as_it_was_made(tmp_path):
    import minari as library

    options = {
        "agent": "random",
        "eval.every": 0,
        "env.kwargs": {"map_name": "8x8", "is_slippery": False},
        "env.max_episode_steps": 20,
    }
    small_train(tmp_path / "run", 40, "FrozenLake-v1", options=options)
    found = sources.recording(tmp_path / "run")
    assert Recording.read(found.write(tmp_path / "lake.npz")).env_options == found.env_options
    minari.write("lake/random-v0", found)
    again = library.load_dataset("lake/random-v0").recover_environment()
    assert again.observation_space == spaces.Discrete(64) and again.spec.max_episode_steps == 20
    assert not again.unwrapped.spec.kwargs["is_slippery"]
    wrapped = dataclasses.replace(found, env_options={"pixels": 64})
    minari.write("lake/pixels-v0", wrapped)
    assert library.load_dataset("lake/pixels-v0").env_spec is None  # no spec can name our wrappers


def test_a_failed_export_leaves_nothing(monkeypatch, tmp_path):
    import minari as library

    def full(*_, **__):
        (tmp_path / "minari/toy/random-v0").mkdir(parents=True)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(library, "create_dataset_from_buffers", full)
    monkeypatch.setattr("inspect.signature", lambda function: type("S", (), {"parameters": {}}))
    with pytest.raises(OSError, match="Free some disk space"):
        minari.write("toy/random-v0", toy_recording())
    assert not (tmp_path / "minari/toy/random-v0").exists()


def test_a_damaged_data_set_is_named_and_none_makes_an_environment(tmp_path, monkeypatch):
    monkeypatch.setattr(gym, "make", lambda *_, **__: pytest.fail("an environment was made"))
    folder = minari.write("toy/random-v0", toy_recording(env_id=CHAIN)) / "data"
    data = (folder / "main_data.hdf5").read_bytes()
    (folder / "main_data.hdf5").write_bytes(data[: len(data) // 2])
    with pytest.raises(CorruptError, match=r"minari:toy/random-v0 in .* cannot be read"):
        sources.recording("minari:toy/random-v0")
    (folder / "metadata.json").write_text('{"env_spec": "{}"}')
    with pytest.raises(ConfigError, match="says nothing of its spaces"):
        sources.recording("minari:toy/random-v0")


@pytest.mark.parametrize("absent", ["minari", "h5py"])
def test_without_minari_the_extra_is_named(absent, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises(MissingExtraError, match=r"worldmodel\[data\]"):
        sources.recording("minari:toy/random-v0")
    with pytest.raises(MissingExtraError, match=r"worldmodel\[data\]"):
        minari.write("toy/random-v0", toy_recording())
    path = toy_recording().write(tmp_path / "a.npz")  # files need nothing
    assert sources.recording(path).episodes == 3


def test_a_folder_and_a_run_are_sources_too(tmp_path):
    result = small_train(tmp_path / "run", 30, options={"eval.every": 0})
    of_run = sources.recording(result.run)
    assert of_run.steps == 30 and of_run.env_id == CHAIN
    (tmp_path / "files").mkdir()
    for name in ("b", "a"):
        of_run.write(tmp_path / "files" / f"{name}.npz")
    both = sources.recordings([tmp_path / "files"])
    assert both.steps == 60 and both.env_id == CHAIN
    np.testing.assert_array_equal(both.obs["obs"], np.concatenate([of_run.obs["obs"]] * 2))


def test_what_is_no_source_is_refused_with_near_names(tmp_path):
    toy_recording().write(tmp_path / "walks.npz")
    with pytest.raises(ConfigError, match=r"Did you mean '.*walks.npz'\?"):
        sources.recording(tmp_path / "walk.npz")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="neither a run nor"):
        sources.recording(tmp_path / "empty")
    with pytest.raises(ConfigError, match=r"an \.npz file, a folder of them, a run folder or minari:ID"):
        sources.recording("nowhere/at/all.npz")


def test_sources_of_different_spaces_are_refused_by_name(tmp_path):
    toy_recording().write(tmp_path / "a.npz")
    toy_recording(IMAGE).write(tmp_path / "b.npz")
    with pytest.raises(ConfigError, match=r"b\.npz has the observations .* but .*a\.npz has"):
        sources.recordings([tmp_path / "a.npz", tmp_path / "b.npz"])
