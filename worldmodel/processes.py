"""Work in processes of its own: a function by its name, a job as JSON, its result as JSON, several at the same time.

A process that is stopped, or dies, takes nothing else with it. `python -m worldmodel.processes module:function JOB` is one.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ENDS = (signal.SIGTERM, signal.SIGHUP)
LAST_WORDS = 300
"""Characters of a failed process's last line that are kept."""


class Failed(RuntimeError):
    """A process ended without a result."""


class Processes:
    """Commands, each with its own threads; all are stopped together, at the end of a with-block or when the program is.

    They are asked by SIGTERM: a training that is asked to end saves what it has. Inside the with-block SIGTERM and SIGHUP end this
    program as an exception, so that it does so too; Ctrl-C reaches this program alone.
    """

    def __init__(self) -> None:
        self._running: set[subprocess.Popen] = set()
        self._closed = False

    def __enter__(self) -> Processes:
        if threading.current_thread() is threading.main_thread():
            self._before = {ends: signal.signal(ends, lambda number, frame: sys.exit(128 + number)) for ends in ENDS}
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        if threading.current_thread() is threading.main_thread():
            for ends, handler in self._before.items():
                signal.signal(ends, handler)

    def close(self) -> None:
        """Asks all that run to end, and waits for them."""
        self._closed = True
        for process in list(self._running):
            process.terminate()
        for process in list(self._running):
            process.wait()

    def command(
        self, line: Sequence[str], threads: int, seconds: float | None = None, log: Path | None = None, **environment: str
    ) -> dict[str, Any]:
        """The JSON object on the last line of a command's stdout.

        threads  that it computes with
        seconds  after which it is killed
        log      a file for its stderr; None: this process's

        Raises Failed where there is no such line, the command fails or takes too long.
        """
        env = {**os.environ, "OMP_NUM_THREADS": str(threads), **environment}
        with contextlib.ExitStack() as stack:
            errors = stack.enter_context(log.open("ab")) if log is not None else None
            process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=errors, text=True, env=env, start_new_session=True)
            self._running.add(process)
            if self._closed:  # meanwhile
                process.terminate()
            try:
                text = process.communicate(timeout=seconds)[0]
            except subprocess.TimeoutExpired as error:
                process.kill()
                raise Failed(f"no result after {seconds:.0f} s: {' '.join(line[:3])}") from error
            except BaseException:
                process.terminate()
                raise
            finally:
                process.wait()
                self._running.discard(process)
        return _result(line, process.returncode, text, log)

    def call(
        self, function: str, job: Mapping[str, Any], threads: int = 1, seconds: float | None = None, log: Path | None = None
    ) -> dict[str, Any]:
        """What `module:function` makes of a job, in a Python process of its own; both are JSON. Raises Failed."""
        return self.command([sys.executable, "-m", __name__, function, json.dumps(job)], threads, seconds, log)


def _result(line: Sequence[str], status: int, text: str, log: Path | None) -> dict[str, Any]:
    lines = text.strip().splitlines()
    if status or not lines:
        raise Failed(_last_words(log) or f"exit code {status}: {' '.join(line[:3])}")
    try:
        return json.loads(lines[-1])
    except json.JSONDecodeError as error:
        raise Failed(f"the last line is no JSON: {lines[-1][:LAST_WORDS]}") from error


def _last_words(log: Path | None) -> str | None:
    """The last line that a process wrote to its log."""
    lines = [] if log is None else log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].strip()[:LAST_WORDS] if lines else None


def worker(work: Callable[[Any], Mapping[str, Any]], job: str) -> None:
    """What a process does: prints the result of a job on stdout, and all else on stderr."""
    with contextlib.redirect_stdout(sys.stderr):
        result = work(json.loads(job))
    print(json.dumps(result, allow_nan=False))


if __name__ == "__main__":
    module, _, name = sys.argv[1].partition(":")
    worker(getattr(importlib.import_module(module), name), sys.argv[2])
