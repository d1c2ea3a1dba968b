"""What the benchmark scripts share: rows in results/<name>.jsonl, worker processes, timed samples.

Rows are those of `worldmodel.storage.rows`, with the commit beside the hash of the code. A row of other code than this tree's is
*stale*: tables mark it with a dagger, and the next run measures it again.

A script parses its arguments, measures the keys that have no row (`Rows.measure`) and prints a table; `script` starts it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from tables import markdown

from worldmodel.processes import Failed, Processes, worker
from worldmodel.storage import rows as storage
from worldmodel.storage.rows import CODE, Key, Row, code, executed, stale

__all__ = ["CODE", "Failed", "Key", "Row", "code", "executed", "stale"]

HERE = Path(__file__).resolve().parent
STALE = "†"
LEGEND = f"{STALE} measured by other code than this tree's; a run without --print measures it again"
QUIET = 0.12
"""Cores kept busy by other processes up to which a timed sample counts as quiet."""

Group = TypeVar("Group", bound=Hashable)


# Scripts --------------------------------------------------------------------------------------------------------------


def options(description: str | None, seeds: Sequence[int] = (), overrides: bool = False) -> argparse.ArgumentParser:
    """A parser of what every script takes; for one of `seeds` (the default ones) or `overrides`, of these too."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results", metavar="DIR", help="folder of the result files")
    parser.add_argument("--again", action="store_true", help="measure rows that are already there once more")
    parser.add_argument("--print", action="store_true", help="only the tables of what is there")
    if seeds:
        parser.add_argument("--seeds", type=int, nargs="+", default=list(seeds))
    if overrides:
        parser.add_argument("overrides", nargs="*", metavar="key=value", help="options of the recipes; other options, other rows")
    return parser


def words(text: str) -> list[str]:
    """The words of an argument, separated by commas."""
    return text.split(",")


def script(main: Callable[[], int], work: Callable[[Row], Row] | None = None) -> NoReturn:
    """Runs a script whose `main` gives the number of failed rows; as a worker (`call`), prints what `work` makes of the job."""
    if sys.argv[1:2] != ["--worker"]:
        sys.exit(min(main(), 1))
    assert work is not None, "a script without workers was started as one"
    worker(work, sys.argv[2])
    sys.exit()


# Rows -----------------------------------------------------------------------------------------------------------------


class Rows(storage.Rows):
    """The rows of one file of a folder; arguments are those of `worldmodel.storage.rows.Rows`."""

    def __init__(self, name: str, folder: Path, again: bool = False, of: str | None = None):
        super().__init__(Path(folder) / f"{name}.jsonl", again, of, say)

    def where(self, threads: int) -> dict[str, Any]:
        return {"commit": _commit(), **super().where(threads)}


def grouped(rows: Iterable[Row], group: Callable[[Row], Group]) -> dict[Group, list[Row]]:
    """The rows by what `group` gives for them, in the order of their appearance."""
    found: dict[Group, list[Row]] = {}
    for row in rows:
        found.setdefault(group(row), []).append(row)
    return found


def label(key: Key, *more: object) -> str:
    """`more` and the options of a key as one text."""
    limits = [f"max_steps={key['max_steps']}"] if key.get("max_steps") else []
    return " ".join(map(str, [*more, *key.get("overrides", ()), *limits]))


def marked(text: object, rows: Iterable[Mapping[str, Any]], of: str | None = None) -> str:
    """`text`, with a dagger where one of its rows is stale."""
    return f"{text} {STALE}" if any(stale(row, of) for row in rows) else str(text)


def table(head: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """A Markdown table for a terminal, and below it what a dagger means where one stands in it."""
    text = markdown(head, lines, aligned=True)
    return f"{text}\n\n{LEGEND}" if STALE in text else text


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _commit() -> str | None:
    """Of the working tree around this file; `+` behind it where tracked files differ."""
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        differs = _git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude,top)benchmarks/results")
        return commit + ("+" if differs else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    return subprocess.run(["git", "-C", str(HERE), *arguments], capture_output=True, text=True, check=True).stdout.strip()


# Workers --------------------------------------------------------------------------------------------------------------


def call(script: str | Path, job: Mapping[str, Any], threads: int, seconds: float) -> dict[str, Any]:
    """`python script --worker JOB` in a process of its own with that many threads; the object on its last line of stdout."""
    return command([sys.executable, str(script), "--worker", json.dumps(job)], threads, seconds)


def command(line: Sequence[str], threads: int, seconds: float, **environment: str) -> dict[str, Any]:
    """The object on the last line of a command's stdout; Failed where it has none, fails, or takes longer than `seconds`."""
    with Processes() as processes:
        return processes.command(line, threads, seconds, **environment)


# Time -----------------------------------------------------------------------------------------------------------------


class Load:
    """`cores`: how many cores other processes kept busy inside a with-block, from /proc/stat; None where there is none."""

    cores: float | None = None

    def __enter__(self) -> Load:
        self._busy, self._own, self._since = _busy_seconds(), _own_seconds(), time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        wall = max(time.perf_counter() - self._since, 1e-9)
        busy = _busy_seconds()
        if busy is not None and self._busy is not None:
            self.cores = round(max(0.0, (busy - self._busy - (_own_seconds() - self._own)) / wall), 2)


def _busy_seconds() -> float | None:
    """Processor seconds, over all cores and processes, in which something ran."""
    try:
        first = Path("/proc/stat").read_text(encoding="ascii").partition("\n")[0]
    except OSError:
        return None
    user, nice, system, _idle, _wait, irq, soft, steal = map(int, first.split()[1:9])
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def timed(work: Callable[[], object], samples: int, min_seconds: float, max_seconds: float, warmup: int = 2) -> dict[str, Any]:
    """Milliseconds of one `work()`: {"ms": [...], "foreign": the largest foreign load among them, "quiet": bool}.

    A sample repeats the work for at least `min_seconds`. Samples under foreign load are set aside and taken again until
    `samples` quiet ones exist; where `max_seconds` pass before that, all count and quiet is False.
    """
    for _ in range(warmup):
        work()
    taken: list[tuple[float, float | None]] = []
    started = time.perf_counter()
    while True:
        with Load() as load:
            count, since = 0, time.perf_counter()
            while not count or time.perf_counter() - since < min_seconds:
                work()
                count += 1
            seconds = time.perf_counter() - since
        taken.append((1000 * seconds / count, load.cores))
        quiet = [sample for sample in taken if (sample[1] or 0.0) <= QUIET]
        late = time.perf_counter() - started > max_seconds
        if len(quiet) >= samples or (late and len(taken) >= samples):
            used = quiet if len(quiet) >= samples else taken
            loads = [cores for _, cores in used if cores is not None]
            return {"ms": [ms for ms, _ in used], "foreign": max(loads, default=None), "quiet": used is quiet}
