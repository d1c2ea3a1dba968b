"""One role, many forms: every recipe of configs/model in the same worlds, what each learns and what each costs.

    python benchmarks/forms.py                                        # every recipe on CartPole and on 64x64 images
    python benchmarks/forms.py --tasks cartpole --forms vamp,flow --seeds 0 1
    python benchmarks/forms.py --tasks cost                           # milliseconds and samples a second, against gaussian
    python benchmarks/forms.py --tasks images --device cuda --jobs 8
    python benchmarks/forms.py --print

cartpole  recipe `cartpole` with model=FORM: a Dreamer in its dream, under the protocol of control.py (20 greedy episodes every
          250 real steps, confirmed by 20 others), which goes on to 2,500 real steps so that all models have seen as much; then
          open loop on fresh episodes as `worldmodel dream` measures it
images    recipe `two_rooms` (64x64 pixels) with model=FORM, random actions: the world model alone, open loop
cost      recipe `cartpole` untrained: one update of the world model, one draw of 256 latents from the transition, and dreams of
          256 worlds x 15 steps. Measured alone on the machine

A row ends after --max-minutes, whatever it has reached, and says so. Rows that are there are not measured again, and a row
that was interrupted goes on from its run folder (--runs).
"""

from __future__ import annotations

import argparse
import math
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from control import train_ours
from rows import Key, Load, Row, Rows, call, grouped, label, marked, options, say, script, table, timed, words
from tables import median, number, solved, spread

from worldmodel.config import Config
from worldmodel.errors import ConfigError

FORMS = (
    "gaussian dreamer vae vamp mixture flow hierarchical energy latent_diffusion diffusion_decoder "
    "latent_diffusion_decoder jepa hybrid world_models_2018 transformer"
).split()
EXTRA = {"diffusion_decoder seen again": ("diffusion_decoder", ["model.rollouts=observation"])}
"""More rows: at each imagined step the observation is drawn by the diffusion decoder and encoded again."""

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


def work(job: Row) -> Row:
    """The result of training and measuring one form."""
    if "cost" in job:
        return cost(job["cost"], job["most"])
    from worldmodel.commands.dream import dream
    from worldmodel.storage.run import Run

    config = Config.from_recipe(job["recipe"], job["overrides"])
    path = Path(job["path"])
    with Load() as load:
        trained = train_ours(job, config, path, job["device"], resume=path.exists())
        errors = dream(path, job["context"], job["horizon"], episodes=20, device=job["device"], log=say)
    agent = Run.open(path).agent("newest", device=job["device"])
    found = {name: trained[name] for name in ("real_steps", "updates", "wall_seconds", "solved_at", "final_return", "stopped")}
    return {
        **found,
        "ratio": errors["ratio"],
        "observation": errors["observation"],
        "skipped_updates": agent.learner.skipped,
        "parameters": sum(p.numel() for p in agent.policy.world.parameters()),
        **nats(agent, config),
        "milliseconds": round(1000 * trained["wall_seconds"] / max(1, trained["updates"]), 2),
        "foreign": load.cores,
    }


def nats(agent: Any, config: Config) -> Row:
    """The rate of a latent under the transition prior, and under the marginal where there is one, on held-out episodes."""
    from worldmodel.agents.held_out import collect
    from worldmodel.data import Sampling
    from worldmodel.diagnostics.geometry import filter_episodes

    world = agent.policy.world.eval()
    seen = filter_episodes(world, collect(agent, config.env, 20))
    rate = seen.rate if math.isfinite(seen.rate) else None
    found = {"rate": rate, "density": world.dynamics.transition.density, "active": seen.active}
    if world.marginal is not None and not world.dynamics.latent.deterministic:
        with torch.no_grad():
            generator = torch.Generator(world.device).manual_seed(0)
            shape, sampling = seen.z.shape[:-1], Sampling(generator=generator)
            z = world.dynamics.latent.draw(seen.posterior, sampling, shape, world.device)
            found["marginal_rate"] = float(world.marginal.rate(seen.posterior, z, None, sampling=sampling).mean())
    return found


