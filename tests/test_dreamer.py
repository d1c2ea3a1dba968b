"""Dreamer keeps Stable-Baselines3's contract, stores what really happened, and comes back from a file as it was."""

from __future__ import annotations

import json
import zipfile

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import CHAIN, IMAGE, SMALL_WORLD, TWO_ACTIONS, VECTOR, Toy, all_weights, small_dreamer, stored
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, EvalCallback, StopTrainingOnRewardThreshold
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecMonitor, VecNormalize

from worldmodel.agents.dreamer import Dreamer
from worldmodel.agents.random import RandomAgent
from worldmodel.data import Batch, Sampling
from worldmodel.envs.tiny import Chain
from worldmodel.errors import ConfigError, UnsupportedSpaceError
from worldmodel.storage.weights import optimizer_arrays

# What it takes ---------------------------------------------------------------------------------------------------------


MADE = {"id": lambda: CHAIN, "class": Chain, "made": lambda: gym.make(CHAIN), "vec": lambda: DummyVecEnv([Chain] * 2)}


@pytest.mark.parametrize("env", MADE.values(), ids=MADE)
def test_it_learns_in_whatever_users_call_an_environment(env):
    agent = small_dreamer(env())
    before = all_weights(agent)
    assert agent.learn(32) is agent
    assert agent.num_timesteps == 32 and agent.learner.updates > 2 and not torch.equal(all_weights(agent), before)


OBSERVATIONS = {
    "vector": VECTOR,
    "image": IMAGE,
    "category": spaces.Discrete(4),
    "bits": spaces.MultiBinary(3),
    "dict": spaces.Dict({"camera": IMAGE, "speed": VECTOR, "gear": spaces.Discrete(3)}),
}
ACTIONS = {
    "Discrete": spaces.Discrete(3),
    "Box": spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, 10.0], np.float32)),
    "MultiDiscrete": spaces.MultiDiscrete([2, 3]),
    "MultiBinary": spaces.MultiBinary(3),
    "integers": spaces.Box(-3, 5, (2,), np.int64),
}
POLICIES = {"image": "CnnPolicy", "dict": "MultiInputPolicy"}


PAIRS = [("vector", action) for action in ACTIONS] + [(name, "Discrete") for name in OBSERVATIONS if name != "vector"]


@pytest.mark.parametrize(("observation", "action"), PAIRS)
def test_every_kind_of_space_learns_and_stores_the_action_that_the_environment_got(observation, action):
    env = Toy(OBSERVATIONS[observation], ACTIONS[action])
    agent = small_dreamer(env, POLICIES.get(observation, "MlpPolicy"))
    actor = torch.cat([p.detach().flatten() for p in agent.controller.actor.parameters()]).clone()
    agent.learn(40)
    assert agent.learner.updates > 5 and agent.learner.skipped == 0
    assert not torch.equal(actor, torch.cat([p.detach().flatten() for p in agent.controller.actor.parameters()]))
    assert len(env.actions) == 40
    assert all(env.action_space.contains(action if action.ndim else np.int64(action)) for action in env.actions)
    rows = stored(agent)
    taken = rows.prev_action[~rows.is_first].numpy()
    assert np.array_equal(taken, agent.action_spec.encode(np.stack(env.actions)))
    np.testing.assert_allclose(agent.action_spec.decode(taken), np.stack(env.actions), rtol=1e-5, atol=1e-6)


def test_policy_names_are_checked_against_the_space():
    with pytest.raises(ConfigError, match=r"CnnPolicy needs an image.*MlpPolicy"):
        small_dreamer(Toy(VECTOR, TWO_ACTIONS), "CnnPolicy")
    with pytest.raises(ConfigError, match=r"MultiInputPolicy needs a Dict.*MlpPolicy"):
        small_dreamer(Toy(VECTOR, TWO_ACTIONS), "MultiInputPolicy")
    with pytest.raises(ValueError, match="MultiInputPolicy"):
        small_dreamer(Toy(OBSERVATIONS["dict"], TWO_ACTIONS), "MlpPolicy")
    with pytest.raises(ValueError, match="MlpLstmPolicy"):
        small_dreamer(policy="MlpLstmPolicy")


def test_spaces_without_a_layout_are_refused_with_the_way_out():
    unbounded = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    with pytest.raises(UnsupportedSpaceError, match="bound"):
        small_dreamer(Toy(VECTOR, unbounded))
    with pytest.raises(UnsupportedSpaceError):
        small_dreamer(Toy(spaces.Text(4), TWO_ACTIONS))


