"""`train`: a recipe in, a run folder and a result out; stopped and resumed at any step."""

from __future__ import annotations

import logging
import math
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.logger import Logger

from worldmodel import config as configs
from worldmodel import registry
from worldmodel import run as runs
from worldmodel.agents import offline, resources
from worldmodel.agents.evaluation import (
    CONFIRMATION_SEED,
    EVALUATION_SEED,
    FINAL_SEED,
    Abandoned,
    EvalConfig,
    cut_at,
    evaluate,
    threshold,
)
from worldmodel.agents.loop import WorldModelAlgorithm, policy_name
from worldmodel.agents.report import Bar, Lines, Scalars
from worldmodel.agents.signals import Interrupted, Signals
from worldmodel.agents.watch import Watch
from worldmodel.config import Config, Frozen
from worldmodel.envs.make import as_vec_env
from worldmodel.errors import ConfigError, EnvError, StorageError
from worldmodel.registry import register
from worldmodel.run import Run
from worldmodel.spaces import ObsSpec

__all__ = ["EvalConfig", "Interrupted", "LogConfig", "TrainResult", "evaluate", "train"]
_log = logging.getLogger(__name__)


@register("group", "log")
class LogConfig(Frozen):
    """What is written while training."""

    every: int = Field(4, ge=1, description="episodes between log entries")
    tensorboard: bool = Field(True, description="event files in the run folder")
    pictures: int = Field(500, ge=0, description="real steps between looks at held-out episodes, and one at the end; 0: none")
    held_out: int = Field(8, ge=1, description="episodes of each look")


