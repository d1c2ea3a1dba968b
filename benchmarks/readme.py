"""The tables of figures in README.md and docs, written from the rows in results.

    python benchmarks/readme.py             # writes what stands between <!-- figures: NAME --> and <!-- /figures -->
    python benchmarks/readme.py --check     # exit code 1 where a file says something else than the rows do

README names the hash of the code that its unmarked figures are of; a dagger marks those of any other. `--check` looks from this
tree's code: it fails where figures differ from the rows, and where one without a dagger is of other code than this tree's.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import control
import digits
import forms
import open_loop
import plug_in
import validity
from rows import HERE, STALE, Rows, code, marked, median, number, say, spread, stale

ROOT = HERE.parent
FILES = ("README.md", "docs/results.md", "docs/forms.md", "docs/dynamics.md", "docs/jepa.md", "docs/one-role.md")
BLOCK = re.compile(r"(<!-- figures: ([\w-]+) -->\n)(.*?)(<!-- /figures -->)", re.DOTALL)
MADE = re.compile(r"without † are of code `([0-9a-f]{16})`")
NONE = "none"
"""In the place of a hash: no row is of that code."""
BLOCKS: dict[str, Callable[[Figures], str]] = {}


class Figures:
    """The rows of all files, marked by whether the code with hash `of` made them; `fresh`: whether any that was shown was."""

    def __init__(self, folder: Path, of: str):
        self.folder, self.of, self.fresh = folder, of, False

    def rows(self, name: str) -> list[dict[str, Any]]:
        return list(Rows(name, self.folder, of=self.of))

    def mark(self, text: object, rows: Iterable[Mapping[str, Any]]) -> str:
        rows = list(rows)
        self.fresh |= any(not stale(row, self.of) for row in rows)
        return marked(text, rows, self.of)

    def table(self, head: Sequence[str], lines: Iterable[Sequence[object]], rows: Iterable[Mapping[str, Any]]) -> str:
        """A Markdown table, and when its rows were made; where there are none, that."""
        dates = sorted({row["where"]["when"][:10] for row in rows})
        if not dates:
            return "Not measured yet.\n"
        cells = [list(head), ["---"] * len(head), *([str(x) for x in line] for line in lines)]
        drawn = ["|" + "|".join(row) + "|" if row[0] == "---" else "| " + " | ".join(row) + " |" for row in cells]
        when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
        legend = f"; {STALE} by earlier code" if any(STALE in line for line in drawn) else ""
        return "\n".join([*drawn, "", f"Rows of {when}{legend}.", ""])


def block(name: str) -> Callable[[Callable[[Figures], str]], Callable[[Figures], str]]:
    """Registers what writes a block, with its newline at the end."""

    def register(write: Callable[[Figures], str]) -> Callable[[Figures], str]:
        BLOCKS[name] = write
        return write

    return register


# Control --------------------------------------------------------------------------------------------------------------

TITLES = {
    "cartpole": "CartPole-v1 (475)",
    "pendulum": "Pendulum-v1 (-200)",
    "acrobot": "Acrobot-v1 (-100)",
    "catch": "Catch, 64x64 pixels (0.9)",
}
OURS = {
    "cartpole": "`cartpole`: Dreamer, Gaussian codes",
    "vae": "`cartpole model=vae`: plain VAE encoder",
    "acrobot": "`acrobot`: explored by random actions that last",
    "ppo-cartpole": "unmodified SB3 PPO, in turns with the world model (`agent=sb3`)",
    "sac-pendulum": "unmodified SB3 SAC, in turns with the world model (`agent=sb3`)",
    "planner-cartpole": "`agent=planner`: MPPI",
    "planner-pendulum": "`agent=planner`: MPPI",
    "dyna-pendulum": "SB3 SAC with `DynaCallback`, 10 updates per step, evaluated every 100",
}
SOLVED = ["task (threshold)", "agent", "solved", "real steps", "seconds of training"]


def agent(key: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """What a row's agent is called; of one that solved nothing, its final return."""
    name = key["algorithm"]
    task = control.TASKS.get(key["task"]) or control.PLUG_IN[key["task"]]
    if name == task.ours:
        return OURS.get(key["task"], f"`{key['task']}`")
    kind, _, rate = name.partition(", ")
    said = "random play" if kind == "random" else "SB3 " + kind.replace("dqn on 2 frames", "dqn on two stacked frames")
    said = re.sub(r"\b(dqn|ppo|sac)\b", lambda found: found[0].upper(), said) + (f", {rate.replace('/', ' per ')}" if rate else "")
    if key["task"] == "dyna-pendulum":
        said += ", evaluated every 100 steps"
    if not any(row["solved_at"] for row in rows):
        said += f": mean return {spread([row['final_return'] for row in rows], 2)}"
    return said


