"""The checkpoint that was evaluated best: which one it is, that it stays, and who uses it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_runs import CHAIN, Nervous, small_train
from test_interrupted import strike
from typer.testing import CliRunner, Result

from worldmodel.agents import Dreamer
from worldmodel.agents.training import resources
from worldmodel.agents.training.callback import RunCallback
from worldmodel.agents.training.session import make_agent
from worldmodel.agents.training.signals import Interrupted
from worldmodel.cli import app
from worldmodel.errors import ConfigError, CorruptError, StorageError
from worldmodel.storage import checkpoint, files
from worldmodel.storage.best import Best
from worldmodel.storage.run import Run

OPTIONS = {"eval.every": 10, "train.ratio": 0.04, "checkpoint.every": 0, "checkpoint.keep": 1}
RISE_AND_FALL = {10: (1.0, 1.0), 20: (5.0, 4.0), 30: (9.0, 2.0), 40: (3.0, 9.0), 50: (0.0, 0.0)}
"""Real steps -> mean return of the evaluation and of its confirmation; that of 30 is luck."""


@pytest.fixture
def script(monkeypatch) -> Callable[..., list[tuple[int, int]]]:
    """Sets what evaluations find, by real steps; gives (real steps, seed) of those that were asked for."""

    def set_to(found: Mapping[int, tuple[float, float]], final: Callable[[int], float] = float) -> list[tuple[int, int]]:
        asked: list[tuple[int, int]] = []

        def scripted(model: Any, env: Any, episodes: int, seed: int, **_: Any) -> tuple[list[float], list[int]]:
            asked.append((step := model.num_timesteps, seed))
            value = final(step) if seed == 30_000 else found[step][seed // 10_000 - 1]
            return [value] * episodes, [1] * episodes

        monkeypatch.setattr("worldmodel.agents.training.callback.evaluate", scripted)
        return asked

    return set_to


def learn(folder: Path, steps: int = 50, said: list[str] | None = None, **options: Any) -> Any:
    log = (said if said is not None else []).append
    return small_train(folder, steps, options={**OPTIONS, **options}, resume=folder.exists(), log=log)


@pytest.fixture(scope="module")
def fallen_run(tmp_path_factory) -> Path:
    """A run that was best at step 20 and fell afterwards."""
    folder = tmp_path_factory.mktemp("fallen") / "run"
    with pytest.MonkeyPatch.context() as patch:
        found = lambda model, env, episodes, seed, **_: ([_return(model.num_timesteps, seed)] * episodes, [1] * episodes)  # noqa: E731
        patch.setattr("worldmodel.agents.training.callback.evaluate", found)
        learn(folder)
    return folder


def _return(step: int, seed: int) -> float:
    return float(step) if seed == 30_000 else RISE_AND_FALL[step][seed // 10_000 - 1]


@pytest.fixture
def run(fallen_run, tmp_path) -> Run:
    shutil.copytree(fallen_run, tmp_path / "run")
    return Run.open(tmp_path / "run")


def command(*args: Any) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def spoil(run: Run, step: int) -> None:
    file = checkpoint.folder_of(run.checkpoint_folder, step) / "agent.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


# Which one ----------------------------------------------------------------------------------------------------------------


def test_the_best_stays_beside_the_newest_and_counts_by_the_lower_of_both_evaluations(run):
    assert run.best == Best(20, 5.0, 4.0, 2) and run.best.score == 4.0
    assert json.loads((run.path / "best.json").read_text()) == run.best.to_json()
    assert run.checkpoints == [20, 50]  # the lucky one of 30 and that of 40, lucky in its confirmation, are gone


def test_only_an_evaluation_that_may_be_the_best_is_confirmed(script, tmp_path):
    asked = script(RISE_AND_FALL)
    learn(tmp_path / "run")
    confirmed = [step for step, seed in asked if seed == 20_000]
    assert confirmed == [10, 20, 30]


def test_of_equals_the_later_is_the_best(script, tmp_path):
    script(dict.fromkeys(range(10, 60, 10), (7.0, 7.0)))
    result = learn(tmp_path / "run")
    run = Run.open(tmp_path / "run")
    assert run.best.step == result.final_step == 50 and run.checkpoints == [50]


def test_a_solved_run_that_falls_keeps_the_agent_that_solved_it(script, tmp_path):
    script(RISE_AND_FALL)
    result = learn(tmp_path / "run", **{"eval.threshold": 3.5})
    assert result.solved_at == 20 == result.best["step"] == Run.open(tmp_path / "run").agent().num_timesteps


def test_without_evaluations_the_newest_is_used_and_said_to_be(script, tmp_path):
    script({})
    result = learn(tmp_path / "run", 20, **{"eval.every": 0})
    run = Run.open(tmp_path / "run")
    assert run.best is None and not (run.path / "best.json").exists() and run.agent().num_timesteps == 20
    assert (result.best, result.final_step, result.final_return, result.newest_return) == (None, 20, 20.0, 20.0)
    assert "step 20, the newest: no evaluation while training named a best one" in command("eval", run.path, "--episodes", 1).stderr
    refused = command("eval", run.path, "--step", "best")
    assert refused.exit_code == 2 and "has no best checkpoint: nothing was evaluated" in refused.stderr


# Who uses it --------------------------------------------------------------------------------------------------------------


def test_agents_are_the_best_and_worlds_the_newest(run):
    assert run.agent().num_timesteps == run.agent("best").num_timesteps == Dreamer.load(run.path).num_timesteps == 20
    assert run.agent("newest").num_timesteps == run.manifest()["step"] == 50
    newest, other = (run.world_model(step).state_dict() for step in (None, "best"))
    assert all(np.array_equal(x, run.read("newest")[0]["world"][name]) for name, x in newest.items())
    assert all(np.array_equal(x, run.read(20)[0]["world"][name]) for name, x in other.items())
    assert run.replay("best").added < run.replay().added
    with pytest.raises(ConfigError, match=r"step is 'first'; expected 'best', 'newest' or one of \[20, 50\]"):
        run.agent("first")


def test_eval_says_which_checkpoint_it_uses_and_takes_another(run):
    for words, step, said in (
        ((), 20, "step 20, the best evaluated (mean return 5.0, confirmation 4.0); the newest is step 50"),
        (("--step", "best"), 20, "the best evaluated"),
        (("--step", "newest"), 50, "step 50, as asked for"),
        (("--step", "20"), 20, "step 20, the best evaluated"),
    ):
        done = command("eval", run.path, "--episodes", 1, "--json", *words)
        assert json.loads(done.stdout)["step"] == step and said in done.stderr
    for word, why in (("30", "no checkpoint of step 30"), ("last", "expected best, newest, or the real steps"), ("-1", "expected")):
        done = command("eval", run.path, "--step", word)
        assert done.exit_code == 2 and why in done.stderr


def test_the_result_tells_the_return_of_the_best_and_of_the_newest_agent(run):
    result = run.result
    assert (result["final_step"], result["final_return"], result["newest_return"]) == (20, 20.0, 50.0)
    assert result["best"] == run.best.to_json()
    shown = " ".join(command("train", run.path, "--resume").stdout.replace("│", " ").split())
    assert "20, the best evaluated (5.00, confirmation 4.00)" in shown
    assert "50.00 (the same episodes, agent of step 50)" in shown


def test_the_free_space_that_is_asked_for_includes_the_best(run, monkeypatch):
    agent, warned = run.agent("newest", env=CHAIN), []
    agent.replay = run.replay()
    needed = agent.replay.disk_bytes - run.replay_bytes
    for free, count in ((2.1, 0), (1.9, 1)):
        usage = shutil._ntuple_diskusage(0, 0, int(free * run.checkpoint_bytes) + max(0, needed))
        monkeypatch.setattr(resources.shutil, "disk_usage", lambda path, usage=usage: usage)
        warned.clear()
        resources.warn_if_large(agent, run, warned.append)
        assert sum("more checkpoints" in text for text in warned) == count


# Damage -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"step": 20}', '{"step": "../x", "mean_return": 1, "confirmation": 1, "episodes": 1}']
)
def test_where_best_json_is_damaged_the_newest_is_used_with_a_warning(run, text, caplog):
    (run.path / "best.json").write_text(text)
    assert run.agent().num_timesteps == Dreamer.load(run.path).num_timesteps == 50
    assert "The best checkpoint cannot be used, so the newest one is." in caplog.text and "best.json" in caplog.text
    with pytest.raises(CorruptError, match=r"best\.json"):
        run.agent("best")
    assert "step 50, the newest: the best one is damaged" in command("eval", run.path, "--episodes", 1).stderr


def test_what_is_no_file_is_not_opened(run):
    (run.path / "best.json").unlink()
    os.mkfifo(run.path / "best.json")
    with pytest.raises(CorruptError, match="is no file of at most"):
        run.agent("best")
    assert run.agent().num_timesteps == 50


def test_where_the_best_checkpoint_is_damaged_the_newest_is_used_and_a_resume_finds_another(run, script, caplog):
    spoil(run, 20)
    assert run.agent().num_timesteps == 50 and "step-000000000020/agent.safetensors" in caplog.text
    with pytest.raises(CorruptError, match=r"agent\.safetensors"):
        run.agent("best")
    script({60: (-1.0, -2.0)})
    result, said = learn(run.path, 60, said := []), said
    assert any("The best checkpoint, of step 20, is lost: " in line and "agent.safetensors" in line for line in said)
    assert Run.open(run.path).best.step == result.final_step == 60


def test_where_the_newest_is_damaged_a_resume_goes_on_from_the_best(run, script):
    spoil(run, 50)
    script(RISE_AND_FALL)
    result = learn(run.path)
    assert result.best["step"] == 20 and Run.open(run.path).checkpoints == [20, 50]


# Going back ---------------------------------------------------------------------------------------------------------------


def test_a_resume_that_goes_back_behind_the_best_takes_the_best_before(script, tmp_path):
    """The checkpoints of 30 and 40 lie behind the fence of 20, from where a resume goes on; the best then was 10."""
    script({**RISE_AND_FALL, 10: (5.0, 5.0), 30: (8.0, 8.0)})
    fenced = {"checkpoint.fence": True, "checkpoint.every": 20, "checkpoint.keep": 1}
    learn(tmp_path / "run", 39, **fenced)
    run = Run.open(tmp_path / "run", write=True)
    assert run.best.step == 30 and run.checkpoints == [10, 20, 30, 39]
    agent = make_agent(run.config, 0, "cpu")
    with run:
        progress = run.resume(agent, keep_newer=False, log=lambda text: None)
    agent.env.close()
    assert run.checkpoints == [10, 20] and run.best == progress["best"]
    assert run.best.step == run.agent().num_timesteps == 10


def test_a_resumed_run_has_the_best_of_an_unbroken_one(fallen_run, script, tmp_path):
    script(RISE_AND_FALL)
    for steps in (25, 40, 50):
        result = learn(tmp_path / "run", steps)
    assert result.best == Run.open(fallen_run).result["best"] and Run.open(tmp_path / "run").checkpoints == [20, 50]


def test_a_run_that_begins_anew_forgets_the_best(run, script):
    shutil.rmtree(run.checkpoint_folder)
    script(dict.fromkeys(range(10, 60, 10), (-1.0, -1.0)))
    assert learn(run.path).best == Best(50, -1.0, -1.0, 2).to_json() and run.checkpoints == [50]


def test_the_best_checkpoint_holds_the_weights_that_were_evaluated(script, tmp_path, monkeypatch):
    """A signal among the updates of step 20 saves what is there; the resume makes the rest, evaluates, and saves again."""
    options = {"train.prefill": 15, "train.pretrain": 6, "eval.every": 20}
    Nervous.steps = 0
    strike(monkeypatch, 3)
    with pytest.raises(Interrupted):
        small_train(tmp_path / "run", 30, "Nervous-v0", options={**OPTIONS, **options})
    evaluated: list[int] = []
    script({20: (5.0, 5.0)}, lambda step: 0.0)
    measure = RunCallback.measure
    monkeypatch.setattr(RunCallback, "measure", lambda self, *a: evaluated.append(self.model.learner.updates) or measure(self, *a))
    small_train(tmp_path / "run", 30, "Nervous-v0", options={**OPTIONS, **options}, resume=True)
    run = Run.open(tmp_path / "run")
    assert run.best.step == 20 and run.agent().learner.updates == evaluated[0] > 3


# A kill and a full disk ---------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """In place of a process's end."""


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_kill_while_best_json_is_written_leaves_one_that_names_a_whole_checkpoint(script, tmp_path, monkeypatch, moment):
    script({**RISE_AND_FALL, 30: (9.0, 9.0)})
    learn(tmp_path / "run", 25)
    replace = os.replace

    def kill(source: Any, target: Any) -> None:
        if moment == "after":
            replace(source, target)
        if Path(target).name == "best.json":
            raise Killed
        if moment == "before":
            replace(source, target)

    monkeypatch.setattr(files.os, "replace", kill)
    with pytest.raises(Killed):
        learn(tmp_path / "run")
    monkeypatch.undo()
    run = Run.open(tmp_path / "run")
    assert run.best.step == run.agent().num_timesteps == {"before": 20, "after": 30}[moment]
    assert {20, 30} <= set(run.checkpoints)
    script({**RISE_AND_FALL, 30: (9.0, 9.0)})
    assert learn(tmp_path / "run").best["step"] == 30 and run.checkpoints == [30, 50]


