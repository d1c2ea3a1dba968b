"""Training on recorded experience alone: no environment, and otherwise all that a run has."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest
import torch
from conftest import IMAGE
from gymnasium import spaces
from small_runs import CHAIN, OPTIONS, merged, small_train
from stable_baselines3 import PPO
from test_recording import toy_recording
from test_train import assert_equal_runs

from worldmodel.agents import experience
from worldmodel.agents.evaluation import evaluate
from worldmodel.agents.held_out import collect
from worldmodel.agents.training import offline
from worldmodel.agents.training.signals import Interrupted
from worldmodel.cli import app
from worldmodel.commands.train import _as_sources, train
from worldmodel.data import Sampling
from worldmodel.envs import ImaginedVecEnv, sources
from worldmodel.errors import ConfigError
from worldmodel.storage.recording import Recording
from worldmodel.storage.replay import Replay
from worldmodel.storage.run import Run
from worldmodel.view import tensorboard

OFFLINE = {"train.pretrain": 3, "train.ratio": 0.5, "train.capacity": 2000, "checkpoint.every": 20}


@pytest.fixture(scope="module")
def walks(tmp_path_factory):
    """Random walks on Chain, as a file."""
    folder = tmp_path_factory.mktemp("walks")
    small_train(folder / "run", 150, options={"agent": "random", "train.ratio": 0.0, "eval.every": 0})
    return sources.recording(folder / "run").write(folder / "walks.npz")


@pytest.fixture
def no_environment(monkeypatch):
    """From here on making an environment fails the test, whoever does it."""

    def refuse(*_, **__):
        raise AssertionError("an environment was made")

    for place in ("gymnasium.make", "gymnasium.spec", "worldmodel.envs.make.make_env", "worldmodel.envs.make.find_spec"):
        monkeypatch.setattr(place, refuse)
    monkeypatch.setattr("worldmodel.agents.evaluation.find_spec", refuse)


def learn(folder, data, steps=40, recipe=CHAIN, options=None, **kwargs):
    return train(
        recipe, steps=steps, run_dir=folder, overrides=merged({**OFFLINE, **(options or {})}), device="cpu", data=data, **kwargs
    )


def test_a_world_model_and_an_agent_learn_without_any_environment(walks, tmp_path, no_environment):
    logged = []
    result = learn(tmp_path / "run", walks, options={"log.tensorboard": True}, log=logged.append)
    assert (result.real_steps, result.updates, result.evaluations) == (0, 3 + 40 * 0.5, [])
    assert result.final_return is None and result.threshold is None and result.solved_at is None and result.env_id == CHAIN
    run = Run.open(tmp_path / "run")
    assert run.checkpoints == [20, 40] and run.config.train.data == (str(walks),) and run.result == result.to_json()
    assert any(line.startswith("step 40/40  23 updates  obs ") for line in logged)
    losses = tensorboard.read(tmp_path / "run").scalars
    assert {"world/loss/observation", "world/loss/reward"} <= set(losses) and any(tag.startswith("train/") for tag in losses)


def test_the_actor_learns_too_and_the_world_model_alone_does_not_need_one(walks, tmp_path):
    before = learn(tmp_path / "a", walks, steps=1, options={"train.ratio": 0.0})
    after = learn(tmp_path / "b", walks, steps=20)
    actors = [Run.open(result.run).read()[0]["agent"] for result in (before, after)]
    assert any(not np.array_equal(x, actors[1][name]) for name, x in actors[0].items())
    assert learn(tmp_path / "c", walks, steps=4, options={"agent": "random"}).updates == 5


def test_the_run_folder_is_like_any_other(walks, tmp_path):
    run = Run.open(learn(tmp_path / "run", [walks, str(walks)]).run)
    recorded = Recording.read(walks)
    again = sources.recording(run)
    assert again.episodes == 2 * recorded.episodes
    np.testing.assert_array_equal(again.obs["obs"], np.concatenate([recorded.obs["obs"]] * 2))
    np.testing.assert_array_equal(again.reward, np.concatenate([recorded.reward] * 2))
    dream = PPO("MlpPolicy", ImaginedVecEnv(run, 2, 3, seed=0), n_steps=4, batch_size=8, n_epochs=1, device="cpu").learn(8)
    assert dream.num_timesteps == 8
    agent = run.agent()
    assert agent.predict(recorded.obs["obs"][0])[0] in (0, 1)
    returns, lengths = evaluate(agent, CHAIN, 2)  # where there is an environment, it can be evaluated
    assert len(returns) == 2 and min(lengths) >= 4


def test_running_statistics_are_those_of_the_data(walks, tmp_path, monkeypatch):
    monkeypatch.setattr(experience, "ROWS_AT_ONCE", 17)
    world = Run.open(learn(tmp_path / "run", walks, steps=1, options={"model.vector_scaling": "standardise"}).run).world_model()
    obs = Recording.read(walks).obs["obs"]
    mean, deviation = world.scaling.statistics(0, torch.zeros((), dtype=torch.float64))
    np.testing.assert_allclose(mean, obs.mean(0), rtol=1e-6)
    np.testing.assert_allclose(deviation, obs.astype(np.float64).std(0), rtol=1e-6)
    reward = Recording.read(walks).reward
    assert float(world.heads.scale.value) == pytest.approx(float(np.sqrt(np.mean(reward[reward != 0] ** 2))))


def test_it_learns_what_the_data_show(walks, tmp_path):
    """Chain's rewards are a function of the cell: after a hundred updates the model knows most of it."""
    options = {"train.lr": 1e-2, "train.ratio": 1.0, "train.batch_size": 8, "agent": "random", "model.dynamics.deter": 16}
    errors = []
    for steps in (1, 120):
        run = Run.open(learn(tmp_path / str(steps), walks, steps=steps, options=options).run)
        world, batch = run.world_model(), run.replay().sample(20, 6, np.random.default_rng(0))
        with torch.no_grad():
            batch = batch.with_obs(world.preprocess(batch.obs))
            losses = world.loss(world.trace(batch, None, Sampling(mode=True)), batch)
        errors.append({name: float(losses[name].mean()) for name in ("observation", "reward", "continue")})
    assert all(errors[1][name] < 0.7 * errors[0][name] for name in ("reward", "continue")), errors
    assert errors[1]["observation"] < errors[0]["observation"] - 1


