"""Recorded episodes: the same out of a replay, through a file, and back into a replay; nothing invalid gets in."""

from __future__ import annotations

import json
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import CHAIN, IMAGE, VECTOR, Toy, sequence, small_dreamer
from gymnasium import spaces

from worldmodel.envs.make import make_vec
from worldmodel.errors import ConfigError, CorruptError
from worldmodel.spaces import ActionSpec, ObsSpec
from worldmodel.storage.npz import METADATA_NAME
from worldmodel.storage.recording import Recording
from worldmodel.storage.replay import Replay

DICT = spaces.Dict({"camera": IMAGE, "joints": VECTOR, "mode": spaces.Discrete(3), "bits": spaces.MultiBinary(2)})
OBSERVATIONS = {"vector": VECTOR, "image": IMAGE, "category": spaces.Discrete(4, start=2), "dict": DICT}
ACTIONS = {
    "box": spaces.Box(-2, 2, (2,), np.float32),
    "discrete": spaces.Discrete(3),
    "multi-discrete": spaces.MultiDiscrete([2, 3]),
    "multi-binary": spaces.MultiBinary(3),
}


def toy_recording(observation=VECTOR, action=ACTIONS["discrete"], episodes=3, **options):
    """Random episodes of 5 steps: terminated and truncated in turn."""
    env, out = Toy(observation, action), []
    observation.seed(1)
    action.seed(1)
    for i in range(episodes):
        obs, actions, rewards, flags = [env.reset(seed=i)[0]], [], [], []
        while not (flags and any(flags[-1])):
            actions.append(action.sample())
            after, _, terminated, truncated, _ = env.step(actions[-1])
            obs.append(after)
            rewards.append(0.5 * len(rewards) - i)
            flags.append((terminated, truncated))
        stacked = {k: np.stack([o[k] for o in obs]) for k in obs[0]} if isinstance(obs[0], dict) else np.stack(obs)
        terminations, truncations = np.array(flags).T
        out.append(
            {
                "observations": stacked,
                "actions": np.stack(actions),
                "rewards": np.array(rewards),
                "terminations": terminations,
                "truncations": truncations,
            }
        )
    return Recording.from_episodes(observation, action, out, **options)


def assert_same(one, two):
    """The same episodes of the same spaces, number for number."""
    assert one.obs_spec == two.obs_spec and one.action_spec == two.action_spec
    for name in ("action", "reward", "terminated", "truncated", "lengths"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name), err_msg=name)
        assert getattr(one, name).dtype == getattr(two, name).dtype
    assert one.obs.keys() == two.obs.keys()
    for name, x in one.obs.items():
        np.testing.assert_array_equal(x, two.obs[name], err_msg=name)
        assert x.dtype == two.obs[name].dtype


def replay_of(recording, capacity=1000):
    replay = Replay(capacity, recording.obs_spec.store, recording.action_spec.dim, 1)
    recording.append_to(replay)
    return replay


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("observation", OBSERVATIONS)
def test_replay_file_and_replay_again_are_equal(observation, action, tmp_path):
    recording = toy_recording(OBSERVATIONS[observation], ACTIONS[action], env_id="Toy-v0")
    replay = replay_of(recording)
    out = Recording.from_replay(replay, recording.obs_spec, recording.action_spec, env_id="Toy-v0")
    out.write(tmp_path / "toy.npz")
    back = Recording.read(tmp_path / "toy.npz")
    assert back.env_id == "Toy-v0" and back.origin == str(tmp_path / "toy.npz")
    assert_same(recording, back)
    one, two = replay.stream(0), replay_of(back).stream(0)
    for name in ("action", "prev_action", "reward", "is_first", "is_last", "is_terminal"):
        assert torch.equal(getattr(one, name), getattr(two, name)), name
    assert all(torch.equal(x, two.obs[name]) for name, x in one.obs.items())


