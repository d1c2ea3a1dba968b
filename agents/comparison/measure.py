"""One row of a comparison, measured in a process of its own: a form, or what forms are held against.

A row learns from, and is measured on, what the model-free agent of its seed has recorded in FOLDER/SOURCE/data, where SOURCE is the
hash of this version: what another one has recorded or trained is never gone on with.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worldmodel.agents.comparison import play
from worldmodel.agents.comparison.plan import Plan, sized
from worldmodel.agents.decisions import fault_of_copies, planned_returns
from worldmodel.agents.diagnosis import gathered, replayed
from worldmodel.agents.evaluation import FINAL_SEED, evaluate
from worldmodel.agents.held_out import HELD_OUT_SEED
from worldmodel.agents.training import session
from worldmodel.agents.training.signals import Signals
from worldmodel.config import Config, flat_overrides
from worldmodel.data import Episodes
from worldmodel.diagnostics.bounds import likelihood
from worldmodel.diagnostics.evidence import Evidence
from worldmodel.diagnostics.fidelity import HORIZONS, errors_by_start, rollouts
from worldmodel.diagnostics.holes import holes
from worldmodel.diagnostics.mlp_ensemble import MEMBERS, MlpWorld
from worldmodel.diagnostics.prior import prior
from worldmodel.diagnostics.usage import latents, reads_off
from worldmodel.envs.make import make_env
from worldmodel.storage.recording import Recording
from worldmodel.storage.rows import code
from worldmodel.storage.run import Run

EPISODES = 20
"""Greedy episodes of a return."""
HELD_OUT = 16
"""Held-out episodes: half of the model-free agent, with a random action in one step of five, half of random play."""
PLAN_EPISODES, PLAN_STEPS = 6, 60
"""Of the planner: episodes and their steps at most."""
SHORT = 20
"""Steps of a held-out episode, in the middle, below which the model sees CONTEXTS[0] rows rather than CONTEXTS[1]."""
CONTEXTS, HORIZON = (2, 5), 15

Figures = dict[str, float | None]


def work(job: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of one row: {"figures": {name: number}, ...}. The process computes on one thread."""
    torch.set_num_threads(1)
    plan = Plan.from_json(job["plan"])
    others: dict[str, Callable[..., dict[str, Any]]] = {
        "model-free": _model_free,
        "random policy": _random,
        "mlp ensemble": _mlp,
        "real simulator": _real,
    }
    return others.get(job["form"], _form)(plan, job, Path(job["folder"]) / code())


# What forms are held against ----------------------------------------------------------------------------------------------


