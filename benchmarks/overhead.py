"""What logging costs: seconds of the demo's training that looks at held-out episodes, figures and event files take.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --print

One process trains the demo's recipe to its end and counts the processor seconds that are spent in the callback that shows the
model, and in writing SB3's scalars; the share is of all processor seconds of the training, evaluation left out. Processor seconds
and not wall seconds: they hardly grow where other processes are busy. The run learns the same with and without logging, bit for
bit (tests/test_watch.py), so nothing else differs.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rows import Load, Rows, call, number, options, spread, table


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Train with logging; seconds in all, and in each part of logging."""
    import torch
    from stable_baselines3.common.logger import Logger

    from worldmodel.agents import train as training
    from worldmodel.agents.watch import Watch

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
        setattr(Watch, method, counted("watch", getattr(Watch, method)))
    Logger.dump = counted("scalars", Logger.dump)
    measure = training.Keeper.measure
    evaluating = [0.0]

    def measured(*args: Any, **kwargs: Any) -> Any:
        since = time.process_time()
        try:
            return measure(*args, **kwargs)
        finally:
            evaluating[0] += time.process_time() - since

    training.Keeper.measure = measured
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


def main() -> int:
    parser = options(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--print", action="store_true", help="only the table")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(work(json.loads(args.worker))))
        return 0
    rows = Rows("overhead", args.results, args.again)
    for seed in [] if args.print else args.seeds:
        key = {"recipe": "cartpole", "seed": seed}
        if not rows.has(key):
            rows.add(key, call(__file__, {"seed": seed}, threads=1, seconds=3600), threads=1)
    found = list(rows)
    names = ("training_seconds", "watch_seconds", "scalar_seconds", "share", "event_megabytes", "real_steps")
    figures = [[number(row[name]) for name in names] for row in found]
    lines = [[row["key"]["seed"], *cells, len(row["looks"]), number(row["foreign"])] for row, cells in zip(found, figures)]
    head = ["seed", "training, s", "shown, s", "scalars, s", "share", "events, MB", "real steps", "looks", "foreign"]
    print(table(head, lines))
    if found:
        print(f"share of training: {spread([100 * row['share'] for row in found])} %")
    return 0


if __name__ == "__main__":
    sys.exit(main())
