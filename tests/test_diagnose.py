"""A diagnosis of a finished run: every section is filled or says why not, and the report's files hold the same."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial

import numpy as np
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
from worldmodel.diagnostics.evidence import Section
from worldmodel.envs.tiny import Chain
from worldmodel.storage.recording import Recording
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


# Recorded data ------------------------------------------------------------------------------------------------------------


def walked(count: int, length: int = 5, env_id: str | None = None) -> Recording:
    """Random walks on a chain."""
    env, rng, episodes = Chain(length), np.random.default_rng(0), []
    for _ in range(count):
        observations, steps = [env.reset()[0]], []
        while not steps or not any(steps[-1][2:]):
            action = int(rng.integers(2))
            obs, reward, terminated, truncated, _ = env.step(action)
            observations.append(obs)
            steps.append((action, reward, terminated, truncated))
        columns = map(np.array, zip(*steps))
        names = ("observations", "actions", "rewards", "terminations", "truncations")
        episodes.append(dict(zip(names, (np.stack(observations), *columns))))
    return Recording.from_episodes(env.observation_space, env.action_space, episodes, env_id=env_id, origin="walks")


@pytest.fixture(scope="module")
def walks(tmp_path_factory):
    """24 walks as a file, without the name of their environment."""
    return walked(24).write(tmp_path_factory.mktemp("walks") / "walks.npz")


def some(found: Recording, first: int, last: int) -> Recording:
    """Episodes first..last of a recording."""
    episodes = [found.episode(i) for i in range(first, last)]
    return Recording.from_episodes(found.obs_spec, found.action_spec, episodes, env_id=found.env_id, origin="some")


@pytest.fixture(scope="module")
def recorded(walks, tmp_path_factory) -> Run:
    """A run that learned from recordings, of an environment that is not installed."""
    folder = tmp_path_factory.mktemp("recorded") / "run"
    train(CHAIN, steps=20, run_dir=folder, overrides={**OPTIONS, "env.id": "Nowhere-v0"}, device="cpu", data=walks)
    return Run.open(folder)


@pytest.fixture
def quick(monkeypatch):
    """Sections that do not depend on where episodes come from measure nothing."""
    for name in ("prior", "latents", "holes", "smoothness", "likelihood"):
        monkeypatch.setattr(diagnosis, name, lambda *_: Section())
    monkeypatch.setattr(diagnosis, "rollouts", partial(fidelity.rollouts, updates=0))


def test_a_run_of_recordings_without_an_environment_is_measured_on_what_it_learned_from_and_says_so_first(recorded, walks, quick):
    found = wm.diagnose(recorded)
    first, *rest = found.sections["rollouts"].sentences
    assert "Errors flatter: the 6 held-out episodes are replayed ones" in first and "ConfigError" in first
    assert f"`worldmodel diagnose {recorded.path} --data FILE`" in first and rest and found.sentences[0] == first
    assert found.sections["rollouts"].figures["reward error at 1"].known
    for name in ("exploitation", "decisions"):
        assert "'Nowhere-v0' is not registered" in found.sections[name].skipped
    assert not found.sections["decisions"].figures and "greedy return gap" not in found.sections["exploitation"].figures


def test_recorded_episodes_that_the_model_has_not_seen_flatter_nothing(recorded, walks, tmp_path, quick):
    fresh = some(Recording.read(walks), 0, 9)
    file = fresh.write(tmp_path / "fresh.npz")
    lines = []
    found = wm.diagnose(recorded, data=file, episodes=6, log=lines.append)
    assert "flatter" not in found.sections["rollouts"].sentences[0] and lines[0].startswith("6 held-out episodes, ")
    agent = recorded.agent()
    (warning,) = diagnosis.held_out(agent, recorded, 6, [str(file), str(walks)]).warning
    assert f"the model has learned from {walks}, which --data names" in warning
    played = diagnosis.held_out(agent, recorded, 3, [str(file)]).played
    chosen = [fresh.episode(i)["observations"] for i in (0, 4, 8)]  # evenly spaced
    assert played.lengths.tolist() == [len(x) for x in chosen]
    assert (played.rows.obs["obs"][0].numpy() == [row for x in chosen for row in x]).all()


def test_the_last_quarter_of_the_replay_is_held_out_and_the_rest_is_fitted():
    def of(count: int) -> Episodes:
        return Episodes(rows([True, False, False] * count))

    fitted, played = diagnosis.divided(of(20), 40)
    assert played.rows.reward[0].tolist() == list(range(45, 60)) and fitted.rows.reward[0].tolist() == list(range(45))
    fitted, played = diagnosis.divided(of(5), 40)
    assert (len(fitted.lengths), len(played.lengths)) == (1, 4)
    assert len(diagnosis.divided(of(400), 40)[0].lengths) == diagnosis.FITTED_EPISODES
    assert diagnosis.divided(of(400), 40)[1].rows.reward[0, -1] == 1199
    assert diagnosis.first_steps(of(2), 1).rows.reward[0].tolist() == [0, 1, 3, 4]
    with pytest.raises(ConfigError, match=r"holds 4 episodes.*at least 5.*--data"):
        diagnosis.divided(of(4), 40)


def test_data_that_do_not_fit_the_run_are_refused(run, recorded, walks, tmp_path):
    found = Recording.read(walks)
    few = some(found, 0, 3).write(tmp_path / "few.npz")
    with pytest.raises(ConfigError, match=r"3 episodes.*at least 4"):
        wm.diagnose(recorded, data=few)
    other = replace(found, env_id="Elsewhere-v0").write(tmp_path / "other.npz")
    with pytest.raises(ConfigError, match=r"'Elsewhere-v0'.*learned 'worldmodel.envs:Chain-v0'"):
        wm.diagnose(run, data=other)
    long = walked(5, length=6).write(tmp_path / "long.npz")
    with pytest.raises(ConfigError, match="Expected the same spaces"):
        wm.diagnose(recorded, data=long)


def test_a_run_that_played_needs_its_environment_or_data(run, walks, quick, monkeypatch):
    def fail(*_, **__):
        raise ConfigError("it is gone")

    for name in ("exploitation", "decisions"):
        monkeypatch.setattr(diagnosis, name, lambda *_, **__: Section())
    monkeypatch.setattr(diagnosis, "collect", fail)
    with pytest.raises(ConfigError, match="it is gone"):
        wm.diagnose(run, episodes=4)
    arguments = ["diagnose", str(run.path), "--data", str(walks), "--episodes", "5", "--out", str(walks.parent / "out"), "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0 and "5 held-out episodes" in result.stderr, result.output


# Episodes -------------------------------------------------------------------------------------------------------------


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
