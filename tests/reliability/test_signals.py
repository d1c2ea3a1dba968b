"""Signals end a run in order, and one process writes at a time."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import pytest
from catalogue import times
from small_runs import Nervous, small_train
from test_kills import counted, wrong

from worldmodel.errors import StorageError
from worldmodel.storage.run import Run
from worldmodel.storage.run_folder import LOCK


def test_a_signal_at_any_moment_ends_the_run_in_order_and_a_second_one_at_once(tmp_path, figure):
    """Teeth: a handler that only remembers hangs on, one that only raises loses the exit code; both are counted."""
    counts = counted("signals", tmp_path, times(6, 60), "fence")
    assert not wrong(counts), counts
    assert counts["twice"] >= counts["struck"] // 4
    ended = f"{counts['struck']} signals ({counts['twice']} of them doubled) in {counts['runs']} runs"
    text = f"{counts['hung']} later than 5 s, {counts['wrong exit']} other exit codes, {counts['orphans']} orphans"
    figure("R8", f"{ended}: {text}, {counts['differ']} final states that differ")


def writer(folder: Path) -> int:
    """The pid of a child that writes a run until it is killed."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        with Run.open(folder, write=True):
            os.write(write, b"!")
            signal.pause()
        os._exit(0)
    assert os.read(read, 1) == b"!"
    os.close(read)
    os.close(write)
    return pid


def test_a_second_writer_is_refused_by_name_and_a_killed_one_is_not_asked_for(tmp_path, figure):
    """Teeth: without flock the second one trains on, as it did on a copy of the folder."""
    Nervous.steps = 0
    small_train(tmp_path / "run", 20, "Nervous-v0")
    pid = writer(tmp_path / "run")
    try:
        with pytest.raises(StorageError, match=f"pid {pid} on host {socket.gethostname()}") as refusal:
            small_train(tmp_path / "run", 30, "Nervous-v0", resume=True)
        assert refusal.value.exit_code == 4
        assert Run.open(tmp_path / "run").checkpoints == [0, 20]  # reading needs no lock, and nothing was written
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert str(pid) in (tmp_path / "run" / LOCK).read_text()  # stale, as the kill left it
    assert small_train(tmp_path / "run", 30, "Nervous-v0", resume=True).real_steps == 30
    figure("R9", "2 writers: the second refused with pid and host, the lock of a killed one taken without a question")
