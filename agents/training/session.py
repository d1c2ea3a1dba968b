"""One run: make its agent, or reopen it from the newest checkpoint -> train -> result."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.logger import Logger

from worldmodel import config as configs
from worldmodel import registry
from worldmodel.agents.arguments import policy_name, read_config, with_masks
from worldmodel.agents.evaluation import FINAL_SEED, EvaluationAborted
from worldmodel.agents.loop import WorldModelAlgorithm
from worldmodel.agents.training import budget, offline, warm_start
from worldmodel.agents.training.callback import Progress, RunCallback, env_seed, standing
from worldmodel.agents.training.held_out_callback import HeldOutCallback
from worldmodel.agents.training.report import LineReport, ProgressBar, Scalars
from worldmodel.agents.training.signals import Interrupted, Signals
from worldmodel.agents.training.warm_start import Source
from worldmodel.config import Config
from worldmodel.envs.make import as_vec_env
from worldmodel.errors import ConfigError, CorruptError, EnvError
from worldmodel.spaces import ObsSpec
from worldmodel.storage.run import Run
from worldmodel.storage.run_folder import latest_default, refuse_existing

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """The result of a run.

    real_steps     training steps over all environments, random ones included; 0 on recorded experience
    updates        gradient updates of the world model
    wall_seconds   training alone, over all resumes; evaluation is in eval_seconds
    parameters     trainable parameters of world model and agent together
    solved_at      real steps of the first evaluation that reached the threshold and was confirmed; else None
    final_return   mean of the greedy episodes at the end, of the agent that was evaluated best; None on recorded experience
    final_episodes their number, with the environment's seeds 30,000, 30,001, ... (`worldmodel eval` plays the same)
    final_step     real steps of that agent's checkpoint; those of the newest where nothing was evaluated before (eval.every=0)
    newest_return  mean of the same episodes, of the newest agent: less than final_return where it has fallen since
    best           {step, mean_return, confirmation, episodes} as in best.json; None where nothing was evaluated before
    evaluations    [{real_steps, mean_return, std_return, episodes}]
    run            the run folder
    """

    env_id: str
    recipe: str | None
    seed: int
    threads: int
    real_steps: int
    updates: int
    wall_seconds: float
    eval_seconds: float
    parameters: int
    threshold: float | None
    solved_at: int | None
    final_return: float | None
    evaluations: list[dict[str, Any]]
    run: str
    final_episodes: int | None = None
    final_step: int | None = None
    newest_return: float | None = None
    best: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Session:
    """What belongs to this process and not to the run.

    progress  whether there is a progress bar; log, warn: where lines go
    started   time.perf_counter when it was asked for
    """

    signals: Signals
    device: str
    trust: bool
    keep_newer: bool
    progress: bool
    log: Callable[[str], object]
    warn: Callable[[str], object]
    started: float = field(default_factory=lambda: time.perf_counter())


def new(session: Session, recipe: Any, run_dir: str | Path | None, given: dict[str, Any], seed: int) -> TrainResult:
    """Trains a new run; `given` are dotted overrides of the recipe."""
    source, given = warm_start.source_of(recipe, given, session.trust)
    config = _configure(recipe, given, {})
    if run_dir is not None:
        refuse_existing(Path(run_dir))
    paced = config.train.minutes is not None and "train.ratio" not in given
    if config.train.minutes is not None:
        make = partial(make_agent, seed=seed, device=session.device, trust=session.trust)
        given = {**given, **budget.choose(partial(_configure, recipe, given), given, make, session.log)}
        config = _configure(recipe, given, {})
    agent = make_agent(config, seed, session.device, session.trust)  # before the folder: no folder of what cannot start
    with _closing_env(agent):
        progress = Progress(overrides=given, paced=paced)
        if source is not None:
            found = source.begin(agent, session.log)
            progress.overrides |= warm_start.act_at_once(agent, found, given, session.log)
        with Run.create(run_dir, agent.config, seed) as run:
            if source is not None:
                progress.warm_start = source.keep_rows(agent, run, found, session.log)
            source = None  # its agent and rows need not stay in memory
            return _train_run(session, run, agent, progress, seed)


def _configure(recipe: Any, given: Mapping[str, Any], chosen: Mapping[str, Any]) -> Config:
    return with_masks(read_config(recipe, {**given, **chosen}))


def resumed(session: Session, recipe: Any, run_dir: str | Path | None, given: dict[str, Any], seed: int | None) -> TrainResult:
    """Continues a run from its newest checkpoint; `run_dir` None: the latest default folder of the recipe."""
    path = Path(run_dir) if run_dir is not None else latest_default(Config.from_recipe(recipe, given), seed or 0)
    with Run.open(path, write=True) as run:
        manifest = run.manifest() or {}
        config = _resume_config(run, manifest, recipe, given, seed)
        seed = manifest.get("seed", seed or 0)
        result = run.result
        if result is not None and _is_finished(config, result, manifest):
            session.log(f"{run.path} is finished; --steps may make it longer.")
            return TrainResult(**result)
        source = None if run.checkpoints else Source.of(config.train, session.trust)  # else they hold its weights
        agent = _agent_for_resume(session, run, config, seed, given)
        with _closing_env(agent):
            state = run.resume(agent, keep_newer=session.keep_newer, log=session.log)
            run.write_config(config)
            run.write_result(None)
            progress = Progress(**state) if state is not None else Progress(overrides=given)
            if source is not None:
                progress.warm_start = source.keep_rows(agent, run, source.begin(agent, session.log), session.log)
                source = None
            if result is not None:  # the evaluation at the end came after the last checkpoint
                progress.wall_seconds, progress.eval_seconds = result["wall_seconds"], result["eval_seconds"]
            session.log(f"{run.path} goes on at {standing(agent)}.")
            return _train_run(session, run, agent, progress, seed)


def _agent_for_resume(session: Session, run: Run, config: Config, seed: int, given: Mapping[str, Any]) -> WorldModelAlgorithm:
    if not (config.train.data and run.checkpoints):
        return make_agent(config, seed, session.device, session.trust)
    torch.set_num_threads(config.train.threads)
    return offline.agent_for_resume(run, config, seed, session.device, session.trust, check="train.data" in given)


def _closing_env(agent: WorldModelAlgorithm) -> AbstractContextManager:
    return nullcontext() if agent.env is None else closing(agent.env)


def _is_finished(config: Config, result: Mapping[str, Any], manifest: Mapping[str, Any]) -> bool:
    """Whether no steps are left, and the checkpoint of the last one is still there."""
    solved = config.eval.stop_when_solved and result["solved_at"] is not None
    committed = manifest.get("step", -1)
    reached = committed if config.train.data else result["real_steps"]
    return (solved or reached >= config.train.steps) and committed >= result["real_steps"]


def _resume_config(run: Run, manifest: Mapping[str, Any], recipe: Any, given: dict[str, Any], seed: int | None) -> Config:
    """The run's config, perhaps with more steps. ConfigError that lists every other difference from the config asked for."""
    before = run.config.in_new_names(manifest.get("progress", {}).get("overrides", {}))
    found = {"env.action_masks": run.config.env.action_masks}  # as the run began, whatever a look would find now
    before = {key: value for key, value in before.items() if key.removesuffix(".kind") not in given or key in given}
    asked = read_config(recipe, {**found, **before, **given}) if recipe is not None else run.config.override(given)
    free = ("eval.", "env.names")
    length = "train.steps", "train.minutes"
    differs = [
        entry for entry in configs.differences(run.config, asked) if entry[0] not in length and not entry[0].startswith(free)
    ]
    if seed is not None and seed != manifest.get("seed", seed):
        differs.append(("seed", manifest["seed"], seed))
    steps, minutes = _length_for_resume(run.config, manifest.get("progress", {}), manifest.get("step", 0), given)
    if steps < run.config.train.steps:
        differs.append(("train.steps", run.config.train.steps, steps))
    if differs:
        lines = "\n".join(f"  {key}: {old} -> {new}" for key, old, new in differs)
        raise ConfigError(
            f"{run.path} was made with other options; on resume only eval.*, env.names, --steps and --minutes may change, and "
            f"steps only grow:\n{lines}\n"
            "Leave them out, or start a new run with another --run."
        )
    changed = {key: value for key, value in given.items() if key.partition(".")[0] == "eval"}
    if any(key.partition(".")[0] == "env" for key in given):
        changed["env.names"] = asked.env.model_dump(mode="json")["names"]
    return run.config.override({**changed, "train.steps": steps, "train.minutes": minutes})


