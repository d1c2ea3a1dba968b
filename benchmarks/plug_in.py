"""Figures of the plug-in: SB3 algorithms in the dream, planners, Dyna, and the speed of planning; SB3's baselines beside.

    python benchmarks/plug_in.py                                     # every row that is not there yet, one after the other
    python benchmarks/plug_in.py --rows planner-pendulum --seeds 0   # some of them
    python benchmarks/plug_in.py --print                             # the tables of what is there

Rows of real steps keep control.py's protocol: 20 greedy episodes every `eval.every` real steps, solved where their mean and
that of 20 others reach the threshold. Beside each stands the plain SB3 algorithm, as published and, off-policy, with as
many gradient updates per real step as the policy gets here. A pixel task with a pretrained encoder is measured by catch_encoder.py,
imagined steps per second by imagined.py.

| row | what |
|---|---|
| ppo-cartpole, sac-pendulum | the unmodified algorithm alternates: collects, the world model learns, it learns in the dream |
| planner-cartpole, planner-pendulum | MPPI with policy proposals and the critic's value behind the horizon |
| dyna-pendulum | SAC in the real environment, its buffer filled with imagined transitions |
| mppi | milliseconds of one action: 512 samples, 6 iterations, horizon 3, a model of 1.2 M parameters |
| gap | imagined less real return of the planner's choice, by the penalty on the ensemble's uncertainty |
| algorithms | all eight in worlds of 400 real steps: real return beside random play's, and whether a loaded one acts the same |
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import control
import numpy as np
import torch
from control import DYNA_ROW, DYNA_UPDATES, PLUG_IN
from rows import Key, Load, Row, Rows, call, grouped, marked, options, script, stale, table, timed
from tables import number, spread

DYNA = {"ratio": 150, "horizon": 15, "every": 10, "config": {"train.prefill": 250, "train.pretrain": 300, "train.ratio": 2.0}}
DYNA_SAC = {"learning_starts": 250, "buffer_size": 30_000}
SEEDS = {"dyna-pendulum": [0, 1, 2, 3, 4]}
PENALTIES = (0.0, 10.0, 30.0, 100.0)
GAP_STEPS = 120
"""Random real steps that the world of the gap is trained on: few, so that there are errors to exploit."""
SPEED = ["size=medium", "agent.plan.samples=512", "agent.plan.iterations=6", "agent.plan.horizon=3", "agent.plan.elites=64"]
SPEED += ["agent.plan.proposals=24"]
FITS = {"cartpole": ("ppo", "a2c", "dqn", "qrdqn", "recurrent_ppo"), "pendulum": ("sac", "td3", "tqc")}
IMAGINED = 8192
WORLD_STEPS, PREFILL = 400, 300
"""Random real steps that the worlds of the eight algorithms are trained on, and how many of them at most come before training."""
MARGIN = {"cartpole": 50.0, "pendulum": 300.0}
"""By how much a mean return of 20 episodes must exceed random play's in the same world, to count as better than it."""
OTHER = ("mppi", "gap", "algorithms")


# Real steps -------------------------------------------------------------------------------------------------------------


def dyna(job: Row) -> Row:
    """SAC with the callback, under the baselines' protocol; `updates` are SAC's.

    SAC starts to learn once the model does, and its buffer drops transitions of earlier, worse models.
    """
    from baselines import run

    from worldmodel.agents import DynaCallback
    from worldmodel.config import Config

    config = Config.from_recipe("pendulum", ["eval.every=100"])
    callback = DynaCallback(seed=job["seed"], **DYNA)
    with Load() as load:
        result = run(config, "sac", job["seed"], DYNA_UPDATES, job["max_steps"], 60 * job["max_minutes"], [callback], DYNA_SAC)
    return {**result, "imagined": callback.imagined, "foreign": load.cores}


