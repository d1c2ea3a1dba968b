"""A disk that fails, is full, or is gone: a named error, the old state intact, and training that goes on."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest
import stores
from catalogue import needs_program, times
from faults import strikes

from worldmodel import checkpoint
from worldmodel.errors import CorruptError, StorageError
from worldmodel.run import Run

FINE, REFUSED, ODD = 0, 10, 11
EIO = lambda n: "error=EIO"  # noqa: E731
ERRORS = ("ENOSPC", "EIO", "EDQUOT", "EINTR")


# R3: killed at any call ---------------------------------------------------------------------------------------------------


def killed_everywhere(store, place: Path) -> list[int]:
    """The state, 1 or 2, behind a kill at each call in turn."""

    def act(folder: Path) -> int:
        store.act(folder)
        return FINE

    seen = []
    for struck in strikes(needs_program("strace"), lambda n: "signal=SIGKILL", store.prepare, act, place):
        assert struck.status == -9
        seen.append(store.state(struck.folder))
    return seen


def test_a_kill_at_any_call_of_the_system_leaves_the_old_state_or_the_new_one(tmp_path, figure):
    counts = {}
    for store in (stores.Checkpoints(), stores.Zip(), stores.Runs(tmp_path)):
        seen = killed_everywhere(store, tmp_path / (name := type(store).__name__.lower()))
        assert set(seen) == {1, 2} and len(seen) > 5
        counts[name] = len(seen)
    text = ", ".join(f"{count} in a save of {name}" for name, count in counts.items())
    figure("R3", f"a kill at each call of the system ({text}): 0 states that are neither old nor new, 0 leftovers")


@pytest.mark.parametrize("careless", ["in place", "deletes first", "segment in place"])
def test_the_kills_find_a_save_that_is_careless(tmp_path, monkeypatch, careless):
    """Teeth: files written where they are read, the old checkpoint deleted before the new one is there."""
    write, encode = checkpoint.write, checkpoint._encode

    def in_place(parent, step, *content):
        path = parent / f"step-{step:012d}"
        path.mkdir()
        for name, data in encode(step, *content, {}):
            (path / name).write_bytes(data)

    def deletes_first(parent, step, *content):
        checkpoint.discard(parent / f"step-{step - 1:012d}")
        return write(parent, step, *content)

    if careless == "segment in place":
        store = stores.Runs(tmp_path)
        monkeypatch.setattr("worldmodel.segments.durable", lambda aside: open(store.final, "wb"))
        monkeypatch.setattr(Path, "rename", lambda *_: None)
        store.final = None

        def prepare(folder, real=store.prepare):
            real(folder)
            store.final = folder / "replay" / "segment-000000002.bin"

        store.prepare = prepare
    else:
        store = stores.Checkpoints()
        store.prepare = lambda folder: write(folder, 1, stores.ARRAYS[1], {"step": 1})
        monkeypatch.setattr(checkpoint, "write", in_place if careless == "in place" else deletes_first)
    with pytest.raises((CorruptError, TypeError)):
        killed_everywhere(store, tmp_path / "killed")


# R4: an error at any call -------------------------------------------------------------------------------------------------


def tried_twice(store, folder: Path) -> int:
    """Saves; where the system says no, that is a StorageError which names a path in the folder, and a retry works."""
    try:
        store.act(folder)
        return FINE
    except StorageError as error:
        if str(folder) not in str(error) or store.state(folder) not in (1, 2):
            return ODD
    store.act(folder)
    return REFUSED


def rewritten_in_place(calls: list[str]) -> list[str]:
    """Files whose fsync failed and that were opened for writing again under the same name."""
    failed = [(i, m[1]) for i, line in enumerate(calls) if (m := re.search(r"fsync\(\d+<(.*?)>\).*INJECTED", line))]
    return [path for i, path in failed for line in calls[i:] if f'"{path}"' in line and "O_CREAT" in line]


@pytest.mark.parametrize("name", ["checkpoints", "zip", "runs"])
def test_an_error_at_any_call_of_the_system_is_named_and_the_next_try_works(tmp_path, figure, name):
    store = {"checkpoints": stores.Checkpoints, "zip": stores.Zip, "runs": lambda: stores.Runs(tmp_path)}[name]()
    dealt, refused = 0, 0
    for shift in range(times(1, len(ERRORS))):  # in turn, or each of them at each call

        def fault(n: int, shift: int = shift) -> str:
            return f"error={ERRORS[(n + shift) % len(ERRORS)]}"

        place, act = tmp_path / f"shift-{shift}", partial(tried_twice, store)
        for struck in strikes(needs_program("strace"), fault, store.prepare, act, place, trace="openat"):
            assert struck.status in (FINE, REFUSED), struck
            assert store.state(struck.folder) == 2, struck
            assert not rewritten_in_place(struck.calls)
            dealt, refused = dealt + 1, refused + (struck.status == REFUSED)
    assert refused > 10
    figure("R4", f"{dealt} errors ({', '.join(ERRORS)}) in a save of {name}: {refused} named and saved by a retry, 0 states lost")


def test_the_errors_find_a_save_that_does_not_name_them(tmp_path, monkeypatch):
    """Teeth: the system's own errors, without the path."""

    class Nameless(StorageError):
        def __str__(self):
            return "something went wrong"

    monkeypatch.setattr(checkpoint, "StorageError", Nameless)
    store = stores.Zip()
    found = [
        struck.status
        for struck in strikes(
            needs_program("strace"), EIO, store.prepare, partial(tried_twice, store), tmp_path / "zip", ["fsync", "write"]
        )
    ]
    assert found and set(found) == {ODD}


def test_a_read_that_fails_names_the_file(tmp_path, figure):
    store, seen = stores.Runs(tmp_path), []

    def act(folder: Path) -> int:
        try:
            with Run.open(folder, write=True) as run:
                same = run.read()[1]["step"] == 1 and stores.same_rows(run.replay(), stores.replay_of(1))
            return FINE if same else ODD
        except StorageError as error:
            return REFUSED if str(folder) in str(error) else ODD

    calls = ["read", "pread64", "getdents64", "openat"]
    for struck in strikes(needs_program("strace"), EIO, store.prepare, act, tmp_path / "read", calls):
        assert struck.status in (FINE, REFUSED), struck
        seen.append(struck.status)
    assert seen.count(REFUSED) > 5
    figure("R4", f"{len(seen)} read errors while a run is opened: {seen.count(REFUSED)} named, 0 taken for other content")
