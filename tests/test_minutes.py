"""`train --minutes`: what a run does in a given time, and that it ends in time. The clock is the tests' own."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
from small_runs import CHAIN, merged, small_train

from worldmodel.agents.arguments import read_config
from worldmodel.agents.loop import WorldModelAlgorithm
from worldmodel.agents.training import budget
from worldmodel.agents.training.budget import Costs, Pace
from worldmodel.agents.training.session import make_agent
from worldmodel.commands.train import train
from worldmodel.config import Config
from worldmodel.errors import ConfigError
from worldmodel.storage.run import Run

HURRIED = Costs(step=1e-3, update=1e-3, pretraining=1e-3, evaluation=0.01)
"""Far less than it takes, so that a run is not done when its time is over."""
COSTS = Costs(step=0.002, update=0.1, pretraining=0.04, evaluation=2.0)


def config(minutes: float = 10.0, **options: object) -> Config:
    return read_config(CHAIN, {"train.minutes": minutes, **options})


def seconds_of(config: Config, plan: dict, costs: Costs) -> float:
    """What a plan takes, evaluations at their most included."""
    count = plan["train.steps"] // plan["eval.every"]
    updates = (plan["train.steps"] - config.train.prefill) * plan["train.ratio"]
    learning = updates * costs.update + config.train.pretrain * costs.pretraining
    learning += 60 * config.train.minutes * budget.PICTURES
    return plan["train.steps"] * costs.step + learning + (count * budget.CONFIRMED + 2) * costs.evaluation


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on by `tick` seconds each time that somebody looks."""
    hand = SimpleNamespace(now=1000.0, tick=0.0)

    def look() -> float:
        hand.now += hand.tick
        return hand.now

    monkeypatch.setattr(time, "perf_counter", look)
    return hand


# The plan ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("minutes", [1.0, 3.0, 60.0])
@pytest.mark.parametrize("costs", [COSTS, Costs(0.0002, 0.05, 0.01, 0.5), Costs(0.05, 0.02, 0.02, 6.0)])
def test_a_plan_fills_the_time(minutes, costs):
    asked = config(minutes)
    plan = budget._plan(asked, {}, costs, 60 * minutes)
    assert 0.95 * 60 * minutes <= seconds_of(asked, plan, costs) <= 1.01 * 60 * minutes


def test_a_plan_of_given_steps_chooses_the_updates_a_step():
    few, many = (budget._plan(config(**{"train.steps": n}), {"train.steps": n}, COSTS, 600.0) for n in (4000, 8000))
    assert few["train.steps"] == 4000 and few["train.ratio"] > 1.8 * many["train.ratio"] > 0
    assert 500 <= seconds_of(config(), many, COSTS) <= 606


def test_where_steps_are_slow_half_the_time_is_for_updates():
    slow = Costs(step=0.15, update=0.1, pretraining=0.1, evaluation=0.0)
    assert budget._plan(config(), {}, slow, 600.0)["train.ratio"] == 1.5 > config().train.ratio
    assert budget._plan(config(), {"train.ratio": 0.5}, slow, 600.0)["train.ratio"] == 0.5


def test_slow_evaluations_are_fewer():
    plan = budget._plan(config(), {}, Costs(0.002, 0.1, 0.04, evaluation=20.0), 600.0)
    assert plan["train.steps"] // plan["eval.every"] == 4


def test_recorded_experience_has_a_schedule_and_no_evaluations():
    plan = budget._plan(config().override({"train.data": ["some.npz"]}), {}, Costs(0.0, 0.1, 0.05, 0.0), 600.0)
    assert "eval.every" not in plan
    assert plan["train.steps"] * plan["train.ratio"] * 0.1 == pytest.approx(0.95 * 600 - 100 * 0.05, abs=0.1)