def solved(figures: Figures, groups: Mapping[str, Sequence[dict[str, Any]]], more: Sequence[Sequence[Any]] = ()) -> str:
    """A line for each group of runs: medians over seeds, [least..most]. more: (recipe, what it is called, rows)."""
    listed = []
    for found in groups.values():
        key = found[0]["key"]
        task = control.TASKS.get(key["task"]) or control.PLUG_IN.get(key["task"])
        if task is not None and task.recipe in TITLES and not key["overrides"] and not key["max_steps"]:
            listed.append((task.recipe, agent(key, found), found))
    listed += [entry for entry in more if entry[2]]
    listed.sort(key=lambda entry: list(TITLES).index(entry[0]))
    lines, before = [], None
    for recipe, name, found in listed:
        steps = [row["solved_at"] for row in found]
        seconds = [row["wall_seconds"] if row["solved_at"] else None for row in found]
        came = [spread(steps, 1), spread(seconds, 2)] if any(steps) else ["", ""]
        title = TITLES[recipe] if recipe != before else ""
        lines.append([title, figures.mark(name, found), f"{sum(x is not None for x in steps)}/{len(steps)}", *came])
        before = recipe
    return figures.table(SOLVED, lines, [row for _, _, found in listed for row in found])


@block("control")
def _control(figures: Figures) -> str:
    groups = control.grouped(figures.rows("control"))
    frames = [row for row in figures.rows("plug_in") if row["key"].get("side") == "naturecnn"]
    said = "SB3 DQN on two stacked frames (`catch_encoder.py`)"
    return solved(figures, groups, [("catch", said, frames)]) + beside(figures, groups)


@block("headline")
def _headline(figures: Figures) -> str:
    """Of each task our runs, and the strongest that learns no model."""
    groups = {t: rows for t, rows in control.grouped(figures.rows("control")).items() if rows[0]["key"]["task"] in TITLES}
    groups = {t: rows for t, rows in groups.items() if not rows[0]["key"]["overrides"] and not rows[0]["key"]["max_steps"]}
    lines, shown = [], []
    for key, ours, _, theirs in control.strongest(groups, figures.folder, figures.of):
        steps = [spread((row["solved_at"] for row in side), 1) for side in (ours, theirs)]
        said = agent(theirs[0]["key"], theirs) if "task" in theirs[0]["key"] else "SB3 DQN on two stacked frames"
        seeds = "" if len(theirs) == len(ours) else f" ({len(theirs)} seed{'s' if len(theirs) > 1 else ''})"
        verdict = "ranges overlap" if control.overlap(ours, theirs) else ""
        lines.append([figures.mark(TITLES[key["task"]], [*ours, *theirs]), steps[0], f"{steps[1]}: {said}{seeds}", verdict])
        shown += [*ours, *theirs]
    return figures.table(["task (threshold)", "real steps here", "the strongest without a model", ""], lines, shown)


@block("plug-in")
def _plug_in(figures: Figures) -> str:
    groups = control.grouped(row for row in figures.rows("plug_in") if "task" in row["key"])
    return solved(figures, groups) + beside(figures, groups)


def beside(figures: Figures, groups: Mapping[str, Sequence[dict[str, Any]]]) -> str:
    """The best without a world model of any result file, as a list; and what other files say of the same recipe."""
    plain = {text: found for text, found in groups.items() if not found[0]["key"]["overrides"]}
    lines = [f"- {line}" for line in control.comparisons(plain, figures.folder, figures.of)]
    more = elsewhere(figures) if any(found[0]["key"]["task"] == "cartpole" for found in groups.values()) else []
    return "\n".join(["", "Beside the best of any result file that learns no model:", "", *lines, *more, ""])


