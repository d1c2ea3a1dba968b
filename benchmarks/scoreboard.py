"""One default for all environments, beside the strongest rivals without a world model: real steps, returns and seconds.

    python benchmarks/scoreboard.py                                        # every environment whose packages are here, seeds 0 1 2
    python benchmarks/scoreboard.py --envs LunarLander-v3 --seeds 0 1 --only worldmodel
    python benchmarks/scoreboard.py --print --curves curves.png            # the tables of what is there, and a picture

Our side is `worldmodel train ID` without a recipe or any option of learning. Rivals have the hyperparameters that rl-baselines3-zoo
publishes for the environment, and SB3's defaults where it publishes none; DQN and SAC once more with as many updates per real step
as ours. Protocol of all: 20 greedy episodes with environment seeds 10000.. every so many real steps. The threshold is reached at
the first evaluation whose mean reaches it and whose confirmation (seeds 20000..) does too; there the run ends. The return at some
step is that of the last evaluation up to it. Scores are returns, 0 for random play and 1 for the threshold.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import control
import numpy as np
from control import OURS
from rows import Key, Row, Rows, call, grouped, marked, options, say, script, table
from tables import median, number, solved, spread

from worldmodel.agents.comparison.table import LEVEL, RESAMPLES, interquartile_mean
from worldmodel.config import Config


@dataclass(frozen=True)
class Entry:
    """An environment of the board.

    steps      real steps of our run at most, at which returns are compared
    every      real steps between evaluations
    rivals     what `baselines.baseline_of` knows by these names
    threshold  where the environment registers none that is meant
    needs      module that it comes with
    options    of environment and evaluation
    wrappers   of the rivals' environment in place of these options, where SB3's networks cannot read what ours do
    """

    steps: int
    every: int
    rivals: tuple[str, ...]
    threshold: float | None = None
    needs: str | None = None
    options: tuple[str, ...] = ()
    wrappers: str | None = None

    def overrides(self, algorithm: str) -> list[str]:
        """The options of a side's runs."""
        chosen = [f"train.steps={self.steps}", f"eval.every={self.every}", "eval.stop_when_solved=true", "log.tensorboard=false"]
        own = self.options if algorithm == OURS or self.wrappers is None else [f"env.wrappers=[{self.wrappers}]"]
        return [*chosen, *own, *([] if self.threshold is None else [f"eval.threshold={self.threshold}"])]


FLAT = "minigrid.wrappers:FlatObsWrapper"
"""What rl-baselines3-zoo puts around MiniGrid: the picture and the mission as one vector."""
BOARD = {
    "CartPole-v1": Entry(2_000, 50, ("ppo", "dqn"), 475),
    "Pendulum-v1": Entry(2_000, 50, ("sac", "crossq", "tqc"), -200),
    "Acrobot-v1": Entry(5_000, 250, ("dqn", "ppo"), -100),
    "MountainCarContinuous-v0": Entry(10_000, 250, ("sac", "tqc"), 90),
    "LunarLander-v3": Entry(10_000, 500, ("dqn", "ppo"), 200, "Box2D"),
    "InvertedPendulum-v5": Entry(5_000, 250, ("sac", "crossq", "tqc"), 950, "mujoco"),
    "HalfCheetah-v5": Entry(20_000, 1_000, ("sac", "crossq", "tqc"), 4_800, "mujoco"),
    "FrozenLake-v1": Entry(10_000, 500, ("dqn", "ppo"), 0.7, options=("eval.episodes=200",)),
    "MiniGrid-DoorKey-5x5-v0": Entry(30_000, 1_000, ("ppo",), 0.9, "minigrid", ("env.ignore=[mission,direction]",), FLAT),
    "worldmodel.envs:Catch-v0": Entry(16_000, 500, ("dqn on 2 frames",), 0.9),
}


# One run, in a process of its own ---------------------------------------------------------------------------------------


def without_recipe(env: str) -> dict[str, Any]:
    """A recipe of an environment that says nothing else, since the id alone finds the one that was made for it."""
    return {"env": {"id": env}}


def work(job: Row) -> Row:
    overrides = BOARD[job["env"]].overrides(job["algorithm"])
    return control.work({**job, "recipe": without_recipe(job["env"]), "overrides": overrides})