def _model_free(plan: Plan, job: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The agent that learns in the environment; what it and a random one play is recorded."""
    config, seed = plan.config(), job["seed"]
    updates = round(plan.steps * config.train.ratio)
    since = time.perf_counter()
    model, met = play.model_free(config.env, plan.steps, updates, seed, prefill=plan.steps // 10)
    seconds = time.perf_counter() - since
    half = HELD_OUT // 2
    own = play.played(model, config.env, half, HELD_OUT_SEED, random=0.2, longest=play.LONGEST)
    other = play.played(None, config.env, half, HELD_OUT_SEED + half, longest=play.LONGEST)
    training, held_out = _files(folder, seed)
    training.parent.mkdir(parents=True, exist_ok=True)
    for file in (training, held_out):  # of a row that was stopped
        file.unlink(missing_ok=True)
    met.write(training)
    play.recorded(config.env, [episode for pair in zip(own, other) for episode in pair]).write(held_out)
    returns = _returns(model, config, FINAL_SEED)
    count = sum(p.numel() for p in model.policy.parameters())
    figures = {"return": statistics.fmean(returns), "updates": float(model._n_updates), "parameters": float(count)}
    return {"figures": {**figures, "seconds": round(seconds, 1)}, "algorithm": type(model).__name__}


def _random(plan: Plan, job: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    returns = _returns(None, plan.config(), FINAL_SEED + 1000 * job["seed"])
    return {"figures": {"return": statistics.fmean(returns)}}


def _returns(model: Any, config: Config, seed: int) -> list[float]:
    """Of greedy episodes, or of random play, cut where a form's are."""
    episodes = play.played(model, config.env, EPISODES, seed, longest=config.eval.max_steps)
    return [float(episode["rewards"].sum()) for episode in episodes]


def _mlp(plan: Plan, job: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Errors of PETS' ensemble of perceptrons, learned from the same rows."""
    training, held_out = (Recording.read(file) for file in _files(folder, job["seed"]))
    if [key.kind for key in training.obs_spec.keys.values()] != ["vector"]:
        return {"figures": {}, "skipped": "it knows observations of one vector only"}
    since = time.perf_counter()
    world = MlpWorld(training.obs_spec, training.action_spec, training.to_episodes(), job["seed"])
    seconds = time.perf_counter() - since
    played = held_out.to_episodes()
    mean = {world.name: world.moments[0][0][: world.size]}
    errors = errors_by_start(world, world, played, mean, _context(played), HORIZON, samples=MEMBERS)
    figures = {f"error at {h}": _root(errors.model[:, h - 1][errors.inside[:, h - 1]]) for h in HORIZONS}
    return {"figures": {**figures, "parameters": float(world.parameters), "seconds": round(seconds, 1)}}


def _root(squares: Tensor) -> float | None:
    """The root of the mean; None of nothing."""
    return float(f"{float(squares.double().mean().sqrt()):.5g}") if len(squares) else None


def _real(plan: Plan, job: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The planner in copies of the environment, where it can be copied."""
    env, codec = plan.config().env, Recording.read(_files(folder, job["seed"])[0]).action_spec
    one = make_env(env, 0, HELD_OUT_SEED)
    one.reset()
    fault = fault_of_copies(one, codec.decode(codec.sample(10, np.random.default_rng(0))))
    one.close()
    if fault is not None:
        return {"figures": {}, "skipped": f"the environment cannot be copied: {fault}"}
    returns = planned_returns(env, codec, None, job["seed"], PLAN_EPISODES, PLAN_STEPS)
    return {"figures": {"planned return": statistics.fmean(returns)}}


# A form -------------------------------------------------------------------------------------------------------------------


def _form(plan: Plan, job: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The figures of a form that is trained on the recorded experience; a row that was stopped goes on from its run folder."""
    sizes, seed = sized(plan, job["form"]), job["seed"]
    config = plan.config(job["form"], sizes)
    path = folder / "runs" / f"{job['form']}-s{seed}"
    trained = _trained(plan, job["form"], sizes, seed, path, _files(folder, seed)[0])
    with Run.open(path) as run:
        agent = run.agent("newest", device="cpu")
        world = agent.policy.world.eval()
        played = Recording.read(_files(folder, seed)[1]).to_episodes()
        evidence = gathered(world, str(path), replayed(run.replay()), played)
    figures = _measured(evidence, _context(played))
    figures["planned return"] = statistics.fmean(planned_returns(config.env, world.action, world, seed, PLAN_EPISODES, PLAN_STEPS))
    figures["return"] = statistics.fmean(evaluate(agent, config.env, EPISODES, FINAL_SEED, max_steps=config.eval.max_steps)[0])
    figures["parameters"] = float(sum(p.numel() for p in world.parameters()))
    figures["updates"] = float(agent.learner.updates)
    figures["seconds"] = round(trained, 1)
    figures["update"] = 1000 * trained / max(1, agent.learner.updates)
    return {"figures": {name: None if x is None else float(f"{x:.5g}") for name, x in figures.items()}}


def _trained(plan: Plan, form: str, sizes: list[str], seed: int, path: Path, data: Path) -> float:
    """Trains the run in a folder, or goes on with it; gives the seconds of training over all of its stops."""
    quiet = {"eval.every": 0, "eval.episodes": 1, "log.tensorboard": False, "log.pictures": 0}
    train = plan.config(form, sizes).train
    length: dict[str, Any] = {"train.steps": plan.steps}
    if plan.minutes is not None:  # all else is the same for every form, and so nothing else is chosen to fill the time
        length = {"train.minutes": plan.minutes, "train.ratio": train.ratio, "train.batch_size": train.batch_size}
    given = {**flat_overrides(plan.overrides), "model": form, **flat_overrides(sizes), **quiet, **length, "train.data": [str(data)]}
    with Signals() as signals:
        how = session.Session(signals, "cpu", False, False, False, print, print)
        if path.exists():
            return session.resumed(how, plan.env, path, {}, seed).wall_seconds
        return session.new(how, plan.env, path, given, seed).wall_seconds


def _measured(evidence: Evidence, context: int) -> Figures:
    """What a diagnosis says of fidelity, calibration, latents and likelihood."""
    sections = [
        rollouts(evidence, context, HORIZON, updates=0),
        latents(evidence),
        prior(evidence, "transition"),
        holes(evidence, "transition"),
        likelihood(evidence),
    ]
    if evidence.world.marginal is not None:
        sections.append(holes(evidence, "marginal"))
    found = {name: figure.value for section in sections for name, figure in section.figures.items()}
    figures = {name: found.get(title) for name, title in FIGURES.items()}
    rate = found.get("transition rate")
    if figures["likelihood"] is None and reads_off(evidence.world) and rate is not None:
        figures["likelihood"] = -rate  # of latents that are the observation the density itself is known
    return figures


FIGURES = {
    **{f"error at {h}": f"error at {h}" for h in HORIZONS},
    **{f"over persistence at {h}": f"error over persistence at {h}" for h in HORIZONS},
    "coverage at 5": "coverage of 90 % at 5",
    "spread over error at 5": "spread over error at 5",
    "active": "active variables",
    "rank": "effective rank",
    "regret": "transition_regret",
    "auc": "transition_auc",
    "hole mass": "transition hole mass",
    "marginal hole mass": "marginal hole mass",
    "likelihood": "transition likelihood",
    "bits": "transition bits",
}
"""Column of the table -> figure of a diagnosis."""


# Experience ---------------------------------------------------------------------------------------------------------------


def _files(folder: Path, seed: int) -> tuple[Path, Path]:
    """What is learned from, and what is held out."""
    return folder / "data" / f"seed-{seed}.npz", folder / "data" / f"seed-{seed}-held-out.npz"


def _context(played: Episodes) -> int:
    """Rows that the model sees before it dreams."""
    return CONTEXTS[int(float(played.lengths.double().median()) >= SHORT)]
