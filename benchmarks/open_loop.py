"""How far dreams are from what came: open-loop error and its ratio to persistence, by horizon, of recipes trained anew.

    python benchmarks/open_loop.py
    python benchmarks/open_loop.py --tasks cartpole --seeds 0 1 2 train.ema_decay=0
    python benchmarks/open_loop.py --tasks catch --seeds 0 --run runs/catch-s0
    python benchmarks/open_loop.py --print

Each row trains a recipe as `worldmodel train` does, then measures as `worldmodel dream` does: 20 fresh episodes (environment
seeds from 40000), greedy with a random action in five steps, a start every 10 steps, 8 roll-outs, errors in deviations of the
run's observations (pixels: of [0, 1]).
Catch lasts 7 steps, so horizon 15 fits nowhere; with a context of 2 frames, which show the drift, horizon 6 is its longest.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from rows import Load, Rows, marked, options, say, spread, table

TASKS: dict[str, dict[str, Any]] = {
    "cartpole": {"recipe": "cartpole", "context": 5, "horizon": 50, "at": 15},
    "pendulum": {"recipe": "pendulum", "context": 5, "horizon": 50, "at": 15},
    "catch": {"recipe": "catch", "context": 2, "horizon": 15, "at": 6},
}


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Train unless there is a run, then dream."""
    from worldmodel.commands.dream import dream
    from worldmodel.commands.train import train
    from worldmodel.storage.run import Run

    with tempfile.TemporaryDirectory() as folder, Load() as load:
        path = job["run"] or Path(folder) / "run"
        if job["run"] is None:
            train(job["recipe"], seed=job["seed"], run_dir=path, overrides=job["overrides"], log=say)
        manifest = Run.open(path).manifest()
        errors = dream(path, job["context"], job["horizon"], episodes=20, log=say)
    if manifest["seed"] != job["seed"]:
        raise SystemExit(f"{path} has seed {manifest['seed']}, not {job['seed']}. Name its seed with --seeds.")
    kept = {"real_steps": manifest["step"], "solved_at": manifest["progress"]["solved_at"]}
    return {**kept, **{name: x for name, x in errors.items() if name not in ("run", "out")}, "foreign": load.cores}


def lines(rows: Rows) -> list[list[str]]:
    """Per task and options: medians over seeds at the horizons of interest."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(" ".join([row["key"]["task"], *row["key"]["overrides"]]), []).append(row)
    out = []
    for label, group in groups.items():
        name = marked(label, group)
        task = TASKS[group[0]["key"]["task"]]
        for h in sorted({1, 5, task["at"], min(task["horizon"], 50)}):
            cells = {key: [row[key][h - 1] for row in group] for key in ("observation", "persistence", "ratio")}
            if all(x is None for x in cells["ratio"]):
                continue
            shown = [spread(cells[key], 2) for key in ("observation", "persistence", "ratio")]
            out.append([name, str(len(group)), str(h), *shown])
        worst = [f"{row['worst']['name']} {row['worst']['observation']:.2f}" for row in group if row["worst"]]
        if worst:
            out.append([name, str(len(group)), "worst", "; ".join(worst), "", ""])
        steps = spread([row["real_steps"] for row in group])
        out.append([name, str(len(group)), "real steps", steps, "", ""])
    return out


def main() -> int:
    parser = options(__doc__)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--run", help="measure this run of one task and one seed instead of training one")
    parser.add_argument("--print", action="store_true", help="only the table")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args, overrides = parser.parse_known_args()
    if args.worker:
        print(json.dumps(work(json.loads(args.worker))))
        return 0
    rows = Rows("open_loop", args.results, args.again)
    keys = [{"task": name, "seed": seed, "overrides": overrides} for name in args.tasks for seed in args.seeds]
    jobs = [(key, {**TASKS[key["task"]], "seed": key["seed"], "overrides": overrides, "run": args.run}, 1) for key in keys]
    failed = 0 if args.print else rows.measure(__file__, jobs, 3600)
    print(table(["task", "seeds", "horizon", "error", "persistence", "ratio"], lines(rows)))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
