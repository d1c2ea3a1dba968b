"""`dream`: what a run's world model imagines, beside fresh real episodes."""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from worldmodel.commands.console import (
    Debug,
    Json,
    RunFolder,
    Start,
    Trust,
    answer,
    reported,
    say,
    show_dream,
    show_pairs,
    stdout_kept,
)
from worldmodel.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from worldmodel.agents.guidance import Guidance
    from worldmodel.diagnostics.rollouts import OpenLoop
    from worldmodel.storage.run import Run

EXAMPLE = "worldmodel dream runs/cartpole-s0 --horizon 30 --out dream.gif"


def dream(
    run: Run | str | Path,
    context: int = 5,
    horizon: int = 50,
    start: Literal["replay", "prior"] = "replay",
    out: str | Path | None = None,
    *,
    guide: Guidance | None = None,
    episodes: int | None = None,
    device: str = "cpu",
    trust: bool = False,
    log: Callable[[str], object] = lambda text: None,
) -> dict[str, Any]:
    """Open-loop roll-outs of a run's newest checkpoint on fresh episodes; what `worldmodel dream --json` prints.

    context   rows that the model sees before it dreams
    horizon   steps that it dreams; horizons that fit into no episode are null
    start     "prior": dreams from nothing, of which there is no truth to be measured against: all errors are null
    out       a .gif or .mp4 of one roll-out; its figure of errors lies beside it as .png
    episodes  fresh ones to compare with; None: log.held_out of the run, so that the figures are those of TensorBoard
    aim       dreams from nothing begin where this is high, however rare such states are
    trust     the run's agent.path may be opened, where it has one

    Raises ConfigError where context or horizon are no numbers of steps, and where the run has no decoder and `out` is given.
    """
    import torch

    from worldmodel.agents import rollouts
    from worldmodel.agents.evaluation import warn_untrained
    from worldmodel.diagnostics.rollouts import OpenLoop
    from worldmodel.envs.draw import Viewer
    from worldmodel.storage.run import Run
    from worldmodel.view import pictures

    if context < 1 or horizon < 1:
        raise ConfigError(f"A dream needs at least 1 row of context and 1 step, not context={context} and horizon={horizon}.")
    run = run if isinstance(run, Run) else Run.open(run)
    out = None if out is None else pictures.checked(Path(out))
    agent = run.agent(device=device, trust=trust)
    warn_untrained(agent, log)
    viewer = Viewer(run.config.env.id, agent.obs_spec)
    if guide is not None and start != "prior":
        raise ConfigError("Only dreams from nothing can be led: add --start prior (start='prior'), or leave --toward out.")
    if out is not None and agent.policy.world.decoder is None:
        agent.policy.world.decode(torch.zeros(0, agent.policy.world.feature_dim))  # says why there is nothing to show
    guided = None
    if start == "prior":
        shown, guided = rollouts.dream_from_prior(agent, run, viewer, guide, horizon, draw=out is not None)
        log("Dreams from the initial distribution: nothing real to compare with, so errors are null.")
        errors = OpenLoop.unknown(context, horizon)
    else:
        count = run.config.log.held_out if episodes is None else episodes
        draw = out is not None
        errors, shown = rollouts.dream_of_episodes(agent, run, viewer, context, horizon, episodes=count, draw=draw, log=log)
    if out is not None:
        rollouts.save_rollout(out, shown, errors, viewer, log)
    return {
        "env_id": run.config.env.id,
        "run": str(run.path),
        "step": agent.num_timesteps,
        "context": context,
        **_figures(errors),
        "out": None if out is None else str(out),
        "worst": rollouts.worst_number(errors, viewer),
        "guided": guided,
    }


def _figures(errors: OpenLoop) -> dict[str, Any]:
    return {
        "horizons": errors.horizons,
        "observation": _column(errors.error()),
        "persistence": _column(errors.baseline()),
        "reward": _column(errors.reward),
        "continue": _column(errors.cont),
        "ratio": _column(errors.ratio()),
        "ratio_by_part": {part: _column(own.ratio()) for part, own in errors.parts.items()},
        "uncertainty": _column(errors.uncertainty),
    }


def _column(values: Tensor) -> list[float | None]:
    """Numbers for JSON, which knows no NaN."""
    return [value if math.isfinite(value) else None for value in values.tolist()]


class Toward(str, Enum):
    """What dreams from nothing may be led to."""

    reward, value, goal = "reward", "value", "goal"


def command(
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
    with reported(debug):
        with stdout_kept():
            from worldmodel.agents import guidance as guidance_module

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
                result = guidance_module.interpolation_video(run, one, other, out, trust=trust)
            else:
                guide = None
                if toward is not None:
                    strength = 1.0 if guidance is None else guidance
                    guide = guidance_module.Guidance(
                        toward.value, strength, None if goal is None else guidance_module.ReplayPosition.parse(goal)
                    )
                elif goal is not None:
                    raise ConfigError("--goal names where --toward goal leads: add that.")
                elif guidance is not None:
                    raise ConfigError("--guidance says how strongly --toward pulls: add that.")
                given = {"context": context, "horizon": horizon, "start": start.value if start else None}
                given = {name: value for name, value in given.items() if value is not None}
                result = dream(run, **given, out=out, guide=guide, trust=trust, log=say)
        answer(result, as_json, show_pairs if between is not None else show_dream)
