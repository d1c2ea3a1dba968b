"""`train.minutes`: what a run does in the time that it is given.

Before the run a few steps and updates are timed, and the number of real steps, updates a step, the size of a batch and the
evaluations are chosen so that they fill the time. In the run the updates a step follow the clock.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

from worldmodel.agents.evaluation import DEFAULT_MAX_STEPS, episode_limit, evaluate
from worldmodel.agents.loop import WorldModelAlgorithm
from worldmodel.config import Config
from worldmodel.envs.make import find_spec
from worldmodel.errors import ConfigError

ENOUGH_UPDATES = 1000
"""Updates below which a run learns little, so that smaller batches are tried."""
WITHIN = 4.0
"""Factor by which updates a step may leave what was configured, or what was planned, either way."""
EVALUATIONS = 10
EVALUATION_SHARE = 0.2
"""Evaluations of a run, fewer where they would take more than this share of its time."""
EARLIER = 0.2
"""Share of the steps between two evaluations that come behind the last, which so is made even where time runs out."""
TIMED_STEPS, TIMED_UPDATES = 30, 5
LEAST_UPDATES, LEAST_BATCH = 100, 4
WORTH_IT = 0.6
"""Share of an update's time that a smaller one must stay below."""
PATIENCE, FASTEST = 0.02, 1.5
"""Share of the time after which the updates a step are set anew, and the largest factor by which."""
UNKNOWN = 0.03
"""Share of the time that an evaluation is taken to need before the first."""
PICTURES = 0.05
"""Share of the time that is kept for the model's own evaluation at the end (log.pictures)."""
CONFIRMED = 1.5
"""Evaluations' time that one takes on average, with the confirmation that a better one has."""


@dataclass(frozen=True)
class Costs:
    """Seconds of a real step without updates, of an update, of one of the world model alone, and of an evaluation at most."""

    step: float
    update: float
    pretraining: float
    evaluation: float


class Pace:
    """Holds a run to its minutes: sets the agent's updates a step by the clock, and says when the time is over.

    began  when the run began, as if it had never been interrupted, in seconds of time.perf_counter
    sets   whether it sets them; else `train.ratio` is kept
    """

    def __init__(self, agent: WorldModelAlgorithm, began: float, sets: bool):
        self.agent, self.seconds, self.steps = agent, 60 * agent.config.train.minutes, agent.config.train.steps
        self._sets = sets
        self._evaluation = 0.0 if agent.config.train.data else UNKNOWN * self.seconds
        self._end = began + self.seconds * (1 - _pictures(agent.config))
        self._mark: tuple[float, int] | None = None  # time and step where the pace is measured from; None: at the next step

    @property
    def left(self) -> float:
        """Seconds before the evaluations at the end, of the best agent and of the newest."""
        return self._end - 2 * self._evaluation - time.perf_counter()

    @property
    def is_over(self) -> bool:
        return self.left <= 0

    def adjust(self, evaluated_every: int) -> None:
        """Called after each step, before it is evaluated."""
        step, now, ratio = self.agent.num_timesteps, time.perf_counter(), self.agent.config.train.ratio
        if self._mark is None or self.agent.learner.updates <= self.agent.config.train.pretrain:
            self._mark = now, step
        elif self._sets and now - self._mark[0] >= PATIENCE * self.seconds and step < self.steps:
            to_come = (self.steps - step) // evaluated_every if evaluated_every else 0
            wanted = max(0.0, self.left - CONFIRMED * to_come * self._evaluation) / (self.steps - step)
            factor = wanted * (step - self._mark[1]) / (now - self._mark[0])
            changed = self.agent.ratio * min(max(factor, 1 / FASTEST), FASTEST)
            self.agent.ratio = min(max(changed, ratio / WITHIN), ratio * WITHIN)
            self._mark = now, step

    def evaluated(self, seconds: float) -> None:
        """An evaluation took so long; that is no time of a step."""
        self._evaluation, self._mark = seconds, None


def choose(
    configure: Callable[[dict[str, Any]], Config],
    given: Mapping[str, Any],
    make_agent: Callable[[Config], WorldModelAlgorithm],
    log: Callable[[str], object],
) -> dict[str, Any]:
    """Overrides that fill `train.minutes`, those that `given` names left as they are; says what was chosen and why. ConfigError.

    configure   overrides -> the config with them
    make_agent  a new agent of a config, of which nothing is kept
    """
    chosen, config = {}, configure({})
    minutes, end = config.train.minutes, time.perf_counter() + 60 * config.train.minutes
    costs = _timed(config, make_agent)
    plan = _plan(config, given, costs, end - time.perf_counter())
    for change in _smaller(config, given):
        if plan["train.ratio"] * plan["train.steps"] >= ENOUGH_UPDATES:
            break
        tried = configure({**chosen, **change})
        if (other := _timed(tried, make_agent)).update < WORTH_IT * costs.update:
            chosen, config, costs = {**chosen, **change}, tried, other
        plan = _plan(config, given, costs, end - time.perf_counter())
    _require(config, given, costs, end - time.perf_counter())
    chosen |= {key: value for key, value in plan.items() if key not in given}
    log(
        f"{minutes:g} min here: a step takes {1000 * costs.step:.1f} ms, an update {1000 * costs.update:.0f} ms, an evaluation at "
        f"most {costs.evaluation:.1f} s. So {', '.join(f'{key}={value}' for key, value in chosen.items())}; what you give is kept."
        f"{'' if 'train.ratio' in given else ' The updates a step then follow the clock.'}"
    )
    return chosen