def _length_for_resume(
    config: Config, progress: Mapping[str, Any], step: int, given: Mapping[str, Any]
) -> tuple[int, float | None]:
    """(train.steps, train.minutes) of a run that goes on: more steps have no limit of time, and more time has more steps."""
    steps, minutes = config.train.steps, config.train.minutes
    if "train.minutes" in given:
        minutes = given["train.minutes"]
        spent = progress.get("wall_seconds", 0.0) + progress.get("eval_seconds", 0.0)
        if minutes is not None and spent and minutes != config.train.minutes:
            steps = max(steps, round(step * 60 * minutes / spent))
    elif given.get("train.steps", steps) > steps:
        minutes = None
    return given.get("train.steps", steps), minutes


def make_agent(config: Config, seed: int, device: str = "auto", trust: bool = False) -> WorldModelAlgorithm:
    """A new agent of the config's kind with its training environments, or with the experience of `train.data` instead."""
    train = config.train
    torch.set_num_threads(train.threads)
    if train.data:
        return offline.make_agent(config, seed, device, trust)
    reached, needed = train.steps // config.env.num_envs + 1, train.burn_in + train.batch_length
    if reached < needed:
        raise ConfigError(
            f"The run ends with {reached} rows of each of {config.env.num_envs} environments in the replay, but one sequence needs "
            f"{needed}. Raise --steps (now {train.steps}), or lower train.batch_length (now {train.batch_length})."
        )
    algorithm = registry.part("agent", config.agent.kind)
    venv = as_vec_env(config.env, seed=seed)
    try:
        policy = policy_name(ObsSpec.from_space(venv.observation_space, config.env.layout))
        return algorithm(policy, venv, config=config, seed=seed, device=device, trust=trust)
    except BaseException:
        venv.close()
        raise


