"""Hostile and mistaken words: names lead nowhere else, and no config is read as anything but what it says."""

from __future__ import annotations

import re
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import yaml
from catalogue import times
from conftest import VECTOR, small_world
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_runs import CHAIN, OPTIONS
from test_config import every_config_class, one_edit_away
from test_damage import in_child, rows_of
from test_recipes import bomb
from torch.utils.tensorboard import SummaryWriter

from worldmodel.config import Config, describe
from worldmodel.config.recipes import load_yaml
from worldmodel.envs import minari, sources
from worldmodel.errors import ConfigError, StorageError, UnsupportedSpaceError
from worldmodel.storage import checkpoint
from worldmodel.storage.recording import Recording
from worldmodel.storage.replay import Replay
from worldmodel.storage.run import Run
from worldmodel.view import tensorboard

# Names ------------------------------------------------------------------------------------------------------------------

PIECES = [
    "..",
    "/",
    "\\",
    "\0",
    "\n",
    "\r",
    "\t",
    " ",
    ".",
    "-",
    "--",
    "~",
    "$HOME",
    "%2e",
    ":",
    "*",
    "?",
    "|",
    "<",
    '"',
    "'",
    ";",
    "`ls`",
]
PIECES += [
    "CON",
    "nul",
    "C:",
    "\u202e",
    "\u200b",
    "\ufeff",
    "é",
    "e\u0301",
    "\ud800",
    "a",
    "Z",
    "0",
    "x" * 300,
    "-v0",
    ".yaml",
    "obs",
    "",
]
names = st.lists(st.sampled_from(PIECES) | st.text(max_size=3), min_size=1, max_size=6).map("".join)
ATTACKS = [
    "../../../etc/passwd",
    "/etc/passwd",
    "..",
    ".",
    "",
    "a/../../b",
    "\0",
    "x" * 300,
    "-rf",
    "a\nb",
    "\u202egnp.exe",
    "C:\\x",
]
NAMED = (ConfigError, StorageError, UnsupportedSpaceError)


def hostile(examples: int) -> Callable:
    """Runs a test on so many names, the best known attacks first; always the same ones."""

    def decorate(test: Callable) -> Callable:
        test = settings(max_examples=examples, deadline=None, derandomize=True, database=None)(given(name=names)(test))
        for attack in ATTACKS:
            test = example(name=attack)(test)
        return test

    return decorate


def outside(root: Path) -> list[str]:
    """What is beside `root` in its parent, which is the test's own."""
    return sorted(str(path) for path in root.parent.rglob("*") if not path.is_relative_to(root))


def tallied(counts: Counter, act: Callable[[], Any], refusals: tuple = NAMED) -> None:
    """Counts what is taken and what is refused by a named error; any other error fails the test."""
    try:
        act()
        counts["taken"] += 1
    except refusals:
        counts["refused"] += 1


def summary(counts: Counter) -> str:
    return f"{counts['taken']:,} taken, {counts['refused']:,} refused by name"


def test_the_name_of_a_recipe_leads_to_a_folder_in_runs(tmp_path, monkeypatch, figure):
    """Teeth: with the name as it stands, `..` and `/` lead out."""
    (root := tmp_path / "here").mkdir()
    monkeypatch.chdir(root)
    base, counts = Config.from_recipe(CHAIN, OPTIONS), Counter()

    @hostile(times(500, 5_000))
    def every(name: str) -> None:
        path = Path("runs") / f"{base.model_copy(update={'recipe': name}).recipe_name}-s0"
        assert path.parent == Path("runs") and re.fullmatch(r"[a-z0-9_][a-z0-9._-]*-s0", path.name)
        counts["taken"] += 1

    every()
    for name in ATTACKS:
        tallied(counts, lambda name=name: Run.create(None, base.model_copy(update={"recipe": name}), 0).close())
    assert not outside(root) and all(path.parent == Path("runs") for path in Path("runs").iterdir())
    figure("S3", f"recipe names: {summary(counts)}; 0 paths outside of runs/")