def real_steps(args: argparse.Namespace, rows: Rows, name: str) -> int:
    """Measures the runs of one row and its baselines that are missing; gives the number of runs that failed."""
    asked = {"tasks": [name], "seeds": args.seeds or SEEDS.get(name, [0, 1, 2]), "baselines": not args.ours, "only": None}
    asked |= {"overrides": [], "max_steps": None, "max_minutes": args.max_minutes, "verbose": args.verbose}
    return control.measure(argparse.Namespace(**asked), rows, __file__, {DYNA_ROW: {"row": "dyna"}})


# Speed ------------------------------------------------------------------------------------------------------------------


def mppi(job: Row) -> Row:
    """Milliseconds of `predict` for one observation of Pendulum, filter included."""
    from worldmodel.agents import Planner
    from worldmodel.agents.planner import flops

    planner = Planner("MlpPolicy", "Pendulum-v1", config=SPEED, seed=0, device="cpu")
    obs, state = planner.env.reset(), None

    def act() -> None:
        nonlocal state
        _, state = planner.predict(obs, state, np.zeros(1, bool), deterministic=True)

    taken = timed(act, samples=7, min_seconds=0.5, max_seconds=job["most"], warmup=5)
    return {**taken, "gflop": flops(planner.policy.world, planner.controller) / 1e9, "parameters": planner.parameter_count}


# The gap ----------------------------------------------------------------------------------------------------------------


def gap(job: Row) -> Row:
    """A pure search over 15 steps in a world learned from `GAP_STEPS` random steps of Pendulum: imagined and real return."""
    import worldmodel as wm
    from worldmodel.agents.planner import PlannerConfig, PlannerController
    from worldmodel.data import Sampling
    from worldmodel.envs import make_env
    from worldmodel.model import tensors

    made = {"agent": "random", "model.ensemble.members": 5}
    made |= {"train.prefill": GAP_STEPS, "train.pretrain": 200, "log.tensorboard": False}
    made |= {"eval.every": 0, "eval.episodes": 1}
    plan = {"method": "icem", "horizon": 15, "samples": 256, "iterations": 4, "elites": 24, "proposals": 0, "terminal": False}
    expected: dict[float, list[float]] = {penalty: [] for penalty in PENALTIES}
    real: dict[float, list[float]] = {penalty: [] for penalty in PENALTIES}
    with tempfile.TemporaryDirectory() as folder:
        run = wm.Run.open(wm.train("pendulum", GAP_STEPS, job["seed"], Path(folder) / "run", made, "cpu").run)
        world = run.world_model()
    controller = PlannerController(PlannerConfig(plan=plan), world.feature_dim, world.action)
    generator = torch.Generator().manual_seed(job["seed"])
    rng = np.random.default_rng(job["seed"])
    for episode in range(20):
        env = make_env("Pendulum-v1")
        obs, _ = env.reset(seed=40_000 + episode)
        state, action, first = world.initial(1), torch.zeros(1, world.action.dim), torch.ones(1, dtype=torch.bool)
        for step in range(61):
            rows = tensors(world.obs.to_raw(np.asarray(obs)[None]))
            state = world.observe(state, rows, action, first, Sampling(mode=True))
            first = torch.zeros(1, dtype=torch.bool)
            if step % 20 == 0:
                for penalty in PENALTIES:
                    found = controller.search(world, state, controller.memory(world, 1), generator, penalty)
                    dream = world.imagine(state, lambda feature, t, best=found.best: best[:, t], 15, Sampling(mode=True))
                    expected[penalty].append(float(dream.reward.detach().sum()))
                    copied, total = copy.deepcopy(env), 0.0
                    for planned in found.best[0]:
                        total += float(copied.step(world.action.decode(planned[None])[0])[1])
                    real[penalty].append(total)
            drawn = world.action.sample(1, rng)
            obs, *_ = env.step(world.action.decode(drawn)[0])
            action = torch.from_numpy(drawn)
        env.close()
    rows = {f"{p:g}": {"imagined": statistics.fmean(expected[p]), "real": statistics.fmean(real[p])} for p in PENALTIES}
    return {"by_penalty": rows}


# The eight algorithms -----------------------------------------------------------------------------------------------------


