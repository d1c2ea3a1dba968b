"""`eval`: how well a run's agent does in fresh environments, and a video of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from worldmodel.commands.console import (
    Debug,
    Json,
    RunFolder,
    Trust,
    answer,
    checkpoint_step,
    opened,
    say,
    show_evaluation,
    which_checkpoint,
)
from worldmodel.errors import CorruptError

if TYPE_CHECKING:
    import numpy as np

    from worldmodel.envs.make import EnvConfig
    from worldmodel.storage.run import Run, Step

EXAMPLE = "worldmodel eval runs/cartpole-s0 --episodes 20 --video play.gif"


def evaluate(
    path: Path, episodes: int, seed: int, step: Step, video: Path | None, trust: bool, say: Callable[[str], object]
) -> dict[str, Any]:
    """Greedy episodes of a run's agent (as `Run.agent` chooses it), the first of them as an animation in the file `video`."""
    import numpy as np

    from worldmodel.agents.evaluation import evaluate as evaluate_agent
    from worldmodel.agents.evaluation import warn_untrained
    from worldmodel.envs.make import frames_per_second, renders
    from worldmodel.view import pictures

    if video is not None:
        pictures.checked(video)
    run = opened(path)
    agent = run.agent(step, trust=trust)
    say(_which(run, step, agent.num_timesteps))
    warn_untrained(agent, say)
    frames: list[np.ndarray] | None = [] if video is not None and renders(run.config.env) else None
    played: list[tuple[Any, float]] = []
    max_steps = run.config.eval.max_steps
    returns, lengths = evaluate_agent(agent, run.config.env, episodes, seed, max_steps=max_steps, frames=frames, played=played)
    if video is not None:
        if frames is None:
            say(f"{run.config.env.id} does not render: the video shows what it observed.")
            shown = _drawn(agent, run.config.env, [obs for obs, _ in played])
        else:
            shown = np.stack(frames)
        words = [f"step {t} of {lengths[0]}   return {so_far:.1f} of {returns[0]:.1f}" for t, (_, so_far) in enumerate(played)]
        pictures.save(video, pictures.captioned(shown, words), frames_per_second(run.config.env.id))
    return {
        "env_id": run.config.env.id,
        "run": str(run.path),
        "step": agent.num_timesteps,
        "episodes": episodes,
        "seed": seed,
        "mean_return": float(np.mean(returns)),
        "std_return": float(np.std(returns)),
        "returns": returns,
        "lengths": lengths,
    }


def _which(run: Run, asked: Step, step: int) -> str:
    """The checkpoint that is evaluated, and why it is this one."""
    newest = max(run.checkpoints, default=step)
    best, absent = None, "no evaluation while training named a best one"
    try:
        best = run.best
    except CorruptError:
        absent = "the best one is damaged"
    if best is not None and best.step == step:
        why = f"the best evaluated (mean return {best.mean_return:.1f}, confirmation {best.confirmation:.1f})"
        why += "" if step == newest else f"; the newest is step {newest} (--step newest)"
    elif asked is None:
        why = f"the newest: {absent if best is None else 'the best one is damaged'}"
    else:
        why = "as asked for"
    return f"Evaluates the agent of step {step}, {why}."


def _drawn(agent: Any, env: EnvConfig, played: list[Any]) -> np.ndarray:
    """Observations as video frames: images and known scenes as they are, all else as signals over time."""
    import numpy as np
    import torch

    from worldmodel.envs.draw import Viewer

    viewer = Viewer(env.id, agent.obs_spec, env.names)
    rows = [agent.obs_spec.to_raw(obs) for obs in played]
    obs = agent.obs_spec.canonical({name: torch.from_numpy(np.concatenate([row[name] for row in rows])) for name in rows[0]})
    return viewer.frames(obs) if viewer.can_draw else viewer.signals(obs, None)


def command(
    run: RunFolder,
    episodes: Annotated[int, typer.Option(min=1, help="Greedy episodes.")] = 20,
    seed: Annotated[
        int, typer.Option(min=0, help="Environment seed of the first episode. The default repeats the training's final return.")
    ] = 30_000,
    step: Annotated[str | None, which_checkpoint("Which checkpoint.")] = None,
    video: Annotated[Path | None, typer.Option(metavar="FILE.gif|mp4", help="An animation of the first episode.")] = None,
    trust: Trust = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Let a run's agent act greedily in fresh environments."""
    answer(lambda: evaluate(run, episodes, seed, checkpoint_step(step), video, trust, say), as_json, debug, show_evaluation)
