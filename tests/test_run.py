"""A run folder: one writer, atomic files, and everything readable while it is written."""

from __future__ import annotations

import os
import socket

import numpy as np
import pytest
import torch
from small_runs import CHAIN, OPTIONS, small_train

from worldmodel.agents import Dreamer
from worldmodel.config import Config
from worldmodel.errors import ConfigError, CorruptError, StorageError
from worldmodel.storage import checkpoint
from worldmodel.storage.run import Run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    small_train(folder, 70)
    return folder


@pytest.fixture
def config():
    return Config.from_recipe(CHAIN, OPTIONS)


def damage(run, step, name="world.safetensors"):
    file = run.path / "checkpoints" / f"step-{step:012d}" / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


def test_a_run_opens_with_the_config_that_it_was_made_with(tmp_path, config):
    with Run.create(tmp_path / "deep" / "run", config, seed=0) as run:
        again = Run.open(tmp_path / "deep" / "run")  # a reader needs no lock
        assert again.config == config and again.path == run.path and again.result is None and again.checkpoints == []


def test_the_default_folder_gets_a_number_where_it_is_taken(tmp_path, monkeypatch, config):
    monkeypatch.chdir(tmp_path)
    names = []
    for seed in (0, 0, 1, 0):
        with Run.create(None, config.replace(recipe="chain"), seed) as run:
            names.append(str(run.path))
    assert names == ["runs/chain-s0", "runs/chain-s0-2", "runs/chain-s1", "runs/chain-s0-3"]


def test_a_folder_that_holds_something_is_not_taken_over(tmp_path, config):
    Run.create(tmp_path / "run", config, 0).close()
    with pytest.raises(ConfigError, match="--resume"):
        Run.create(tmp_path / "run", config, 0)
    (tmp_path / "papers").mkdir()
    Run.create(tmp_path / "papers", config, 0).close()  # an empty folder may be
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("mine")
    with pytest.raises(ConfigError, match="nothing in it is overwritten"):
        Run.create(tmp_path / "thesis", config, 0)
    assert [p.name for p in (tmp_path / "thesis").iterdir()] == ["chapter.txt"]


def test_a_second_writer_is_refused_and_told_who_writes(tmp_path, config):
    with Run.create(tmp_path / "run", config, 0):
        with pytest.raises(StorageError, match=f"pid {os.getpid()} on host {socket.gethostname()}"):
            Run.open(tmp_path / "run", write=True)
    Run.open(tmp_path / "run", write=True).close()


def test_a_lock_ends_with_its_process(tmp_path, config):
    Run.create(tmp_path / "run", config, 0).close()
    child = os.fork()
    if child == 0:
        Run.open(tmp_path / "run", write=True)
        os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    Run.open(tmp_path / "run", write=True).close()


def test_what_is_no_run_is_refused_with_the_nearest_name(tmp_path, config):
    Run.create(tmp_path / "cartpole-s0", config, 0).close()
    with pytest.raises(ConfigError, match="Did you mean 'cartpole-s0'"):
        Run.open(tmp_path / "cartpole-so")
    with pytest.raises(ConfigError, match=r"has no config.yaml\. Expected the folder of a run"):
        Run.open(tmp_path)


def test_a_place_that_cannot_be_written_is_a_storage_error(tmp_path, config):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="file"):
        Run.create(tmp_path / "file" / "run", config, 0)
    with pytest.raises(StorageError, match="file"):
        Run.create(tmp_path / "file", config, 0)


def test_config_and_result_are_replaced_at_once_or_not_at_all(tmp_path, config, monkeypatch):
    with Run.create(tmp_path / "run", config, 0) as run:
        run.write_result({"final_return": 1.0})

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "replace", full)
        with pytest.raises(StorageError, match="Free some disk space"):
            run.write_result({"final_return": 2.0})
        with pytest.raises(StorageError):
            run.write_config(config.override({"train.steps": 7}))
        monkeypatch.undo()
        assert run.result == {"final_return": 1.0} and Run.open(run.path).config == config
        run.write_result(None)
        assert run.result is None
    Run.open(tmp_path / "run", write=True).close()
    assert not list((tmp_path / "run").glob(".tmp-*"))  # swept by the next writer


def test_only_the_newest_checkpoints_the_best_and_the_replay_that_they_name_stay(trained):
    run = Run.open(trained)
    assert run.checkpoints == [50, 60, 70]  # evaluated best, every 20, and at the end
    named = {n for step in run.checkpoints for n, _ in run.read(step)[2]["replay"]["segments"]}
    assert {int(p.stem.rpartition("-")[2]) for p in (trained / "replay").iterdir()} == named


