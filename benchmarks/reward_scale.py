"""Real steps until CartPole is solved where its rewards of 1 are a million times greater or smaller.

    python benchmarks/reward_scale.py                              # sizes 1, 1e6, 1e-6, seeds 0 1 2
    python benchmarks/reward_scale.py --sizes 1 100 --seeds 0
    python benchmarks/reward_scale.py --print                      # the table of what is there

The recipe `cartpole` under the protocol of control.py, its reward times the size by gymnasium's TransformReward; the threshold is
475 times the size, and returns are shown over it. Whatever the size, a seed meets the same environments: what differs between the
lines of one seed is the rounding of rewards, which chaos amplifies.
"""

from __future__ import annotations

from typing import Any

import control
import gymnasium as gym
from rows import Key, Row, Rows, call, grouped, label, marked, options, script, table
from tables import solved, spread

from worldmodel.config import Config
from worldmodel.errors import ConfigError

RECIPE, SCALED = "cartpole", "ScaledCartPole-v0"


def work(job: Row) -> Row:
    """The result of one run; its returns are in scaled rewards."""
    size, real = job["size"], gym.spec(Config.from_recipe(RECIPE).env.id)

    def make(**kwargs: Any) -> gym.Env:
        inner = gym.make(real.id, max_episode_steps=-1, disable_env_checker=True, **kwargs)  # the time limit wraps it
        return gym.wrappers.TransformReward(inner, lambda reward: size * reward)

    gym.register(SCALED, make, max_episode_steps=real.max_episode_steps)
    return control.work(job)


def report(rows: Rows) -> str:
    """One line for each size and set of options: medians over seeds, [min..max]."""
    lines = []
    for name, found in grouped(rows, lambda row: label(row["key"], f"{row['key']['size']:g}")).items():
        steps = spread((row["solved_at"] for row in found), 1)
        seconds = spread(row["wall_seconds"] if row["solved_at"] else None for row in found)
        returns = spread(row["final_return"] / row["key"]["size"] for row in found)
        lines.append([marked(name, found), solved(found), steps, seconds, returns])
    return table(["reward of a step", "solved", "real steps", "seconds", "final return / size"], lines)


def main() -> int:
    parser = options(__doc__, seeds=(0, 1, 2), overrides=True)
    parser.add_argument("--sizes", type=float, nargs="+", default=[1.0, 1e6, 1e-6])
    control.add_limits(parser)
    args = parser.parse_intermixed_args()
    rows = Rows("reward_scale", args.results, args.again)
    try:
        config = Config.from_recipe(RECIPE, args.overrides)
    except ConfigError as error:
        parser.error(str(error))

    def run(key: Key) -> Row:
        scaled = [*args.overrides, f"env.id={SCALED}", f"eval.threshold={config.eval.threshold * key['size']!r}"]
        job = {**key, "recipe": RECIPE, "algorithm": control.OURS, "overrides": scaled, "verbose": args.verbose}
        return call(__file__, job, config.train.threads, control.seconds_for(args))

    common = {"overrides": args.overrides, "max_steps": args.max_steps, "max_minutes": args.max_minutes}
    keys = [{"size": size, "seed": seed, **common} for size in args.sizes for seed in args.seeds]
    failed = 0 if args.print else rows.measure(keys, run, lambda key: config.train.threads, control.summary)
    print(report(rows))
    return failed


if __name__ == "__main__":
    script(main, work)