def chosen(minutes: float, update: float, depends: bool = True, **given: object) -> tuple[dict, str]:
    """What is chosen where an update of 16 sequences takes so long, and one of n sequences or of narrow nets less."""
    said: list[str] = []

    def timed(config: Config, make_agent: object) -> Costs:
        share = config.train.batch_size / 16 if depends else 1
        update_now = update * share * (0.5 if config.agent.units < 128 else 1.0)
        return Costs(0.002, update_now, update_now, 0.1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budget, "_timed", timed)
        return budget.choose(lambda more: config(minutes, **given, **more), given, lambda config: None, said.append), said[0]


def test_where_few_updates_would_be_made_they_are_made_cheaper_if_that_pays(clock):
    assert not {"train.batch_size", "size"} & chosen(10.0, 0.1)[0].keys()
    smaller, said = chosen(10.0, 1.0)
    assert smaller["train.batch_size"] == 8 and "size" not in smaller and "train.batch_size=8" in said
    smallest = chosen(10.0, 8.0)[0]
    assert smallest["train.batch_size"] == budget.LEAST_BATCH and smallest["size"] == "nano"
    assert "train.batch_size" not in chosen(10.0, 1.0, depends=False)[0]
    assert "size" not in chosen(10.0, 8.0, **{"agent.units": 128})[0]


@pytest.mark.parametrize("key, value", [("train.steps", 3000), ("train.ratio", 0.3), ("train.batch_size", 16), ("eval.every", 77)])
def test_what_is_given_is_not_chosen(clock, key, value):
    assert key in chosen(10.0, 1.0)[0] or key == "train.batch_size"
    assert key not in chosen(10.0, 1.0, **{key: value})[0]


@pytest.mark.parametrize("options", [{}, {"train.steps": 100_000}, {"train.steps": 100_000, "train.ratio": 1.0}])
def test_an_impossible_time_is_an_error_that_says_how_long_it_takes(options):
    with pytest.raises(ConfigError, match=r"train.minutes is 0.3, but .* take [\d.]+ min here. Expected at least that") as error:
        budget._require(config(0.3, **options), options, COSTS, 18.0)
    needed = float(str(error.value).split("take ")[1].split(" min")[0]) + 0.01
    budget._require(config(needed, **options), options, COSTS, 60 * needed)
    plan = budget._plan(config(needed, **options), options, COSTS, 60 * needed)
    assert plan["train.ratio"] > 0 and plan["train.steps"] > config().train.prefill


class FakeAgent(WorldModelAlgorithm):
    """The attributes of an agent that a pace reads."""

    num_timesteps, ratio, learner = 0, 1.0, SimpleNamespace(updates=1)

    def __init__(self, minutes: float, steps: int):
        options = {"train.steps": steps, "train.ratio": 1.0, "train.pretrain": 0, "log.tensorboard": False}
        self.config = config(minutes, **options)


# The pace ---------------------------------------------------------------------------------------------------------------


def paced(minutes: float, update: float, sets: bool = True, *, steps: int = 1000, step: float = 0.01) -> tuple[float, list[float]]:
    """(seconds that a run of ratio 1 takes, its updates a step), where an update takes `update` seconds."""
    agent = FakeAgent(minutes, steps)
    with pytest.MonkeyPatch.context() as patch:
        hand = SimpleNamespace(now=0.0)
        patch.setattr(time, "perf_counter", lambda: hand.now)
        pace, ratios = Pace(agent, 0.0, sets), []
        pace.evaluated(0.0)
        while agent.num_timesteps < steps and not pace.is_over:
            hand.now += step + agent.ratio * update
            agent.num_timesteps += 1
            pace.adjust(0)
            ratios.append(agent.ratio)
    return hand.now, ratios


@pytest.mark.parametrize("update", [0.05, 0.1, 0.2])
def test_updates_a_step_follow_the_clock(update):
    """1,000 steps in 110 s are what an update of 0.1 s leaves time for."""
    seconds, ratios = paced(110 / 60, update)
    assert len(ratios) == 1000 and 105 <= seconds <= 110.5
    assert ratios[500] == pytest.approx(0.1 / update, rel=0.1)