def test_equal_episodes_make_equal_files(tmp_path):
    for name in "ab":
        toy_recording(origin="the same").write(tmp_path / f"{name}.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_the_order_of_numbers_in_memory_does_not_reach_the_file(tmp_path):
    recording = toy_recording()
    recording = replace(recording, obs={"obs": np.asfortranarray(recording.obs["obs"])})  # as numpy leaves some columns of an array
    assert_same(recording, Recording.read(recording.write(tmp_path / "toy.npz")))


def test_numpy_reads_the_file(tmp_path):
    recording = toy_recording(DICT)
    with np.load(recording.write(tmp_path / "toy.npz"), allow_pickle=False) as file:
        assert np.array_equal(file["observation/camera"], recording.obs["camera"])
        assert np.array_equal(file["lengths"], [5, 5, 5]) and json.loads(file[METADATA_NAME])["format"] == "worldmodel-episodes"


def test_what_chain_did_is_recorded_as_it_happened():
    """Chain's answers are known: reward and end belong to the cell that the action led to."""
    agent = small_dreamer(make_vec(CHAIN, seed=0), **{"train.prefill": 10_000})
    agent.learn(60)
    recording = Recording.from_replay(agent.replay, agent.obs_spec, agent.action_spec)
    assert recording.steps == 60 and len(recording.obs["obs"]) == 60 + recording.episodes
    for number in range(recording.episodes):
        episode = recording.episode(number)
        cell = episode["observations"].argmax(1)
        assert cell[0] == 0
        arrived = np.clip(cell[:-1] + 2 * episode["actions"] - 1, 0, 4)
        np.testing.assert_array_equal(arrived, cell[1:])
        np.testing.assert_allclose(episode["rewards"], np.where(arrived == 4, 1, (arrived - 4) / 10), rtol=1e-6)
        np.testing.assert_array_equal(episode["terminations"], arrived == 4)
        assert (episode["terminations"] | episode["truncations"]).sum() == 1 and not (
            episode["terminations"] & episode["truncations"]
        ).any()


def test_a_replay_whose_oldest_episode_lost_its_beginning_gives_the_whole_ones():
    recording = toy_recording(episodes=4)  # 24 rows
    held = Recording.from_replay(replay_of(recording, capacity=20), recording.obs_spec, recording.action_spec)
    assert held.episodes == 3
    np.testing.assert_array_equal(held.obs["obs"], recording.obs["obs"][6:])


def test_an_open_episode_is_cut_where_it_stands_and_a_lone_reset_is_none():
    replay = Replay(100, ObsSpec.from_space(VECTOR).store, 2, 1)
    first = np.array([1, 0, 0, 1], bool)
    no = np.zeros(4, bool)
    last = np.array([0, 0, 1, 0], bool)
    replay.extend({"obs": np.zeros((4, 4), np.float32)}, np.eye(2, dtype=np.float32)[[0, 1, 0, 0]], np.ones(4), first, last, no)
    out = Recording.from_replay(replay, ObsSpec.from_space(VECTOR), ActionSpec.from_space(spaces.Discrete(2)))
    assert out.lengths.tolist() == [2] and out.action.tolist() == [1, 0] and out.truncated.tolist() == [False, True]
    replay.add({"obs": np.zeros((1, 4), np.float32)}, np.eye(2, dtype=np.float32)[[1]], [1.0], no[:1], no[:1], no[:1])
    out = Recording.from_replay(replay, ObsSpec.from_space(VECTOR), ActionSpec.from_space(spaces.Discrete(2)))
    assert out.lengths.tolist() == [2, 1] and out.truncated.tolist() == [False, True, True] and not out.terminated.any()


def test_many_rows_at_once_are_many_rows_one_by_one():
    recording = toy_recording(episodes=5)
    at_once, one_by_one = replay_of(recording, 17), Replay(17, recording.obs_spec.store, 3, 1)
    rows = sequence(replay_of(recording).stream(0))
    for i in range(len(rows.reward)):
        obs = {"obs": rows.obs["obs"][[i]].numpy()}
        flags = (rows.is_first[[i]], rows.is_last[[i]], rows.is_terminal[[i]])
        one_by_one.add(obs, rows.prev_action[[i]], rows.reward[[i]], *flags)
    assert at_once.ends == one_by_one.ends and at_once.added == one_by_one.added == 30
    one, two = (r.sample(40, 4, np.random.default_rng(0), terminal_fraction=0.5) for r in (at_once, one_by_one))
    assert torch.equal(one.obs["obs"], two.obs["obs"]) and torch.equal(one.action, two.action)


def test_recordings_of_other_spaces_are_not_joined():
    one, two = toy_recording(origin="one"), toy_recording(spaces.Box(-1, 1, (3,)), origin="two")
    both = Recording.joined([one, one])
    assert both.episodes == 6 and both.steps == 30 and np.array_equal(both.obs["obs"][18:], one.obs["obs"])
    with pytest.raises(ConfigError, match=r"two has the observations Box\(-1.0, 1.0, \(3,\).*but one has Box.*\(4,\)"):
        Recording.joined([one, two])
    with pytest.raises(ConfigError, match="two has the actions"):
        Recording.joined([one, toy_recording(action=ACTIONS["box"], origin="two")])


def test_recordings_of_different_environments_are_not_joined_and_an_unnamed_one_takes_the_others_name(tmp_path):
    one, two, unnamed = (toy_recording(env_id=name) for name in ("One-v0", "Two-v0", None))
    with pytest.raises(ConfigError, match=r"different environments: One-v0, Two-v0"):
        Recording.joined([one, unnamed, two])
    assert Recording.joined([unnamed, one]).env_id == "One-v0"


def spoiled(**changes):
    """The entries of one episode of VECTOR and Discrete(3), some of them changed."""
    episode = toy_recording(episodes=1).episode(0)
    return {name: changes.get(name, np.array(x)) for name, x in episode.items()}


def with_nan(array):
    array = np.array(array)
    array.flat[-1] = np.nan
    return array


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda e: {"observations": with_nan(e["observations"])}, "episode 0, step 5: observation 'obs' is not a finite"),
        (lambda e: {"rewards": with_nan(e["rewards"])}, "episode 0, step 4 has the reward nan"),
        (lambda e: {"rewards": np.full(5, 1e300)}, "step 0 has the reward inf"),
        (lambda e: {"actions": e["actions"] + 3}, "the action holds"),
        (lambda e: {"actions": e["actions"] + 0.5}, "dtype float64, which int64 does not hold"),
        (lambda e: {"observations": e["observations"][:-1]}, r"shape \[5, 4\]; expected \[6, 4\]"),
        (lambda e: {"terminations": np.ones(5, bool)}, "step 0 ends the episode, but more steps follow"),
        (lambda e: {"terminations": np.ones(4, bool)}, "terminations have shape"),
        (lambda e: {"rewards": np.ones(0)}, "one number for each of 1 or more steps"),
        (lambda e: {"observations": {"obs": 1, "more": 2}}, "no array of numbers"),
        (lambda e: {"observations": [["a"] * 4] * 6}, "no array of numbers"),
    ],
)
def test_invalid_values_are_refused_with_their_place(change, said):
    with pytest.raises(ConfigError, match=said) as error:
        Recording.from_episodes(VECTOR, spaces.Discrete(3), [spoiled(**change(spoiled()))], origin="my logs")
    assert str(error.value).startswith("my logs")


