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
import os
import re
import signal
import statistics
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rows import Key, Load, Row, Rows, call, label, marked, options, say, script, table, words
from rows import grouped as grouped_by
from tables import median, number, solved, spread

from worldmodel.config import Config, list_recipes
from worldmodel.errors import ConfigError

OURS = "worldmodel"


@dataclass(frozen=True)
class Task:
    """A recipe, what is changed in it, and the baselines on its environment that are not measured for another task.

    matched   gradient updates of the policy per real step, where they are not the world model's (train.ratio)
    ours      name of our side in the rows
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
    "cartpole_pixels": Task("cartpole_pixels"),
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


def work(job: Row) -> Row:
    """The result of one run."""
    config = Config.from_recipe(job["recipe"], job["overrides"])
    with Load() as load:
        if job["algorithm"] == OURS:
            with tempfile.TemporaryDirectory() as folder:
                result = train_ours(job, config, Path(folder) / "run")
        else:
            from baselines import run

            name, ratio = job["algorithm"].partition(",")[0], updates_per_step(job["algorithm"])
            result = run(config, name, job["seed"], ratio, job["max_steps"], 60 * job["max_minutes"])
    return {**result, "foreign": load.cores}


def updates_per_step(algorithm: str) -> float | None:
    """The number in `dqn, 0.5 updates/step`."""
    found = re.search(r", ([\d.e+-]+) updates/step$", algorithm)
    return float(found[1]) if found else None


def train_ours(job: Row, config: Config, path: Path, device: str = "cpu", resume: bool = False) -> Row:
    """`worldmodel.train` into a folder; when time is up it stops as by SIGTERM, and its last state counts."""
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
        log = say if job["verbose"] else lambda text: None
        overrides = [option for option in job["overrides"] if not option.startswith("train.steps=")]  # counted above
        done = worldmodel.train(job["recipe"], steps, job["seed"], path, overrides, device, resume=resume, log=log)
        result = done.to_json()
        result = {**result, "final_return": result.pop("newest_return"), "stopped": None}  # as of the peers, whose best is not kept
    except Interrupted:
        if not late.is_set():  # somebody else wants this process to end
            raise
        result = {**interrupted(path, config), "stopped": "time"}
    finally:
        timer.cancel()
    return {name: value for name, value in result.items() if name not in ("run", "recipe", "seed", "threads", "env_id")}


def interrupted(path: Path, config: Config) -> Row:
    """The result of a run that was stopped, from its last checkpoint; its final return is measured here."""
    from worldmodel.agents.evaluation import FINAL_SEED, evaluate, threshold
    from worldmodel.storage.run import Run

    with Run.open(path) as run:
        progress, agent = run.manifest()["progress"], run.agent("newest")
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


# All of them ----------------------------------------------------------------------------------------------------------


def task_of(key: Key) -> Task:
    """The task of a row's key; of one without a name in the lists, the recipe of that name."""
    name = key["task"]
    return TASKS.get(name) or PLUG_IN.get(name) or Task(name)


def config_of(key: Key) -> Config:
    """What our side of a row is configured with."""
    task = task_of(key)
    return Config.from_recipe(task.recipe, [*task.overrides, *key["overrides"]])


def keys(args: argparse.Namespace) -> Iterator[Key]:
    """The keys of all that is asked for, seeds innermost; ConfigError for a recipe or option that does not exist."""
    for name in args.tasks:
        key = {"task": name, "overrides": args.overrides}
        task, config = task_of(key), config_of(key)
        algorithms = [task.ours]
        if args.baselines:
            ratio = task.matched or config.train.ratio
            algorithms += [variant for baseline in task.baselines for variant in variants(config, baseline, ratio)]
        for algorithm in algorithms:
            for seed in args.seeds if not args.only or algorithm in args.only else ():
                key = {"task": name, "algorithm": algorithm, "seed": seed, "overrides": args.overrides}
                yield {**key, "max_steps": args.max_steps, "max_minutes": args.max_minutes}


def variants(config: Config, baseline: str, ratio: float) -> list[str]:
    """A baseline as published, and with as many updates per real step as ours where that is another number."""
    from baselines import baseline_of

    own = None if baseline == "random" else baseline_of(config.env.id, baseline).updates_per_step
    matched = [f"{baseline}, {ratio:g} updates/step"]
    return [baseline, *(matched if own is not None and own != ratio and ratio > 0 else [])]


def measure(args: argparse.Namespace, rows: Rows, file: str = __file__, more: Mapping[str, Row] | None = None) -> int:
    """Measures the keys that have no row; gives the number of runs that failed.

    file  the script that works
    more  algorithm -> what is added to its jobs
    """

    def run(key: Key) -> Row:
        task = task_of(key)
        job = {**key, "recipe": task.recipe, "overrides": [*task.overrides, *key["overrides"]], "verbose": args.verbose}
        return call(file, {**job, **(more or {}).get(key["algorithm"], {})}, threads(key), seconds_for(args))

    def threads(key: Key) -> int:
        return config_of(key).train.threads

    return rows.measure(list(keys(args)), run, threads, summary)


def seconds_for(args: argparse.Namespace) -> float:
    """After which a worker is given up: a run ends itself before."""
    return 90 * args.max_minutes + 300


