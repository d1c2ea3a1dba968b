"""Finished measurements, one JSON object a line, each with a hash of the source that made it; a stop loses none of them.

A row is its key, what was measured, and under `where` the hash, the date, threads, versions and processor. Rows are only ever
appended. Of rows with equal keys the newest of this source counts, else the newest: never the better one. A row of another one is
*stale*.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import io
import json
import os
import platform
import threading
import time
import tokenize
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from worldmodel.processes import Failed

PACKAGES = ("worldmodel", "torch", "numpy", "gymnasium", "stable_baselines3", "zuko")
CODE = ("worldmodel", "agents", "envs", "configs")
"""Folders of the source that is measured, as they stand in the repository."""

Row = dict[str, Any]
Key = Mapping[str, Any]


class Rows:
    """The rows of one file.

    again  measure those that are there as well
    of     hash of the source that other rows are stale against; default: this one's
    log    gets a line for each row
    """

    def __init__(
        self, file: Path, again: bool = False, of: str | None = None, log: Callable[[str], object] = lambda text: None
    ) -> None:
        self.file, self.again, self.log, self.code, self._lock = Path(file), again, log, code(), threading.Lock()
        lines = self.file.read_text(encoding="utf-8").splitlines() if self.file.exists() else []
        self._rows: dict[str, Row] = {}
        for row in filter(None, map(_row, lines)):
            text = _text(row["key"])
            if text not in self._rows or stale(self._rows[text], of) or not stale(row, of):
                self._rows[text] = row

    def get(self, key: Key) -> Row | None:
        """The row that counts for a key."""
        return self._rows.get(_text(key))

    def has(self, key: Key) -> bool:
        """Whether this row need not be measured; says so."""
        row = self.get(key)
        if row is None or self.again:
            return False
        self.log(f"{'there, but of other source' if stale(row) else 'already there'}: {_short(key)}")
        return not stale(row)

    def add(self, key: Key, measured: Mapping[str, Any], threads: int) -> Row:
        """Appends one finished row; `measured` may not hold NaN, which JSON has not.

        Where the source changed since these rows were opened, nobody knows which of both made the row: it is stale at once.
        """
        with self._lock:  # several threads add rows, and Python 3.11 parses source in one at a time
            here = {**self.where(threads), "code": self.code if self.code == _hash() else None}
            row = {"key": dict(key), **measured, "where": here}
            line = json.dumps(row, allow_nan=False)
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("ab+") as file:
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                    line = line if file.read(1) == b"\n" else f"\n{line}"  # a kill has cut the last one
                file.write(f"{line}\n".encode())
            self._rows[_text(key)] = row
            return row

    def where(self, threads: int) -> dict[str, Any]:
        """The circumstances of a row."""
        return where(threads)

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
                self.log(f"failed: {_short(key)}: {error}")
                return 1
            figures = f"{summary(row)}, " if summary else ""
            self.log(f"done: {_short(key)}: {figures}{time.perf_counter() - since:.0f} s in all")
            return 0

        missing = [key for key in keys if not self.has(key)]
        if at_once == 1:
            return sum(map(one, missing))
        pool = ThreadPoolExecutor(at_once)
        try:
            return sum(pool.map(one, missing))
        finally:  # at a stop nothing else begins, and who has started processes ends them
            pool.shutdown(wait=False, cancel_futures=True)

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows.values())


def _row(line: str) -> Row | None:
    """A line's row; None for an empty one, and for the part of one that a full disk or a kill has left."""
    try:
        return json.loads(line) if line.strip() else None
    except json.JSONDecodeError:
        return None


def stale(row: Mapping[str, Any], of: str | None = None) -> bool:
    """Whether another source than that of hash `of` (this one's) made the row, or nobody knows which."""
    return row.get("where", {}).get("code") != (of or code())


def where(threads: int) -> dict[str, Any]:
    """The circumstances of a measurement with so many threads."""
    return {
        "code": code(),
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "threads": threads,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
    }


# The code ---------------------------------------------------------------------------------------------------------------


@cache
def code() -> str:
    """A hash of what is in `CODE`, as it was when this process first asked; 16 hex digits."""
    return _hash()


def folders() -> dict[str, Path]:
    """Where the folders of `CODE` lie: side by side in the repository, within the first one where they are installed."""
    specs = {name: importlib.util.find_spec(name if name == CODE[0] else f"{CODE[0]}.{name}") for name in CODE}
    return {name: Path(spec.origin).parent for name, spec in specs.items() if spec is not None and spec.origin is not None}


def _hash(parts: Mapping[str, Path] | None = None) -> str:
    """Of names and contents of all files in some folders, but for caches, comments and docstrings."""
    parts = folders() if parts is None else parts
    digest = hashlib.sha256()
    for name, folder in parts.items():
        others = [other for other in parts.values() if other != folder and folder in other.parents]
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            hidden = "__pycache__" in file.parts or file.name.startswith(".") or any(other in file.parents for other in others)
            if not hidden:
                at = file.stat()
                content = _content(file, at.st_mtime_ns, at.st_size)
                digest.update(f"{name}/{file.relative_to(folder).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:16]


@cache
def _content(file: Path, changed: int, size: int) -> bytes:
    """What of a file decides a figure; read again where it has changed."""
    return executed(file.read_text("utf-8")).encode() if file.suffix == ".py" else file.read_bytes()


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


def _text(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)


def _short(key: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in key.items() if value not in (None, [], {}))


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
