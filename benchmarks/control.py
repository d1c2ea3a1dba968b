"""Real steps and seconds until a task is solved: our recipes, and model-free baselines under the same protocol.

    python benchmarks/control.py --baselines                              # every task, seeds 0 1 2
    python benchmarks/control.py --tasks cartpole,vae --seeds 0 1 2 3 4
    python benchmarks/control.py --tasks pendulum train.ratio=2.0         # other options make other rows
    python benchmarks/control.py --print                                  # the table of what is there

Protocol, for all alike: 20 greedy episodes with environment seeds 10000.. every `eval.every` real steps; solved at the
first evaluation whose mean reaches the threshold and whose confirmation, 20 episodes with seeds 20000.., does too;
final return over seeds 30000... Real steps include random ones and exclude evaluation; seconds are training alone.
Each run has a process of its own with the recipe's threads. Off-policy baselines run with the published hyperparameters,
and once more with the recipe's gradient updates per real step where that differs. A task that is no name of the list
below is the name of a recipe.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rows import Load, Rows, marked, median, number, options, say, spread, table

from worldmodel.config import Config, list_recipes
from worldmodel.errors import ConfigError

OURS = "worldmodel"


@dataclass(frozen=True)
class Task:
    """A recipe, what is changed in it, and the baselines on its environment that are not measured for another task.

    matched   gradient updates of the policy per real step, where they are not the world model's (train.ratio)
    ours      what our side is called in the rows
    """

    recipe: str
    overrides: tuple[str, ...] = ()
    baselines: tuple[str, ...] = ()
    matched: float | None = None
    ours: str = OURS


TASKS = {
    "cartpole": Task("cartpole", baselines=("ppo", "dqn")),
    "vae": Task("cartpole", ("model=vae",)),
    "pendulum": Task("pendulum", baselines=("sac",)),
    "acrobot": Task("acrobot", baselines=("dqn",)),
    "catch": Task("catch", baselines=("dqn on 2 frames", "random")),
    "cartpole-pixels": Task("cartpole-pixels"),
}
DYNA_UPDATES = 10.0
DYNA_ROW = f"sac + dyna, {DYNA_UPDATES:g} updates/step"
PLUG_IN = {
    "ppo-cartpole": Task("cartpole", ("agent.kind=sb3", "agent.algo=ppo"), ("ppo",)),
    "sac-pendulum": Task("pendulum", ("agent.kind=sb3", "agent.algo=sac"), ("sac",), matched=10.0),
    "planner-cartpole": Task("cartpole", ("agent.kind=planner",)),
    "planner-pendulum": Task("pendulum", ("agent.kind=planner",)),
    "dyna-pendulum": Task("pendulum", ("agent.kind=random", "eval.every=100"), ("sac",), matched=DYNA_UPDATES, ours=DYNA_ROW),
}
"""Measured by plug_in.py."""


# One run, in a process of its own ---------------------------------------------------------------------------------------


def work(job: dict[str, Any]) -> dict[str, Any]:
    """What one run came to."""
    config = Config.from_recipe(job["recipe"], job["overrides"])
    torch.set_num_threads(config.train.threads)
    with Load() as load:
        if job["algorithm"] == OURS:
            with tempfile.TemporaryDirectory() as folder:
                result = train_ours(job, config, Path(folder) / "run")
        else:
            from baselines import run

            name = job["algorithm"].partition(",")[0]
            result = run(config, name, job["seed"], job["updates_per_step"], job["max_steps"], 60 * job["max_minutes"])
    return {**result, "foreign": load.cores}


def train_ours(job: dict[str, Any], config: Config, path: Path, device: str = "cpu", resume: bool = False) -> dict[str, Any]:
    """`worldmodel.train` into a folder; when time is up it stops as by SIGTERM, and its state counts."""
    import worldmodel
    from worldmodel.agents import Interrupted

    steps, late = min(config.train.steps, job["max_steps"] or config.train.steps), threading.Event()

    def stop() -> None:
        late.set()
        os.kill(os.getpid(), signal.SIGTERM)

    timer = threading.Timer(60 * job["max_minutes"], stop)
    timer.daemon = True
    timer.start()
    try:
        log = say if job["verbose"] else _silent
        done = worldmodel.train(job["recipe"], steps, job["seed"], path, job["overrides"], device, resume=resume, log=log)
        result = {**done.to_json(), "stopped": None}
    except Interrupted:
        if not late.is_set():  # somebody else wants this process to end
            raise
        result = {**interrupted(path, config), "stopped": "time"}
    finally:
        timer.cancel()
    return {name: value for name, value in result.items() if name not in ("run", "recipe", "seed", "threads", "env_id")}


def interrupted(path: Path, config: Config) -> dict[str, Any]:
    """The result of a run that was stopped, from its last checkpoint; its final return is measured here."""
    from worldmodel.agents.evaluation import FINAL_SEED, evaluate, threshold
    from worldmodel.storage.run import Run

    with Run.open(path) as run:
        progress, agent = run.manifest()["progress"], run.agent()
    return {
        "real_steps": agent.num_timesteps,
        "updates": agent.learner.updates,
        "wall_seconds": progress["wall_seconds"],
        "eval_seconds": progress["eval_seconds"],
        "parameters": sum(p.numel() for p in agent.policy.parameters() if p.requires_grad),
        "threshold": threshold(config.eval, config.env.id),
        "solved_at": progress["solved_at"],
        "final_return": statistics.fmean(evaluate(agent, config.env, config.eval.episodes, FINAL_SEED)[0]),
        "evaluations": progress["evaluations"],
    }


def _silent(text: str) -> None:
    pass


# All of them ----------------------------------------------------------------------------------------------------------


def jobs(args: argparse.Namespace) -> Iterator[tuple[dict[str, Any], dict[str, Any], int]]:
    """(key of the row, job, threads) of all that is asked for, seeds innermost."""
    for name in args.tasks:
        task = {**TASKS, **PLUG_IN}.get(name) or Task(name)
        overrides = [*task.overrides, *args.overrides]
        config = Config.from_recipe(task.recipe, overrides)
        algorithms: list[tuple[str, float | None]] = [(OURS, None)]
        if args.baselines:
            ratio = task.matched or config.train.ratio
            algorithms += [pair for baseline in task.baselines for pair in variants(config, baseline, ratio)]
        for algorithm, ratio in algorithms:
            if args.only and algorithm not in args.only:
                continue
            for seed in args.seeds:
                key = {"task": name, "algorithm": algorithm, "seed": seed, "overrides": args.overrides}
                key |= {"max_steps": args.max_steps, "max_minutes": args.max_minutes}
                job = {**key, "recipe": task.recipe, "overrides": overrides, "updates_per_step": ratio, "verbose": args.verbose}
                yield key, job, config.train.threads


def variants(config: Config, baseline: str, ratio: float) -> list[tuple[str, float | None]]:
    """A baseline as published, and with as many updates per real step as ours where that is another number."""
    from baselines import BASELINES

    own = None if baseline == "random" else BASELINES[config.env.id, baseline].updates_per_step
    matched = [(f"{baseline}, {ratio:g} updates/step", ratio)]
    return [(baseline, None), *(matched if own is not None and own != ratio and ratio > 0 else [])]


def measure(args: argparse.Namespace, rows: Rows) -> int:
    """Runs what is missing; gives the number of runs that failed."""
    return rows.measure(__file__, jobs(args), seconds_for(args), came)


def seconds_for(args: argparse.Namespace) -> float:
    """After which a worker is given up: a run ends itself before."""
    return 90 * args.max_minutes + 300


def came(row: Mapping[str, Any]) -> str:
    """What a run came to, in words."""
    return f"solved at {row['solved_at']}, final return {row['final_return']:.1f}"


def grouped(rows: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """{key without the seed, as JSON: rows}, in the order of tasks."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(json.dumps({name: value for name, value in row["key"].items() if name != "seed"}), []).append(row)
    order = {name: i for i, name in enumerate([*TASKS, *PLUG_IN])}
    return dict(sorted(groups.items(), key=lambda pair: order.get(json.loads(pair[0])["task"], len(order))))


