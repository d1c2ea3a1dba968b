"""Rows say which code made them, stale ones are marked and measured again, and the newest one counts rather than the best."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def rows(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import rows

    return rows


def written(folder: Path, rows, *measured: tuple[int, str | None]) -> None:
    """Rows of one key: (what was measured, its code; "now": of this tree)."""
    lines = [{"key": {"seed": 0}, "x": x, "where": {"code": rows.code() if of == "now" else of}} for x, of in measured]
    (folder / "some.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_row_carries_a_hash_that_any_change_of_the_code_changes(rows, tmp_path):
    for folder in rows.CODE:
        (tmp_path / folder / "deep").mkdir(parents=True)
        (tmp_path / folder / "deep" / "file.py").write_text("x = 1\n")
    seen = [rows._hash(tmp_path)]
    for folder in rows.CODE:
        (tmp_path / folder / "deep" / "file.py").write_text("x = 2\n")
        seen.append(rows._hash(tmp_path))
    (tmp_path / "envs/deep/file.py").rename(tmp_path / "envs/deep/other.py")
    seen.append(rows._hash(tmp_path))
    assert len(set(seen)) == len(seen)
    (tmp_path / "envs/__pycache__").mkdir()
    (tmp_path / "envs/__pycache__/other.pyc").write_bytes(b"x")
    assert rows._hash(tmp_path) == seen[-1]


def test_a_row_of_other_code_is_marked_and_measured_again(rows, tmp_path):
    for of, is_stale in (("now", False), ("0123456789abcdef", True), (None, True)):
        written(tmp_path, rows, (1, of))
        found = rows.Rows("some", tmp_path)
        assert found.has({"seed": 0}) is not is_stale
        text = rows.table(["x"], [[rows.marked(row["x"], [row])] for row in found])
        assert (rows.STALE in text) is (rows.LEGEND in text) is is_stale


def test_of_equal_keys_the_newest_of_this_code_counts_and_never_the_better_one(rows, tmp_path):
    for measured, counts in (
        ([(500, None), (1250, "now"), (1000, "old")], 1250),
        ([(500, "old"), (2000, None)], 2000),
        ([(500, "now"), (1250, "now")], 1250),
    ):
        written(tmp_path, rows, *measured)
        assert [row["x"] for row in rows.Rows("some", tmp_path)] == [counts]


def test_a_row_that_the_code_changed_under_is_stale_at_once(rows, tmp_path, monkeypatch):
    found = rows.Rows("some", tmp_path)
    assert not rows.stale(found.add({"seed": 0}, {"x": 1}, threads=1))
    monkeypatch.setattr(rows, "_hash", lambda: "changed")
    assert rows.stale(found.add({"seed": 1}, {"x": 1}, threads=1))