@pytest.mark.parametrize(
    ("observation", "action", "message"),
    [
        (spaces.Box(0, 1, (4,)), spaces.Discrete(2), r"observes Box\(.*\(4,\).*has Box\(.*\(5,\)"),
        (spaces.Box(0, 1, (5,)), spaces.Discrete(3), r"acts in Discrete\(3\), but .* has Discrete\(2\)"),
    ],
)
def test_where_the_environment_turns_out_to_have_other_spaces_both_are_shown(observation, action, message, tmp_path):
    toy_recording(observation, action).write(tmp_path / "other.npz")
    agent = Run.open(learn(tmp_path / "run", tmp_path / "other.npz", 2).run).agent()
    for function in (evaluate, collect):
        with pytest.raises(ConfigError, match=message):
            function(agent, CHAIN, 1)


# Resuming ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fence", [False, True])
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(walks, tmp_path, fence, no_environment):
    options = {"checkpoint.fence": fence, "train.ema_decay": 0.9}
    learn(tmp_path / "whole", walks, 45, options=options)
    learn(tmp_path / "broken", walks, 13, options=options)
    copy = tmp_path / "moved.npz"
    os.rename(walks, copy)
    try:  # the run folder holds the experience: the file is not needed again
        train(CHAIN, steps=45, run_dir=tmp_path / "broken", resume=True, device="cpu")
    finally:
        os.rename(copy, walks)
    assert_equal_runs(tmp_path / "whole", tmp_path / "broken")
    assert Run.open(tmp_path / "broken").result["updates"] == 3 + 22


def test_a_finished_run_gives_its_result_again(walks, tmp_path):
    first = learn(tmp_path / "run", walks)
    assert train(CHAIN, run_dir=tmp_path / "run", resume=True, device="cpu") == first


