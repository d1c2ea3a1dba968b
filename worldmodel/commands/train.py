"""`train`: a recipe in, a run folder and a result out; stopped and resumed at any step."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from worldmodel.commands.console import (
    Debug,
    Json,
    Overrides,
    Trust,
    answer,
    checkpoint_step,
    say,
    show_training,
    sources,
    which_checkpoint,
)
from worldmodel.config import flat_overrides
from worldmodel.errors import ConfigError

if TYPE_CHECKING:
    from worldmodel.agents.training.session import TrainResult
    from worldmodel.storage.run import Run, Step

EXAMPLE = "worldmodel train cartpole train.ratio=1 --steps 3000 --seed 1"
_log = logging.getLogger(__name__)


def train(
    recipe: str | Path | Mapping | None,
    steps: int | None = None,
    seed: int | None = None,
    run_dir: str | Path | None = None,
    overrides: Mapping[str, Any] | Sequence[str] | None = None,
    device: str = "auto",
    resume: bool = False,
    keep_newer: bool = False,
    progress: bool = False,
    log: Callable[[str], object] | None = None,
    data: str | Path | Run | Sequence[str | Path | Run] | None = None,
    trust: bool = False,
    from_run: str | Path | Run | None = None,
    step: Step = None,
    keep_data: bool = False,
    minutes: float | None = None,
) -> TrainResult:
    """Train what a recipe (name, path, gym id or content) describes; everything is kept in a run folder.

    recipe      with resume also a run folder, whose recipe and options are used again
    steps       real steps of the whole run (default: the recipe's train.steps); on resume it may grow
    seed        of environments, weights and draws (default 0; on resume the run's own)
    run_dir     default runs/<recipe>-s<seed>, with a number appended if that exists
    overrides   dotted keys: {"train.ratio": 2.0} or ["train.ratio=2"]; on resume those that are left out stay as they were
    resume      continue from the newest good checkpoint; of a finished run the result is returned
    keep_newer  on resume, keep replay rows that are newer than the checkpoint
    progress    a progress bar on stderr, else lines for `log`: one at each evaluation, and one after 30 s without any
    log         gets these lines and warnings; default: Python's logging, and stderr for lines that it is set not to show
    data        recorded experience to learn from: .npz files, folders of them, "minari:ID", runs. Then no environment is made:
                `train.pretrain` updates of the world model, then train.steps * train.ratio of all; nothing is evaluated
    trust       files that options name may be opened although that can run code: agent.path, a zip of Stable-Baselines3
    from_run    a run, perhaps of recorded data or of another environment, whose weights the new one begins with: part by part,
                where forms, sizes and spaces are the same. Its model's options are taken too, unless overrides say otherwise
    step        which checkpoint of it: "best", "newest", real steps (default: the best evaluated, the newest where none was)
    keep_data   the replay begins with its rows, so that learning does not forget them; its spaces must be the same
    minutes     time that the whole run may take, evaluations included: steps, updates a step, batch size and eval.every are chosen
                to fill it, where they are not given, and updates a step follow the clock; so no two runs are the same

    What was taken is reported, and kept as `warm_start` in each checkpoint's progress. Where all that acts was taken, the agent is
    evaluated before its first step, and train.prefill and train.pretrain are 0 unless overrides say otherwise.

    Exact on resume, on the same device and thread count: all that is learned, the replay up to the checkpoint, counters and
    random states. Not exact: the environments, which are reset with seeds that follow from (seed, step). With
    checkpoint.fence=true an unbroken run does the same at every checkpoint, and both are equal bit for bit.

    SIGINT, SIGTERM and SIGHUP finish the step, save and raise Interrupted (a KeyboardInterrupt); a second one aborts.
    Raises ConfigError, UnsupportedSpaceError, MissingExtraError, TrustError, StorageError, NumericsError, EnvError (once saved).
    """
    if not isinstance(recipe, str | Path | Mapping | None):
        raise ConfigError(
            f"recipe is a {type(recipe).__name__}; expected a name, a path, a gym id or a mapping. An environment that is an "
            "object is for Dreamer('MlpPolicy', env)."
        )
    if seed is not None and seed < 0:
        raise ConfigError(f"seed is {seed}; expected at least 0.")
    train_options = {"steps": steps, "minutes": minutes, "data": None if data is None else _as_sources(data)}
    given = _overrides(overrides, **train_options, **_warm_start(from_run, step, keep_data, resume))
    import torch

    from worldmodel.agents.training import session
    from worldmodel.agents.training.signals import Signals
    from worldmodel.storage.run_folder import recipe_or_run

    recipe, run_dir = recipe_or_run(recipe, run_dir, resume)
    threads = torch.get_num_threads()
    try:
        with Signals() as signals:
            how = session.Session(signals, device, trust, keep_newer, progress, log or _default_log, log or _log.warning)
            if resume:
                return session.resumed(how, recipe, run_dir, given, seed)
            return session.new(how, recipe, run_dir, given, seed or 0)
    finally:
        torch.set_num_threads(threads)


def _default_log(text: str) -> None:
    if _log.isEnabledFor(logging.INFO):
        _log.info(text)
    else:
        print(text, file=sys.stderr, flush=True)


def _warm_start(from_run: str | Path | Run | None, step: Step, keep_data: bool, resume: bool) -> dict[str, Any]:
    """The options of `train` that name the run to begin with; None where nothing is said. ConfigError."""
    if from_run is None and (step is not None or keep_data):
        raise ConfigError(
            "step and keep_data are about the run of from_run (--from), and there is none. Name it, or leave them out."
        )
    if from_run is not None and resume:
        raise ConfigError(
            "A run that is resumed has weights of its own: from_run (--from) begins a new one. Leave one of them out."
        )
    name = None if from_run is None else str(getattr(from_run, "path", from_run))
    return {"warm_start": name, "warm_start_step": step, "keep_data": keep_data or None}


def _overrides(overrides: Mapping[str, Any] | Sequence[str] | None, **train: Any) -> dict[str, Any]:
    """{dotted key: value} of all that is to be changed; `train`: options of that group, None where nothing is said."""
    given = flat_overrides(overrides)
    for name, value in train.items():
        key = f"train.{name}"
        other = list(given[key]) if isinstance(given.get(key), tuple) else given.get(key, value)
        if value is not None and other != value:
            raise ConfigError(f"{name}={value} and {key}={given[key]} differ. Give one of them.")
        if value is not None:
            given[key] = value
    return given


def _as_sources(data: Any) -> list[str]:
    """Names of recorded experience, as a config keeps them; a run is named by its folder."""
    given = [data] if isinstance(data, (str, Path)) or hasattr(data, "path") else list(data)
    if not given:
        raise ConfigError("data is empty. Expected at least one .npz file, folder of them, minari:ID or run; or leave it out.")
    names = [getattr(item, "path", item) for item in given]
    for name in names:
        if not isinstance(name, (str, Path)):
            kind = type(name).__name__
            raise ConfigError(
                f"data holds a {kind}; expected names of files, folders, runs or minari:ID. Write it to a file first."
            )
    return list(map(str, names))


FromRun = Annotated[
    Path | None,
    typer.Option(
        "--from",
        metavar="RUN",
        help="Begin with that run's weights, part by part as they fit, and with its model's options.",
        show_default=False,
    ),
]


def command(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE_OR_GYM_ID", help="Recipe, YAML file, gym id; a run (--resume).", show_default=False)
    ],
    overrides: Overrides = None,
    run: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The run folder.", show_default="runs/<recipe>-s<seed>, or the next free number"),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Seed of environments, weights and draws.", show_default="0; on resume the run's own")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Real steps of the whole run; may grow on resume.", show_default="the recipe's train.steps"),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(help="Time of the whole run; steps, ratio, batch_size are chosen to fill it.", show_default="no limit"),
    ] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where the networks live.")] = "auto",
    data: Annotated[list[str] | None, sources("Learn from recorded experience instead of an environment")] = None,
    from_run: FromRun = None,
    step: Annotated[str | None, which_checkpoint("Which checkpoint of --from.")] = None,
    keep_data: Annotated[bool, typer.Option("--keep-data", help="Begin with the rows of --from in the replay too.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest good checkpoint.")] = False,
    keep_newer: Annotated[bool, typer.Option("--keep-newer", help="On resume, keep experience newer than the checkpoint.")] = False,
    trust: Trust = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train a world model and an agent in it; everything is kept in a run folder.

    Ctrl-C, SIGTERM and SIGHUP save the state and end the run; --resume goes on from there.
    """

    def work() -> dict[str, Any]:
        return train(
            recipe,
            steps=steps,
            seed=seed,
            run_dir=run,
            overrides=overrides or [],
            device=device,
            resume=resume,
            keep_newer=keep_newer,
            progress=sys.stderr.isatty(),
            log=say,
            data=data or None,
            trust=trust,
            from_run=from_run,
            step=checkpoint_step(step),
            keep_data=keep_data,
            minutes=minutes,
        ).to_json()

    answer(work, as_json, debug, show_training)
