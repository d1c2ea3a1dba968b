"""Rows of a comparison -> interquartile means with intervals, what was expected against what was measured, and a recommendation."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from worldmodel.agents.comparison.plan import OTHERS, REFERENCE, WITHIN, Expectation, Plan
from worldmodel.diagnostics.fidelity import HORIZONS
from worldmodel.storage.files import parse_json, storage_errors
from worldmodel.storage.rows import Rows, stale
from worldmodel.view import pictures
from worldmodel.view.report import Part

LEVEL, RESAMPLES = 0.95, 2000
HIGHER = ("return", "planned return", "likelihood")
"""Figures of which more is better; of all others less, but for those in DESCRIBE."""
DESCRIBE = (
    *("parameters", "updates", "seconds", "coverage at 5", "spread over error at 5", "rank", "active"),
    *(f"over persistence at {h}" for h in HORIZONS),
)
"""Figures of which neither more nor less is better, or which another one says already."""
GROUPS: dict[str, tuple[str, ...]] = {
    "what it earns": ("return", "planned return"),
    "fidelity": (*(f"error at {h}" for h in HORIZONS), *(f"over persistence at {h}" for h in HORIZONS)),
    "calibration": ("coverage at 5", "spread over error at 5"),
    "latents and prior": ("likelihood", "bits", "regret", "auc", "hole mass", "marginal hole mass", "active", "rank"),
    "cost": ("update", "seconds", "updates", "parameters"),
}
"""Tables of the report, and their columns."""
UNITS = {
    "return": "mean of 20 greedy episodes",
    "planned return": "random shooting, 6 episodes of 60 steps at most",
    "error at": "deviations, root mean square",
    "coverage at 5": "share of real numbers in the central 90 % of draws",
    "active": "share of the latent's variables that depend on the observation",
    "likelihood": "nats of the next observation, in deviations, given the recurrent state: a lower bound, or exact",
    "bits": "the same bound for pictures, per number",
    "regret": "nats that the best other transition gains",
    "auc": "of a classifier that tells inferred from drawn latents: 0.5 is none",
    "hole mass": "share of the transition's draws where no latent lies",
    "marginal hole mass": "of the draws of p(z)",
    "update": "milliseconds, of world model and agent, beside the rows that were measured at the same time",
}
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Quantile 0.975 of Student's t with 1, 2, ... degrees of freedom; beyond: the last."""


def interquartile_mean(values: Sequence[float] | np.ndarray) -> Any:
    """The mean [*N] of values [*N, S] without the lowest and the highest quarter, of which whole values are dropped: of three all
    count.

    Source: Agarwal et al. 2021, Deep RL at the edge of the statistical precipice, section 4.3.
    """
    ordered = np.sort(np.asarray(values, float), -1)
    cut = ordered.shape[-1] // 4
    return ordered[..., cut : ordered.shape[-1] - cut].mean(-1)