def test_a_best_that_could_not_be_saved_is_not_named(script, tmp_path, monkeypatch):
    script(RISE_AND_FALL)
    write = checkpoint.write

    def full(parent: Path, step: int, *args: Any, **kwargs: Any) -> Path:
        if step == 20:
            raise StorageError("Could not write: no space left on device.")
        return write(parent, step, *args, **kwargs)

    monkeypatch.setattr(checkpoint, "write", full)
    said: list[str] = []
    result = learn(tmp_path / "run", said=said)
    assert any("The checkpoint at real step 20 could not be saved" in line for line in said)
    assert result.best == {"step": 40, "mean_return": 3.0, "confirmation": 9.0, "episodes": 2}
    assert Run.open(tmp_path / "run").checkpoints == [40, 50]


def test_a_best_json_that_cannot_be_written_leaves_the_one_before(script, tmp_path, monkeypatch):
    script(RISE_AND_FALL)
    learn(tmp_path / "run", 15)
    write = files.write
    monkeypatch.setattr(files, "write", lambda path, data: write(path.parent / "gone" / ("x" * 300), data))
    said: list[str] = []
    with pytest.raises(StorageError):
        learn(tmp_path / "run", 45, said)
    run = Run.open(tmp_path / "run")
    assert run.best.step == 10 and run.agent().num_timesteps == 10
