"""The command line. stdout carries the answer alone; progress, messages and whatever libraries print go to stderr."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from worldmodel import answers, commands
from worldmodel.errors import (
    ConfigError,
    EnvError,
    MissingExtraError,
    NumericsError,
    StorageError,
    TrustError,
    UnsupportedSpaceError,
)

ERRORS = (ConfigError, EnvError, MissingExtraError, NumericsError, StorageError, TrustError, UnsupportedSpaceError)

app = typer.Typer(
    name="worldmodel",
    help="World models for Gymnasium and Stable-Baselines3.",
    epilog="Example: worldmodel train cartpole --run runs/demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

data_app = typer.Typer(
    help="Recorded experience: into NPZ files, out of runs, to Minari and from it.",
    epilog="Example: worldmodel data info runs/cartpole-s0",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(data_app, name="data")


class Device(str, Enum):
    """Where the networks live."""

    auto, cpu, cuda = "auto", "cpu", "cuda"


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show where an error came from.")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Options by dotted key, e.g. train.ratio=2.", show_default=False),
]
Trust = Annotated[bool, typer.Option("--trust", help="Open agent.path, a zip of Stable-Baselines3, although that can run code.")]


@app.callback(invoke_without_command=True)
def about(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    """World models for Gymnasium and Stable-Baselines3."""
    if version:
        import importlib.metadata

        print(importlib.metadata.version("worldmodel"))
        raise typer.Exit()


@app.command(epilog="Example: worldmodel train cartpole train.ratio=1 --steps 3000 --seed 1")
def train(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE_OR_GYM_ID", help="Recipe, YAML file, gym id; a run (--resume).", show_default=False)
    ],
    overrides: Overrides = None,
    run: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The run folder.", show_default="runs/<recipe>-s<seed>, or the next free number"),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of environments, weights and draws.", show_default="0; on resume the run's own")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Real steps of the whole run; may grow on resume.", show_default="the recipe's train.steps"),
    ] = None,
    device: Annotated[Device, typer.Option(help="Where the networks live.")] = Device.auto,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SOURCE",
            help="Learn from recorded experience instead of an environment: FILE.npz, a folder of them, minari:ID or a run folder. "
            "Repeat it for several.",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest good checkpoint.")] = False,
    keep_newer: Annotated[bool, typer.Option("--keep-newer", help="On resume, keep experience newer than the checkpoint.")] = False,
    trust: Trust = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train a world model and an agent in it; everything is kept in a run folder.

    Ctrl-C, SIGTERM and SIGHUP save the state and end the run; --resume goes on from there.
    """
    with _reported(debug):
        with _stdout_kept():
            from worldmodel.agents.train import train as train_recipe

            result = train_recipe(
                recipe,
                steps=steps,
                seed=seed,
                run_dir=run,
                overrides=overrides or [],
                device=device.value,
                resume=resume,
                keep_newer=keep_newer,
                progress=sys.stderr.isatty(),
                log=_say,
                data=data or None,
                trust=trust,
            ).to_json()
        _answer(result, as_json, answers.show_training)


