"""`diagnose`: what is wrong with a run's world model, in figures with intervals and in sentences."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from worldmodel.commands.console import Debug, Json, RunFolder, Trust, answer, opened, say, sources, table

if TYPE_CHECKING:
    from worldmodel.agents.diagnosis import Diagnosis
    from worldmodel.storage.run import Run

EXAMPLE = "worldmodel diagnose runs/cartpole-s0 --slot transition"
FOLDER = "diagnosis"
"""Within the run's folder: where the report is written by default."""


def diagnose(
    run: Run | str | Path,
    slot: Literal["initial", "transition", "marginal"] | None = None,
    out: str | Path | None = None,
    *,
    episodes: int | None = None,
    data: str | Path | Run | Sequence[str | Path | Run] | None = None,
    device: str = "cpu",
    trust: bool = False,
    log: Callable[[str], object] = lambda text: None,
) -> Diagnosis:
    """Measures a run's newest world model on held-out episodes, and writes a report where `out` is given.

    slot      the prior that is looked at; None: the marginal where there is one, else the transition
    out       a folder: diagnosis.json, diagnosis.md, diagnosis.html, which holds its pictures, and scalars for TensorBoard
    episodes  held-out ones; None: 40
    data      recorded episodes that the model has not seen: .npz files, folders of them, "minari:ID", runs. None: fresh ones are
              played; where a run that learned from recordings has no environment, the last quarter of those, which flatters
    trust     the run's agent.path may be opened, where it has one
    log       gets a line as each section is done

    Raises ConfigError for a slot that nothing fills, too few episodes and data that do not fit; EnvError, MissingExtraError,
    StorageError.
    """
    from worldmodel.agents import diagnosis
    from worldmodel.commands.train import _as_sources
    from worldmodel.storage.run import Run

    run = run if isinstance(run, Run) else Run.open(run)
    count = diagnosis.EPISODES if episodes is None else episodes
    sources = None if data is None else _as_sources(data)
    found = diagnosis.diagnose(run, slot, episodes=count, data=sources, device=device, trust=trust, log=log)
    if out is not None:
        write(found, Path(out), run.config.env.id, log)
    return found


def write(found: Diagnosis, folder: Path, env_id: str, log: Callable[[str], object]) -> None:
    """The report's files. Raises StorageError."""
    from worldmodel.agents.training.report import Scalars
    from worldmodel.view import report, tensorboard

    about = {"run": found.run, "environment": env_id, "step": found.step, "prior": found.slot, "seconds": round(found.seconds)}
    parts = found.parts()
    text = f"Diagnosis of {Path(found.run).name}", about, found.sentences, parts
    report.write(folder, "diagnosis", found.to_json(), text, log)
    scalars = Scalars(folder, found.step, log)
    for name, section in found.sections.items():
        for figure, value in section.figures.items():
            if value.known:
                scalars.writer.add_scalar(f"diagnosis/{name}/{figure.replace(' ', '_')}", value.value, found.step)
    for part in parts:
        for caption, data in part.pictures.items():
            tensorboard.image(scalars.writer, f"diagnosis/{part.title}/{caption.replace(' ', '_')}", data, found.step)
    scalars.writer.add_text("diagnosis/sentences", "\n\n".join(found.sentences), found.step)
    scalars.close()
    log("TensorBoard reads the same folder.")


def show(found: Mapping[str, Any]) -> None:
    """The figures of each section, and at the end what they say."""
    for name, section in found["sections"].items():
        lines = [
            {
                name: title,
                "value": "-" if figure["value"] is None else f"{figure['value']:.4g}",
                "95 % interval": "" if figure["low"] is None else f"{figure['low']:.3g} to {figure['high']:.3g}",
                "unit": figure["unit"],
            }
            for title, figure in section["figures"].items()
        ]
        if lines:
            table(lines, (name, "value", "95 % interval", "unit"))
        if section["skipped"]:
            print(f"{name}: skipped: {section['skipped']}")
        print()
    for sentence in found["sentences"]:
        print(f"- {sentence}")


def command(
    run: RunFolder,
    slot: Annotated[
        Literal["initial", "transition", "marginal"] | None,
        typer.Option(help="The prior that is looked at.", show_default="marginal, else transition"),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of the report.", show_default="RUN/diagnosis")] = None,
    episodes: Annotated[int | None, typer.Option(min=4, help="Held-out episodes.", show_default="40")] = None,
    data: Annotated[list[str] | None, sources("Recorded episodes that the model has not seen, instead of played ones")] = None,
    trust: Trust = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure what is wrong with a run's world model: figures with intervals, sentences, and an HTML page."""

    def work() -> dict[str, Any]:
        folder = run / FOLDER if out is None else out
        return diagnose(opened(run), slot, folder, episodes=episodes, data=data or None, trust=trust, log=say).to_json()

    answer(work, as_json, debug, show)
