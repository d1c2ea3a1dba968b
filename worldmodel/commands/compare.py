"""`compare`: forms of world models on one environment, a row for each and each seed, and which one to take."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from worldmodel.commands.console import Debug, Json, Overrides, answer, say, table
from worldmodel.errors import require_whole

if TYPE_CHECKING:
    from worldmodel.agents.comparison.plan import Plan
    from worldmodel.agents.comparison.table import Comparison

EXAMPLE = "worldmodel compare pendulum --forms anchored,gaussian,dreamer --seeds 3 train.ratio=1"
SEEDS, JOBS = 5, 2


def compare(
    env: str,
    forms: Sequence[str] | None = None,
    seeds: int | Sequence[int] = SEEDS,
    steps: int | None = None,
    minutes: float | None = None,
    jobs: int = JOBS,
    out: str | Path | None = None,
    overrides: Mapping[str, Any] | Sequence[str] | None = None,
    expect: Sequence[str] | None = None,
    log: Callable[[str], object] = lambda text: None,
) -> Comparison:
    """Trains every form on the same recorded experience and measures it, in processes of their own.

    env        recipe or Gymnasium id; the experience is that of SB3's DQN, SAC or PPO there, which is a row itself
    forms      files of configs/model; None: all. One that does not fit the spaces is refused, by name
    seeds      how many, from 0 on, or which
    steps      real steps of the experience; None: 2,000
    minutes    of each row's training; None: train.ratio updates for each real step
    jobs       rows at the same time, each on one thread
    out        folder of rows and report: what is in it is not measured again; None: runs/compare-ENV
    overrides  options of every form, by dotted key
    expect     "A < B: FIGURE", written down before anything is measured; None: those of `plan.EXPECTATIONS`
    log        gets a line for each row

    A stop loses no finished row, and one that trains goes on from its checkpoint. Rows that another version of the source has made
    are measured again.
    Raises ConfigError (an unknown form, a folder of another comparison), EnvError, MissingExtraError, UnsupportedSpaceError.
    """
    from worldmodel.agents.comparison import folder as folders
    from worldmodel.agents.comparison import plan as plans
    from worldmodel.config import flat_overrides
    from worldmodel.storage.rows import Rows

    require_whole(jobs=jobs)
    numbers = folders.numbered(seeds)
    given = tuple(f"{key}={json.dumps(value)}" for key, value in flat_overrides(overrides).items())
    expected = plans.EXPECTATIONS if expect is None else tuple(expect)
    plan = plans.Plan(env, plans.STEPS if steps is None else steps, minutes, given, expected)
    names, env_id = plans.checked_forms(forms), plan.config().env.id
    refused = plans.refusals(plan, names)
    fitting = [name for name in names if name not in refused]
    folder = Path("runs") / f"compare-{Path(env).stem.replace(':', '-')}" if out is None else Path(out)
    folders.kept_plan(folder, plan.to_json(), "comparison")
    rows = Rows(folder / "rows.jsonl", log=log)
    failed = _measure(plan, rows, fitting, numbers, jobs, folder)
    keys = [{"form": form, "seed": seed} for form in (*fitting, *plans.OTHERS) for seed in numbers]
    there = [row for key in keys if (row := rows.get(key)) is not None]
    from worldmodel.agents.comparison.table import Comparison

    found = Comparison(plan, env_id, numbers, tuple(there), refused, failed, str(folder))
    _write(found, folder, log)
    return found


def _measure(plan: Plan, rows: Any, forms: Sequence[str], seeds: Sequence[int], jobs: int, folder: Path) -> dict[str, str]:
    """Adds the rows that are missing; gives {row: why it failed}."""
    from worldmodel.agents.comparison.folder import logged
    from worldmodel.agents.comparison.plan import OTHERS
    from worldmodel.processes import Processes
    from worldmodel.storage import files

    failed: dict[str, str] = {}
    files.make_folder(folder / "log")

    def one(key: Mapping[str, Any]) -> Mapping[str, Any]:
        name = f"{key['form']}, seed {key['seed']}"
        file = folder / "log" / f"{key['form'].replace(' ', '-')}-s{key['seed']}.txt"
        job = {"plan": plan.to_json(), "folder": str(folder), **key}
        return logged(processes, "worldmodel.agents.comparison.measure:work", job, file, failed, name)

    others = [form for form in OTHERS if form not in ("model-free", "persistence")]
    with Processes() as processes:
        rows.measure([{"form": "model-free", "seed": seed} for seed in seeds], one, at_once=jobs)
        played = [seed for seed in seeds if rows.get({"form": "model-free", "seed": seed}) is not None]
        keys = [{"form": form, "seed": seed} for seed in played for form in (*forms, *others)]
        rows.measure(keys, one, at_once=jobs)
    return failed


def _write(found: Comparison, folder: Path, log: Callable[[str], object]) -> None:
    """comparison.json, .md and .html."""
    from worldmodel.storage.rows import where
    from worldmodel.view import report

    here = where(1)
    about = {
        "environment": found.env_id,
        "seeds": ", ".join(map(str, found.seeds)),
        "experience": f"{found.plan.steps} real steps of a model-free agent",
        "options": " ".join(found.plan.overrides) or "those of the recipe",
        "measured with": f"one thread a row, torch {here['torch']}, {here['processor']}, code {here['code']}",
        "figures": "interquartile means over seeds (interval of 95 %)",
    }
    text = f"Forms of world models on {found.env_id}", about, found.sentences, found.parts()
    report.write(folder, "comparison", found.to_json(), text, log)


def show(found: Mapping[str, Any]) -> None:
    """The interquartile means of each row, and what they say."""
    columns = ("return", "planned return", "error at 1", "error at 5", "coverage at 5", "hole mass", "update", "parameters")
    means = [row for row in found["rows"] if row["seed"] == "iqm"]
    known = [name for name in columns if any(name in row["figures"] for row in means)]
    lines = [{"form": row["form"], **{name: row["figures"].get(name, "") for name in known}} for row in means]
    table(lines, ("form", *known), digits=4)
    for form, reason in {**found["refused"], **found["failed"]}.items():
        print(f"{form}: {reason}")
    print()
    for sentence in found["sentences"]:
        print(f"- {sentence}")


def command(
    env: Annotated[str, typer.Argument(metavar="RECIPE_OR_GYM_ID", help="Recipe, YAML file or gym id.", show_default=False)],
    overrides: Overrides = None,
    forms: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="Files of configs/model.", show_default="all that fit the spaces")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of each row.")] = SEEDS,
    first_seed: Annotated[int, typer.Option(min=0, help="The first of them.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Real steps that are learned from.", show_default="2000")] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Training of a row ends then.", show_default="train.ratio updates a step")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Rows at the same time, each on one thread.")] = JOBS,
    expect: Annotated[
        list[str] | None, typer.Option(metavar="'A < B: FIGURE'", help="Written down before, checked after; again for more.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of rows and report.", show_default="runs/compare-ENV")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare forms of world models on one environment: same experience, same size, same planner; which one to take."""

    def work() -> dict[str, Any]:
        names = None if forms is None else forms.split(",")
        numbers = range(first_seed, first_seed + seeds)
        return compare(env, names, numbers, steps, minutes, jobs, out, overrides, expect, say).to_json()

    answer(work, as_json, debug, show)