def test_actions_outside_of_their_box_are_learned_from_as_if_on_its_bounds():
    recording = Recording.from_episodes(VECTOR, ACTIONS["box"], [spoiled(actions=np.full((5, 2), [-7.0, 1.0]))])
    np.testing.assert_array_equal(sequence(replay_of(recording).stream(0)).prev_action[1:], [[-1, 0.5]] * 5)
    np.testing.assert_array_equal(recording.action[0], [-7, 1])


def test_pictures_with_their_channels_at_the_other_end_are_turned_and_ragged_ones_named():
    space, pictures = spaces.Box(0, 255, (8, 6, 3), np.uint8), np.random.default_rng(0).integers(0, 256, (4, 3, 8, 6), np.uint8)
    episode = {"observations": pictures, "actions": [0, 1, 0], "rewards": [0.0, 1.0, 0.0]}
    episode |= {"terminations": [False, False, True], "truncations": [False] * 3}
    taken = Recording.from_episodes(space, spaces.Discrete(2), [episode])
    assert np.array_equal(taken.obs["obs"], np.moveaxis(pictures, 1, -1))
    for name, ragged in (("observations", [[0, 1], [0]]), ("rewards", [[0.0], [0.0, 1.0]])):
        with pytest.raises(ConfigError, match=name.rstrip("s")):
            Recording.from_episodes(space, spaces.Discrete(2), [{**episode, name: ragged}])


def test_an_episode_without_a_last_flag_counts_as_truncated():
    no = np.zeros(5, bool)
    out = Recording.from_episodes(VECTOR, spaces.Discrete(3), [spoiled(terminations=no, truncations=no)])
    assert out.truncated.tolist() == [False] * 4 + [True] and not out.terminated.any()
    with pytest.raises(ConfigError, match="no episode"):
        Recording.from_episodes(VECTOR, spaces.Discrete(3), [])
    with pytest.raises(ConfigError, match=r"has no \['rewards'\]"):
        Recording.from_episodes(VECTOR, spaces.Discrete(3), [{k: v for k, v in spoiled().items() if k != "rewards"}])


# Files ------------------------------------------------------------------------------------------------------------------


