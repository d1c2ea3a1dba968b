"""The tables of figures in README.md and docs, written from the rows in results.

    python benchmarks/readme.py             # writes what stands between <!-- figures: NAME --> and <!-- /figures -->
    python benchmarks/readme.py --check     # exit code 1 where a file says something else than the rows do

README names the hash of the code that its unmarked figures are of; a dagger marks those of any other. `--check` fails where figures
differ from the rows, and where one without a dagger is of other code than this tree's.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import compared  # noqa: F401
import control
import digits
import forms
import learned  # noqa: F401
import plug_in
import throughput
import truth
import validity
from figures import BLOCKS, Figures, block
from rows import HERE, STALE, Key, Row, code, grouped, options, say
from tables import blocks, filled, median, number, spread
from tables import solved as count_solved

ROOT = HERE.parent
FILES = (
    "README.md",
    "docs/results.md",
    "docs/forms.md",
    "docs/dynamics.md",
    "docs/jepa.md",
    "docs/one-role.md",
    "docs/choose.md",
    "docs/learning.md",
    "docs/scoreboard.md",
    "docs/environments.md",
)
BLOCK = blocks("figures")
MADE = re.compile(r"without † are of code `([0-9a-f]{16})`")
NONE = "none"
"""Instead of a hash: no row is of that code."""


# Control --------------------------------------------------------------------------------------------------------------

TITLES = {
    "cartpole": "CartPole-v1 (475)",
    "pendulum": "Pendulum-v1 (-200)",
    "acrobot": "Acrobot-v1 (-100)",
    "catch": "Catch, 64x64 pixels (0.9)",
}
OURS = {
    "cartpole": "`cartpole`: Dreamer",
    "vae": "`cartpole model=vae`: plain VAE encoder",
    "acrobot": "`acrobot`: explored by random actions that last",
    "ppo-cartpole": "unmodified SB3 PPO, in turns with the world model (`agent=sb3`)",
    "sac-pendulum": "unmodified SB3 SAC, in turns with the world model (`agent=sb3`)",
    "planner-cartpole": "`agent=planner`: MPPI",
    "planner-pendulum": "`agent=planner`: MPPI",
    "dyna-pendulum": "SB3 SAC with `DynaCallback`, 10 updates per step, evaluated every 100",
}


def agent(rows: Sequence[Row]) -> str:
    """The name of the agent of some runs; where they solved nothing, with its final return."""
    key = rows[0]["key"]
    name = key["algorithm"]
    if name == control.task_of(key).ours:
        return OURS.get(key["task"], f"`{key['task']}`")
    kind, _, rate = name.partition(", ")
    text = "random play" if kind == "random" else "SB3 " + kind.replace("dqn on 2 frames", "dqn on two stacked frames")
    text = re.sub(r"\b(dqn|ppo|sac)\b", lambda found: found[0].upper(), text) + (f", {rate.replace('/', ' per ')}" if rate else "")
    if key["task"] == "dyna-pendulum":
        text += ", evaluated every 100 steps"
    if not any(row["solved_at"] for row in rows):
        text += f": mean return {spread((row['final_return'] for row in rows), 2)}"
    return text


def plain(key: Key) -> bool:
    """Whether a run had no options of its own and no limit of steps."""
    return not key["overrides"] and not key["max_steps"]


def solved(figures: Figures, groups: Sequence[Sequence[Row]], more: Sequence[tuple[str, str, list[Row]]] = ()) -> str:
    """A line for each group of runs: medians over seeds, [min..max]. more: (recipe, name, rows)."""
    named = [(control.task_of(found[0]["key"]).recipe, agent(found), found) for found in groups if plain(found[0]["key"])]
    named = [entry for entry in [*named, *more] if entry[2] and entry[0] in TITLES]
    named.sort(key=lambda entry: list(TITLES).index(entry[0]))
    lines, before = [], None
    for recipe, name, found in named:
        steps = [row["solved_at"] for row in found]
        seconds = [row["wall_seconds"] if row["solved_at"] else None for row in found]
        reached = [spread(steps, 1), spread(seconds, 2)] if any(steps) else ["", ""]
        lines.append([TITLES[recipe] if recipe != before else "", figures.mark(name, found), count_solved(found), *reached])
        before = recipe
    head = ["task (threshold)", "agent", "solved", "real steps", "seconds of training"]
    return figures.table(head, lines, [row for _, _, found in named for row in found])


@block("control")
def _control(figures: Figures) -> str:
    groups = control.grouped(figures.rows("control"))
    name = "SB3 DQN on two stacked frames (`catch_encoder.py`)"
    return solved(figures, groups, [("catch", name, figures.rows("plug_in", side="naturecnn"))]) + beside(figures, groups)


@block("headline")
def _headline(figures: Figures) -> str:
    """Our runs of each task, and the best of those that learn no model."""
    groups = [found for found in control.grouped(figures.rows("control")) if found[0]["key"]["task"] in TITLES]
    lines, used = [], []
    for key, ours, _, theirs in control.strongest(
        [found for found in groups if plain(found[0]["key"])], figures.folder, figures.of
    ):
        steps = [spread((row["solved_at"] for row in side), 1) for side in (ours, theirs)]
        name = agent(theirs) if "task" in theirs[0]["key"] else "SB3 DQN on two stacked frames"
        seeds = "" if len(theirs) == len(ours) else f" ({len(theirs)} seed{'s' if len(theirs) > 1 else ''})"
        verdict = "ranges overlap" if control.overlap(ours, theirs) else ""
        lines.append([figures.mark(TITLES[key["task"]], [*ours, *theirs]), steps[0], f"{steps[1]}: {name}{seeds}", verdict])
        used += [*ours, *theirs]
    return figures.table(["task (threshold)", "real steps here", "the strongest without a model", ""], lines, used)


@block("plug-in")
def _plug_in(figures: Figures) -> str:
    groups = control.grouped(row for row in figures.rows("plug_in") if "task" in row["key"])
    return solved(figures, groups) + beside(figures, groups)


def beside(figures: Figures, groups: Sequence[Sequence[Row]]) -> str:
    """The best without a world model of any result file, as a list; and other files' runs of the same recipe."""
    without_options = [found for found in groups if not found[0]["key"]["overrides"]]
    lines = [f"- {line}" for line in control.comparisons(without_options, figures.folder, figures.of)]
    more = elsewhere(figures) if any(found[0]["key"]["task"] == "cartpole" for found in groups) else []
    return "\n".join(["", "Beside the best of any result file that learns no model:", "", *lines, *more, ""])