def algorithm(job: Row) -> Row:
    """One algorithm in a world of 400 real steps: updates, change of weights, real return, whether a loaded one acts the same."""
    from baselines import run_random, updates_of

    import worldmodel as wm
    from worldmodel.agents import DreamPolicy, train_in_dream
    from worldmodel.agents.sb3.agent import algorithm_class
    from worldmodel.config import Config
    from worldmodel.envs import make_vec

    recipe, name, seed = job["recipe"], job["algorithm"], job["seed"]
    if name == "random":
        return {"real_return": run_random(Config.from_recipe(recipe), seed)["final_return"]}
    options = {"log.tensorboard": False, "eval.every": 0, "eval.episodes": 1, "agent": "random"}
    options["train.prefill"] = min(Config.from_recipe(recipe).train.prefill, PREFILL)
    with tempfile.TemporaryDirectory() as folder:
        path = wm.train(recipe, WORLD_STEPS, seed, Path(folder) / "run", options, "cpu").run
        before: list[torch.Tensor] = []
        made = algorithm_class(name)

        class Watched(made):  # the weights before the first update
            def _setup_model(self) -> None:
                super()._setup_model()
                before.append(torch.cat([p.detach().flatten().clone() for p in self.policy.parameters()]))

        since = time.perf_counter()
        policy = train_in_dream(Watched, path, total_timesteps=job["imagined"], seed=seed, episodes=20)
        seconds = time.perf_counter() - since
        after = torch.cat([p.detach().flatten() for p in policy.algorithm.policy.parameters()])
        policy.save(Path(folder) / "policy")
        loaded = DreamPolicy.load(Path(folder) / "policy", trust=True, algorithm=made)
        obs = make_vec(policy.env, 16, seed=0).reset()
        same = np.array_equal(policy.predict(obs, deterministic=True)[0], loaded.predict(obs, deterministic=True)[0])
    moved = float((after - before[0]).abs().max())
    counts = {"updates": updates_of(policy.algorithm), "seconds": seconds, "moved": moved, "loaded acts the same": bool(same)}
    return {**counts, "real_return": policy.result.real_return, "gap": policy.result.gap}


# All of them ------------------------------------------------------------------------------------------------------------

WORKERS = {"dyna": dyna, "mppi": mppi, "gap": gap, "algorithms": algorithm}


def work(job: Row) -> Row:
    return WORKERS[job["row"]](job) if "row" in job else control.work(job)


def others(name: str, args: argparse.Namespace) -> list[Key]:
    """The keys of a row that is not about real steps."""
    if name == "mppi":
        return [{"row": name, "threads": threads, "most": args.most} for threads in (1, 2)]
    if name == "gap":
        return [{"row": name, "seed": seed} for seed in args.seeds or (0, 1, 2)]
    keys = []
    for recipe, group in FITS.items():
        for a in ("random", *group):
            if a not in (args.algorithms or [a, *group]):
                continue
            imagined = {} if a == "random" else {"imagined": args.imagined}
            keys += [{"row": name, "recipe": recipe, "algorithm": a, "seed": seed, **imagined} for seed in args.seeds or (0, 1, 2)]
    return keys


