"""What the reliability tests share: how much of each is tried, which tools it needs, and a figure that says what came out.

`make test` tries each fault some times, `make reliability` (RELIABILITY=full) as often as its promise says; both print the
figures. A tool that is missing leaves its test out, which the summary says; where CI=true that is a failure.
"""

from __future__ import annotations

import os
import shutil

import pytest

FULL = os.environ.get("RELIABILITY") == "full"
ON_CI = os.environ.get("CI") == "true"


def times(quick: int, full: int) -> int:
    """How often: in every run of the tests, or when all is asked for."""
    return full if FULL else quick


def needs(there: bool, what: str) -> None:
    """Leaves the running test out where a tool is missing; on CI, where all of them are installed, it fails instead."""
    if not there:
        (pytest.fail if ON_CI else pytest.skip)(f"left out: needs {what}")


def needs_program(name: str) -> str:
    """The path of a program, as `needs`."""
    path = shutil.which(name)
    needs(path is not None, f"the program {name}")
    return str(path)