def elsewhere(figures: Figures) -> list[str]:
    """Real steps until other scripts' runs of recipe `cartpole` were solved: they are seeds too."""
    texts = []
    for name in ("forms", "open_loop", "overhead"):
        found = []
        for row in figures.rows(name):
            key = row["key"]
            if "cartpole" in (key.get("task"), key.get("recipe")) and key.get("form", "gaussian") == "gaussian":
                found += [] if key.get("overrides") or key.get("options") else [row]
        for seed, mine in sorted(grouped(found, lambda row: row["key"]["seed"]).items()):
            steps = sorted({row.get("solved_at", row["real_steps"]) or float("inf") for row in mine})
            texts.append(figures.mark(f"{' and '.join(number(x, 1) for x in steps)} (`{name}.jsonl`, seed {seed})", mine))
    return ["", f"Other scripts' runs of recipe `cartpole` were solved at {', '.join(texts)}."] if texts else []


@block("algorithms")
def _algorithms(figures: Figures) -> str:
    lines, used = [], []
    for group in plug_in.judged(figures.rows("plug_in", row="algorithms"), figures.of):
        found = group["rows"]
        steps = "" if group["algorithm"] == "random" else number(group["imagined"], 1)
        name = figures.mark(group["algorithm"], found)
        lines.append([name, group["recipe"], steps, len(found), spread(row["real_return"] for row in found), group["said"]])
        used += found
    return figures.table(["algorithm", "world", "imagined steps", "seeds", "real return", "so it"], lines, used)


@block("gap")
def _gap(figures: Figures) -> str:
    found, lines = figures.rows("plug_in", row="gap"), []
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
    named = [(name, figures.rows("plug_in", row="catch-encoder", side=side)) for side, name in sides.items()]
    cells = lambda rows: [count_solved(rows), spread((row["solved_at"] for row in rows), 1)]  # noqa: E731
    return figures.lines(["DQN on two frames sees", "solved", "real steps"], named, cells)


@block("rewards")
def _rewards(figures: Figures) -> str:
    def cells(rows: Sequence[Row]) -> list[str]:
        steps = [row["solved_at"] for row in rows]
        return [count_solved(rows), spread(steps, 1) if any(steps) else ""]

    found = sorted((row for row in figures.rows("reward_scale") if plain(row["key"])), key=lambda row: row["key"]["size"])
    groups = grouped(found, lambda row: f"{row['key']['size']:g}")
    return figures.lines(["reward of a step of CartPole", "solved", "real steps"], groups.items(), cells)


# Dreams and speed -----------------------------------------------------------------------------------------------------