@dataclass(frozen=True)
class TrainResult:
    """What a run came to; `real_steps` counts training steps over all environments, random ones included.

    updates        gradient updates of the world model
    wall_seconds   training alone, over all resumes; evaluation is in eval_seconds
    parameters     numbers that gradients change, of world model and agent together
    solved_at      real steps of the first evaluation that reached the threshold and was confirmed; else None
    final_return   mean of the greedy episodes at the end; None where there was no environment to play them in
    final_episodes how many they were: the environment's seeds 30,000, 30,001, ... (`worldmodel eval` plays the same)
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

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


# One run --------------------------------------------------------------------------------------------------------------


@dataclass
class Progress:
    """What a run has done besides learning; part of every checkpoint."""

    overrides: dict[str, Any] = field(default_factory=dict)
    wall_seconds: float = 0.0
    eval_seconds: float = 0.0
    evaluated: int = 0
    solved_at: int | None = None
    evaluations: list[dict[str, Any]] = field(default_factory=list)


class Keeper(BaseCallback):
    """Evaluates, confirms, checkpoints and stops; asked after every round of real steps."""

    def __init__(
        self, run: Run, progress: Progress, signals: Signals, report: Lines, seed: int, warn: Callable[[str], object] = _log.warning
    ):
        super().__init__()
        self.run, self.config, self.seed = run, run.config, seed
        self.progress, self.signals, self.report, self.warn = progress, signals, report, warn
        self.recorded = bool(self.config.train.data)  # then there is no environment
        self.goal = self.config.eval.threshold if self.recorded else threshold(self.config.eval, self.config.env.id)
        self._clock: float | None = None
        self._failed = self._failed_in_a_row = 0

    def _init_callback(self) -> None:
        self.model.go_on = lambda: not self.asked()

    def asked(self, doing: str | None = None) -> bool:
        """Whether the process is asked to end; whoever asks also shows that the run is alive, `doing` what is no training."""
        self.report.alive(self.model, doing)
        return bool(self.signals)

    def _on_training_start(self) -> None:
        resources.tell(self.model, self.run, self.warn)
        if not self.recorded and math.isfinite(limit := cut_at(self.model.env, self.config.eval.max_steps)):
            self.report.say(
                f"Episodes of evaluations are cut after {limit:,} steps: {self.config.env.id} "
                "may have no limit of its own. eval.max_steps sets another."
            )
        self._clock = time.perf_counter()
        self.report.start(self.model)

    def _on_step(self) -> bool:
        self.report.alive(self.model)
        step, every = self.model.num_timesteps, self.config.checkpoint.every
        goes_on = self.evaluate_if_due() and not self.signals
        due = every and step // every > (step - self.model.n_envs) // every
        if due or self.progress.evaluated == step:  # an evaluation's own is no fence: that would cut episodes at every one
            fence = self.config.checkpoint.fence and due
            self.save_on_the_way(fenced=fence and not self.model.owes)
            if fence and not self.recorded and goes_on and step < self.config.train.steps:
                self.model.reopen(env_seed(self.seed, step))
        elif (flush := self.config.checkpoint.flush) and step // flush > (step - self.model.n_envs) // flush and not self.recorded:
            self._flush()
        return goes_on

    def pay(self) -> None:
        """The updates that a signal left owed, before their step is evaluated as if they had been made."""
        model = self.model
        if model.num_timesteps and model.owes and not self.signals:
            self._clock = time.perf_counter()
            model._update_current_progress_remaining(model.num_timesteps, self.config.train.steps)
            model.pay()
            self.tick()

    def evaluate_if_due(self) -> bool:
        """False where the run is solved and shall end."""
        step, every = self.model.num_timesteps, 0 if self.recorded else self.config.eval.every
        if every and step // every > self.progress.evaluated // every:
            try:
                self._evaluate(step)
            except Abandoned:  # it is made up for on resume
                return False
        return not (self.config.eval.stop_when_solved and self.progress.solved_at is not None)

    def _evaluate(self, step: int) -> None:
        episodes = self.config.eval.episodes
        returns = self.measure(episodes, EVALUATION_SEED)
        mean = float(np.mean(returns))
        note = ""
        if self.goal is not None and mean >= self.goal and self.progress.solved_at is None:
            confirmed = float(np.mean(self.measure(episodes, CONFIRMATION_SEED)))
            note = f"  confirmed by {confirmed:.1f}: solved" if confirmed >= self.goal else f"  not confirmed ({confirmed:.1f})"
            self.progress.solved_at = step if confirmed >= self.goal else None
        row = {"real_steps": step, "mean_return": mean, "std_return": float(np.std(returns)), "episodes": episodes}
        self.progress.evaluations.append(row)
        self.progress.evaluated = step
        self.model.logger.record("eval/mean_reward", mean)
        self.model.logger.dump(step)
        self.report.evaluated(self.model, row, note)

    def measure(self, episodes: int, seed: int) -> list[float]:
        """Returns of greedy episodes; their time counts as evaluation."""
        self.tick()
        started = time.perf_counter()
        try:
            most = self.config.eval.max_steps
            asked = partial(self.asked, "evaluating")
            return evaluate(self.model, self.config.env, episodes, seed, max_steps=most, give_up=asked)[0]
        finally:
            self.progress.eval_seconds += time.perf_counter() - started
            if self._clock is not None:
                self._clock = time.perf_counter()

    def tick(self) -> None:
        """Training time goes on the account up to now; what comes before the first step is no training."""
        if self._clock is not None:
            now = time.perf_counter()
            self.progress.wall_seconds += now - self._clock
            self._clock = now

    def save(self, fenced: bool = False) -> None:
        """Commits this step, unless it is; `fenced` where all that follows begins with `reopen`."""
        self.tick()
        self.run.save(self.model, asdict(self.progress), fenced=fenced)

    def save_on_the_way(self, fenced: bool = False) -> None:
        """`save`, where a disk that says no is told, and tried again at the next checkpoint, but not for ever."""
        limit = self.config.checkpoint.failures
        try:
            self.save(fenced)
            self._failed_in_a_row = 0
        except StorageError as error:
            self._failed += 1
            self._failed_in_a_row += 1
            if self._failed_in_a_row >= limit:
                raise
            self.warn(
                f"The checkpoint at {_step(self.model)} could not be saved ({self._failed_in_a_row} in a row; at {limit} the run "
                f"stops): {error} Training goes on; the next try is {self.config.checkpoint.every} steps later."
            )
        self.model.logger.record("checkpoint/failed", self._failed)

    def _flush(self) -> None:
        """The experience so far goes to the disk; where that cannot be, the next checkpoint says whether it is for long."""
        try:
            self.run.flush(self.model)
        except StorageError as error:
            self.warn(f"The experience at {_step(self.model)} could not be written: {error}")


def env_seed(seed: int, step: int) -> int:
    """Seed of the first environment from a checkpoint on; environment i gets this + i."""
    return seed if step == 0 else int(np.random.SeedSequence([seed, step]).generate_state(1)[0])


def train(
    recipe: str | Path | Mapping | None,
    steps: int | None = None,
    seed: int | None = None,
    run_dir: str | Path | None = None,
    overrides: Mapping[str, Any] | Sequence[str] | None = None,
    device: str = "auto",
    resume: bool = False,
    keep_newer: bool = False,
    progress: bool = False,
    log: Callable[[str], object] | None = None,
    data: str | Path | Run | Sequence[str | Path | Run] | None = None,
    trust: bool = False,
) -> TrainResult:
    """Train what a recipe (name, path, gym id or content) describes; everything is kept in a run folder.

    recipe      with resume also a run folder, whose recipe and options it goes on with
    steps       real steps of the whole run (default: the recipe's train.steps); on resume it may grow
    seed        of environments, weights and draws (default 0; on resume the run's own)
    run_dir     default runs/<recipe>-s<seed>, with a number behind it if that exists
    overrides   dotted keys: {"train.ratio": 2.0} or ["train.ratio=2"]; on resume those that are left out stay as they were
    resume      goes on from the newest good checkpoint; the result of a finished run is given back
    keep_newer  on resume, keeps replay rows that are newer than the checkpoint
    progress    a progress bar on stderr, else lines for `log`: one at each evaluation, and one every 30 s in which there was none
    log         gets these lines and warnings; without it they go to Python's logging, as info and as warnings, and the lines to
                stderr where that is set to show no info (it is not unless somebody asks for it)
    data        recorded experience to learn from: .npz files, folders of them, "minari:ID", runs. Then no environment is made:
                `train.pretrain` updates of the world model, then train.steps * train.ratio of all; nothing is evaluated
    trust       files that options name may be opened although that can run code: agent.path, a zip of Stable-Baselines3

    Exact on resume, on the same device and thread count: weights, optimisers, running statistics, replay (up to the
    checkpoint), counters, the ratio's remainder and all random states. Not exact: the environments. They are reset with
    seeds that follow from (seed, step), and the open episode of each is closed like a truncated one, so a resumed run is
    another run of equal standing. With checkpoint.fence=true every checkpoint of checkpoint.every does the same to the
    unbroken run, and the two are equal bit for bit, as far as the environment is determined by its reset seed.

    SIGINT, SIGTERM and SIGHUP finish the step, save and raise Interrupted (a KeyboardInterrupt); a second one aborts.
    Raises ConfigError, UnsupportedSpaceError, MissingExtraError, TrustError, EnvError (the state is saved first), StorageError
    and NumericsError (the last good checkpoint stays).
    """
    if not isinstance(recipe, str | Path | Mapping | None):
        raise ConfigError(
            f"recipe is a {type(recipe).__name__}; expected a name, a path, a gym id or a mapping. An environment that is an "
            "object is for Dreamer('MlpPolicy', env)."
        )
    given = _as_mapping(overrides)
    if steps is not None:
        if given.get("train.steps", steps) != steps:
            raise ConfigError(f"steps={steps} and train.steps={given['train.steps']} differ. Give one of them.")
        given["train.steps"] = steps
    if data is not None:
        sources = _as_sources(data)
        if list(given.get("train.data", sources)) != sources:
            raise ConfigError(f"data={sources} and train.data={given['train.data']} differ. Give one of them.")
        given["train.data"] = sources
    if seed is not None and seed < 0:
        raise ConfigError(f"seed is {seed}; expected at least 0.")
    recipe, run_dir = runs.run_first(recipe, run_dir, resume)
    threads = torch.get_num_threads()
    try:
        with Signals() as signals:
            session = _Session(signals, device, trust, keep_newer, progress, log or _tell, log or _log.warning)
            if resume:
                return _resumed(session, recipe, run_dir, given, seed)
            return _new(session, recipe, run_dir, given, seed or 0)
    finally:
        torch.set_num_threads(threads)


def _tell(text: str) -> None:
    if _log.isEnabledFor(logging.INFO):
        _log.info(text)
    else:
        print(text, file=sys.stderr, flush=True)


@dataclass
class _Session:
    """How this process trains, whatever the run."""

    signals: Signals
    device: str
    trust: bool
    keep_newer: bool
    progress: bool
    log: Callable[[str], object]
    warn: Callable[[str], object]


def _new(session: _Session, recipe: Any, run_dir: str | Path | None, given: dict[str, Any], seed: int) -> TrainResult:
    config = Config.from_recipe(recipe, given)
    if run_dir is not None:
        runs.refuse_existing(Path(run_dir))
    agent = make_agent(config, seed, session.device, session.trust)  # before the folder: what cannot start leaves nothing behind
    try:
        with Run.create(run_dir, config, seed) as run:
            return _go_on(session, run, agent, Progress(overrides=_lasting(given)), seed)
    finally:
        _close(agent)


def _resumed(session: _Session, recipe: Any, run_dir: str | Path | None, given: dict[str, Any], seed: int | None) -> TrainResult:
    path = Path(run_dir) if run_dir is not None else runs.latest_default(Config.from_recipe(recipe, given), seed or 0)
    with Run.open(path, write=True) as run:
        manifest = run.manifest() or {}
        config = _agreed(run, manifest, recipe, given, seed)
        seed = manifest.get("seed", seed or 0)
        result = run.result
        if result is not None and _is_finished(config, result, manifest):
            session.log(f"{run.path} is finished; --steps may make it longer.")
            return TrainResult(**result)
        if config.train.data and run.checkpoints:
            torch.set_num_threads(config.train.threads)
            agent = offline.reopened(run, config, seed, session.device, session.trust, check="train.data" in given)
        else:
            agent = make_agent(config, seed, session.device, session.trust)
        try:
            state = run.resume(agent, keep_newer=session.keep_newer, log=session.log)
            run.write_config(config)
            run.write_result(None)
            progress = Progress(**state) if state is not None else Progress(overrides=_lasting(given))
            if result is not None:  # the evaluation at the end came after the last checkpoint
                progress.wall_seconds, progress.eval_seconds = result["wall_seconds"], result["eval_seconds"]
            session.log(f"{run.path} goes on at {_step(agent)}.")
            return _go_on(session, run, agent, progress, seed)
        finally:
            _close(agent)


def _close(agent: WorldModelAlgorithm) -> None:
    if agent.env is not None:
        agent.env.close()


def _step(agent: WorldModelAlgorithm) -> str:
    """Where an agent stands, in words; on recorded experience it takes no real steps."""
    return f"{'' if agent.config.train.data else 'real '}step {agent.num_timesteps}"


def _lasting(given: Mapping[str, Any]) -> dict[str, Any]:
    """The overrides that a resume need not repeat."""
    return {key: value for key, value in given.items() if key != "train.steps"}


def _is_finished(config: Config, result: Mapping[str, Any], manifest: Mapping[str, Any]) -> bool:
    """Whether nothing is left to do, and what was reached is still there."""
    solved = config.eval.stop_when_solved and result["solved_at"] is not None
    committed = manifest.get("step", -1)
    reached = committed if config.train.data else result["real_steps"]
    return (solved or reached >= config.train.steps) and committed >= result["real_steps"]


def _agreed(run: Run, manifest: Mapping[str, Any], recipe: Any, given: dict[str, Any], seed: int | None) -> Config:
    """The run's config, perhaps with more steps. ConfigError that lists every other difference from what is asked for now."""
    before = manifest.get("progress", {}).get("overrides", {})
    asked = Config.from_recipe(recipe, {**before, **given}) if recipe is not None else run.config.override(given)
    differs = [row for row in configs.differences(run.config, asked) if row[0] != "train.steps" and not row[0].startswith("eval.")]
    if seed is not None and seed != manifest.get("seed", seed):
        differs.append(("seed", manifest["seed"], seed))
    steps = given.get("train.steps", run.config.train.steps)
    if steps < run.config.train.steps:
        differs.append(("train.steps", run.config.train.steps, steps))
    if differs:
        lines = "\n".join(f"  {key}: {old} -> {new}" for key, old, new in differs)
        raise ConfigError(
            f"{run.path} was made with other options; on resume only eval.* and --steps may change, and steps only grow:\n{lines}\n"
            "Leave them out, or start a new run with another --run."
        )
    evaluation = {key: value for key, value in given.items() if key.partition(".")[0] == "eval"}
    return run.config.override({**evaluation, "train.steps": steps})


def _as_mapping(overrides: Mapping[str, Any] | Sequence[str] | None) -> dict[str, Any]:
    """Overrides as {dotted key: value}."""
    if overrides is None or isinstance(overrides, Mapping):
        return dict(overrides or {})
    if isinstance(overrides, str):
        raise ConfigError(f"overrides must be a list of words or a mapping, not the one word '{overrides}'. Write ['{overrides}'].")
    out: dict[str, Any] = {}
    for text in overrides:
        key = text.partition("=")[0].strip()
        value: Any = configs.parse_override(text)
        for step in key.split("."):
            value = value[step]
        if key in out:
            raise ConfigError(f"'{key}' is given twice, as {out[key]!r} and as {value!r}. Keep one.")
        out[key] = value
    return out


def _as_sources(data: Any) -> list[str]:
    """Names of recorded experience, as a config keeps them."""
    given = [data] if isinstance(data, (str, Path, Run)) else list(data)
    if not given:
        raise ConfigError("data is empty. Expected at least one .npz file, folder of them, minari:ID or run; or leave it out.")
    odd = [type(item).__name__ for item in given if not isinstance(item, (str, Path, Run))]
    if odd:
        raise ConfigError(f"data holds a {odd[0]}; expected names of files, folders, runs or minari:ID. Write it to a file first.")
    return [str(item.path if isinstance(item, Run) else item) for item in given]


def make_agent(config: Config, seed: int, device: str = "auto", trust: bool = False) -> WorldModelAlgorithm:
    """A new agent of the config's kind with its training environments, or with the experience of `train.data` and none."""
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


def _go_on(session: _Session, run: Run, agent: WorldModelAlgorithm, progress: Progress, seed: int) -> TrainResult:
    """From where the agent is to the end of the run."""
    config = run.config
    report = (Bar if session.progress else Lines)(session.log, config.train.steps)
    agent.replay_folder = run.replay_folder
    if config.train.steps <= config.train.prefill and not config.train.data:
        session.warn(
            f"Nothing will be learned: the run ends after {config.train.steps} steps, and the first {config.train.prefill} are "
            f"random ones, only collected. Take more than {config.train.prefill} --steps, or lower train.prefill."
        )
    keeper = Keeper(run, progress, session.signals, report, seed, session.warn)
    outputs = [Scalars(run.path, agent.num_timesteps, session.warn)] if config.log.tensorboard else []
    agent.set_logger(Logger(str(run.path), outputs))
    keeper.init_callback(agent)
    watch = _watch(config, keeper)
    callback = keeper if watch is None else CallbackList([keeper, watch])
    try:
        keeper.save(fenced=config.checkpoint.fence and agent.num_timesteps == 0)
        keeper.pay()
        if keeper.evaluate_if_due() and agent.num_timesteps < config.train.steps and not session.signals:
            if config.train.data:
                offline.learn(agent, config.train.steps, callback, report.say)
            else:
                agent.reopen(env_seed(seed, agent.num_timesteps))
                agent.learn(config.train.steps - agent.num_timesteps, callback, config.log.every, reset_num_timesteps=False)
        keeper.save()
        if session.signals:
            raise _interrupted(session, run, agent)
        return _finished(run, agent, keeper, seed)
    except Abandoned:
        raise _interrupted(session, run, agent) from None
    except EnvError as error:
        keeper.save()
        if session.signals:  # a signal to the whole group also ends the environments' processes
            raise _interrupted(session, run, agent) from error
        raise
    finally:
        report.close()
        agent.logger.close()


def _watch(config: Config, keeper: Keeper) -> Watch | None:
    """The callback that shows held-out episodes; None where nothing would be written, or there is nothing to play in."""
    if not (config.log.tensorboard and config.log.pictures) or config.train.data:
        return None
    return Watch(config.log.pictures, episodes=config.log.held_out, give_up=partial(keeper.asked, "looking at held-out episodes"))


def _interrupted(session: _Session, run: Run, agent: WorldModelAlgorithm) -> Interrupted:
    name = signal.Signals(session.signals.received).name
    command = run.resume_command(session.device, session.trust)
    text = f"{name}: stopped at {_step(agent)}, saved in {run.path}. Go on with:\n  {command}"
    return Interrupted(session.signals.received, text)


def _finished(run: Run, agent: WorldModelAlgorithm, keeper: Keeper, seed: int) -> TrainResult:
    recorded = keeper.recorded
    final = None if recorded else float(np.mean(keeper.measure(run.config.eval.episodes, FINAL_SEED)))
    progress = keeper.progress
    result = TrainResult(
        env_id=run.config.env.id,
        recipe=run.config.recipe,
        seed=seed,
        threads=run.config.train.threads,
        real_steps=0 if recorded else agent.num_timesteps,
        updates=agent.learner.updates,
        wall_seconds=progress.wall_seconds,
        eval_seconds=progress.eval_seconds,
        parameters=agent.parameter_count,
        threshold=keeper.goal,
        solved_at=progress.solved_at,
        final_return=final,
        evaluations=progress.evaluations,
        run=str(run.path),
        final_episodes=None if recorded else run.config.eval.episodes,
    )
    run.write_result(result.to_json())
    return result
