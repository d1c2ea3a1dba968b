"""Dyna: what it puts into SB3's own buffer is true of the world, as much as was asked for, and stored as SB3 stores."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import CHAIN, SMALL_WORLD, small
from small_runs import small_train
from stable_baselines3 import DQN, PPO, SAC
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from test_imagined import LEARNS

from worldmodel.agents import DynaCallback
from worldmodel.agents.sb3.dyna import REFILTER_EVERY
from worldmodel.config import Config
from worldmodel.envs import LatentVecEnv, make_vec
from worldmodel.envs.imagined import ImaginedWorld, ReplayStarts
from worldmodel.errors import ConfigError
from worldmodel.storage.run import Run

CELLS = np.eye(5, dtype=np.float32)


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> Run:
    """A run that has learned Chain, with an ensemble."""
    folder = tmp_path_factory.mktemp("chain") / "run"
    ensemble = small("ensemble", "standard", members=3).model_dump()
    small_train(folder, 300, options={**LEARNS, "model.ensemble": ensemble})
    return Run.open(folder)


def dqn(env=None, **options) -> DQN:
    given = {"learning_starts": 5, "train_freq": 4, "batch_size": 8, "policy_kwargs": {"net_arch": [8]}, "seed": 0, "device": "cpu"}
    return DQN("MlpPolicy", env if env is not None else make_vec(CHAIN, 1, seed=0), **{**given, "buffer_size": 2000, **options})


def transitions(model: DQN):
    """(cell, action, cell, reward, done) of every row of the buffer."""
    buffer, n = model.replay_buffer, model.replay_buffer.size()
    cells = [x[:n, 0].argmax(-1) for x in (buffer.observations, buffer.next_observations)]
    return zip(cells[0], buffer.actions[:n, 0, 0], cells[1], buffer.rewards[:n, 0], buffer.dones[:n, 0])


def test_imagined_transitions_are_those_of_the_world_at_the_ratio_asked_for(chain):
    model = dqn()
    callback = DynaCallback(chain, ratio=6, horizon=2, every=5)
    model.learn(40, callback=callback)
    assert 0.6 * 240 <= callback.imagined <= 240  # roll-outs that reach the end are shorter
    assert model.replay_buffer.size() == 40 + callback.imagined
    right = []
    for cell, action, following, reward, done in transitions(model):
        arrived = min(max(cell + (1 if action == 1 else -1), 0), 4)
        worth = 1.0 if arrived == 4 else (arrived - 4) / 10
        right.append(following == arrived and abs(reward - worth) < 0.15 and done == (arrived == 4))
    assert np.mean(right) > 0.9


def test_a_world_that_learns_along_takes_in_what_the_environment_got():
    model = dqn()
    config = {**SMALL_WORLD, "train.prefill": 16, "train.ratio": 0.5, "agent": "random"}
    config.pop("agent")
    callback = DynaCallback(ratio=2, every=4, config=config)
    model.learn(60, callback=callback)
    agent = callback.agent
    assert agent.learner.updates > 10 and callback.imagined > 0
    rows = agent.replay.sample(1, agent.replay.lengths[0], np.random.default_rng(0))
    cells, actions = rows.obs["obs"][0].argmax(-1).tolist(), rows.prev_action[0].argmax(-1).tolist()
    assert len(cells) >= 61
    for before, action, after, first in zip(cells, actions[1:], cells[1:], rows.is_first[0, 1:].tolist()):
        assert first or after == min(max(before + (1 if action == 1 else -1), 0), 4)


def test_a_vec_env_that_tells_nothing_of_its_environments_is_learned_along():
    class Silent(DummyVecEnv):
        def get_attr(self, attr_name, indices=None):
            raise AttributeError(attr_name)

    model, callback = dqn(), DynaCallback(ratio=2, every=4, config=SMALL_WORLD)
    model.set_env(model.env)
    model.env.__class__ = Silent
    model.learn(30, callback=callback)
    assert len(callback.agent.replay) > 30


@pytest.mark.parametrize("learns", [False, True])
def test_roll_outs_share_their_worlds_and_use_starts_again_until_the_model_has_changed(chain, learns, monkeypatch):
    filtered, made, rolled = [], [], []
    for owner, name, calls in ((ReplayStarts, "_filter", filtered), (ImaginedWorld, "__init__", made)):
        inner = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, _inner=inner, _calls=calls, **k: _calls.append(1) or _inner(*a, **k))
    config = {**SMALL_WORLD, "train.prefill": 8, "train.pretrain": 0, "train.ratio": 1.0}
    callback = DynaCallback(ratio=2.5, every=2, config=config) if learns else DynaCallback(chain, ratio=2.5, every=2)
    roll_out = callback.roll_out
    callback.roll_out = lambda starts: rolled.append(starts) or roll_out(starts)
    dqn().learn(60, callback=callback)
    assert len(rolled) > 20 and set(rolled) == {5} and len(made) == 1
    updates = callback.agent.learner.updates if learns else 0
    assert len(filtered) == 1 + updates // REFILTER_EVERY and (updates > 40) == learns


def test_on_latents_the_buffer_gets_features(chain):
    env = LatentVecEnv(make_vec(CHAIN, 1, seed=0), chain)
    model = dqn(env)
    callback = DynaCallback(chain, ratio=4, every=5)
    model.learn(20, callback=callback)
    assert callback.imagined > 0 and model.replay_buffer.observations.shape[-1] == env.world.feature_dim


def test_several_environments_share_the_imagined_rows(chain):
    model = dqn(make_vec(CHAIN, 3, seed=0))
    callback = DynaCallback(chain, ratio=5, every=2)
    model.learn(30, callback=callback)
    assert callback.imagined % 3 == 0 and callback.imagined >= 0.8 * 5 * 30 - 3
    assert model.replay_buffer.size() == (model.num_timesteps + callback.imagined) // 3


def test_continuous_actions_are_stored_on_sb3s_scale():
    config = {**SMALL_WORLD, "train.prefill": 16}
    options = {"learning_starts": 5, "batch_size": 8, "policy_kwargs": {"net_arch": [8]}, "seed": 0, "buffer_size": 500}
    model = SAC("MlpPolicy", "Pendulum-v1", **options)
    callback = DynaCallback(ratio=3, every=4, config=config)
    taken = []
    original = callback.roll_out
    callback.roll_out = lambda starts: taken.append(original(starts)) or taken[-1]
    model.learn(40, callback=callback)
    env_actions = np.concatenate([step[2] for steps in taken for step in steps]).ravel()
    stored = model.replay_buffer.actions[: model.replay_buffer.size(), 0, 0]
    assert callback.imagined == len(env_actions) > 0 and np.abs(stored).max() <= 1
    for action in env_actions:
        assert np.isclose(stored, action / 2, atol=1e-5).any()


def test_roll_outs_end_where_the_ensemble_disagrees(chain):
    counts = {}
    for bound in (None, 1e-6):
        model, callback = dqn(), DynaCallback(chain, ratio=12, horizon=3, every=5, max_uncertainty=bound)
        model.learn(20, callback=callback)
        counts[bound] = callback.imagined
    assert counts[1e-6] < 0.5 * counts[None]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": -1}, "ratio is -1"),
        ({"ratio": float("nan")}, "ratio is nan"),
        ({"horizon": 0}, "horizon is 0"),
        ({"every": True}, "every is True"),
        ({"max_uncertainty": 0.0}, "max_uncertainty is 0.0"),
        ({"config": {"train.ratio": 1.0}}, "for a world that learns along"),
    ],
)
def test_numbers_out_of_range_are_refused(options, message, chain):
    with pytest.raises(ConfigError, match=message):
        DynaCallback(chain, **options)


def test_options_that_would_do_nothing_are_refused(chain):
    with pytest.raises(ConfigError, match="replay is for a finished world"):
        DynaCallback(replay=chain.replay())
    with pytest.raises(ConfigError, match="leaves nothing to a recipe"):
        DynaCallback(recipe="cartpole", config=Config.from_recipe("cartpole"))
    callback = DynaCallback(config=SMALL_WORLD, max_uncertainty=1.0)
    with pytest.raises(ConfigError, match="has no ensemble"):  # before the first step, not at the first roll-out
        dqn().learn(1, callback=callback)


def test_buffers_that_take_neighbouring_rows_for_one_episode_are_refused(chain):
    with pytest.raises(ConfigError, match=r"NStepReplayBuffer takes neighbours.*n_steps=1, and no HER"):
        dqn(n_steps=3).learn(8, callback=DynaCallback(chain))


def test_what_dyna_cannot_fill_is_refused_with_the_way_out(chain):
    with pytest.raises(ConfigError, match=r"PPO has none.*train_in_dream"):
        PPO("MlpPolicy", make_vec(CHAIN, 1), n_steps=8, device="cpu").learn(8, callback=DynaCallback(chain))
    with pytest.raises(ConfigError, match="VecNormalize"):
        dqn(VecNormalize(make_vec(CHAIN, 1))).learn(8, callback=DynaCallback(chain))
    with pytest.raises(ConfigError, match="optimize_memory_usage"):
        options = {"replay_buffer_kwargs": {"handle_timeout_termination": False}, "optimize_memory_usage": True}
        dqn(**options).learn(8, callback=DynaCallback(chain))
    with pytest.raises(ConfigError, match="of another environment"):
        dqn(make_vec("CartPole-v1", 1)).learn(8, callback=DynaCallback(chain))