@block("truth")
def _truth(figures: Figures) -> str:
    """The default form's errors over the best MLP ensemble's, by environment."""
    return _truth_lines(figures, "environment", [(env, "anchored", env) for env in truth.TASKS])


@block("truth-forms")
def _truth_forms(figures: Figures) -> str:
    """The same of each form, as medians over environments."""
    return _truth_lines(figures, "form", [(f"`model={model}`", model, None) for model in truth.MODELS])


def _truth_lines(figures: Figures, what: str, wanted: Sequence[tuple[str, str, str | None]]) -> str:
    """A line for each (name, model, environment; None: medians over all of them)."""
    found = figures.rows("truth", overrides=[])
    over, lines, used = truth.over_best(found), [], []
    shown = [(held_out, at) for held_out in ("own", "stranger") for at in range(3)]
    for name, model, env in wanted:
        rows = [row for row in found if row["key"]["model"] == model and env in (None, row["key"]["env"])]
        by_env = [over[task, model] for task in truth.TASKS if (task, model) in over and env in (None, task)]
        if not rows:
            continue
        columns = [[[ratios[at] for ratios in one[held_out]] for one in by_env] for held_out, at in shown]
        if env:
            cells = [spread((x for x in column[0] if x is not None), 2) or "-" for column in columns]
        else:
            medians = [[x for x in map(truth.median_known, column) if x is not None] for column in columns]
            cells = [f"{number(median(m), 2)}, worst {number(max(m), 2)}" if m else "-" for m in medians]
        lines.append([figures.mark(name, rows), len({row["key"]["seed"] for row in rows}) if env else len(by_env), *cells])
        used += rows
    head = [f"{held_out}, {truth.HORIZONS[at]}" for held_out, at in shown]
    return figures.table([what, "seeds" if what == "environment" else "environments", *head], lines, used)


@block("speed")
def _speed(figures: Figures) -> str:
    lines, used = [], []

    def line(what: str, cell: str, rows: Sequence[Row]) -> None:
        if rows:
            lines.append([figures.mark(what, rows), cell])
            used.extend(rows)

    for row in figures.rows("imagined", worlds=256, observation="latent"):
        what = f"imagined world steps/s through SB3's interface, 256 worlds, {_threads(row['key'])}"
        line(what, rounded(row["per_second"]), [row])
    for row in figures.rows("plug_in", row="mppi"):
        what = f"one MPPI action: 512 samples, 6 iterations, horizon 3, {number(row['parameters'] / 1e6, 2)} M parameters"
        line(f"{what}, {number(row['gflop'])} GFLOP, {_threads(row['key'])}", f"{spread(row['ms'])} ms", [row])
    logged = figures.rows("overhead", replay=None)
    line("TensorBoard, share of the demo's training", f"{spread(100 * row['share'] for row in logged)} %", logged)
    for replay in ("memory", "disk"):
        saved = figures.rows("overhead", replay=replay, options=[])
        line(f"what is saved, replay in {replay}, share of it", f"{spread((100 * row['share'] for row in saved), 2)} %", saved)
    for row in figures.rows("sampling"):
        line(f"a batch of 16 x 64 from the replay ({row['key']['store']})", f"{number(row['median_ms'], 2)} ms", [row])
    return figures.table(["what", "figure"], lines, used)


def rounded(x: float) -> str:
    """Three significant digits, thousands set apart."""
    return number(float(f"{x:.3g}"))


def _threads(key: Key) -> str:
    return f"{key['threads']} thread{'s' if key['threads'] > 1 else ''}"


@block("acting")
def _acting(figures: Figures) -> str:
    def cells(rows: Sequence[Row]) -> list[str]:
        by = {row["key"]["tree"]: spread(row["ms"]) for row in rows}
        return [by.get(tree, "") for tree in ("here", "against")]

    groups = grouped(figures.rows("acting"), lambda row: row["key"]["form"])
    return figures.lines(["prior", "here, ms", "0.1.0, ms"], groups.items(), cells)


@block("updates")
def _updates(figures: Figures) -> str:
    def cells(rows: Sequence[Row]) -> list[str]:
        ours, (theirs, text) = rows[0]["ms"], throughput.peer_ms(rows[0])
        return [spread(ours), text, f"{median(ours) / theirs:.2f}"]

    names = {"vector": "four numbers", "pixel": "64x64 pixels"}
    found = [row for row in figures.rows("throughput", option="fp32") if row.get("peer")]
    found.sort(key=lambda row: (list(names).index(row["key"]["obs"]), -row["key"]["threads"]))
    named = [(f"{names[row['key']['obs']]}, {_threads(row['key'])}", [row]) for row in found]
    return figures.lines(["observations", "here, ms", "sheeprl, ms", "ratio"], named, cells)