def algorithms(env: str) -> list[str]:
    """Ours, random play, and the rivals, off-policy ones once more with our updates per step."""
    config = Config.from_recipe(without_recipe(env), BOARD[env].overrides(OURS))
    variants = {name: control.variants(config, name, config.train.ratio) for name in BOARD[env].rivals}
    return [OURS, "random", *(x for name, found in variants.items() for x in (found if name in ("dqn", "sac") else [name]))]


def available(env: str) -> bool:
    needs = BOARD[env].needs
    return needs is None or importlib.util.find_spec(needs) is not None


# What the rows say ------------------------------------------------------------------------------------------------------


def return_at(row: Row, steps: int) -> float:
    """Of the last evaluation up to `steps`; of a run that reached the threshold before, its last one. Final where there is none."""
    known = [x["mean_return"] for x in row["evaluations"] if x["real_steps"] <= steps]
    return known[-1] if known else row["final_return"]


def beside_rivals(groups: Mapping[tuple[str, str], Sequence[Row]]) -> dict[str, tuple[str, float | None]]:
    """{env: (its best rival, our median real steps to the threshold over the rival's)}; where neither reaches it, None.

    The best rival needs the fewest steps, and of those that never reach the threshold has the highest return.
    """
    found = {}
    for env in dict.fromkeys(env for env, _ in groups):
        rivals = {name: rows for (of, name), rows in groups.items() if of == env and name not in (OURS, "random")}
        if not rivals or (env, OURS) not in groups:
            continue
        steps = {name: median(row["solved_at"] for row in rows) for name, rows in rivals.items()}
        reached = {name: statistics.median(return_at(row, BOARD[env].steps) for row in rows) for name, rows in rivals.items()}
        best = min(rivals, key=lambda name: (steps[name], -reached[name]))
        ours = median(row["solved_at"] for row in groups[env, OURS])
        found[env] = best, None if ours == steps[best] == float("inf") else ours / steps[best]
    return found


def scores(groups: Mapping[tuple[str, str], Sequence[Row]], name: str) -> list[np.ndarray]:
    """For each environment with random play, our side and a rival: the scores of the seeds of `name` ("rival": the best one)."""
    found = []
    for env, (rival, _) in beside_rivals(groups).items():
        rows, random = groups.get((env, rival if name == "rival" else name)), groups.get((env, "random"))
        if rows and random:
            zero, one = statistics.median(row["final_return"] for row in random), rows[0]["threshold"]
            returns = np.array([return_at(row, BOARD[env].steps) for row in rows])
            found.append(np.minimum((returns - zero) / (one - zero), 1.0))
    return found


