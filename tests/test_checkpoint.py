"""The checkpoint: whole or absent, never silently different, and it never runs code."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from forks import forked, killed_at

from worldmodel.errors import CorruptError, NumericsError, StorageError
from worldmodel.storage import checkpoint, files


def content(seed: int = 0) -> tuple[dict, dict, dict]:
    rng = np.random.default_rng(seed)
    world = {
        "weight": rng.normal(size=(3, 2)).astype(np.float32),
        "double": rng.normal(size=4),
        "count": np.array([1, -(2**62)], np.int64),
        "picture": rng.integers(0, 255, (2, 2, 1), dtype=np.uint8),
        "mask": np.array([True, False, True]),
        "scalar": np.array(seed + 0.5, np.float32),
        "nothing": np.zeros((0, 3), np.float32),
    }
    state = {"rng": {"state": 2**127 + seed, "has": False}, "best": None, "lr": 1e-4, "name": "a/ü\ud800", "list": [1, [2.5]]}
    tensors = {"world": world, "agent": {"w": np.ones(2, np.float32)}, "optim": {}}
    return tensors, state, {"config": {"seed": seed}, "rows": [[1, 2]]}


def assert_equal(found: tuple[dict, dict, dict], wanted: tuple[dict, dict, dict], step: int) -> None:
    assert found[0].keys() == wanted[0].keys()
    for stem, arrays in wanted[0].items():
        assert found[0][stem].keys() == arrays.keys()
        for name, array in arrays.items():
            got = found[0][stem][name]
            assert (got.dtype, got.shape, got.flags.writeable) == (array.dtype, array.shape, True)
            np.testing.assert_array_equal(got, array)
    assert found[1] == wanted[1]
    assert found[2]["step"] == step
    assert {k: found[2][k] for k in wanted[2]} == wanted[2]


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def put(file: Path, data: bytes) -> None:
    """New content under an old name; cutting a file that was just written costs milliseconds on some file systems."""
    file.unlink(missing_ok=True)
    file.write_bytes(data)


# Whole ----------------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read(tmp_path):
    parent = tmp_path / "run" / "checkpoints"
    path = checkpoint.write(parent, 1500, *content())
    assert path == parent / "step-000000001500"
    assert names(parent) == [path.name]
    assert names(path) == ["agent.safetensors", "manifest.json", "optim.safetensors", "state.json", "world.safetensors"]
    assert_equal(checkpoint.read(path), content(), 1500)
    manifest = checkpoint.verify(path)
    assert manifest["schema"] == 1
    assert manifest["files"]["state.json"]["size"] == (path / "state.json").stat().st_size


def test_arrays_that_do_not_lie_in_order_come_back_in_order(tmp_path):
    a = np.arange(12.0).reshape(3, 4)
    odd = {"t": a.T, "s": a[::2, ::-1], "f": np.asfortranarray(a), "big": a.astype(">f4"), "bit": np.float32(3), "zero": a.T[:0]}
    found = checkpoint.read(checkpoint.write(tmp_path, 0, {"world": odd}, {}))[0]["world"]
    for name, array in odd.items():
        assert found[name].shape == np.shape(array)
        np.testing.assert_array_equal(found[name], array)


def test_json_gives_back_numbers_strings_and_lists(tmp_path):
    state = {"np": np.int64(3), "f": np.float64(0.1), "b": np.bool_(True), "tuple": (1, (2,)), "tiny": 5e-324, "": {}}
    found = checkpoint.read(checkpoint.write(tmp_path, 0, {}, state))[1]
    assert found == {"np": 3, "f": 0.1, "b": True, "tuple": [1, [2]], "tiny": 5e-324, "": {}}
    assert type(found["b"]) is bool


@pytest.mark.parametrize(
    ("tensors", "state", "manifest", "error", "message"),
    [
        ({}, {"a": {"b": [0.0, math.nan]}}, {}, ValueError, r"state\.a\.b\[1\] is nan"),
        ({}, {"a": math.inf}, {}, ValueError, "state.a is inf"),
        ({}, {}, {"x": -math.inf}, ValueError, "manifest.x is -inf"),
        ({}, {1: 2}, {}, ValueError, "the key 1"),
        ({}, {"a": np.zeros(2)}, {}, ValueError, "state.a is a ndarray.*tensors"),
        ({}, {"a": b""}, {}, ValueError, "state.a is a bytes"),
        ({}, {}, {"files": {}}, ValueError, "'files' is written by the checkpoint itself"),
        ({"../w": {}}, {}, {}, ValueError, "cannot name"),
        ({"W": {}}, {}, {}, ValueError, "cannot name"),
        ({"w": {"a": np.array([None])}}, {}, {}, ValueError, "w.a is a object"),
        ({"w": {"a": np.array(["x"])}}, {}, {}, ValueError, "w.a is a <U1"),
        ({"w": {"a": np.zeros(1, complex)}}, {}, {}, ValueError, "w.a is a complex128"),
        ({"w": {"a": [1.0]}}, {}, {}, ValueError, "w.a is a list"),
        ({"w": {"a": np.array([1, np.nan])}}, {}, {}, NumericsError, "w.a holds a value that is not finite"),
        ({"w": {"a": np.float32(np.inf)}}, {}, {}, NumericsError, "not finite"),
    ],
)
def test_content_that_would_not_come_back_is_refused_and_leaves_nothing(tmp_path, tensors, state, manifest, error, message):
    with pytest.raises(error, match=message):
        checkpoint.write(tmp_path, 1, tensors, state, manifest)
    with pytest.raises(error, match=message):
        checkpoint.pack(tmp_path / "a.zip", 1, tensors, state, manifest)
    assert names(tmp_path) == []


def test_nesting_has_an_end(tmp_path):
    deep: list = []
    for _ in range(80):
        deep = [deep]
    with pytest.raises(ValueError, match="nested deeper"):
        checkpoint.write(tmp_path, 1, {}, {"deep": deep})


def test_a_committed_step_is_never_overwritten_but_a_damaged_one_is_replaced(tmp_path):
    path = checkpoint.write(tmp_path, 7, *content(1))
    with pytest.raises(StorageError, match="never overwritten"):
        checkpoint.write(tmp_path, 7, *content(2))
    assert_equal(checkpoint.read(path), content(1), 7)
    (path / "state.json").unlink()
    checkpoint.write(tmp_path, 7, *content(2))
    assert_equal(checkpoint.read(path), content(2), 7)
    assert names(tmp_path) == [path.name]


def test_it_needs_no_torch():
    code = "import sys, worldmodel.storage.checkpoint; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_every_file_and_every_name_is_forced_to_the_disk_before_it_counts(tmp_path, monkeypatch):
    done: list[str] = []
    real_sync, real_rename = os.fsync, os.rename

    def fsync(handle: int) -> None:
        kind = "folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file"
        done.append(f"{kind} {Path(os.readlink(f'/proc/self/fd/{handle}')).name.split('-')[0]}")
        real_sync(handle)

    def rename(a: Path, b: Path) -> None:
        done.append("rename")
        real_rename(a, b)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    checkpoint.write(tmp_path / "c", 7, *content())
    stems = ["world.safetensors", "agent.safetensors", "optim.safetensors", "state.json", "manifest.json"]
    assert done[-8:] == [*(f"file {s}" for s in stems), "folder .tmp", "rename", "folder c"]


# Damage ---------------------------------------------------------------------------------------------------------------


def outcome(path: Path) -> str:
    """ "same" or the error's text; any other content or error fails the test."""
    try:
        found = checkpoint.read(path)
    except CorruptError as error:
        with pytest.raises(CorruptError):
            checkpoint.verify(path)
        return str(error)
    assert_equal(found, content(), 3)
    checkpoint.verify(path)
    return "same"


