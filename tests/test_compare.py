"""Forms are compared on the same experience at the same size; means, intervals and sentences say what was measured and no more."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from small_runs import CHAIN, words
from stable_baselines3 import DQN
from typer.testing import CliRunner

import worldmodel
from worldmodel.agents.comparison import measure, play, table
from worldmodel.agents.comparison.plan import (
    OTHERS,
    REFERENCE,
    WITHIN,
    Expectation,
    Plan,
    checked_forms,
    parameters,
    refusals,
    sized,
)
from worldmodel.agents.comparison.table import Comparison, bootstrapped, interquartile_mean, promised
from worldmodel.agents.training import budget
from worldmodel.cli import app
from worldmodel.envs.make import EnvConfig
from worldmodel.errors import ConfigError
from worldmodel.processes import Failed, Processes
from worldmodel.storage.rows import Rows, code

SMALL = [
    word
    for word in words({"train.pretrain": 2, "train.ratio": 0.05})
    if not word.startswith(("model.dynamics.latent", "model.dynamics.kind"))
]
PLAN = Plan("pendulum")


def row(form, seed=0, **figures):
    known = {name.replace("_", " "): x for name, x in figures.items()}
    return {"key": {"form": form, "seed": seed}, "figures": known, "where": {"code": code()}}


def of(*rows, plan=PLAN, **more):
    return Comparison(plan, "Pendulum-v1", tuple(sorted({x["key"]["seed"] for x in rows})), rows, **more)


# Means and intervals ------------------------------------------------------------------------------------------------------


def test_the_interquartile_mean_drops_a_quarter_at_each_end():
    assert interquartile_mean([100.0, 1.0, 2.0, -50.0]) == 1.5
    assert interquartile_mean([3.0, 1.0, 2.0]) == 2.0
    assert interquartile_mean([1000.0, 3, 3, 3, 5, 5, 5, -1000]) == 4.0


def test_an_interval_of_a_mean_holds_it_and_grows_with_the_spread():
    narrow, wide = bootstrapped([1.0, 1.1, 0.9, 1.0]), bootstrapped([1.0, 3.0, -1.0, 1.0])
    assert narrow[0] <= 1.0 <= narrow[1] and wide[1] - wide[0] > 5 * (narrow[1] - narrow[0])
    assert bootstrapped([1.0]) is None


@pytest.mark.parametrize("in_logs", [False, True])
@pytest.mark.parametrize("count", [3, 5])
def test_a_fresh_seed_lies_in_the_promised_interval_as_often_as_it_says(count, in_logs):
    rng, inside = np.random.default_rng(0), []
    for _ in range(4000):
        drawn = rng.normal(5.0, 2.0, count + 1)
        *seen, fresh = (np.exp(drawn) if in_logs else drawn).tolist()
        low, high = promised(seen, in_logs)
        inside.append(low <= fresh <= high)
    assert 0.94 < statistics.fmean(inside) < 0.96


# What it says -------------------------------------------------------------------------------------------------------------


def test_of_forms_that_earn_as_much_the_truest_is_recommended_and_what_it_gives_up_is_named():
    rows = []
    for seed in range(4):
        rows += [
            row("gaussian", seed, **{"return": 99.0 + seed, "error_at_5": 0.5 + 0.01 * seed, "update": 30.0 + seed}),
            row("flow", seed, **{"return": 98.0 + seed, "error_at_5": 0.2 + 0.01 * seed, "update": 80.0 + seed}),
            row("vae", seed, **{"return": 10.0 + seed, "error_at_5": 0.1 + 0.01 * seed, "update": 20.0 + seed}),
        ]
    found = of(*rows)
    assert found.recommended == "flow"
    assert "Take `model=flow`" in found.recommendation and "Given up: error at 5" in found.recommendation
    assert "update" in found.recommendation and "vae" in found.recommendation
    assert of(*[x for x in rows if x["key"]["form"] == "vae"]).recommendation.endswith("Nothing measured here is given up.")


def test_without_returns_the_truest_form_is_recommended_and_without_rows_none():
    assert of(row("vae", error_at_1=0.3), row("flow", error_at_1=0.2)).recommended == "flow"
    assert of().recommendation.startswith("Nothing is recommended")


def test_expectations_are_checked_against_what_was_measured():
    plan = Plan(
        "pendulum", expectations=("vae < flow: update", "flow < vae: update", "vae < persistence: error at 5", "vae < x: y")
    )
    rows = row("vae", update=1.0, error_at_5=0.2, over_persistence_at_5=0.5), row("flow", update=2.0)
    assert [x["held"] for x in of(*rows, plan=plan).expectations] == [True, False, True, None]
    with pytest.raises(ConfigError, match="A < B: FIGURE"):
        Expectation.parse("flow is best")


def test_persistence_is_read_off_the_forms_and_rows_that_are_missing_are_said():
    old = {**row("vae", error_at_5=0.2, over_persistence_at_5=0.5), "where": {"code": "0123456789abcdef"}}
    found = of(old, row("flow", error_at_5=0.3), failed={"flow, seed 0": "killed"})
    assert found.cell("persistence", "error at 5").values == (0.4,)
    text = " ".join(found.sentences)
    assert "flow, seed 0" in text and "Another version of the source made rows of: vae." in text


def test_a_form_of_another_size_is_named():
    rows = row("gaussian", parameters=1000.0), row("vae", parameters=1090.0), row("flow", parameters=1200.0)
    text = " ".join(of(*rows).sentences)
    assert "flow" in text and "vae" not in text.replace("model=vae", "")


def test_the_json_has_all_rows_and_their_means():
    found = of(*[row("vae", seed, **{"return": float(seed)}) for seed in (0, 1)]).to_json()
    assert {line["seed"] for line in found["rows"]} == {0, 1, "iqm"} and found["rows"][-1]["figures"]["return"] == 0.5
    assert set(found) >= {"env_id", "seeds", "rows", "refused", "recommendation", "expectations"}


# Forms of equal size ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["dreamer", "vae", "transformer", "anchored"])
def test_the_width_of_the_dynamics_makes_forms_equally_large(form):
    plan = Plan("pendulum")
    target = parameters(plan, REFERENCE)
    assert abs(parameters(plan, form, sized(plan, form)) / target - 1) <= WITHIN
    assert abs(parameters(plan, form) / target - 1) > 0.02  # it was not so before


def test_a_form_that_does_not_fit_the_spaces_is_refused_and_an_unknown_one_is_an_error():
    assert list(refusals(Plan("pendulum"), ["vae", "diamond"])) == ["diamond"]
    with pytest.raises(ConfigError, match=r"no form 'vea'.*vae"):
        checked_forms(["vae", "vea"])
    for bad in ({"steps": 5}, {"minutes": 0}, {"expectations": ("x",)}):
        with pytest.raises(ConfigError):
            Plan("pendulum", **bad)


# What is learned from -----------------------------------------------------------------------------------------------------


def test_all_that_the_model_free_agent_meets_is_recorded():
    model, met = play.model_free(EnvConfig(id=CHAIN), 120, 60, 0, prefill=20)
    assert isinstance(model, DQN) and met.steps >= 120 and met.env_id == CHAIN
    replayed = model.replay_buffer
    kept = met.reward[: replayed.pos] if not replayed.full else met.reward[-len(replayed.rewards) :]
    assert np.allclose(kept, replayed.rewards[: len(kept), 0])
    assert abs(model._n_updates - 60) < 20


def test_the_model_free_agent_never_makes_fewer_updates_than_its_authors_published():
    for name, published in (("sac", 1), ("dqn", 0.25)):
        for updates, expected in ((90, published), (900, 1), (3600, 4)):
            given = play._options(name, 1000, updates, prefill=100)
            assert given["gradient_steps"] / given["train_freq"] == expected, (name, updates)


def test_episodes_are_played_greedily_at_random_or_in_between():
    same = [play.played(None, EnvConfig(id="Pendulum-v1"), 2, 7, longest=5) for _ in range(2)]
    assert [len(x["rewards"]) for x in same[0]] == [5, 5] and all(x["truncations"][-1] for x in same[0])
    for one, other in zip(*same):
        assert np.array_equal(one["observations"], other["observations"])
    assert not np.array_equal(same[0][0]["observations"], same[0][1]["observations"])


def test_where_the_environment_has_no_limit_episodes_are_cut_as_in_any_evaluation(monkeypatch):
    monkeypatch.setattr(play, "find_spec", lambda name: SimpleNamespace(max_episode_steps=None))
    monkeypatch.setattr(play, "DEFAULT_MAX_STEPS", 9)
    for longest, steps in ((None, 9), (4, 4)):
        (episode,) = play.played(None, EnvConfig(id="Pendulum-v1"), 1, 0, longest=longest)
        assert len(episode["rewards"]) == steps


def test_a_row_of_every_kind_is_measured_on_the_same_experience(tmp_path):
    plan = Plan(CHAIN, 150, None, tuple(SMALL))
    job = {"plan": plan.to_json(), "folder": str(tmp_path), "seed": 0}
    free = measure.work({**job, "form": "model-free"})
    assert free["algorithm"] == "DQN" and free["figures"]["return"] is not None
    assert len(list(tmp_path.glob("*/data/*.npz"))) == 2
    found = measure.work({**json.loads(json.dumps(job)), "form": "gaussian"})["figures"]
    for name in ("return", "planned return", "error at 1", "coverage at 5", "likelihood", "update", "parameters"):
        assert found[name] is not None and np.isfinite(found[name]), name
    assert set(found) >= set(measure.FIGURES) and found["updates"] == 2 + 7
    known = [name for names in table.GROUPS.values() for name in names]
    assert set(found) <= set(known), "a figure that no table shows"
    again = measure.work({**job, "form": "gaussian"})["figures"]  # from the run folder that is there
    assert again["error at 1"] == found["error at 1"] and again["updates"] == found["updates"]
    assert measure.work({**job, "form": "random policy"})["figures"]["return"] is not None
    assert measure.work({**job, "form": "real simulator"})["figures"]["planned return"] is not None


def test_minutes_decide_once_how_many_steps_are_learned_from(tmp_path, monkeypatch):
    plan = Plan(CHAIN, 150, 1.0, tuple(SMALL))
    job = {"plan": plan.to_json(), "folder": str(tmp_path), "seed": 0}
    monkeypatch.setattr(measure, "_measured", lambda evidence, context: {})  # half a minute each time, and of no matter here
    monkeypatch.setattr(measure, "planned_returns", lambda *args: [0.0])
    measure.work({**job, "form": "model-free"})
    monkeypatch.setattr(budget, "_timed", lambda config, make_agent: budget.Costs(0.0, 0.4, 0.4, 0.0))
    updates = measure.work({**job, "form": "vae"})["figures"]["updates"]
    assert 140 <= updates <= 150  # two before all others, and what fits into 59 s and no time that passed before
    monkeypatch.setattr(budget, "_timed", lambda *args: pytest.fail("it was decided before"))
    assert measure.work({**job, "form": "vae"})["figures"]["updates"] == updates


# The command --------------------------------------------------------------------------------------------------------------


class Calls:
    """Stands for the processes: gives the seed as the return, and fails for one form."""

    def __init__(self, failing=()):
        self.jobs, self.failing = [], failing

    def __call__(self, processes, function, job, threads=1, seconds=None, log=None):
        self.jobs.append((job["form"], job["seed"]))
        if job["form"] in self.failing:
            raise Failed("out of memory")
        return {"figures": {"return": float(job["seed"])}}


def compared(tmp_path, monkeypatch, calls, **more):
    monkeypatch.setattr(Processes, "call", lambda *args, **kwargs: calls(*args, **kwargs))
    options = {"forms": ["gaussian", "vae"], "seeds": 2, "steps": 100, "out": tmp_path, "overrides": ["size=nano"], **more}
    return worldmodel.compare("pendulum", **options)


def test_every_row_is_measured_once_and_what_failed_again(tmp_path, monkeypatch):
    first = compared(tmp_path, monkeypatch, calls := Calls(failing=("vae",)))
    assert len(calls.jobs) == len(set(calls.jobs)) == 2 * (2 + len(OTHERS) - 1)
    assert set(first.failed) == {"vae, seed 0", "vae, seed 1"} and "out of memory" in first.failed["vae, seed 0"]
    second = compared(tmp_path, monkeypatch, calls := Calls(), seeds=3)
    assert sorted(calls.jobs) == sorted(
        [("vae", 0), ("vae", 1), ("vae", 2), ("gaussian", 2), *((name, 2) for name in OTHERS if name != "persistence")]
    )
    assert not second.failed and second.cell("vae", "return").values == (0.0, 1.0, 2.0)
    assert json.loads((tmp_path / "comparison.json").read_text())["seeds"] == [0, 1, 2]
    assert "<!DOCTYPE html>" in (tmp_path / "comparison.html").read_text() and (tmp_path / "comparison.md").exists()


def test_rows_of_another_version_are_measured_again(tmp_path, monkeypatch):
    compared(tmp_path, monkeypatch, Calls())
    lines = (tmp_path / "rows.jsonl").read_text().replace(code(), "0123456789abcdef")
    (tmp_path / "rows.jsonl").write_text(lines)
    found = compared(tmp_path, monkeypatch, calls := Calls(failing=("vae",)))
    assert ("gaussian", 0) in calls.jobs and found.stale == ["vae"]


def test_a_folder_of_another_comparison_is_refused_and_nothing_is_lost(tmp_path, monkeypatch):
    compared(tmp_path, monkeypatch, Calls())
    before = (tmp_path / "rows.jsonl").read_text()
    for more in ({"steps": 200}, {"overrides": ["size=small"]}, {"expect": ["vae < flow: update"]}):
        with pytest.raises(ConfigError, match="holds another comparison"):
            compared(tmp_path, monkeypatch, Calls(), **more)
    assert (tmp_path / "rows.jsonl").read_text() == before


def test_the_plan_is_on_disk_before_the_first_row_is_measured(tmp_path, monkeypatch):
    def call(*args, **kwargs):
        assert "vae < flow: update" in (tmp_path / "plan.json").read_text()
        raise Failed("enough")

    monkeypatch.setattr(Processes, "call", call)
    worldmodel.compare("pendulum", ["vae"], 1, 100, out=tmp_path, expect=["vae < flow: update"])


def test_the_command_prints_a_table_or_json(tmp_path, monkeypatch):
    monkeypatch.setattr(Processes, "call", lambda *args, **kwargs: Calls()(*args, **kwargs))
    words = [
        "compare",
        "pendulum",
        "size=nano",
        "--forms",
        "gaussian,diamond",
        "--seeds",
        "2",
        "--first-seed",
        "3",
        "--steps",
        "100",
    ]
    shown = CliRunner().invoke(app, [*words, "--out", str(tmp_path)])
    assert shown.exit_code == 0, shown.output
    assert "Take `model=gaussian`" in shown.output and "diamond: " in shown.output
    found = json.loads(CliRunner().invoke(app, [*words, "--out", str(tmp_path), "--json"]).stdout)
    assert found["seeds"] == [3, 4] and list(found["refused"]) == ["diamond"]


# Rows and processes -------------------------------------------------------------------------------------------------------


def test_a_row_that_a_kill_has_cut_is_measured_again_and_the_others_stay(tmp_path):
    rows = Rows(tmp_path / "rows.jsonl")
    for seed in range(3):
        rows.add({"seed": seed}, {"x": seed}, threads=1)
    text = (tmp_path / "rows.jsonl").read_text()
    (tmp_path / "rows.jsonl").write_text(text[:-20])
    kept = Rows(tmp_path / "rows.jsonl")
    assert [kept.has({"seed": seed}) for seed in range(3)] == [True, True, False]
    kept.add({"seed": 2}, {"x": 5}, threads=1)
    assert [x["x"] for x in Rows(tmp_path / "rows.jsonl")] == [0, 1, 5]


def test_a_process_gives_its_result_or_says_why_not(tmp_path):
    with Processes() as processes:
        with pytest.raises(Failed, match="KeyError"):
            processes.call("worldmodel.agents.comparison.measure:work", {"form": "gaussian"}, log=tmp_path / "log")
        with pytest.raises(Failed, match="no JSON: hello"):
            processes.command([sys.executable, "-c", "print('hello')"], 1)
        with pytest.raises(Failed, match="no result after 1 s"):
            processes.command([sys.executable, "-c", "import time; time.sleep(60)"], 1, seconds=1)
        assert (
            processes.command([sys.executable, "-c", "import os; print({True: 1}[os.environ['OMP_NUM_THREADS'] == '3'])"], 3) == 1
        )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_program_that_is_asked_to_end_asks_its_processes_once_and_waits_for_them(tmp_path, number):
    """The child says how often it was asked; Ctrl-C is sent to the whole group, as a terminal does."""
    child = f"""
import pathlib, signal, sys, time
asked = []
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda number, frame: asked.append(int(number)))
pathlib.Path({str(tmp_path / "ready")!r}).touch()
while not asked:
    time.sleep(0.02)
time.sleep(0.3)
pathlib.Path({str(tmp_path / "asked")!r}).write_text(str(asked))
"""
    parent = f"""
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
from worldmodel.processes import Processes
with Processes() as processes:
    processes.command([sys.executable, "-c", {child!r}], 1)
"""
    process = subprocess.Popen([sys.executable, "-c", parent], stderr=subprocess.DEVNULL, start_new_session=True)
    while not (tmp_path / "ready").exists():
        time.sleep(0.02)
    os.killpg(process.pid, number)
    process.wait(60)
    assert (tmp_path / "asked").read_text() == str([int(signal.SIGTERM)])
