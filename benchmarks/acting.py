"""Milliseconds of one acting step: `predict` of one environment, by the form of the prior, in this checkout and in another.

    python benchmarks/acting.py
    python benchmarks/acting.py --against DIR
    python benchmarks/acting.py --print

The model is that of recipe cartpole with Gaussian latents, untrained, with transition and initial distribution of the form; the
agent is Dreamer. DIR is another checkout with its own .venv: both are measured in turn, one sample each, in processes of their own.
"""

from __future__ import annotations

import json
import sys
import tempfile
from functools import cache
from pathlib import Path

from rows import QUIET, Key, Row, Rows, command, marked, options, script, table, timed
from tables import number, spread

FORMS = ("gaussian", "mixture", "vamp", "flow", "hierarchical", "energy", "diffusion")


def work(job: Row) -> Row:
    """One timed sample of successive steps."""
    import numpy as np

    from worldmodel.agents import Dreamer

    prior = {} if job["form"] == "gaussian" else {f"model.{slot}.kind": job["form"] for slot in ("transition", "initial")}
    agent = Dreamer("MlpPolicy", "CartPole-v1", config={"model": "gaussian", **prior}, seed=0, device="cpu")
    obs, going_on = np.zeros(4, np.float32), np.zeros(1, bool)
    state = agent.predict(obs)[1]

    def step() -> None:
        nonlocal state
        state = agent.predict(obs, state, going_on)[1]

    return timed(step, samples=1, min_seconds=1.0, max_seconds=job["most"], warmup=30)


def in_turn(form: str, trees: dict[str, Path], samples: int, max_seconds: float) -> dict[str, Row]:
    """{tree: figures}, the trees in turn; each process runs in an empty folder, where no checkout is found by chance."""
    taken: dict[str, list[Row]] = {name: [] for name in trees}
    job = json.dumps({"form": form, "most": max_seconds})
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(samples):
            for name, python in trees.items():
                line = ["env", "-C", folder, str(python), str(Path(__file__).resolve()), "--worker", job]
                taken[name].append(command(line, 1, 120 + max_seconds))
    found = {}
    for name, rows in taken.items():
        foreign = max((row["foreign"] for row in rows if row["foreign"] is not None), default=None)
        found[name] = {"ms": [row["ms"][0] for row in rows], "foreign": foreign, "quiet": (foreign or 0.0) <= QUIET}
    return found


def main() -> int:
    parser = options(__doc__)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=["gaussian", "flow", "diffusion"])
    parser.add_argument("--against", type=Path, metavar="DIR", help="another checkout, measured in turn")
    parser.add_argument("--samples", type=int, default=5, help="of each row, each of a second")
    parser.add_argument("--most", type=float, default=10, help="seconds to wait for an undisturbed sample")
    args = parser.parse_args()
    trees = {"here": Path(sys.executable)}
    if args.against is not None:
        python = args.against.resolve() / ".venv/bin/python"
        if not python.exists():
            parser.error(f"{python} does not exist; DIR must be a checkout with its own .venv.")
        trees = {"against": python, **trees}
    rows = Rows("acting", args.results, args.again)
    figures = cache(lambda form: in_turn(form, trees, args.samples, args.most))

    def run(key: Key) -> Row:
        return figures(key["form"])[key["tree"]]

    keys = [{"form": form, "tree": name} for form in args.forms for name in trees]
    failed = 0 if args.print else rows.measure(keys, run)
    lines = [[marked(row["key"]["form"], [row]), row["key"]["tree"], spread(row["ms"]), number(row["foreign"], 1)] for row in rows]
    print(table(["form", "checkout", "ms a step", "foreign"], lines))
    return failed


if __name__ == "__main__":
    script(main, work)
