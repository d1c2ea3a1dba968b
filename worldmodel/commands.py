"""What `eval` and `info` do, and return for JSON. Torch loads with the first call, not with the module."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from worldmodel.config import Config


def evaluate(
    path: Path, episodes: int, seed: int, step: int | None, video: Path | None, trust: bool, say: Callable[[str], object]
) -> dict[str, Any]:
    """Greedy episodes of a run's agent, the first of them filmed where `video` says to which file."""
    import numpy as np
    import torch

    from worldmodel import pictures
    from worldmodel.agents.evaluation import evaluate as evaluate_agent
    from worldmodel.agents.evaluation import tell_untrained
    from worldmodel.envs.make import frames_per_second
    from worldmodel.run import Run

    if video is not None:
        pictures.checked(video)
    run = Run.open(path)
    torch.set_num_threads(run.config.train.threads)
    agent = run.agent(step, trust=trust)
    tell_untrained(agent, say)
    frames: list[np.ndarray] | None = [] if video is not None else None
    returns, lengths = evaluate_agent(agent, run.config.env, episodes, seed, max_steps=run.config.eval.max_steps, frames=frames)
    if video is not None:
        pictures.save(video, np.stack(frames), frames_per_second(run.config.env.id))
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


def describe(name: str, trust: bool) -> dict[str, Any]:
    """Spaces, parts and size of a run, a recipe or a gym id."""
    from worldmodel.agents.train import make_agent
    from worldmodel.config import Config
    from worldmodel.run import Run

    if (Path(name) / "config.yaml").is_file() or (os.sep in name and Path(name).is_dir()):
        run = Run.open(name)
        config, checkpoints, agent = run.config, run.checkpoints, run.agent(trust=trust)
    else:
        config, checkpoints = Config.from_recipe(name), []
        agent = make_agent(config, 0, "cpu")
        agent.env.close()
    return {
        "env_id": config.env.id,
        "observation_space": str(agent.observation_space),
        "action_space": str(agent.action_space),
        "parts": _parts(config),
        "parameters": agent.parameter_count,
        "checkpoints": checkpoints,
    }


def _parts(config: Config) -> dict[str, str | None]:
    """{slot: kind} of everything that the registry chose; None where a slot is empty."""
    from worldmodel.model import own_form

    own = own_form(config.model.dynamics).kind
    parts = {}
    for slot in type(config.model).model_fields:
        value = getattr(config.model, slot)
        if value is None and slot in ("transition", "initial"):  # then the latent's own family
            parts[slot] = own
        elif value is None or hasattr(value, "kind"):
            parts[slot] = None if getattr(value, "members", None) == 0 else getattr(value, "kind", None)  # an ensemble of none
    return {**parts, "agent": config.agent.kind}
