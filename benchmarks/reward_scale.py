"""Real steps until CartPole is solved where its rewards of 1 are a million times greater or smaller.

    python benchmarks/reward_scale.py                              # sizes 1, 1e6, 1e-6, seeds 0 1 2
    python benchmarks/reward_scale.py --sizes 1 100 --seeds 0
    python benchmarks/reward_scale.py --print                      # the table of what is there

The recipe `cartpole` under the protocol of control.py, its reward times the size by gymnasium's TransformReward; the threshold is
475 times the size, and returns are shown over it. Whatever the size, a seed meets the same environments: what differs between the
lines of one seed is how rounded rewards are, and chaos makes the most of that.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any

import control
import gymnasium as gym
from rows import Rows, marked, options, spread, table

from worldmodel.config import Config
from worldmodel.errors import ConfigError

RECIPE, SCALED = "cartpole", "ScaledCartPole-v0"


def work(job: dict[str, Any]) -> dict[str, Any]:
    """What one run came to; its returns are in scaled rewards."""
    size, real = job["size"], gym.spec(Config.from_recipe(RECIPE).env.id)

    def make(**kwargs: Any) -> gym.Env:
        inner = gym.make(real.id, max_episode_steps=-1, disable_env_checker=True, **kwargs)  # the limit is outside, as ever
        return gym.wrappers.TransformReward(inner, lambda reward: size * reward)

    gym.register(SCALED, make, max_episode_steps=real.max_episode_steps)
    return control.work(job)


def jobs(args: argparse.Namespace) -> Iterator[tuple[dict[str, Any], dict[str, Any], int]]:
    """(key of the row, job, threads) of all that is asked for, seeds innermost."""
    config = Config.from_recipe(RECIPE, args.overrides)
    for size in args.sizes:
        scaled = [*args.overrides, f"env.id={SCALED}", f"eval.threshold={config.eval.threshold * size!r}"]
        for seed in args.seeds:
            key = {"size": size, "seed": seed, "overrides": args.overrides}
            key |= {"max_steps": args.max_steps, "max_minutes": args.max_minutes}
            job = {**key, "recipe": RECIPE, "algorithm": control.OURS, "overrides": scaled, "verbose": args.verbose}
            yield key, job, config.train.threads


def report(rows: Rows) -> str:
    """One line for each size and set of options: medians over seeds, [least..greatest]."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(json.dumps({name: value for name, value in row["key"].items() if name != "seed"}), []).append(row)
    lines = []
    for text, found in groups.items():
        key = json.loads(text)
        limits = [f"max_steps={key['max_steps']}"] if key["max_steps"] else []
        solved = [row["solved_at"] for row in found]
        lines.append(
            [
                marked(" ".join([f"{key['size']:g}", *key["overrides"], *limits]), found),
                f"{sum(x is not None for x in solved)}/{len(solved)}",
                spread(solved, 1),
                spread([row["wall_seconds"] if row["solved_at"] else None for row in found]),
                spread([row["final_return"] / key["size"] for row in found]),
            ]
        )
    return table(["reward of a step", "solved", "real steps", "seconds", "final return / size"], lines)


def main() -> int:
    if sys.argv[1:2] == ["--worker"]:
        print(json.dumps(work(json.loads(sys.argv[2])), allow_nan=False))
        return 0
    parser = options(__doc__)
    parser.add_argument("--sizes", type=float, nargs="+", default=[1.0, 1e6, 1e-6])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--max-steps", type=int, help="ends every run there (default: the recipe's own length)")
    parser.add_argument("--max-minutes", type=float, default=60.0, help="ends every run then, evaluation included")
    parser.add_argument("--print", action="store_true", help="only the table")
    parser.add_argument("--verbose", action="store_true", help="every evaluation on stderr")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options of the recipe")
    args = parser.parse_intermixed_args()
    rows = Rows("reward_scale", args.results, args.again)
    try:
        failed = 0 if args.print else rows.measure(__file__, jobs(args), control.seconds_for(args), control.came)
    except ConfigError as error:
        parser.error(str(error))
    print(report(rows))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