def report(rows: Iterable[dict[str, Any]], folder: Path) -> str:
    """One line for each task, algorithm and set of options: medians over seeds, [least..greatest]; then who needs fewer steps."""
    lines, groups = [], grouped(rows)
    for text, found in groups.items():
        key = json.loads(text)
        limits = [f"{name}={key[name]}" for name in ("max_steps",) if key[name]]
        solved = [row["solved_at"] for row in found]
        seconds = [row["wall_seconds"] if row["solved_at"] else None for row in found]
        lines.append(
            [
                key["task"],
                marked(" ".join([key["algorithm"], *key["overrides"], *limits]), found),
                f"{sum(x is not None for x in solved)}/{len(solved)}",
                spread(solved, 1),
                spread(seconds),
                spread([row["final_return"] for row in found]),
                spread([row["updates"] / row["real_steps"] if row["real_steps"] else 0.0 for row in found], 2).split(" ")[0],
                number(found[0]["parameters"], 1),
                "/".join(sorted({str(row["where"]["threads"]) for row in found})),
                max((row["foreign"] for row in found if row["foreign"] is not None), default=""),
            ]
        )
    head = ["task", "algorithm", "solved", "real steps", "seconds", "final return", "updates/step", "parameters", "threads"]
    head += ["foreign"]
    return "\n".join([table(head, lines), "", *comparisons(groups, folder)])


