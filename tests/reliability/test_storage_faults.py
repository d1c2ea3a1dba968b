"""A disk that fails, is full, or is gone: a named error, the old state intact, and training that goes on."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stores
from catalogue import needs, needs_program, times
from faults import strikes
from forks import forked
from small_runs import small_train

from worldmodel.agents.training.callback import RunCallback
from worldmodel.errors import ConfigError, CorruptError, StorageError
from worldmodel.storage import checkpoint, files, segments
from worldmodel.storage import run as runs
from worldmodel.storage.replay import Replay
from worldmodel.storage.run import Run
from worldmodel.view import tensorboard

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
        files.discard(parent / f"step-{step - 1:012d}")
        return write(parent, step, *content)

    if careless == "segment in place":
        store = stores.Runs(tmp_path)
        monkeypatch.setattr("worldmodel.storage.segments.replacing", lambda path: open(path, "wb"))
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

    monkeypatch.setattr(files, "StorageError", Nameless)
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


def test_a_manifest_that_cannot_be_read_for_once_costs_no_rows(tmp_path):
    """Teeth: a sweep that takes it for one without rows deletes those that it alone names."""
    runs = stores.Runs(tmp_path)
    with Run.open(runs.template, write=True) as run:
        run.config = run.config.override({"checkpoint.keep": 2})
        with pytest.MonkeyPatch.context() as patch:
            old, read = run.path / "checkpoints" / "step-000000000001", checkpoint.read_manifest

            def fails(path: Path):
                if path == old:
                    raise CorruptError(f"{path} cannot be read")
                return read(path)

            patch.setattr(checkpoint, "read_manifest", fails)
            run.save(runs.algorithm(2), {})
    for step in (1, 2):
        assert stores.same_rows(run.replay(step), stores.replay_of(step))


# R6: the disk is full -----------------------------------------------------------------------------------------------------


class Full:
    """A disk of some megabytes; `fill` leaves nothing of it, `free` gives it back."""

    def __init__(self, path: Path):
        self.path, self.filler = path, path / "filler"

    def fill(self, *_: object) -> None:
        with open(self.filler, "wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError as error:
                assert error.errno == errno.ENOSPC

    def free(self, *_: object) -> None:
        self.filler.unlink()


@pytest.fixture
def small_disk(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(place)], capture_output=True, check=False)
    needs(mounted.returncode == 0, "the right to mount a tmpfs")
    yield Full(place)
    subprocess.run(["umount", "-l", str(place)], check=True)


def at_steps(patch: pytest.MonkeyPatch, acts: dict[int, Callable[[Any], object]]) -> None:
    """Does something to a training, with its model, when it has reached a real step, before anything is saved there."""
    on_step = RunCallback._on_step

    def step(self) -> bool:
        acts.get(self.model.num_timesteps, lambda model: None)(self.model)
        return on_step(self)

    patch.setattr(RunCallback, "_on_step", step)


LOGGED = {"log.tensorboard": True, "log.every": 1, "log.pictures": 0, "eval.every": 0}


def test_a_full_disk_stops_saving_and_not_training(small_disk, monkeypatch, figure):
    """Teeth: with the save's error let through, or TensorBoard's own writer in place of ours, the run dies at step 40."""
    said: list[str] = []

    def act() -> bool:  # in a child: a disk that is written through a memory map would kill it by SIGBUS
        at_steps(monkeypatch, {30: small_disk.fill, 31: write_much, 70: small_disk.free})
        return small_train(small_disk.path / "run", 100, options=LOGGED, log=said.append).real_steps == 100 and reported(said)

    forked(act)
    run = Run.open(small_disk.path / "run")
    assert run.checkpoints == [80, 100] and run.replay().added >= 100 and run.result["real_steps"] == 100
    scalars = tensorboard.read(run.path).scalars
    assert scalars["checkpoint/failed"][-1][1] == 2
    steps = [step for step, _ in scalars["world/loss/reward"]]
    assert any(30 < step < 70 for step in steps) and max(steps) > 70  # what waited in memory was written
    assert "x" * 10_000 in tensorboard.read(run.path).texts["much"][0][1]
    figure("R6", "2 checkpoints on a full disk: 0 runs that end, 0 SIGBUS, all scalars written and the next checkpoint saved")


def write_much(model: Any) -> None:
    """More than what is free in the last page of the event file."""
    model.logger.output_formats[0].writer.add_text("much", "x" * 10_000, model.num_timesteps)


def reported(said: list[str]) -> bool:
    failed = [text for text in said if text.startswith("The checkpoint at real step") and "Free some disk space" in text]
    return [text.split()[5] for text in failed] == ["40", "60"] and any("waits in memory" in text for text in said)


@pytest.mark.parametrize(("limit", "reached"), [(1, 40), (2, 60), (3, 80)])
def test_a_disk_that_stays_full_ends_the_run_with_the_last_good_checkpoint(small_disk, monkeypatch, limit, reached):
    seen: list[int] = []

    def act() -> bool:
        at_steps(
            monkeypatch,
            {30: small_disk.fill, **{step: lambda model: seen.append(model.num_timesteps) for step in (40, 60, 80, 100)}},
        )
        try:
            small_train(small_disk.path / "run", 120, options={**LOGGED, "checkpoint.failures": limit})
        except StorageError as error:
            return error.exit_code == 4 and seen[-1] == reached and "No space left on device" in str(error)
        return False

    forked(act)
    assert Run.open(small_disk.path / "run").checkpoints == [0, 20]
    small_disk.free()
    assert small_train(small_disk.path / "run", 120, options=LOGGED | {"checkpoint.failures": limit}, resume=True).real_steps == 120


def test_the_last_save_must_succeed(small_disk, monkeypatch):
    def act() -> bool:
        at_steps(monkeypatch, {50: small_disk.fill})
        with pytest.raises(StorageError, match="No space left on device"):
            small_train(small_disk.path / "run", 50, options=LOGGED)
        return True

    forked(act)
    assert Run.open(small_disk.path / "run").result is None


def test_a_small_disk_is_told_at_the_start_in_numbers(small_disk):
    said: list[str] = []
    small_train(small_disk.path / "small", 20, options={"train.capacity": 600_000}, log=said.append)
    assert re.search(r"has 8 MB left, but 3 more checkpoints of 0 MB and \d\d MB of replay may come", "\n".join(said))
    said.clear()
    small_train(small_disk.path / "fits", 20, log=said.append)
    assert not any("MB left" in text for text in said)


def test_a_save_of_rows_that_fails_half_way_leaves_its_room_to_the_next_try(small_disk, monkeypatch):
    """Teeth: where the first segments stay, what is freed is not enough."""
    monkeypatch.setattr(segments, "MAX_BYTES", 1 << 20)
    replay = Replay(10_000, {"obs": ((512,), np.uint8)}, 1, 1)
    n = 10_000
    flags = (np.arange(n) % 100 == 0, np.arange(n) % 100 == 99, np.zeros(n, bool))
    replay.extend({"obs": np.ones((n, 512), np.uint8)}, np.zeros((n, 1)), np.zeros(n), *flags)
    blocker = small_disk.path / "blocker"
    blocker.write_bytes(bytes(4 << 20))
    with pytest.raises(StorageError, match="Free some disk space"):
        replay.save(small_disk.path / "replay")
    assert not list((small_disk.path / "replay").iterdir())
    blocker.unlink()
    assert Replay.load(small_disk.path / "replay", replay.save(small_disk.path / "replay")).added == n


# R7: the folder is gone, or nothing may be written ------------------------------------------------------------------------


def test_a_run_whose_folder_is_gone_or_read_only_does_not_end_well(small_disk, monkeypatch, figure):
    """Teeth: a save that swallowed the error would let the run end with a result."""
    folder = small_disk.path / "run"

    def lock_up(
        *_: object,
    ) -> None:  # a view of the folder over it: the disk itself cannot become read-only while the run has it open
        for options in (["--bind", str(folder), str(folder)], ["-o", "remount,bind,ro", str(folder)]):
            subprocess.run(["mount", *options], check=True)

    for at, act in ((30, lock_up), (50, lambda model: shutil.rmtree(folder)), (50, lock_up)):
        with monkeypatch.context() as patch, pytest.raises(StorageError) as error:
            at_steps(patch, {at: act})
            small_train(folder, 50, options=LOGGED)
        assert str(folder) in str(error.value) and error.value.exit_code == 4
        subprocess.run(["umount", "-l", str(folder)], capture_output=True, check=False)
        assert not (folder / "result.json").exists()
        shutil.rmtree(folder, ignore_errors=True)
    figure("R7", "a run folder read-only or deleted at 3 moments: 0 runs that end without an error")


# R10, R11 -----------------------------------------------------------------------------------------------------------------


def test_what_is_newest_is_said_by_numbers_and_not_by_the_clock(tmp_path, figure):
    """Teeth: by the time of change the oldest one would be taken and the newest ones deleted."""
    paths = [checkpoint.write(tmp_path, step, stores.ARRAYS[1], {"step": step}) for step in (9, 10, 11)]
    for path, days in zip(paths, (1, 0, -1)):
        for file in (*path.iterdir(), path):
            os.utime(file, (time.time() + 86_400 * days,) * 2)
    assert checkpoint.newest(tmp_path)[0] == 11
    assert checkpoint.prune(tmp_path, keep=1) == [10, 9]
    runs = stores.Runs(tmp_path / "run")
    with Run.open(runs.template, write=True) as run:
        run._snapshot = run.manifest()["replay"]
        run.config = run.config.override({"checkpoint.keep": 2})
        run.save(runs.algorithm(2), {})
        for file in (run.path / "replay").iterdir():
            os.utime(file, (0, 0))
    assert stores.same_rows(run.replay(), stores.replay_of(2))
    figure("R10", "clocks that jump by a day: order by number in checkpoints and replay")


def test_a_resume_under_other_conditions_lists_each_of_them(tmp_path, monkeypatch, figure):
    """Teeth: each part that is compared is changed here, and what is not said of it is missed."""
    small_train(tmp_path / "run", 20, options={"train.threads": 1})
    with pytest.raises(ConfigError) as refusal:
        small_train(tmp_path / "run", 10, options={"train.threads": 2, "train.batch_size": 4}, resume=True, seed=3)
    for part in ("train.threads: 1 -> 2", "train.batch_size: 3 -> 4", "seed: 0 -> 3", "train.steps: 20 -> 10"):
        assert part in str(refusal.value)
    said: list[str] = []
    monkeypatch.setattr(runs, "versions", lambda: {**versions, "torch": "1.0"})
    versions = Run.open(tmp_path / "run").manifest()["versions"]
    small_train(tmp_path / "run", 30, resume=True, log=said.append)
    assert any(f"torch {versions['torch']} -> 1.0" in text for text in said)
    figure("R11", "a resume with other options, seed, steps, threads and versions: each named with its old and new value")