def test_every_flipped_byte_is_noticed_or_changes_nothing(tmp_path):
    path = checkpoint.write(tmp_path, 3, *content())
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        for at in range(len(whole)):
            put(file, whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :])
            said = outcome(path)
            if file.name == "manifest.json":  # white space may differ; content may not
                assert said == "same" or "manifest.json" in said
            else:
                assert file.name in said
        put(file, whole)
    assert outcome(path) == "same"


def test_cut_lengthened_and_missing_files_are_noticed(tmp_path):
    path = checkpoint.write(tmp_path, 3, *content())
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        for damaged in [*(whole[:n] for n in range(0, len(whole) - 1, 7)), whole + b"\0", whole[8:] + whole[:8]]:
            put(file, damaged)
            assert file.name in (said := outcome(path))
            assert file.name == "manifest.json" or len(damaged) == len(whole) or "bytes, but its manifest says" in said
        file.unlink()
        assert f"{file.name} is missing" in outcome(path)
        file.mkdir()
        assert f"{file.name} is no regular file" in outcome(path)
        file.rmdir()
        put(file, whole)


def test_random_mutants_are_never_silently_different(tmp_path):
    path = checkpoint.write(tmp_path, 3, *content())
    whole = {file: file.read_bytes() for file in sorted(path.iterdir())}
    rng, outcomes = random.Random(0), []
    for _ in range(1000):
        file = rng.choice(list(whole))
        data = bytearray(whole[file])
        a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        data[a:b] = rng.choice([b"", bytes(b - a), rng.randbytes(5), data[a:b] * 2, b'"step": 3', b"NaN", b"[" * 2000])
        put(file, data)
        outcomes.append((outcome(path) == "same", data == whole[file]))
        put(file, whole[file])
    assert all(same for same, untouched in outcomes if untouched)
    assert sum(not same for same, _ in outcomes) > 900  # what is not noticed is read as it was written


