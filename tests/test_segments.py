"""The replay on disk: what was saved comes back, damage is noticed, and only a checkpoint's snapshot commits rows."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import forked, killed_at
from test_checkpoint import names, put
from test_replay import GOOD, check_rows, fill, store

from worldmodel.data import Batch
from worldmodel.errors import CorruptError, StorageError
from worldmodel.storage import segments
from worldmodel.storage.replay import Replay


def assert_same(a: Replay, b: Replay) -> None:
    assert (a.added_by_stream, a.lengths, a.ends, a.obs_spec) == (b.added_by_stream, b.lengths, b.ends, b.obs_spec)
    for length in (1, 3, min(a.lengths)):
        for seed in range(3):
            x, y = (r.sample(16, length, np.random.default_rng(seed), recent_fraction=0.2, terminal_fraction=0.3) for r in (a, b))
            for key in x.obs:
                assert torch.equal(x.obs[key], y.obs[key])
            for field in fields(Batch)[1:]:
                assert torch.equal(getattr(x, field.name), getattr(y, field.name))


@pytest.mark.parametrize("rows", [0, 3, 20, 47])
def test_what_was_saved_is_loaded(tmp_path, rows):
    replay = fill(store(capacity=40, num_envs=2, image=True), rows)
    fill(replay, 3, [1])
    loaded = Replay.load(tmp_path, replay.save(tmp_path))
    if rows:
        assert_same(loaded, replay)
        assert_same(fill(loaded, 9), fill(replay, 9))
    assert loaded.lengths == replay.lengths
    assert loaded.capacity == 40


def test_saves_are_incremental_and_old_snapshots_stay_loadable_until_swept(tmp_path):
    replay, snapshot, copies = store(capacity=40, num_envs=2), [None], []
    for rows in (3, 11, 0, 9, 30, 1, 1):
        fill(replay, rows)
        snapshot.append(replay.save(tmp_path, snapshot[-1]))
        copies.append(Replay.load(tmp_path, snapshot[-1]))
        assert_same(copies[-1], replay)
    assert names(tmp_path) == [f"segment-{i:09d}.bin" for i in range(1, 7)]  # nothing new, no file
    for copy, saved in zip(copies, snapshot[1:]):
        assert_same(Replay.load(tmp_path, saved), copy)
    assert [n for n, _ in snapshot[-1]["segments"]] == [4, 5, 6]  # 1 to 3 hold evicted rows only
    rows = [segments.read_header(tmp_path, n, replay._spec, 2).rows for n in (1, 2, 3, 4, 5, 6)]
    assert rows == [6, 22, 18, 40, 2, 2]  # of 60 new rows, 20 were evicted before they were saved

    (tmp_path / ".tmp-123").write_text("left behind")
    Replay.sweep(tmp_path, snapshot[-2:])
    assert names(tmp_path) == [f"segment-{i:09d}.bin" for i in (4, 5, 6)]
    assert_same(Replay.load(tmp_path, snapshot[-1]), replay)


def test_a_segment_stays_while_any_stream_needs_it(tmp_path):
    replay = fill(store(capacity=40, num_envs=2), 8)
    snapshot = fill(replay, 30, [1]).save(tmp_path)
    assert [n for n, _ in snapshot["segments"]] == [1]
    snapshot = fill(replay, 30, [1]).save(tmp_path, snapshot)
    assert [n for n, _ in snapshot["segments"]] == [1, 2]
    assert_same(Replay.load(tmp_path, snapshot), replay)


def test_a_snapshot_survives_json(tmp_path):
    replay = fill(store(), 9)
    assert_same(Replay.load(tmp_path, json.loads(json.dumps(replay.save(tmp_path)))), replay)


def test_a_big_save_is_split_so_that_eviction_frees_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(segments, "MAX_BYTES", 1000)
    replay = fill(fill(store(capacity=200, num_envs=2), 60), 31, [1])
    snapshot = replay.save(tmp_path)
    assert len(names(tmp_path)) == 4
    assert max(p.stat().st_size for p in tmp_path.iterdir()) < 2000
    assert_same(Replay.load(tmp_path, snapshot), replay)


def test_rows_behind_the_checkpoint_are_dropped_or_kept_and_either_is_reported(tmp_path):
    replay = fill(store(capacity=40), 12)
    snapshot = replay.save(tmp_path)
    fill(replay, 5)
    later = replay.save(tmp_path, snapshot)
    fill(replay, 4)
    replay.save(tmp_path, later)
    said: list[str] = []
    dropped = Replay.load(tmp_path, snapshot, log=said.append)
    assert dropped.added == 12
    assert said == ["Replay: 9 steps newer than the checkpoint are dropped."]
    check_rows(dropped, dropped.sample(50, 4, np.random.default_rng(0), recent_fraction=0.2))
    kept = Replay.load(tmp_path, snapshot, keep_newer=True, log=said.append)
    assert_same(kept, replay)
    assert said[1] == "Replay: 9 steps newer than the checkpoint are kept."
    fill(kept, 2)
    assert_same(Replay.load(tmp_path, kept.save(tmp_path, snapshot)), kept)


def test_rows_written_anew_replace_those_that_were_dropped(tmp_path):
    replay = fill(store(capacity=40), 12)
    snapshot = replay.save(tmp_path)
    fill(replay, 7).save(tmp_path, snapshot)
    other = fill(Replay.load(tmp_path, snapshot), 3)
    later = other.save(tmp_path, snapshot)
    assert_same(Replay.load(tmp_path, snapshot, keep_newer=True), other)
    assert_same(Replay.load(tmp_path, later), other)


def test_damage_behind_the_snapshot_costs_only_what_is_behind_it(tmp_path):
    replay = fill(store(capacity=40), 12)
    snapshot = replay.save(tmp_path)
    middle = fill(replay, 5).save(tmp_path, snapshot)
    copy = Replay.load(tmp_path, middle)
    fill(replay, 4).save(tmp_path, middle)
    last = segments.path_of(tmp_path, 3)
    whole = last.read_bytes()
    for damaged in (whole[:-1], whole[:100], whole[:5], whole[:-9] + b"\xff" + whole[-8:]):
        put(last, damaged)
        said: list[str] = []
        assert_same(Replay.load(tmp_path, snapshot, keep_newer=True, log=said.append), copy)
        assert "segment-000000003.bin" in said[0]
        assert said[-1] == "Replay: 5 steps newer than the checkpoint are kept."


@pytest.mark.parametrize("largest", [segments.MAX_BYTES, 1000])
def test_rows_behind_evicted_ones_are_kept_where_they_fill_the_replay(tmp_path, monkeypatch, largest):
    monkeypatch.setattr(segments, "MAX_BYTES", largest)
    replay = fill(store(capacity=80, num_envs=2), 1)
    snapshot = replay.save(tmp_path)
    whole = fill(replay, 41)  # row 1 of each stream is evicted before it is saved
    whole.save(tmp_path, snapshot)
    said: list[str] = []
    kept = Replay.load(tmp_path, snapshot, keep_newer=True, log=said.append)
    assert_same(kept, whole)
    assert said == ["Replay: 80 steps newer than the checkpoint are kept."]
    recovered = store(capacity=80, num_envs=2)
    recovered.recover(tmp_path)
    assert_same(recovered, whole)
    last = segments.path_of(tmp_path, segments.numbers(tmp_path)[-1])
    put(last, last.read_bytes()[:-9] + bytes(9))  # now they do not fill it
    kept = Replay.load(tmp_path, snapshot, keep_newer=True, log=said.append)
    assert (kept.added_by_stream, said[-1]) == ((1, 1), "Replay: 0 steps newer than the checkpoint are kept.")
    assert last.name in said[-2]


def test_every_flipped_byte_is_noticed(tmp_path):
    replay = fill(store(capacity=8, num_envs=2, action_dim=1), 5)
    snapshot = replay.save(tmp_path)
    path = segments.path_of(tmp_path, 1)
    whole = path.read_bytes()
    for at in range(len(whole)):
        for mask in (0x01, 0xFF):
            put(path, whole[:at] + bytes([whole[at] ^ mask]) + whole[at + 1 :])
            with pytest.raises(CorruptError, match=re.escape(path.name)):
                Replay.load(tmp_path, snapshot)
    put(path, whole)
    assert_same(Replay.load(tmp_path, snapshot), replay)


def test_a_cut_or_lengthened_file_is_noticed(tmp_path):
    snapshot = fill(store(capacity=8), 5).save(tmp_path)
    path = segments.path_of(tmp_path, 1)
    whole = path.read_bytes()
    for damaged in [*(whole[:n] for n in range(len(whole))), whole + b"\0", whole + whole, whole[:40] + b"\0" + whole[40:]]:
        put(path, damaged)
        with pytest.raises(CorruptError, match=r"segment-000000001\.bin"):
            Replay.load(tmp_path, snapshot)


def test_damage_names_the_offset_of_its_block(tmp_path):
    snapshot = fill(store(capacity=8), 5).save(tmp_path)
    path = segments.path_of(tmp_path, 1)
    whole = bytearray(path.read_bytes())
    whole[-30] ^= 1
    put(path, whole)
    with pytest.raises(CorruptError, match=r"segment-000000001\.bin is damaged at offset \d+: a block's CRC"):
        Replay.load(tmp_path, snapshot)


def test_a_missing_or_foreign_segment_is_noticed(tmp_path):
    replay = fill(store(capacity=40), 4)
    snapshot = replay.save(tmp_path)
    snapshot = fill(replay, 4).save(tmp_path, snapshot)
    one, two = (segments.path_of(tmp_path, n) for n in (1, 2))
    held = one.read_bytes()
    other = tmp_path / "other"
    twin = store(capacity=40)
    for _ in range(4):
        twin.add(**GOOD)
    twin.save(other)
    for damage, message in [
        (lambda: one.unlink(), "missing"),
        (lambda: put(one, two.read_bytes()), "renamed"),
        (lambda: put(one, segments.path_of(other, 1).read_bytes()), "not the file that the checkpoint names"),
    ]:
        damage()
        with pytest.raises(CorruptError, match=message):
            Replay.load(tmp_path, snapshot)
        put(one, held)
    with pytest.raises(CorruptError, match="segments are missing from its snapshot"):
        Replay.load(tmp_path, {**snapshot, "segments": snapshot["segments"][1:]})
    with pytest.raises(CorruptError, match="other columns"):
        Replay.load(tmp_path, {**snapshot, "obs": {"at": [[2], "<i4"]}})
    for rows in ([7], [9], [8, 0], ["x"], None):
        with pytest.raises(CorruptError, match="snapshot"):
            Replay.load(tmp_path, {**snapshot, "rows": rows})
    for key in ("rows", "segments", "obs", "capacity"):
        with pytest.raises(CorruptError, match="snapshot"):
            Replay.load(tmp_path, {k: v for k, v in snapshot.items() if k != key})


def test_a_lying_header_allocates_nothing(tmp_path):
    path = segments.path_of(tmp_path, 1)
    replay = fill(store(capacity=40), 4)
    snapshot = replay.save(tmp_path)
    header = segments.Header(1, (0,), (10**15,))
    columns = replay._spec
    segments.write(tmp_path, header, columns, lambda name, *_: np.zeros((1, *columns[name][0])))
    with pytest.raises(CorruptError, match=f"{path.name} has .* bytes, but its header implies"):
        Replay.load(tmp_path, snapshot)


def test_an_emptied_folder_is_written_anew(tmp_path):
    replay = fill(store(capacity=40), 9)
    snapshot = replay.save(tmp_path)
    segments.path_of(tmp_path, 1).unlink()
    fill(replay, 2)
    assert_same(Replay.load(tmp_path, replay.save(tmp_path, snapshot)), replay)


def test_a_snapshot_of_another_replay_is_refused(tmp_path):
    snapshot = fill(store(capacity=40), 9).save(tmp_path)
    with pytest.raises(ValueError, match="of another replay"):
        store(capacity=40).save(tmp_path, snapshot)
    with pytest.raises(ValueError, match="of another replay"):
        fill(store(capacity=50), 9).save(tmp_path, snapshot)


def test_a_full_disk_is_a_named_error_and_leaves_the_last_save_whole(tmp_path):
    replay = fill(store(capacity=40, image=True), 9)
    snapshot = replay.save(tmp_path)
    before = names(tmp_path)
    copy = Replay.load(tmp_path, snapshot)
    fill(replay, 30)

    def act() -> bool:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        with pytest.raises(StorageError, match="Free some disk space") as error:
            replay.save(tmp_path, snapshot)
        return str(tmp_path) in str(error.value)

    forked(act)
    assert names(tmp_path) == before
    assert_same(Replay.load(tmp_path, snapshot), copy)
    assert_same(Replay.load(tmp_path, replay.save(tmp_path, snapshot)), replay)


def test_a_kill_at_any_step_of_a_save_or_a_sweep_loses_nothing_that_was_committed(tmp_path):
    calls = ("open", "fsync", "replace", "unlink", "close")

    def act(folder: Path, replay: Replay, snapshot: dict) -> None:
        later = fill(replay, 25).save(folder, snapshot)
        Replay.sweep(folder, [snapshot, later])

    for n in range(50):
        folder = tmp_path / str(n)
        replay = fill(store(capacity=20), 5)
        replay.save(folder)  # named by no checkpoint: for the sweep
        snapshot = replay.save(folder)
        status = killed_at(n, calls, partial(act, folder, replay, snapshot))
        assert_same(Replay.load(folder, snapshot, log=lambda said: None), replay)
        again = fill(Replay.load(folder, snapshot, log=lambda said: None), 7)
        later = again.save(folder, snapshot)
        Replay.sweep(folder, [later])
        assert names(folder) == [segments.path_of(folder, number).name for number, _ in later["segments"]]
        assert_same(Replay.load(folder, later), again)
        if status == 0:
            break
    assert status == 0
    assert n > 4