def test_vec_wrappers_that_count_or_stack_are_taken_and_one_that_rescales_is_refused():
    agent = small_dreamer(VecMonitor(DummyVecEnv([Chain]))).learn(30)
    assert len(agent.ep_info_buffer) > 0
    stacked = small_dreamer(VecFrameStack(DummyVecEnv([lambda: Chain(limit=7)]), 2)).learn(30)
    assert stacked.world.obs.keys["obs"].shape == (10,)
    with pytest.raises(ConfigError, match=r"VecNormalize.*take it off"):
        small_dreamer(VecNormalize(DummyVecEnv([Chain])))
    with pytest.raises(ConfigError, match="VecNormalize"):
        agent.set_env(VecMonitor(VecNormalize(DummyVecEnv([Chain]))))


def test_bf16_learns():
    agent = small_dreamer(**{"train.precision": "bf16"}).learn(40)
    assert agent.learner.updates > 2 and agent.learner.skipped == 0 and all_weights(agent).isfinite().all()


# predict ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learned():
    """A Dreamer that has learned a little on the chain; tests must not teach it more."""
    return small_dreamer(Chain(limit=7)).learn(40)


def walk(steps: int = 6) -> np.ndarray:
    """Observations of a walk to the right and back [T, 5]."""
    return np.eye(5, dtype=np.float32)[[0, 1, 2, 1, 2, 3][:steps]]


def test_one_observation_gives_one_action_and_a_batch_gives_a_batch(learned):
    single, state = learned.predict(walk()[0], deterministic=True)
    batch, states = learned.predict(walk(), deterministic=True)
    assert isinstance(single, np.ndarray) and single.shape == () and learned.action_space.contains(single)
    assert batch.shape == (6,) and batch[0] == single
    assert all(isinstance(x, np.ndarray) and len(x) == 1 for x in state) and all(len(x) == 6 for x in states)


def test_a_dict_of_observations_is_one_or_a_batch_too():
    space = spaces.Dict({"camera": IMAGE, "speed": VECTOR, "gear": spaces.Discrete(3)})
    agent = small_dreamer(Toy(space, ACTIONS["Box"]), "MultiInputPolicy")
    one = space.sample()
    action, _ = agent.predict(one, deterministic=True)
    batch, _ = agent.predict({name: np.stack([x, x]) for name, x in one.items()}, deterministic=True)
    assert action.shape == (2,) and batch.shape == (2, 2) and agent.action_space.contains(action)
    np.testing.assert_allclose(batch, np.stack([action, action]), rtol=1e-5)


def test_a_recurrent_prediction_follows_the_belief_that_training_would_have(learned):
    observations, state, beliefs, actions = walk(), None, [], []
    for t, obs in enumerate(observations):
        action, state = learned.predict(obs, state, np.array([t == 0]), deterministic=True)
        actions.append(int(action))
        beliefs.append(learned.policy.initial_belief(1).like(state))
    world = learned.world.eval()
    taken = torch.eye(2)[actions].unsqueeze(0)
    previous = torch.cat([torch.zeros(1, 1, 2), taken[:, :-1]], 1)
    first = torch.arange(6).unsqueeze(0) == 0
    rows = {"obs": torch.from_numpy(observations).unsqueeze(0)}
    batch = Batch(rows, taken, previous, torch.zeros(1, 6), first, first & False, first & False)
    with torch.no_grad():
        trace = world.trace(batch.with_obs(world.preprocess(rows)), None, Sampling(mode=True))
        expected = learned.controller.policy(trace.feature).mode()[0].argmax(-1)
    features = torch.cat([world.dynamics.feature(belief) for belief in beliefs])
    torch.testing.assert_close(features, trace.feature[0], rtol=0, atol=1e-5)
    assert actions == expected.tolist()
    assert torch.equal(beliefs[-1]["prev_action"][0], taken[0, -1])


def test_an_episodes_start_forgets_its_own_row_alone(learned):
    _, state = learned.predict(walk()[[2, 3]], deterministic=True)
    copy = [x.copy() for x in state]
    _, after = learned.predict(walk()[[0, 4]], state, np.array([True, False]), deterministic=True)
    _, fresh = learned.predict(walk()[[0, 4]], deterministic=True)
    _, going = learned.predict(walk()[[0, 4]], state, deterministic=True)
    assert all(np.array_equal(a[0], f[0]) for a, f in zip(after, fresh))
    assert all(np.array_equal(a[1], g[1]) for a, g in zip(after, going))
    assert not all(np.array_equal(a[0], g[0]) for a, g in zip(after, going))
    assert all(np.array_equal(x, c) for x, c in zip(state, copy))  # what was given is left as it was


def test_deterministic_predictions_repeat_and_others_explore(learned):
    observations = np.repeat(walk()[:1], 200, 0)
    greedy = [learned.predict(observations, deterministic=True)[0] for _ in range(2)]
    assert np.array_equal(*greedy) and len(set(greedy[0])) == 1
    assert len(set(learned.predict(observations)[0])) == 2


