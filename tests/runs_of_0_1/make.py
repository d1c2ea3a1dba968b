"""Makes the runs of release 0.1.0 that tests/test_runs_of_0_1.py opens: NAME.zip of each, and expected.json beside them.

    python make.py FOLDER        with release 0.1.0 on Python 3.11 or newer; takes a minute

Each run is as small as it can be. Between them they set nearly every option of 0.1.0 to something other than its default
(config.yaml lists all), and hold the arrays of every part, so that a name that is no longer read shows. expected.json holds
what 0.1.0 itself said of each:

    returns    greedy episodes of the environment's seeds 30,000 and 30,001
    dream      what `dream --context 2 --horizon 3` measures, on `log.held_out` episodes
    tolerance  relative, within which these numbers must be the same later
    steps      real steps of the run
    more       real steps until which it was resumed
    updates    of the world model, in all, after that
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import worldmodel as wm
from worldmodel.agents import dream, evaluate

STEPS, MORE = 60, 20
CONTEXT, HORIZON = 2, 3
FINAL_SEED = 30_000
SEEN = ("observation", "persistence", "reward", "continue", "uncertainty")
SAME, NOISY = 1e-3, 0.15
"""Tolerances. For diffusion and energy 0.1.0 drew noise for a rate that nobody asked for: their dreams have other noise since."""

SMALL: dict[str, Any] = {
    "model.encoder.units": 12,
    "model.encoder.layers": 1,
    "model.encoder.depth": 2,
    "model.decoder.units": 12,
    "model.decoder.layers": 1,
    "model.decoder.depth": 2,
    "model.decoder.min_sigma": 0.04,
    "model.decoder.min_sigma_image": 0.3,
    "model.dynamics.deter": 12,
    "model.dynamics.units": 10,
    "model.heads.units": 8,
    "model.heads.layers": 2,
    "model.heads.bins": 21,
    "model.heads.limit": 6.0,
    "train.prefill": 24,
    "train.prefill_hold": 2.0,
    "train.pretrain": 7,
    "train.ratio": 0.4,
    "train.batch_size": 4,
    "train.batch_length": 6,
    "train.capacity": 500,
    "train.newest": 0.2,
    "train.ends": 0.4,
    "train.lr": 0.003,
    "train.eps": 1e-7,
    "train.clip": 50.0,
    "train.average": 0.8,
    "train.reuse_memory": False,
    "eval.every": 0,
    "eval.episodes": 1,
    "eval.threshold": 1000.0,
    "eval.stop_when_solved": True,
    "checkpoint.every": 0,
    "checkpoint.flush": 0,
    "checkpoint.keep": 1,
    "checkpoint.failures": 2,
    "log.every": 3,
    "log.tensorboard": False,
    "log.pictures": 0,
    "log.held_out": 2,
}
BEHAVIOUR: dict[str, Any] = {
    "agent.units": 8,
    "agent.layers": 1,
    "agent.horizon": 4,
    "agent.starts": 12,
    "agent.gamma": 0.97,
    "agent.lam": 0.9,
    "agent.temperature": 0.9,
    "agent.entropy": 0.01,
    "agent.lr": 0.002,
    "agent.eps": 1e-7,
    "agent.clip": 40.0,
    "agent.slow": 0.05,
    "agent.slow_weight": 0.5,
    "agent.bins": 23,
    "agent.limit": 7.0,
    "agent.unimix": 0.03,
}
CARTPOLE = {"env.id": "CartPole-v1", "env.max_episode_steps": 40}
PENDULUM = {"env.id": "Pendulum-v1", "env.max_episode_steps": 24, "env.action_repeat": 2, "env.kwargs": {"g": 9.0}}
CONTINUOUS = {"agent.min_std": 0.2, "agent.max_std": 0.8}
CATCH = {"env.id": "worldmodel.envs:Catch-v0", "env.pixels": 16, "train.batch_size": 3}
DOUBT = {"model.ensemble.members": 2, "model.ensemble.units": 6, "model.ensemble.layers": 1}
GAUSSIAN = {"model.dynamics.latent.size": 4, "model.dynamics.latent.min_std": 0.02}
NETWORK = {"units": 8, "layers": 1}
DIFFUSION = {
    "kind": "diffusion",
    **NETWORK,
    "steps": 3,
    "most": 4.0,
    "least": 0.03,
    "level_mean": -1.0,
    "level_std": 1.5,
    "draws": 3,
    "looks": 2,
    "levels": 8,
    "memory": 0.95,
}
ENERGY = {
    "kind": "energy",
    **NETWORK,
    "negatives": 5,
    "others": 3,
    "magnitude": 0.01,
    "buffer": 64,
    "reinit": 0.1,
    "candidates": 16,
    "steps": 4,
    "step": 0.4,
    "clip": 8.0,
    "normaliser": 8,
    "most_gap": 90.0,
    "most_moved": 15.0,
}
PLAN = {
    "plan.horizon": 3,
    "plan.samples": 12,
    "plan.elites": 4,
    "plan.proposals": 3,
    "plan.temperature": 0.7,
    "plan.first_std": 0.8,
    "plan.min_std": 0.07,
    "plan.momentum": 0.2,
    "plan.colour": 1.5,
    "plan.keep": 2,
    "plan.penalty": 0.3,
    "plan.bonus": 0.2,
}
PLANNER = {"agent.kind": "planner", **{f"agent.{name}": value for name, value in PLAN.items()}}

RUNS: dict[str, dict[str, Any]] = {
    "dreamer": {
        "model": "dreamer",
        **CARTPOLE,
        **BEHAVIOUR,
        **DOUBT,
        "model.inputs": "symlog",
        "model.dynamics.latent": {"kind": "categorical", "variables": 3, "classes": 4, "unimix": 0.02},
        "model.dynamics.free_nats": 0.2,
        "model.dynamics.blocks": 2,
        "model.dynamics.slow": 4,
        "model.dynamics.slow_every": 3,
        "model.transition": {"kind": "categorical", "units": 9, "layers": 2},
        "model.initial": {"kind": "mixture", "components": 3, "floor": 0.02, **NETWORK},
        "model.marginal": {"kind": "mixture", "components": 3, "floor": 0.02, **NETWORK},
        "agent.penalty": 0.2,
        "agent.manifold": 0.1,
        "agent.replay_value": 0.3,
        "train.replay": "disk",
        "train.replay_gib": 0.5,
        "train.burn_in": 2,
        "train.warmup": 5,
        "train.scales": {
            "observation": 0.9,
            "reward": 1.1,
            "cont": 1.2,
            "dyn": 0.8,
            "rep": 0.2,
            "marginal": 0.6,
            "ensemble": 0.7,
        },
    },
    "vamp": {
        "model": "vamp",
        **PENDULUM,
        **BEHAVIOUR,
        **CONTINUOUS,
        **GAUSSIAN,
        "model.dynamics.posterior_layers": 2,
        "model.decoder.sigma": "learned",
        "model.rollouts": "observation",
        "model.transition": {"kind": "vamp", "inputs": "observation", "components": 5, **NETWORK},
        "model.initial": {"kind": "vamp", "inputs": "feature", "components": 6, "weights": "learned"},
        "model.marginal": {"kind": "vamp", "inputs": "exemplar", "components": 8, "renew": 3},
        "agent.gradient": "dynamics",
        "train.scales": {"rep": 0.05, "marginal": 0.4},
    },
    "diffusion": {
        "model": "latent_diffusion",
        **CARTPOLE,
        **BEHAVIOUR,
        **GAUSSIAN,
        "model.transition": {**DIFFUSION, "sampler": "heun"},
        "model.initial": {**DIFFUSION, "sampler": "euler"},
        "train.scales": {"rep": 0.02, "fit": 0.7},
        "log.held_out": 12,  # dreams drew other noise then
    },
    "energy": {
        "model": "energy",
        **PENDULUM,
        **BEHAVIOUR,
        **CONTINUOUS,
        **GAUSSIAN,
        "model.transition": {**ENERGY, "base": {"kind": "gaussian", "std": "fitted", **NETWORK}},
        "model.initial": {**ENERGY, "trainer": "pcd", "sampler": "langevin", "base": {"kind": "gaussian", "standard": True}},
        "model.marginal": {**ENERGY, "trainer": "cd", "base": {"kind": "mixture", "components": 3}},
        "train.scales.fit": 0.6,
        "log.held_out": 12,  # dreams drew other noise then
    },
    "forms": {
        "model": "hierarchical",
        **PENDULUM,
        **BEHAVIOUR,
        **CONTINUOUS,
        **GAUSSIAN,
        "model.dynamics.slow": 5,
        "model.dynamics.slow_every": 2,
        "model.transition": {
            "kind": "hierarchical",
            "top": 2,
            "upper": {"kind": "flow", "transforms": 1, "bins": 5, **NETWORK},
            "lower": {"kind": "mixture", "components": 3, "floor": 0.02, **NETWORK},
            "units": 9,
            "layers": 2,
        },
        "model.initial": {"kind": "flow", "transforms": 1, "bins": 5, **NETWORK},
        "model.marginal": {"kind": "gaussian", "std": "fitted"},
        "env.num_envs": 2,
        "env.timeout": 50.0,
        "env.restarts": 1,
        "env.restart_window": 200.0,
    },
    "jepa": {
        "model": "jepa",
        **PENDULUM,
        **BEHAVIOUR,
        **CONTINUOUS,
        "model.dynamics.latent.size": 4,
        "model.transition": {"kind": "gaussian", "std": "fitted", **NETWORK},
        "model.objective": {"kind": "jepa", "anti": "vicreg", "slices": 32, "covariance": 1.5, "units": 7, "ema": 0.9},
        "train.scales": {"prediction": 1.2, "collapse": 4.0, "inverse": 0.8},
        "checkpoint.fence": True,
        "checkpoint.every": 30,
    },
    "hybrid": {
        "model": "hybrid",
        **PENDULUM,
        "model.dynamics.latent.size": 4,
        "model.transition": {"kind": "gaussian", "std": "fitted", **NETWORK},
        "model.objective": {"kind": "hybrid", "anti": "sigreg", "slices": 16, "covariance": 1.5, "units": 7, "ema": 0.8},
        "model.objective.decoder_grad": "stop",
        "model.heads.gradient": "stop",
        **DOUBT,
        "agent": {
            "kind": "sb3",
            "algo": "ppo",
            "options": {"n_epochs": 2, "batch_size": 16, "policy_kwargs": {"net_arch": [6]}},
            "every": 20,
            "visits": 3,
            "imagined": 60,
            "worlds": 5,
            "horizon": 4,
            "start": "prior",
            "observation": "decoded",
            "noise": 0.1,
            "penalty": 0.2,
            "max_uncertainty": 50.0,
        },
    },
    "transformer": {
        "model": "transformer",
        **PENDULUM,
        **BEHAVIOUR,
        **CONTINUOUS,
        **GAUSSIAN,
        **DOUBT,
        "model.dynamics.layers": 2,
        "model.dynamics.heads": 3,
        "model.dynamics.window": 4,
        "model.dynamics.dropout": 0.1,
        "model.dynamics.free_nats": 0.2,
        "model.dynamics.posterior_layers": 2,
        "model.transition": {"kind": "gaussian", **NETWORK},
        "model.initial": {"kind": "gaussian", **NETWORK},
        **PLANNER,
        "agent.plan.method": "icem",
        "agent.plan.iterations": 3,
        "agent.penalty": 0.1,
        "agent.replay_value": 0.2,
    },
    "mdn_rnn": {
        "model": "world_models_2018",
        **CARTPOLE,
        **BEHAVIOUR,
        **GAUSSIAN,
        "model.inputs": "raw",
        "model.transition": {"kind": "mixture", "components": 3, **NETWORK},
        **DOUBT,
        **PLANNER,
        "agent.plan.method": "mppi",
        "agent.plan.terminal": False,
        "agent.plan.goal": "last",
    },
    "latent_decoder": {
        "model": "dreamer",
        **CATCH,
        **BEHAVIOUR,
        "model.dynamics.latent": {"kind": "categorical", "variables": 3, "classes": 4},
        "model.transition": {"kind": "categorical", **NETWORK},
        "model.initial": {"kind": "categorical", **NETWORK},
        "model.decoder.kind": "latent_diffusion",
        "model.decoder.gradient": "stop",
        "model.decoder.image": "logistic",
        "model.decoder.sigma": "learned",
        "model.decoder.levels": 64,
        "model.decoder.size": 5,
        "model.decoder.kl": 1e-5,
        "model.decoder.law": {**DIFFUSION, "layers": 2, "sampler": "euler"},
        "train.scales.denoise": 0.8,
    },
    "diffusion_decoder": {
        "model": "diffusion_decoder",
        **CATCH,
        **BEHAVIOUR,
        **GAUSSIAN,
        "model.transition": {"kind": "gaussian", **NETWORK},
        "model.initial": {"kind": "gaussian", **NETWORK},
        "model.decoder.reads": "latent",
        "model.decoder.gradient": "full",
        "model.decoder.steps": 2,
        "model.decoder.sampler": "heun",
        "model.decoder.refine_depth": 2,
        "model.decoder.refine_units": 7,
        "model.decoder.image": "bernoulli",
        "model.decoder.frames": 5,
        "model.decoder.most": 4.0,
        "model.decoder.least": 0.06,
        "model.decoder.level_mean": -0.5,
        "model.decoder.level_std": 1.1,
        "train.average": 0.0,
        "train.scales.denoise": 0.8,
    },
    "diamond": {
        "model": "diamond",
        **CATCH,
        **BEHAVIOUR,
        "agent.units": 3,  # of what reads whole pictures
        "model.heads.units": 3,
        "model.dynamics.past": 3,
        "model.dynamics.depth": 2,
        "model.dynamics.frames": 5,
        "model.dynamics.steps": 2,
        "model.dynamics.most": 4.0,
        "model.dynamics.least": 0.003,
        "model.dynamics.level_mean": -0.5,
        "model.dynamics.level_std": 1.1,
        "model.dynamics.offset": 0.2,
    },
}


def options(name: str) -> dict[str, Any]:
    """Of one run, dotted."""
    shared = {key: value for key, value in SMALL.items() if name != "diamond" or not key.startswith("model.decoder.")}
    return {**shared, **RUNS[name]}


def made(name: str, folder: Path) -> dict[str, Any]:
    """Trains one run, and what 0.1.0 says of it."""
    given = options(name)
    wm.train(None, steps=STEPS, seed=3, run_dir=folder, overrides=given, device="cpu")
    run = wm.Run.open(folder)
    returns, _ = evaluate(run.agent(), run.config.env, 2, FINAL_SEED)
    seen = dream(run, CONTEXT, HORIZON, episodes=run.config.log.held_out)  # `dream` took 20 then, whatever that said
    with tempfile.TemporaryDirectory() as other:
        longer = Path(shutil.copytree(folder, Path(other) / "run"))
        after = wm.train(None, steps=STEPS + MORE, run_dir=longer, resume=True, device="cpu")
    return {
        "returns": returns,
        "dream": {what: [float(f"{x:.7g}") for x in seen[what]] for what in SEEN if None not in seen[what]},
        "tolerance": NOISY if name in ("diffusion", "energy") else SAME,
        "steps": STEPS,
        "more": STEPS + MORE,
        "updates": after.updates,
    }


def pack(folder: Path, file: Path) -> None:
    """The run folder as a zip, the same bytes for the same files."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as packed:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.name != ".lock":
                entry = zipfile.ZipInfo(str(path.relative_to(folder)))
                packed.writestr(entry, path.read_bytes(), zipfile.ZIP_DEFLATED, 9)


def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    out, expected = out.resolve(), {}
    for name in RUNS:
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):  # a run notes its path
            expected[name] = made(name, Path(name))
            pack(Path(name), out / f"{name}.zip")
        print(f"{name:18} {(out / f'{name}.zip').stat().st_size:9,} bytes  {expected[name]['returns']}", flush=True)
    (out / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    if importlib.metadata.version("worldmodel") != "0.1.0" or len(sys.argv) != 2:
        raise SystemExit("usage: make.py FOLDER, with worldmodel 0.1.0 installed")
    main(Path(sys.argv[1]))