def test_updates_a_step_stay_within_bounds_and_the_run_ends_in_time():
    seconds, ratios = paced(110 / 60, 0.8)  # eight times slower than planned
    assert seconds <= 112 and len(ratios) < 1000 and min(ratios) == 1 / budget.WITHIN
    seconds, ratios = paced(110 / 60, 0.01)
    assert seconds < 100 and len(ratios) == 1000 and max(ratios) == budget.WITHIN


def test_updates_a_step_that_were_asked_for_are_kept():
    seconds, ratios = paced(110 / 60, 0.2, sets=False)
    assert set(ratios) == {1.0} and len(ratios) < 1000 and seconds <= 110.5


# Runs -------------------------------------------------------------------------------------------------------------------


def run_of_minutes(folder, clock, costs: Costs, minutes: float = 0.2, **options: object):
    """A run of 12 s of a clock that goes on at each look: a hundred looks, most of them at an update or a step."""
    clock.tick = 0.1
    said: list[str] = []
    chosen = "train.ratio", "train.batch_size", "eval.every"
    options = {key: value for key, value in merged().items() if key not in chosen} | {"eval.max_steps": 3, **options}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budget, "_timed", lambda config, make_agent: costs)
        result = train(CHAIN, run_dir=folder, overrides=options, device="cpu", minutes=minutes, log=said.append)
    return result, said


def test_a_run_ends_in_its_time_and_says_what_it_chose(tmp_path, clock):
    began = clock.now
    result, said = run_of_minutes(tmp_path / "run", clock, Costs(step=0.1, update=0.05, pretraining=0.05, evaluation=0.5), 0.4)
    assert clock.now - began <= 1.1 * 24
    config = Run.open(tmp_path / "run").config
    assert said[0].startswith("0.4 min here: ") and "train.ratio=" in said[0]
    assert result.real_steps == config.train.steps > 0 and result.updates > 0 and result.final_return is not None


def test_a_run_that_is_too_slow_ends_at_its_time_and_is_finished(tmp_path, clock):
    result, said = run_of_minutes(tmp_path / "run", clock, HURRIED)
    run = Run.open(tmp_path / "run")
    assert any("the time of train.minutes is over" in line for line in said)
    assert result.real_steps == run.config.train.steps < 500
    for minutes in (None, 0.2):
        again = train(tmp_path / "run", resume=True, minutes=minutes, device="cpu")
        assert again.to_json() == result.to_json()


def test_a_resume_with_more_time_or_more_steps_goes_on(tmp_path, clock):
    first, _ = run_of_minutes(tmp_path / "run", clock, HURRIED)
    longer = train(tmp_path / "run", resume=True, minutes=0.3, device="cpu")
    assert first.real_steps < longer.real_steps and Run.open(tmp_path / "run").config.train.minutes == 0.3
    more = train(tmp_path / "run", resume=True, steps=longer.real_steps + 20, device="cpu")
    assert more.real_steps == longer.real_steps + 20
    assert Run.open(tmp_path / "run").config.train.minutes is None


def test_what_a_plan_rests_on_is_timed_and_what_timed_it_is_thrown_away():
    agents = []

    def make(config: Config) -> WorldModelAlgorithm:
        agents.append(make_agent(config, 0))
        return agents[-1]

    costs = budget._timed(read_config(CHAIN, merged()), make)
    assert min(costs.step, costs.update, costs.pretraining, costs.evaluation) > 0
    assert agents[0].learner.updates == 2 * budget.TIMED_UPDATES + 1 and agents[0].num_timesteps < 50


def test_minutes_that_are_none_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="minutes"):
        small_train(tmp_path / "run", minutes=0.0)
    assert not (tmp_path / "run").exists()


def test_an_impossible_time_leaves_no_folder(tmp_path):
    with pytest.raises(ConfigError, match="Expected at least that"):
        small_train(tmp_path / "run", 50_000, minutes=0.001)
    assert not (tmp_path / "run").exists()