# Stable-Baselines3's tools ----------------------------------------------------------------------------------------------


def test_evaluate_policy_gives_the_same_answer_twice(learned):
    env = DummyVecEnv([lambda: Monitor(Chain(limit=7))])
    answers = [evaluate_policy(learned, env, 4, return_episode_rewards=True) for _ in range(2)]
    assert answers[0] == answers[1] and len(answers[0][0]) == 4


def test_eval_callback_stops_at_a_threshold_and_keeps_the_best(tmp_path):
    stop = StopTrainingOnRewardThreshold(reward_threshold=-1000)
    env = Monitor(Chain(limit=7))
    watch = EvalCallback(env, stop, n_eval_episodes=2, eval_freq=25, best_model_save_path=str(tmp_path), verbose=0)
    agent = small_dreamer().learn(90, watch)
    assert agent.num_timesteps == 25
    best = Dreamer.load(tmp_path / "best_model.zip")
    assert torch.equal(all_weights(best), all_weights(agent))


def test_checkpoint_callback_writes_what_load_reads(tmp_path):
    agent = small_dreamer().learn(60, CheckpointCallback(save_freq=30, save_path=str(tmp_path), name_prefix="chain"))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["chain_30_steps.zip", "chain_60_steps.zip"]
    half, whole = (Dreamer.load(tmp_path / f"chain_{n}_steps.zip") for n in (30, 60))
    assert (half.num_timesteps, whole.num_timesteps) == (30, 60)
    assert torch.equal(all_weights(whole), all_weights(agent)) and not torch.equal(all_weights(half), all_weights(agent))


def test_a_callback_can_stop_learning():
    class Stop(BaseCallback):
        def _on_step(self) -> bool:
            return self.n_calls < 7

    assert small_dreamer().learn(50, Stop()).num_timesteps == 7


# Files and parameters --------------------------------------------------------------------------------------------------


def test_what_was_saved_comes_back_as_it_was(learned, tmp_path):
    learned.save(tmp_path / "agent")
    twin = Dreamer.load(tmp_path / "agent.zip")
    assert torch.equal(all_weights(twin), all_weights(learned)) and twin.config == learned.config
    assert (twin.num_timesteps, twin._n_updates, twin.learner.updates) == (40, learned._n_updates, learned.learner.updates)
    for deterministic in (True, False):  # the random state is saved too
        ours, theirs = (agent.predict(np.repeat(walk(), 9, 0), deterministic=deterministic) for agent in (learned, twin))
        assert np.array_equal(ours[0], theirs[0]) and all(np.array_equal(a, b) for a, b in zip(ours[1], theirs[1]))
    scales = [(agent.behaviour.scale.low, agent.behaviour.scale.high) for agent in (twin, learned)]
    assert scales[0] == scales[1] and None not in scales[0]
    assert twin.rng.bit_generator.state == learned.rng.bit_generator.state and twin._updates_due == learned._updates_due
    for name, optimizer in learned.optimizers_by_name.items():
        ours, theirs = optimizer_arrays(optimizer), optimizer_arrays(twin.optimizers_by_name[name])
        assert ours and ours.keys() == theirs.keys() and all(np.array_equal(ours[key], theirs[key]) for key in ours)


def test_the_file_holds_no_pickle(learned, tmp_path):
    learned.save(tmp_path / "agent.zip")
    with zipfile.ZipFile(tmp_path / "agent.zip") as archive:
        for member in archive.infolist():
            data = archive.read(member)
            assert member.compress_type == zipfile.ZIP_STORED
            if member.filename.endswith(".json") or member.filename == "data":
                json.loads(data)
            else:
                assert member.filename.endswith(".safetensors") and data[8:9] == b"{"


def test_a_loaded_agent_learns_on_from_where_it_was(tmp_path):
    agent = small_dreamer().learn(30)
    agent.save(tmp_path / "agent.zip")
    on = Dreamer.load(tmp_path / "agent.zip", env=Chain(limit=7))
    updates = on.learner.updates
    on.learn(30, reset_num_timesteps=False)
    assert on.num_timesteps == 60 and on.learner.updates > updates
    alone = Dreamer.load(tmp_path / "agent.zip")
    with pytest.raises(ConfigError, match="set_env"):
        alone.learn(10)
    alone.set_env(DummyVecEnv([Chain]))
    assert alone.learn(10).num_timesteps == 10


def test_a_file_of_another_kind_of_agent_is_refused(tmp_path):
    agent = RandomAgent("MlpPolicy", CHAIN, config=SMALL_WORLD, seed=0, device="cpu").learn(30)
    assert agent.learner.updates > 2
    agent.save(tmp_path / "random.zip")
    with pytest.raises(ConfigError, match="'random', not 'dreamer'"):
        Dreamer.load(tmp_path / "random.zip")
    assert torch.equal(all_weights(RandomAgent.load(tmp_path / "random.zip")), all_weights(agent))


