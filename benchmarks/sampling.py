"""Milliseconds of one sampled batch of 16 x 64 from a full replay whose ring has wrapped.

    python benchmarks/sampling.py
    python benchmarks/sampling.py --print

Stores: 200,000 CartPole rows in one stream, the same in 8 streams, and 20,000 frames of 64x64x3 uint8 (246 MB).
A quarter of the sequences is chosen so that an episode ends in them, as in training; the rest is uniform.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from rows import Load, Row, Rows, marked, options, script, table
from tables import number

from worldmodel.storage.replay import Replay

BATCH, LENGTH, ENDS = 16, 64, 0.25
STORES: dict[str, dict[str, Any]] = {
    "cartpole": {"capacity": 200_000, "shape": (4,), "dtype": np.float32, "actions": 2, "streams": 1, "episode": 200},
    "cartpole x 8": {"capacity": 200_000, "shape": (4,), "dtype": np.float32, "actions": 2, "streams": 8, "episode": 200},
    "frames": {"capacity": 20_000, "shape": (64, 64, 3), "dtype": np.uint8, "actions": 3, "streams": 1, "episode": 50},
}


def filled(capacity: int, shape: tuple[int, ...], dtype: type, actions: int, streams: int, episode: int) -> Replay:
    """A replay with random rows, a tenth of them evicted; episodes of about `episode` rows."""
    rng = np.random.default_rng(0)
    replay = Replay(capacity, {"obs": (shape, dtype)}, actions, streams)
    pool = rng.integers(0, 256, (256, *shape)).astype(dtype)
    first = np.ones(streams, bool)
    for i in range(int(1.1 * capacity) // streams):
        last = rng.random(streams) < 1 / episode
        obs = pool[(np.arange(streams) + i) % len(pool)]
        action = np.eye(actions, dtype=np.float32)[rng.integers(actions, size=streams)]
        replay.add({"obs": obs}, action, np.ones(streams, np.float32), first, last, last)
        first = last
    return replay


def measure(store: dict[str, Any], count: int) -> Row:
    """Median and 95th percentile of `count` batches, in milliseconds."""
    replay, rng = filled(**store), np.random.default_rng(1)
    taken = []
    with Load() as load:
        for _ in range(count + 10):
            since = time.perf_counter()
            replay.sample(BATCH, LENGTH, rng, terminal_fraction=ENDS)
            taken.append(1000 * (time.perf_counter() - since))
    median, p95 = np.percentile(taken[10:], [50, 95]).tolist()
    size = {"held": len(replay), "megabytes": replay.nbytes / 1e6}
    return {"median_ms": median, "p95_ms": p95, "count": count, **size, "foreign": load.cores}


def main() -> int:
    parser = options(__doc__)
    parser.add_argument("--stores", nargs="+", choices=list(STORES), default=list(STORES))
    parser.add_argument("--count", type=int, default=1000, help="batches of each store")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = Rows("sampling", args.results, args.again)
    keys = [{"store": name, "batch": BATCH, "length": LENGTH, "ends": ENDS} for name in args.stores]
    failed = 0 if args.print else rows.measure(keys, lambda key: measure(STORES[key["store"]], args.count))
    numbers = ("held", "megabytes", "median_ms", "p95_ms", "foreign")
    lines = [[marked(row["key"]["store"], [row]), *(number(row[name]) for name in numbers)] for row in rows]
    print(table(["store", "rows", "MB", "median ms", "p95 ms", "foreign"], lines))
    return failed


if __name__ == "__main__":
    script(main)