def test_files_mixed_up_between_checkpoints_are_noticed(tmp_path):
    a, b = (checkpoint.write(tmp_path, step, *content(step)) for step in (3, 4))
    for name in names(a):
        if name in ("agent.safetensors", "optim.safetensors"):  # the same in both
            continue
        held = (a / name).read_bytes()
        shutil.copy(b / name, a / name)
        with pytest.raises(CorruptError):
            checkpoint.read(a)
        (a / name).write_bytes(held)
    shutil.copytree(b, tmp_path / "step-000000000009")
    with pytest.raises(CorruptError, match="is of step 4, but its folder is step-000000000009"):
        checkpoint.read(tmp_path / "step-000000000009")


def forge(path: Path, change) -> None:
    """Rewrites the manifest by someone who knows how to hash it."""
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    manifest["hash"] = checkpoint._hash(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["files"].update({"../../secret.safetensors": {"size": 1, "sha256": ""}}), "cannot belong"),
        (lambda m: m["files"].update({"/etc/passwd": {"size": 1, "sha256": ""}}), "cannot belong"),
        (lambda m: m["files"].update({"x.pkl": {"size": 1, "sha256": ""}}), "cannot belong"),
        (lambda m: m["files"].update({"world.safetensors": {"size": "1"}}), "cannot belong"),
        (lambda m: m["files"].update({f"a{i}.safetensors": {"size": 1, "sha256": ""} for i in range(99)}), "names 103 files"),
        (lambda m: m["files"].pop("state.json"), "'files' is missing or odd"),
        (lambda m: m.pop("schema"), "'schema'"),
        (lambda m: m.update(step=True), "'step'"),
        (lambda m: m["files"]["state.json"].pop("sha256"), "state.json is damaged"),
    ],
)
def test_a_forged_manifest_reaches_no_other_file(tmp_path, change, message):
    path = checkpoint.write(tmp_path, 3, *content())
    forge(path, change)
    for act in (checkpoint.read, checkpoint.verify):
        with pytest.raises(CorruptError, match=message):
            act(path)


def replace(path: Path, name: str, data: bytes) -> None:
    """Puts another file in, with a manifest that vouches for it."""
    (path / name).write_bytes(data)
    forge(path, lambda m: m["files"].update({name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}}))


@pytest.mark.parametrize(
    "text",
    ['{"a": NaN}', '{"a": Infinity}', '{"a": 1e999}', '{"a": 1, "a": 2}', "[1]", "[" * 100_000, "{}x", "", "\xff", "1" * 5000],
)
def test_json_that_this_library_would_not_write_is_refused(tmp_path, text):
    path = checkpoint.write(tmp_path, 3, *content())
    replace(path, "state.json", text.encode("latin-1"))
    with pytest.raises(CorruptError, match=r"state\.json is damaged"):
        checkpoint.read(path)


