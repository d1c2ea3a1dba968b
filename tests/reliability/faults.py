"""Faults at the n-th call of the operating system, dealt by strace to a child that is forked for them."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

CALLS = "openat write pwrite64 fsync ?rename ?renameat ?renameat2 ?mkdir mkdirat ?unlink unlinkat ?rmdir ftruncate".split()
"""What the storage asks of the system; a "?" is for machines that do not have this spelling of it."""
ANY_TRACER = 0x59616D61  # PR_SET_PTRACER


@dataclass
class Struck:
    """What became of the child: its exit status (negative: a signal), and all calls of the faulty kind with their files."""

    call: str
    n: int
    folder: Path
    status: int
    calls: list[str]

    @property
    def fired(self) -> bool:
        return self.status == -signal.SIGKILL or any("(INJECTED)" in line for line in self.calls)


def strike(strace: str, call: str, n: int, fault: str, folder: Path, act: Callable[[Path], int], trace: str = "") -> Struck:
    """Runs `act(folder)` in a forked child, whose n-th `call` from there on meets `fault`."""
    log = folder.with_suffix(".strace")
    pid = os.fork()
    if pid == 0:
        try:
            ctypes.CDLL(None).prctl(ANY_TRACER, ctypes.c_ulong(-1), 0, 0, 0)
            os.kill(os.getpid(), signal.SIGSTOP)  # until strace is there: what is imported before it counts no call
            os._exit(act(folder))
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
            os._exit(99)
    os.waitpid(pid, os.WUNTRACED)
    options = ["-y", "-o", str(log), "-e", f"trace={call},{trace}".rstrip(","), "-e", f"inject={call}:{fault}:when={n}"]
    tracer = subprocess.Popen([strace, *options, "-p", str(pid)], stderr=subprocess.PIPE, text=True)
    said = tracer.stderr.readline()
    os.kill(pid, signal.SIGCONT)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    tracer.communicate()
    assert "attached" in said, said
    return Struck(call, n, folder, status, log.read_text().splitlines())


def strikes(
    strace: str,
    fault: Callable[[int], str],
    prepare: Callable[[Path], object],
    act: Callable[[Path], int],
    place: Path,
    calls: Sequence[str] = CALLS,
    trace: str = "",
) -> Iterator[Struck]:
    """The n-th call of each kind meets fault(n), n = 1, 2, ..., until a child comes through without."""
    place.mkdir(exist_ok=True)
    for call in calls:
        n, fired = 0, True
        while fired:
            n += 1
            folder = place / f"{call.strip('?')}-{n}"
            prepare(folder)
            struck = strike(strace, call, n, fault(n), folder, act, trace)
            fired = struck.fired
            if fired:
                yield struck
