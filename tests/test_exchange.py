"""What `worldmodel data` does: experience in and out, and episodes that never happened."""

from __future__ import annotations

import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import IMAGE, VECTOR, Toy
from gymnasium import spaces
from small_runs import CHAIN, merged, small_train
from test_cli import command, only_object  # noqa: F401 (a fixture)
from test_recording import assert_same

from worldmodel.agents import exchange
from worldmodel.agents.exchange import dreamed_episodes
from worldmodel.commands import data
from worldmodel.commands.train import train
from worldmodel.envs.sources import recording
from worldmodel.errors import ConfigError
from worldmodel.model import WorldModel
from worldmodel.storage.recording import Recording
from worldmodel.storage.run import Run

KEYS = ("source out env_id observation_space action_space episodes steps terminated mean_return std_return mean_length").split()
DICT = spaces.Dict({"camera": IMAGE, "joints": VECTOR, "mode": spaces.Discrete(3)})
gym.register("ManySenses-v0", lambda: Toy(DICT, spaces.Box(-2, 2, (2,), np.float32)))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return Run.open(small_train(tmp_path_factory.mktemp("exchange") / "run", 60, options={"eval.every": 0}).run)


@pytest.fixture(autouse=True)
def _datasets(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))


# Dreams -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["replay", "prior"])
def test_dreamed_episodes_are_episodes_of_the_environments_spaces(run, start):
    dreams = dreamed_episodes(run, 7, horizon=5, start=start, seed=3)
    assert dreams.episodes == 7 and dreams.lengths.max() <= 5 and dreams.env_id == CHAIN and "dreamed by" in dreams.origin
    state = run.read()[1]
    assert dreams.obs_spec.to_json() == state["observation"] and dreams.action_spec.to_json() == state["action"]
    assert ((dreams.obs["obs"] >= 0) & (dreams.obs["obs"] <= 1)).all() and set(dreams.action.tolist()) <= {0, 1}
    again, other = dreamed_episodes(run, 7, 5, start=start, seed=3), dreamed_episodes(run, 7, 5, start=start, seed=4)
    assert_same(dreams, again)
    assert not np.array_equal(dreams.obs["obs"][:6], other.obs["obs"][:6])


def test_dreams_in_several_batches_are_as_many_as_were_asked_for(run, monkeypatch):
    monkeypatch.setattr(exchange, "DREAM_BATCH", 3)
    dreams = dreamed_episodes(run, 7, horizon=2)
    assert dreams.episodes == 7 and not np.array_equal(dreams.obs["obs"][:2], dreams.obs["obs"][6:8])


def test_what_is_dreamed_is_what_the_model_imagines(run, monkeypatch):
    """The recorded actions, rewards and decoded observations are those of the imagined worlds, step by step."""
    seen, step = [], exchange.ImaginedWorld.step

    def watched(self, action):
        arrival = step(self, action)
        seen.append((action, arrival, self.world.obs.raw(self.world.decode(arrival.feature))["obs"]))
        return arrival

    monkeypatch.setattr(exchange.ImaginedWorld, "step", watched)
    dreams = dreamed_episodes(run, 1, horizon=6)
    for t in range(dreams.steps):
        action, arrival, obs = seen[t]
        np.testing.assert_array_equal(dreams.action_spec.encode(dreams.action[[t]]), action.numpy())
        assert dreams.reward[t] == arrival.reward[0] and dreams.terminated[t] == arrival.terminated[0]
        np.testing.assert_array_equal(dreams.obs["obs"][t + 1], obs[0])
    assert dreams.terminated[-1] ^ dreams.truncated[-1]


def test_the_end_of_a_dream_is_the_models(run, monkeypatch):
    def ending(self, state, policy, horizon, sampling):
        dream = imagine(self, state, policy, horizon, sampling)
        return type(dream)(dream.action, dream.reward, torch.zeros_like(dream.cont), dream.uncertainty, dream.feature, dream.last)

    imagine = WorldModel.imagine
    monkeypatch.setattr(WorldModel, "imagine", ending)
    dreams = dreamed_episodes(run, 4, horizon=6)
    assert dreams.lengths.tolist() == [1] * 4 and dreams.terminated.all() and not dreams.truncated.any()


