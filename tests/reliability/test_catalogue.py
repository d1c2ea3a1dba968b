"""The catalogue's own rules."""

from __future__ import annotations

from types import SimpleNamespace

import conftest
import pytest
from catalogue import needs


def test_a_missing_tool_leaves_a_test_out_and_fails_it_on_ci(monkeypatch):
    monkeypatch.setattr("catalogue.ON_CI", False)
    needs(True, "nothing")
    with pytest.raises(pytest.skip.Exception, match="needs the program saw"):
        needs(False, "the program saw")
    monkeypatch.setattr("catalogue.ON_CI", True)
    with pytest.raises(pytest.fail.Exception, match="needs the program saw"):
        needs(False, "the program saw")


def test_the_summary_tells_figures_in_order_and_what_was_left_out():
    lines = []
    reports = {
        "passed": [SimpleNamespace(user_properties=[("figure R2", "40 kills"), ("other", 1)])],
        "failed": [SimpleNamespace(user_properties=[("figure F1", "1 difference")])],
        "skipped": [SimpleNamespace(nodeid="a::b", longrepr=("file", 1, "Skipped: left out: needs the program saw"))],
    }
    reporter = SimpleNamespace(getreports=reports.get, section=lambda title: lines.append(title), line=lines.append)
    conftest.pytest_terminal_summary(reporter)
    assert lines == ["reliability", "F1   1 difference", "R2   40 kills", "left out: a::b: needs the program saw"]
