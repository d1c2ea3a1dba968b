"""What `train --minutes` makes of a given time, beside updates a step that are set by hand.

    python benchmarks/minutes.py                               # two environments, 3 minutes, seeds 0 1
    python benchmarks/minutes.py --envs LunarLander-v3 --seeds 0 1 2
    python benchmarks/minutes.py --print                       # the table of what is there

`chosen` leaves all to --minutes; a number is train.ratio, kept as it is, and --minutes chooses the rest. Return: 20 greedy episodes
at the end, of the best evaluated agent. Seconds: the whole call, evaluations included. Measure alone: all depends on the clock.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from rows import Key, Row, Rows, call, grouped, marked, options, say, script, table
from tables import spread

import worldmodel

ENVS = ("CartPole-v1", "LunarLander-v3")
RATIOS = ("chosen", "0.1", "0.25", "0.5", "1", "2", "4")


def work(job: Row) -> Row:
    """One run."""
    overrides = [] if job["ratio"] == "chosen" else [f"train.ratio={job['ratio']}"]
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        result = worldmodel.train(
            job["env"], minutes=job["minutes"], seed=job["seed"], overrides=overrides, run_dir=Path(folder) / "run", log=say
        )
        seconds = time.perf_counter() - started
    return {"return": result.final_return, "steps": result.real_steps, "updates": result.updates, "seconds": round(seconds, 1)}


def report(rows: Rows) -> str:
    """A line for each environment and ratio: medians over seeds, [min..max]."""
    lines = []
    for (env, ratio), found in grouped(rows, lambda row: (row["key"]["env"], row["key"]["ratio"])).items():
        figures = (spread([row[name] for row in found], 0) for name in ("return", "steps", "updates", "seconds"))
        lines.append([marked(env, found), ratio, *figures])
    return table(["environment", "updates a step", "return", "real steps", "updates", "seconds"], lines)


def main() -> int:
    parser = options(__doc__, seeds=(0, 1))
    parser.add_argument("--envs", nargs="+", default=list(ENVS))
    parser.add_argument("--ratios", nargs="+", default=list(RATIOS))
    parser.add_argument("--minutes", type=float, default=3.0)
    args = parser.parse_args()
    rows = Rows("minutes", args.results, args.again)

    def run(key: Key) -> Row:
        return call(__file__, key, 1, 120 * args.minutes)

    keys = [
        {"env": env, "ratio": ratio, "minutes": args.minutes, "seed": seed}
        for env in args.envs
        for ratio in args.ratios
        for seed in args.seeds
    ]
    failed = 0 if args.print else rows.measure(keys, run, lambda key: 1)
    print(report(rows))
    return failed


if __name__ == "__main__":
    script(main, work)