def summary(row: Row) -> str:
    """The result of a run in words."""
    return f"solved at {row['solved_at']}, final return {row['final_return']:.1f}"


def add_limits(parser: argparse.ArgumentParser, max_minutes: float = 60.0) -> None:
    """The arguments that end a run, and --verbose."""
    parser.add_argument("--max-steps", type=int, help="ends every run there (default: the recipe's or the baseline's own length)")
    parser.add_argument("--max-minutes", type=float, default=max_minutes, help="ends every run then, evaluation included")
    parser.add_argument("--verbose", action="store_true", help="every evaluation of our runs on stderr")


def grouped(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows that differ by their seed alone, in the order of tasks."""
    groups = grouped_by(rows, lambda row: tuple((name, str(value)) for name, value in row["key"].items() if name != "seed"))
    order = {name: i for i, name in enumerate([*TASKS, *PLUG_IN])}
    return sorted(groups.values(), key=lambda found: order.get(found[0]["key"]["task"], len(order)))


def report(rows: Iterable[Row], folder: Path) -> str:
    """One line for each task, algorithm and set of options: medians over seeds, [min..max]; then who needs fewer steps."""
    lines, groups = [], grouped(rows)
    for found in groups:
        key = found[0]["key"]
        lines.append(
            [
                key["task"],
                marked(label(key, key["algorithm"]), found),
                solved(found),
                spread((row["solved_at"] for row in found), 1),
                spread(row["wall_seconds"] if row["solved_at"] else None for row in found),
                spread(row["final_return"] for row in found),
                spread((row["updates"] / row["real_steps"] if row["real_steps"] else 0.0 for row in found), 2).split(" ")[0],
                number(found[0]["parameters"], 1),
                "/".join(sorted({str(row["where"]["threads"]) for row in found})),
                max((row["foreign"] for row in found if row["foreign"] is not None), default=""),
            ]
        )
    head = ["task", "algorithm", "solved", "real steps", "seconds", "final return", "updates/step", "parameters", "threads"]
    head += ["foreign"]
    return "\n".join([table(head, lines), "", *comparisons(groups, folder)])


# Against the best without a model -------------------------------------------------------------------------------------


def comparisons(groups: Iterable[Sequence[Row]], folder: Path, of: str | None = None) -> list[str]:
    """Our real steps as a share of those of the best of all that learn no model, of any result file; medians over seeds."""
    lines = []
    for key, found, best, there in strongest(groups, folder, of):
        ours, theirs = (median(row["solved_at"] for row in side) for side in (found, there))
        seeds = f"{len(there)} seed{'s' if len(there) > 1 else ''}"
        name = " ".join([key["task"], *key["overrides"]])
        if max(ours, theirs) < float("inf"):
            line = f"{name}: {ours / theirs:.2f} x the real steps of {best}, {seeds}"
        else:
            line = f"{name}: {number(ours, 1)} real steps, {best} {number(theirs, 1)}, {seeds}"
        lines.append(marked(line + ("; their ranges overlap" if overlap(found, there) else ""), [*found, *there], of))
    return lines


def strongest(
    groups: Iterable[Sequence[Row]], folder: Path, of: str | None = None
) -> Iterator[tuple[Key, Sequence[Row], str, list[Row]]]:
    """(key, our rows, name and rows of the best of all that learn no model, of any result file) of each group of ours."""
    others = rivals(folder, of)
    for found in groups:
        key = found[0]["key"]
        task = task_of(key)
        there = others.get(task.recipe)
        if key["algorithm"] == task.ours and there and found[0]["threshold"] is not None:
            best = min(there, key=lambda name: median(row["solved_at"] for row in there[name]))
            yield key, found, best, there[best]


def overlap(*sides: Iterable[Row]) -> bool:
    """Whether the ranges of real steps of two groups of runs intersect, so that no difference can be told."""
    ends = [[row["solved_at"] or float("inf") for row in side] for side in sides]
    return max(map(min, ends)) <= min(map(max, ends))


def rivals(folder: Path, of: str | None = None) -> dict[str, dict[str, list[Row]]]:
    """{recipe: {name (file): rows}} of the whole runs, in all result files, that learned no model and had no other options."""
    found: dict[str, dict[str, list[Row]]] = {}
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
    parser = options(__doc__, seeds=(0, 1, 2), overrides=True)
    parser.add_argument("--tasks", type=words, help=f"separated by commas: {', '.join(TASKS)}, or recipes")
    parser.add_argument("--only", type=lambda text: text.split("+"), metavar="A+B", help="these algorithms only, e.g. random+dqn")
    parser.add_argument("--baselines", action="store_true", help="the model-free baselines too")
    add_limits(parser)
    args = parser.parse_intermixed_args()
    known = {name for name, _, _ in list_recipes()}
    args.tasks = args.tasks or [name for name, task in TASKS.items() if task.recipe in known]
    rows = Rows("control", args.results, args.again)
    try:
        failed = 0 if args.print else measure(args, rows)
    except ConfigError as error:
        parser.error(str(error))
    print(report(rows, args.results))
    return failed


if __name__ == "__main__":
    script(main, work)
