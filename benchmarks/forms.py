"""One role, many forms: every recipe of configs/model in the same worlds, what each carries and what each costs.

    python benchmarks/forms.py                                        # every recipe on CartPole and on 64x64 images
    python benchmarks/forms.py --tasks cartpole --forms vamp,flow --seeds 0 1
    python benchmarks/forms.py --tasks cost                           # milliseconds and samples a second, against gaussian
    python benchmarks/forms.py --tasks images --device cuda --jobs 8
    python benchmarks/forms.py --print

cartpole  recipe `cartpole` with model=FORM: a Dreamer in its dream, under the protocol of control.py (20 greedy episodes every
          250 real steps, confirmed by 20 others), which goes on to 2,500 real steps so that all models have seen as much; then
          open loop on fresh episodes as `worldmodel dream` measures it
images    recipe `two_rooms` (64x64 pixels) with model=FORM, random actions: the world model alone, open loop
cost      recipe `cartpole` untrained: one update of the world model, one draw of 256 codes from the transition, and dreams of
          256 worlds x 15 steps. Measured alone on the machine

A row ends after --max-minutes, whatever it has reached, and says so. Rows that are there are not measured again, and a row
that was interrupted goes on from its run folder (--runs).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from control import train_ours
from rows import Failed, Load, Rows, call, marked, number, options, say, spread, table, timed

from worldmodel.config import Config
from worldmodel.errors import ConfigError

FORMS = (
    "gaussian dreamer vae vamp mixture flow hierarchical energy latent_diffusion diffusion_decoder jepa hybrid world_models_2018 "
    "transformer"
).split()
EXTRA = {"diffusion_decoder seen again": ("diffusion_decoder", ["model.rollouts=observation"])}
"""Rows beside the recipes: what the dream shows is drawn by the diffusion decoder and encoded again at each imagined step."""

ALONE = "train.prefill=4000 train.pretrain=200 train.steps=8000 train.ratio=0.5"
TASKS: dict[str, dict[str, Any]] = {
    "cartpole": {
        "recipe": "cartpole",
        "overrides": ["train.steps=2500", "eval.stop_when_solved=false"],
        "context": 5,
        "horizon": 15,
    },
    "images": {
        "recipe": "two_rooms",
        "overrides": f"agent=random eval.every=0 eval.episodes=1 {ALONE}".split(),
        "context": 5,
        "horizon": 15,
    },
}
WORLDS, HORIZON = 256, 15


def model_of(form: str) -> tuple[str, list[str]]:
    """(recipe of the model, further options) of a row's form."""
    return EXTRA.get(form, (form, []))


# One row, in a process of its own ---------------------------------------------------------------------------------------


def work(job: dict[str, Any]) -> dict[str, Any]:
    """What training and measuring one form came to."""
    from worldmodel.commands.dream import dream
    from worldmodel.storage.run import Run

    config = Config.from_recipe(job["recipe"], job["overrides"])
    torch.set_num_threads(config.train.threads)
    path = Path(job["path"])
    with Load() as load:
        trained = train_ours(job, config, path, job["device"], resume=path.exists())
        errors = dream(path, job["context"], job["horizon"], episodes=20, device=job["device"], log=say)
    agent = Run.open(path).agent(device=job["device"])
    found = {name: trained[name] for name in ("real_steps", "updates", "wall_seconds", "solved_at", "final_return", "stopped")}
    return {
        **found,
        "ratio": errors["ratio"],
        "observation": errors["observation"],
        "skipped_updates": agent.learner.skipped,
        "parameters": sum(p.numel() for p in agent.policy.world.parameters()),
        **carried(agent, config),
        "milliseconds": round(1000 * trained["wall_seconds"] / max(1, trained["updates"]), 2),
        "foreign": load.cores,
    }


def carried(agent: Any, config: Config) -> dict[str, Any]:
    """The nats of a code against the transition law, and against the marginal where there is one, on held-out episodes."""
    from worldmodel.agents.held_out import collect
    from worldmodel.data import Sampling
    from worldmodel.diagnostics.geometry import filter_episodes

    world = agent.policy.world.eval()
    seen = filter_episodes(world, collect(agent, config.env, 20))
    law = world.dynamics.transition
    nats = {"rate": seen.rate if math.isfinite(seen.rate) else None, "density": law.density, "active": seen.active}
    if world.marginal is not None and not world.dynamics.latent.deterministic:
        with torch.no_grad():
            generator = torch.Generator(world.device).manual_seed(0)
            shape, sampling = seen.z.shape[:-1], Sampling(generator=generator)
            z = world.dynamics.latent.draw(seen.posterior, sampling, shape, world.device)
            nats["marginal_rate"] = float(world.marginal.rate(seen.posterior, z, None, sampling=sampling).mean())
    return nats


