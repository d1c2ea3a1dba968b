"""`dream`: what a run's world model imagines, beside fresh real episodes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from worldmodel.commands.console import Debug, Json, RunFolder, Start, Trust, answer, opened, say, show_dream, show_pairs
from worldmodel.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from worldmodel.agents.guidance import Guidance
    from worldmodel.agents.rollouts import Figures
    from worldmodel.storage.run import Run

EXAMPLE = "worldmodel dream runs/cartpole-s0 --horizon 30 --out dream.gif"


def dream(
    run: Run | str | Path,
    context: int = 5,
    horizon: int = 50,
    start: Start = "replay",
    out: str | Path | None = None,
    *,
    guide: Guidance | None = None,
    episodes: int | None = None,
    device: str = "cpu",
    trust: bool = False,
    log: Callable[[str], object] = lambda text: None,
) -> dict[str, Any]:
    """Open-loop roll-outs of a run's newest checkpoint on fresh episodes; what `worldmodel dream --json` prints.

    One number a horizon, null where it is not measured:

    observation, persistence, ratio    root mean square error in deviations, that of persistence, the first over the second
    reward, continue, uncertainty      root mean square error of the reward; Brier score; disagreement of the ensemble
    crps, coverage50, coverage90, spread_skill, spread_knows    of drawn observations (`diagnostics.calibration`)
    reward_gap, reward_gap_low, reward_gap_high    imagined minus real reward under the greedy policy, and its 90 % interval

    context   observations that the model sees before it dreams
    horizon   steps that it dreams; errors are null where no episode is that long
    start     "prior": from draws of the initial prior, with no real episode to compare with: all errors are null
    out       a .gif or .mp4 of one roll-out; the figure of errors is written beside it as .png
    guide     draws of the initial prior begin where this is high, however rare such states are
    episodes  fresh ones to compare with; None: log.held_out of the run, so that the figures are those of TensorBoard
    trust     the run's agent.path may be opened, where it has one

    Raises ConfigError where context or horizon are no numbers of steps, and where the run has no decoder and `out` is given.
    """
    import torch

    from worldmodel.agents import rollouts
    from worldmodel.agents.evaluation import warn_untrained
    from worldmodel.envs.draw import Viewer
    from worldmodel.storage.run import Run

    out = _checked(context, horizon, start, guide, out)
    run = run if isinstance(run, Run) else Run.open(run)
    agent = run.agent("newest", device=device, trust=trust)
    warn_untrained(agent, log)
    viewer = Viewer(run.config.env.id, agent.obs_spec, run.config.env.names)
    if out is not None and agent.policy.world.decoder is None:
        agent.policy.world.decode(torch.zeros(0, agent.policy.world.feature_dim))  # says why there is nothing to show
    draw, guided = out is not None, None
    if start == "prior":
        shown, guided = rollouts.dream_from_prior(agent, run, viewer, guide, horizon, draw=draw)
        log("Dreams from the initial distribution: nothing real to compare with, so errors are null.")
        found = rollouts.Figures.unknown(context, horizon)
    else:
        count = run.config.log.held_out if episodes is None else episodes
        found, shown = rollouts.dream_of_episodes(agent, run, viewer, context, horizon, episodes=count, draw=draw, log=log)
    if out is not None:
        rollouts.save_rollout(out, shown, found.errors, viewer, log)
    about = {"env_id": run.config.env.id, "run": str(run.path), "step": agent.num_timesteps, "context": context}
    shown_in = {"out": out and str(out), "worst": rollouts.worst_number(found.errors, viewer), "guided": guided}
    return {**about, **_figures(found), **shown_in}


def _checked(context: int, horizon: int, start: Start, guide: Guidance | None, out: str | Path | None) -> Path | None:
    """`out` as a path. ConfigError for what no dream can be, and for a file that no animation can."""
    from worldmodel.view import pictures

    if context < 1 or horizon < 1:
        raise ConfigError(f"A dream needs at least 1 row of context and 1 step, not context={context} and horizon={horizon}.")
    if guide is not None and start != "prior":
        raise ConfigError("Only dreams from the prior can be guided: add --start prior (start='prior'), or leave --toward out.")
    return None if out is None else pictures.checked(Path(out))


def _figures(found: Figures) -> dict[str, Any]:
    """What is measured by horizon, for JSON."""
    errors, gap = found.errors, found.gap
    return {
        "horizons": errors.horizons,
        "observation": _column(errors.error()),
        "persistence": _column(errors.baseline()),
        "reward": _column(errors.reward),
        "continue": _column(errors.cont),
        "ratio": _column(errors.ratio()),
        "ratio_by_part": {part: _column(own.ratio()) for part, own in errors.parts.items()},
        "uncertainty": _column(errors.uncertainty),
        **{name: _column(column) for name, column in found.calibration.columns().items()},
        "reward_gap": _column(gap.mean),
        "reward_gap_low": _column(gap.low),
        "reward_gap_high": _column(gap.high),
    }


def _column(values: Tensor) -> list[float | None]:
    """Numbers for JSON, which knows no NaN."""
    return [value if math.isfinite(value) else None for value in values.tolist()]


def command(
    run: RunFolder,
    context: Annotated[
        int | None, typer.Option(min=1, help="Observations that the model sees before it dreams.", show_default="5")
    ] = None,
    horizon: Annotated[int | None, typer.Option(min=1, help="Steps that it dreams.", show_default="50")] = None,
    start: Annotated[
        Start | None, typer.Option(help="Fresh real episodes, or draws of the initial prior.", show_default="replay")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.gif|mp4", help="An animation of one dream; the figure of errors lies beside it.")
    ] = None,
    toward: Annotated[
        Literal["reward", "value", "goal"] | None,
        typer.Option(help="With --start prior: dreams begin where this is high.", show_default=False),
    ] = None,
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

    def work() -> dict[str, Any]:
        options = {"context": context, "horizon": horizon, "start": start}
        if between is not None:
            return _between(run, between, out, trust, {**options, "toward": toward, "guidance": guidance, "goal": goal})
        options = {name: value for name, value in options.items() if value is not None}
        return dream(opened(run), **options, out=out, guide=_guide(toward, guidance, goal), trust=trust, log=say)

    answer(work, as_json, debug, show_dream if between is None else show_pairs)


def _guide(toward: str | None, strength: float | None, goal: str | None) -> Guidance | None:
    """What --toward, --guidance and --goal ask for."""
    from worldmodel.agents.guidance import Guidance, ReplayPosition

    if toward is not None:
        position = None if goal is None else ReplayPosition.parse(goal)
        return Guidance(toward, 1.0 if strength is None else strength, position)
    if goal is not None:
        raise ConfigError("--goal names where --toward goal leads: add that.")
    if strength is not None:
        raise ConfigError("--guidance says how strongly --toward pulls: add that.")
    return None


def _between(run: Path, moments: str, out: Path | None, trust: bool, of_dreams: dict[str, Any]) -> dict[str, Any]:
    """What --between asks for; `of_dreams`, the flags that need a dream, must not be given."""
    from worldmodel.agents import guidance

    one, comma, other = moments.partition(",")
    if not comma or out is None:
        raise ConfigError("--between wants two moments, EPISODE:STEP,EPISODE:STEP, and --out FILE.gif.")
    if extra := [f"--{name}" for name, value in of_dreams.items() if value is not None]:
        raise ConfigError(f"--between shows no dream, which {', '.join(extra)} would be of: leave out one or the other.")
    return guidance.interpolation_video(opened(run), one, other, out, trust=trust)