def test_a_checkpoint_says_what_made_it(trained):
    manifest = Run.open(trained).manifest()
    assert manifest["threads"] == 1 and manifest["seed"] == 0 and manifest["versions"]["torch"] == torch.__version__
    assert manifest["config"]["train"]["batch_length"] == 6 and manifest["fenced"] is False


def test_world_model_and_agent_come_from_any_checkpoint(trained):
    run = Run.open(trained)
    newest, older = run.world_model(), run.world_model(60)
    assert not newest.training
    assert all(np.array_equal(x.numpy(), run.read(70)[0]["world"][name]) for name, x in newest.state_dict().items())
    assert any(not torch.equal(x, older.state_dict()[name]) for name, x in newest.state_dict().items())
    assert [run.agent(step).num_timesteps for step in ("newest", 60, "best", None)] == [70, 60, 50, 50]
    assert run.agent().kind == "dreamer"
    with pytest.raises(ConfigError, match=r"no checkpoint of step 5, only of \[50, 60, 70\]"):
        run.agent(5)


def test_an_agent_acts_at_once_and_goes_on_learning_with_an_environment(trained):
    agent = Run.open(trained).agent(env=CHAIN)
    action, _ = agent.predict(np.eye(5, dtype=np.float32), deterministic=True)
    again, _ = Run.open(trained).agent().predict(np.eye(5, dtype=np.float32), deterministic=True)
    assert np.array_equal(action, again) and action.shape == (5,)
    agent.learn(10, reset_num_timesteps=False)
    assert agent.num_timesteps == 60


def test_random_states_of_another_kind_of_device_are_replaced(trained):
    tensors, state, _ = Run.open(trained).read()
    tensors["optim"]["generator/act"] = tensors["optim"]["generator/act"][:16]  # as long as a GPU's
    agents = [Dreamer.from_content(tensors, state, device="cpu") for _ in range(2)]
    assert torch.equal(agents[0].policy.generator.get_state(), agents[1].policy.generator.get_state())
    assert np.array_equal(agents[0].generator.get_state().numpy(), tensors["optim"]["generator/learn"])


def test_encode_and_decode_speak_the_environment_s_form(trained):
    run = Run.open(trained)
    obs = np.eye(5, dtype=np.float32)
    posterior = run.encode(obs)
    assert torch.equal(posterior.mean, run.world_model().encode(obs).mean) and len(posterior.mean) == 5
    feature = np.random.default_rng(0).normal(size=(3, run.world_model().feature_dim)).astype(np.float32)
    decoded = run.decode(feature)
    assert list(decoded) == ["obs"] and decoded["obs"].shape == (3, 5) and decoded["obs"].dtype == np.float32
    assert ((decoded["obs"] >= 0) & (decoded["obs"] <= 1)).all()  # the space's bounds
    assert np.array_equal(run.decode(torch.from_numpy(feature))["obs"], decoded["obs"])


def test_the_replay_is_what_the_checkpoint_names(trained):
    run = Run.open(trained)
    replay, before = run.replay(), run.replay(60)
    firsts = int(replay.sample(1, replay.added, np.random.default_rng(0)).is_first.sum())
    assert replay.added == 70 + firsts and before.added < replay.added


def test_a_run_without_experience_says_so(tmp_path, config):
    with Run.create(tmp_path / "run", config, 0) as run:
        with pytest.raises(ConfigError, match="no checkpoint yet"):
            run.replay()
        with pytest.raises(ConfigError, match="no checkpoint yet"):
            run.world_model()


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path):
    small_train(tmp_path / "run", 50)
    run = Run.open(tmp_path / "run")
    damage(run, 50)
    assert run.agent().num_timesteps == 40 and run.manifest()["step"] == 40  # the best one was that of 50
    with pytest.raises(CorruptError, match=r"step-000000000050.*world.safetensors"):
        run.agent(50)
    said = []
    assert small_train(tmp_path / "run", 50, resume=True, log=said.append).real_steps == 50  # no longer finished, nor damaged
    assert checkpoint.verify(tmp_path / "run" / "checkpoints" / "step-000000000050")["step"] == 50


def test_where_every_checkpoint_is_damaged_nothing_starts_over(tmp_path):
    small_train(tmp_path / "run", 30)
    run = Run.open(tmp_path / "run")
    for step in run.checkpoints:
        damage(run, step, "state.json")
    run.write_result(None)
    with pytest.raises(CorruptError, match="verifies"):
        run.world_model()
    with pytest.raises(CorruptError, match="verifies"):
        small_train(tmp_path / "run", 30, resume=True)
