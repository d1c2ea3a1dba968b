"""`options`: every option with its default and what it means; `recipes`: the recipes there are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from worldmodel.commands.console import Debug, Json, answer, reported, table

EXAMPLE = "worldmodel options agent.plan agent=planner"
RECIPES_EXAMPLE = "worldmodel recipes --json"


def options(prefix: str, overrides: list[str]) -> list[dict[str, Any]]:
    """Every option whose dotted key begins with `prefix`, its default and what it means; `overrides` choose other kinds."""
    from worldmodel.config import REQUIRED, Config
    from worldmodel.config import describe as describe_options
    from worldmodel.errors import ConfigError, did_you_mean

    made = Config.from_recipe({"env": {"id": "custom"}}, overrides)
    rows = [row._asdict() for row in describe_options(made)]
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


def command(
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
    with reported(debug):
        prefixes = [word for word in words or [] if "=" not in word] or [""]
        overrides = [word for word in words or [] if "=" in word]
        rows = [row for prefix in prefixes for row in options(prefix, overrides)]
        answer({"options": rows}, as_json, lambda result: table(result["options"], ("key", "default", "type", "description")))


def recipes_command(as_json: Json = False, debug: Debug = False) -> None:
    """List the recipes."""
    with reported(debug):
        from worldmodel.config import list_recipes

        rows = [{"name": name, "env_id": env_id, "description": text} for name, env_id, text in list_recipes()]
        answer({"recipes": rows}, as_json, lambda result: table(result["recipes"], ("name", "env_id", "description")))
