"""A run that begins with another one's weights, and perhaps with its rows: what is taken, what is not, and what follows."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from small_runs import CHAIN, OPTIONS, Nervous, merged, small_train, words
from test_train import FENCE, assert_equal_runs

from worldmodel.agents.evaluation import EVALUATION_SEED, evaluate
from worldmodel.agents.experience import append_rows
from worldmodel.agents.loop import WorldModelAlgorithm
from worldmodel.agents.training.session import TrainResult
from worldmodel.cli import app
from worldmodel.commands.train import train
from worldmodel.errors import ConfigError, CorruptError
from worldmodel.storage import checkpoint
from worldmodel.storage.replay import Replay
from worldmodel.storage.run import Run

NERVOUS = "Nervous-v0"
LEARNED = {"train.ema_decay": 0.9, "train.lr": 1e-2, "agent.lr": 1e-2, "model.vector_scaling": "standardise"}
"""Of the run that gives: it changes visibly within a few updates, and its average is not its newest weights."""


class ThreeWays(Nervous):
    """The same observations, and one more action."""

    def __init__(self):
        super().__init__()
        self.action_space = gym.spaces.Discrete(3)


class Wide(Nervous):
    """The same numbers in a space with other bounds."""

    def __init__(self):
        super().__init__()
        self.observation_space = gym.spaces.Box(-2, 2, (2,), np.float32)


gym.register("ThreeWays-v0", entry_point=ThreeWays)
gym.register("Wide-v0", entry_point=Wide)


@pytest.fixture(autouse=True)
def _calm():
    Nervous.steps = 0


@pytest.fixture(scope="module")
def old(tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("old") / "run"
    small_train(folder, 60, NERVOUS, options=LEARNED)
    return Run.open(folder)


def begin(folder: Path, from_run: Any, recipe: str = NERVOUS, steps: int = 12, said: list | None = None, **kwargs: Any) -> Run:
    """A new run for some steps, with no option of the model said."""
    options = {key: x for key, x in OPTIONS.items() if not key.startswith(("model.", "agent.", "train.pre"))}
    options |= {"eval.every": 25, **kwargs.pop("options", {})}
    log = (said if said is not None else []).append
    train(recipe, steps=steps, run_dir=folder, overrides=options, device="cpu", from_run=from_run, log=log, **kwargs)
    return Run.open(folder)


def report(run: Run) -> dict[str, Any]:
    return run.manifest()["progress"]["warm_start"]


def same(run: Run, old: Run, beginning: str, file: str = "world", live: bool = False) -> bool:
    """Whether the new run's first checkpoint holds the old run's best arrays of such names, bit for bit; `live`: not averaged."""
    theirs, mine = old.read("best")[0], run.read(0)[0]
    here = {name.removeprefix("live/"): x for name, x in mine["optim"].items()} if live else mine[file]
    names = [name for name in theirs[file] if name.startswith(beginning)]
    assert names, beginning
    return all(name in here and np.array_equal(theirs[file][name], here[name]) for name in names)


# The same environment ---------------------------------------------------------------------------------------------------


def test_in_the_same_environment_the_first_evaluation_is_that_of_the_old_agent(old, tmp_path):
    run = begin(tmp_path / "new", old)
    returns, _ = evaluate(old.agent(), old.config.env, 2, EVALUATION_SEED)
    first = run.result["evaluations"][0]
    assert first == {"real_steps": 0, "mean_return": np.mean(returns), "std_return": np.std(returns), "episodes": 2}
    agents = [old.agent(), run.agent(0)]
    beliefs, obs = [None, None], np.array([[0.3, -0.6]], np.float32)
    for _ in range(4):
        actions, beliefs = zip(*(a.predict(obs, state=b, deterministic=True) for a, b in zip(agents, beliefs)))
        assert all(np.array_equal(*pair) for pair in zip(*beliefs)) and actions[0] == actions[1]
    assert run.best.step == 0 and run.result["final_step"] == 0  # no later evaluation was better


def test_all_weights_come_along_and_no_optimiser_does(old, tmp_path):
    run = begin(tmp_path / "new", old, options={"train.ema_decay": 0.9, "model.vector_scaling": "standardise"})
    assert not report(run)["new"] and not report(run)["left"] and report(run)["step"] == old.best.step
    assert {"encoder", "decoder", "dynamics.gru", "heads.scale", "scaling.obs", "actor", "critic"} <= set(report(run)["taken"])
    assert same(run, old, "") and same(run, old, "", "agent")
    assert same(run, old, "", live=True)  # gradients begin at the averaged weights, too
    tensors, state, _ = run.read(0)
    assert not [name for name in tensors["optim"] if name.startswith(("world/", "actor/", "critic/"))]
    assert state["counters"]["updates"] == 0
    assert state["behaviour"] | {"updates": 0} == old.read("best")[1]["behaviour"] | {"updates": 0}


def test_the_new_run_has_the_old_ones_model_and_the_sizes_of_its_agent(old, tmp_path):
    run = begin(tmp_path / "new", old)
    assert run.config.model == old.config.model
    assert (run.config.agent.units, run.config.agent.bins, run.config.agent.lr) == (8, 15, 1e-3)  # the rate is the recipe's own
    train(NERVOUS, steps=14, run_dir=run.path, resume=True, device="cpu", overrides={"train.batch_size": 3})
    assert Run.open(run.path).result["real_steps"] == 14


def test_the_trained_agent_acts_from_the_first_step_unless_random_rows_are_asked_for(old, tmp_path, monkeypatch):
    drawn: list[int] = []
    random_action = WorldModelAlgorithm._random_action
    monkeypatch.setattr(
        WorldModelAlgorithm, "_random_action", lambda self: (drawn.append(self.num_timesteps), random_action(self))[1]
    )
    run = begin(tmp_path / "new", old)
    assert not drawn and (run.config.train.prefill, run.config.train.pretrain) == (0, 0)
    run = begin(tmp_path / "asked", old, options={"train.prefill": 5})
    assert len(drawn) == 4 and (run.config.train.prefill, run.config.train.pretrain) == (5, 0)  # and an episode's first row


def test_a_checkpoint_can_be_chosen(old, tmp_path):
    newest = old.checkpoints[-1]
    run = begin(tmp_path / "new", old.path, steps=6, step="newest")
    assert report(run)["step"] == newest
    assert all(np.array_equal(x, run.read(0)[0]["world"][name]) for name, x in old.read(newest)[0]["world"].items())
    assert report(begin(tmp_path / "numbered", old, steps=6, step=newest))["step"] == newest
    with pytest.raises(ConfigError, match="has no checkpoint of step 7, only of"):
        begin(tmp_path / "none", old, step=7)


def test_without_a_warm_start_nothing_is_evaluated_before_the_first_step(tmp_path):
    result = small_train(tmp_path / "run", 25)
    assert [row["real_steps"] for row in result.evaluations] == [25]
    assert Run.open(tmp_path / "run").manifest()["progress"]["warm_start"] is None


# Other spaces, other options --------------------------------------------------------------------------------------------


def test_with_other_actions_the_actor_is_new_and_the_world_stays_bit_for_bit(old, tmp_path):
    said: list[str] = []
    run = begin(tmp_path / "new", old, "ThreeWays-v0", said=said)
    found = report(run)
    assert set(found["new"]) == {"actor", "dynamics.action_in", "heads.scale"} and not found["acts"]
    assert found["new"]["actor"] == "actions are Discrete(3) here, Discrete(2) there"
    assert "[8, 3] here, [8, 2] there" in found["new"]["dynamics.action_in"]
    assert "'ThreeWays-v0' here, 'Nervous-v0' there" in found["new"]["heads.scale"]
    for part in ("encoder", "decoder", "scaling", "dynamics.gru", "dynamics.transition", "dynamics.z_in", "heads.reward_net"):
        assert same(run, old, part), part
    assert same(run, old, "critic", "agent") and not same(run, old, "heads.scale")
    assert any(line.startswith(f"Begins with {old.path}, step {old.best.step}: ") for line in said)
    assert "  actor new: actions are Discrete(3) here, Discrete(2) there" in said
    assert run.config.train.prefill == 200 and not run.result["evaluations"]


def test_with_other_observations_what_reads_and_shows_them_is_new(old, tmp_path):
    run = begin(tmp_path / "new", old, CHAIN)
    found = report(run)
    for part in ("encoder", "decoder", "scaling.obs", "dynamics.embed_in"):
        assert part in found["new"] and part not in found["taken"]
    assert "Box(0.0, 1.0, (5,), float32) here, Box(-1.0, 1.0, (2,), float32) there" in found["new"]["encoder"]
    assert {"dynamics.gru", "heads.reward_net", "actor"} <= set(found["taken"]) and not found["acts"]
    assert same(run, old, "dynamics.gru") and same(run, old, "actor", "agent")


def test_statistics_of_a_key_are_those_of_its_space(old, tmp_path):
    run = begin(tmp_path / "new", old, "Wide-v0")
    assert set(report(run)["new"]) == {"scaling.obs", "heads.scale"}
    assert float(run.read(0)[0]["world"]["scaling.moments.0.count"]) == 0 and same(run, old, "encoder")
    assert not report(run)["acts"] and run.config.train.prefill == 200


def test_an_option_by_which_a_part_does_not_fit_is_named(old, tmp_path):
    options = {"model.encoder.units": 12, "model.heads.limit": 5.0, "model.decoder": "standard", "agent.units": 9}
    run = begin(tmp_path / "new", old, options=options)
    found = report(run)
    assert found["new"]["encoder"] == "model.encoder.units is 12 here, 8 there"
    assert found["new"]["heads.reward_net"] == "model.heads.limit is 5.0 here, 10.0 there"  # of the same shapes
    assert found["new"]["actor"] == "agent.units is 9 here, 8 there"
    assert "embed_in.weight is [8, 14] here, [8, 10] there" in found["new"]["dynamics.embed_in"]
    assert "decoder" in found["taken"] and run.config.model.decoder.units == 8
    train(NERVOUS, steps=14, run_dir=run.path, resume=True, device="cpu", overrides={**options, "train.batch_size": 3})


def test_an_option_that_changes_no_weight_keeps_the_part(old, tmp_path):
    run = begin(tmp_path / "new", old, options={"model.dynamics.free_nats": 0.5, "agent.entropy": 0.1})
    assert not report(run)["new"] and run.config.model.dynamics.free_nats == 0.5


def test_a_part_that_one_side_lacks_is_reported(old, tmp_path):
    run = begin(tmp_path / "new", old, options={"model.ensemble.members": 2})
    assert report(run)["new"] == {"ensemble": "there is none in that run"} and report(run)["acts"]
    second = begin(tmp_path / "second", run, options={"agent": "random", "model.ensemble.members": 0})
    assert report(second)["left"] == dict.fromkeys(("ensemble", "actor", "critic"), "there is none here")


def test_a_target_encoder_that_is_new_is_the_encoder_taken(tmp_path):
    small = {key: x for key, x in merged().items() if not key.startswith("model.dynamics.latent")}
    train(CHAIN, steps=30, run_dir=tmp_path / "old", overrides={**small, "model": "jepa"}, device="cpu")
    run = begin(tmp_path / "new", tmp_path / "old", CHAIN, options={"model.objective.ema_decay": 0.9})
    assert report(run)["new"] == {"objective.slow": "there is none in that run"}
    world = run.world_model(0)
    pairs = list(zip(world.objective.slow[0].parameters(), world.encoder.parameters(), strict=True))
    assert pairs and all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("kept", [False, True])
def test_where_nothing_fits_both_runs_and_the_reasons_are_named_and_no_folder_is_made(old, tmp_path, kept):
    options = {"model.dynamics.kind": "anchored", "agent.units": 7, "model.heads.units": 7, "model.initial": None}
    with pytest.raises(ConfigError) as error:
        begin(tmp_path / "new", old, CHAIN, options=options, keep_data=kept)
    text = str(error.value)
    assert f"Nothing of {old.path} ('Nervous-v0') fits a new run in '{CHAIN}'" in text
    assert "actor: agent.units is 7 here, 8 there" in text and "scaling.obs: 'obs' is Box" in text
    assert not (tmp_path / "new").exists()


# What is refused --------------------------------------------------------------------------------------------------------


def test_what_is_no_run_or_damaged_gets_the_usual_sentences(old, tmp_path):
    with pytest.raises(ConfigError, match=r"is no run folder: it has no config\.yaml"):
        begin(tmp_path / "new", tmp_path)
    shutil.copytree(old.path, tmp_path / "empty", ignore=shutil.ignore_patterns("checkpoints", "best.json"))
    with pytest.raises(ConfigError, match="holds no checkpoint yet"):
        begin(tmp_path / "new", tmp_path / "empty")
    shutil.copytree(old.path, tmp_path / "damaged")
    for step in old.checkpoints:
        file = checkpoint.folder_of(tmp_path / "damaged" / "checkpoints", step) / "world.safetensors"
        file.write_bytes(file.read_bytes()[:-8] + b"damaged!")
    with pytest.raises(CorruptError, match=r"No checkpoint of .*damaged verifies"):
        begin(tmp_path / "new", tmp_path / "damaged")
    assert not (tmp_path / "new").exists()


def test_a_resume_begins_with_no_other_weights(old, tmp_path):
    run = begin(tmp_path / "new", old)
    with pytest.raises(ConfigError, match="A run that is resumed has weights of its own"):
        begin(run.path, old, resume=True)
    with pytest.raises(ConfigError, match=r"train\.warm_start: "):
        train(NERVOUS, run_dir=run.path, resume=True, overrides={"train.warm_start": "another"}, device="cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_data": True}, "are about the run of from_run"),
        ({"step": 5}, "are about the run of from_run"),
        ({"overrides": {"train.keep_data": True}}, "train.keep_data is about the run of a warm start"),
        ({"overrides": {"train.warm_start_step": "best"}}, "train.warm_start_step is about the run of a warm start"),
        ({"from_run": "x", "keep_data": True, "data": "rows.npz"}, "name the run as one more --data instead"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        train(NERVOUS, steps=9, run_dir=tmp_path / "new", **options)


def test_rows_of_other_spaces_are_not_kept(old, tmp_path):
    for env, what in (("ThreeWays-v0", r"actions are Discrete\(2\)"), ("Wide-v0", r"observations are Box\(-1")):
        with pytest.raises(ConfigError, match=f"rows of .* cannot be kept: its {what}.*--keep-data"):
            begin(tmp_path / "new", old, env, keep_data=True)
    assert not (tmp_path / "new").exists()


# Rows that are kept, and resumes ----------------------------------------------------------------------------------------


def test_from_recorded_data_to_the_environment_with_the_data_kept(old, tmp_path):
    offline = {**merged(LEARNED), "train.capacity": 2000, "train.prefill": 0}
    train(NERVOUS, steps=20, run_dir=tmp_path / "offline", overrides=offline, data=old.path, device="cpu")
    given, said = Run.open(tmp_path / "offline"), []
    run = begin(tmp_path / "online", given, said=said, keep_data=True, options={"train.ema_decay": 0.9})
    rows, theirs, first = run.replay().stream(0), given.replay().stream(0), run.replay(0).stream(0)
    kept = theirs.shape[1]
    assert report(run)["rows"] == kept and first.shape[1] == kept and not run.config.train.data
    for name in ("prev_action", "reward", "is_first", "is_last", "is_terminal"):
        assert torch.equal(getattr(rows, name)[:, :kept], getattr(theirs, name)), name
    assert torch.equal(rows.obs["obs"][:, :kept], theirs.obs["obs"]) and bool(rows.is_first[0, kept])
    assert run.result["real_steps"] == 12 and run.result["updates"] == 3  # 12 steps of 0.25 each: none of them waits for rows
    counts = [r.read(0 if r is run else None)[0]["world"]["scaling.moments.0.count"] for r in (given, run)]
    assert counts[0] == counts[1] == kept  # the rows are in the statistics already
    assert any(line.startswith(f"{kept} rows of {given.path} are kept. ") for line in said)
    assert run.result["evaluations"][0]["real_steps"] == 0


def test_random_rows_that_are_asked_for_come_behind_the_kept_ones(old, tmp_path, monkeypatch):
    drawn: list[int] = []
    random_action = WorldModelAlgorithm._random_action
    monkeypatch.setattr(
        WorldModelAlgorithm, "_random_action", lambda self: (drawn.append(self.num_timesteps), random_action(self))[1]
    )
    options = {"train.prefill": 8, "train.batch_length": 3, "checkpoint.every": 4}
    run = begin(tmp_path / "new", old, options=options, keep_data=True, steps=4)
    train(run.path, steps=12, resume=True, device="cpu")
    assert drawn == list(range(6))  # an episode's first row counts, and that of the one that a resume begins
    assert Run.open(run.path).result["updates"] == 1  # 7 steps of 0.25 each, from the one on that filled them


def test_where_room_is_short_the_oldest_kept_rows_are_lost_and_it_is_said(old, tmp_path):
    said: list[str] = []
    run = begin(tmp_path / "new", old, said=said, keep_data=True, options={"train.capacity": 40})
    added = old.replay().added
    assert any(f"40 rows of {old.path} are kept, the newest of {added} (train.capacity)" in line for line in said)
    assert report(run)["rows"] == 40


@pytest.mark.parametrize("replay", ["memory", "disk"])
def test_a_resumed_warm_start_equals_an_unbroken_one(old, tmp_path, replay):
    options = {**FENCE, "train.replay": replay}
    for name, stops in (("whole", [44]), ("broken", [21, 44])):
        for i, steps in enumerate(stops):
            warm = {} if i else {"from_run": old, "keep_data": True}
            small_train(tmp_path / name, steps, NERVOUS, options=options, resume=i > 0, **warm)
    assert_equal_runs(tmp_path / "whole", tmp_path / "broken")
    assert report(Run.open(tmp_path / "broken"))["rows"] == old.replay().added
    assert Run.open(tmp_path / "broken").read()[1]["counters"]["kept_rows"] == old.replay().added


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_with_the_weights_again(old, tmp_path):
    whole = begin(tmp_path / "whole", old, keep_data=True)
    for name, lost in (("killed", ["checkpoints", "replay"]), ("emptied", ["checkpoints"])):
        shutil.copytree(whole.path, tmp_path / name, ignore=shutil.ignore_patterns("*.json", *lost))
        train(tmp_path / name, resume=True, device="cpu")
    killed, emptied = Run.open(tmp_path / "killed"), Run.open(tmp_path / "emptied")
    assert report(killed) == report(whole) and same(killed, old, "") and killed.replay(0).added == old.replay().added
    assert same(emptied, old, "encoder") and emptied.replay(0).added == whole.replay().added  # no experience is lost


def rows_of(replay: Replay, stream: int, first: list[int], last: list[int], value: float) -> None:
    n = len(first)
    obs = {"obs": np.full((n, 1), value, np.float32) + np.arange(n, dtype=np.float32)[:, None] / 100}
    flags = np.array(first, bool), np.array(last, bool), np.zeros(n, bool)
    replay.extend(obs, np.ones((n, 1), np.float32), np.ones(n, np.float32), *flags, stream=stream)


def test_appended_episodes_never_run_into_one_another(monkeypatch):
    monkeypatch.setattr("worldmodel.agents.experience.ROWS_AT_ONCE", 2)
    source, target = (Replay(capacity, {"obs": ((1,), np.float32)}, 1, 3 if capacity == 12 else 1) for capacity in (12, 40))
    rows_of(source, 0, [1, 0, 0, 1, 0, 0], [0, 0, 1, 0, 0, 0], 1.0)  # its first two rows are evicted: one row lost its beginning
    rows_of(source, 1, [1, 0, 0], [0, 0, 1], 2.0)
    assert append_rows(source, target) == 6
    rows = target.stream(0)
    assert rows.is_first[0].tolist() == [True, False, False, True, False, False]
    assert rows.is_last[0].tolist() == [False, False, True, False, False, True] and not rows.is_terminal.any()
    np.testing.assert_allclose(rows.obs["obs"][0, :, 0], [1.03, 1.04, 1.05, 2.0, 2.01, 2.02], rtol=1e-6)


# The command line -------------------------------------------------------------------------------------------------------


def test_the_command_line_begins_with_another_run(old, tmp_path, capfd):
    args = ["train", NERVOUS, *words({"eval.every": 25}), "--from", old.path, "--step", "newest", "--keep-data"]
    with pytest.raises(SystemExit) as stop:
        app([str(arg) for arg in [*args, "--steps", 9, "--run", tmp_path / "run", "--json"]])
    out, err = capfd.readouterr()
    assert stop.value.code == 0, err
    assert '"real_steps": 9' in out and f"Begins with {old.path}, step 60: " in err and "are kept" in err
    config = Run.open(tmp_path / "run").config.train
    assert (config.warm_start, config.warm_start_step, config.keep_data) == (str(old.path), "newest", True)
    assert TrainResult(**Run.open(tmp_path / "run").result).real_steps == 9