def _smaller(config: Config, given: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Overrides that make updates cheaper, the mildest first."""
    batch = config.train.batch_size
    while "train.batch_size" not in given and (batch := batch // 2) >= LEAST_BATCH:
        yield {"train.batch_size": batch}
    if not any(key.partition(".")[0] in ("size", "model", "agent") or key == "train.warm_start" for key in given):
        yield {"size": "nano"}


def _timed(config: Config, make_agent: Callable[[Config], WorldModelAlgorithm]) -> Costs:
    """What steps and updates take, by an agent that plays a few and is thrown away."""
    count = config.env.num_envs * (config.train.burn_in + config.train.batch_length)
    quiet = {"train.prefill": count, "train.pretrain": 0, "train.ratio": 0.0, "train.early_ratio": None}
    agent = make_agent(config.override(quiet))
    if agent.env is None:
        return Costs(0.0, *_seconds_of_updates(agent), 0.0)
    with closing(agent.env) as env:
        limit = episode_limit(env, config.eval.max_steps)
        if math.isinf(limit):
            limit = find_spec(config.env.id).max_episode_steps or DEFAULT_MAX_STEPS
        agent.learn(count)
        updates = _seconds_of_updates(agent)
        count = env.num_envs * TIMED_STEPS
        step = _seconds(partial(agent.learn, count, reset_num_timesteps=False)) / count
    started = time.perf_counter()
    _, lengths = evaluate(agent, config.env, config.eval.episodes, max_steps=min(limit, TIMED_STEPS))
    return Costs(step, *updates, (time.perf_counter() - started) * limit / max(lengths))


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _seconds_of_updates(agent: WorldModelAlgorithm) -> tuple[float, float]:
    """(of an update, of one of the world model alone)."""
    agent.update()  # the first allocates
    whole, alone = (
        sum(_seconds(partial(agent.update, improve)) for _ in range(TIMED_UPDATES)) / TIMED_UPDATES for improve in (True, False)
    )
    return whole, alone


def _pictures(config: Config) -> float:
    """Share of the time that is kept for the model's own evaluation at the end."""
    return PICTURES if config.log.tensorboard and config.log.pictures else 0.0


def _random_steps(config: Config) -> int:
    """Steps for which no updates are made."""
    return 0 if config.train.data else config.train.prefill


def _before(config: Config, costs: Costs) -> float:
    """Seconds that go into the evaluations at the end and the first updates, whatever the number of steps."""
    return 2 * costs.evaluation + config.train.pretrain * costs.pretraining


def _plan(config: Config, given: Mapping[str, Any], costs: Costs, seconds: float) -> dict[str, Any]:
    """Steps, updates a step and steps between evaluations that fill so many seconds."""
    evaluation, steps, ratio = CONFIRMED * costs.evaluation, config.train.steps, config.train.ratio
    count = min(EVALUATIONS, max(1, int(EVALUATION_SHARE * seconds / max(evaluation, 1e-9))))
    learning = seconds * (1 - _pictures(config)) - _before(config, costs) - count * evaluation
    if "train.steps" in given:
        if "train.ratio" not in given:
            learned = max(1, steps - _random_steps(config))
            ratio = min(WITHIN * ratio, (learning - steps * costs.step) / (learned * costs.update))
    else:
        if "train.ratio" not in given:  # where steps are slow, half the time is for learning
            ratio = max(ratio, min(WITHIN * ratio, costs.step / costs.update))
        each = costs.step + ratio * costs.update
        steps = int((learning + _random_steps(config) * ratio * costs.update) / max(each, 1e-6))
    chosen = {"train.steps": steps, "train.ratio": float(f"{ratio:.2g}")}
    return chosen if config.train.data else {**chosen, "eval.every": max(1, int(steps / (count + EARLIER)))}


def _require(config: Config, given: Mapping[str, Any], costs: Costs, seconds: float) -> None:
    """ConfigError where so many seconds are too few for the steps that are wanted, or to learn anything at all."""
    train = config.train
    random = _random_steps(config)
    minimum, what = random * costs.step + LEAST_UPDATES * costs.update, f"the {random} random steps, some updates"
    if "train.steps" in given:
        ratio = train.ratio if "train.ratio" in given else train.ratio / WITHIN**2
        minimum = train.steps * costs.step + max(0, train.steps - random) * ratio * costs.update
        what = f"{train.steps:,} steps with {ratio:.2g} updates each"
    minimum += _before(config, costs)
    needed = max(minimum / (1 - EVALUATION_SHARE), minimum + CONFIRMED * costs.evaluation) / (1 - _pictures(config))
    if seconds < needed:
        raise ConfigError(
            f"train.minutes is {train.minutes:g}, but {what} and the evaluations take {needed / 60:.2f} min here. Expected at "
            "least that: raise --minutes, or lower --steps, train.prefill, train.pretrain, eval.episodes or the size."
        )
