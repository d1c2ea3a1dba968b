"""truth.py: recorded rows are what they say, the MLP ensemble is measured like a world model, and ratios compare the same rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import recorded
import rows
import torch
import truth
from gymnasium import spaces

from worldmodel.diagnostics.mlp_ensemble import MEMBERS, MlpWorld
from worldmodel.model import WorldModel
from worldmodel.storage import rows as storage
from worldmodel.storage.recording import Recording

HOUSE = replace(recorded.TASKS["Heating-v0"], rows=60)


@pytest.fixture(autouse=True)
def code(monkeypatch):
    """A hash of the code that is not worked out anew for each row."""
    monkeypatch.setattr(storage, "code", lambda: "this tree")
    monkeypatch.setattr(storage, "_hash", lambda: "this tree")


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(recorded, "EPISODES", 3)
    monkeypatch.setattr(recorded, "LONGEST", 20)


def pendulums(episodes, shown, seed=0):
    """Swings without friction (position, velocity), pushed at random; of both numbers those that are shown."""
    rng, found = np.random.default_rng(seed), []
    for _ in range(episodes):
        states, actions = [rng.uniform(-1, 1, 2)], rng.uniform(-1, 1, (40, 1))
        for push in actions:
            position, velocity = states[-1]
            states.append(np.array([position + 0.2 * velocity, velocity - 0.2 * position + 0.1 * push[0]]))
        flags = np.zeros(40, bool)
        columns = {"observations": np.stack(states)[:, shown], "actions": actions, "rewards": np.zeros(40)}
        found.append({**columns, "terminations": flags, "truncations": flags})
    box = spaces.Box(-np.inf, np.inf, (len(shown),), np.float32)
    return Recording.from_episodes(box, spaces.Box(-1, 1, (1,), np.float32), found)


def fitted(recording, frames, updates):
    options = {"frames": frames, "units": 32, "updates": updates}
    return MlpWorld(recording.obs_spec, recording.action_spec, recording.to_episodes(), 0, **options)


# The peer ---------------------------------------------------------------------------------------------------------------


def test_the_ensemble_predicts_a_determined_world_and_needs_memory_where_the_velocity_is_hidden():
    for shown, frames, low, high in (([0, 1], 1, 0, 0.2), ([0], 1, 0.6, 2), ([0], 4, 0, 0.3)):
        world = fitted(pendulums(20, shown), frames, updates=150)
        found = truth.measured(world, pendulums(5, shown, seed=1).to_episodes(), MEMBERS)
        ratio = found["error"][1] / found["persistence"][1]
        assert low <= ratio <= high, (shown, frames)
        assert found["starts"] == [20, 20, 15, 0] and found["error"][3] is None  # 41 rows, a start at every tenth


def test_the_ensemble_is_measured_in_the_units_and_windows_of_a_world_model():
    recording, fresh = pendulums(5, [0, 1]), pendulums(3, [0, 1], seed=1).to_episodes()
    peer, world = fitted(recording, 1, updates=1), WorldModel.from_spaces(recording.obs_spec.space, recording.action_spec.space)
    world.scaling.update(recording.obs_spec.canonical({"obs": torch.from_numpy(recording.obs["obs"])}))
    one, two = truth.measured(peer, fresh, MEMBERS), truth.measured(world, fresh, 2)
    assert one["starts"] == two["starts"] and one["persistence"] == two["persistence"] and one["error"] != two["error"]


def test_each_member_follows_its_own_predictions_from_the_last_frames_seen():
    recording = pendulums(5, [0])
    world, window = fitted(recording, 3, updates=1), recording.to_episodes().rows.window(41, 45)
    assert window.is_first[0].tolist() == [True, False, False, False]
    x = window.obs["obs"][0, :, 0].double()
    feature = world.trace(window, None, None).feature[0]
    expected = torch.stack([x[[0, 0, 0]], x[[0, 0, 1]], x[[0, 1, 2]], x[[1, 2, 3]]])  # before the first row that one stands
    assert torch.equal(feature, expected)
    start = world.trace(window.map(lambda x: x.repeat_interleave(5, 0)), None, None).last
    with torch.no_grad():
        dream = world.imagine(start, lambda feature, step: torch.zeros(5, 1), 3, None)
    assert dream.feature.shape == (5, 4, 3)
    assert torch.equal(dream.feature[:, 2, :-1], dream.feature[:, 1, 1:])  # frames move on
    assert len({float(x) for x in world.decode(dream.feature[:, 1])["obs"].flatten()}) == 5  # five members, five futures


def test_no_roll_out_runs_away_from_three_times_the_range_of_the_rows():
    world, rows = fitted(pendulums(5, [0]), 1, updates=1), pendulums(5, [0]).obs["obs"]
    with torch.no_grad():
        for parameter in world.net.parameters():
            parameter.mul_(20)
        window = pendulums(5, [0]).to_episodes().rows.window(0, 5)
        start = world.trace(window.map(lambda x: x.repeat_interleave(5, 0)), None, None).last
        dream = world.imagine(start, lambda feature, step: torch.ones(5, 1), 30, None)
    low, high = float(rows.min()), float(rows.max())
    assert dream.feature.min() >= 2 * low - high - 1e-6 and dream.feature.max() <= 2 * high - low + 1e-6
    assert dream.feature.max() > high or dream.feature.min() < low  # and yet what lies a little beyond can be predicted


# The rows ---------------------------------------------------------------------------------------------------------------


def test_rows_are_half_random_half_of_the_policy_and_made_once(short, tmp_path, monkeypatch):
    found = recorded.load(HOUSE, 0, tmp_path)
    training = found["training"]
    assert training.steps == 60 and training.lengths.sum() == 60
    half = training.lengths.cumsum().tolist().index(30) + 1
    policy, random = training.action[:30, 0], training.action[30:, 0]
    rows_of_policy = np.concatenate([training.episode(i)["observations"][:-1] for i in range(half)])
    follows = policy == np.float32([HOUSE.own.predict(obs)[0][0] for obs in rows_of_policy])
    assert 0.6 < follows.mean() < 1 and len(set(random.tolist())) == 30
    assert all(found[name].lengths.tolist() == [20, 20, 20] for name in recorded.HELD_OUT)
    starts = {float(found[name].obs["obs"][0, 1]) for name in found}
    assert len(starts) == 4  # no set begins as another
    monkeypatch.setattr(recorded, "_record", None)  # nothing is recorded twice, nor for another choice of numbers
    monkeypatch.setattr(recorded, "fingerprint", lambda task: next(tmp_path.iterdir()).name.rpartition("-")[2])
    assert recorded.digest(recorded.load(HOUSE, 0, tmp_path)) == recorded.digest(found)
    masked = recorded.load(replace(HOUSE, shown=(1, 5)), 0, tmp_path)
    assert masked["own"].env_id == "worldmodel.envs:MaskedHeating-v0"
    assert np.array_equal(masked["own"].obs["obs"], found["own"].obs["obs"][:, [1, 5]])
    assert recorded.digest(masked) != recorded.digest(found)


def test_another_seed_or_way_of_recording_makes_other_rows(short, tmp_path):
    one, again, other = (recorded.load(HOUSE, seed, tmp_path / name) for seed, name in ((0, "a"), (0, "b"), (1, "a")))
    assert recorded.digest(one) == recorded.digest(again) != recorded.digest(other)
    recorded.load(replace(HOUSE, rows=62), 0, tmp_path / "b")
    assert len(list((tmp_path / "a").iterdir())) == len(list((tmp_path / "b").iterdir())) == 2


# The table --------------------------------------------------------------------------------------------------------------


def test_a_world_model_is_trained_on_the_rows_for_as_many_updates_as_asked(short, tmp_path, monkeypatch):
    monkeypatch.setitem(truth.TASKS, "Heating-v0", HOUSE)
    job = {"env": "Heating-v0", "model": "gaussian", "seed": 0, "updates": 3, "cache": str(tmp_path)}
    row = truth.work({**job, "overrides": ["size=nano", "train.batch_size=2"]})
    assert row["updates"] == 3 and row["parameters"] > 1000
    for found in row["held_out"].values():
        assert found["starts"] == [6, 6, 3, 0] and all(x > 0 for x in found["error"][:3]) and found["error"][3] is None
        assert np.sqrt(np.square(found["by_number"]["obs"][0]).mean()) == pytest.approx(found["error"][0], rel=1e-3)


def row(model, seed, error, data="same", env="CartPole-v1"):
    held_out = {"error": [error, error, error, None], "persistence": [2.0, 2.0, 0.0, None]}
    key = {"env": env, "model": model, "seed": seed, "updates": None if model in truth.PEERS else truth.UPDATES, "overrides": []}
    made = {"seconds": 1, "parameters": 9, "updates": 9, "data": data, "where": {"code": "this tree"}}
    if model in truth.PEERS:
        made["peer"] = truth.peer_code(env)
    return {"key": key, **made, "held_out": dict.fromkeys(recorded.HELD_OUT, held_out)}


def test_ratios_are_to_the_best_peer_of_the_same_seed_and_rows_with_all_seeds_shown():
    found = [row("mlp", seed, error) for seed, error in enumerate((0.1, 0.3, 0.4))]
    found += [row("mlp 200", seed, error) for seed, error in enumerate((0.2, 0.2, 0.5))]
    found += [row("mlp x4", seed, 0.01) for seed in range(3)]  # which sees more, and is no rival
    found += [row("gaussian", 0, 0.1), row("gaussian", 1, 0.4), row("gaussian", 2, 1.2), row("dreamer", 0, 0.1, data="other")]
    found += [row("mlp", 0, 0.1, env="Pendulum-v1"), row("gaussian", 0, 0.5, env="Pendulum-v1")]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in truth.report(found).splitlines()]
    gaussian = next(line for line in lines if line[:3] == ["CartPole-v1", "own", "gaussian"])
    assert gaussian[3:8] == ["3", *["2.0 (1.0 2.0 3.0)"] * 3, "-"]
    assert gaussian[8:] == ["0.20 (0.050 0.20 0.60)", "0.20 (0.050 0.20 0.60)", "-", "-"]  # no persistence, no ratio
    dreamer = next(line for line in lines if line[:3] == ["CartPole-v1", "own", "dreamer"])
    assert dreamer[4:8] == ["-"] * 4  # other rows than the peer's
    over = next(line for line in lines if line[:2] == ["own", "gaussian"])
    assert over[2:] == ["2", *["3.5 (worst 5.0)"] * 3, "-"]


def test_keys_hold_what_changes_a_row_and_a_probe_measures_its_peers_once(tmp_path, monkeypatch):
    measured = []
    asked = "--env CartPole-v1 --model gaussian --seeds 0 --updates 7 train.lr=1e-4"
    monkeypatch.setattr("sys.argv", ["truth.py", "--probe", "--cache", str(tmp_path), *asked.split()])

    def call(file, job, threads, seconds):
        measured.append(job["model"])
        made = {"peer": truth.peer_code(job["env"])} if job["model"] in truth.PEERS else {}
        return made | {name: x for name, x in row(job["model"], 0, 0.1).items() if name not in ("key", "where")}

    monkeypatch.setattr(truth, "call", call)
    assert truth.main() == 0 and measured == ["mlp", "mlp 200", "gaussian"]
    assert truth.main() == 0 and measured[3:] == ["gaussian"]
    monkeypatch.setattr(rows, "code", lambda: "another tree")
    assert truth.main() == 0 and measured[4:] == ["gaussian"]
    monkeypatch.setattr(truth, "executed", lambda source: "another peer")
    assert truth.main() == 0 and measured[5:] == ["mlp", "mlp 200", "gaussian"]
    (key,) = [row["key"] for row in rows.Rows("truth", tmp_path / "probe") if row["key"]["model"] == "gaussian"]
    assert key == {"env": "CartPole-v1", "model": "gaussian", "seed": 0, "updates": 7, "overrides": ["train.lr=1e-4"]}


def test_an_environment_whose_package_is_missing_is_left_out_with_a_line(monkeypatch, capsys):
    from worldmodel.errors import MissingExtraError

    def make(env):
        if env.startswith("Hopper"):
            raise MissingExtraError("needs the package 'mujoco'")
        return recorded.make_env(env)

    monkeypatch.setattr("worldmodel.envs.make.make_env", make)
    assert truth.available(["CartPole-v1", "Hopper-v5"]) == ["CartPole-v1"]
    assert "skipped: Hopper-v5: needs the package 'mujoco'" in capsys.readouterr().err