@app.command("eval", epilog="Example: worldmodel eval runs/cartpole-s0 --episodes 20 --video play.gif")
def evaluate(
    run: RunFolder,
    episodes: Annotated[int, typer.Option(min=1, help="Greedy episodes.")] = 20,
    seed: Annotated[
        int, typer.Option(min=0, help="Environment seed of the first episode. The default repeats the training's final return.")
    ] = 30_000,
    step: Annotated[int | None, typer.Option(min=0, help="Which checkpoint.", show_default="the newest good one")] = None,
    video: Annotated[Path | None, typer.Option(metavar="FILE.gif|mp4", help="An animation of the first episode.")] = None,
    trust: Trust = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Let a run's agent act greedily in fresh environments."""
    with _reported(debug):
        with _stdout_kept():
            result = commands.evaluate(run, episodes, seed, step, video, trust, _say)
        _answer(result, as_json, answers.show_evaluation)


class Start(str, Enum):
    """Where dreams begin."""

    replay, prior = "replay", "prior"


class Toward(str, Enum):
    """What dreams from nothing may be led to."""

    reward, value, goal = "reward", "value", "goal"


@app.command(epilog="Example: worldmodel dream runs/cartpole-s0 --horizon 30 --out dream.gif")
def dream(
    run: RunFolder,
    context: Annotated[
        int | None, typer.Option(min=1, help="Observations that the model sees before it dreams.", show_default="5")
    ] = None,
    horizon: Annotated[int | None, typer.Option(min=1, help="Steps that it dreams.", show_default="50")] = None,
    start: Annotated[
        Start | None, typer.Option(help="Fresh real episodes, or the initial distribution: from nothing.", show_default="replay")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.gif|mp4", help="An animation of one dream; the figure of errors lies beside it.")
    ] = None,
    toward: Annotated[Toward | None, typer.Option(help="Dreams from nothing begin where this is high.", show_default=False)] = None,
    guidance: Annotated[
        float | None,
        typer.Option(help="How strongly --toward pulls, in nats; rewards count in units of their own size.", show_default="1.0"),
    ] = None,
    goal: Annotated[
        str | None, typer.Option(metavar="EPISODE:STEP", help="For --toward goal: a row of the run's replay.", show_default=False)
    ] = None,
    between: Annotated[
        str | None,
        typer.Option(
            metavar="EPISODE:STEP,EPISODE:STEP", help="Instead of a dream: what lies between two rows.", show_default=False
        ),
    ] = None,
    trust: Trust = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Let a run's world model dream beside fresh real episodes, and measure how far it is off by horizon."""
    with _reported(debug):
        with _stdout_kept():
            from worldmodel.agents import starts
            from worldmodel.agents.dreams import dream as dream_of

            if between is not None:
                one, comma, other = between.partition(",")
                if not comma or out is None:
                    raise ConfigError("--between wants two moments, EPISODE:STEP,EPISODE:STEP, and --out FILE.gif.")
                of_dreams = {
                    "context": context,
                    "horizon": horizon,
                    "start": start,
                    "toward": toward,
                    "guidance": guidance,
                    "goal": goal,
                }
                if extra := [f"--{name}" for name, value in of_dreams.items() if value is not None]:
                    raise ConfigError(
                        f"--between shows no dream, which {', '.join(extra)} would be of: leave out one or the other."
                    )
                result = starts.between(run, one, other, out, trust=trust)
            else:
                aim = None
                if toward is not None:
                    strength = 1.0 if guidance is None else guidance
                    aim = starts.Aim(toward.value, strength, None if goal is None else starts.Moment.parse(goal))
                elif goal is not None:
                    raise ConfigError("--goal names where --toward goal leads: add that.")
                elif guidance is not None:
                    raise ConfigError("--guidance says how strongly --toward pulls: add that.")
                given = {"context": context, "horizon": horizon, "start": start.value if start else None}
                given = {name: value for name, value in given.items() if value is not None}
                result = dream_of(run, **given, out=out, aim=aim, trust=trust, log=_say)
        _answer(result, as_json, answers.show_pairs if between is not None else answers.show_dream)


class Slot(str, Enum):
    """What a form of the prior may fill."""

    initial, transition, marginal = "initial", "transition", "marginal"


class Where(str, Enum):
    """Which codes the initial law is fitted to."""

    start, anywhere = "start", "anywhere"


@app.command("fit-prior", epilog="Example: worldmodel fit-prior runs/pendulum-s0 --kind mixture --set components=5")
def fit_prior(
    run: RunFolder,
    kind: Annotated[
        str | None, typer.Option(metavar="FORM", help="Required: gaussian, mixture, flow, energy, ...", show_default=False)
    ] = None,
    slot: Annotated[Slot, typer.Option(help="What the form fills.")] = Slot.initial,
    options: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="An option of the form; repeat it.", show_default=False)
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Gradient steps on batches of 256 codes.")] = 2000,
    where: Annotated[Where, typer.Option(help="For the initial slot: codes that open an episode, or all.")] = Where.start,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="The new run.", show_default="RUN-FORM-SLOT")] = None,
    trust: Trust = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Fit another form of the prior to a finished run's codes; a new run holds it, the old one is only read.

    A fifth of the episodes is held out: what the form gains there, in nats, over what filled the slot before.
    """
    with _reported(debug):
        with _stdout_kept():
            import torch

            from worldmodel.agents.two_stage import fit_prior as fit
            from worldmodel.run import Run

            old = Run.open(run)
            torch.set_num_threads(old.config.train.threads)
            result = fit(
                old, kind, slot.value, options=options or [], steps=steps, where=where.value, out=out, trust=trust, log=_say
            )
        _answer(result, as_json, answers.show_pairs)


class Layout(str, Enum):
    """Where an image has its channels."""

    hwc, chw, vector = "hwc", "chw", "vector"


Source = Annotated[
    str, typer.Argument(metavar="SOURCE", help="FILE.npz, a folder of them, minari:ID or a run folder.", show_default=False)
]
LayoutOption = Annotated[
    Layout | None, typer.Option(help="Of image-shaped observations where their shape leaves it open.", show_default=False)
]


@data_app.command("import", epilog="Example: worldmodel data import minari:D4RL/pen/human-v2 --out pen.npz")
def import_data(
    source: Source,
    out: Annotated[Path, typer.Option(metavar="FILE.npz", help="The new file.", show_default=False)],
    layout: LayoutOption = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write recorded episodes, such as a Minari data set's, into an NPZ file."""
    with _reported(debug):
        with _stdout_kept():
            from worldmodel.agents import exchange

            result = exchange.import_data(source, out, layout.value if layout else None)
        _answer(result, as_json, answers.show_pairs)


