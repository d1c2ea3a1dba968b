"""The blocks of docs/choose.md: what `worldmodel compare` has measured, from the rows in results/compare.

worldmodel compare pendulum --seeds 3 --out runs/compare-pendulum
cp runs/compare-pendulum/plan.json runs/compare-pendulum/rows.jsonl benchmarks/results/compare/pendulum/
"""

from __future__ import annotations

from collections.abc import Callable

from figures import Figures, block
from tables import markdown

from worldmodel.agents.comparison.plan import OTHERS
from worldmodel.agents.comparison.table import Cell, Comparison

COLUMNS = {
    "return": "agent's return",
    "planned return": "planner's return",
    "error at 1": "error, 1",
    "error at 5": "error, 5",
    "error at 15": "error, 15",
    "coverage at 5": "coverage of 90 %",
    "likelihood": "nats",
    "hole mass": "hole mass",
    "regret": "regret, nats",
    "update": "ms per update",
}


def compared(name: str) -> Callable[[Figures], str]:
    """What writes the block of one environment's comparison."""

    def write(figures: Figures) -> str:
        folder = figures.folder / "compare" / name
        if not (folder / "plan.json").exists():
            return "Not measured yet.\n"
        found, rows = Comparison.read(folder), figures.rows(f"compare/{name}/rows")
        forms = [form for form in (*found.forms, *OTHERS) if any(found.cell(form, column) for column in COLUMNS)]
        shown = {column: title for column, title in COLUMNS.items() if any(found.cell(form, column) for form in forms)}
        lines = []
        for form in forms:
            own = [row for row in rows if row["key"]["form"] == form]
            lines.append([figures.mark(form, own), *(_cell(found.cell(form, column)) for column in shown)])
        words = {True: "held", False: "did not hold"}
        expected = [[x["text"], words[x["held"]]] for x in found.expectations if x["held"] is not None]
        sentences = "\n".join(f"- {text}" for text in found.sentences if not text.startswith("Another version"))
        drawn = figures.table(["", *shown.values()], lines, rows)
        return f"{sentences}\n\n{drawn}\n{markdown(['expected beforehand', 'measured'], expected)}\n"

    return write


def _cell(cell: Cell | None) -> str:
    """The interquartile mean and the range of seeds."""
    if cell is None:
        return ""
    low, high = min(cell.values), max(cell.values)
    return f"{cell.mean:.3g}" + ("" if low == high else f" [{low:.3g}..{high:.3g}]")


block("choose-pendulum")(compared("pendulum"))
block("choose-catch")(compared("catch"))