@pytest.mark.parametrize("at", [2, 9])
def test_a_signal_saves_and_a_resume_makes_the_same_run(walks, tmp_path, monkeypatch, at):
    learn(tmp_path / "whole", walks)
    update, done = offline.WorldModelAlgorithm.update, []

    def interrupted(self, improve=True):
        done.append(1)
        if len(done) == at:  # among the first updates, and behind them
            os.kill(os.getpid(), signal.SIGINT)
        return update(self, improve)

    monkeypatch.setattr(offline.WorldModelAlgorithm, "update", interrupted)
    with pytest.raises(Interrupted, match="stopped at step") as stop:
        learn(tmp_path / "run", walks)
    assert stop.value.exit_code == 130 and Run.open(tmp_path / "run").result is None
    train(CHAIN, run_dir=tmp_path / "run", resume=True, device="cpu")
    assert_equal_runs(tmp_path / "whole", tmp_path / "run")


def test_on_resume_other_data_are_refused(walks, tmp_path):
    learn(tmp_path / "run", walks, 10)
    with pytest.raises(ConfigError, match=r"train\.data"):
        learn(tmp_path / "run", "another.npz", 20, resume=True)
    path = tmp_path / "same.npz"
    Recording.read(walks).write(path)
    learn(tmp_path / "second", path, 10)
    path.unlink()
    toy_recording(spaces.Box(-1, 1, (3,)), spaces.Discrete(2)).write(path)
    with pytest.raises(ConfigError, match=r"same\.npz has the observations Box\(.*\(3,\).*second has Box"):
        learn(tmp_path / "second", path, 20, resume=True)


def test_a_run_of_an_environment_does_not_go_on_without_one(walks, tmp_path):
    small_train(tmp_path / "run", 20)
    with pytest.raises(ConfigError, match=r"train\.data: \[\] -> "):
        small_train(tmp_path / "run", 30, resume=True, data=walks)


# Data that do not fit -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train.batch_length": 5000}, r"one sequence needs 5000.*lower train.batch_length"),
        ({"train.capacity": 50}, r"the replay keeps 50. Raise train.capacity to \d+"),
        ({"env.pixels": 64}, r"the recipe sees pictures \(env.pixels=64\)"),
        ({"train.data": ["other.npz"]}, "differ. Give one of them"),
    ],
)
def test_data_that_do_not_fit_the_recipe_are_refused_and_leave_no_folder(walks, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        learn(tmp_path / "run", walks, options=options)
    assert not (tmp_path / "run").exists()


def test_data_of_another_environment_are_refused(walks, tmp_path):
    with pytest.raises(ConfigError, match=r"recorded in 'worldmodel.envs:Chain-v0', but the recipe is for 'CartPole-v1'.*env.id="):
        learn(tmp_path / "run", walks, recipe="cartpole")
    toy_recording().write(tmp_path / "nobody.npz")
    assert learn(tmp_path / "any", tmp_path / "nobody.npz", 2, "Nowhere-v7").env_id == "Nowhere-v7"
    toy_recording(IMAGE).write(tmp_path / "pictures.npz")
    with pytest.raises(ConfigError, match="Expected the same spaces"):
        learn(tmp_path / "run", [tmp_path / "nobody.npz", tmp_path / "pictures.npz"], 2, "Nowhere-v7")
    assert learn(tmp_path / "pictures", tmp_path / "pictures.npz", 2, "Nowhere-v7", SMALL_PICTURES).updates == 4


SMALL_PICTURES = {"model.encoder.depth": 2, "model.decoder.depth": 2}


@pytest.mark.parametrize("data", [[], [3], [Replay(8, {"obs": ((1,), np.float32)}, 1, 1)]])
def test_what_names_no_data_is_refused(data):
    with pytest.raises(ConfigError, match=r"Expected at least one|expected names of files"):
        _as_sources(data)


def test_the_command_line_takes_several_sources(walks, tmp_path, capfd):
    words = [f"{key}={value}" for key, value in {**OPTIONS, **OFFLINE}.items()]
    sources_of = ["--data", walks, "--data", walks.parent / "run"]
    args = ["train", CHAIN, *words, *sources_of, "--steps", 4, "--run", tmp_path / "run", "--json"]
    with pytest.raises(SystemExit) as stop:
        app([str(arg) for arg in args])
    out, err = capfd.readouterr()
    assert stop.value.code == 0, err
    assert '"real_steps": 0' in out and '"final_return": null' in out
    assert Run.open(tmp_path / "run").config.train.data == (str(walks), str(walks.parent / "run"))
