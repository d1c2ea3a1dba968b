"""`train`: a recipe in, a run folder and a result out; stopped and resumed at any step."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from worldmodel.commands.console import Debug, Json, Overrides, Trust, answer, reported, say, show_training, stdout_kept
from worldmodel.config import parse_override
from worldmodel.errors import ConfigError

if TYPE_CHECKING:
    from worldmodel.agents.training.session import TrainResult
    from worldmodel.storage.run import Run

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
) -> TrainResult:
    """Train what a recipe (name, path, gym id or content) describes; everything is kept in a run folder.

    recipe      with resume also a run folder, whose recipe and options it goes on with
    steps       real steps of the whole run (default: the recipe's train.steps); on resume it may grow
    seed        of environments, weights and draws (default 0; on resume the run's own)
    run_dir     default runs/<recipe>-s<seed>, with a number behind it if that exists
    overrides   dotted keys: {"train.ratio": 2.0} or ["train.ratio=2"]; on resume those that are left out stay as they were
    resume      goes on from the newest good checkpoint; the result of a finished run is given back
    keep_newer  on resume, keeps replay rows that are newer than the checkpoint
    progress    a progress bar on stderr, else lines for `log`: one at each evaluation, and one every 30 s in which there was none
    log         gets these lines and warnings; without it they go to Python's logging, as info and as warnings, and the lines to
                stderr where that is set to show no info (it is not unless somebody asks for it)
    data        recorded experience to learn from: .npz files, folders of them, "minari:ID", runs. Then no environment is made:
                `train.pretrain` updates of the world model, then train.steps * train.ratio of all; nothing is evaluated
    trust       files that options name may be opened although that can run code: agent.path, a zip of Stable-Baselines3

    Exact on resume, on the same device and thread count: weights, optimisers, running statistics, replay (up to the
    checkpoint), counters, the ratio's remainder and all random states. Not exact: the environments. They are reset with
    seeds that follow from (seed, step), and the open episode of each is closed like a truncated one, so a resumed run is
    another run of equal standing. With checkpoint.fence=true every checkpoint of checkpoint.every does the same to the
    unbroken run, and the two are equal bit for bit, as far as the environment is determined by its reset seed.

    SIGINT, SIGTERM and SIGHUP finish the step, save and raise Interrupted (a KeyboardInterrupt); a second one aborts.
    Raises ConfigError, UnsupportedSpaceError, MissingExtraError, TrustError, EnvError (the state is saved first), StorageError
    and NumericsError (the last good checkpoint stays).
    """
    if not isinstance(recipe, str | Path | Mapping | None):
        raise ConfigError(
            f"recipe is a {type(recipe).__name__}; expected a name, a path, a gym id or a mapping. An environment that is an "
            "object is for Dreamer('MlpPolicy', env)."
        )
    given = _as_mapping(overrides)
    if steps is not None:
        if given.get("train.steps", steps) != steps:
            raise ConfigError(f"steps={steps} and train.steps={given['train.steps']} differ. Give one of them.")
        given["train.steps"] = steps
    if data is not None:
        sources = _as_sources(data)
        if list(given.get("train.data", sources)) != sources:
            raise ConfigError(f"data={sources} and train.data={given['train.data']} differ. Give one of them.")
        given["train.data"] = sources
    if seed is not None and seed < 0:
        raise ConfigError(f"seed is {seed}; expected at least 0.")
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


def _as_mapping(overrides: Mapping[str, Any] | Sequence[str] | None) -> dict[str, Any]:
    """Overrides as {dotted key: value}."""
    if overrides is None or isinstance(overrides, Mapping):
        return dict(overrides or {})
    if isinstance(overrides, str):
        raise ConfigError(f"overrides must be a list of words or a mapping, not the one word '{overrides}'. Write ['{overrides}'].")
    out: dict[str, Any] = {}
    for text in overrides:
        key = text.partition("=")[0].strip()
        value: Any = parse_override(text)
        for step in key.split("."):
            value = value[step]
        if key in out:
            raise ConfigError(f"'{key}' is given twice, as {out[key]!r} and as {value!r}. Keep one.")
        out[key] = value
    return out


def _as_sources(data: Any) -> list[str]:
    """Names of recorded experience, as a config keeps them."""
    given = [data] if isinstance(data, (str, Path)) or hasattr(data, "path") else list(data)
    if not given:
        raise ConfigError("data is empty. Expected at least one .npz file, folder of them, minari:ID or run; or leave it out.")
    odd = [type(item).__name__ for item in given if not (isinstance(item, (str, Path)) or hasattr(item, "path"))]
    if odd:
        raise ConfigError(f"data holds a {odd[0]}; expected names of files, folders, runs or minari:ID. Write it to a file first.")
    return [str(item.path if hasattr(item, "path") else item) for item in given]


class Device(str, Enum):
    """Where the networks live."""

    auto, cpu, cuda = "auto", "cpu", "cuda"


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
    with reported(debug):
        with stdout_kept():
            result = train(
                recipe,
                steps=steps,
                seed=seed,
                run_dir=run,
                overrides=overrides or [],
                device=device.value,
                resume=resume,
                keep_newer=keep_newer,
                progress=sys.stderr.isatty(),
                log=say,
                data=data or None,
                trust=trust,
            ).to_json()
        answer(result, as_json, show_training)