def test_the_folder_of_a_run_may_have_any_name_or_is_refused(tmp_path, figure):
    (root := tmp_path / "here").mkdir()
    config, counts = Config.from_recipe(CHAIN, OPTIONS), Counter()

    @hostile(times(50, 500))
    def every(name: str) -> None:
        file = name.replace("/", "").strip(".") or "none"
        tallied(counts, lambda: Run.create(root / file, config, 0).close())
        tallied(counts, lambda: Run.open(root / file))

    every()
    assert not outside(root)
    figure("S3", f"run folders: {summary(counts)}; 0 paths outside of the given folder")


def recorded(key: str) -> Recording:
    space = gym.spaces.Dict({key: VECTOR, "other": gym.spaces.Discrete(3)})
    rows = {key: np.zeros((3, 4), np.float32), "other": np.arange(3)}
    ends = np.array([False, True])
    episode = {
        "observations": rows,
        "actions": np.zeros(2, int),
        "rewards": np.ones(2),
        "terminations": ends,
        "truncations": ~ends & ends,
    }
    return Recording.from_episodes(space, gym.spaces.Discrete(2), [episode])


def read_back(file: Path) -> Recording:
    """What was just written; that it cannot be read is no refusal. No member leads out of the folder where somebody extracts it."""
    with zipfile.ZipFile(file) as archive:
        assert not [name for name in archive.namelist() if ".." in re.split(r"[/\\]", name)]
    try:
        return Recording.read(file)
    except (ConfigError, StorageError) as error:
        raise AssertionError(f"{file} was written, and cannot be read") from error


def test_keys_of_observations_are_kept_or_refused_and_write_no_other_file(tmp_path, figure):
    """Teeth: without `_check_key` a key with NUL, where a zip cuts it off, makes a file that cannot be read."""
    (root := tmp_path / "here").mkdir()
    file, counts = root / "a.npz", Counter()

    def kept(name: str) -> None:
        recording = recorded(name)
        try:
            recording.write(file)
        except ConfigError as error:
            assert "rename it" in str(error) and not file.exists()
            raise
        found = read_back(file)
        assert found.obs.keys() == recording.obs.keys() and found.obs_spec.to_json() == recording.obs_spec.to_json()
        replay = Replay(8, recording.obs_spec.store, recording.action_spec.dim, 1)
        found.append_to(replay)
        assert rows_of(Replay.load(root / "replay", replay.save(root / "replay"))) == rows_of(replay)

    @hostile(times(150, 1_500))
    def every(name: str) -> None:
        tallied(counts, lambda: kept(name))
        for path in [file, *root.glob("replay/*")]:
            path.unlink(missing_ok=True)

    every()
    assert not outside(root) and [path.name for path in root.iterdir()] == ["replay"]
    figure("S3", f"keys of Dict spaces, in recordings and replays: {summary(counts)}; 0 other files")


def test_keys_of_observations_are_kept_by_minari_or_refused(tmp_path, monkeypatch, figure):
    """Teeth: without the check, a key with a slash makes a data set that cannot be read."""
    (root := tmp_path / "here").mkdir()
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root / "minari"))
    counts: Counter = Counter()

    def kept(number: int, name: str) -> None:
        recording = recorded(name)
        minari.write(f"toy/set-v{number}", recording)
        assert minari.read(f"toy/set-v{number}").obs.keys() == recording.obs.keys()

    for number, name in enumerate([*ATTACKS, "a/b", "a\0b", "\ud800", "/abs", "\n", "plain"]):
        tallied(counts, lambda number=number, name=name: kept(number, name), (ConfigError,))
    assert not outside(root) and [path.name for path in root.iterdir()] == ["minari"]
    figure("S3", f"keys of Dict spaces, in Minari's data sets: {summary(counts)}; 0 other files")