def bootstrapped(values: Sequence[float], seed: int = 0) -> tuple[float, float] | None:
    """The interval of LEVEL of the interquartile mean, by resampling seeds within the environment, which is the one stratum."""
    if len(values) < 2:
        return None
    drawn = np.random.default_rng(seed).choice(np.asarray(values, float), (RESAMPLES, len(values)))
    low, high = np.quantile(interquartile_mean(drawn), [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
    return low, high


def promised(values: Sequence[float], in_logs: bool = False) -> tuple[float, float] | None:
    """Where a fresh seed's figure is expected with LEVEL: Student's prediction interval, as wide as few seeds make it.

    in_logs  logarithms are taken to be normal, and not the figures: for positive ones of which a bad seed has a multiple

    Source: Geisser 1993, Predictive inference, section 1.
    """
    if len(values) < 2:
        return None
    known = [math.log(x) for x in values] if in_logs else values
    reach = STUDENT[min(len(known) - 2, len(STUDENT) - 1)] * statistics.stdev(known) * (1 + 1 / len(known)) ** 0.5
    low, high = statistics.fmean(known) - reach, statistics.fmean(known) + reach
    return (math.exp(low), math.exp(high)) if in_logs else (low, high)


@dataclass(frozen=True)
class Cell:
    """A figure of one form over its seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return float(interquartile_mean(self.values))

    def __str__(self) -> str:
        interval = bootstrapped(self.values)
        return f"{self.mean:.4g}" + ("" if interval is None else f" ({interval[0]:.3g} to {interval[1]:.3g})")


@dataclass(frozen=True)
class Comparison:
    """What a comparison has measured.

    rows     those of its forms and of what they are held against, each with its key and its figures
    refused  {form: why it does not fit}
    failed   {form: why it has no row of some seed}
    folder   where the report is, and the rows
    """

    plan: Plan
    env_id: str
    seeds: tuple[int, ...]
    rows: tuple[Mapping[str, Any], ...]
    refused: Mapping[str, str] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)
    folder: str = ""

    @classmethod
    def read(cls, folder: Path) -> Comparison:
        """What a folder's rows say; nothing is measured. Raises StorageError."""
        file = folder / "plan.json"
        with storage_errors("reading", file):
            plan = Plan.from_json(parse_json(file.read_bytes(), file))
        rows = tuple(Rows(folder / "rows.jsonl"))
        seeds = tuple(sorted({row["key"]["seed"] for row in rows}))
        return cls(plan, plan.config().env.id, seeds, rows, folder=str(folder))

    # Cells ------------------------------------------------------------------------------------------------------------------

    @property
    def forms(self) -> list[str]:
        """The forms that have rows, the best return first."""
        found = dict.fromkeys(row["key"]["form"] for row in self.rows if row["key"]["form"] not in OTHERS)
        return sorted(found, key=lambda form: -cell.mean if (cell := self.cell(form, "return")) else float("inf"))

    @cached_property
    def stale(self) -> list[str]:
        """Forms with rows that another version of the source has made."""
        return list(dict.fromkeys(row["key"]["form"] for row in self.rows if stale(row)))

    def cell(self, form: str, figure: str) -> Cell | None:
        """None where the form has no such figure."""
        values = [x for row in self._of(form) if (x := row["figures"].get(figure)) is not None]
        return Cell(tuple(values)) if values else None

    def _of(self, form: str) -> list[Mapping[str, Any]]:
        """The rows of a form. Persistence has none of its own: its error is the forms' over their ratio to it."""
        if form != "persistence":
            return [row for row in self.rows if row["key"]["form"] == form]
        found: dict[int, dict[str, float]] = {}
        for row in self.rows:
            for h in HORIZONS:
                error, ratio = (row["figures"].get(name) for name in (f"error at {h}", f"over persistence at {h}"))
                if error is not None and ratio:
                    found.setdefault(row["key"]["seed"], {}).setdefault(f"error at {h}", error / ratio)
        return [{"key": {"form": form, "seed": seed}, "figures": figures} for seed, figures in found.items()]

    # What it says -----------------------------------------------------------------------------------------------------------

    @property
    def expectations(self) -> list[dict[str, Any]]:
        """[{text, held, below, above}]: held is None where one of the two has no such figure."""
        found = []
        for one in map(Expectation.parse, self.plan.expectations):
            below, above = self.cell(one.below, one.figure), self.cell(one.above, one.figure)
            held = None if below is None or above is None else below.mean < above.mean
            figures = {"below": None if below is None else below.mean, "above": None if above is None else above.mean}
            found.append({"text": one.text, "held": held, **figures})
        return found

    @property
    def recommended(self) -> str | None:
        """The form to take: of those whose interval of returns reaches the best one's mean, the one that is truest five steps ahead
        (or one, where episodes are too short); where none has returns, the truest of all."""
        forms = self.forms
        if not forms:
            return None
        best = self.cell(forms[0], "return")
        if best is not None:
            forms = [form for form in forms if self._reaches(form, best.mean)]
        for figure in ("error at 5", "error at 1"):
            known = [form for form in forms if self.cell(form, figure) is not None]
            if known:
                return min(known, key=lambda form: self.cell(form, figure).mean)  # type: ignore[union-attr]
        return forms[0]

    def _reaches(self, form: str, best: float) -> bool:
        cell = self.cell(form, "return")
        interval = None if cell is None else bootstrapped(cell.values)
        return cell is not None and (cell.mean >= best if interval is None else interval[1] >= best)

    @property
    def recommendation(self) -> str:
        """One sentence that names what is given up."""
        form = self.recommended
        if form is None:
            return "Nothing is recommended: no form has been measured."
        cell = self.cell(form, "return")
        text = f"Take `model={form}`"
        if cell is not None:
            fresh = promised(cell.values)
            text += f": its agent returns {cell}" + ("" if fresh is None else f", a fresh seed {fresh[0]:.4g} to {fresh[1]:.4g}")
        given = list(self._given_up(form))
        return f"{text}. Given up: {'; '.join(given)}." if given else f"{text}. Nothing measured here is given up."

    def _given_up(self, form: str) -> Iterator[str]:
        for figure in (name for names in GROUPS.values() for name in names if name not in DESCRIBE):
            own = self.cell(form, figure)
            others = {other: cell for other in self.forms if (cell := self.cell(other, figure)) is not None}
            if own is None or len(others) < 2:
                continue
            best = (max if figure in HIGHER else min)(others, key=lambda other: others[other].mean)
            if best != form and _apart(own.values, others[best].values):
                yield f"{figure} ({own.mean:.3g}; {best} {others[best].mean:.3g})"

    @property
    def sentences(self) -> list[str]:
        """The recommendation, what held of what was expected, and what is missing."""
        known = [x for x in self.expectations if x["held"] is not None]
        found = [self.recommendation, f"{sum(x['held'] for x in known)} of {len(known)} expectations held."]
        model_free, form = self.cell("model-free", "return"), self.recommended
        own = None if form is None else self.cell(form, "return")
        if model_free is not None and own is not None:
            found.append(f"The model-free agent returns {model_free} with as many real steps; `model={form}` {own}.")
        wide = [form for form in self.forms if not self._equal_size(form)]
        if wide:
            found.append(f"Parameters could not be brought within {100 * WITHIN:.0f} % of `{REFERENCE}`'s for: {', '.join(wide)}.")
        if self.stale:
            found.append(f"Another version of the source made rows of: {', '.join(self.stale)}. Measure them again.")
        if self.failed:
            found.append(f"Not measured for every seed: {', '.join(self.failed)}.")
        return found

    def _equal_size(self, form: str) -> bool:
        own, other = self.cell(form, "parameters"), self.cell(REFERENCE, "parameters")
        return own is None or other is None or abs(own.mean / other.mean - 1) <= WITHIN

    # As files ---------------------------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """What `worldmodel compare --json` prints."""
        rows: list[dict[str, Any]] = [{**row["key"], "figures": dict(row["figures"])} for row in self.rows]
        names = [name for group in GROUPS.values() for name in group]
        for form in [*self.forms, *OTHERS]:
            cells = {name: cell.mean for name in names if (cell := self.cell(form, name)) is not None}
            if cells:
                rows.append({"form": form, "seed": "iqm", "figures": cells})
        return {
            "env_id": self.env_id,
            "seeds": list(self.seeds),
            "plan": self.plan.to_json(),
            "rows": rows,
            "refused": dict(self.refused),
            "failed": dict(self.failed),
            "recommended": self.recommended,
            "recommendation": self.recommendation,
            "expectations": self.expectations,
            "sentences": self.sentences,
            "out": self.folder,
        }

    def parts(self) -> list[Part]:
        """Tables of a report: one for each group of figures, failures and refusals, expectations."""
        found = [self._table(title, names) for title, names in GROUPS.items()]
        lines = [(form, reason) for form, reason in (*self.refused.items(), *self.failed.items())]
        skipped = [(row["key"]["form"], row["skipped"]) for row in self.rows if row.get("skipped")]
        if lines or skipped:
            found.append(Part("refused, failed, skipped", (), ("row", "because"), list(dict.fromkeys([*lines, *skipped]))))
        marks = {True: "yes", False: "no", None: "not measured"}
        lines = [(x["text"], _shown(x["below"]), _shown(x["above"]), marks[x["held"]]) for x in self.expectations]
        found.append(Part("expected before it was measured", (), ("expectation", "left", "right", "held"), lines))
        return found

    def _table(self, title: str, names: Sequence[str]) -> Part:
        shown = [name for name in names if any(self.cell(form, name) for form in (*self.forms, *OTHERS))]
        rows = [form for form in (*self.forms, *OTHERS) if any(self.cell(form, name) for name in shown)]
        lines = [
            [f"{form} †" if form in self.stale else form, *(str(self.cell(form, name) or "") for name in shown)] for form in rows
        ]
        meaning = [f"{name}: {unit}." for name, unit in UNITS.items() if any(column.startswith(name) for column in shown)]
        drawn = {"what earns most, and what it costs": self._pareto()} if title == "what it earns" and self.forms else {}
        return Part(title, meaning, ("row", *shown), lines, None, drawn)

    def _pareto(self) -> bytes:
        """PNG of returns over the cost of an update; forms that none beats in both are joined."""
        points = {}
        for form in self.forms:
            cost, earned = self.cell(form, "update"), self.cell(form, "return")
            if cost is not None and earned is not None:
                points[form] = cost.mean, earned.mean
        return pictures.pareto_figure(points, "milliseconds per update", "return")


def _apart(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether the intervals of two interquartile means do not touch; of single seeds, whether they differ."""
    a, b = bootstrapped(one), bootstrapped(other)
    return one != other if a is None or b is None else a[1] < b[0] or b[1] < a[0]


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