def elsewhere(figures: Figures) -> list[str]:
    """Real steps until other scripts' runs of recipe `cartpole` were solved: they are seeds too."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for name in ("open_loop", "forms", "overhead"):
        for row in figures.rows(name):
            key = row["key"]
            if "cartpole" in (key.get("task"), key.get("recipe")) and key.get("form", "gaussian") == "gaussian":
                if not key.get("overrides") and not key.get("options"):
                    groups.setdefault((name, key["seed"]), []).append(row)
    said = []
    for (name, seed), mine in sorted(groups.items()):
        steps = sorted({row.get("solved_at", row["real_steps"]) or float("inf") for row in mine})
        said.append(figures.mark(f"{' and '.join(number(x, 1) for x in steps)} (`{name}.jsonl`, seed {seed})", mine))
    return ["", f"Other scripts' runs of recipe `cartpole` were solved at {', '.join(said)}."] if said else []


@block("algorithms")
def _algorithms(figures: Figures) -> str:
    lines, shown = [], []
    for group in plug_in.judged((row for row in figures.rows("plug_in") if row["key"].get("row") == "algorithms"), figures.of):
        found = group["rows"]
        steps = "" if group["algorithm"] == "random" else number(group["imagined"], 1)
        name = figures.mark(group["algorithm"], found)
        lines.append([name, group["recipe"], steps, len(found), spread(row["real_return"] for row in found), group["said"]])
        shown += found
    return figures.table(["algorithm", "world", "imagined steps", "seeds", "real return", "so it"], lines, shown)


@block("gap")
def _gap(figures: Figures) -> str:
    found, lines = [row for row in figures.rows("plug_in") if row["key"].get("row") == "gap"], []
    for penalty in (f"{p:g}" for p in plug_in.PENALTIES):
        sides = [row["by_penalty"][penalty] for row in found]
        gap, real = spread(x["imagined"] - x["real"] for x in sides), spread(x["real"] for x in sides)
        lines.append([figures.mark(penalty, found), gap, real])
    return figures.table(["`agent.plan.uncertainty_penalty`", "imagined less real return", "real return"], lines, found)


@block("catch-encoder")
def _catch_encoder(figures: Figures) -> str:
    sides = {
        "encoder": "a world model's encoder, pretrained on the first 500 steps and fine-tuned",
        "naturecnn": "SB3's NatureCNN",
        "cells": "no picture: the true cells of ball and paddle",
    }
    found = [row for row in figures.rows("plug_in") if row["key"].get("row") == "catch-encoder"]
    lines = []
    for side, name in sides.items():
        mine = [row for row in found if row["key"]["side"] == side]
        steps = [row["solved_at"] for row in mine]
        lines.append([figures.mark(name, mine), f"{sum(x is not None for x in steps)}/{len(steps)}", spread(steps, 1)])
    return figures.table(["DQN on two frames sees", "solved", "real steps"], lines, found)


@block("rewards")
def _rewards(figures: Figures) -> str:
    found = [row for row in figures.rows("reward_scale") if not row["key"]["overrides"] and not row["key"]["max_steps"]]
    lines = []
    for size in sorted({row["key"]["size"] for row in found}):
        mine = [row for row in found if row["key"]["size"] == size]
        steps = [row["solved_at"] for row in mine]
        name = figures.mark(f"{size:g}", mine)
        lines.append([name, f"{sum(x is not None for x in steps)}/{len(steps)}", spread(steps, 1) if any(steps) else ""])
    return figures.table(["reward of a step of CartPole", "solved", "real steps"], lines, found)


# Dreams and speed -----------------------------------------------------------------------------------------------------


@block("dreams")
def _dreams(figures: Figures) -> str:
    found, lines = [row for row in figures.rows("open_loop") if not row["key"]["overrides"]], []
    order = list(open_loop.TASKS)
    found.sort(key=lambda row: (order.index(row["key"]["task"]), row["key"]["seed"]))
    for row in found:
        key, horizons = row["key"], [1]
        known = [h for h in row["horizons"] if row["ratio"][h - 1] is not None]
        horizons.append(max(h for h in known if h <= 15))
        for h in horizons:
            cells = [number(row[name][h - 1], 2) for name in ("observation", "persistence", "ratio")]
            lines.append([figures.mark(f"`{key['task']}`, seed {key['seed']}", [row]), number(row["real_steps"], 1), h, *cells])
    return figures.table(["run", "real steps", "horizon", "error", "persistence", "ratio"], lines, found)


@block("speed")
def _speed(figures: Figures) -> str:
    lines, shown = [], []

    def line(what: str, cell: str, rows: Sequence[Mapping[str, Any]]) -> None:
        if rows:
            lines.append([figures.mark(what, rows), cell])
            shown.extend(rows)

    for row in figures.rows("imagined"):
        key = row["key"]
        if key["worlds"] == 256 and key["observation"] == "latent":
            line(f"imagined world steps/s through SB3's interface, 256 worlds, {_threads(key)}", rounded(row["per_second"]), [row])
    for row in figures.rows("plug_in"):
        if row["key"].get("row") == "mppi":
            what = f"one MPPI action: 512 samples, 6 iterations, horizon 3, {number(row['parameters'] / 1e6, 2)} M parameters"
            line(f"{what}, {number(row['gflop'])} GFLOP, {_threads(row['key'])}", f"{spread(row['ms'])} ms", [row])
    rows = figures.rows("overhead")
    logged = [row for row in rows if "replay" not in row["key"]]
    line("TensorBoard, share of the demo's training", f"{spread(100 * row['share'] for row in logged)} %", logged)
    for replay in ("memory", "disk"):
        kept = [row for row in rows if row["key"].get("replay") == replay and not row["key"]["options"]]
        line(f"what is saved, replay in {replay}, share of it", f"{spread((100 * row['share'] for row in kept), 2)} %", kept)
    for row in figures.rows("sampling"):
        line(f"a batch of 16 x 64 from the replay ({row['key']['store']})", f"{number(row['median_ms'], 2)} ms", [row])
    return figures.table(["what", "figure"], lines, shown)


def rounded(x: float) -> str:
    """Three significant digits, thousands set apart."""
    return number(float(f"{x:.3g}"))


def _threads(key: Mapping[str, Any]) -> str:
    return f"{key['threads']} thread{'s' if key['threads'] > 1 else ''}"


@block("acting")
def _acting(figures: Figures) -> str:
    found, lines = figures.rows("acting"), []
    for form in dict.fromkeys(row["key"]["form"] for row in found):
        by = {row["key"]["tree"]: row for row in found if row["key"]["form"] == form}
        cells = [spread(by[tree]["ms"]) if tree in by else "" for tree in ("here", "against")]
        lines.append([figures.mark(form, by.values()), *cells])
    return figures.table(["prior", "here, ms", "0.1.0, ms"], lines, found)


@block("updates")
def _updates(figures: Figures) -> str:
    names = {"vector": "four numbers", "pixel": "64x64 pixels"}
    found = [row for row in figures.rows("throughput") if row["key"]["option"] == "fp32" and row.get("peer")]
    lines = []
    for row in sorted(found, key=lambda row: (list(names).index(row["key"]["obs"]), -row["key"]["threads"])):
        rounds = row["peer"]["rounds_ms"]
        theirs = statistics.median(x["median"] for x in rounds)
        ends = f"{number(theirs)} [{number(min(x['min'] for x in rounds))}..{number(max(x['max'] for x in rounds))}]"
        name = figures.mark(f"{names[row['key']['obs']]}, {_threads(row['key'])}", [row])
        lines.append([name, spread(row["ms"]), ends, f"{statistics.median(row['ms']) / theirs:.2f}"])
    return figures.table(["observations", "here, ms", "sheeprl, ms", "ratio"], lines, found)


# Forms of the prior ---------------------------------------------------------------------------------------------------


@block("form-costs")
def _form_costs(figures: Figures) -> str:
    found = [row for row in figures.rows("forms") if row["key"]["task"] == "cost"]
    order = [*forms.FORMS, *forms.EXTRA]
    lines = []
    for row in sorted(found, key=lambda row: order.index(row["key"]["form"])):
        update, draw, dream = (median(row[name]) for name in ("update_ms", "draw_ms", "dream_ms"))
        many = [rounded(1000 * n / ms) for n, ms in ((forms.WORLDS, draw), (forms.WORLDS * forms.HORIZON, dream))]
        lines.append([figures.mark(f"`{row['key']['form']}`", [row]), number(update), *many, number(row["parameters"], 1)])
    head = ["recipe", "update of the world model, ms", "codes/s", "dreamed steps/s", "parameters of the world model"]
    return figures.table(head, lines, found)


@block("form-runs")
def _form_runs(figures: Figures) -> str:
    found = [row for row in figures.rows("forms") if row["key"]["task"] == "cartpole" and not row["key"]["overrides"]]
    lines = []
    for row in sorted(found, key=lambda row: row["ratio"][14]):
        nats = "none" if row["rate"] is None else ("at most " if row["density"] == "bound" else "") + number(row["rate"])
        if row.get("marginal_rate") is not None:
            nats += f"; {number(row['marginal_rate'])} against the marginal"
        name = figures.mark(f"`{row['key']['form']}`", [row])
        cells = [number(row["real_steps"], 1), number(row["solved_at"], 1), number(row["ratio"][0], 2), number(row["ratio"][14], 2)]
        lines.append([name, *cells, nats, number(row["final_return"])])
    head = ["recipe", "real steps", "solved at", "ratio to persistence at 1 step", "at 15", "nats of a code given the past"]
    return figures.table([*head, "return at the end"], lines, found)


@block("form-pictures")
def _form_pictures(figures: Figures) -> str:
    found = [row for row in figures.rows("forms") if row["key"]["task"] == "images" and not row["key"]["overrides"]]
    lines = []
    for row in sorted(found, key=lambda row: row["ratio"][14]):
        cells = [number(row["updates"], 1), number(row["ratio"][0], 2), number(row["ratio"][14], 2)]
        lines.append([figures.mark(f"`{row['key']['form']}`", [row]), *cells])
    return figures.table(["recipe", "updates", "ratio to persistence at 1 step", "at 15"], lines, found)


@block("two-rooms")
def _two_rooms(figures: Figures) -> str:
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in figures.rows("two_rooms"):
        if not row["key"].get("overrides"):
            groups.setdefault(row["key"]["variant"], []).append(row)
    names = {"random": "random actions", "straight": "straight to the goal"}
    names["none"] = "none (nothing against collapse, no inverse model)"
    order, columns = ["random", "straight", "sigreg", "vicreg", "hybrid", "none"], "rank T linear near h1 h10 line way".split()
    lines = []
    for variant in sorted(groups, key=order.index):
        mine = groups[variant]
        cells = [spread((row[name] for row in mine if name in row), 2) for name in columns]
        success = spread((100 * row["success"] for row in mine), 2)
        actions = spread((row["actions"] for row in mine), 2)
        lines.append([figures.mark(names.get(variant, variant), mine), len(mine), success, actions, *cells])
    head = ["variant", "seeds", "success %", "actions", *columns]
    return figures.table(head, lines, [row for mine in groups.values() for row in mine])


PRIORS = {
    "gaussian": "N(0, I)",
    "gaussian_learned": "a learned Gaussian",
    "mixture": "mixture of 32",
    "vamp": "VampPrior, 100 pseudo-inputs",
    "hierarchical": "two levels",
    "energy": "energy over a Gaussian; ln Z by annealing",
    "diffusion": "diffusion; ODE with exact trace, 100 draws",
}


@block("digits")
def _digits(figures: Figures) -> str:
    found = [row for row in figures.rows("digits") if row["key"]["data"] == "digits" and row["key"]["form"] != "ppca"]
    lines, shown = [], []
    for more in ([], ["init=offset"]):
        keys = [row["key"] for row in found if row["key"]["overrides"] == more]
        for latents, group in digits.grouped(found, keys).items():
            for form, cells in digits.summary(group).items():
                mine = list(group[form].values())
                gain = f"{cells['gain']:+.2f} ± {cells['gain_se']:.2f}" if "gain" in cells else ""
                name = figures.mark(PRIORS.get(form, form), mine)
                lines.append([latents, "`init=offset`" if more else "torch's", name, len(mine), f"{cells['nats']:.2f}", gain])
                shown += mine
    head = ["numbers in a code", "first weights", "prior", "seeds", "nats", "over N(0, I), paired"]
    return figures.table(head, lines, shown)


@block("validity-betas")
def _validity_betas(figures: Figures) -> str:
    found, lines = [row for row in figures.rows("validity") if row["key"]["data"] == "pendulum" and not row["key"]["overrides"]], []
    for beta in sorted({row["key"]["beta"] for row in found}):
        mine = [row for row in found if row["key"]["beta"] == beta]
        cells = [spread((row["error"] for row in mine), 2)]
        cells += [spread((row[name]["valid"] for row in mine), 2) for name in ("codes", "N(0, I)")]
        cells += [spread((row["midpoint, line"] for row in mine), 2), spread((row["active"] for row in mine), 1)]
        name = {0.0: "0: an autoencoder", 1.0: "1: a VAE"}.get(beta, f"{beta:g}")
        lines.append([figures.mark(name, mine), len(mine), *cells])
    head = ["beta", "seeds", "error of reconstruction", "codes of real observations", "N(0, I)", "midpoint of two codes"]
    return figures.table([*head, "numbers in use"], lines, found)


@block("validity-forms")
def _validity_forms(figures: Figures) -> str:
    found = [row for row in figures.rows("validity") if row["key"]["data"] == "pendulum" and not row["key"]["overrides"]]
    found, lines = [row for row in found if row["key"]["beta"] == 1], []
    said = {"gaussian": "a learned Gaussian", "mixture": "mixture of 8", "vamp": "VampPrior", "energy": "energy over a Gaussian"}
    said["codes"] = "decoded codes of real observations"
    for form in ("N(0, I)", *validity.FORMS, "codes"):
        mine = [row for row in found if form in row]
        land = spread((row[form]["valid"] for row in mine), 2)
        slope = spread((row[form]["slope"] for row in mine if "slope" in row[form]), 2)
        lines.append([figures.mark(said.get(form, form), mine), len(mine), land, slope or "1"])
    return figures.table(["prior", "seeds", "draws that land", "slope of the decoder at draws, against codes"], lines, found)


@block("pictures")
def _pictures(figures: Figures) -> str:
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in figures.rows("fidelity"):
        groups.setdefault((row["device_name"], row["key"]["updates"], row["key"]["sampler"]), []).append(row)
    lines = []
    for (device, updates, sampler), mine in groups.items():
        for kind in ("vae", "diffusion@3", "diffusion@5"):
            pictures = [row["pictures"][kind] for row in mine]
            probe = spread(row["pictures"][kind]["probe_error"] / row["pictures"]["vae"]["probe_error"] for row in mine)
            cells = [spread(x[name] for x in pictures) for name in ("frechet", "sharpness", "frames_per_second")]
            name = f"{kind}, {sampler}" if "diffusion" in kind else kind
            lines.append(
                [figures.mark(name, mine), f"{device}, {number(updates, 1)} updates", len(mine), cells[0], probe, *cells[1:]]
            )
    head = ["pictures", "where", "seeds", "Frechet distance", "probe error, of the VAE's", "mean gradient, of real", "frames/s"]
    return figures.table(head, lines, [row for mine in groups.values() for row in mine])


# Files ----------------------------------------------------------------------------------------------------------------


def written(of: str, results: Path = HERE / "results", root: Path = ROOT) -> dict[Path, tuple[str, str]]:
    """{file: (its text, what it should be)}, its figures marked as seen from the code with hash `of`."""
    figures = Figures(results, of)
    made = {name: write(figures) for name, write in BLOCKS.items()}
    made["made"] = (
        f"Figures without {STALE} are of code `{of}`; {STALE} marks those of earlier code, which may differ.\n"
        if figures.fresh
        else f"All figures are of earlier code than this ({STALE}), and may differ.\n"
    )
    out = {}
    for file in (root / name for name in FILES):
        text = file.read_text(encoding="utf-8")
        if unknown := [found[2] for found in BLOCK.finditer(text) if found[2] not in made]:
            raise SystemExit(f"{file}: no figures are called {', '.join(unknown)}; there are {', '.join(made)}")
        out[file] = text, BLOCK.sub(lambda found: found[1] + made[found[2]] + found[4], text)
    return out


def declared(root: Path = ROOT) -> str:
    """The hash of the code that README says its unmarked figures are of."""
    found = MADE.search((root / "README.md").read_text(encoding="utf-8"))
    return found[1] if found else NONE


def differing(of: str, results: Path = HERE / "results", root: Path = ROOT) -> list[str]:
    """A sentence for each block that says something else than the rows do, as seen from the code with hash `of`."""
    out = []
    for file, (text, should) in written(of, results, root).items():
        for now, then in zip(BLOCK.finditer(text), BLOCK.finditer(should), strict=True):
            if now[3] != then[3]:
                lines = zip(now[3].splitlines() + [""] * 99, then[3].splitlines())
                first = next((f"{old!r} where the rows say {new!r}" for old, new in lines if old != new), "lines too many")
                out.append(f"{file.relative_to(root)}, {now[2]}: {first}")
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results", metavar="DIR", help="folder of the result files")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where a file differs from the rows")
    args = parser.parse_args()
    if args.check:
        found = differing(code(), args.results)
        for line in found:
            say(line)
        say("Figures are what the rows say." if not found else "Measure what is stale again, or `make figures` marks it.")
        return 1 if found else 0
    for file, (text, should) in written(code(), args.results).items():
        if text != should:
            file.write_text(should, encoding="utf-8")
            say(f"written: {file.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
