"""What the benchmark scripts share: rows in results/<name>.jsonl, worker processes, timed samples.

A row is one finished measurement: its key, what was measured, and under `where` the commit, a hash of the code, the date, threads,
versions and processor. Rows are only ever appended. Of rows with equal keys the newest of this tree's code counts, else the
newest: never the better one. A row of other code than this tree's is *stale*: tables mark it with a dagger, and the next run
measures it again.

A script parses its arguments, measures the keys that have no row (`Rows.measure`) and prints a table; `script` starts it.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import hashlib
import io
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
import tokenize
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from tables import markdown

HERE = Path(__file__).resolve().parent
PACKAGES = ("worldmodel", "torch", "numpy", "gymnasium", "stable_baselines3", "zuko")
CODE = ("worldmodel", "agents", "envs", "configs")
"""Folders of the code that is measured."""
STALE = "†"
LEGEND = f"{STALE} measured by other code than this tree's; a run without --print measures it again"
QUIET = 0.12
"""Cores kept busy by other processes up to which a timed sample counts as quiet."""


Row = dict[str, Any]
Key = Mapping[str, Any]
Group = TypeVar("Group", bound=Hashable)


class Failed(RuntimeError):
    """A worker ended without a result."""


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
    with contextlib.redirect_stdout(sys.stderr):
        result = work(json.loads(sys.argv[2]))
    print(json.dumps(result, allow_nan=False))
    sys.exit()


# Rows -----------------------------------------------------------------------------------------------------------------


class Rows:
    """The rows of one file.

    again  measure those that are there as well
    of     hash of the code that rows of other code are stale against; default: this tree's
    """

    def __init__(self, name: str, folder: Path, again: bool = False, of: str | None = None):
        self.file, self.again, self.code = Path(folder) / f"{name}.jsonl", again, code()
        lines = self.file.read_text(encoding="utf-8").splitlines() if self.file.exists() else []
        self._rows: dict[str, Row] = {}
        for row in map(json.loads, filter(None, lines)):
            text = _text(row["key"])
            if text not in self._rows or stale(self._rows[text], of) or not stale(row, of):
                self._rows[text] = row

    def has(self, key: Key) -> bool:
        """Whether this row need not be measured; says so."""
        row = self._rows.get(_text(key))
        if row is None or self.again:
            return False
        say(f"{'there, but of other code' if stale(row) else 'already there'}: {_short(key)}")
        return not stale(row)

    def add(self, key: Key, measured: Mapping[str, Any], threads: int) -> Row:
        """Appends one finished row; `measured` may not hold NaN, which JSON has not.

        Where the code changed since these rows were opened, nobody knows which of both made the row: it is stale at once.
        """
        row = {"key": dict(key), **measured, "where": {**where(threads), "code": self.code if self.code == _hash() else None}}
        line = json.dumps(row, allow_nan=False)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        self._rows[_text(key)] = row
        return row

    def measure(
        self,
        keys: Iterable[Key],
        work: Callable[[Key], Mapping[str, Any]],
        threads: Callable[[Key], int] = lambda key: 1,
        summary: Callable[[Row], str] | None = None,
        at_once: int = 1,
    ) -> int:
        """Adds what `work` gives for each key without a row, `at_once` keys at a time; gives the number of those that failed.

        summary  what is said of a finished row
        """

        def one(key: Key) -> int:
            since = time.perf_counter()
            try:
                row = self.add(key, work(key), threads(key))
            except Failed as error:
                say(f"failed: {_short(key)}: {error}")
                return 1
            figures = f"{summary(row)}, " if summary else ""
            say(f"done: {_short(key)}: {figures}{time.perf_counter() - since:.0f} s in all")
            return 0

        missing = [key for key in keys if not self.has(key)]
        if at_once == 1:
            return sum(map(one, missing))
        with ThreadPoolExecutor(at_once) as pool:
            return sum(pool.map(one, missing))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._rows.values())


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


def where(threads: int) -> dict[str, Any]:
    """The circumstances of a row."""
    return {
        "commit": _commit(),
        "code": code(),
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "threads": threads,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
    }


@cache
def code() -> str:
    """A hash of what is in `CODE`, as it was when this process first asked."""
    return _hash()


def _hash(root: Path = HERE.parent) -> str:
    """Of names and contents of all files in `CODE`, but for caches, comments and docstrings; 16 hex digits."""
    digest = hashlib.sha256()
    for folder in CODE:
        for file in sorted(path for path in (root / folder).rglob("*") if path.is_file()):
            if "__pycache__" not in file.parts and not file.name.startswith("."):
                content = executed(file.read_text("utf-8")).encode() if file.suffix == ".py" else file.read_bytes()
                digest.update(f"{file.relative_to(root).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:16]


def executed(source: str) -> str:
    """Python without comments, blank lines and docstrings, also those behind a name: none of them changes a figure."""
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    return "\n".join(line.rstrip() for line in lines if line.strip())


def stale(row: Mapping[str, Any], of: str | None = None) -> bool:
    """Whether other code than that of hash `of` (this tree's) made the row, or nobody knows which."""
    return row.get("where", {}).get("code") != (of or code())


def marked(text: object, rows: Iterable[Mapping[str, Any]], of: str | None = None) -> str:
    """`text`, with a dagger where one of its rows is stale."""
    return f"{text} {STALE}" if any(stale(row, of) for row in rows) else str(text)


def table(head: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """A Markdown table for a terminal, and below it what a dagger means where one stands in it."""
    text = markdown(head, lines, aligned=True)
    return f"{text}\n\n{LEGEND}" if STALE in text else text


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _text(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)


def _short(key: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in key.items() if value not in (None, [], {}))


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


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


# Workers --------------------------------------------------------------------------------------------------------------


def call(script: str | Path, job: Mapping[str, Any], threads: int, seconds: float) -> dict[str, Any]:
    """`python script --worker JOB` in a process of its own with that many threads; the object on its last line of stdout."""
    return command([sys.executable, str(script), "--worker", json.dumps(job)], threads, seconds)


def command(line: Sequence[str], threads: int, seconds: float, **environment: str) -> dict[str, Any]:
    """The object on the last line of a command's stdout; Failed where it has none, fails, or takes longer than `seconds`."""
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), **environment}
    if threading.current_thread() is threading.main_thread():  # an exception, on which `run` kills the worker
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        done = subprocess.run(line, stdout=subprocess.PIPE, text=True, env=env, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        raise Failed(f"no result after {seconds:.0f} s: {' '.join(line[:3])}") from error
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        raise Failed(f"exit code {done.returncode}: {' '.join(line[:3])}")
    try:
        return json.loads(lines[-1])
    except json.JSONDecodeError as error:
        raise Failed(f"the last line is no JSON: {lines[-1][:200]}") from error


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
