"""A replay that lies on the disk is the replay in memory, only slower and larger."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from catalogue import times
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_runs import CHAIN, small_train
from test_checkpoint import names
from test_replay import check_rows, fill
from test_segments import assert_same

from worldmodel.agents import Dreamer
from worldmodel.errors import ConfigError, CorruptError, StorageError
from worldmodel.storage import checkpoint, files, segments
from worldmodel.storage.replay import Replay
from worldmodel.storage.run import Run

SPEC = {"at": ((2,), np.float32), "picture": ((32, 32, 1), np.uint8)}


@pytest.fixture(autouse=True)
def small_segments(monkeypatch):
    """Seven rows of each of two streams fill a segment."""
    monkeypatch.setattr(segments, "MAX_BYTES", 7 * 2 * 1050)


def on_disk(folder: Path, capacity: int = 80) -> Replay:
    return Replay(capacity, SPEC, 2, 2, folder)


def in_memory(capacity: int = 80) -> Replay:
    return Replay(capacity, SPEC, 2, 2)


def test_windows_are_the_same_whether_rows_lie_on_the_disk_or_in_memory(tmp_path):
    disk, memory = on_disk(tmp_path), in_memory()
    for rows in (3, 4, 1, 20, 13, 60):
        fill(disk, rows), fill(memory, rows)
        assert_same(disk, memory)
        check_rows(disk, disk.sample(32, min(9, *disk.lengths), np.random.default_rng(0), recent_fraction=0.2))
    assert disk.nbytes < memory.nbytes
    for stream in (0, 1):
        for key, rows in memory.observations(stream, 2, 30).items():
            np.testing.assert_array_equal(disk.observations(stream, 2, 30)[key], rows)


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("fill"), st.integers(1, 25)),
        st.tuples(st.just("one stream"), st.integers(1, 9)),
        st.tuples(st.just("cut"), st.just(0)),
        st.tuples(st.just("commit"), st.just(0)),
        st.tuples(st.just("crash"), st.booleans()),
    ),
    max_size=12,
)


@settings(max_examples=times(15, 300), deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(OPERATIONS)
def test_whatever_happens_disk_and_memory_hold_the_same(tmp_path_factory, operations):
    """Rows, cuts, commits with eviction, and crashes that lose what was not committed, or keep what was written."""
    folder = tmp_path_factory.mktemp("replay")
    disk, memory = on_disk(folder), in_memory()
    committed = disk.save(folder)
    copies = memory.save(other := tmp_path_factory.mktemp("copy"))
    for what, much in operations:
        if what == "fill":
            fill(disk, much), fill(memory, much)
        elif what == "one stream":
            fill(disk, much, [1]), fill(memory, much, [1])
        elif what == "cut":
            disk.truncate_open_episodes(), memory.truncate_open_episodes()
        elif what == "commit":
            committed = disk.save(folder)
            Replay.sweep(folder, [committed])
            copies = memory.save(other)
        elif much:  # a crash; all that was written is kept
            disk.save(folder), memory.save(other, copies)
            disk = Replay.load(folder, committed, keep_newer=True, on_disk=True, log=lambda text: None)
            memory = Replay.load(other, copies, keep_newer=True, log=lambda text: None)
        else:
            disk = Replay.load(folder, committed, on_disk=True, log=lambda text: None)
            memory = Replay.load(other, copies, log=lambda text: None)
        assert disk.added_by_stream == memory.added_by_stream
    if min(disk.lengths) >= 3:  # the longest windows that are compared
        assert_same(disk, memory)


def test_memory_holds_one_segment_and_the_disk_little_more_than_the_capacity(tmp_path):
    disk = on_disk(tmp_path, capacity=400)
    rows_in_memory = disk.nbytes
    for _ in range(100):
        fill(disk, 20)
        Replay.sweep(tmp_path, [disk.save(tmp_path)])
    assert disk.nbytes == rows_in_memory
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 1.2 * 400 * 1050 + 2 * segments.MAX_BYTES


def test_a_full_disk_keeps_rows_waiting_until_there_is_place_again_or_too_many_wait(tmp_path, monkeypatch, caplog):
    disk = on_disk(tmp_path)
    fill(disk, 7)

    def full(*_: object) -> int:
        raise StorageError("Could not write: No space left on device.")

    with monkeypatch.context() as broken:
        broken.setattr(segments, "write", full)
        with caplog.at_level(logging.WARNING):
            fill(disk, 20)
        assert "wait in memory: Could not write: No space" in caplog.text
        assert names(tmp_path) == []
    fill(disk, 8)
    assert_same(disk, fill(in_memory(), 35))
    assert len(names(tmp_path)) >= 3
    monkeypatch.setattr(segments, "write", full)
    with pytest.raises(StorageError, match="No space left"):
        fill(disk, 100)
    assert disk.added_by_stream[0] < 80


def test_a_file_that_is_gone_or_cut_is_named_when_its_rows_are_read(tmp_path):
    disk = fill(on_disk(tmp_path), 20)
    file = tmp_path / "segment-000000001.bin"
    data = file.read_bytes()
    file.unlink()
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(CorruptError, match=r"segment-000000001.bin is cut off"):
        disk.sample(64, 2, np.random.default_rng(0))
    file.unlink()
    with pytest.raises(CorruptError, match=r"segment-000000001.bin is missing"):
        disk.sample(64, 2, np.random.default_rng(0))


def test_damage_is_noticed_when_the_replay_is_opened(tmp_path):
    snapshot = fill(on_disk(tmp_path), 20).save(tmp_path)
    file = tmp_path / "segment-000000002.bin"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.unlink()
    file.write_bytes(data)
    with pytest.raises(CorruptError, match=r"segment-000000002.bin is damaged at offset"):
        Replay.load(tmp_path, snapshot, on_disk=True)


def test_a_reader_writes_nothing_beside_the_writer(tmp_path):
    snapshot = fill(on_disk(tmp_path), 20).save(tmp_path)
    reader = Replay.load(tmp_path, snapshot, on_disk=True, writable=False)
    before = names(tmp_path)
    with pytest.raises(StorageError, match="where its run writes it"):
        fill(reader, 20)
    with pytest.raises(StorageError, match="where its run writes it"):
        reader.save(tmp_path)
    with pytest.raises(StorageError, match="cannot be saved to"):
        on_disk(tmp_path).save(tmp_path / "elsewhere")
    assert names(tmp_path) == before


# In a run ----------------------------------------------------------------------------------------------------------------


def weights(folder: Path) -> dict[str, str]:
    return {name: entry["sha256"] for name, entry in (Run.open(folder).manifest() or {})["files"].items() if name != "state.json"}


def test_a_run_with_its_replay_on_the_disk_learns_what_one_in_memory_learns(tmp_path):
    for place in ("memory", "disk"):
        small_train(tmp_path / place, 90, options={"train.replay": place, "train.capacity": 64})
    assert weights(tmp_path / "disk") == weights(tmp_path / "memory")
    disk, memory = (Run.open(tmp_path / place).replay() for place in ("disk", "memory"))
    assert_same(disk, memory)
    with pytest.raises(StorageError, match="where its run writes it"):
        disk.save(tmp_path / "disk" / "replay")


def test_a_run_on_the_disk_resumes_where_it_was(tmp_path):
    options = {"train.replay": "disk", "checkpoint.fence": True}
    small_train(tmp_path / "whole", 80, options=options)
    small_train(tmp_path / "parts", 40, options=options)
    small_train(tmp_path / "parts", 80, resume=True, options=options)
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


def test_experience_is_on_the_disk_between_checkpoints_and_can_be_kept(tmp_path):
    folder, said = tmp_path / "run", []
    options = {"checkpoint.every": 0, "checkpoint.flush": 10}
    small_train(folder, 60, options=options)
    unbroken = Run.open(folder).replay().added
    for step in checkpoint.steps(folder / "checkpoints")[1:]:  # as if the process had been killed before the last one
        files.discard(folder / "checkpoints" / f"step-{step:012d}")
    (folder / "result.json").unlink()
    small_train(folder, 60, resume=True, keep_newer=True, options=options, log=said.append)
    assert [text for text in said if text.endswith("are kept.")]
    assert Run.open(folder).replay().added > unbroken


def test_a_run_without_a_checkpoint_begins_anew_with_its_experience(tmp_path):
    folder, said = tmp_path / "run", []
    small_train(folder, 60)
    rows = Run.open(folder).replay().added
    for step in checkpoint.steps(folder / "checkpoints"):
        files.discard(folder / "checkpoints" / f"step-{step:012d}")
    (folder / "result.json").unlink()
    result = small_train(folder, 60, resume=True, log=said.append)
    assert f"Replay: {rows} steps without a checkpoint are kept." in said
    assert result.real_steps == 60
    assert Run.open(folder).replay().added > rows + 60
    assert int(Run.open(folder).world_model().scaling.count) > rows + 60


def test_a_replay_that_fits_nowhere_is_refused_with_what_to_change(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="keeps experience in a run folder"):
        Dreamer("MlpPolicy", CHAIN, config={"train.replay": "disk"}, seed=0, device="cpu").learn(10)
    with pytest.raises(ConfigError, match=r"keeps 3 steps .*train\.replay_gib \(now 1e-07\)"):
        small_train(tmp_path / "a", 60, options={"train.replay_gib": 1e-7})
    monkeypatch.setattr("worldmodel.agents.experience._physical_memory", lambda: 1000.0)
    with pytest.raises(ConfigError, match=r"would take 0.0 GiB .* train.replay=disk"):
        small_train(tmp_path / "b", 60)
    small_train(tmp_path / "c", 60, options={"train.replay": "disk"})


def test_a_limit_in_gib_makes_room_by_the_oldest_steps(tmp_path):
    small_train(tmp_path / "run", 60, options={"train.replay_gib": 40 * 33 / 2**30})
    replay = Run.open(tmp_path / "run").replay()
    assert replay.capacity == len(replay) == 40
    assert replay.added > 60


def test_recorded_data_are_not_learned_from_on_the_disk(tmp_path):
    small_train(tmp_path / "a", 60)
    with pytest.raises(ConfigError, match=r"train\.data is learned from in memory"):
        small_train(tmp_path / "b", 60, data=tmp_path / "a", options={"train.replay": "disk"})


def test_recorded_data_that_exceed_the_limit_are_refused(tmp_path):
    small_train(tmp_path / "a", 60)
    with pytest.raises(ConfigError, match=r"the replay keeps 40\. Raise train\.capacity .* train\.replay_gib allow"):
        small_train(tmp_path / "b", 60, data=tmp_path / "a", options={"train.replay_gib": 40 * 33 / 2**30})