def test_parameters_are_taken_out_and_put_in_as_sb3_does(learned, tmp_path):
    parameters = learned.get_parameters()
    assert set(parameters) == {"policy", "optimizers.world", "optimizers.actor", "optimizers.critic"}
    other = small_dreamer(Chain(limit=7), seed=5).learn(30)
    assert not torch.equal(all_weights(other), all_weights(learned))
    other.set_parameters(parameters)
    assert torch.equal(all_weights(other), all_weights(learned))
    assert other.learner.optimizer.state_dict()["state"].keys() == learned.learner.optimizer.state_dict()["state"].keys()
    learned.save(tmp_path / "agent.zip")
    another = small_dreamer(Chain(limit=7), seed=6)
    another.set_parameters(tmp_path / "agent.zip")
    assert torch.equal(all_weights(another), all_weights(learned)) and another.num_timesteps == 0
    with pytest.raises(ValueError, match="wheels"):
        another.set_parameters({**parameters, "wheels": {}})


def test_weights_of_another_size_are_refused(learned, tmp_path):
    learned.save(tmp_path / "agent.zip")
    with pytest.raises(ConfigError, match="do not fit"):
        small_dreamer(**{"model.dynamics.deter": 12}).set_parameters(tmp_path / "agent.zip")


def test_a_vec_env_of_another_width_is_refused():
    agent = small_dreamer(DummyVecEnv([Chain] * 2)).learn(24)
    with pytest.raises((ConfigError, ValueError, AssertionError), match="environments"):
        agent.set_env(DummyVecEnv([Chain] * 3))


@pytest.mark.parametrize(("observation", "action"), PAIRS)
def test_a_loaded_agent_takes_the_environment_that_it_was_made_for(observation, action, tmp_path):
    agent = small_dreamer(Toy(OBSERVATIONS[observation], ACTIONS[action]), POLICIES.get(observation, "MlpPolicy"))
    agent.save(tmp_path / "agent.zip")
    twin = Dreamer.load(tmp_path / "agent.zip", env=Toy(OBSERVATIONS[observation], ACTIONS[action]))
    obs = twin.observation_space.sample()
    assert twin.action_space == agent.action_space and twin.observation_space == agent.observation_space
    assert np.array_equal(twin.predict(obs, deterministic=True)[0], agent.predict(obs, deterministic=True)[0])
    assert twin.learn(2).num_timesteps == 2


def test_a_loaded_agent_may_learn_in_more_environments_than_before(tmp_path):
    small_dreamer().save(tmp_path / "agent.zip")
    twin = Dreamer.load(tmp_path / "agent.zip", env=DummyVecEnv([Chain] * 3))
    assert twin.learn(30).num_timesteps == 30 and twin.replay.num_envs == 3


def test_more_environments_than_the_replay_has_room_for_are_refused_when_it_is_loaded(tmp_path):
    small_dreamer(**{"train.capacity": 20}).save(tmp_path / "agent.zip")
    with pytest.raises(ConfigError, match=r"keeps 5 steps of each of 4 environments.*Raise train\.capacity"):
        Dreamer.load(tmp_path / "agent.zip", env=DummyVecEnv([Chain] * 4))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match=r"device=cuda.*device=cpu"):
        Dreamer("MlpPolicy", CHAIN, config=SMALL_WORLD, device="cuda")


# The average ------------------------------------------------------------------------------------------------------------


def test_what_acts_imagines_and_is_saved_is_the_averaged_model(tmp_path):
    agent = small_dreamer(Chain(limit=7), **{"train.ema_decay": 0.9}).learn(40)
    average, live = (torch.cat([p.detach().flatten() for p in world.parameters()]) for world in (agent.learner.ema, agent.world))
    assert agent.policy.world is agent.behaviour.world is agent.learner.ema and not torch.equal(average, live)
    agent.save(tmp_path / "agent.zip")
    loaded = Dreamer.load(tmp_path / "agent.zip")
    assert torch.equal(torch.cat([p.flatten() for p in loaded.policy.world.parameters()]), average)
    assert torch.equal(torch.cat([p.detach().flatten() for p in loaded.world.parameters()]), live)
    assert agent.parameter_count == sum(p.numel() for p in small_dreamer(Chain(limit=7)).policy.parameters() if p.requires_grad)
    other = small_dreamer(Chain(limit=7), seed=5, **{"train.ema_decay": 0.9})
    other.set_parameters(agent.get_parameters())
    assert torch.equal(torch.cat([p.detach().flatten() for p in other.world.parameters()]), live)
