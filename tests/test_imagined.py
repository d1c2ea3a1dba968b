"""The learned world as environments: what it learned, where episodes begin and end, and what leaves it."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import IMAGE, VECTOR, small_world
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env as gymnasium_check
from gymnasium.vector import AutoresetMode
from small_runs import small_train
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.env_checker import check_env as sb3_check
from stable_baselines3.common.vec_env import VecMonitor

from worldmodel.data import Sampling
from worldmodel.envs import ImaginedEnv, ImaginedVecEnv, ImaginedVectorEnv, ImaginedWorld, Viewer
from worldmodel.envs.imagined import ReplayStarts
from worldmodel.errors import ConfigError, NumericsError
from worldmodel.storage.replay import Replay
from worldmodel.storage.run import Run

LEARNS = {
    **{"agent": "random", "eval.every": 0, "checkpoint.every": 0, "train.prefill": 300, "train.pretrain": 120},
    **{"train.ratio": 0.0034},
    **{"train.batch_size": 8, "train.batch_length": 10, "train.lr": 1e-2, "model.heads.bins": 63, "model.dynamics.free_nats": 0.0},
    **{f"model.{part}.units": 32 for part in ("encoder", "decoder", "dynamics", "heads")},
    **{"model.dynamics.deter": 32, "model.dynamics.latent.variables": 4, "model.dynamics.latent.classes": 5},
}
"""Options with which Chain is learned in some seconds."""
IMAGINED = "worldmodel.envs:Imagined-v0"


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> str:
    """A run that has learned Chain."""
    folder = tmp_path_factory.mktemp("chain") / "run"
    small_train(folder, 300, options=LEARNS)
    return str(folder)


def recorded(world, episodes: int = 12, length: int = 4) -> Replay:
    """Random episodes of a world's spaces in one stream; every other one ends in a terminal row."""
    rng = np.random.default_rng(0)
    replay = Replay(episodes * length, world.obs.store, world.action.dim, 1)
    space = world.obs.space
    space.seed(0)
    for row in range(episodes * length):
        obs = world.obs.to_raw(_batch_of_one(space.sample()))
        first, last = row % length == 0, row % length == length - 1
        terminal = last and (row // length) % 2 == 0
        replay.add(obs, world.action.sample(1, rng), np.ones(1), *(np.array([flag]) for flag in (first, last, terminal)))
    return replay


def _batch_of_one(obs):
    return {name: np.asarray(x)[None] for name, x in obs.items()} if isinstance(obs, dict) else np.asarray(obs)[None]


def goes_on_with(world, probability: float):
    """The same world, whose continue head says this of every step."""
    world.heads.cont = lambda feature: torch.full(feature.shape[:-1], probability)
    return world


def played(env, steps: int = 12, seed: int | None = None, spoil=lambda *arrays: None) -> list[np.ndarray]:
    """All that a VecEnv gives in some steps of known actions, copied; `spoil` gets the originals."""
    if seed is not None:
        env.seed(seed)
    env.action_space.seed(0)
    story = [env.reset()]
    story[0] = story[0].copy()
    for _ in range(steps):
        obs, reward, done, infos = env.step(np.stack([env.action_space.sample() for _ in range(env.num_envs)]))
        ends = [info["terminal_observation"].copy() for info in infos if "terminal_observation" in info]
        story += [obs.copy(), reward.copy(), done.copy(), *ends]
        spoil(obs, reward, done, infos)
    return story


def equal(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return len(one) == len(other) and all(np.array_equal(a, b) for a, b in zip(one, other))


# What was learned -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["replay", "prior"])
def test_a_learned_chain_moves_rewards_and_ends_as_the_real_one_does(chain, start):
    env = ImaginedVecEnv(chain, 64, horizon=6, start=start, observation="decoded", seed=0)
    cell, rng = env.reset().argmax(1), np.random.default_rng(0)
    moved, ended, off = [], [], []
    for _ in range(20):
        action = rng.integers(0, 2, 64)
        obs, reward, done, infos = env.step(action)
        truth = np.clip(cell + 2 * action - 1, 0, 4)
        observed = np.array([info.get("terminal_observation", row) for info, row in zip(infos, obs)]).argmax(1)
        terminated = done & ~np.array([info.get("TimeLimit.truncated", False) for info in infos])
        moved.append(observed == truth)
        ended.append(terminated == (truth == 4))
        off.append(np.abs(reward - np.where(truth == 4, 1.0, (truth - 4) / 10)))
        cell = obs.argmax(1)
    assert np.mean(moved) > 0.98 and np.mean(ended) > 0.98 and np.mean(off) < 0.03
    if start == "prior":
        assert (env.reset().argmax(1) == 0).mean() > 0.9, "every episode of Chain begins in cell 0"


@pytest.mark.parametrize("algorithm", [PPO, DQN])
def test_unmodified_sb3_algorithms_learn_in_it(chain, algorithm):
    env = VecMonitor(ImaginedVecEnv(chain, 8, horizon=5, seed=0))
    options = {"n_steps": 16, "batch_size": 64} if algorithm is PPO else {"learning_starts": 16, "train_freq": 2}
    model = algorithm("MlpPolicy", env, seed=0, device="cpu", policy_kwargs={"net_arch": [8]}, **options)
    before = torch.cat([x.flatten().clone() for x in model.policy.parameters()])
    model.learn(256)
    after = torch.cat([x.flatten() for x in model.policy.parameters()])
    assert model._n_updates > 2 and not torch.equal(before, after) and after.isfinite().all()
    assert {episode["l"] for episode in model.ep_info_buffer} <= {1, 2, 3, 4, 5}


# Ends -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("observation", ["latent", "decoded"])
def test_the_horizon_truncates_and_keeps_the_last_observation(observation):
    world = goes_on_with(small_world(), 1.0)
    env = ImaginedVecEnv(world, 3, horizon=4, start="prior", observation=observation, seed=0)
    env.reset()
    for t in range(1, 9):
        before = env.worlds.state
        obs, _, done, infos = env.step(np.zeros(3, np.int64))
        assert done.tolist() == [t % 4 == 0] * 3
        for i, info in enumerate(infos):
            assert set(info) == ({"TimeLimit.truncated", "terminal_observation"} if t % 4 == 0 else set())
            if done[i]:
                assert info["TimeLimit.truncated"] and info["terminal_observation"] in env.observation_space
                assert not np.array_equal(info["terminal_observation"], obs[i])
        if observation == "latent":
            h = world.dynamics.imagine(before, env.worlds.encode(np.zeros(3, np.int64)), Sampling(mode=True))["h"]
            last = np.stack([info.get("terminal_observation", row) for info, row in zip(infos, obs)])
            np.testing.assert_allclose(last[:, : h.shape[1]], h.detach().numpy(), atol=1e-6)


def test_a_predicted_end_terminates_even_where_the_horizon_ends_too():
    env = ImaginedVecEnv(goes_on_with(small_world(), 0.0), 3, horizon=1, start="prior", seed=0)
    env.reset()
    _, _, done, infos = env.step(np.zeros(3, np.int64))
    assert done.all() and not any(info["TimeLimit.truncated"] for info in infos)


def test_worlds_end_as_often_as_the_model_says():
    env = ImaginedVecEnv(goes_on_with(small_world(), 0.7), 4000, horizon=9, start="prior", seed=0)
    env.reset()
    assert abs(env.step(np.zeros(4000, np.int64))[2].mean() - 0.3) < 5 * np.sqrt(0.21 / 4000)


# Beginnings -------------------------------------------------------------------------------------------------------------


def test_starts_are_filtered_states_of_rows_that_are_not_terminal(monkeypatch):
    world = small_world(latent="gaussian")
    traces, trace = [], world.trace
    monkeypatch.setattr(world, "trace", lambda batch, *args: traces.append((batch, trace(batch, *args))) or traces[-1][1])
    starts = ReplayStarts(world, recorded(world))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        h = starts.draw(500, generator)["h"]
    batch, observed = traces[0]
    good = {row.numpy().tobytes() for row in observed.states["h"][~batch.is_terminal]}
    bad = {row.numpy().tobytes() for row in observed.states["h"][batch.is_terminal]}
    drawn = {row.numpy().tobytes() for row in h}
    assert drawn <= good and not drawn & bad and len(drawn) > 30
    assert batch.is_terminal.any()


def test_a_row_counts_once_its_episodes_beginning_or_a_quarter_of_the_window_was_seen(monkeypatch):
    world = small_world()
    replay = recorded(world, episodes=1, length=12)
    batch = replay.sample(64, 8, np.random.default_rng(0))
    monkeypatch.setattr(ReplayStarts, "length", 8)
    starts = ReplayStarts(world, replay)
    monkeypatch.setattr(replay, "sample", lambda *args: batch)
    with torch.no_grad():
        pool = starts._filter(torch.Generator().manual_seed(0))
    opened = batch.is_first[:, 0]
    assert 0 < opened.sum() < 64
    assert pool.batch_size == int((~batch.is_terminal).sum()) - int((~opened).sum()) * 2


def test_starts_are_filtered_anew_once_they_were_drawn_often_enough(monkeypatch):
    world = small_world()
    starts, generator = ReplayStarts(world, recorded(world)), torch.Generator().manual_seed(0)
    filtered, each = [], starts._filter
    monkeypatch.setattr(starts, "_filter", lambda generator: filtered.append(each(generator)) or filtered[-1])
    with torch.no_grad():
        size = starts.draw(1, generator) and filtered[0].batch_size
        for _ in range(2 * starts.reuse + 1):
            starts.draw(size, generator)
    assert len(filtered) == 3


def test_every_reset_of_all_worlds_sees_the_weights_as_they_are():
    world = small_world()
    env = ImaginedVecEnv(world, 4, replay=recorded(world), seed=0)

    def start():
        env.worlds.generator.manual_seed(3)
        return env.reset()

    before = start()
    assert np.array_equal(before, start())
    with torch.no_grad():
        world.dynamics.gru.inputs.weight.mul_(3)
    assert not np.allclose(before, start())


def test_a_world_in_training_dreams_in_eval_mode():
    world = small_world().train()
    ImaginedWorld(world, 2, start="prior")
    assert not any(module.training for module in world.modules())


def test_begun_worlds_leave_the_others_alone():
    world = small_world()
    worlds = ImaginedWorld(world, 5, start="prior", seed=0)
    worlds.reset()
    worlds.step(torch.zeros(5, 2))
    before = worlds.state
    worlds.reset(torch.tensor([1, 3]))
    for name in before:
        same = (before[name] == worlds.state[name]).all(1)
        assert same.tolist() == [True, False, True, False, True]
    assert worlds.age.tolist() == [1, 0, 1, 0, 1]


# Seeds and copies -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["replay", "prior"])
def test_the_same_seed_is_the_same_dream_whatever_else_is_drawn(start):
    world = small_world()

    def env(seed):
        return ImaginedVecEnv(world, 3, 4, start=start, replay=recorded(world), seed=seed)

    one = played(env(1))
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert equal(one, played(env(1))) and not equal(one, played(env(2)))
    assert torch.equal(before, torch.get_rng_state()), "the process's own generator is left alone"
    other = env(2)
    assert equal(played(other, seed=7), played(other, seed=7)) and not equal(played(other, seed=7), played(other, seed=8))


def test_a_seed_waits_for_the_next_reset_and_counts_once():
    world = small_world()
    env, twin = (ImaginedVecEnv(world, 3, 4, start="prior", seed=0) for _ in range(2))
    env.reset(), twin.reset()
    env.seed(5)
    action = np.zeros(3, np.int64)
    assert np.array_equal(env.step(action)[0], twin.step(action)[0])
    first = env.reset()
    assert not np.array_equal(first, env.reset())


def test_what_callers_write_into_their_arrays_changes_nothing():
    world = small_world()

    def spoil(obs, reward, done, infos):
        obs[:], reward[:], done[:] = 7, 7, True
        for info in infos:
            info["observed"] = info.get("observed", 0) + 1
            assert info["observed"] == 1, "each world has an info of its own"

    one, other = (ImaginedVecEnv(world, 3, 4, start="prior", seed=0) for _ in range(2))
    assert equal(played(one), played(other, spoil=spoil))


def test_an_action_moves_its_own_world_only():
    world = small_world()
    one, other = (ImaginedVecEnv(world, 3, start="prior", seed=0) for _ in range(2))
    one.reset(), other.reset()
    changed = one.step(np.array([0, 0, 0]))[0] != other.step(np.array([0, 1, 0]))[0]
    assert changed.any(1).tolist() == [False, True, False]


# Spaces -----------------------------------------------------------------------------------------------------------------

OBSERVATIONS = [
    VECTOR,
    IMAGE,
    spaces.Box(0, 1, (1, 16, 20), np.float32),
    spaces.Box(0, 255, (16, 16), np.uint8),
    spaces.Discrete(5),
    spaces.MultiDiscrete([3, 4]),
    spaces.MultiBinary(4),
    spaces.Dict({"a": VECTOR, "b": spaces.Discrete(3), "c": IMAGE}),
]
ACTIONS = [spaces.Discrete(3), spaces.Box(-2, 3, (2,), np.float32), spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(3)]


@pytest.mark.parametrize("space", OBSERVATIONS, ids=str)
def test_decoded_observations_are_of_the_environments_own_space(space):
    world = goes_on_with(small_world(space), 0.8)
    env = ImaginedVecEnv(world, 3, 2, start="prior", observation="decoded", seed=0)
    assert env.observation_space == space
    obs = env.reset()
    for _ in range(4):
        obs, _, done, infos = env.step(np.zeros(3, np.int64))
        for i in range(3):
            row = {name: x[i] for name, x in obs.items()} if isinstance(obs, dict) else obs[i]
            assert row in space
            assert not done[i] or infos[i]["terminal_observation"] in space


@pytest.mark.parametrize("action", ACTIONS, ids=str)
def test_actions_are_the_environments_own(action):
    world = small_world(VECTOR, action)
    env = ImaginedVecEnv(world, 2, start="prior", seed=0)
    assert env.action_space == action
    observed = []
    imagine = world.dynamics.imagine
    world.dynamics.imagine = lambda state, taken, sampling: observed.append(taken) or imagine(state, taken, sampling)
    env.reset()
    chosen = np.stack([action.sample(), action.sample()])
    env.step(chosen)
    np.testing.assert_allclose(world.action.decode(observed[-1]), chosen, rtol=1e-5)


def test_an_action_that_the_space_does_not_hold_is_refused():
    env = ImaginedVecEnv(small_world(), 2, start="prior")
    env.reset()
    with pytest.raises(ValueError, match="row 1 holds 2"):
        env.step(np.array([0, 2]))


@pytest.mark.parametrize(
    ("space", "size"), [(IMAGE, (16, 16)), (OBSERVATIONS[2], (16, 20)), (OBSERVATIONS[3], (16, 16)), (OBSERVATIONS[7], (16, 16))]
)
def test_worlds_with_pictures_are_rendered(space, size):
    world = small_world(space)
    env = ImaginedVecEnv(world, 4, start="prior", observation="latent", seed=0)
    env.reset()
    frames = env.get_images()
    assert len(frames) == 4 and all(f.dtype == np.uint8 and f.shape == (*size, 3) for f in frames)
    assert env.render("rgb_array").shape == (2 * size[0], 2 * size[1], 3)
    assert np.array_equal(env.env_method("render", indices=2)[0], frames[2])
    decoded = world.obs.raw(world.decode(world.dynamics.feature(env.worlds.state)))
    if space is IMAGE:
        assert np.array_equal(np.stack(frames), decoded["obs"])


def test_the_vectors_of_a_known_environment_are_drawn(monkeypatch):
    world = small_world(gym.make("CartPole-v1").observation_space)
    env = ImaginedVecEnv(world, 3, start="prior", seed=0)
    monkeypatch.setattr(env.worlds, "viewer", Viewer("CartPole-v1", world.obs))
    env.reset()
    frames = env.get_images()
    assert len(frames) == 3 and frames[0].ndim == 3 and not np.array_equal(frames[0], frames[1])


def test_a_world_that_nobody_can_draw_says_so():
    env = ImaginedVecEnv(small_world(spaces.MultiBinary(3)), 2, start="prior")
    env.reset()
    with pytest.raises(ConfigError, match="no way to draw"):
        env.get_images()


# The three forms --------------------------------------------------------------------------------------------------------


def test_the_three_forms_tell_the_same_story():
    world = small_world()
    options = {"start": "prior", "seed": 3}
    venv, vector = ImaginedVecEnv(world, 1, 4, **options), ImaginedVectorEnv(world, 1, 4, **options)
    env = ImaginedEnv(world, 4, **options)
    observed = venv.reset(), vector.reset()[0], env.reset()[0][None]
    assert np.array_equal(observed[0], observed[1]) and np.array_equal(observed[0], observed[2])
    for t in range(12):
        action = np.array([t % 2])
        obs, reward, done, infos = venv.step(action)
        other, other_reward, terminated, truncated, more = vector.step(action)
        single, single_reward, *flags, _ = env.step(action[0])
        assert reward == other_reward == single_reward and [terminated[0], truncated[0]] == flags
        assert done[0] == any(flags) and np.array_equal(obs, other)
        if done[0]:
            assert np.array_equal(infos[0]["terminal_observation"], more["final_obs"][0])
            assert np.array_equal(single, more["final_obs"][0]) and more["_final_obs"].tolist() == [True]
            assert np.array_equal(env.reset()[0], obs[0])
        else:
            assert np.array_equal(single, obs[0]) and more == {}


def test_gymnasium_makes_it_by_its_id(chain):
    env = gym.make(IMAGINED, run=chain, horizon=3, observation="decoded")
    obs, _ = env.reset(seed=4)
    assert np.array_equal(obs, env.reset(seed=4)[0]) and obs.shape == (5,)
    assert [env.step(0)[3] for _ in range(3)] == [False, False, True]
    several = gym.make_vec(IMAGINED, num_envs=6, run=Run.open(chain), horizon=3, start="prior")
    assert several.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    assert several.reset(seed=4)[0] in several.observation_space
    for _ in range(4):
        obs, _, terminated, truncated, infos = several.step(several.action_space.sample())
        assert obs in several.observation_space and ("final_obs" in infos) == bool((terminated | truncated).any())
    monitored = gym.wrappers.vector.RecordEpisodeStatistics(several)
    monitored.reset()
    lengths = [monitored.step(np.zeros(6, np.int64))[4].get("episode", {}).get("l") for _ in range(3)]
    assert lengths[2] is not None and lengths[2].max() == 3


@pytest.mark.filterwarnings("ignore:The minimal resolution for an image", "ignore:.*A Box observation space m")
@pytest.mark.parametrize("space", [VECTOR, IMAGE], ids=["vector", "image"])
@pytest.mark.parametrize("observation", ["latent", "decoded"])
def test_it_passes_both_env_checkers(space, observation):
    world = small_world(space)
    mode = "rgb_array" if space is IMAGE else None
    for check, options in ((sb3_check, {}), (gymnasium_check, {"skip_render_check": mode is None})):
        env = gym.make(IMAGINED, run=world, start="prior", observation=observation, render_mode=mode)
        check(env.unwrapped, **options)
        assert env.observation_space.contains(env.reset(seed=0)[0])


# Bad input --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"horizon": 0}, "horizon is 0; expected a whole number of at least 1"),
        ({"horizon": 2.5}, "horizon is 2.5"),
        ({"num_envs": True}, "num_envs is True"),
        ({"start": "replya", "horizon": 3}, "Did you mean 'replay'"),
        ({"observation": "pixels"}, "expected one of"),
        ({"start": "replay"}, "a WorldModel alone holds none.*replay=run.replay"),
        ({"source": 3}, "got int"),
        ({"source": "runs/none"}, "is no run folder"),
        ({"start": "replay", "replay": Replay(9, {"obs": ((4,), np.float32)}, 2, 1)}, "the replay is empty"),
    ],
)
def test_bad_options_are_named(options, message):
    given = {"source": small_world(), "num_envs": 2, "start": "prior", **options}
    with pytest.raises(ConfigError, match=message):
        ImaginedWorld(given.pop("source"), given.pop("num_envs"), **given)


def test_a_world_that_broke_is_named():
    world = small_world()
    env = ImaginedVecEnv(world, 2, start="prior")
    env.reset()
    with torch.no_grad():
        world.heads.cont_net[-1].bias.fill_(torch.nan)
    with pytest.raises(NumericsError, match="not finite"):
        env.step(np.zeros(2, np.int64))


def test_experience_of_another_space_is_named():
    world, other = small_world(), small_world(spaces.Box(-1, 1, (3,), np.float32))
    with pytest.raises(ConfigError, match="of another environment"):
        ImaginedVecEnv(world, 2, replay=recorded(other))