@pytest.mark.parametrize("data", [b"", b"\x80\x04.", (2**60).to_bytes(8, "little"), b"\x02" + bytes(7) + b"{]"])
def test_a_file_that_is_no_safetensors_is_refused(tmp_path, data):
    path = checkpoint.write(tmp_path, 3, *content())
    replace(path, "world.safetensors", data)
    with pytest.raises(CorruptError, match=r"world\.safetensors is no safetensors file"):
        checkpoint.read(path)


def test_a_sector_that_cannot_be_read_is_damage(tmp_path, monkeypatch):
    old, new = (checkpoint.write(tmp_path, step, *content(step)) for step in (3, 4))

    def bad_sector(path, *args, real=open):
        if Path(path) == new / "world.safetensors":
            raise OSError(5, "Input/output error")
        return real(path, *args)

    monkeypatch.setattr("builtins.open", bad_sector)
    said: list[str] = []
    assert checkpoint.newest(tmp_path, said.append) == (3, old)
    assert "world.safetensors cannot be read: Input/output error" in said[0]


def test_a_newer_schema_asks_for_a_newer_version_and_is_not_taken_for_damage(tmp_path):
    checkpoint.write(tmp_path, 2, *content())
    path = checkpoint.write(tmp_path, 3, *content())
    forge(path, lambda m: m.update(schema=2))
    for act in (lambda: checkpoint.read(path), lambda: checkpoint.newest(tmp_path)):
        with pytest.raises(StorageError, match=r"has schema 2.*newer worldmodel") as caught:
            act()
        assert not isinstance(caught.value, CorruptError)


# The newest, the old and the left over --------------------------------------------------------------------------------


def test_the_newest_is_the_highest_step_that_verifies_and_what_is_skipped_is_said(tmp_path):
    assert checkpoint.newest(tmp_path / "nowhere") is None
    assert checkpoint.steps(tmp_path / "nowhere") == []
    paths = [checkpoint.write(tmp_path, step, *content(step)) for step in (900, 1000, 50, 1200)]
    (tmp_path / "step-5").mkdir()
    (tmp_path / "step-000000009999").write_text("a file is no checkpoint")
    said: list[str] = []
    assert checkpoint.steps(tmp_path) == [50, 900, 1000, 1200]
    assert checkpoint.newest(tmp_path, said.append) == (1200, paths[3])
    assert said == []
    (paths[3] / "world.safetensors").unlink()
    (paths[1] / "manifest.json").write_bytes(b"")
    assert checkpoint.newest(tmp_path, said.append) == (900, paths[0])
    pattern = r"Checkpoint of step (\d+) is skipped: .*(world\.safetensors|manifest\.json) is"
    assert [re.match(pattern, s)[1] for s in said[:2]] == ["1200", "1000"]
    assert said[2:] == ["Step 900 is the newest that verifies: 300 steps behind it are lost."]
    for path in (paths[0], paths[2]):
        (path / "state.json").unlink()
    assert checkpoint.newest(tmp_path, said.append) is None


def test_pruning_keeps_the_last_that_verify(tmp_path):
    paths = {step: checkpoint.write(tmp_path, step, *content(step)) for step in (1, 2, 3, 4, 5)}
    for step in (3, 5):
        (paths[step] / "world.safetensors").unlink()
    assert checkpoint.prune(tmp_path, keep=2) == [1]  # 4 and 2 verify
    assert checkpoint.steps(tmp_path) == [2, 3, 4, 5]
    (paths[4] / "world.safetensors").unlink()
    assert checkpoint.prune(tmp_path, keep=1) == []
    assert checkpoint.newest(tmp_path, lambda s: None) == (2, paths[2])
    (paths[2] / "world.safetensors").unlink()
    assert checkpoint.prune(tmp_path, keep=1) == []
    with pytest.raises(ValueError, match="at least one"):
        checkpoint.prune(tmp_path, keep=0)
    assert all(n.startswith("step-") for n in names(tmp_path))


