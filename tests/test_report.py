"""`report`: one page of what is known of a run."""

from __future__ import annotations

import json
import shutil

import pytest
from small_runs import small_train
from typer.testing import CliRunner

import worldmodel as wm
from worldmodel import ConfigError, CorruptError, Run
from worldmodel.cli import app

SECTIONS = ["Curves", "Pictures", "Options", "Diagnosis"]


def trained(folder, **log):
    small_train(folder, 120, options={"eval.every": 60, "eval.threshold": -1000.0, **{f"log.{k}": v for k, v in log.items()}})
    return Run.open(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    return trained(tmp_path_factory.mktemp("runs") / "a <b> run", tensorboard=True, pictures=120, every=1)


def pages(run, out):
    """(answer, HTML, Markdown)"""
    answer = wm.report(run, out)
    return answer, *((out / f"report.{kind}").read_text(encoding="utf-8") for kind in ("html", "md"))


def test_the_page_holds_curves_films_and_options_and_asks_the_network_for_nothing(run, tmp_path):
    answer, page, text = pages(run, tmp_path)
    assert all(f"<h2>{name}</h2>" in page and f"## {name}" in text for name in SECTIONS)
    assert "http://" not in page and "https://" not in page and "<script" not in page
    assert "data:image/gif;base64," in page and page.count("data:image/png;base64,") >= 2
    assert "Run a &lt;b&gt; run" in page and "<b>" not in page
    assert "Solved at real step 60" in text and answer["options"]["train.prefill"] == run.config.train.prefill
    assert f"| train.prefill | {run.config.train.prefill} | 500 |" in text
    assert [entry["real_steps"] for entry in answer["evaluations"]] == [60, 120]
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8")) == answer


def test_the_command_writes_into_the_run_and_prints_its_sentences(run):
    result = CliRunner().invoke(app, ["report", str(run.path)])
    assert result.exit_code == 0 and "The best agent is that of real step" in result.stdout
    assert (run.path / "report.html").is_file()
    again = CliRunner().invoke(app, ["report", str(run.path), "--json"])
    assert json.loads(again.stdout)["sentences"][0] == result.stdout.splitlines()[0]


def test_what_diagnose_said_is_repeated_and_else_named_as_missing(run, tmp_path):
    assert "was not run yet" in pages(run, tmp_path)[2]
    file = run.path / "diagnosis" / "diagnosis.json"
    file.parent.mkdir()
    file.write_text(json.dumps({"step": 120, "sentences": ["The dreams are too bright."]}), encoding="utf-8")
    page = pages(run, tmp_path)[1]
    assert "The dreams are too bright." in page and "real step 120" in page
    file.write_text("{", encoding="utf-8")
    with pytest.raises(CorruptError, match=r"diagnosis\.json"):
        wm.report(run, tmp_path)
    shutil.rmtree(file.parent)


def test_a_run_that_wrote_nothing_for_tensorboard_still_has_its_returns(tmp_path):
    run = trained(tmp_path / "run", tensorboard=False)
    _, page, text = pages(run, tmp_path / "out")
    assert page.count("data:image/png;base64,") == 1 and text.count("(`log.tensorboard`)") == 2


def test_a_run_that_is_not_finished_says_so(run, tmp_path):
    folder = shutil.copytree(run.path, tmp_path / "run")
    (folder / "result.json").unlink()
    sentences = wm.report(folder)["sentences"]
    assert sentences[0] == "The run is not finished: this is its checkpoint of real step 120."
    assert sentences[1].startswith("Solved at real step 60: the mean return reached -1000,")


def test_the_threshold_of_the_environment_counts_where_the_run_has_none(tmp_path):
    folder = tmp_path / "run"
    small_train(folder, 40, "CartPole-v1", options={"eval.every": 20, "env.max_episode_steps": 10})
    (folder / "result.json").unlink()
    assert "no mean return reached 475 " in " ".join(wm.report(folder)["sentences"])


def test_a_run_without_a_checkpoint_has_nothing_to_report(run, tmp_path):
    folder = shutil.copytree(run.path, tmp_path / "run")
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(ConfigError, match="no checkpoint yet"):
        wm.report(folder, tmp_path)
