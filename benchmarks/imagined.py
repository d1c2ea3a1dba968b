"""Imagined world steps per second through the SB3 interface: `step` of an ImaginedVecEnv, resets and infos included.

    python benchmarks/imagined.py
    python benchmarks/imagined.py --print

The world is that of `make demo` (recipe cartpole, a Gaussian latent of 8, a recurrent state of 128) after 400 real steps; horizon
15, starts from the replay, random actions. Samples that other processes disturbed are set aside and taken again.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import torch
from rows import Row, Rows, marked, options, script, table, timed
from tables import number, spread

import worldmodel as wm
from worldmodel.envs import ImaginedVecEnv

WORLDS, FORMS, THREADS = (64, 256, 1024), ("latent", "decoded"), (1, 2)
TRAIN = {"train.ratio": 0.5, "eval.episodes": 1, "eval.every": 0, "log.tensorboard": False}


def measure(run: wm.Run, worlds: int, observation: str, threads: int, max_seconds: float) -> Row:
    """Milliseconds of a step of all worlds, and steps per second."""
    torch.set_num_threads(threads)
    env = ImaginedVecEnv(run, worlds, observation=observation, seed=0)
    actions = itertools.cycle(np.random.default_rng(0).integers(0, 2, (100, worlds)))
    env.reset()
    taken = timed(lambda: env.step(next(actions)), samples=5, min_seconds=0.3, max_seconds=max_seconds, warmup=30)
    return {**taken, "per_second": worlds * 1000 / statistics.median(taken["ms"])}


def main() -> int:
    parser = options(__doc__)
    parser.add_argument("--worlds", nargs="+", type=int, default=list(WORLDS))
    parser.add_argument("--threads", nargs="+", type=int, default=list(THREADS))
    parser.add_argument("--run", type=Path, help="a run of recipe cartpole; without it, one is trained in a moment")
    parser.add_argument("--most", type=float, default=60, help="seconds to wait for five undisturbed samples of a row")
    args = parser.parse_args()
    rows = Rows("imagined", args.results, args.again)
    keys = [{"worlds": n, "observation": form, "threads": k} for form in FORMS for n in args.worlds for k in args.threads]
    with tempfile.TemporaryDirectory() as folder:

        @cache
        def run() -> wm.Run:
            path = args.run or wm.train("cartpole", steps=400, run_dir=Path(folder) / "run", overrides=TRAIN).run
            return wm.Run.open(path)

        work = lambda key: measure(run(), **key, max_seconds=args.most)  # noqa: E731
        failed = 0 if args.print else rows.measure(keys, work, lambda key: key["threads"])
    lines = []
    for row in rows:
        figures = [marked(spread(row["ms"]), [row]), number(row["per_second"]), number(row["foreign"], 1)]
        lines.append([*row["key"].values(), *figures])
    print(table(["worlds", "observation", "threads", "ms a step of all", "world steps/s", "foreign"], lines))
    return failed


if __name__ == "__main__":
    script(main)
