"""How the command line shows a result to a person: tables on stdout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def show_training(result: Mapping[str, Any]) -> None:
    if result["evaluations"]:
        table(result["evaluations"], ("real_steps", "mean_return", "std_return", "episodes"))
    show_pairs({key: value for key, value in result.items() if key != "evaluations"})


def show_evaluation(result: Mapping[str, Any]) -> None:
    show_pairs({key: value for key, value in result.items() if key not in ("returns", "lengths")})


def show_dream(result: Mapping[str, Any]) -> None:
    names = ("observation", "persistence", "ratio", "reward", "continue", "uncertainty")
    columns = {"horizon": "horizons", **{name: name for name in names}}
    rows = [dict(zip(columns, values)) for values in zip(*(result[key] for key in columns.values()))]
    known = [row for row in rows if row["reward"] is not None]
    shown = [row for row in known if row["horizon"] in (1, 2, 3, 5, 7, 10, 15) or row["horizon"] % 10 == 0 or row is known[-1]]
    table(shown, tuple(columns), digits=4)
    worst = result["worst"] or {}
    told = {f"worst at horizon {worst['horizon']}": f"{worst['name']}: {worst['observation']:.3f}"} if worst else {}
    for part, ratio in result["ratio_by_part"].items():
        if measured := [row["horizon"] for row in known if row["horizon"] <= 15 and ratio[row["horizon"] - 1] is not None]:
            told[f"ratio at horizon {measured[-1]} in steps {part}"] = f"{ratio[measured[-1] - 1]:.3f}"
    show_pairs({**{key: result[key] for key in ("env_id", "run", "step", "context", "out")}, **told})


def show_pairs(result: Mapping[str, Any]) -> None:
    rows = []
    for key, value in result.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{k}: {'-' if v is None else v}" for k, v in value.items())
        rows.append({"": key, " ": value})
    table(rows, ("", " "))


def table(rows: list[Mapping[str, Any]], columns: tuple[str, ...], digits: int = 2) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*[column.replace("_", " ") for column in columns], show_header=any(c.strip() for c in columns))
    for row in rows:
        table.add_row(*[_cell(row[column], digits) for column in columns])
    Console(markup=False, highlight=False).print(table)


def _cell(value: Any, digits: int) -> str:
    if value is None or value == []:
        return "-"
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)
