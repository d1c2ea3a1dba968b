"""Milliseconds of one acting step: `predict` of one environment, by the form of the prior, in this checkout and in another.

    python benchmarks/acting.py
    python benchmarks/acting.py --against DIR
    python benchmarks/acting.py --print

The model is that of recipe cartpole with Gaussian codes, untrained, whose transition and initial law are of the form; the agent is
Dreamer. DIR is another checkout with its own .venv: both are measured in turn, one sample each, in processes of their own.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rows import QUIET, Rows, command, marked, number, options, spread, table, timed

FORMS = ("gaussian", "mixture", "vamp", "flow", "hierarchical", "energy", "diffusion")


def work(job: dict[str, Any]) -> dict[str, Any]:
    """One timed sample of steps that follow one another."""
    import numpy as np
    import torch

    from worldmodel.agents import Dreamer

    torch.set_num_threads(1)
    law = {} if job["form"] == "gaussian" else {f"model.{slot}.kind": job["form"] for slot in ("transition", "initial")}
    agent = Dreamer("MlpPolicy", "CartPole-v1", config={"model": "gaussian", **law}, seed=0, device="cpu")
    seen, goes_on = np.zeros(4, np.float32), np.zeros(1, bool)
    memory = [agent.predict(seen)[1]]

    def step() -> None:
        memory[0] = agent.predict(seen, memory[0], goes_on)[1]

    return timed(step, samples=1, least=1.0, most=job["most"], warmup=30)


def compared(form: str, trees: Sequence[tuple[str, Path]], samples: int, most: float) -> dict[str, list[dict[str, Any]]]:
    """{python: samples}, the trees in turn; each process runs in an empty folder, where no checkout is found by chance."""
    taken: dict[str, list[dict[str, Any]]] = {name: [] for name, _ in trees}
    job = json.dumps({"form": form, "most": most})
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(samples):
            for name, python in trees:
                words = ["env", "-C", folder, str(python), str(Path(__file__).resolve()), "--worker", job]
                taken[name].append(command(words, 1, 120 + most))
    return taken


def main() -> int:
    parser = options(__doc__)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=["gaussian", "flow", "diffusion"])
    parser.add_argument("--against", type=Path, metavar="DIR", help="another checkout, measured in turn")
    parser.add_argument("--samples", type=int, default=5, help="of each row, each of a second")
    parser.add_argument("--most", type=float, default=10, help="seconds to wait for an undisturbed sample")
    parser.add_argument("--print", action="store_true", help="only the table")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(work(json.loads(args.worker))))
        return 0
    trees = [("here", Path(sys.executable))]
    if args.against is not None:
        python = args.against.resolve() / ".venv/bin/python"
        if not python.exists():
            parser.error(f"{python} does not exist; DIR must be a checkout with its own .venv.")
        trees.insert(0, ("against", python))
    rows = Rows("acting", args.results, args.again)
    for form in [] if args.print else args.forms:
        keys = {name: {"form": form, "tree": name} for name, _ in trees}
        if all([rows.has(key) for key in keys.values()]):
            continue
        for name, taken in compared(form, trees, args.samples, args.most).items():
            loads = [sample["foreign"] for sample in taken if sample["foreign"] is not None]
            foreign = max(loads, default=None)
            measured = {"ms": [sample["ms"][0] for sample in taken], "foreign": foreign, "quiet": (foreign or 0.0) <= QUIET}
            rows.add(keys[name], measured, threads=1)
    lines = [[marked(row["key"]["form"], [row]), row["key"]["tree"], spread(row["ms"]), number(row["foreign"], 1)] for row in rows]
    print(table(["form", "checkout", "ms a step", "foreign"], lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
