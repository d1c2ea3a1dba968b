"""`what-if`: what a run's world model expects of plans, from an episode of its replay or from a file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from worldmodel.commands.console import Debug, Json, RunFolder, answer, opened, say, show_what_if
from worldmodel.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

    from worldmodel.model import WorldModel
    from worldmodel.spaces import ActionSpec
    from worldmodel.storage.run import Run

EXAMPLE = "worldmodel what-if runs/cartpole-s0 --plan left=0x15 --plan right=1x15"
MAX_COUNT = 1_000_000
"""Repetitions of one action that are written out; no model predicts as far."""
SPELLING = "ACTIONxCOUNT, such as 1x20, 0x5,1x15 or [0.5,-1]x20, perhaps with NAME= in front; or a .json or .npz file"


def what_if(
    run: Run | str | Path,
    plans: Sequence[str] | Mapping[str, Any],
    history: str | Path | None = None,
    episode: int | None = None,
    step: int | None = None,
    samples: int = 32,
    seed: int = 0,
    discount: float = 1.0,
    *,
    log: Callable[[str], object] = lambda text: None,
) -> dict[str, Any]:
    """What a run's newest checkpoint expects of plans; what `worldmodel what-if --json` prints.

    plans     {name: actions}, or texts: [NAME=]ACTIONxCOUNT,..., [NAME=]FILE.json or .npz
    history   a .json or .npz file of `observations` and `actions`, recorded episodes, or None: the run's own replay
    episode   of the replay or of recorded episodes; None: the last one
    step      of that episode, from which the plans start; None: its middle
    samples, seed, discount   as for `Run.what_if`

    Raises what `Run.what_if` raises, and ConfigError or CorruptError for files that hold something else.
    """
    from worldmodel.storage.run import Run

    run = run if isinstance(run, Run) else Run.open(run)
    manifest, world = run.manifest(), run.world_model()
    chosen = dict(plans) if isinstance(plans, Mapping) else _plans(plans, world.action)
    observations, actions, about = _history(run, world, history, episode, step)
    ranking = run.what_if(observations, actions, chosen, samples, seed=seed, discount=discount)
    if manifest is not None and manifest.get("updates") == 0:
        log(f"step {manifest['step']}: untrained. No update of the world model has been made yet: what comes is noise.")
    if ranking.best.observation_mean is None:
        kind = run.config.model.objective.kind
        log(f"model.objective={kind} learns no decoder: rewards and survival are predicted, and no observations.")
    found = {"env_id": run.config.env.id, "run": str(run.path), "step": None if manifest is None else manifest["step"]}
    return {**found, "history": about, "samples": samples, "seed": seed, "discount": discount, **ranking.to_dict()}


# Histories --------------------------------------------------------------------------------------------------------------


def _history(
    run: Run, world: WorldModel, source: str | Path | None, episode: int | None, step: int | None
) -> tuple[Any, Any, dict[str, Any]]:
    """(observations, actions, where they come from)."""
    from worldmodel.envs.sources import recording

    found = None if source is None or Path(source).is_dir() else _arrays(Path(source))
    if found is not None:
        if episode is not None or step is not None:
            raise ConfigError(f"--episode and --step choose among recorded episodes, and {source} is one history. Leave them out.")
        observations, actions = _named(found, str(source))
        return observations, actions, {"source": str(source), "episode": None, "step": None}
    recorded = recording(run if source is None else source)
    if source is not None:
        recorded.check_same_spaces(world.obs, world.action, str(run.path))
    number = recorded.episodes - 1 if episode is None else episode
    if not 0 <= number < recorded.episodes:
        raise ConfigError(f"{recorded.origin} has {recorded.episodes} episodes, counted from 0, and none of number {number}.")
    whole, length = recorded.episode(number), int(recorded.lengths[number])
    at = length // 2 if step is None else step
    if not 0 <= at <= length:
        raise ConfigError(f"Episode {number} of {recorded.origin} has {length} steps, and none of number {at}.")
    observations = whole["observations"]
    until = {k: x[: at + 1] for k, x in observations.items()} if isinstance(observations, Mapping) else observations[: at + 1]
    return until, whole["actions"][:at], {"source": recorded.origin, "episode": number, "step": at}


def _arrays(path: Path) -> dict[str, Any] | None:
    """What a .json or .npz file holds by name; None for recorded episodes. A JSON list is {"": list}."""
    from worldmodel.storage import npz
    from worldmodel.storage.files import storage_errors

    if not path.is_file():
        raise ConfigError(f"'{path}' is no file. Expected a .json or .npz file.")
    if path.suffix.lower() == ".npz":
        return npz.read_arrays(path)
    with storage_errors("read", path):
        data = path.read_bytes()
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no JSON: {error}. Expected JSON, or an NPZ file whose name ends in .npz.") from None
    return found if isinstance(found, dict) else {"": found}


def _named(found: Mapping[str, Any], path: str) -> tuple[Any, Any]:
    """(observations, actions) of a file; those of a Dict space are an object in JSON, arrays observations/KEY in an NPZ file."""
    inner = {name.partition("/")[2]: x for name, x in found.items() if name.startswith("observations/")}
    known = {"observations", "actions", *(f"observations/{name}" for name in inner)}
    if unknown := sorted(found.keys() - known):
        raise ConfigError(f"{path} holds {unknown}; expected observations (or observations/KEY) and actions.")
    if "observations" not in found and not inner:
        raise ConfigError(f"{path} has no observations. Expected {{observations: T + 1 of them, actions: T of them}}.")
    return inner or found["observations"], found.get("actions")


# Plans ------------------------------------------------------------------------------------------------------------------


def _plans(texts: Sequence[str], spec: ActionSpec) -> dict[str, Any]:
    """{name: actions} of what --plan says, each time."""
    found: dict[str, Any] = {}
    for text in texts:
        for name, actions in _plan(text, spec).items():
            if name in found:
                raise ConfigError(f"Two plans are called '{name}'. Give one another name: --plan NAME={text}.")
            found[name] = actions
    if not found:
        raise ConfigError(f"There is no plan to try. Expected --plan {SPELLING}.")
    return found


def _plan(text: str, spec: ActionSpec) -> dict[str, Any]:
    """{name: actions} of one text: an object in a file names several plans."""
    name, equals, value = text.partition("=")
    name, value = (name.strip(), value.strip()) if equals else ("", text.strip())
    if value.lower().endswith((".json", ".npz")):
        found = _arrays(Path(value))
        if found is None:
            raise ConfigError(f"{value} holds recorded episodes; expected a list of actions, or several by name.")
        if name and len(found) > 1:
            raise ConfigError(f"{value} holds {len(found)} plans with names of their own: leave '{name}=' out.")
        return {name or own or Path(value).stem: actions for own, actions in found.items()}
    return {name or value: _spelled(value, spec)}


def _spelled(text: str, spec: ActionSpec) -> np.ndarray:
    """The actions [H, *raw_shape] of ACTIONxCOUNT,ACTIONxCOUNT; one number stands for all those of an action."""
    import numpy as np

    parts = re.findall(r"\s*([^,x\s][^x]*?)\s*x\s*(\d+)\s*(?:,|$)", text)
    if not parts or re.sub(r"\s*([^,x\s][^x]*?)\s*x\s*(\d+)\s*(?:,|$)", "", text).strip():
        raise ConfigError(f"--plan {text}: expected {SPELLING}.")
    shape, rows = spec.key.raw_shape, []
    for action, count in parts:
        try:
            value = np.asarray(json.loads(action))
            value = np.broadcast_to(value, shape) if value.ndim == 0 else value
            if value.dtype.kind not in "biuf" or value.shape != shape:
                raise ValueError(f"shape {list(value.shape)}")
        except ValueError:
            raise ConfigError(
                f"--plan {text}: '{action}' is no action of {spec.space}. Expected a number, or a list of them."
            ) from None
        if not 1 <= int(count) <= MAX_COUNT:
            raise ConfigError(f"--plan {text}: expected 1 to {MAX_COUNT:,} repetitions, not {count}.")
        rows.append(np.repeat(value[None], int(count), 0))
    return np.concatenate(rows)


def command(
    run: RunFolder,
    plan: Annotated[
        list[str],
        typer.Option(
            metavar="[NAME=]ACTIONxCOUNT|FILE",
            help="Actions to try: 1x20 repeats action 1, 0x5,1x15 goes on with another, [0.5,-1]x20 has two numbers; or a .json or "
            ".npz file. Several are ranked.",
            show_default=False,
        ),
    ],
    history: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="What was seen and done: .json or .npz, or recorded episodes.", show_default="the run's replay"
        ),
    ] = None,
    episode: Annotated[
        int | None, typer.Option(min=0, help="Of the replay, or of recorded episodes.", show_default="the last one")
    ] = None,
    step: Annotated[
        int | None, typer.Option(min=0, help="Of the episode, from which the plans start.", show_default="its middle")
    ] = None,
    samples: Annotated[int, typer.Option(min=2, help="Roll-outs of each plan.")] = 32,
    seed: Annotated[int, typer.Option(min=0, help="Of all draws.")] = 0,
    discount: Annotated[float, typer.Option(help="Of later rewards, per step, in the return that ranks plans.")] = 1.0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Ask a run's world model what plans would lead to: observations, reward, survival, and how sure it is of them."""
    answer(
        lambda: what_if(opened(run), plan, history, episode, step, samples, seed, discount, log=say), as_json, debug, show_what_if
    )