# Forms of the prior ---------------------------------------------------------------------------------------------------


def by_form(rows: Iterable[Row]) -> list[tuple[str, list[Row]]]:
    return [(f"`{row['key']['form']}`", [row]) for row in rows]


@block("form-costs")
def _form_costs(figures: Figures) -> str:
    def cells(rows: Sequence[Row]) -> list[str]:
        update, draw, dream = (median(rows[0][name]) for name in ("update_ms", "draw_ms", "dream_ms"))
        rates = [rounded(1000 * n / ms) for n, ms in ((forms.WORLDS, draw), (forms.WORLDS * forms.HORIZON, dream))]
        return [number(update), *rates, number(rows[0]["parameters"], 1)]

    order = [*forms.FORMS, *forms.EXTRA]
    found = sorted(figures.rows("forms", task="cost"), key=lambda row: order.index(row["key"]["form"]))
    head = ["recipe", "update of the world model, ms", "latents/s", "dreamed steps/s", "parameters of the world model"]
    return figures.lines(head, by_form(found), cells)


def ratios(row: Row) -> list[str]:
    """The ratios to persistence at 1 step and at 15."""
    return [number(row["ratio"][step], 2) for step in (0, 14)]


@block("form-runs")
def _form_runs(figures: Figures) -> str:
    def cells(rows: Sequence[Row]) -> list[str]:
        row = rows[0]
        nats = "none" if row["rate"] is None else ("at most " if row["density"] == "bound" else "") + number(row["rate"])
        if row.get("marginal_rate") is not None:
            nats += f"; {number(row['marginal_rate'])} against the marginal"
        return [number(row["real_steps"], 1), number(row["solved_at"], 1), *ratios(row), nats, number(row["final_return"])]

    found = sorted(figures.rows("forms", task="cartpole", overrides=[]), key=lambda row: row["ratio"][14])
    head = ["recipe", "real steps", "solved at", "ratio to persistence at 1 step", "at 15", "nats of a latent given the past"]
    return figures.lines([*head, "return at the end"], by_form(found), cells)


@block("form-pictures")
def _form_pictures(figures: Figures) -> str:
    found = sorted(figures.rows("forms", task="images", overrides=[]), key=lambda row: row["ratio"][14])
    cells = lambda rows: [number(rows[0]["updates"], 1), *ratios(rows[0])]  # noqa: E731
    return figures.lines(["recipe", "updates", "ratio to persistence at 1 step", "at 15"], by_form(found), cells)


@block("two-rooms")
def _two_rooms(figures: Figures) -> str:
    def cells(rows: Sequence[Row]) -> list[object]:
        success, actions = spread((100 * row["success"] for row in rows), 2), spread((row["actions"] for row in rows), 2)
        return [len(rows), success, actions, *(spread((row[name] for row in rows if name in row), 2) for name in columns)]

    names = {"random": "random actions", "straight": "straight to the goal", "sigreg": "sigreg", "vicreg": "vicreg"}
    names |= {"hybrid": "hybrid", "none": "none (nothing against collapse, no inverse model)"}
    columns = "rank T linear near h1 h10 line way".split()
    plain_rows = (row for row in figures.rows("two_rooms") if not row["key"].get("overrides"))
    groups = grouped(plain_rows, lambda row: row["key"]["variant"])
    named = [(name, groups[variant]) for variant, name in names.items() if variant in groups]
    return figures.lines(["variant", "seeds", "success %", "actions", *columns], named, cells)


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
    lines, used = [], []
    for overrides, name in (([], "torch's"), (["init=offset"], "`init=offset`")):
        found = figures.rows("digits", data="digits", overrides=overrides)
        keys = [row["key"] for row in found if row["key"]["form"] != "ppca"]
        for latents, group in digits.grouped(found, keys).items():
            for form, cells in digits.summary(group).items():
                mine = list(group[form].values())
                gain = f"{cells['gain']:+.2f} ± {cells['gain_se']:.2f}" if "gain" in cells else ""
                prior = figures.mark(PRIORS.get(form, form), mine)
                lines.append([latents, name, prior, len(mine), f"{cells['nats']:.2f}", gain])
                used += mine
    return figures.table(["numbers in a latent", "first weights", "prior", "seeds", "nats", "over N(0, I), paired"], lines, used)


