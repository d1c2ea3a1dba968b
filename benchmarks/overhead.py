"""The cost of logging and saving: the share of the demo's training that event files, checkpoints and the replay's files take.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --print

One process trains the demo's recipe to its end and counts the processor seconds spent in the callback that logs pictures of the
model, and in writing SB3's scalars, as a share of all processor seconds of the training without evaluation. Unlike wall seconds
they hardly grow where other processes are busy. The run learns the same with and without logging (tests/test_watch.py).

Saving is timed by the clock, because it waits for the disk: in a run of its own for each kind of replay, the calls of Run.save,
Run.flush and those that read and write the replay's files (a call inside another is not counted again), as a share of the same
run's training seconds. Other load stretches both.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rows import Load, Row, Rows, call, marked, options, script, table
from tables import number, spread


class Clock:
    """Seconds and calls of the methods that it is wrapped around, by name; of nested calls only the outermost counts."""

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        self.now = now
        self.seconds: dict[str, float] = {}
        self.calls: dict[str, int] = {}
        self._inside = False

    def around(self, name: str, owner: type, method: str, done: Callable[[float], None] = lambda seconds: None) -> None:
        """Counts the calls of `owner.method` under `name`; `done` gets the seconds of each."""
        function = getattr(owner, method)
        self.seconds.setdefault(name, 0.0)
        self.calls.setdefault(name, 0)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return function(*args, **kwargs)
            self._inside, since = True, self.now()
            try:
                return function(*args, **kwargs)
            finally:
                taken = self.now() - since
                self._inside = False
                self.seconds[name] += taken
                self.calls[name] += 1
                done(taken)

        setattr(owner, method, wrapped)


def logging(job: Row) -> Row:
    """Train with logging; seconds in all, and in each part of logging."""
    from stable_baselines3.common.logger import Logger

    from worldmodel.agents.training.callback import RunCallback
    from worldmodel.agents.training.held_out_callback import HeldOutCallback
    from worldmodel.commands import train as training

    logged, evaluated = Clock(time.process_time), Clock(time.process_time)
    shown: list[float] = []
    logged.around("watch", HeldOutCallback, "show", shown.append)
    logged.around("watch", HeldOutCallback, "_on_training_start")
    logged.around("scalars", Logger, "dump")
    evaluated.around("measure", RunCallback, "measure")
    with tempfile.TemporaryDirectory() as folder, Load() as load:
        since = time.process_time()
        result = training.train("cartpole", seed=job["seed"], run_dir=Path(folder) / "run", overrides=["log.pictures=500"])
        total = time.process_time() - since - evaluated.seconds["measure"]
        size = sum(file.stat().st_size for file in Path(result.run).glob("events*"))
    return {
        "training_seconds": total,
        "wall_seconds": result.wall_seconds,
        "watch_seconds": logged.seconds["watch"],
        "scalar_seconds": logged.seconds["scalars"],
        "share": sum(logged.seconds.values()) / total,
        "looks": [seconds for seconds in shown if seconds > 0.05],
        "real_steps": result.real_steps,
        "event_megabytes": size / 1e6,
        "foreign": load.cores,
    }


def saving(job: Row) -> Row:
    """Train as by default; seconds in all, and in saving the state and the experience."""
    from worldmodel.commands import train as training
    from worldmodel.storage.disk_columns import DiskColumns
    from worldmodel.storage.replay import Replay
    from worldmodel.storage.run import Run

    clock = Clock()
    for owner, method in ((Run, "save"), (Run, "flush"), (Replay, "save")):
        clock.around(f"{owner.__name__}.{method}", owner, method)
    for method in ("put", "windows"):
        clock.around(f"Spool.{method}", DiskColumns, method)
    options = [f"train.replay={job['replay']}", *job["options"]]
    with tempfile.TemporaryDirectory() as folder, Load() as load:
        result = training.train("cartpole", seed=job["seed"], run_dir=Path(folder) / "run", overrides=options)
    return {
        "wall_seconds": result.wall_seconds,
        "seconds": clock.seconds,
        "calls": clock.calls,
        "share": sum(clock.seconds.values()) / result.wall_seconds,
        "real_steps": result.real_steps,
        "foreign": load.cores,
    }


def work(job: Row) -> Row:
    return saving(job) if "replay" in job else logging(job)


def report_logging(found: list[Row]) -> str:
    names = ("training_seconds", "watch_seconds", "scalar_seconds", "share", "event_megabytes", "real_steps")
    lines = []
    for row in found:
        figures = [number(row[name]) for name in names]
        lines.append([marked(row["key"]["seed"], [row]), *figures, len(row["looks"]), number(row["foreign"])])
    head = ["seed", "training, s", "shown, s", "scalars, s", "share", "events, MB", "real steps", "times shown", "foreign"]
    share = f"\nlogging: share of training: {spread(100 * row['share'] for row in found)} %" if found else ""
    return table(head, lines) + share


def report_saving(found: list[Row]) -> str:
    lines = []
    for row in found:
        seconds, calls, key = row["seconds"], row["calls"], row["key"]
        files = seconds["Replay.save"] + seconds["Spool.put"] + seconds["Spool.windows"]
        cells = [number(x) for x in (row["wall_seconds"], seconds["Run.save"], seconds["Run.flush"], files, row["share"])]
        saves = f"{calls['Run.save']} + {calls['Run.flush']}"
        where = [marked(key["replay"], [row]), key["seed"], " ".join(key["options"])]
        lines.append([*where, *cells, saves, row["real_steps"], number(row["foreign"])])
    head = ["replay", "seed", "options", "training, s", "saved, s", "flushed, s", "files, s", "share", "saves", "real steps"]
    parts = [table([*head, "foreign"], lines)]
    for replay in ("memory", "disk"):
        if shares := [100 * row["share"] for row in found if row["key"]["replay"] == replay]:
            parts.append(f"saving, replay in {replay}: share of training: {spread(shares)} %")
    return "\n".join(parts)


def main() -> int:
    parser = options(__doc__, seeds=(0, 1, 2))
    parser.add_argument("options", nargs="*", help="overrides of the runs in which saving is timed: train.steps=750")
    args = parser.parse_intermixed_args()
    rows = Rows("overhead", args.results, args.again)
    keys: list[Row] = [{"recipe": "cartpole", "seed": seed} for seed in args.seeds]
    keys += [{**key, "replay": replay, "options": args.options} for key in keys for replay in ("memory", "disk")]
    failed = 0 if args.print else rows.measure(keys, lambda key: call(__file__, key, threads=1, seconds=3600))
    print(report_logging([row for row in rows if "replay" not in row["key"]]))
    print(report_saving([row for row in rows if "replay" in row["key"]]))
    return failed


if __name__ == "__main__":
    script(main, work)