def test_keys_of_observations_make_a_model_that_is_saved_and_read_or_are_refused(tmp_path, figure):
    (root := tmp_path / "here").mkdir()
    counts: Counter = Counter()

    def kept(name: str) -> None:
        world = small_world(gym.spaces.Dict({name: VECTOR, "other": VECTOR}))
        arrays = {key: x.numpy() for key, x in world.state_dict().items()}
        state = {"observation": world.obs.to_json()}
        found = checkpoint.unpack(checkpoint.pack(root / "a.zip", 1, {"world": arrays}, state))
        assert found[0]["world"].keys() == arrays.keys() and found[1] == state

    @hostile(times(30, 300))
    def every(name: str) -> None:
        tallied(counts, lambda: kept(name))

    every()
    assert not outside(root) and {path.name for path in root.iterdir()} <= {"a.zip"}
    figure("S3", f"keys of Dict spaces, in models and checkpoints: {summary(counts)}; 0 other files")


def test_files_of_a_checkpoint_and_data_sets_of_minari_stay_in_their_folders(tmp_path, monkeypatch, figure):
    """Teeth: without the check of its form, the id `../elsewhere/set-v0` opens a data set outside of Minari's folder."""
    (root := tmp_path / "here").mkdir()
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root / "minari"))
    (tmp_path / "elsewhere" / "set-v0" / "data").mkdir(parents=True)
    before, counts = outside(root), Counter()

    @hostile(times(100, 1_000))
    def every(name: str) -> None:
        tallied(counts, lambda: sources.recording(f"minari:{name}"))
        before, content = counts["taken"], ({name: {"a": np.ones(1)}}, {})
        tallied(counts, lambda: checkpoint.pack(root / "a.zip", 1, *content), (*NAMED, ValueError))
        assert counts["taken"] == before or re.fullmatch("[a-z][a-z0-9_-]*", name)

    every()
    for name in ("../elsewhere/set-v0", str(tmp_path / "elsewhere" / "set-v0")):
        with pytest.raises(ConfigError, match="is no id of Minari"):
            sources.recording(f"minari:{name}")
    assert outside(root) == before and {path.name for path in root.iterdir()} <= {"a.zip", "minari"}
    figure("S3", f"ids of data sets, files of checkpoints: {summary(counts)}; 0 paths outside")


def test_tags_of_tensorboard_are_no_paths(tmp_path, figure):
    (root := tmp_path / "here").mkdir()
    counts: Counter = Counter()
    with SummaryWriter(str(root)) as writer:

        @hostile(times(50, 500))
        def every(name: str) -> None:
            tallied(counts, lambda: tensorboard.text(writer, name, name, 0), (*NAMED, ValueError))

        every()
    assert not outside(root) and all(path.name.startswith("events.out.tfevents.") for path in root.rglob("*"))
    figure("S3", f"tags: {summary(counts)}; 0 files but the event file")


# Configs ----------------------------------------------------------------------------------------------------------------


def two_edits_away(word: str) -> list[str]:
    """Some words at two edits: every seventh of the first edit, and of those every eleventh of the second."""
    return sorted({far for near in one_edit_away(word)[::7] for far in one_edit_away(near)[::11]} - {word, ""})


def test_no_unknown_key_is_ignored_and_nearly_every_typing_mistake_is_understood(figure):
    """Each third mistake in every run: tests/test_config.py makes all single ones. Teeth: the rule in `Frozen`."""
    asked, right, each = Counter(), Counter(), times(3, 1)
    for cls in every_config_class():
        for key in cls.model_fields:
            for edits, typos in ((1, one_edit_away(key)), (2, two_edits_away(key))):
                for typo in typos[::each]:
                    if typo in cls.model_fields:
                        continue
                    with pytest.raises(ConfigError) as caught:
                        cls.parse({typo: None})
                    assert f"'{typo}' is not an option" in str(caught.value)
                    asked[edits] += 1
                    right[edits] += f"'{key}'" in str(caught.value).partition("Did you mean")[2]
    shares = {edits: right[edits] / asked[edits] for edits in asked}
    assert shares[1] >= 0.95
    figure(
        "S4",
        f"{asked.total():,} unknown keys: 0 ignored; the right one is suggested for {shares[1]:.1%} of single edits, "
        f"{shares[2]:.1%} of double ones",
    )


def nested(key: str, value: Any) -> dict[str, Any]:
    for step in reversed(key.split(".")):
        value = {step: value}
    return value