def judged(rows: Iterable[Row], of: str | None = None) -> list[Row]:
    """Of each algorithm and number of imagined steps: {"algorithm", "recipe", "imagined", "rows", "said"}.

    said  that it runs, saves and loads, where a loaded one acts the same, and in how many seeds its real return exceeds random
          play's mean by `MARGIN`

    Stale rows count where the algorithm has no others; the oldest lack seed and steps.
    """
    rows = list(rows)
    fresh = {(row["key"]["recipe"], row["key"]["algorithm"]) for row in rows if not stale(row, of)}
    counted = (row for row in rows if not stale(row, of) or (row["key"]["recipe"], row["key"]["algorithm"]) not in fresh)
    names = lambda row: (row["key"]["recipe"], row["key"]["algorithm"], row["key"].get("imagined", IMAGINED))  # noqa: E731
    groups = grouped(counted, names)
    out = []
    order = {(recipe, name): i for recipe, group in FITS.items() for i, name in enumerate(["random", *group])}
    for (recipe, name, imagined), found in sorted(groups.items(), key=lambda x: (x[0][0], order[x[0][:2]], x[0][2])):
        random = next((rows for (world, other, _), rows in groups.items() if (world, other) == (recipe, "random")), [])
        said = "runs, saves and loads" if all(row.get("loaded acts the same", True) for row in found) else "a loaded one DIFFERS"
        if name == "random":
            said = ""
        elif random:
            threshold = statistics.fmean(row["real_return"] for row in random) + MARGIN[recipe]
            better = sum(row["real_return"] >= threshold for row in found)
            said += f"; beats random by {MARGIN[recipe]:g} in {better} of {len(found)} seeds"
        out.append({"algorithm": name, "recipe": recipe, "imagined": imagined, "rows": found, "said": said})
    return out


def report(rows: Rows, folder: Path) -> str:
    """All tables of what is there."""
    by = grouped(rows, lambda row: row["key"].get("row", "control"))
    parts = [control.report(by["control"], folder)] if "control" in by else []
    if "mppi" in by:
        head, lines = ["threads", "ms of one MPPI action (TD-MPC2: 160)", "GFLOP", "parameters", "foreign"], []
        for row in by["mppi"]:
            figures = [number(row["gflop"]), number(row["parameters"], 1), number(row["foreign"], 1)]
            lines.append([marked(row["key"]["threads"], [row]), spread(row["ms"]), *figures])
        parts.append(table(head, lines))
    if "gap" in by:
        lines = []
        for penalty in (f"{p:g}" for p in PENALTIES):
            found = [row["by_penalty"][penalty] for row in by["gap"]]
            returns = [spread(x[side] for x in found) for side in ("imagined", "real")]
            lines.append([marked(penalty, by["gap"]), *returns, spread(x["imagined"] - x["real"] for x in found)])
        parts.append(table(["penalty", "imagined return", "real return", "gap"], lines))
    if "algorithms" in by:
        names = ("updates", "moved", "real_return", "gap", "seconds")
        lines = []
        for group in judged(by["algorithms"]):
            cells = [spread(row[name] for row in group["rows"] if name in row) for name in names]
            steps = "" if group["algorithm"] == "random" else number(group["imagined"], 1)
            lines.append([marked(group["algorithm"], group["rows"]), group["recipe"], steps, *cells, group["said"]])
        parts.append(table(["algorithm", "world", "imagined steps", *names, "so it"], lines))
    return "\n\n".join(parts)


def main() -> int:
    parser = options(__doc__)
    known = [*PLUG_IN, *OTHER]
    parser.add_argument("--rows", nargs="+", choices=known, default=known, help="these rows only")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 0 1 2, of dyna-pendulum 0 to 4")
    parser.add_argument("--algorithms", nargs="+", metavar="NAME", help="of row algorithms, these only; random is one")
    parser.add_argument("--imagined", type=int, default=IMAGINED, help="of row algorithms, imagined steps (default: %(default)s)")
    parser.add_argument("--ours", action="store_true", help="without the baselines")
    parser.add_argument("--max-minutes", type=float, default=15.0, help="ends every run of real steps then, evaluation included")
    parser.add_argument("--most", type=float, default=60, help="seconds to wait for undisturbed samples of a speed")
    parser.add_argument("--verbose", action="store_true", help="every evaluation of our runs on stderr")
    args = parser.parse_args()
    rows = Rows("plug_in", args.results, args.again)
    threads, failed = lambda key: key.get("threads", 1), 0
    for name in [] if args.print else args.rows:
        if name in PLUG_IN:
            failed += real_steps(args, rows, name)
        else:
            failed += rows.measure(others(name, args), lambda key: call(__file__, key, threads(key), 1800), threads)
    print(report(rows, args.results))
    return failed


if __name__ == "__main__":
    script(main, work)
