"""A diagnosis of a finished run: every section is filled or says why not, and the report's files hold the same."""

from __future__ import annotations

import json
import math
from functools import partial

import pytest
import torch
from small_runs import CHAIN, OPTIONS
from typer.testing import CliRunner

import worldmodel as wm
from worldmodel import ConfigError, Run
from worldmodel.agents import decisions, diagnosis
from worldmodel.cli import app
from worldmodel.commands.train import train
from worldmodel.data import Batch, Episodes
from worldmodel.diagnostics import fidelity
from worldmodel.storage.replay import Replay
from worldmodel.view import report, tensorboard

SECTIONS = ["rollouts", "prior", "latents", "holes", "smoothness", "likelihood", "exploitation", "decisions"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("runs") / "chain"
    train(CHAIN, steps=120, run_dir=folder, overrides=OPTIONS, device="cpu")
    return Run.open(folder)


@pytest.fixture(scope="module")
def found(run, tmp_path_factory):
    """(what the command printed, the folder of the report)."""
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diagnosis, "rollouts", partial(fidelity.rollouts, updates=50))
        patch.setattr(decisions, "MOST_SECONDS", 1.0)
        result = CliRunner().invoke(app, ["diagnose", str(run.path), "--out", str(folder), "--episodes", "24", "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout), folder


def test_every_section_is_filled_or_says_why_not(found):
    sections = found[0]["sections"]
    assert list(sections) == SECTIONS
    for name, section in sections.items():
        assert section["figures"] or section["skipped"], name
        for figure, values in section["figures"].items():
            assert set(values) == {"value", "low", "high", "unit"}, figure
            assert values["value"] is None or math.isfinite(values["value"])
    assert sum(bool(section["figures"]) for section in sections.values()) >= 6


def test_its_sentences_are_those_of_the_sections_in_their_order(found):
    answer = found[0]
    assert answer["sentences"] == [text for section in answer["sections"].values() for text in section["sentences"]]
    assert len(answer["sentences"]) >= len(SECTIONS) // 2 and all(text.endswith((".", "`")) for text in answer["sentences"])


def test_figures_have_names_that_no_other_section_has(found):
    names = [figure for section in found[0]["sections"].values() for figure in section["figures"]]
    assert len(names) == len(set(names))


def test_the_page_holds_its_pictures_and_asks_the_network_for_nothing(found):
    answer, folder = found
    text = (folder / "diagnosis.html").read_text(encoding="utf-8")
    assert "http://" not in text and "https://" not in text and "<script" not in text
    assert text.count("data:image/png;base64,") >= 2
    assert all(f"<h2>{name}</h2>" in text for name in SECTIONS)
    assert json.loads((folder / "diagnosis.json").read_text(encoding="utf-8")) == answer
    assert all(f"## {name}" in (folder / "diagnosis.md").read_text(encoding="utf-8") for name in SECTIONS)


def test_tensorboard_shows_every_known_figure(found):
    answer, folder = found
    events = tensorboard.read(folder)
    for name, section in answer["sections"].items():
        for figure, values in section["figures"].items():
            if values["value"] is not None:
                (point,) = events.scalars[f"diagnosis/{name}/{figure.replace(' ', '_')}"]
                assert point[-1] == pytest.approx(values["value"], rel=1e-5)


def test_a_slot_without_a_prior_and_too_few_episodes_are_errors_that_name_what_there_is(run):
    with pytest.raises(ConfigError, match=r"slot is 'marginal'.*initial, transition"):
        wm.diagnose(run, "marginal", episodes=4)
    with pytest.raises(ConfigError, match="at least 4"):
        wm.diagnose(run, episodes=3)


def rows(first: list[bool]) -> Batch:
    count = len(first)
    flags = torch.zeros(1, count, dtype=torch.bool)
    number = torch.arange(count, dtype=torch.float32)[None]
    return Batch({"obs": number[..., None]}, number[..., None], number[..., None], number, torch.tensor([first]), flags, flags)


def test_episodes_are_chosen_whole_and_a_stream_that_opens_within_one_begins_at_the_next():
    stream = rows([False, True, False, True, True, False, False])
    episodes = diagnosis.whole(stream)
    assert episodes.lengths.tolist() == [2, 1, 3]
    assert diagnosis.chosen(episodes, torch.tensor([0, 2])).rows.reward.tolist() == [[1, 2, 4, 5, 6]]
    assert diagnosis.whole(rows([False, False])) is None


def test_of_several_streams_the_newest_episodes_of_each_are_replayed():
    class Streams(Replay):
        lengths = (4, 3, 0)

        def __init__(self):
            pass

        def stream(self, number: int) -> Batch:
            return rows([True, False, True, False] if number == 0 else [False, True, True])

    found = diagnosis.replayed(Streams(), 2)
    assert isinstance(found, Episodes) and found.rows.reward.tolist() == [[2, 3, 2]]


def test_a_report_escapes_what_it_is_given_and_shows_commands_as_code():
    part = report.Part("a <b>", ["Use `x < y`."], ("one", "two"), [("1|2", "<i>")], "because <c>", {"a picture": b"\x89PNG"})
    text = report.page("t & u", {"run": "<r>"}, ["`go`"], [part])
    assert "<h2>a &lt;b&gt;</h2>" in text and "<code>x &lt; y</code>" in text and "<td>&lt;i&gt;</td>" in text
    assert "<title>t &amp; u</title>" in text and "data:image/png;base64," in text and "because &lt;c&gt;" in text
    plain = report.markdown("t", {"run": "r"}, ["`go`"], [part])
    assert "1\\|2" in plain and "Skipped: because <c>" in plain