def cost(form: str, most: float) -> dict[str, Any]:
    """Milliseconds of an update, of a draw and of a dream, of a model that has hardly learned anything."""
    import tempfile

    import worldmodel
    from worldmodel.data import Sampling
    from worldmodel.storage.run import Run

    torch.set_num_threads(1)
    model, more = model_of(form)
    short = ["train.ratio=0", "train.pretrain=1", "eval.every=0", "eval.episodes=1", "log.tensorboard=false"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        worldmodel.train("cartpole", 301, 0, path, [f"model={model}", *more, *short], "cpu")
        run = Run.open(path)
        agent, replay, train = run.agent(device="cpu"), run.replay(), run.config.train
    learner, rng = agent.learner, np.random.default_rng(0)
    world = learner.world
    batch = learner.prepare(replay.sample(train.batch_size, train.batch_length, rng))
    generator = torch.Generator().manual_seed(0)
    update = timed(lambda: learner.update(batch, generator), samples=5, least=0.3, most=most)
    world.eval()
    with torch.no_grad():
        states = world.trace(batch, None, Sampling(generator=generator)).states.map(lambda x: x.flatten(0, 1)[:WORLDS])
        action = torch.as_tensor(world.action.sample(WORLDS, rng))
        h = world.dynamics.imagine(states, action, Sampling(generator=generator))["h"]
        sampling = Sampling(generator=generator)
        draw = timed(lambda: world.dynamics.transition.sample(h, 1, sampling), samples=5, least=0.3, most=most)
        dream = timed(
            lambda: world.imagine(states, lambda feature, step: action, HORIZON, sampling), samples=5, least=0.3, most=most
        )
    return {
        "update_ms": update["ms"],
        "draw_ms": draw["ms"],
        "dream_ms": dream["ms"],
        "parameters": sum(p.numel() for p in world.parameters()),
        "foreign": max(x["foreign"] or 0.0 for x in (update, draw, dream)),
        "quiet": all(x["quiet"] for x in (update, draw, dream)),
    }


# All of them ------------------------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace, rows: Rows) -> int:
    """Measures what is missing; gives the number of rows that failed."""
    todo = []
    for task in args.tasks:
        for form in args.forms:
            for seed in args.seeds if task != "cost" else [0]:
                key = {"task": task, "form": form, "seed": seed, "device": args.device, "overrides": args.overrides}
                if not rows.has(key):
                    todo.append(key)
    if args.jobs == 1:
        return sum(_row(key, args, rows) for key in todo)
    with ThreadPoolExecutor(args.jobs) as pool:
        return sum(pool.map(lambda key: _row(key, args, rows), todo))


def _row(key: dict[str, Any], args: argparse.Namespace, rows: Rows) -> int:
    model, more = model_of(key["form"])
    since = time.perf_counter()
    try:
        if key["task"] == "cost":
            found = call(__file__, {"cost": key["form"], "most": args.most}, 1, 3600)
        else:
            task = TASKS[key["task"]]
            name = f"{key['task']}-{key['form']}-s{key['seed']}".replace(", ", "-").replace(" ", "-")
            job = {**task, "seed": key["seed"], "device": args.device, "path": str(args.runs / name), "verbose": args.verbose}
            given = [f"model={model}", *more, *task["overrides"], *args.overrides]
            job["overrides"] = list({option.partition("=")[0]: option for option in given}.values())  # later ones count
            job |= {"max_steps": args.max_steps, "max_minutes": args.max_minutes}
            found = call(__file__, job, 1, 90 * args.max_minutes + 600)
        rows.add(key, found, threads=1)
    except Failed as error:
        say(f"failed: {key['task']} {key['form']} seed {key['seed']}: {error}")
        return 1
    say(f"  {time.perf_counter() - since:.0f} s")
    return 0


def report(rows: Rows) -> str:
    """The tables, medians over seeds."""
    found = {}
    for row in rows:
        key = row["key"]
        found.setdefault((key["task"], " ".join([key["form"], *key["overrides"]]), key["device"]), []).append(row)
    parts = []
    trained = [(name, group) for name, group in found.items() if name[0] != "cost"]
    if trained:
        head = ["task", "form", "seeds", "ratio at 15", "rate, nats", "density", "marginal, nats", "parameters", "ms/update"]
        head += ["real steps", "solved", "final return", "not finite", "stopped by"]
        parts.append(table(head, [_line(name, group) for name, group in trained]))
    costs = {name[1]: group[-1] for name, group in found.items() if name[0] == "cost"}
    if costs:
        base = costs.get("gaussian")
        parts.append(table(["form", "update ms", "x", "codes/s", "x", "dreamed steps/s", "x", "quiet"], _costs(costs, base)))
    return "\n\n".join(parts)


def _line(name: tuple[str, str, str], group: list[dict[str, Any]]) -> list[str]:
    first = group[0]
    solved = [row["solved_at"] for row in group]
    nats = [row["rate"] for row in group if row["rate"] is not None]
    marginal = [row["marginal_rate"] for row in group if row.get("marginal_rate") is not None]
    acts = name[0] == "cartpole"
    return [
        name[0] + ("" if name[2] == "cpu" else f" ({name[2]})"),
        marked(name[1], group),
        str(len(group)),
        spread([row["ratio"][14] for row in group], 2),
        spread(nats, 3) if nats else "none",
        first["density"],
        spread(marginal, 3) if marginal else "",
        number(first["parameters"], 3),
        spread([row["milliseconds"] for row in group], 2),
        spread([row["real_steps"] for row in group], 1),
        f"{sum(x is not None for x in solved)}/{len(solved)}" if acts else "",
        spread([row["final_return"] for row in group]) if acts else "",
        str(sum(row["skipped_updates"] for row in group)),
        "/".join(sorted({row["stopped"] or "" for row in group})),
    ]


def _costs(costs: dict[str, dict[str, Any]], base: dict[str, Any] | None) -> list[list[str]]:
    def middle(row: dict[str, Any], name: str) -> float:
        return sorted(row[name])[len(row[name]) // 2]

    lines = []
    for form, row in costs.items():
        line = [marked(form, [row])]
        for name, many in (("update_ms", None), ("draw_ms", WORLDS), ("dream_ms", WORLDS * HORIZON)):
            ms = middle(row, name)
            line.append(number(ms) if many is None else number(1000 * many / ms, 2))
            line.append("" if base is None else f"{ms / middle(base, name):.2f}")
        lines.append([*line, "yes" if row["quiet"] else "no"])
    return lines


def main() -> int:
    if sys.argv[1:2] == ["--worker"]:
        job = json.loads(sys.argv[2])
        print(json.dumps(cost(job["cost"], job["most"]) if "cost" in job else work(job), allow_nan=False))
        return 0
    parser = options(__doc__)
    parser.add_argument(
        "--tasks", type=lambda text: text.split(","), default=[*TASKS], help=f"separated by commas: {[*TASKS, 'cost']}"
    )
    parser.add_argument("--forms", type=lambda text: text.split(","), help=f"separated by commas: {', '.join([*FORMS, *EXTRA])}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="rows at the same time; times are true only with 1")
    parser.add_argument("--runs", type=Path, default=Path("runs/forms"), help="where the runs are kept")
    parser.add_argument("--max-steps", type=int, help="real steps of a row at most")
    parser.add_argument("--max-minutes", type=float, default=15.0, help="training of a row ends then")
    parser.add_argument("--most", type=float, default=60, help="seconds to wait for undisturbed samples of a cost row")
    parser.add_argument("--print", action="store_true", help="only the tables")
    parser.add_argument("--verbose", action="store_true", help="every evaluation on stderr")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    args.forms = args.forms or [*FORMS, *EXTRA]
    if set(args.tasks) - {*TASKS, "cost"}:
        parser.error(f"--tasks {','.join(args.tasks)}: expected some of {', '.join([*TASKS, 'cost'])}")
    try:
        for form in args.forms:
            Config.from_recipe("cartpole", [f"model={model_of(form)[0]}", *model_of(form)[1], *args.overrides])
    except ConfigError as error:
        parser.error(str(error))
    rows = Rows("forms", args.results, args.again)
    failed = 0 if args.print else measure(args, rows)
    print(report(rows))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