@block("validity-betas")
def _validity_betas(figures: Figures) -> str:
    def cells(rows: Sequence[Row]) -> list[object]:
        valid = [spread((row[name]["valid"] for row in rows), 2) for name in ("codes", "N(0, I)")]
        middle, active = spread((row["midpoint, line"] for row in rows), 2), spread((row["active"] for row in rows), 1)
        return [len(rows), spread((row["error"] for row in rows), 2), *valid, middle, active]

    found = sorted(figures.rows("validity", data="pendulum", overrides=[]), key=lambda row: row["key"]["beta"])
    names = {0.0: "0: an autoencoder", 1.0: "1: a VAE"}
    groups = grouped(found, lambda row: names.get(row["key"]["beta"], f"{row['key']['beta']:g}"))
    head = ["beta", "seeds", "error of reconstruction", "latents of real observations", "N(0, I)", "midpoint of two latents"]
    return figures.lines([*head, "numbers in use"], groups.items(), cells)


@block("validity-forms")
def _validity_forms(figures: Figures) -> str:
    found, lines = figures.rows("validity", data="pendulum", overrides=[], beta=1), []
    names = {"gaussian": "a learned Gaussian", "mixture": "mixture of 8", "vamp": "VampPrior", "energy": "energy over a Gaussian"}
    names["codes"] = "decoded latents of real observations"
    for form in ("N(0, I)", *validity.FORMS, "codes"):
        mine = [row for row in found if form in row]
        valid = spread((row[form]["valid"] for row in mine), 2)
        slope = spread((row[form]["slope"] for row in mine if "slope" in row[form]), 2)
        lines.append([figures.mark(names.get(form, form), mine), len(mine), valid, slope or "1"])
    return figures.table(["prior", "seeds", "draws that land", "slope of the decoder at draws, against latents"], lines, found)


@block("pictures")
def _pictures(figures: Figures) -> str:
    found, lines = figures.rows("fidelity"), []
    groups = grouped(found, lambda row: (row["device_name"], row["key"]["updates"], row["key"]["sampler"]))
    for (device, updates, sampler), mine in groups.items():
        for kind in ("vae", "diffusion@3", "diffusion@5"):
            probe = spread(row["pictures"][kind]["probe_error"] / row["pictures"]["vae"]["probe_error"] for row in mine)
            cells = [spread(row["pictures"][kind][name] for row in mine) for name in ("frechet", "sharpness", "frames_per_second")]
            name = figures.mark(f"{kind}, {sampler}" if "diffusion" in kind else kind, mine)
            lines.append([name, f"{device}, {number(updates, 1)} updates", len(mine), cells[0], probe, *cells[1:]])
    head = ["pictures", "where", "seeds", "Frechet distance", "probe error, of the VAE's", "mean gradient, of real", "frames/s"]
    return figures.table(head, lines, found)


# Files ----------------------------------------------------------------------------------------------------------------


def written(of: str, results: Path = HERE / "results", root: Path = ROOT) -> dict[Path, tuple[str, str]]:
    """{file: (its text, what it should be)}; figures of other code than that of hash `of` are marked."""
    figures = Figures(results, of)
    made = {name: write(figures) for name, write in BLOCKS.items()}
    made["made"] = (
        f"Figures without {STALE} are of code `{of}`; {STALE} marks those of other code, which may differ.\n"
        if figures.fresh
        else f"All figures are of other code than this ({STALE}), and may differ.\n"
    )
    texts = {root / name: (root / name).read_text(encoding="utf-8") for name in FILES}
    return {file: (text, filled(text, "figures", made)) for file, text in texts.items()}


def declared(root: Path = ROOT) -> str:
    """The hash of the code that README's unmarked figures are of."""
    found = MADE.search((root / "README.md").read_text(encoding="utf-8"))
    return found[1] if found else NONE


def differing(of: str, results: Path = HERE / "results", root: Path = ROOT) -> list[str]:
    """A sentence for each block that differs from what the rows say for the code with hash `of`."""
    out = []
    for file, (text, should) in written(of, results, root).items():
        for now, then in zip(BLOCK.finditer(text), BLOCK.finditer(should), strict=True):
            if now[3] != then[3]:
                lines = zip(now[3].splitlines() + [""] * 99, then[3].splitlines())
                first = next((f"{old!r} where the rows say {new!r}" for old, new in lines if old != new), "lines too many")
                out.append(f"{file.relative_to(root)}, {now[2]}: {first}")
    return out


def main() -> int:
    parser = options(__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where a file differs from the rows")
    args = parser.parse_args()
    if args.check:
        found = differing(code(), args.results)
        say("\n".join(found) or "Figures are what the rows say.")
        if found:
            say("Measure what is stale again, or `make figures` marks it.")
        return len(found)
    for file, (text, should) in written(code(), args.results).items():
        if text != should:
            file.write_text(should, encoding="utf-8")
            say(f"written: {file.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(min(main(), 1))
