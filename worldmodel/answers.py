"""How the command line shows a result to a person: tables on stdout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def show_training(result: Mapping[str, Any]) -> None:
    if result["evaluations"]:
        table(result["evaluations"], ("real_steps", "mean_return", "std_return", "episodes"))
    shown = {key: value for key, value in result.items() if key not in ("evaluations", "final_episodes")}
    if (count := result["final_episodes"]) is not None:
        from worldmodel.agents.evaluation import FINAL_SEED

        which = f"mean of {count} greedy episodes of seeds {FINAL_SEED} to {FINAL_SEED + count - 1}"
        shown["final_return"] = f"{_cell(result['final_return'], 2)} ({which})"
    show_pairs(shown)


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
    """Rows under headings that are never cut, in 80 columns where there is no terminal; columns without a value are left out."""
    from rich.box import ROUNDED
    from rich.console import Console
    from rich.table import Table

    columns = tuple(name for name in columns if not name.strip() or any(row[name] not in (None, [], "") for row in rows))
    shown = Table(show_header=any(name.strip() for name in columns), box=ROUNDED, show_edge=False, pad_edge=False)
    for name in columns:
        heading = name.replace("_", " ")
        shown.add_column(heading, min_width=max(map(len, heading.split()), default=0), overflow="fold")
    for row in rows:
        shown.add_row(*[_cell(row[name], digits) for name in columns])
    Console(markup=False, highlight=False).print(shown)


def _cell(value: Any, digits: int) -> str:
    if value is None or value == []:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.{digits}f}" if abs(value) < 10 ** (6 - digits) else f"{value:.6g}"
