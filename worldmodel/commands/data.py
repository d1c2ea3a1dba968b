"""`data`: recorded experience in and out: NPZ files, runs and what they dream, Minari's data sets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from worldmodel.commands.console import Debug, Json, Start, Trust, answer
from worldmodel.errors import ConfigError

if TYPE_CHECKING:
    from worldmodel.storage.recording import Recording

app = typer.Typer(
    help="Recorded experience: into NPZ files, out of runs, to Minari and from it.",
    epilog="Example: worldmodel data info runs/cartpole-s0",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def summary(found: Recording, source: str, out: str | None = None) -> dict[str, Any]:
    """What `worldmodel data ... --json` prints."""
    return {
        "source": source,
        "out": out,
        "env_id": found.env_id,
        "observation_space": str(found.obs_spec.space),
        "action_space": str(found.action_spec.space),
        "episodes": found.episodes,
        "steps": found.steps,
        "terminated": int(found.terminated.sum()),
        "mean_return": float(found.returns.mean()),
        "std_return": float(found.returns.std()),
        "mean_length": float(found.lengths.mean()),
    }


def import_data(source: str, out: str | Path, layout: Any = None) -> dict[str, Any]:
    """Writes the episodes of a source into an NPZ file. Raises ConfigError, CorruptError, MissingExtraError, StorageError."""
    from worldmodel.envs.sources import recording
    from worldmodel.storage.npz import free_name

    out = free_name(out)
    found = recording(source, layout)
    return summary(found, source, str(found.write(out)))


def export_data(source: str, out: str, dreamed: int | None = None, **dreams: Any) -> dict[str, Any]:
    """Writes a source's episodes, or `dreamed` many of a run, as FILE.npz or "minari:ID". Raises what `import_data` does.

    `dreams` are options of `dreamed_episodes`; None is its default.
    """
    from worldmodel.agents.exchange import dreamed_episodes
    from worldmodel.envs import minari
    from worldmodel.envs.sources import recording
    from worldmodel.storage.npz import free_name
    from worldmodel.storage.run_folder import CONFIG

    dreams = {name: value for name, value in dreams.items() if value is not None}
    if dreams and dreamed is None:
        raise ConfigError(f"No dreams were asked for, and --{', --'.join(dreams)} is about dreams alone. Add --dreamed N.")
    dataset = str(out).removeprefix(minari.PREFIX) if str(out).startswith(minari.PREFIX) else None
    if dataset is None:
        free_name(out)
    else:
        minari.check_free(dataset)
    if dreamed is None:
        found = recording(source)
    elif (Path(source) / CONFIG).is_file():
        found = dreamed_episodes(source, dreamed, **dreams)
    else:
        raise ConfigError(f"'{source}' is no run folder, and only a run's agent dreams. Name a run, or leave --dreamed out.")
    if dataset is None:
        found.write(out)
    else:
        minari.write(dataset, found)
    return summary(found, source, str(out))


# The command line ------------------------------------------------------------------------------------------------------


Source = Annotated[
    str, typer.Argument(metavar="SOURCE", help="FILE.npz, a folder of them, minari:ID or a run folder.", show_default=False)
]
LayoutOption = Annotated[
    Literal["hwc", "chw", "vector"] | None,
    typer.Option(help="Order of the axes of images where their shape leaves it open.", show_default=False),
]


@app.command("import", epilog="Example: worldmodel data import minari:D4RL/pen/human-v2 --out pen.npz")
def import_command(
    source: Source,
    out: Annotated[Path, typer.Option(metavar="FILE.npz", help="The new file.", show_default=False)],
    layout: LayoutOption = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write recorded episodes, such as a Minari data set's, into an NPZ file."""
    answer(lambda: import_data(source, out, layout), as_json, debug)


@app.command("export", epilog="Example: worldmodel data export runs/cartpole-s0 --out dreams.npz --dreamed 100 --horizon 50")
def export_command(
    source: Annotated[
        str, typer.Argument(metavar="RUN", help="A run folder; or any other source, to convert it.", show_default=False)
    ],
    out: Annotated[str, typer.Option(metavar="FILE.npz|minari:ID", help="The new file, or Minari data set.", show_default=False)],
    dreamed: Annotated[
        int | None,
        typer.Option(min=1, help="Episodes that the run's agent dreams.", show_default="the run's real episodes"),
    ] = None,
    horizon: Annotated[int | None, typer.Option(min=1, help="Steps after which a dream is truncated.", show_default="50")] = None,
    start: Annotated[
        Start | None, typer.Option(help="Dreams begin at recorded rows, or in draws of the initial prior.", show_default="replay")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the dreams' draws.", show_default="0")] = None,
    trust: Trust = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write the episodes of a run, real or dreamed, as an NPZ file or a Minari data set."""
    dreams = {"horizon": horizon, "start": start, "seed": seed, "trust": trust or None}
    answer(lambda: export_data(source, out, dreamed, **dreams), as_json, debug)


@app.command("info", epilog="Example: worldmodel data info pen.npz")
def info_command(source: Source, layout: LayoutOption = None, as_json: Json = False, debug: Debug = False) -> None:
    """Show what recorded episodes hold."""

    def work() -> dict[str, Any]:
        from worldmodel.envs.sources import recording

        return summary(recording(source, layout), source)

    answer(work, as_json, debug)