def test_leftovers_are_swept_and_nothing_else(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("x")
    parent = tmp_path / "checkpoints"
    path = checkpoint.write(parent, 3, *content())
    shutil.copytree(path, parent / ".tmp-00ff")
    shutil.copytree(path, parent / ".trash-00ff")
    (parent / ".tmp-file").write_text("x")
    (parent / ".tmp-link").symlink_to(outside)
    (parent / "notes.txt").write_text("mine")
    assert checkpoint.steps(parent) == [3]
    files.sweep(parent)
    files.sweep(tmp_path / "nowhere")
    assert names(parent) == ["notes.txt", path.name]
    assert names(outside) == ["kept"]


def test_a_kill_at_any_step_of_a_commit_leaves_the_old_or_the_new_one(tmp_path):
    calls = ("open", "fsync", "rename", "mkdir", "rmdir", "unlink", "close")

    seen = set()
    for n in range(200):
        parent = tmp_path / str(n)
        checkpoint.write(parent, 1, *content(1))
        status = killed_at(n, calls, lambda parent=parent: [checkpoint.write(parent, 2, *content(2)), checkpoint.prune(parent, 1)])
        files.sweep(parent)
        step, path = checkpoint.newest(parent, pytest.fail)
        assert_equal(checkpoint.read(path), content(step), step)
        assert set(names(parent)) <= {"step-000000000001", "step-000000000002"}
        for left in parent.iterdir():
            checkpoint.verify(left)
        seen.add(tuple(checkpoint.steps(parent)))
        if status == 0:
            break
    assert status == 0
    assert n > 10
    assert seen == {(1,), (1, 2), (2,)}


# A disk that says no --------------------------------------------------------------------------------------------------


def test_a_full_disk_is_a_named_error_and_leaves_the_old_state(tmp_path):
    old = checkpoint.write(tmp_path, 1, *content())
    checkpoint.pack(tmp_path / "a.zip", 1, *content())
    large = {"world": {"w": np.zeros(100_000)}}

    def act() -> bool:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        for save in (lambda: checkpoint.write(tmp_path, 2, large, {}), lambda: checkpoint.pack(tmp_path / "a.zip", 2, large, {})):
            try:
                save()
                return False
            except StorageError as error:
                if str(tmp_path) not in str(error) or "Free some disk space" not in str(error):
                    return False
        checkpoint.write(tmp_path, 3, *content(3))  # what fits is still saved by the same process
        return True

    forked(act)
    assert names(tmp_path) == ["a.zip", old.name, "step-000000000003"]
    assert_equal(checkpoint.read(old), content(), 1)
    assert_equal(checkpoint.unpack(tmp_path / "a.zip"), content(), 1)


@pytest.mark.parametrize("call", ["fsync", "rename", "mkdir"])
def test_an_error_at_any_call_is_named_and_leaves_the_old_state(tmp_path, monkeypatch, call):
    parent = tmp_path / "c"
    old = checkpoint.write(parent, 1, *content())
    real = getattr(os, call)
    for n in range(20):
        left = [n]

        def failing(*args, left=left, **kwargs):
            left[0] -= 1
            if left[0] == -1:
                raise OSError(28, "No space left on device")
            return real(*args, **kwargs)

        monkeypatch.setattr(os, call, failing)
        try:
            checkpoint.write(parent, 2, *content(2))
        except StorageError as error:
            assert "No space left on device" in str(error)
            assert str(parent) in str(error)
        monkeypatch.setattr(os, call, real)
        assert_equal(checkpoint.read(old), content(), 1)
        if 2 in checkpoint.steps(parent):  # only the very last fsync comes after the commit
            assert left[0] >= 0 or call == "fsync"
            assert_equal(checkpoint.read(parent / "step-000000000002"), content(2), 2)
            break
        assert names(parent) == [old.name]
    assert n > 0
    assert checkpoint.newest(parent)[0] == 2


def test_a_place_that_cannot_be_written_is_a_named_error(tmp_path):
    (tmp_path / "file").write_text("x")
    for act in (
        lambda: checkpoint.write(tmp_path / "file" / "c", 1, *content()),
        lambda: checkpoint.write(Path("/proc/nowhere"), 1, *content()),
        lambda: checkpoint.pack(tmp_path / "file" / "a.zip", 1, *content()),
    ):
        with pytest.raises(StorageError, match=r"Could not (create|write) "):
            act()
    with pytest.raises(StorageError, match="read"):
        checkpoint.steps(tmp_path / "file")


def test_the_files_are_plain_safetensors_that_any_tool_reads(tmp_path):
    path = checkpoint.write(tmp_path, 3, *content())
    found = safetensors.numpy.load_file(path / "world.safetensors")
    np.testing.assert_array_equal(found["weight"], content()[0]["world"]["weight"])