@data_app.command("export", epilog="Example: worldmodel data export runs/cartpole-s0 --out dreams.npz --dreamed 100 --horizon 50")
def export_data(
    source: Annotated[
        str, typer.Argument(metavar="RUN", help="A run folder; or any other source, to convert it.", show_default=False)
    ],
    out: Annotated[str, typer.Option(metavar="FILE.npz|minari:ID", help="The new file, or Minari data set.", show_default=False)],
    dreamed: Annotated[
        int | None,
        typer.Option(min=1, help="So many episodes that the run's agent dreams.", show_default="the run's real episodes"),
    ] = None,
    horizon: Annotated[int | None, typer.Option(min=1, help="Steps after which a dream is truncated.", show_default="50")] = None,
    start: Annotated[
        Start | None, typer.Option(help="Dreams begin at recorded rows, or from nothing.", show_default="replay")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the dreams' draws.", show_default="0")] = None,
    trust: Trust = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write the episodes of a run, real or dreamed, as an NPZ file or a Minari data set."""
    with _reported(debug):
        with _stdout_kept():
            from worldmodel.agents import exchange

            dreams = {"horizon": horizon, "start": start.value if start else None, "seed": seed, "trust": trust or None}
            result = exchange.export_data(source, out, dreamed, **dreams)
        _answer(result, as_json, answers.show_pairs)


@data_app.command("info", epilog="Example: worldmodel data info pen.npz")
def data_info(source: Source, layout: LayoutOption = None, as_json: Json = False, debug: Debug = False) -> None:
    """Show what recorded episodes hold."""
    with _reported(debug):
        with _stdout_kept():
            from worldmodel.agents import exchange
            from worldmodel.envs.sources import recording

            result = exchange.summary(recording(source, layout.value if layout else None), source)
        _answer(result, as_json, answers.show_pairs)


@app.command(epilog="Example: worldmodel info cartpole model=vae size=small")
def info(
    run_or_recipe: Annotated[
        str, typer.Argument(metavar="RUN_OR_RECIPE", help="A run folder, a recipe or a Gymnasium id.", show_default=False)
    ],
    overrides: Overrides = None,
    trust: Trust = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show spaces, parts and size of a run or of a recipe."""
    with _reported(debug):
        with _stdout_kept():
            result = commands.describe(run_or_recipe, overrides or [], trust)
        _answer(result, as_json, answers.show_pairs)


@app.command(epilog="Example: worldmodel options agent.plan agent=planner")
def options(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PREFIX] [KEY=VALUE]...",
            help="Those whose key begins so; options that choose other kinds.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the options with their defaults and what they mean."""
    with _reported(debug):
        prefixes = [word for word in words or [] if "=" not in word] or [""]
        overrides = [word for word in words or [] if "=" in word]
        rows = [row for prefix in prefixes for row in commands.options(prefix, overrides)]
        _answer(
            {"options": rows}, as_json, lambda result: answers.table(result["options"], ("key", "default", "type", "description"))
        )


@app.command(epilog="Example: worldmodel recipes --json")
def recipes(as_json: Json = False, debug: Debug = False) -> None:
    """List the recipes."""
    with _reported(debug):
        from worldmodel.config import recipes as list_recipes

        rows = [{"name": name, "env_id": env_id, "description": text} for name, env_id, text in list_recipes()]
        _answer({"recipes": rows}, as_json, lambda result: answers.table(result["recipes"], ("name", "env_id", "description")))


def main() -> None:
    """The console script. Modules beside the user are found, as with `python -m`; what is installed goes before them."""
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)
    app()


# Answers --------------------------------------------------------------------------------------------------------------


@contextmanager
def _reported(debug: bool) -> Iterator[None]:
    """Our errors become one message on stderr and an exit code."""
    try:
        yield
    except ERRORS as error:
        if debug:
            traceback.print_exc()
        _say(f"error: {error}")
        raise typer.Exit(error.exit_code) from None
    except BrokenPipeError:
        raise
    except OSError as error:  # a disk or a stream that a library writes to
        if debug:
            traceback.print_exc()
        _say(f"error: {error}")
        raise typer.Exit(StorageError.exit_code) from None
    except KeyboardInterrupt as stop:
        _say(str(stop) or "Interrupted.")
        raise typer.Exit(getattr(stop, "exit_code", 130)) from None


@contextmanager
def _stdout_kept() -> Iterator[None]:
    """What environments and libraries print, in Python or below it, goes to stderr."""
    sys.stdout.flush()
    try:
        kept = os.dup(1)
        os.dup2(2, 1)
    except OSError:  # a closed stream
        kept = None
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        if kept is not None:
            os.dup2(kept, 1)
            os.close(kept)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _answer(result: Mapping[str, Any], as_json: bool, show: Any) -> None:
    if as_json:
        print(json.dumps(result, allow_nan=False), flush=True)
    else:
        show(result)


if __name__ == "__main__":
    main()
