"""What the benchmark scripts share: rows in results/<name>.jsonl, workers, foreign load, timed samples, tables.

A row is one finished measurement: the key that identifies it, what was measured, and under `where` the commit, a hash of the
code, when, the threads, the versions and the processor. Rows are only ever appended. Of rows with equal keys the newest of this
tree's code counts, else the newest: never the better one. A row of other code than this tree's is *stale*: tables mark it with
a dagger, and a run measures it again.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import io
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import threading
import time
import tokenize
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PACKAGES = ("worldmodel", "torch", "numpy", "gymnasium", "stable_baselines3", "zuko")
CODE = ("worldmodel", "agents", "envs", "configs")
"""Folders whose content makes a row's figures."""
STALE = "†"
LEGEND = f"{STALE} measured by other code than this tree's; a run without --print measures it again"
QUIET = 0.12
"""Foreign cores up to which a timed sample counts as quiet."""


class Failed(RuntimeError):
    """A worker ended without a result."""


# Rows -----------------------------------------------------------------------------------------------------------------


def options(description: str | None) -> argparse.ArgumentParser:
    """A parser with what every script takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results", metavar="DIR", help="folder of the result files")
    parser.add_argument("--again", action="store_true", help="measure rows that are already there once more")
    return parser


class Rows:
    """The rows of one file; `of`: the hash of the code by which they are stale or not, without one this tree's."""

    def __init__(self, name: str, folder: Path, again: bool = False, of: str | None = None):
        self.file, self.again, self.code, self.of = Path(folder) / f"{name}.jsonl", again, code(), of
        lines = self.file.read_text(encoding="utf-8").splitlines() if self.file.exists() else []
        self._rows: dict[str, dict[str, Any]] = {}
        for row in map(json.loads, filter(None, lines)):
            self._keep(row)

    def _keep(self, row: dict[str, Any]) -> None:
        word = _word(row["key"])
        if word not in self._rows or stale(self._rows[word], self.of) or not stale(row, self.of):
            self._rows[word] = row

    def has(self, key: Mapping[str, Any]) -> bool:
        """Whether this row need not be measured; says so."""
        row = self._rows.get(_word(key))
        if row is None or self.again:
            return False
        say(f"{'there, but of other code' if stale(row) else 'already there'}: {_short(key)}")
        return not stale(row)

    def add(self, key: Mapping[str, Any], measured: Mapping[str, Any], threads: int) -> dict[str, Any]:
        """Appends one finished row; `measured` may not hold NaN, for JSON has none.

        Where the code changed since these rows were opened, nobody knows which of both made the row: it is stale at once.
        """
        row = {"key": dict(key), **measured, "where": {**where(threads), "code": self.code if self.code == _hash() else None}}
        line = json.dumps(row, allow_nan=False)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        self._rows[_word(key)] = row
        say(f"done: {_short(key)}")
        return row

    def measure(
        self,
        script: str | Path,
        jobs: Iterable[tuple[Mapping[str, Any], Mapping[str, Any], int]],
        seconds: float,
        tell: Callable[[dict[str, Any]], str] | None = None,
    ) -> int:
        """Runs what is missing of (key, job, threads), one after the other, as `call` does; gives the number that failed.

        tell  what is said of a row that has come
        """
        failed = 0
        for key, job, threads in list(jobs):  # a wrong name or option is found before anything runs
            if self.has(key):
                continue
            since = time.perf_counter()
            try:
                row = self.add(key, call(script, job, threads, seconds), threads)
            except Failed as error:
                failed += 1
                say(f"failed: {_short(key)}: {error}")
                continue
            if tell is not None:
                say(f"  {tell(row)}, {time.perf_counter() - since:.0f} s in all")
        return failed

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._rows.values())


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
    """Of names and contents of all files in `CODE`, caches and what only people read aside; 16 hex digits."""
    digest = hashlib.sha256()
    for folder in CODE:
        for file in sorted(path for path in (root / folder).rglob("*") if path.is_file()):
            if "__pycache__" not in file.parts and not file.name.startswith("."):
                content = _executed(file.read_text("utf-8")).encode() if file.suffix == ".py" else file.read_bytes()
                digest.update(f"{file.relative_to(root).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:16]


def _executed(source: str) -> str:
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
    """`text`, with a dagger where one of the rows that it tells of is stale."""
    return f"{text} {STALE}" if any(stale(row, of) for row in rows) else str(text)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _word(key: Mapping[str, Any]) -> str:
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


def _git(*words: str) -> str:
    return subprocess.run(["git", "-C", str(HERE), *words], capture_output=True, text=True, check=True).stdout.strip()


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


def command(words: Sequence[str], threads: int, seconds: float, **environment: str) -> dict[str, Any]:
    """The object on the last line of a command's stdout; Failed where it has none, fails, or takes longer than `seconds`."""
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), **environment}
    if threading.current_thread() is threading.main_thread():  # an exception, on which `run` kills the worker
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, env=env, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        raise Failed(f"no result after {seconds:.0f} s: {' '.join(words[:3])}") from error
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        raise Failed(f"exit code {done.returncode}: {' '.join(words[:3])}")
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


