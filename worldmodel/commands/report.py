"""`report`: what is known of a run on one HTML page that holds its pictures, to keep or to send."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from worldmodel.commands.console import Debug, Json, RunFolder, answer, opened, say
from worldmodel.commands.diagnose import FOLDER as DIAGNOSIS

if TYPE_CHECKING:
    from worldmodel.storage.run import Run
    from worldmodel.view.report import Part
    from worldmodel.view.tensorboard import Events

EXAMPLE = "worldmodel report runs/cartpole-s0"
NAME = "report"
LOSSES = "world/loss/"


def report(
    run: Run | str | Path, out: str | Path | None = None, *, log: Callable[[str], object] = lambda text: None
) -> dict[str, Any]:
    """Writes report.html, which needs no other file and no network, and beside it report.md and report.json; gives the last.

    Curves and films are those that the run has written for TensorBoard; figures of its world model are those of `diagnose`, where
    that was asked in this run. What is not there is said.

    out  a folder; None: the run's
    log  gets a line as the files are written

    Raises ConfigError, CorruptError, StorageError.
    """
    from worldmodel.config import changed
    from worldmodel.storage.run import Run
    from worldmodel.view import report as pages

    run = run if isinstance(run, Run) else Run.open(run)
    known = _known(run)
    events, why = _events(run)
    options = changed(run.config)
    parts = [_curves(known, events, why), _films(events, why), _options(options), _diagnosis(run)]
    about = {
        "environment": run.config.env.id,
        "recipe": run.config.recipe or "none: defaults",
        **{name.replace("_", " "): known[name] for name in ("seed", "real_steps", "updates", "parameters") if name in known},
        "minutes": round(known["wall_seconds"] / 60, 1),
        **{f"version of {name}": version for name, version in known["versions"].items()},
    }
    sentences = _sentences(known)
    content = {"run": str(run.path), "about": about, "sentences": sentences, "evaluations": known["evaluations"]}
    content["options"] = {name: value for name, _, value in options}
    pages.write(run.path if out is None else Path(out), NAME, content, (f"Run {run.path.name}", about, sentences, parts), log)
    return content


def _known(run: Run) -> dict[str, Any]:
    """What result.json says; where a run is not finished, its newest checkpoint."""
    from worldmodel.agents.evaluation import threshold
    from worldmodel.errors import ConfigError

    manifest = run.manifest()
    if manifest is None:
        raise ConfigError(f"{run.path} has no checkpoint yet, so there is nothing to report. Let it train for longer.")
    config, known = run.config, {**manifest, **manifest["progress"], "real_steps": manifest["step"]}
    if (result := run.result) is not None:
        known |= {**result, "finished": True}
    else:
        level = config.eval.threshold if config.train.data else threshold(config.eval, config.env.id)
        known |= {"finished": False, "threshold": level}
    return known | {"best": run.best, "versions": manifest["versions"]}


def _sentences(known: Mapping[str, Any]) -> list[str]:
    best, evaluations, threshold = known["best"], known["evaluations"], known["threshold"]
    found = []
    if not known["finished"]:
        found.append(f"The run is not finished: this is its checkpoint of real step {known['real_steps']:,}.")
    if known["solved_at"] is not None:
        found.append(
            f"Solved at real step {known['solved_at']:,}: the mean return reached {threshold:g}, and so did other episodes."
        )
    elif threshold is not None and evaluations:
        found.append(
            f"Not solved within {known['real_steps']:,} real steps: no mean return reached {threshold:g} and was confirmed."
        )
    if best is not None:
        found.append(
            f"The best agent is that of real step {best.step:,}: {best.mean_return:.4g} over {best.episodes} episodes, and "
            f"{best.confirmation:.4g} over {best.episodes} others. The lower of the two was reached again."
        )
    if evaluations:
        last = evaluations[-1]
        found.append(f"The newest evaluated one, of step {last['real_steps']:,}, has {last['mean_return']:.4g}.")
    else:
        found.append("Nothing was evaluated (`eval.every`).")
    return found


def _events(run: Run) -> tuple[Events | None, str | None]:
    """(what was written for TensorBoard, None) or (None, why there is nothing)."""
    from worldmodel.errors import ConfigError
    from worldmodel.view import tensorboard

    try:
        return tensorboard.read(run.path), None
    except ConfigError:
        return None, "the run has written nothing for TensorBoard (`log.tensorboard`)"


def _curves(known: Mapping[str, Any], events: Events | None, why: str | None) -> Part:
    """The return of evaluations, and of what TensorBoard has the charts of its layout and each loss."""
    from worldmodel.view import tensorboard
    from worldmodel.view.pictures import curves_figure
    from worldmodel.view.report import Part

    returns = [(entry["real_steps"], entry["mean_return"]) for entry in known["evaluations"]]
    panels = {"mean return of evaluations": {"": returns}} if returns else {}
    for charts in tensorboard.LAYOUT.values() if events else ():
        for title, (_, patterns) in charts.items():
            tags = [tag for tag in events.scalars if any(re.match(pattern, tag) for pattern in patterns)]
            if all(tag.startswith(LOSSES) for tag in tags):  # of different sizes: a panel each
                panels |= {tag.removeprefix("world/"): {"": events.scalars[tag]} for tag in tags}
            else:
                panels[title] = {tag.partition("/")[2]: events.scalars[tag] for tag in tags}
    drawn = {name: kept for name, lines in panels.items() if (kept := _finite(lines))}
    levels = {"mean return of evaluations": known["threshold"]}
    return Part("Curves", note=why, pictures={"by real steps": curves_figure(drawn, "real steps", levels)} if drawn else {})


def _finite(lines: Mapping[str, Sequence[tuple[int, float]]]) -> dict[str, list[tuple[int, float]]]:
    kept = {name: [point for point in points if math.isfinite(point[1])] for name, points in lines.items()}
    return {name: points for name, points in kept.items() if points}


def _films(events: Events | None, why: str | None) -> Part:
    """The newest picture of each tag."""
    from worldmodel.view.report import Part

    if events is None or not events.images:
        return Part("Pictures", note=why or "the run has written no pictures (`log.pictures`)")
    newest = {tag: points[-1] for tag, points in events.images.items()}
    return Part("Pictures", pictures={f"{tag}, real step {step:,}": picture for tag, (step, picture) in newest.items()})


def _options(options: Sequence[tuple[str, Any, Any]]) -> Part:
    from worldmodel.view.report import Part

    lines = [(name, _short(value), _short(old)) for name, old, value in options]
    about = (
        "What differs from the options' own defaults; `config.yaml` has all of them, and `worldmodel options` says what each means."
    )
    return Part("Options", [about], ("option", "value", "default"), lines)


def _short(value: Any) -> str:
    return "-" if value is None else json.dumps(value, default=str)


def _diagnosis(run: Run) -> Part:
    """The sentences of the newest `diagnose` of this run."""
    from worldmodel.storage import files
    from worldmodel.storage.files import storage_errors
    from worldmodel.view.report import Part

    file = run.path / DIAGNOSIS / "diagnosis.json"
    with storage_errors("read", file):
        if not file.is_file():
            return Part("Diagnosis", note=f"`worldmodel diagnose {run.path}` was not run yet")
        found = files.parse_json(file.read_bytes(), file)
    return Part("Diagnosis", [f"Of the world model of real step {found['step']:,}.", *found["sentences"]])


def command(
    run: RunFolder,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of the page.", show_default="RUN")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write what is known of a run on one HTML page: curves, films, options, what diagnose said."""
    answer(lambda: report(opened(run), out, log=say), as_json, debug, lambda found: print("\n".join(found["sentences"])))