def _train_run(session: Session, run: Run, agent: WorldModelAlgorithm, progress: Progress, seed: int) -> TrainResult:
    """Trains from the agent's step to the end of the run. Raises Interrupted after a signal, with everything saved."""
    config = run.config
    report = (ProgressBar if session.progress else LineReport)(session.log, config.train.steps)
    agent.replay_folder = run.replay_folder
    if config.train.steps <= config.train.prefill and not config.train.data:
        session.warn(
            f"Nothing will be learned: the run ends after {config.train.steps} steps, and the first {config.train.prefill} are "
            f"random ones, only collected. Take more than {config.train.prefill} --steps, or lower train.prefill."
        )
    run_callback = RunCallback(run, progress, session.signals, report, seed, session.warn, started=session.started)
    outputs = [Scalars(run.path, agent.num_timesteps, session.warn)] if config.log.tensorboard else []
    agent.set_logger(Logger(str(run.path), outputs))
    run_callback.init_callback(agent)
    callbacks: list[BaseCallback] = [run_callback]
    if config.log.tensorboard and config.log.pictures and not config.train.data:
        should_abort = partial(run_callback.asked, "looking at held-out episodes")
        callbacks.append(HeldOutCallback(config.log.pictures, episodes=config.log.held_out, should_abort=should_abort))
    callback = CallbackList(callbacks)
    try:
        run_callback.save(fenced=config.checkpoint.fence and agent.num_timesteps == 0)
        run_callback.run_updates()
        goes_on = run_callback.evaluate_if_due()
        run_callback.save()  # what was evaluated, which pending updates may have changed
        if goes_on and agent.num_timesteps < config.train.steps and not session.signals:
            if config.train.data:
                offline.learn(agent, config.train.steps, callback, report.say)
            else:
                agent.restart_episodes(env_seed(seed, agent.num_timesteps))
                agent.learn(config.train.steps - agent.num_timesteps, callback, config.log.every, reset_num_timesteps=False)
        if run_callback.is_late and agent.num_timesteps < config.train.steps:
            session.log(f"step {agent.num_timesteps}: the time of train.minutes is over.")
            run.write_config(config.override({"train.steps": max(1, agent.num_timesteps)}))
        run_callback.save()
        if not session.signals:
            return _final_result(session, run, agent, run_callback, seed)
    except EvaluationAborted:
        pass
    except EnvError:
        run_callback.save()
        if not session.signals:  # else it may come from the signal, which ends the environments' processes too
            raise
    finally:
        report.close()
        agent.logger.close()
    name, command = signal.Signals(session.signals.received).name, run.resume_command(session.device, session.trust)
    text = f"{name}: stopped at {standing(agent)}, saved in {run.path}. Go on with:\n  {command}"
    raise Interrupted(session.signals.received, text)


def _final_returns(session: Session, run: Run, agent: WorldModelAlgorithm, run_callback: RunCallback) -> tuple[int, float, float]:
    """(step of the best agent, its final return, the newest agent's)."""

    def final(agent: WorldModelAlgorithm) -> float:
        return float(np.mean(run_callback.measure(run.config.eval.episodes, FINAL_SEED, agent)))

    best, newest = run_callback.progress.best, final(agent)
    if best is None or best.step == agent.num_timesteps:
        return agent.num_timesteps, newest, newest
    try:
        other = run.agent(best.step, device=agent.device, trust=session.trust)
    except (ConfigError, CorruptError) as error:
        session.warn(f"The best agent, of step {best.step}, cannot be opened; the final return is the newest one's. {error}")
        return agent.num_timesteps, newest, newest
    returned = final(other)
    last = agent.num_timesteps
    session.log(f"Final return {returned:.1f} of the best agent, of step {best.step}; {newest:.1f} of the newest, of step {last}.")
    return best.step, returned, newest


def _final_result(session: Session, run: Run, agent: WorldModelAlgorithm, run_callback: RunCallback, seed: int) -> TrainResult:
    is_offline, progress = run_callback.is_offline, run_callback.progress
    final = final_step = newest = None
    if not is_offline:
        final_step, final, newest = _final_returns(session, run, agent, run_callback)
    result = TrainResult(
        env_id=run.config.env.id,
        recipe=run.config.recipe,
        seed=seed,
        threads=run.config.train.threads,
        real_steps=0 if is_offline else agent.num_timesteps,
        updates=agent.learner.updates,
        wall_seconds=progress.wall_seconds,
        eval_seconds=progress.eval_seconds,
        parameters=agent.parameter_count,
        threshold=run_callback.threshold,
        solved_at=progress.solved_at,
        final_return=final,
        evaluations=progress.evaluations,
        run=str(run.path),
        final_episodes=None if is_offline else run.config.eval.episodes,
        final_step=final_step,
        newest_return=newest,
        best=None if progress.best is None else progress.best.to_json(),
    )
    run.write_result(result.to_json())
    return result
