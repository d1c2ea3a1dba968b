"""The share of random episodes that reach the goal, by how long each random action lasts.

    python benchmarks/exploration.py                               # three environments, seeds 0 1 2
    python benchmarks/exploration.py --envs Acrobot-v1 --seeds 0
    python benchmarks/exploration.py --print                       # the table of what is there

Without any learning. 1, 5 and 20 steps on average, with a geometric duration, as `train.random_action_repeat` draws them; 1 to 64
steps, uniform in the logarithm, as `train.explore` does where rewards tell nothing.
"""

from __future__ import annotations

import gymnasium as gym
import numpy as np
from rows import Key, Row, Rows, call, grouped, marked, options, script, table
from tables import spread

from worldmodel.agents.exploration import LONGEST, LastingActions
from worldmodel.spaces import ActionSpec

ENVS = ("MountainCarContinuous-v0", "MountainCar-v0", "Acrobot-v1")
LASTING = f"1 to {LONGEST}"
ACTIONS = ("1", "5", "20", LASTING)
EPISODES = 40


def work(job: Row) -> Row:
    """The share of EPISODES that terminate, which in these environments is reaching the goal."""
    env, rng = gym.make(job["env"]), np.random.default_rng(job["seed"])
    spec = ActionSpec.from_space(env.action_space)
    reached = 0
    for episode in range(EPISODES):
        env.reset(seed=1000 * job["seed"] + episode)
        lasting, yes = LastingActions(spec, 1), np.ones(1, bool)
        action, ended, terminated = spec.sample(1, rng), False, False
        while not ended:
            if job["actions"] == LASTING:
                action = lasting.draw(yes, ~yes, rng)
            elif rng.random() * int(job["actions"]) < 1:
                action = spec.sample(1, rng)
            _, _, terminated, truncated, _ = env.step(spec.decode(action)[0])
            ended = terminated or truncated
        reached += terminated
    return {"share": reached / EPISODES}


def report(rows: Rows) -> str:
    """A line for each environment, a column for each duration: medians over seeds, [min..max]."""
    lines = []
    for env, found in grouped(rows, lambda row: row["key"]["env"]).items():
        by_actions = {actions: [row["share"] for row in found if row["key"]["actions"] == actions] for actions in ACTIONS}
        lines.append([marked(env, found), *(spread(shares, 2) for shares in by_actions.values())])
    return table(["reaches the goal", *(f"{actions} steps" for actions in ACTIONS)], lines)


def main() -> int:
    parser = options(__doc__, seeds=(0, 1, 2))
    parser.add_argument("--envs", nargs="+", default=list(ENVS), choices=ENVS)
    args = parser.parse_args()
    rows = Rows("exploration", args.results, args.again)

    def run(key: Key) -> Row:
        return call(__file__, key, 1, 600)

    keys = [{"env": env, "actions": actions, "seed": seed} for env in args.envs for actions in ACTIONS for seed in args.seeds]
    failed = 0 if args.print else rows.measure(keys, run, lambda key: 1)
    print(report(rows))
    return failed


if __name__ == "__main__":
    script(main, work)
