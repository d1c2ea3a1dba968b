"""What `eval`, `info` and `options` do, and return for JSON. Torch loads with the first call, not with the module."""

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
    from worldmodel.envs.make import frames_per_second, renders
    from worldmodel.run import Run

    if video is not None:
        pictures.checked(video)
    run = Run.open(path)
    torch.set_num_threads(run.config.train.threads)
    agent = run.agent(step, trust=trust)
    tell_untrained(agent, say)
    frames: list[np.ndarray] | None = [] if video is not None and renders(run.config.env) else None
    played: list[tuple[Any, float]] = []
    options = {"max_steps": run.config.eval.max_steps, "frames": frames, "played": played}
    returns, lengths = evaluate_agent(agent, run.config.env, episodes, seed, **options)
    if video is not None:
        film = np.stack(frames) if frames is not None else _drawn(agent, run.config.env.id, [obs for obs, _ in played], say)
        words = [f"step {t} of {lengths[0]}   return {so_far:.1f} of {returns[0]:.1f}" for t, (_, so_far) in enumerate(played)]
        pictures.save(video, pictures.captioned(film, words), frames_per_second(run.config.env.id))
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


def _drawn(agent: Any, env_id: str, played: list[Any], say: Callable[[str], object]) -> np.ndarray:
    """Observations as a film: pictures and known scenes as they are, all else as signals over time."""
    import numpy as np
    import torch

    from worldmodel import pictures
    from worldmodel.agents.dreams import labels, numbers
    from worldmodel.envs.draw import Viewer

    viewer = Viewer(env_id, agent.obs_spec)
    rows = [agent.obs_spec.to_rows(obs) for obs in played]
    obs = agent.obs_spec.canonical({name: torch.from_numpy(np.concatenate([row[name] for row in rows])) for name in rows[0]})
    say(f"{env_id} does not render: the film shows what it observed.")
    if viewer.can_draw:
        return viewer.frames(obs)
    true = numbers(viewer, obs)
    return pictures.signal_frames(true, np.full((1, *true.shape), np.nan), labels(viewer), 0)


def describe(name: str, overrides: list[str], trust: bool) -> dict[str, Any]:
    """Spaces, parts and size of a run, a recipe or a gym id; of the last two with options changed."""
    from worldmodel.agents.train import make_agent
    from worldmodel.config import Config
    from worldmodel.errors import ConfigError
    from worldmodel.run import Run

    if (Path(name) / "config.yaml").is_file() or (os.sep in name and Path(name).is_dir()):
        run = Run.open(name)
        if overrides:
            raise ConfigError(
                f"{name} is a run, whose options stand ({overrides[0]}). Give a recipe or a Gymnasium id to change them."
            )
        config, checkpoints, agent = run.config, run.checkpoints, run.agent(trust=trust)
    else:
        config, checkpoints = Config.from_recipe(name, overrides), []
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


def options(prefix: str, overrides: list[str]) -> list[dict[str, Any]]:
    """Every option whose dotted key begins with `prefix`, its default and what it means; `overrides` choose other kinds."""
    from worldmodel.config import REQUIRED, Config
    from worldmodel.config import describe as rows_of
    from worldmodel.errors import ConfigError, did_you_mean

    made = Config.from_recipe({"env": {"id": "custom"}}, overrides)
    rows = [row._asdict() for row in rows_of(made)]
    rows = [{**row, "default": REQUIRED} if row["key"] == "env.id" else row for row in rows]
    found = [row for row in rows if row["key"].startswith(prefix)]
    if not found:
        near = did_you_mean(prefix, [row["key"] for row in rows])
        near = near if near.startswith(" Did") else ""
        raise ConfigError(f"No option begins with '{prefix}'.{near} `worldmodel options` lists all of them.")
    return [{**row, "default": _plain(row["default"])} for row in found]


def _plain(value: Any) -> Any:
    """For JSON."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


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