def test_a_value_of_another_type_is_refused_under_its_key(figure):
    rows, refused = describe(Config), 0
    for row in rows:
        wrong = {bool: ["word", 3, 0.5], int: ["word", True, 0.5, "3"], float: ["word", True, "1e-4"], str: [3, True, 0.5]}
        for value in [
            *wrong.get(type(row.default), []),
            [{"a": [1]}],
            *([] if row.type.startswith("mapping") else [{"no": {"such": 1}}]),
        ]:
            with pytest.raises(ConfigError) as caught:
                Config.parse(nested(row.key, value))
            assert row.key.removesuffix(".kind") in str(caught.value)
            refused += 1
    assert refused > 3 * len(rows)
    figure("S4", f"{refused} values of wrong types in {len(rows)} options: all refused under their keys")


YAML = {
    "tags": [
        "a: !!python/object/apply:os.system [ls]",
        "a: !!python/name:os.system",
        "a: !!python/module:os",
        "a: !x y",
        "!!map {a: 1}",
    ],
    "more tags": [
        "a: !!binary aGk=",
        "a: !!set {b}",
        "a: !<tag:yaml.org,2002:python/tuple> [1]",
        "%TAG ! tag:yaml.org,2002:python/\n---\na: !name:os.system x",
    ],
    "bombs": [bomb(9), bomb(7), "a: &a [*a]", "a: &a 1\nb: [" + "*a, " * 101 + "]", "a: " + "[" * 20_000, "a: " + "{a: " * 20_000],
    "duplicates": ["a: 1\na: 2", "a: {b: 1, b: 1}", "a: 1\n'a': 2", "a: [{b: 1, 'b': 2}]"],
    "merges": ["train: &t {ratio: 1.0}\neval:\n  <<: *t"],
}


def test_hostile_yaml_is_refused_in_little_memory(tmp_path, figure):
    """Teeth: PyYAML's own safe loader keeps the last of two keys, reads `1e-4` as a word, and nine lines as 10^9 leaves."""
    config = Config.from_recipe(CHAIN, OPTIONS)
    Run.create(tmp_path / "run", config, 0).close()

    def refusals() -> Counter:
        counts: Counter = Counter()
        for kind, texts in YAML.items():
            for text in texts:
                (tmp_path / "run" / "config.yaml").write_text(text)
                for act in (lambda: Run.open(tmp_path / "run"), lambda: Config.from_recipe(tmp_path / "run" / "config.yaml")):
                    tallied(counts, act, (ConfigError,))
                    assert not counts["taken"], (kind, text[:80])
        for text in ("train.ratio=!!python/name:os.system", "train.ratio=!x 1", "train.ratio={a: 1, a: 2}", "train.ratio=[*a]"):
            tallied(counts, lambda text=text: Config.from_recipe(CHAIN, [text]), (ConfigError,))
        return counts

    refused = in_child(refusals)["refused"]
    assert refused == 2 * sum(map(len, YAML.values())) + 4
    assert yaml.safe_load("a: 1\na: 2") == {"a": 2} and yaml.safe_load("lr: 1e-4") == {"lr": "1e-4"}
    figure(
        "S4",
        f"tags, bombs, duplicates and merges, in a run's config, a recipe and overrides: all {refused} refused, within 64 MiB",
    )


def test_numbers_are_numbers(figure):
    read = load_yaml("a: 1e-4\nb: 1E5\nc: 010\nd: no\ne: 1_000\nf: .5\ng: 12:30\nh: 0x10\ni: on\nj: 2020-01-01")
    words = {"c": "010", "d": "no", "g": "12:30", "h": "0x10", "i": "on", "j": "2020-01-01"}
    assert read == {"a": 1e-4, "b": 1e5, "e": 1000, "f": 0.5, **words} and type(read["a"]) is float
    assert Config.from_recipe(CHAIN, ["agent.lr=1e-4"]).agent.lr == 1e-4
    with pytest.raises(ConfigError, match=r"agent\.lr"):
        Config.from_recipe(CHAIN, ["agent.lr='1e-4'"])
    figure("S4", "`lr: 1e-4` is the number 0.0001; `no`, `on`, `010`, `12:30` and dates are words")
