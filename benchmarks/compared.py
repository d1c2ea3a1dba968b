"""The blocks of docs/choose.md: what `worldmodel compare` has measured, from the rows in results/compare.

worldmodel compare pendulum --seeds 3 --out runs/compare-pendulum
cp runs/compare-pendulum/plan.json runs/compare-pendulum/rows.jsonl benchmarks/results/compare/pendulum/

The form that it recommends, trained afterwards on seeds that it has not seen, goes into the folder `fresh` beside:

worldmodel compare pendulum --forms anchored --seeds 3 --first-seed 3 --out runs/fresh-pendulum

The options and steps of each are those that its block says.
"""

from __future__ import annotations

from collections.abc import Callable

from figures import Figures, block
from tables import markdown, number

from worldmodel.agents.comparison.plan import OTHERS
from worldmodel.agents.comparison.table import Cell, Comparison, promised

_listed = ", ".join
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
        found = Comparison.read(folder)
        forms = [form for form in (*found.forms, *OTHERS) if any(found.cell(form, column) for column in COLUMNS)]
        shown = {column: title for column, title in COLUMNS.items() if any(found.cell(form, column) for form in forms)}
        lines = [[form, *(_cell(found.cell(form, column)) for column in shown)] for form in forms]
        words = {True: "held", False: "did not hold"}
        expected = [[x["text"], words[x["held"]]] for x in found.expectations if x["held"] is not None]
        said = [text for text in found.sentences if not text.startswith("Another version")]
        if (folder / "fresh" / "plan.json").exists():
            said += _kept(found, Comparison.read(folder / "fresh"))
        sentences = "\n".join(f"- {text}" for text in said)
        drawn = markdown(["", *shown.values()], lines), _origin(found), markdown(["expected beforehand", "measured"], expected)
        return "\n\n".join((sentences, *drawn)) + "\n"

    return write


def _kept(found: Comparison, fresh: Comparison) -> list[str]:
    """Whether fresh seeds of the recommended form returned, and predicted, what was promised; and what others did there."""
    form, texts = found.recommended or "", []
    for figure, other in (("return", "model-free"), ("error at 5", "mlp ensemble")):
        before, seeds, values = found.cell(form, figure), *_by_seed(fresh, form, figure)
        interval = None if before is None else promised(before.values, in_logs=figure.startswith("error"))
        if interval is None or not values:
            continue
        inside, low, high = sum(interval[0] <= x <= interval[1] for x in values), *map(number, interval)
        beside = _by_seed(fresh, other, figure)[1]
        texts.append(
            f"Trained afterwards on seeds {_listed(map(str, seeds))}, `model={form}` has {figure} {_listed(map(number, values))}: "
            f"{inside} of {len(values)} within the {low} to {high} that {len(before.values)} seeds promised"
            + (f"; {other} {_listed(map(number, beside))}." if beside else ".")
        )
    return texts


def _by_seed(found: Comparison, form: str, figure: str) -> tuple[list[int], list[float]]:
    """The seeds in which a row has a figure, in order, and the figures."""
    rows = sorted((row["key"]["seed"], row["figures"].get(figure)) for row in found.rows if row["key"]["form"] == form)
    return [seed for seed, x in rows if x is not None], [x for _, x in rows if x is not None]


def _origin(found: Comparison) -> str:
    """What the rows were measured with: options, code, versions, threads."""
    origins = [row["where"] for row in found.rows]
    known = {
        name: ", ".join(sorted({str(x[name]) for x in origins})) for name in ("code", "torch", "gymnasium", "threads", "processor")
    }
    days = sorted(x["when"][:10] for x in origins)
    when = " to ".join(dict.fromkeys((days[0], days[-1])))
    seeds, options = ", ".join(map(str, found.seeds)), " ".join(found.plan.overrides)
    return (
        f"{found.plan.steps:,} real steps, `{options}`, seeds {seeds}. Measured {when} by code "
        f"`{known['code']}`, {known['threads']} thread a row, with torch {known['torch']} and gymnasium "
        f"{known['gymnasium']} on {known['processor']}."
    )


def _cell(cell: Cell | None) -> str:
    """The interquartile mean and the range of seeds."""
    if cell is None:
        return ""
    low, high = min(cell.values), max(cell.values)
    return number(cell.mean) + ("" if low == high else f" [{number(low)}..{number(high)}]")


block("choose-pendulum")(compared("pendulum"))
block("choose-catch")(compared("catch"))
