"""`sweep`: combinations, what is refused, stops, failures, the table, and searches."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from small_runs import CHAIN, merged, small_train, words
from typer.testing import CliRunner

from worldmodel.agents.comparison import sweeping
from worldmodel.agents.comparison.sweeping import Range, parsed, planned, split_values, suggested
from worldmodel.cli import app
from worldmodel.commands.sweep import sweep
from worldmodel.errors import ConfigError, MissingExtraError
from worldmodel.processes import Failed, Processes
from worldmodel.storage import rows

GRID = ["train.lr=1e-3,3e-3", "agent.horizon=3,5"]
RANGES = ["train.lr=1e-4..1e-2", "model=gaussian,dreamer", "train.scales.rep=0..1"]


def figures(**known):
    return {"figures": {**dict.fromkeys(sweeping.FIGURES), **known}, "slot": "transition", "skipped": None}


@pytest.fixture(autouse=True)
def hashed(monkeypatch):
    """Hashing the code takes seconds for each row."""
    monkeypatch.setattr(rows, "code", lambda: "0123456789abcdef")
    monkeypatch.setattr(rows, "_hash", lambda parts=None: rows.code())


@pytest.fixture
def trained(monkeypatch):
    """Trainings that take no time; (options, seed) of each. `trained.act` may raise, or give other figures."""

    class Trained(list):
        def act(self, job):
            return figures(final_return=int(1000 * job["overrides"]["train.lr"]) + job["seed"])

    done = Trained()

    def call(self, function, job, threads=1, seconds=None, log=None):
        assert function == "worldmodel.agents.comparison.sweeping:work" and threads == 1
        result = done.act(job)
        done.append((job["overrides"].get("train.lr"), job["overrides"].get("agent.horizon"), job["seed"]))
        return result

    monkeypatch.setattr(Processes, "call", call)
    return done


# What is swept ----------------------------------------------------------------------------------------------------------


def test_every_value_meets_every_other_and_every_seed(trained, tmp_path):
    found = sweep(CHAIN, [*GRID, "train.ratio=0.5"], seeds=2, jobs=1, out=tmp_path)
    assert sorted(trained) == [(lr, horizon, seed) for lr in (0.001, 0.003) for horizon in (3, 5) for seed in (0, 1)]
    assert found.plan.fixed == {"train.ratio": 0.5} and found.seeds == (0, 1)
    assert found.runs[0]["options"] == {"train.lr": 0.001, "agent.horizon": 3}
    assert sweep(CHAIN, {"train.lr": [1e-3, 3e-3], "agent.horizon": (3, 5), "train.ratio": 0.5}, 2, out=tmp_path).runs == found.runs
    assert len(trained) == 8


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("1,2", ["1", "2"]),
        ("[1,2]", ["[1,2]"]),
        ("[1,[2,3]],[4,5]", ["[1,[2,3]]", "[4,5]"]),
        ("{a: 1, b: 2},null", ["{a: 1, b: 2}", "null"]),
        ("'a,b',\"c,d\"", ["'a,b'", '"c,d"']),
        ("it's,yours", ["it's", "yours"]),
    ],
)
def test_commas_in_brackets_and_quotes_divide_nothing(text, pieces):
    assert split_values(text) == pieces


def test_a_list_is_one_value():
    assert parsed(["a=[1,2]", "b=[1,2],[3]", "c=1,1.0,1"]) == {"a": ([1, 2],), "b": ([1, 2], [3]), "c": (1, 1.0)}
    assert parsed({"a": [[1, 2]], "b": "x,y", "c": Path("f")}) == {"a": ([1, 2],), "b": ("x", "y"), "c": ("f",)}


def test_ranges_are_logarithmic_from_a_decade_on():
    found = parsed(["a=1e-4..1e-2", "b=8..32", "c=-1..1", "d=1..9.9", "e=../x,../y", "f=1..10"])
    assert found["a"] == Range(1e-4, 1e-2, False) and found["b"] == Range(8, 32, True)
    assert [found[key].log for key in "abcdf"] == [True, False, False, False, True]
    assert found["e"] == ("../x", "../y")


def test_a_range_of_whole_numbers_is_one_of_real_numbers_where_the_option_is(monkeypatch):
    monkeypatch.setattr(sweeping, "optuna", lambda: None)
    swept = planned(CHAIN, ["train.scales.rep=0..1", "train.batch_size=2..8"], None, True, None).swept
    assert not swept["train.scales.rep"].whole and swept["train.batch_size"].whole


@pytest.mark.parametrize(
    ("options", "more", "message"),
    [
        (["train.larning=1,2"], {}, r"With train.larning=1: .*train.larning"),
        (["train.lr=1e-3,-1"], {}, r"With train.lr=-1: .*greater than"),
        (["train.lr=1e-3"], {}, "nothing to sweep.*worldmodel train worldmodel.envs:Chain-v0 train.lr=0.001"),
        (["train.lr=1e-3,1e-3"], {}, "nothing to sweep"),
        ([], {}, "nothing to sweep"),
        (["train.lr"], {}, "no option"),
        (["train.lr=1,,2"], {}, "empty value"),
        (["train.lr=1e-3,2e-3", "train.lr=1"], {}, "given twice"),
        (["train.lr=.inf,1"], {}, "finite numbers"),
        (["train.lr=1e-4..1e-2"], {}, "add --trials"),
        (["train.lr=1e-2..1e-4"], {"trials": 2}, "from a lower to a higher"),
        (["train.steps=10,20"], {"steps": 5}, "given both"),
        (GRID, {"minimise": "loss"}, "minimise is 'loss'"),
        (GRID, {"seeds": []}, "seeds is"),
        (GRID, {"jobs": 0}, "jobs is 0"),
        (GRID, {"trials": 0}, "trials is 0"),
    ],
)
def test_what_cannot_be_swept_is_refused_before_anything_runs(trained, tmp_path, options, more, message):
    with pytest.raises(ConfigError, match=message):
        sweep(CHAIN, options, out=tmp_path / "sweep", **more)
    assert not trained and not (tmp_path / "sweep").exists()


def test_a_folder_of_another_sweep_is_refused_and_more_values_are_not(trained, tmp_path):
    recipe, out = tmp_path / "own.yaml", tmp_path / "sweep"
    recipe.write_text(f"env: {{id: '{CHAIN}'}}\n")
    sweep(recipe, ["train.lr=1e-3,3e-3"], 1, out=out)
    sweep(recipe, ["train.lr=1e-3,3e-3,1e-2"], 1, out=out)
    assert len(trained) == 3
    for options, steps in ((GRID, None), (["train.lr=1e-3,3e-3"], 50), (["train.lr=1e-3,3e-3", "train.ratio=2"], None)):
        with pytest.raises(ConfigError, match="holds another sweep"):
            sweep(recipe, options, 1, steps, out=out)
    recipe.write_text(f"env: {{id: '{CHAIN}'}}\ntrain: {{ratio: 2}}\n")
    with pytest.raises(ConfigError, match="holds another sweep: content"):
        sweep(recipe, ["train.lr=1e-3,3e-3"], 1, out=out)
    (out / "plan.json").write_text('{"env": "cartpole"}')
    with pytest.raises(ConfigError, match="holds another sweep"):
        sweep(recipe, ["train.lr=1e-3,3e-3"], 1, out=out)


# Stops and failures -----------------------------------------------------------------------------------------------------


def test_a_stop_and_a_resume_measure_nothing_twice(trained, tmp_path, monkeypatch):
    act, paths = trained.act, []

    def stopped(job):
        paths.append(job["path"])
        if len(paths) == 3:
            raise KeyboardInterrupt
        return act(job)

    monkeypatch.setattr(trained, "act", stopped, raising=False)
    with pytest.raises(KeyboardInterrupt):
        sweep(CHAIN, GRID, 1, jobs=1, out=tmp_path)
    assert len(trained) == 2
    found = sweep(CHAIN, GRID, 1, jobs=1, out=tmp_path)
    assert len(set(trained)) == len(trained) == 4 and len(found.runs) == 4
    assert paths[2] == paths[3]  # the run that was stopped goes on in its folder
    sweep(CHAIN, GRID, 1, jobs=1, out=tmp_path)
    assert len(trained) == 4


def test_a_run_that_fails_is_listed_with_its_reason_and_stops_no_other(trained, tmp_path, monkeypatch):
    act = trained.act

    def fails(job):
        if job["overrides"]["train.lr"] == 0.003 and job["seed"] == 1:
            raise Failed("NumericsError: not finite")
        return act(job)

    monkeypatch.setattr(trained, "act", fails, raising=False)
    args = ["sweep", CHAIN, "train.lr=1e-3,3e-3", "--seeds", "2", "--out", str(tmp_path)]
    done = CliRunner().invoke(app, args)
    assert done.exit_code == 0 and "train.lr=0.003, seed 1: NumericsError: not finite" in done.stdout and "1 of 2" in done.stdout
    found = json.loads((tmp_path / "sweep.json").read_text())
    (failed,) = [run for run in found["runs"] if run["failed"]]
    assert failed["options"] == {"train.lr": 0.003} and failed["seed"] == 1 and failed["figures"] == {} and len(trained) == 3
    assert "| train.lr=0.003 | 1 | NumericsError" in (tmp_path / "sweep.md").read_text()
    monkeypatch.setattr(trained, "act", act, raising=False)  # it is tried again
    assert not [run for run in json.loads(CliRunner().invoke(app, [*args, "--json"]).stdout)["runs"] if run["failed"]]
    assert len(trained) == 4


def test_the_exit_code_says_that_all_have_failed(trained, tmp_path, monkeypatch):
    def fails(job):
        raise Failed("no")

    monkeypatch.setattr(trained, "act", fails, raising=False)
    done = CliRunner().invoke(app, ["sweep", CHAIN, "train.lr=1e-3,3e-3", "--out", str(tmp_path), "--json"])
    assert done.exit_code == 1 and json.loads(done.stdout)["best"] is None


def test_rows_of_other_code_are_measured_again_by_new_runs(trained, tmp_path, monkeypatch):
    act, paths = trained.act, []
    monkeypatch.setattr(trained, "act", lambda job: paths.append(job["path"]) or act(job), raising=False)
    sweep(CHAIN, ["train.lr=1e-3,3e-3"], 1, out=tmp_path)
    monkeypatch.setattr(rows, "code", lambda: "fedcba9876543210")
    found = sweep(CHAIN, ["train.lr=1e-3,3e-3"], 1, out=tmp_path)
    assert len(set(paths)) == 4 and not found.stale
    monkeypatch.setattr(rows, "_hash", lambda parts=None: "changed meanwhile")
    assert sweep(CHAIN, ["train.lr=1e-3,3e-3,1e-2"], 1, out=tmp_path).stale


# What it says -----------------------------------------------------------------------------------------------------------


def test_combinations_are_ranked_by_their_medians(trained, tmp_path, monkeypatch):
    returns = {0.001: [9, 1, 2], 0.003: [5, 3, 4], 0.01: [None] * 3}

    def act(job):
        lr = job["overrides"]["train.lr"]
        return figures(
            final_return=returns[lr][job["seed"]], rate=1000 * lr, distortion=1 / lr, solved_at=50 if job["seed"] else None
        )

    monkeypatch.setattr(trained, "act", act, raising=False)
    found = sweep(CHAIN, ["train.lr=1e-2,1e-3,3e-3"], out=tmp_path)
    assert found.best["options"] == {"train.lr": 0.003} and found.best["figures"]["final_return"] == 4
    assert [line["train.lr"] for line in found.lines()] == ["0.003", "0.001", "0.01"]
    first, second, last = found.lines()
    assert second["final_return"] == "2 (1 to 9)" and first["solved_at"] == "50, 2 of 3" and last["final_return"] == ""
    assert "train.lr=0.003" in found.sentences[0] and found.to_json()["out"] == str(tmp_path)
    assert set(found.figures()) == {"final_return over train.lr", "rate and distortion"}
    other = sweep(CHAIN, ["train.lr=1e-2,1e-3,3e-3"], minimise="distortion", out=tmp_path)
    assert other.best["options"] == {"train.lr": 0.01} and "lowest distortion" in other.sentences[0]


def test_points_are_labelled_with_the_values_and_lines_with_the_other_options(trained, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(sweeping.pictures, "points_figure", lambda *args: drawn.append(args) or b"\x89PNG")
    act = trained.act
    known = {"rate": 2.0, "distortion": 3.0}
    monkeypatch.setattr(trained, "act", lambda job: figures(**{**act(job)["figures"], **known}), raising=False)
    sweep(CHAIN, ["train.lr=1e-4,1e-2", "model=gaussian,dreamer"], 2, out=tmp_path / "a")
    (returns, x, y, log), (nats, *axes) = drawn
    assert (x, y, log) == ("train.lr", "final_return", True)
    assert returns["model=gaussian"] == [("", 1e-4, 0.5, 0, 1), ("", 1e-2, 10.5, 10, 11)]
    assert nats["model=dreamer by the transition"] == [("0.0001", 2.0, 3.0, 3.0, 3.0), ("0.01", 2.0, 3.0, 3.0, 3.0)]
    assert axes == ["rate, nats per step", "distortion, nats per step"]
    drawn.clear()
    sweep(CHAIN, ["train.lr=1e-3,2e-3"], 1, out=tmp_path / "b")
    assert drawn[0][3] is False
    drawn.clear()
    sweep(CHAIN, GRID, 1, out=tmp_path / "c")  # two numbers: no line
    ((nats, *_),) = drawn
    assert {point[0] for point in nats["by the transition"]} >= {"train.lr=0.001 agent.horizon=3"}


# Real runs --------------------------------------------------------------------------------------------------------------


def test_runs_are_trained_and_measured_in_processes_of_their_own(tmp_path, monkeypatch):
    """The one that fails is; the other one is made here, from the same JSON, which saves a second start of Python."""
    call = Processes.call

    def here(self, function, job, threads=1, seconds=None, log=None):
        if job["overrides"]["train.steps"] == 3:
            return call(self, function, job, threads, seconds, log)
        return json.loads(json.dumps(sweeping.work(json.loads(json.dumps(job))), allow_nan=False))

    monkeypatch.setattr(Processes, "call", here)
    args = ["sweep", CHAIN, *words({"eval.every": 0}), "train.steps=3,30", "--seeds", 1, "--jobs", 1, "--out", tmp_path, "--json"]
    done = CliRunner().invoke(app, list(map(str, args)))
    short, long = json.loads(done.stdout)["runs"]
    assert "lower train.batch_length" in short["failed"] and "log" in short["failed"]  # the last line of its log
    known = long["figures"]
    assert set(known) == set(sweeping.FIGURES) and known["real_steps"] == 30 and known["updates"] > 0
    assert known["final_return"] is not None and known["rate"] >= 0 and known["distortion"] is not None
    assert long["slot"] == "transition" and json.loads(done.stdout)["best"]["options"] == {"train.steps": 30}
    assert len(list(tmp_path.glob("runs/*/*/result.json"))) == 1 and "Traceback" in next(tmp_path.glob("log/*=3-*.txt")).read_text()


def test_recorded_data_alone_give_no_returns(tmp_path):
    source = small_train(tmp_path / "source", 40, options={"eval.every": 0}).run
    job = {"recipe": CHAIN, "seed": 0, "device": "cpu", "path": str(tmp_path / "run")}
    job["overrides"] = {**merged(), "train.data": [source], "train.steps": 4}
    found = sweeping.work(job)
    assert found["figures"]["final_return"] is None and found["figures"]["updates"] > 0
    assert sweeping.work(job) == found  # a finished run is read, not made again
    with pytest.raises(ConfigError, match="--minimise"):
        sweeping._check(sweeping.Plan(CHAIN, {"train.data": [source]}, {"train.lr": (1e-3, 2e-3)}, True))


def test_what_has_no_distortion_says_why(tmp_path):
    job = {"recipe": CHAIN, "seed": 0, "device": "cpu", "path": str(tmp_path / "run")}
    job["overrides"] = {k: v for k, v in merged({"eval.every": 0}).items() if not k.startswith("model.")}
    found = sweeping.work({**job, "overrides": {**job["overrides"], "model": "anchored", "size": "nano", "train.steps": 20}})
    assert found["figures"]["rate"] is not None and found["figures"]["distortion"] is None and "its rate is all" in found["skipped"]


# Searches ---------------------------------------------------------------------------------------------------------------


def test_a_search_without_optuna_names_the_extra(trained, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingExtraError, match=r"worldmodel\[sweep\]"):
        sweep(CHAIN, RANGES, trials=2, out=tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()


def test_a_search_stays_in_its_ranges_and_goes_on_where_it_was_stopped(trained, tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    whole = sweep(CHAIN, RANGES, 1, jobs=1, trials=13, out=tmp_path / "whole")
    count = len(trained)
    sweep(CHAIN, RANGES, 1, jobs=1, trials=4, out=tmp_path / "parts")
    again = sweep(CHAIN, RANGES, 1, jobs=1, trials=13, out=tmp_path / "parts")
    assert len(trained) == 2 * count and again.runs == whole.runs
    options = [run["options"] for run in whole.runs]
    assert all(1e-4 <= x["train.lr"] <= 1e-2 and 0 <= x["train.scales.rep"] <= 1 for x in options)
    assert {x["model"] for x in options} == {"gaussian", "dreamer"} and count == len(options) == 13
    monkeypatch.setattr(
        rows, "code", lambda: "fedcba9876543210"
    )  # all is measured again, with other figures, and no other is asked
    monkeypatch.setattr(trained, "act", lambda job: figures(final_return=-job["overrides"]["train.lr"]), raising=False)
    other = sweep(CHAIN, RANGES, 1, jobs=1, trials=13, out=tmp_path / "whole")
    assert [run["options"] for run in other.runs] == options and len(trained) == 3 * count


def test_a_search_learns_from_what_it_has_measured_and_survives_failures(monkeypatch):
    pytest.importorskip("optuna")
    plan = planned(CHAIN, ["train.scales.rep=0.0..1.0"], None, True, "distortion")
    finished = [({"train.scales.rep": x / 20}, abs(x / 20 - 0.3)) for x in range(20)] + [({"train.scales.rep": 0.9}, None)]
    near = [suggested(plan, finished, number)["train.scales.rep"] for number in range(8)]
    assert sum(abs(x - 0.3) < 0.2 for x in near) >= 6
    assert near[0] == suggested(plan, finished, 0)["train.scales.rep"]
