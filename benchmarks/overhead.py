"""What logging and keeping cost: the share of the demo's training that event files, checkpoints and the replay's files take.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --print

One process trains the demo's recipe to its end and counts the processor seconds that are spent in the callback that shows the
model, and in writing SB3's scalars; the share is of all processor seconds of the training, evaluation left out. Processor seconds
and not wall seconds: they hardly grow where other processes are busy. The run learns the same with and without logging, bit for
bit (tests/test_watch.py), so nothing else differs.

What is kept is timed by the clock, because it waits for the disk: in a run of its own for each place of the replay, the calls of
Run.save, Run.flush and those that read and write the spool (a call inside another counts once), as a share of the same
run's training seconds. Other load stretches both.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rows import Load, Rows, call, marked, number, options, spread, table


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Train with logging; seconds in all, and in each part of logging."""
    import torch
    from stable_baselines3.common.logger import Logger

    from worldmodel.agents.training.callback import RunCallback
    from worldmodel.agents.training.held_out_callback import HeldOutCallback
    from worldmodel.commands import train as training

    torch.set_num_threads(1)
    spent = {"watch": 0.0, "scalars": 0.0}
    looks: list[float] = []

    def counted(name: str, function: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            since = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                taken = time.process_time() - since
                spent[name] += taken
                if function.__name__ == "show" and taken > 0.05:
                    looks.append(taken)

        return wrapped

    for method in ("show", "_introduce"):
        setattr(HeldOutCallback, method, counted("watch", getattr(HeldOutCallback, method)))
    Logger.dump = counted("scalars", Logger.dump)
    measure = RunCallback.measure
    evaluating = [0.0]

    def measured(*args: Any, **kwargs: Any) -> Any:
        since = time.process_time()
        try:
            return measure(*args, **kwargs)
        finally:
            evaluating[0] += time.process_time() - since

    RunCallback.measure = measured
    with tempfile.TemporaryDirectory() as folder, Load() as load:
        since = time.process_time()
        result = training.train("cartpole", seed=job["seed"], run_dir=Path(folder) / "run", overrides=["log.pictures=500"])
        total = time.process_time() - since - evaluating[0]
        size = sum(file.stat().st_size for file in Path(result.run).glob("events*"))
    return {
        "training_seconds": total,
        "wall_seconds": result.wall_seconds,
        "watch_seconds": spent["watch"],
        "scalar_seconds": spent["scalars"],
        "share": (spent["watch"] + spent["scalars"]) / total,
        "looks": looks,
        "real_steps": result.real_steps,
        "event_megabytes": size / 1e6,
        "foreign": load.cores,
    }


class Clock:
    """Seconds by the clock in functions that it is wrapped around; what one calls of another counts for the outer alone."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self.calls: dict[str, int] = {}
        self._inside = False

    def around(self, owner: type, method: str) -> None:
        function, name = getattr(owner, method), f"{owner.__name__}.{method}"
        self.spent[name], self.calls[name] = 0.0, 0

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return function(*args, **kwargs)
            self._inside, since = True, time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._inside = False
                self.spent[name] += time.perf_counter() - since
                self.calls[name] += 1

        setattr(owner, method, wrapped)


def keep(job: dict[str, Any]) -> dict[str, Any]:
    """Train as anybody does; seconds in all, and in what keeps the state and the experience."""
    import torch

    from worldmodel.commands import train as training
    from worldmodel.storage.columns import DiskColumns
    from worldmodel.storage.replay import Replay
    from worldmodel.storage.run import Run

    torch.set_num_threads(1)
    clock = Clock()
    for owner, method in ((Run, "save"), (Run, "flush"), (Replay, "save"), (DiskColumns, "put"), (DiskColumns, "windows")):
        clock.around(owner, method)
    options = [f"train.replay={job['replay']}", *job["options"]]
    with tempfile.TemporaryDirectory() as folder, Load() as load:
        result = training.train("cartpole", seed=job["seed"], run_dir=Path(folder) / "run", overrides=options)
    return {
        "wall_seconds": result.wall_seconds,
        "seconds": clock.spent,
        "calls": clock.calls,
        "share": sum(clock.spent.values()) / result.wall_seconds,
        "real_steps": result.real_steps,
        "foreign": load.cores,
    }


def show_logging(found: list[dict[str, Any]]) -> None:
    names = ("training_seconds", "watch_seconds", "scalar_seconds", "share", "event_megabytes", "real_steps")
    figures = [[number(row[name]) for name in names] for row in found]
    seeds = [marked(row["key"]["seed"], [row]) for row in found]
    lines = [[seed, *cells, len(row["looks"]), number(row["foreign"])] for seed, row, cells in zip(seeds, found, figures)]
    head = ["seed", "training, s", "shown, s", "scalars, s", "share", "events, MB", "real steps", "looks", "foreign"]
    print(table(head, lines))
    if found:
        print(f"logging: share of training: {spread([100 * row['share'] for row in found])} %")


def show_keeping(found: list[dict[str, Any]]) -> None:
    lines = []
    for row in found:
        spent, calls, key = row["seconds"], row["calls"], row["key"]
        files = spent["Replay.save"] + spent["Spool.put"] + spent["Spool.windows"]
        cells = [number(x) for x in (row["wall_seconds"], spent["Run.save"], spent["Run.flush"], files, row["share"])]
        where = [marked(key["replay"], [row]), key["seed"], " ".join(key["options"])]
        saved = f"{calls['Run.save']} + {calls['Run.flush']}"
        lines.append(
            [*where, *cells, saved, row["real_steps"], number(row["foreign"])]
        )
    head = [
        "replay",
        "seed",
        "options",
        "training, s",
        "saved, s",
        "flushed, s",
        "spool, s",
        "share",
        "saves",
        "real steps",
        "foreign",
    ]
    print(table(head, lines))
    for replay in ("memory", "disk"):
        if shares := [100 * row["share"] for row in found if row["key"]["replay"] == replay]:
            print(f"keeping, replay in {replay}: share of training: {spread(shares)} %")


def main() -> int:
    parser = options(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--print", action="store_true", help="only the table")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("options", nargs="*", help="overrides of the runs that are timed for what they keep: train.steps=750")
    args = parser.parse_args()
    if args.worker:
        job = json.loads(args.worker)
        print(json.dumps(keep(job) if "replay" in job else work(job)))
        return 0
    rows = Rows("overhead", args.results, args.again)
    keys: list[dict[str, Any]] = [{"recipe": "cartpole", "seed": seed} for seed in args.seeds]
    keys += [{**key, "replay": replay, "options": args.options} for key in keys for replay in ("memory", "disk")]
    for key in [] if args.print else keys:
        if not rows.has(key):
            rows.add(key, call(__file__, key, threads=1, seconds=3600), threads=1)
    show_logging([row for row in rows if "replay" not in row["key"]])
    show_keeping([row for row in rows if "replay" in row["key"]])
    return 0


if __name__ == "__main__":
    sys.exit(main())
