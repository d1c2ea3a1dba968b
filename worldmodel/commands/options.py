"""`options`: every option with its default and what it means; `recipes`: the recipes there are."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from worldmodel.commands.console import Debug, Json, answer, table

EXAMPLE = "worldmodel options agent.plan agent=planner"
RECIPES_EXAMPLE = "worldmodel recipes --json"


def options(prefix: str, overrides: list[str]) -> list[dict[str, Any]]:
    """Every option whose dotted key begins with `prefix`, its default and what it means; `overrides` choose other kinds."""
    from worldmodel.config import REQUIRED, Config, describe, plain
    from worldmodel.errors import ConfigError, did_you_mean

    rows = [plain(row._asdict()) for row in describe(Config.from_recipe({"env": {"id": "custom"}}, overrides))]
    rows = [{**row, "default": REQUIRED} if row["key"] == "env.id" else row for row in rows]
    found = [row for row in rows if row["key"].startswith(prefix)]
    if not found:
        near = did_you_mean(prefix, [row["key"] for row in rows], near_only=True)
        raise ConfigError(f"No option begins with '{prefix}'.{near} `worldmodel options` lists all of them.")
    return found


def command(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PREFIX] [KEY=VALUE]...",
            help="Only options whose key begins with PREFIX; KEY=VALUE chooses other kinds of parts.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the options with their defaults and what they mean."""
    prefixes = [word for word in words or [] if "=" not in word] or [""]
    overrides = [word for word in words or [] if "=" in word]

    def work() -> dict[str, Any]:
        return {"options": [row for prefix in prefixes for row in options(prefix, overrides)]}

    answer(work, as_json, debug, lambda result: table(result["options"], ("key", "default", "type", "description")))


def recipes_command(as_json: Json = False, debug: Debug = False) -> None:
    """List the recipes."""
    columns = ("name", "env_id", "description")

    def work() -> dict[str, Any]:
        from worldmodel.config import list_recipes

        return {"recipes": [dict(zip(columns, recipe)) for recipe in list_recipes()]}

    answer(work, as_json, debug, lambda result: table(result["recipes"], columns))
