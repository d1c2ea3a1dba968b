"""`sweep`: a training for every combination of some values and every seed, or a search of ranges; which one is best."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from worldmodel.commands.console import Debug, Json, answer, say, table
from worldmodel.errors import require_whole

if TYPE_CHECKING:
    from worldmodel.agents.comparison.sweeping import Plan, Sweep
    from worldmodel.storage.rows import Rows

EXAMPLE = "worldmodel sweep cartpole train.lr=1e-3,3e-3 model=gaussian,dreamer --seeds 2 --steps 1000"
SEEDS, JOBS = 3, 2


def sweep(
    recipe: str | Path,
    options: Mapping[str, Any] | Sequence[str],
    seeds: int | Sequence[int] = SEEDS,
    steps: int | None = None,
    jobs: int = JOBS,
    out: str | Path | None = None,
    trials: int | None = None,
    minimise: str | None = None,
    device: str = "auto",
    log: Callable[[str], object] = lambda text: None,
) -> Sweep:
    """Trains every combination of some values with every seed, each run in a process of its own.

    recipe    name, YAML file or Gymnasium id
    options   ["train.lr=1e-3,3e-3", "model=gaussian,dreamer"] or {"train.lr": [1e-3, 3e-3]}; one value is that of all runs
    seeds     how many, from 0 on, or which
    steps     real steps of each run; None: the recipe's train.steps
    jobs      runs at the same time, each on train.threads threads
    out       folder of rows, runs and report: what is in it is not measured again; None: runs/sweep-RECIPE
    trials    a search by Optuna of so many combinations instead of all of them; "1e-4..1e-2" is a range then
    minimise  the figure of which less is better; None: final_return, of which more is
    log       gets a line for each run

    A stop loses no finished row, and a run in progress goes on from its checkpoint. Rows of another source are measured again,
    by new runs. A run that fails stops no other one.
    Raises ConfigError (unknown options, nothing to sweep, a folder of another sweep), MissingExtraError.
    """
    from worldmodel.agents.comparison import folder as folders
    from worldmodel.agents.comparison import sweeping
    from worldmodel.storage.rows import Rows, stale
    from worldmodel.view import report

    require_whole(jobs=jobs, **({} if trials is None else {"trials": trials}))
    numbers = folders.numbered(seeds)
    plan = sweeping.planned(recipe, options, steps, trials is not None, minimise)
    folder = Path("runs") / f"sweep-{Path(recipe).stem.replace(':', '-')}" if out is None else Path(out)
    folders.kept_plan(folder, plan.to_json(), "sweep")
    rows, failed = Rows(folder / "rows.jsonl", log=log), {}
    combinations = _measured(plan, rows, failed, numbers, jobs, folder, trials, device)
    runs, others = [], False
    for options, seed in ((options, seed) for options in combinations for seed in numbers):
        row, why = rows.get({"options": options, "seed": seed}), failed.get(sweeping.run_name(options, seed))
        known = row if row is not None and why is None else {"figures": {}}
        others = others or ("key" in known and stale(known))
        found = {"figures": known["figures"], "slot": known.get("slot"), "skipped": known.get("skipped"), "failed": why}
        runs.append({"options": options, "seed": seed, **found})
    result = sweeping.Sweep(plan, numbers, tuple(runs), others, str(folder))
    about = {
        "recipe": plan.recipe,
        "options": sweeping.label(plan.fixed) or "those of the recipe",
        "swept": ", ".join(plan.swept),
        "seeds": ", ".join(map(str, numbers)),
        "source": rows.code,
    }
    text = f"Sweep of {plan.recipe}", about, result.sentences, result.parts()
    report.write(folder, "sweep", result.to_json(), text, log)
    return result


def _measured(
    plan: Plan, rows: Rows, failed: dict[str, str], seeds: tuple[int, ...], jobs: int, folder: Path, trials: int | None, device: str
) -> list[dict[str, Any]]:
    """Adds the rows that are missing; gives the combinations. failed[run]: why it has no figures."""
    from worldmodel.agents.comparison import sweeping
    from worldmodel.agents.comparison.folder import logged
    from worldmodel.processes import Processes
    from worldmodel.storage import files

    files.make_folder(folder / "log")

    def threads(key: Mapping[str, Any]) -> int:
        return plan.config(key["options"]).train.threads

    def one(key: Mapping[str, Any]) -> Mapping[str, Any]:
        name = sweeping.run_name(key["options"], key["seed"])
        job = {"recipe": plan.recipe, "overrides": plan.given(key["options"]), "seed": key["seed"], "device": device}
        job["path"] = str(folder / "runs" / rows.code / name)  # a run goes on, or is read, by the source that began it
        file = folder / "log" / f"{name}.txt"
        return logged(processes, "worldmodel.agents.comparison.sweeping:work", job, file, failed, name, threads(key))

    def measure(some: Sequence[Mapping[str, Any]]) -> None:
        keys = [{"options": options, "seed": seed} for options in some for seed in seeds]
        rows.measure(keys, one, threads, at_once=jobs)

    def figure(options: Mapping[str, Any]) -> float | None:
        found = [rows.get({"options": options, "seed": s}) for s in seeds if sweeping.run_name(options, s) not in failed]
        return sweeping.median([row for row in found if row is not None], plan.figure)

    with Processes() as processes:
        if trials is None:
            measure(plan.combinations)
            return plan.combinations
        file, at_once = folder / "trials.json", max(1, jobs // len(seeds))
        asked = files.parse_json(file.read_bytes(), file)["options"] if file.exists() else []
        for first in range(0, trials, at_once):
            finished = [(options, figure(options)) for options in asked[:first]]
            for number in range(max(first, len(asked)), min(first + at_once, trials)):
                asked.append(sweeping.suggested(plan, finished, number))
            files.write(file, json.dumps({"options": asked}).encode())  # before they run: a stop asks for no others
            measure(asked[first : min(first + at_once, trials)])
        different = {json.dumps(options, sort_keys=True): options for options in asked[:trials]}
        return list(different.values())


def show(found: Sweep) -> None:
    """A line for each combination, what failed, and which one is best."""
    from worldmodel.agents.comparison.sweeping import label

    short = {key: key.rpartition(".")[2] for key in found.plan.swept}
    if len(set(short.values())) < len(short):
        short = {key: key for key in short}
    names = dict.fromkeys([*short, "seeds", found.plan.figure, "solved_at", "rate", "distortion"])
    lines = [{short.get(name, name): line[name] for name in names if name in line} for line in found.lines()]
    table(lines, tuple(lines[0]))
    for run in found.runs:
        if run["failed"]:
            print(f"failed: {label(run['options'])}, seed {run['seed']}: {run['failed']}")
    print()
    for sentence in found.sentences:
        print(f"- {sentence}")


def command(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE_OR_GYM_ID", help="Recipe, YAML file or gym id.", show_default=False)],
    options: Annotated[
        list[str],
        typer.Argument(
            metavar="KEY=A,B,...",
            help="Options by dotted key, with their values; one value is that of all runs. With --trials also KEY=LOW..HIGH.",
            show_default=False,
        ),
    ],
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of each combination.")] = SEEDS,
    first_seed: Annotated[int, typer.Option(min=0, help="The first of them.")] = 0,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Real steps of each run.", show_default="the recipe's train.steps")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at the same time.")] = JOBS,
    trials: Annotated[
        int | None, typer.Option(min=1, help="Search so many combinations with Optuna.", show_default="all combinations")
    ] = None,
    minimise: Annotated[
        str | None,
        typer.Option(metavar="FIGURE", help="Less of it is better, e.g. distortion.", show_default="more of final_return is"),
    ] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where the networks live.")] = "auto",
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of rows, runs and report.", show_default="runs/sweep-RECIPE")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train every combination of some values with several seeds, or search ranges: a table, and which one is best."""
    done: list[Sweep] = []

    def work() -> dict[str, Any]:
        numbers = range(first_seed, first_seed + seeds)
        done.append(sweep(recipe, options, numbers, steps, jobs, out, trials, minimise, device, say))
        return done[0].to_json()

    answer(work, as_json, debug, lambda _: show(done[0]))
    if done[0].all_failed:
        raise typer.Exit(1)