def comparisons(groups: Mapping[str, Sequence[dict[str, Any]]], folder: Path, of: str | None = None) -> list[str]:
    """Our real steps as a share of those of the best of all that learn no model, of any result file; medians over seeds."""
    lines = []
    for key, found, best, there in strongest(groups, folder, of):
        ours, least = (median(row["solved_at"] for row in side) for side in (found, there))
        seeds = f"{len(there)} seed{'s' if len(there) > 1 else ''}"
        name = " ".join([key["task"], *key["overrides"]])
        if max(ours, least) < float("inf"):
            line = f"{name}: {ours / least:.2f} x the real steps of {best}, {seeds}"
        else:
            line = f"{name}: {number(ours, 1)} real steps, {best} {number(least, 1)}, {seeds}"
        lines.append(marked(line + ("; their ranges overlap" if overlap(found, there) else ""), [*found, *there], of))
    return lines


def strongest(
    groups: Mapping[str, Sequence[dict[str, Any]]], folder: Path, of: str | None = None
) -> Iterator[tuple[dict[str, Any], Sequence[dict[str, Any]], str, list[dict[str, Any]]]]:
    """(key, our rows, name and rows of the best of all that learn no model, of any result file) of each group of ours."""
    others = rivals(folder, of)
    for text, found in groups.items():
        key = json.loads(text)
        task = TASKS.get(key["task"]) or PLUG_IN.get(key["task"]) or Task(key["task"])
        there = others.get(task.recipe)
        if key["algorithm"] == task.ours and there and found[0]["threshold"] is not None:
            best = min(there, key=lambda name: median(row["solved_at"] for row in there[name]))
            yield key, found, best, there[best]


def overlap(*sides: Iterable[Mapping[str, Any]]) -> bool:
    """Whether the real steps of two groups of runs have a number in common, of which no difference can be told."""
    ends = [[row["solved_at"] or float("inf") for row in side] for side in sides]
    return max(map(min, ends)) <= min(map(max, ends))


def rivals(folder: Path, of: str | None = None) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """{recipe: {name (file): rows}} of the whole runs, in all result files, that learned no model and had no other options."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for file in sorted(Path(folder).glob("*.jsonl")):
        for row in Rows(file.stem, folder, of=of):
            key = row["key"]
            task = TASKS.get(key.get("task")) or PLUG_IN.get(key.get("task"))
            if key.get("row") == "catch-encoder" and key["side"] == "naturecnn":
                recipe, name = "catch", "dqn on 2 frames"
            elif task is None or key.get("algorithm") in (None, OURS, task.ours) or key["overrides"] or key["max_steps"]:
                continue
            else:
                recipe, name = task.recipe, key["algorithm"]
            where = file.stem if key.get("task") in (None, *TASKS) else f"{file.stem}, {key['task']}"
            found.setdefault(recipe, {}).setdefault(f"{name} ({where})", []).append(row)
    return found


def main() -> int:
    if sys.argv[1:2] == ["--worker"]:
        result = work(json.loads(sys.argv[2]))
        print(json.dumps(result, allow_nan=False))
        return 0
    parser = options(__doc__)
    parser.add_argument("--tasks", type=lambda text: text.split(","), help=f"separated by commas: {', '.join(TASKS)}, or recipes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", type=lambda text: text.split("+"), metavar="A+B", help="these algorithms only, e.g. random+dqn")
    parser.add_argument("--baselines", action="store_true", help="the model-free baselines too")
    parser.add_argument("--max-steps", type=int, help="ends every run there (default: the recipe's or the baseline's own length)")
    parser.add_argument("--max-minutes", type=float, default=60.0, help="ends every run then, evaluation included")
    parser.add_argument("--print", action="store_true", help="only the table")
    parser.add_argument("--verbose", action="store_true", help="every evaluation of our runs on stderr")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options of the recipes; eval.* counts for baselines too")
    args = parser.parse_intermixed_args()
    known = {name for name, _, _ in list_recipes()}
    if args.tasks is None:
        args.tasks = [name for name, task in TASKS.items() if task.recipe in known]
    rows = Rows("control", args.results, args.again)
    try:
        failed = 0 if args.print else measure(args, rows)
    except ConfigError as error:
        parser.error(str(error))
    print(report(rows, args.results))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
