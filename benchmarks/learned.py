"""The blocks of docs/learning.md, docs/scoreboard.md and docs/environments.md, from the rows in results."""

from __future__ import annotations

from collections.abc import Sequence

import environments
import exploration
import minutes
import scoreboard
from figures import Figures, block
from rows import Row, grouped
from tables import spread


@block("exploration")
def _exploration(figures: Figures) -> str:
    """The share of random episodes that reach the goal, by how long an action lasts."""

    def cells(rows: Sequence[Row]) -> list[str]:
        return [spread((row["share"] for row in rows if row["key"]["actions"] == actions), 2) for actions in exploration.ACTIONS]

    groups = grouped(figures.rows("exploration"), lambda row: row["key"]["env"])
    return figures.lines(["reaches the goal", *(f"{actions} steps" for actions in exploration.ACTIONS)], groups.items(), cells)


@block("dreams-by-seed")
def _dreams_by_seed(figures: Figures) -> str:
    """How far the dreams of each run of recipe `cartpole` are off, beside what has been seen last."""

    def cells(rows: Sequence[Row]) -> list[str]:
        (row,) = rows
        errors, ratios = row["observation"], row["ratio"]
        return [str(row["real_steps"]), *(f"{x:.3g}" for x in (errors[0], errors[14], ratios[0], ratios[14]))]

    rows = sorted(figures.rows("open_loop", task="cartpole", overrides=[]), key=lambda row: row["key"]["seed"])
    head = ["seed", "real steps", "error at 1", "at 15", "error over persistence at 1", "at 15"]
    return figures.lines(head, grouped(rows, lambda row: row["key"]["seed"]).items(), cells)


@block("minutes")
def _minutes(figures: Figures) -> str:
    """What three minutes lead to, by updates a step."""

    def cells(rows: Sequence[Row]) -> list[str]:
        return [spread((row[name] for row in rows), 0) for name in ("return", "steps", "updates", "seconds")]

    rows = sorted(figures.rows("minutes"), key=lambda row: (row["key"]["env"], minutes.RATIOS.index(row["key"]["ratio"])))
    groups = grouped(rows, lambda row: f"{row['key']['env']}, {row['key']['ratio']}")
    return figures.lines(["three minutes, updates a step", "return", "real steps", "updates", "seconds"], groups.items(), cells)


@block("scoreboard")
def _scoreboard(figures: Figures) -> str:
    """The default beside its rivals, and who needs fewer real steps."""
    groups = scoreboard.by_run(figures.rows("scoreboard", max_steps=None))
    named = [(f"{env}, {'**ours**' if name == scoreboard.OURS else name}", rows) for (env, name), rows in groups.items()]
    head = ["environment, algorithm", *scoreboard.HEAD]
    drawn = figures.lines(head, named, lambda rows: scoreboard.cells(rows[0]["key"]["env"], rows))
    return "\n".join([drawn, *(f"- {line}" for line in scoreboard.verdict(groups)), ""]) if groups else drawn


@block("environments")
def _environments(figures: Figures) -> str:
    """What a few hundred steps by one line of command each lead to."""
    rows = environments.in_order(figures.rows("environments"))
    lines = [[figures.mark(first, [row]), *rest] for row in rows for first, *rest in [environments.cells(row)]]
    return figures.table(environments.HEAD, lines, rows)