def test_names_that_are_taken_or_odd_are_refused(tmp_path):
    recording = toy_recording()
    path = recording.write(tmp_path / "new" / "a.npz")
    with pytest.raises(ConfigError, match="not overwritten"):
        recording.write(path)
    with pytest.raises(ConfigError, match=r"\.npz"):
        recording.write(tmp_path / "a.zip")
    with pytest.raises(ConfigError, match="no file"):
        Recording.read(tmp_path / "b.npz")
    assert [file.name for file in path.parent.iterdir()] == ["a.npz"]


def test_another_format_is_not_called_damaged(tmp_path):
    np.savez(tmp_path / "foreign.npz", observations=np.zeros(3))
    with pytest.raises(ConfigError, match=r"no recording of this library.*from_episodes"):
        Recording.read(tmp_path / "foreign.npz")
    (tmp_path / "text.npz").write_text("no zip at all")
    with pytest.raises(CorruptError, match="no intact NPZ"):
        Recording.read(tmp_path / "text.npz")
    with zipfile.ZipFile(tmp_path / "later.npz", "w") as archive:
        archive.writestr(METADATA_NAME, json.dumps({"format": "worldmodel-episodes", "version": 2}))
    with pytest.raises(ConfigError, match="version 2; this version reads"):
        Recording.read(tmp_path / "later.npz")


def test_every_flipped_byte_is_noticed_or_harmless(tmp_path):
    recording = toy_recording()
    whole = recording.write(tmp_path / "whole.npz").read_bytes()
    path, noticed = tmp_path / "flipped.npz", 0
    for at in range(0, len(whole), 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        try:
            assert_same(Recording.read(path), recording)  # a date, or a flag that is never read
        except (ConfigError, CorruptError):
            noticed += 1
    assert noticed > 0.5 * len(whole) / 7
    for cut in range(0, len(whole), 97):
        path.write_bytes(whole[:cut])
        with pytest.raises(CorruptError):
            Recording.read(path)


def rewritten(path, target, **members):
    """A copy of the file with some members replaced (None: left out)."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            data = members.get(name.removesuffix(".npy"), old.read(name))
            if data is not None:
                new.writestr(name, data)
        for name in members.keys() - {n.removesuffix(".npy") for n in old.namelist()}:
            new.writestr(f"{name}.npy", members[name])
    return target


def npy_bytes(array):
    import io

    out = io.BytesIO()
    np.lib.format.write_array(out, array)
    return out.getvalue()


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({"reward": npy_bytes(np.array([{}] * 15, object))}, "expected numbers"),
        ({"reward": npy_bytes(np.zeros(14, np.float32))}, r"expected float32 \[15\]"),
        ({"reward": npy_bytes(np.zeros(15, np.float64))}, r"expected float32 \[15\]"),
        ({"reward": npy_bytes(np.zeros(15, np.float32))[:-4]}, r"expected float32 \[15\]"),
        ({"reward": b"nothing of numpy's"}, "no header"),
        ({"reward": None}, "reward.npy"),
        ({"extra": npy_bytes(np.zeros(1))}, "extra.npy"),
        ({"lengths": npy_bytes(np.array([5, 5, -5]))}, "no number of steps"),
        ({"lengths": npy_bytes(np.array([2**62, 5, 5]))}, "no number of steps"),
        ({"lengths": npy_bytes(np.array([2**39, 5, 5]))}, "expected"),
        ({"lengths": npy_bytes(np.array([[5], [5], [5]]))}, "one number for each episode"),
        ({METADATA_NAME: b"{]"}, "damaged"),
        ({METADATA_NAME: json.dumps({"format": "worldmodel-episodes", "version": 1, "observation": {}}).encode()}, "damaged"),
    ],
)
def test_a_file_that_lies_about_itself_is_refused(members, said, tmp_path):
    path = toy_recording().write(tmp_path / "whole.npz")
    with pytest.raises(CorruptError, match=said):
        Recording.read(rewritten(path, tmp_path / "changed.npz", **members))


def test_nan_in_a_file_is_refused_with_its_place(tmp_path):
    recording = toy_recording()
    path = recording.write(tmp_path / "whole.npz")
    obs = recording.obs["obs"].copy()
    obs[8, 1] = np.nan
    with pytest.raises(ConfigError, match="episode 1, step 2: observation 'obs' is not a finite"):
        Recording.read(rewritten(path, tmp_path / "nan.npz", **{"observation/obs": npy_bytes(obs)}))