def timed(work: Callable[[], object], samples: int, least: float, most: float, warmup: int = 2) -> dict[str, Any]:
    """Milliseconds of one `work()`: {"ms": [...], "foreign": the greatest foreign load among them, "quiet": bool}.

    A sample repeats the work for at least `least` seconds. Samples under foreign load are set aside and taken again until
    `samples` quiet ones exist; where `most` seconds pass before that, all count and quiet is False.
    """
    for _ in range(warmup):
        work()
    taken: list[tuple[float, float | None]] = []
    begun = time.perf_counter()
    while True:
        with Load() as load:
            count, since = 0, time.perf_counter()
            while not count or time.perf_counter() - since < least:
                work()
                count += 1
            spent = time.perf_counter() - since
        taken.append((1000 * spent / count, load.cores))
        quiet = [sample for sample in taken if (sample[1] or 0.0) <= QUIET]
        late = time.perf_counter() - begun > most
        if len(quiet) >= samples or (late and len(taken) >= samples):
            used = quiet if len(quiet) >= samples else taken
            loads = [cores for _, cores in used if cores is not None]
            return {"ms": [ms for ms, _ in used], "foreign": max(loads, default=None), "quiet": used is quiet}


# Tables ---------------------------------------------------------------------------------------------------------------


def spread(values: Iterable[float | None], digits: int = 3) -> str:
    """`median [min..max]`; None stands for what never came, and is greater than everything."""
    known = sorted(math.inf if x is None else float(x) for x in values)
    if not known:
        return ""
    middle = number(median(known), digits)
    return middle if len(known) == 1 else f"{middle} [{number(known[0], digits)}..{number(known[-1], digits)}]"


def median(values: Iterable[float | None]) -> float:
    """The median, None being greater than everything: infinite where at least half never came."""
    known = [math.inf if x is None else float(x) for x in values]
    return statistics.median_high(known) if math.inf in known else statistics.median(known)


def number(x: float | None, digits: int = 3) -> str:
    """At least `digits` significant digits, thousands set apart; `-` for what never came."""
    if x is None or math.isinf(x):
        return "-"
    if x == 0:
        return "0"
    return f"{x:,.{max(0, digits - 1 - math.floor(math.log10(abs(x))))}f}"


def table(head: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """A Markdown table with aligned columns, and what a dagger means where one stands in it."""
    cells = [list(head), *([str(x) for x in line] for line in lines)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    drawn = ["| " + " | ".join(x.ljust(w) for x, w in zip(row, widths)) + " |" for row in cells]
    legend = ["", LEGEND] if any(STALE in x for row in cells for x in row) else []
    return "\n".join([drawn[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *drawn[1:], *legend])
