"""Child processes of tests: a test module that is run as a script, with a job as JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent
HANG = 600
"""Seconds after which a child counts as hanging."""


def in_child(script: str, job: dict[str, Any], cwd: Path | None = None, **environment: str) -> dict[str, Any]:
    """`python script JOB` with the tests' modules on its path; the object on the last line of its stdout."""
    env = {**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([sys.executable, script, json.dumps(job)], capture_output=True, text=True, env=env, cwd=cwd, timeout=HANG)
    assert done.returncode == 0, f"exit code {done.returncode}:\n{done.stderr[-4000:]}"
    return json.loads(done.stdout.strip().splitlines()[-1])


def memory() -> dict[str, int]:
    """KiB by the names of /proc/self/status (VmHWM, VmRSS, RssAnon, VmData), file descriptors and threads of this process."""
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    sizes = {line.partition(":")[0]: int(line.split()[1]) for line in lines if line.endswith(" kB")}
    return {**sizes, "fds": len(os.listdir("/proc/self/fd")), "threads": len(os.listdir("/proc/self/task"))}