def test_pictures_dicts_and_continuous_actions_are_dreamed_and_exchanged(tmp_path):
    options = {**merged(), "model.encoder.depth": 2, "model.decoder.depth": 2, "eval.every": 0, "eval.episodes": 1}
    result = train("ManySenses-v0", steps=20, run_dir=tmp_path / "run", overrides=options, device="cpu")
    dreams = dreamed_episodes(result.run, 3, horizon=4)
    assert dreams.obs["camera"].dtype == np.uint8 and dreams.obs["camera"].shape[1:] == (16, 16, 3)
    assert dreams.action.dtype == np.float32 and np.abs(dreams.action).max() <= 2
    data.export_data(result.run, "minari:senses/dreamed-v0", 3, horizon=4)
    assert_same(dreams, recording("minari:senses/dreamed-v0"))


def test_a_world_model_learns_from_dreams_alone(run, tmp_path):
    dreamed_episodes(run, 10, horizon=8).write(tmp_path / "dreams.npz")
    options = merged({"train.pretrain": 2, "train.ratio": 0.5})
    result = train(CHAIN, steps=4, run_dir=tmp_path / "second", overrides=options, device="cpu", data=tmp_path / "dreams.npz")
    assert result.updates == 4 and Run.open(result.run).replay().added == recording(result.run).steps + 10


def test_none_dreams_are_refused(run):
    with pytest.raises(ConfigError, match="at least 1"):
        dreamed_episodes(run, 0)
    with pytest.raises(ConfigError, match="horizon is 0"):
        dreamed_episodes(run, 1, horizon=0)


# The commands -----------------------------------------------------------------------------------------------------------


def test_export_import_and_info_on_the_command_line(command, run, tmp_path):  # noqa: F811
    code, out, _ = command("data", "export", run.path, "--out", "minari:chain/run-v0", "--json")
    exported = only_object(out)
    assert code == 0 and list(exported) == KEYS
    assert (exported["source"], exported["out"], exported["env_id"]) == (str(run.path), "minari:chain/run-v0", CHAIN)
    assert exported["steps"] == 60 and exported["action_space"] == "Discrete(2)"
    file = tmp_path / "chain.npz"
    imported = only_object(command("data", "import", "minari:chain/run-v0", "--out", file, "--json")[1])
    assert imported == {**exported, "source": "minari:chain/run-v0", "out": str(file)}
    assert only_object(command("data", "info", file, "--json")[1]) == {**exported, "source": str(file), "out": None}
    assert_same(Recording.read(file), recording(run))
    code, out, _ = command("data", "info", file)
    assert code == 0 and "Discrete(2)" in out


def test_dreams_on_the_command_line(command, run, tmp_path):  # noqa: F811
    args = ["--dreamed", 4, "--horizon", 3, "--start", "prior", "--seed", 5, "--json"]
    dreamed = only_object(command("data", "export", run.path, "--out", tmp_path / "d.npz", *args)[1])
    assert dreamed["episodes"] == 4 and dreamed["mean_length"] <= 3
    assert_same(Recording.read(tmp_path / "d.npz"), dreamed_episodes(run, 4, 3, start="prior", seed=5))


def test_mistakes_have_exit_codes_and_messages(command, run, tmp_path):  # noqa: F811
    recording(run).write(tmp_path / "a.npz")
    (tmp_path / "torn.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:-40])
    for args, code, said in [
        (["import", "minari:none/here-v0", "--out", tmp_path / "b.npz"], 2, "minari download none/here-v0"),
        (["import", tmp_path / "a.npz", "--out", tmp_path / "a.npz"], 2, "not overwritten"),
        (["import", tmp_path / "a.npz", "--out", tmp_path / "b.csv"], 2, ".npz"),
        (["info", tmp_path / "torn.npz"], 4, "no intact NPZ"),
        (["info", tmp_path / "nothing"], 2, "is not there"),
        (["export", tmp_path / "a.npz", "--out", tmp_path / "b.npz", "--dreamed", 3], 2, "no run folder"),
        (["export", run.path, "--out", tmp_path / "b.npz", "--horizon", 3], 2, "Add --dreamed N"),
        (["export", run.path, "--out", "minari:odd id"], 2, "no id of Minari"),
        (["export", run.path, "--out", "/proc/nothing/here.npz"], 4, "/proc/nothing"),
    ]:
        got, out, err = command("data", *args, "--json")
        assert (got, out) == (code, "") and said in err and "Traceback" not in err, (args, err)
    assert not (tmp_path / "b.npz").exists()


def test_without_minari_the_command_names_the_extra(command, run, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, "minari", None)
    code, _, err = command("data", "export", run.path, "--out", "minari:chain/run-v0")
    assert code == 2 and "worldmodel[data]" in err
