"""`RunCallback`: evaluation, confirmation, checkpoints and the end of a run, as a callback of SB3."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback

from worldmodel.agents.evaluation import CONFIRMATION_SEED, EVALUATION_SEED, EvaluationAborted, episode_limit, evaluate, threshold
from worldmodel.agents.exploration import ENOUGH
from worldmodel.agents.loop import WorldModelAlgorithm
from worldmodel.agents.training import resources
from worldmodel.agents.training.budget import Pace
from worldmodel.agents.training.report import LineReport
from worldmodel.agents.training.signals import Signals
from worldmodel.errors import StorageError
from worldmodel.storage.best import Best
from worldmodel.storage.run import Run

_log = logging.getLogger(__name__)
EXPLORED = 10_000
"""Steps without a find after which a warning is due."""


@dataclass
class Progress:
    """What a run has done besides updates; part of every checkpoint.

    overrides   the options that a resume need not repeat
    best        the best evaluation so far
    paced       whether updates a step follow the clock (train.minutes without a train.ratio that was asked for)
    warm_start  what was taken of another run (`warm_start.Transfer.to_json`); None: nothing was to be
    """

    overrides: dict[str, Any] = field(default_factory=dict)
    wall_seconds: float = 0.0
    eval_seconds: float = 0.0
    evaluated: int = 0
    solved_at: int | None = None
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    best: Best | None = None
    warm_start: dict[str, Any] | None = None
    paced: bool = False

    def __post_init__(self) -> None:
        self.overrides = {key: value for key, value in self.overrides.items() if key != "train.steps"}


class RunCallback(BaseCallback):
    """Evaluates, saves checkpoints and stops the run; called after every round of real steps."""

    def __init__(
        self,
        run: Run,
        progress: Progress,
        signals: Signals,
        report: LineReport,
        seed: int,
        warn: Callable[[str], object] = _log.warning,
        *,
        started: float,
    ):
        super().__init__()
        self.run, self.config, self.seed = run, run.config, seed
        self.progress, self.signals, self.report, self.warn = progress, signals, report, warn
        self.is_offline = bool(self.config.train.data)  # then there is no environment
        self.threshold = self.config.eval.threshold if self.is_offline else threshold(self.config.eval, self.config.env.id)
        self._started = started  # when this process began its part of the run, in seconds of time.perf_counter
        self._pace: Pace | None = None
        self._clock: float | None = None
        self._failed = self._failed_in_a_row = 0
        self._explored: int | None = None  # episodes that had found something when it was last said
        self._saved_best = progress.best

    def _init_callback(self) -> None:
        if self.config.train.minutes is not None:
            before = self.progress.wall_seconds + self.progress.eval_seconds
            self._pace = Pace(self.model, self._started - before, self.progress.paced)
        self.model.should_continue = lambda: not self.asked() and not self.is_late

    @property
    def is_late(self) -> bool:
        """Whether `train.minutes` leave no time but for the evaluation at the end."""
        return self._pace is not None and self._pace.is_over

    def asked(self, doing: str | None = None) -> bool:
        """Whether a signal asks the process to end. Also reports progress; `doing` names what is not training."""
        self.report.alive(self.model, doing)
        return bool(self.signals)

    def _on_training_start(self) -> None:
        resources.warn_if_large(self.model, self.run, self.warn)
        if not self.is_offline and math.isfinite(limit := episode_limit(self.model.env, self.config.eval.max_steps)):
            self.report.say(
                f"Episodes of evaluations are cut after {limit:,} steps: {self.config.env.id} "
                "may have no limit of its own. eval.max_steps sets another."
            )
        self._clock = time.perf_counter()
        self.report.start(self.model)

    def _on_step(self) -> bool:
        self.report.alive(self.model)
        self._report_exploration()
        options, step = self.config.checkpoint, self.model.num_timesteps
        goes_on = self._goes_on()
        due = self._passed(options.every)
        if due or self.progress.evaluated == step:
            fence = options.fence and due  # not at an evaluation's checkpoint: episodes would be cut at every one
            self.try_save(fenced=fence and not self.model.has_pending_updates)
            if fence and not self.is_offline and goes_on and step < self.config.train.steps:
                self.model.restart_episodes(env_seed(self.seed, step))
        elif not self.is_offline and self._passed(options.flush):
            try:
                self.run.flush(self.model)
            except StorageError as error:  # the next checkpoint raises it if it lasts
                self.warn(f"The experience at {standing(self.model)} could not be written: {error}")
        return goes_on

    def _goes_on(self) -> bool:
        """Evaluates if that is due. False where the run ends: by a signal, solved, or out of time."""
        if self._pace is not None:
            self._pace.adjust(self.config.eval.every)
        return not self.is_late and self.evaluate_if_due() and not self.signals

    def _report_exploration(self) -> None:
        """A line where exploration begins, finds something, or has found nothing for another EXPLORED steps."""
        exploration, step = self.model.exploration, self.model.num_timesteps
        if exploration.is_on and self._explored is None:
            self.report.say(
                f"step {step}: each reward so far follows from the action alone, so whole episodes are played by random actions "
                "that last, until some find more. train.explore=false turns this off."
            )
        elif self._explored is not None and exploration.found > self._explored:
            self.report.say(f"step {step}: {exploration.found} episodes have found something; {ENOUGH} end the exploration.")
        elif exploration.found_nothing and self._passed(EXPLORED):
            self.warn(
                f"step {step}: no reward that depends on where the agent is, so there is nothing to learn from. Check the "
                "environment's rewards, or give it some on the way."
            )
        self._explored = exploration.found if exploration.is_on else None

    def _passed(self, every: int) -> bool:
        """Whether the last round of steps passed a multiple of `every` (0: never)."""
        step = self.model.num_timesteps
        return bool(every) and step // every > (step - self.model.n_envs) // every

    def run_updates(self) -> None:
        """The updates that a signal left pending, before their step is evaluated."""
        model = self.model
        if model.num_timesteps and model.has_pending_updates and not self.signals:
            self._clock = time.perf_counter()
            model._update_current_progress_remaining(model.num_timesteps, self.config.train.steps)
            model.run_updates()
            self.add_wall_time()

    def evaluate_if_due(self) -> bool:
        """False where the run is solved and eval.stop_when_solved is set, or a signal came."""
        step, every = self.model.num_timesteps, 0 if self.is_offline else self.config.eval.every
        can_act_already = step == 0 and not self.progress.evaluations and (self.progress.warm_start or {}).get("acts", False)
        if every and (can_act_already or step // every > self.progress.evaluated // every):
            try:
                self._evaluate(step)
            except EvaluationAborted:  # a resume repeats it
                return False
        return not (self.config.eval.stop_when_solved and self.progress.solved_at is not None)

    def _evaluate(self, step: int) -> None:
        episodes = self.config.eval.episodes
        returns = self.measure(episodes, EVALUATION_SEED)
        mean = float(np.mean(returns))
        best, note = self.progress.best, ""
        reached = self.threshold is not None and mean >= self.threshold and self.progress.solved_at is None
        if reached or best is None or mean >= best.score:
            found = Best(step, mean, float(np.mean(self.measure(episodes, CONFIRMATION_SEED))), episodes)
            if best is None or found.score >= best.score:
                self.progress.best, note = found, f"  best so far (confirmation {found.confirmation:.1f})"
            if reached and found.confirmation >= self.threshold:
                self.progress.solved_at, note = step, f"  confirmed by {found.confirmation:.1f}: solved"
            elif reached:
                note = f"  not confirmed ({found.confirmation:.1f})"
        entry = {"real_steps": step, "mean_return": mean, "std_return": float(np.std(returns)), "episodes": episodes}
        self.progress.evaluations.append(entry)
        self.progress.evaluated = step
        self.model.logger.record("eval/mean_reward", mean)
        self.model.logger.dump(step)
        self.report.evaluated(self.model, entry, note)

    def measure(self, episodes: int, seed: int, agent: WorldModelAlgorithm | None = None) -> list[float]:
        """Returns of greedy episodes of the agent (default: the one that learns); their time counts as evaluation."""
        self.add_wall_time()
        started = time.perf_counter()
        try:
            max_steps = self.config.eval.max_steps
            asked = partial(self.asked, "evaluating")
            return evaluate(agent or self.model, self.config.env, episodes, seed, max_steps=max_steps, should_abort=asked)[0]
        finally:
            self.progress.eval_seconds += time.perf_counter() - started
            if self._pace is not None:
                self._pace.evaluated(time.perf_counter() - started)
            if self._clock is not None:
                self._clock = time.perf_counter()

    def add_wall_time(self) -> None:
        """Adds the time since the last call, or since the first step, to the training time."""
        if self._clock is not None:
            now = time.perf_counter()
            self.progress.wall_seconds += now - self._clock
            self._clock = now

    def save(self, fenced: bool = False) -> None:
        """Saves a checkpoint of this step, if there is none yet; `fenced`: new episodes begin right after it."""
        self.add_wall_time()
        self.run.save(self.model, asdict(self.progress), fenced=fenced)
        self._saved_best = self.progress.best

    def try_save(self, fenced: bool = False) -> None:
        """`save`; a StorageError is a warning until `checkpoint.failures` have come in a row."""
        limit = self.config.checkpoint.failures
        try:
            self.save(fenced)
            self._failed_in_a_row = 0
        except StorageError as error:
            self.progress.best = self._saved_best  # what was evaluated is in no checkpoint
            self._failed += 1
            self._failed_in_a_row += 1
            if self._failed_in_a_row >= limit:
                raise
            self.warn(
                f"The checkpoint at {standing(self.model)} could not be saved ({self._failed_in_a_row} in a row; at {limit} the "
                f"run stops): {error} Training goes on; the next try is {self.config.checkpoint.every} steps later."
            )
        self.model.logger.record("checkpoint/failed", self._failed)


def env_seed(seed: int, step: int) -> int:
    """Seed of the first environment from a checkpoint on; environment i gets this + i."""
    return seed if step == 0 else int(np.random.SeedSequence([seed, step]).generate_state(1)[0])


def standing(agent: WorldModelAlgorithm) -> str:
    """`real step 40`; `step 40` on recorded experience, where no steps are real."""
    return f"{'' if agent.config.train.data else 'real '}step {agent.num_timesteps}"