def interquartile(by_env: Sequence[np.ndarray]) -> tuple[float, float, float]:
    """(interquartile mean of all scores, the interval of LEVEL by resampling seeds within each environment).

    Source: Agarwal et al. 2021, Deep RL at the edge of the statistical precipice, sections 4.1 and 4.3.
    """
    rng = np.random.default_rng(0)
    drawn = np.concatenate([rng.choice(x, (RESAMPLES, len(x))) for x in by_env], 1)
    low, high = np.quantile(interquartile_mean(drawn), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(interquartile_mean(np.concatenate(by_env))), float(low), float(high)


def cells(env: str, rows: Sequence[Row]) -> list[str]:
    """How many reached the threshold, real steps, the return when our steps are over, seconds of training to the threshold."""
    at = spread((return_at(row, BOARD[env].steps) for row in rows), 3)
    seconds = spread(row["wall_seconds"] if row["solved_at"] else None for row in rows)
    return [solved(rows), spread((row["solved_at"] for row in rows), 1), at, seconds]


HEAD = ["reached", "real steps", "return", "seconds"]


def by_run(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    """The rows by environment and algorithm, in the board's order."""
    groups = grouped(rows, lambda row: (row["key"]["env"], row["key"]["algorithm"]))
    order = {env: i for i, env in enumerate(BOARD)}
    return dict(sorted(groups.items(), key=lambda entry: order[entry[0][0]]))


def said(rival: str, ratio: float | None) -> str:
    """One environment's outcome in words."""
    if ratio is None:
        return "neither reaches the threshold"
    if ratio == 0:
        return f"only we reach the threshold, {rival} never does"
    return (
        f"{rival} wins, we never reach the threshold"
        if ratio == float("inf")
        else f"{number(ratio, 2)} x the real steps of {rival}"
    )


def verdict(groups: Mapping[tuple[str, str], Sequence[Row]]) -> list[str]:
    """Who needs fewer steps, in how many environments, and the scores of both sides."""
    found = beside_rivals(groups)
    lines = [f"{env}: {said(rival, ratio)}" for env, (rival, ratio) in found.items()]
    if ratios := [ratio for _, ratio in found.values() if ratio is not None]:
        better, middle = sum(ratio < 1 for ratio in ratios), number(statistics.median(ratios), 2)
        lines.append(f"Fewer real steps in {better} of {len(found)} environments; median ratio {middle}.")
    for title, name in (("Ours", OURS), ("The best rival of each", "rival")):
        if by_env := scores(groups, name):
            mean, low, high = interquartile(by_env)
            seeds = ", of one seed" if all(len(x) < 2 for x in by_env) else f", {low:.2f} to {high:.2f} with {LEVEL:.0%}"
            lines.append(f"{title}: interquartile mean of the scores {mean:.2f}{seeds}.")
    return lines


def report(rows: Iterable[Row]) -> str:
    groups = by_run(rows)
    lines = [[env, marked(name, found), *cells(env, found)] for (env, name), found in groups.items()]
    return "\n".join([table(["environment", "algorithm", *HEAD], lines), "", *verdict(groups)])


def curves(rows: Iterable[Row], path: Path) -> None:
    """Returns by real steps, a panel for each environment: every seed a line, ours dark."""
    from matplotlib.figure import Figure

    groups = by_run(rows)
    envs = list(dict.fromkeys(env for env, _ in groups))
    figure = Figure(figsize=(10, 2.5 * -(-len(envs) // 2)), layout="constrained")
    for i, env in enumerate(envs):
        panel = figure.add_subplot(-(-len(envs) // 2), 2, i + 1, title=env)
        names = [name for of, name in groups if of == env and name != "random"]
        for name in names:
            colour = "black" if name == OURS else f"C{names.index(name)}"
            for row in groups[env, name]:
                points = [(x["real_steps"], x["mean_return"]) for x in row["evaluations"]]
                (line,) = panel.plot(*zip(*points, strict=True), color=colour, linewidth=1)
            line.set_label(name)
        panel.axhline(groups[env, names[0]][0]["threshold"], color="grey", linewidth=0.5)
        panel.set_xscale("log")
        panel.legend(fontsize=6)
    figure.savefig(path, dpi=100)


def main() -> int:
    parser = options(__doc__, seeds=(0, 1, 2))
    parser.add_argument("--envs", nargs="+", choices=list(BOARD), default=list(BOARD), metavar="ID", help="these only")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these algorithms only")
    parser.add_argument("--curves", type=Path, metavar="FILE", help="draws the returns by real steps")
    parser.add_argument("--at-once", type=int, default=1, help="processes of one thread")
    control.add_limits(parser, 25.0)
    args = parser.parse_args()
    rows = Rows("scoreboard", args.results, args.again)
    failed = 0 if args.print else measure(args, rows)
    print(report(rows))
    if args.curves:
        curves(rows, args.curves)
    return failed


def measure(args: argparse.Namespace, rows: Rows) -> int:
    """Measures the rows that are missing, seeds outermost, so that a board of one seed is whole first."""
    here = [env for env in args.envs if available(env)]
    for env in set(args.envs) - set(here):
        say(f"{env} is skipped: it needs {BOARD[env].needs}.")
    limits: dict[str, Any] = {"max_steps": args.max_steps, "max_minutes": args.max_minutes}
    keys: list[Key] = [
        {"env": env, "algorithm": name, "seed": seed, **limits}
        for seed in args.seeds
        for env in here
        for name in algorithms(env)
        if not args.only or name in args.only
    ]
    run = lambda key: call(__file__, {**key, "verbose": args.verbose}, 1, control.seconds_for(args))  # noqa: E731
    return rows.measure(keys, run, summary=control.summary, at_once=args.at_once)


if __name__ == "__main__":
    script(main, work)
