"""Warnings about the memory and disk that a run may need."""

from __future__ import annotations

import shutil
from collections.abc import Callable

from worldmodel.agents.loop import WorldModelAlgorithm
from worldmodel.storage.run import Run

WARN_SHARE = 0.25
"""Share of the free memory or disk above which there is a warning."""


def free_memory() -> int | None:
    """Bytes of available memory; None where it is unknown (it is known on Linux alone)."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            found = dict(line.split(":", 1) for line in file)
        return 1024 * int(found["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return None


def warn_if_large(model: WorldModelAlgorithm, run: Run, warn: Callable[[str], object]) -> None:
    """Warns where the replay may take more than WARN_SHARE of the free memory or disk, or the run more disk than is free."""
    free, keep = shutil.disk_usage(run.path).free, run.config.checkpoint.keep + bool(run.config.eval.every)  # and the best one
    moments = 0 if model.learner.updates else 8 * model.parameter_count  # Adam's two, from the first update on
    checkpoint_bytes, replay, memory = run.checkpoint_bytes + moments, model.replay, free_memory()
    disk_bytes = max(0, replay.disk_bytes - run.replay_bytes)  # still to be written
    if (memory is not None and replay.nbytes > WARN_SHARE * memory) or disk_bytes > WARN_SHARE * free:
        of = "" if memory is None else f" (of {memory / 1e6:,.0f} MB that are free)"
        warn(
            f"The replay may grow to {replay.capacity:,} steps: {replay.nbytes / 1e6:,.0f} MB of memory{of} and "
            f"{disk_bytes / 1e6:,.0f} MB of disk (of {free / 1e6:,.0f} MB). Lower train.capacity or train.replay_gib, or keep it "
            "on the disk alone (train.replay=disk)."
        )
    if free < keep * checkpoint_bytes + disk_bytes:
        warn(
            f"The disk of {run.path} has {free / 1e6:.0f} MB left, but {keep} more checkpoints of {checkpoint_bytes / 1e6:.0f} MB "
            f"and {disk_bytes / 1e6:.0f} MB of replay may come. Free some space, or lower checkpoint.keep or train.capacity."
        )
