"""The progress lines of a run, where there is no bar."""

from __future__ import annotations

import logging
import re
from types import SimpleNamespace

import pytest
from small_runs import small_train

from worldmodel.agents.loop import WorldModelAlgorithm
from worldmodel.agents.training import report
from worldmodel.agents.training.report import LineReport
from worldmodel.learner import TrainConfig


class FakeAgent(WorldModelAlgorithm):
    """The attributes of an agent that the report reads."""

    has_pending_updates, exploration = True, SimpleNamespace(is_on=False)

    def __init__(self, step: int, updates: int, pretrain: int = 0, ratio: float = 1.0):
        self.num_timesteps, self.learner = step, SimpleNamespace(updates=updates)
        self.config, self.ratio = SimpleNamespace(train=TrainConfig(pretrain=pretrain)), ratio


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets."""
    hand = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(report.time, "perf_counter", lambda: hand.now)
    return hand


def test_a_run_says_in_every_phase_that_it_is_alive(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "LINE_INTERVAL", 0.0, raising=False)
    logged = []
    options = {"train.pretrain": 4, "log.tensorboard": True, "log.pictures": 30, "log.held_out": 1}
    small_train(tmp_path / "run", 40, options=options, log=logged.append)
    text = "\n".join(logged)
    for words in (
        "collecting  step 5/40  0.0 updates/s",
        "pretraining 2/4  step 14/40",
        "learning  step 30/40",
        "evaluating  step 25/40",
        "looking at held-out episodes  step 30/40",
    ):
        assert words in text, text
    assert re.search(r"learning  step 30/40  [\d.]+ updates/s  [\d.]+ steps/s  about \d+ s left", text), text


def test_a_line_comes_when_half_a_minute_was_silent_and_only_then(clock):
    logged = []
    lines = LineReport(logged.append, 4000)
    lines.start(FakeAgent(500, 0, 1500))
    for update in range(1, 601):  # 2 a second
        clock.now += 0.5
        lines.alive(FakeAgent(500, update, 1500))
    assert len(logged) == 10  # of 300 seconds
    assert logged[-1] == "pretraining 600/1500  step 500/4000  2.0 updates/s  0.0 steps/s  about 37 min left"
    lines.evaluated(FakeAgent(500, 600, 1500), {"real_steps": 500, "mean_return": 1.0, "std_return": 0.0, "episodes": 2})
    clock.now += 29
    lines.alive(FakeAgent(500, 601, 1500))
    assert len(logged) == 11


def test_steps_a_second_are_recent_ones_and_time_in_evaluations_is_none(clock):
    logged = []
    lines = LineReport(logged.append, 10_000)
    lines.start(FakeAgent(0, 0))
    for step in range(1, 2001):  # random ones, 100 a second
        clock.now += 0.01
        lines.alive(FakeAgent(step, 0))
    for step in range(2001, 2101):  # 1 a second
        clock.now += 1.0
        lines.alive(FakeAgent(step, step - 2000))
    row = {"real_steps": 2100, "mean_return": 1.0, "std_return": 0.0, "episodes": 2}
    lines.evaluated(FakeAgent(2100, 100), row)
    assert logged[-1].endswith("  1 steps/s"), logged  # the mean since the start is 17
    for _ in range(100):
        clock.now += 10.0
        lines.alive(FakeAgent(2100, 100), "evaluating")
    clock.now += 1.0
    lines.alive(FakeAgent(2100, 100))
    lines.evaluated(FakeAgent(2100, 100), row)
    assert logged[-1].endswith("  1 steps/s"), logged


def test_lines_are_seen_without_a_log_and_go_to_logging_where_that_is_listened_to(tmp_path, capsys, caplog):
    small_train(tmp_path / "heard", 30)
    assert "step 25/30  return" in capsys.readouterr().err
    with caplog.at_level(logging.INFO, "worldmodel"):
        small_train(tmp_path / "logged", 30)
    assert "step 25/30" not in capsys.readouterr().err and "step 25/30  return" in caplog.text
