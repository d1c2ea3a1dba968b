"""SB3's scripts that save and load a replay buffer."""

import io

import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import CheckpointCallback
from stable_baselines3.common.vec_env import DummyVecEnv
from test_sb3_habits import Pictures, Short, catches, dreamer

from worldmodel.agents import Dreamer
from worldmodel.agents.belief import BeliefPolicy
from worldmodel.errors import ConfigError, CorruptError
from worldmodel.storage import checkpoint


def same_rows(one, other):
    """Whether two replays hold the same rows in the same streams; the number of them."""
    for number in range(one.num_envs):
        a, b = one.stream(number), other.stream(number)
        assert a.obs.keys() == b.obs.keys() and all(torch.equal(a.obs[key], b.obs[key]) for key in a.obs)
        for name in ("action", "prev_action", "reward", "is_first", "is_last", "is_terminal"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
    return sum(one.lengths)


@pytest.mark.parametrize("made", [Short, Pictures])
def test_the_replay_that_a_checkpoint_callback_saves_is_loaded_again(made, tmp_path):
    model = dreamer(DummyVecEnv([made, made]), BeliefPolicy)
    assert model.replay_buffer is None
    model.learn(42, CheckpointCallback(20, tmp_path, save_replay_buffer=True))
    assert sorted(x.name for x in tmp_path.iterdir()) == ["rl_model_40_steps.zip", "rl_model_replay_buffer_40_steps.pkl"]
    model.replay_buffer.truncate_open_episodes()
    model.save_replay_buffer(tmp_path / "all")

    again = Dreamer.load(tmp_path / "rl_model_40_steps", env=DummyVecEnv([made, made]), config={"train.ratio": 0.5})
    again.load_replay_buffer(tmp_path / "all")
    rows = same_rows(again.replay_buffer, model.replay_buffer)
    updates = again.learner.updates
    again.learn(4, reset_num_timesteps=False)
    assert again.replay is again.replay_buffer and sum(again.replay.lengths) > rows
    assert again.learner.updates > updates  # learning goes on without a new prefill


def test_a_replay_goes_through_a_stream_and_fits_a_fresh_model_s_statistics():
    model, other, stream = dreamer(Short()).learn(30), dreamer(Short()), io.BytesIO()
    model.replay.truncate_open_episodes()
    model.save_replay_buffer(stream)
    other.load_replay_buffer(stream)
    assert same_rows(other.replay, model.replay) > 30
    assert other.world.scaling.count == model.world.scaling.count
    torch.testing.assert_close(other.world.scaling.moments[0].mean, model.world.scaling.moments[0].mean)
    counted = other.world.scaling.count.clone()
    other.load_replay_buffer(stream)
    assert other.world.scaling.count == counted


def test_rewards_of_a_loaded_replay_enter_the_scale_once_where_nothing_observed_is_a_vector():
    model, other, stream = dreamer(catches(False), BeliefPolicy).learn(60), dreamer(catches(False), BeliefPolicy), io.BytesIO()
    model.replay.truncate_open_episodes()
    model.save_replay_buffer(stream)
    other.load_replay_buffer(stream)
    counted = int(other.world.heads.scale.squares.count)
    assert counted == int(model.world.heads.scale.squares.count) > 0
    other.load_replay_buffer(stream)
    assert int(other.world.heads.scale.squares.count) == counted


def test_a_replay_of_other_spaces_or_none_is_refused_by_name(tmp_path):
    model = dreamer(Short())
    with pytest.raises(ConfigError, match="no experience to save yet"):
        model.save_replay_buffer(tmp_path / "none")
    model.learn(12)
    model.save_replay_buffer(tmp_path / "short")
    model.save(tmp_path / "agent.zip")
    (tmp_path / "pickle.pkl").write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(ConfigError, match="the observation space Box"):
        dreamer().load_replay_buffer(tmp_path / "short")
    with pytest.raises(ConfigError, match="of 1 environments, and this agent has 2"):
        dreamer(DummyVecEnv([Short, Short])).load_replay_buffer(tmp_path / "short")
    with pytest.raises(ConfigError, match="holds no experience"):
        model.load_replay_buffer(tmp_path / "agent.zip")
    with pytest.raises(CorruptError, match="no intact zip"):
        model.load_replay_buffer(tmp_path / "pickle")
    with pytest.raises(ConfigError, match="truncate_last_traj=False"):
        model.load_replay_buffer(tmp_path / "short", truncate_last_traj=False)
    with pytest.raises(ConfigError, match="holds an agent of kind None"):
        Dreamer.load(tmp_path / "short.pkl")
    assert model.replay_buffer.added > 12


def test_a_replay_that_does_not_fit_together_is_refused_and_the_old_one_stays(tmp_path):
    model = dreamer(Short()).learn(12)
    model.save_replay_buffer(tmp_path / "a")
    arrays, state, manifest = checkpoint.unpack(tmp_path / "a.pkl")
    rows, kept = arrays["replay"], model.replay
    ill = [
        ({k: x for k, x in rows.items() if k != "0/reward"}, state),
        ({**rows, "0/reward": rows["0/reward"][1:]}, state),
        ({**rows, "0/obs/obs": rows["0/obs/obs"].astype(np.float64)}, state),
        ({**rows, "0/is_terminal": ~rows["0/is_last"]}, state),
        (rows, {**state, "observation": {"single": True}}),
        (rows, {"holds": "replay"}),
    ]
    for content, said in ill:
        checkpoint.pack(tmp_path / "b.pkl", manifest["step"], {"replay": content}, said)
        with pytest.raises(CorruptError, match="does not fit together"):
            model.load_replay_buffer(tmp_path / "b")
        assert model.replay is kept