def cost(form: str, max_seconds: float) -> Row:
    """Milliseconds of an update, of a draw and of a dream, of a model after one update."""
    import worldmodel
    from worldmodel.data import Sampling
    from worldmodel.storage.run import Run

    model, more = model_of(form)
    short = ["train.ratio=0", "train.pretrain=1", "eval.every=0", "eval.episodes=1", "log.tensorboard=false"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        worldmodel.train("cartpole", 301, 0, path, [f"model={model}", *more, *short], "cpu")
        run = Run.open(path)
        agent, replay, train = run.agent("newest", device="cpu"), run.replay(), run.config.train
    learner, rng = agent.learner, np.random.default_rng(0)
    world = learner.world
    batch = learner.prepare(replay.sample(train.batch_size, train.batch_length, rng))
    generator = torch.Generator().manual_seed(0)
    measured = partial(timed, samples=5, min_seconds=0.3, max_seconds=max_seconds)
    update = measured(lambda: learner.update(batch, generator))
    world.eval()
    with torch.no_grad():
        states = world.trace(batch, None, Sampling(generator=generator)).states.map(lambda x: x.flatten(0, 1)[:WORLDS])
        action = torch.as_tensor(world.action.sample(WORLDS, rng))
        h = world.dynamics.imagine(states, action, Sampling(generator=generator))["h"]
        sampling = Sampling(generator=generator)
        draw = measured(lambda: world.dynamics.transition.sample(h, 1, sampling))
        dream = measured(lambda: world.imagine(states, lambda feature, step: action, HORIZON, sampling))
    return {
        "update_ms": update["ms"],
        "draw_ms": draw["ms"],
        "dream_ms": dream["ms"],
        "parameters": sum(p.numel() for p in world.parameters()),
        "foreign": max(x["foreign"] or 0.0 for x in (update, draw, dream)),
        "quiet": all(x["quiet"] for x in (update, draw, dream)),
    }


# All of them ------------------------------------------------------------------------------------------------------------


def run(key: Key, args: argparse.Namespace) -> Row:
    """One row, in a process of its own."""
    if key["task"] == "cost":
        return call(__file__, {"cost": key["form"], "most": args.most}, 1, 3600)
    (model, more), task = model_of(key["form"]), TASKS[key["task"]]
    name = f"{key['task']}-{key['form']}-s{key['seed']}".replace(" ", "-")
    given = [f"model={model}", *more, *task["overrides"], *key["overrides"]]
    job = {**task, "seed": key["seed"], "device": key["device"], "path": str(args.runs / name), "verbose": args.verbose}
    job["overrides"] = list({option.partition("=")[0]: option for option in given}.values())  # later ones count
    job |= {"max_steps": args.max_steps, "max_minutes": args.max_minutes}
    return call(__file__, job, 1, 90 * args.max_minutes + 600)


def report(rows: Rows) -> str:
    """The tables, medians over seeds."""
    groups = grouped(rows, lambda row: (row["key"]["task"], label(row["key"], row["key"]["form"]), row["key"]["device"]))
    trained = [_line(*name, group) for name, group in groups.items() if name[0] != "cost"]
    costs = {form: group[-1] for (task, form, _), group in groups.items() if task == "cost"}
    parts = []
    if trained:
        head = ["task", "form", "seeds", "ratio at 15", "rate, nats", "density", "marginal, nats", "parameters", "ms/update"]
        head += ["real steps", "solved", "final return", "not finite", "stopped by"]
        parts.append(table(head, trained))
    if costs:
        parts.append(table(["form", "update ms", "x", "latents/s", "x", "dreamed steps/s", "x", "quiet"], _costs(costs)))
    return "\n\n".join(parts)


def _line(task: str, form: str, device: str, group: list[Row]) -> list[str]:
    rates = spread(row["rate"] for row in group if row["rate"] is not None)
    acts = task == "cartpole"
    return [
        task + ("" if device == "cpu" else f" ({device})"),
        marked(form, group),
        str(len(group)),
        spread((row["ratio"][14] for row in group), 2),
        rates or "none",
        group[0]["density"],
        spread(row["marginal_rate"] for row in group if row.get("marginal_rate") is not None),
        number(group[0]["parameters"]),
        spread((row["milliseconds"] for row in group), 2),
        spread((row["real_steps"] for row in group), 1),
        solved(group) if acts else "",
        spread(row["final_return"] for row in group) if acts else "",
        str(sum(row["skipped_updates"] for row in group)),
        "/".join(sorted({row["stopped"] or "" for row in group})),
    ]


def _costs(costs: dict[str, Row]) -> list[list[str]]:
    """Milliseconds or samples per second of each form, and the milliseconds over those of `gaussian`."""
    lines, base = [], costs.get("gaussian")
    for form, row in costs.items():
        line = [marked(form, [row])]
        for name, samples in (("update_ms", None), ("draw_ms", WORLDS), ("dream_ms", WORLDS * HORIZON)):
            ms = median(row[name])
            line.append(number(ms) if samples is None else number(1000 * samples / ms, 2))
            line.append("" if base is None else f"{ms / median(base[name]):.2f}")
        lines.append([*line, "yes" if row["quiet"] else "no"])
    return lines


def main() -> int:
    parser = options(__doc__, seeds=(0,), overrides=True)
    known = [*TASKS, "cost"]
    parser.add_argument("--tasks", type=words, default=[*TASKS], help=f"separated by commas: {', '.join(known)}")
    parser.add_argument("--forms", type=words, default=[*FORMS, *EXTRA], help=f"separated by commas: {', '.join([*FORMS, *EXTRA])}")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="rows at the same time; times are true only with 1")
    parser.add_argument("--runs", type=Path, default=Path("runs/forms"), help="where the runs are stored")
    parser.add_argument("--max-steps", type=int, help="real steps of a row at most")
    parser.add_argument("--max-minutes", type=float, default=15.0, help="training of a row ends then")
    parser.add_argument("--most", type=float, default=60, help="seconds to wait for undisturbed samples of a cost row")
    parser.add_argument("--verbose", action="store_true", help="every evaluation on stderr")
    args = parser.parse_intermixed_args()
    if set(args.tasks) - set(known):
        parser.error(f"--tasks {','.join(args.tasks)}: expected some of {', '.join(known)}")
    try:
        for model, more in map(model_of, args.forms):
            Config.from_recipe("cartpole", [f"model={model}", *more, *args.overrides])
    except ConfigError as error:
        parser.error(str(error))
    rows = Rows("forms", args.results, args.again)
    keys = [
        {"task": task, "form": form, "seed": seed, "device": args.device, "overrides": args.overrides}
        for task in args.tasks
        for form in args.forms
        for seed in (args.seeds if task != "cost" else [0])
    ]
    failed = 0 if args.print else rows.measure(keys, lambda key: run(key, args), at_once=args.jobs)
    print(report(rows))
    return failed


if __name__ == "__main__":
    script(main, work)
