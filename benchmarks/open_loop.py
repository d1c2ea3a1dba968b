"""How far dreams are from what is observed: open-loop error and its ratio to persistence, by horizon, of recipes trained anew.

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

import tempfile
from pathlib import Path
from typing import Any

from rows import Load, Row, Rows, call, grouped, label, marked, options, say, script, table
from tables import spread

TASKS: dict[str, dict[str, Any]] = {
    "cartpole": {"recipe": "cartpole", "context": 5, "horizon": 50, "at": 15},
    "pendulum": {"recipe": "pendulum", "context": 5, "horizon": 50, "at": 15},
    "catch": {"recipe": "catch", "context": 2, "horizon": 15, "at": 6},
}


def work(job: Row) -> Row:
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


def report(rows: Rows) -> str:
    """Per task and options: medians over seeds at the horizons of interest."""
    lines: list[list[object]] = []
    for name, group in grouped(rows, lambda row: label(row["key"], row["key"]["task"])).items():
        first, task = [marked(name, group), len(group)], TASKS[group[0]["key"]["task"]]
        for h in sorted({1, 5, task["at"], min(task["horizon"], 50)}):
            columns = [[row[key][h - 1] for row in group] for key in ("observation", "persistence", "ratio")]
            if any(ratio is not None for ratio in columns[-1]):
                lines.append([*first, h, *(spread(column, 2) for column in columns)])
        worst = [f"{row['worst']['name']} {row['worst']['observation']:.2f}" for row in group if row["worst"]]
        if worst:
            lines.append([*first, "worst", "; ".join(worst), "", ""])
        lines.append([*first, "real steps", spread(row["real_steps"] for row in group), "", ""])
    return table(["task", "seeds", "horizon", "error", "persistence", "ratio"], lines)


def main() -> int:
    parser = options(__doc__, seeds=(0, 1, 2), overrides=True)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--run", help="measure this run of one task and one seed instead of training one")
    args = parser.parse_intermixed_args()
    rows = Rows("open_loop", args.results, args.again)
    keys = [{"task": name, "seed": seed, "overrides": args.overrides} for name in args.tasks for seed in args.seeds]
    run = lambda key: call(__file__, {**TASKS[key["task"]], **key, "run": args.run}, 1, 3600)  # noqa: E731
    failed = 0 if args.print else rows.measure(keys, run)
    print(report(rows))
    return failed


if __name__ == "__main__":
    script(main, work)
