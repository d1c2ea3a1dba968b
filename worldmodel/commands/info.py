"""`info`: spaces, parts and size of a run, or of what a recipe would make."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from worldmodel.commands.console import Debug, Json, Overrides, Trust, answer

if TYPE_CHECKING:
    from worldmodel.config import Config

EXAMPLE = "worldmodel info cartpole model=vae size=small"


def info(name: str, overrides: list[str], trust: bool) -> dict[str, Any]:
    """Spaces, parts and size of a run, a recipe or a gym id; of the last two with options changed."""
    from worldmodel.agents.training.session import make_agent
    from worldmodel.config import Config
    from worldmodel.errors import ConfigError
    from worldmodel.storage.run import Run

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


def _parts(config: Config) -> dict[str, str | None]:
    """{slot: kind} of everything that the registry chose; None where a slot is empty."""
    from worldmodel.model import default_distribution

    parts = {}
    for slot in type(config.model).model_fields:
        value = getattr(config.model, slot)
        if value is None and slot in ("transition", "initial"):
            parts[slot] = default_distribution(config.model.dynamics, slot).kind
        elif value is None or hasattr(value, "kind"):
            parts[slot] = None if getattr(value, "members", None) == 0 else getattr(value, "kind", None)  # an ensemble of none
    return {**parts, "agent": config.agent.kind}


def command(
    run_or_recipe: Annotated[
        str, typer.Argument(metavar="RUN_OR_RECIPE", help="A run folder, a recipe or a Gymnasium id.", show_default=False)
    ],
    overrides: Overrides = None,
    trust: Trust = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show spaces, parts and size of a run or of a recipe."""
    answer(lambda: info(run_or_recipe, overrides or [], trust), as_json, debug)
