"""The sequence store: alignment, sampling and eviction."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from worldmodel.data import Batch
from worldmodel.storage.replay import Replay

EPISODE = 5


def store(capacity: int = 60, num_envs: int = 1, image: bool = False, action_dim: int = 2) -> Replay:
    obs = {"at": ((2,), np.float32)}
    if image:
        obs["picture"] = ((32, 32, 1), np.uint8)
    return Replay(capacity, obs, action_dim, num_envs)


def fill(replay: Replay, rows: int, streams: list[int] | None = None) -> Replay:
    """Rows that know themselves: stream s, sequence q; episodes of 5 rows, ending by turns truly and by truncation."""
    for _ in range(rows):
        where = list(range(replay.num_envs)) if streams is None else streams
        q = np.array([replay.added_by_stream[s] for s in where])
        obs = {"at": np.stack([np.array(where, np.float32), q.astype(np.float32)], 1)}
        if "picture" in replay.obs_spec:
            obs["picture"] = np.broadcast_to((q % 251).astype(np.uint8)[:, None, None, None], (len(where), 32, 32, 1))
        first, last = q % EPISODE == 0, q % EPISODE == EPISODE - 1
        action = np.repeat((1 + q + 1000 * np.array(where))[:, None], replay.action_dim, 1)
        replay.add(obs, action, 10.0 + q, first, last, last & (q // EPISODE % 2 == 0), None if streams is None else where)
    return replay


def sequences(batch: Batch) -> np.ndarray:
    return batch.obs["at"][..., 1].numpy().astype(int)


def check_rows(replay: Replay, batch: Batch) -> None:
    """Every entry of the batch is what the row's stream and sequence number say."""
    stream, q = (batch.obs["at"][..., i].numpy().astype(int) for i in (0, 1))
    assert (stream == stream[:, :1]).all()
    assert (np.diff(q, axis=1) == 1).all()
    first, last = q % EPISODE == 0, q % EPISODE == EPISODE - 1
    np.testing.assert_array_equal(batch.is_first, first)
    np.testing.assert_array_equal(batch.is_last, last)
    np.testing.assert_array_equal(batch.is_terminal, last & (q // EPISODE % 2 == 0))
    np.testing.assert_array_equal(batch.reward, np.where(first, 0, 10 + q))
    np.testing.assert_array_equal(batch.prev_action[..., -1], np.where(first, 0, 1 + q + 1000 * stream))
    known = ~last & (q + 1 < np.array(replay.added_by_stream)[stream])
    np.testing.assert_array_equal(batch.action[..., 0], np.where(known, 2 + q + 1000 * stream, 0))
    if "picture" in batch.obs:
        assert batch.obs["picture"].shape == (*q.shape, 32, 32, 1)
        assert (batch.obs["picture"].numpy() == (q % 251)[..., None, None, None]).all()


def test_two_short_episodes_come_back_as_they_were_lived():
    replay = Replay(10, {"x": ((), np.int64)}, 1, 1)
    #        x  prev  rew    first  last   terminal
    rows = [
        (0, 0.0, 0.0, True, False, False),
        (1, 0.1, 1.0, False, False, False),
        (2, 0.2, 2.0, False, True, True),  # the world ended on arriving at 2
        (5, 9.0, 9.0, True, False, False),  # what a careless caller passes at a reset is not stored
        (6, 0.3, 3.0, False, True, False),  # cut by a time limit
        (7, 0.0, 0.0, True, False, False),
        (8, 0.4, 4.0, False, False, False),
    ]
    for x, prev, reward, first, last, terminal in rows:
        replay.add({"x": np.array([x])}, [[prev]], [reward], [first], [last], [terminal])
    batch = replay.sample(1, 7, np.random.default_rng(0))
    assert batch.obs["x"].tolist() == [[0, 1, 2, 5, 6, 7, 8]]
    assert batch.obs["x"].dtype == torch.int64
    np.testing.assert_allclose(batch.prev_action[0, :, 0], [0, 0.1, 0.2, 0, 0.3, 0, 0.4], rtol=1e-6)
    np.testing.assert_allclose(batch.action[0, :, 0], [0.1, 0.2, 0, 0.3, 0, 0.4, 0], rtol=1e-6)
    assert batch.reward.tolist() == [[0, 1, 2, 0, 3, 0, 4]]
    assert batch.is_first.tolist() == [[True, False, False, True, False, True, False]]
    assert batch.is_last.tolist() == [[False, False, True, False, True, False, False]]
    assert batch.is_terminal.tolist() == [[False, False, True, False, False, False, False]]


def test_the_action_of_a_windows_last_row_is_the_one_taken_there():
    replay = fill(store(), 9)
    rng = np.random.default_rng(0)
    batch = next(b for b in (replay.sample(1, 2, rng) for _ in range(99)) if sequences(b).tolist() == [[6, 7]])
    assert batch.action[0, :, 0].tolist() == [8, 9]


def test_an_action_on_a_last_row_never_happened_whatever_the_next_row_says():
    replay = Replay(10, {"x": ((), np.float32)}, 1, 1)
    for last in (False, True, False):
        replay.add({"x": np.zeros(1, np.float32)}, [[7]], [0], [False], [last], [False])
    assert replay.sample(1, 3, np.random.default_rng(0)).action[0, :, 0].tolist() == [7, 0, 0]


@pytest.mark.parametrize("image", [False, True])
@pytest.mark.parametrize("rows", [7, 20, 21, 33, 64])
def test_every_window_of_a_turning_ring_holds_consecutive_rows(rows, image):
    replay = fill(store(capacity=60, num_envs=3, image=image), rows)
    rng = np.random.default_rng(0)
    for length in (1, 2, 7):
        batch = replay.sample(64, length, rng, recent_fraction=0.1, terminal_fraction=0.2)
        check_rows(replay, batch)
        assert (np.diff(sequences(batch), axis=1) == 1).all()


def test_eviction_leaves_exactly_the_newest_rows_in_reach():
    replay = fill(store(capacity=20), 33)
    assert (len(replay), replay.added, replay.lengths) == (20, 33, (20,))
    starts = {int(q) for q in sequences(replay.sample(2000, 6, np.random.default_rng(0)))[:, 0]}
    assert starts == set(range(13, 28))  # rows 13..32 are held, and the last window starts at 27


def test_ends_are_forgotten_with_their_rows():
    replay = fill(store(capacity=12), 3000)
    assert replay.ends == 3  # 2989, 2994 and 2999 of 2988..2999
    fill(replay, 3)
    assert replay.ends == 2
    fill(replay, 3)
    assert replay.ends == 3  # 2994 is the oldest row that is held
    for _ in range(20):
        check_rows(replay, replay.sample(8, 3, np.random.default_rng(1), terminal_fraction=1.0))


@pytest.mark.parametrize("length", [1, 3, 12, 20])
def test_windows_drawn_for_ends_hold_an_end(length):
    replay = fill(store(capacity=40, num_envs=2), 33)
    batch = replay.sample(500, length, np.random.default_rng(0), terminal_fraction=1.0)
    assert batch.is_last.any(1).all()
    if length == 3:  # the end takes every place in the window
        assert {tuple(r) for r in batch.is_last.tolist()} == {(True, False, False), (False, True, False), (False, False, True)}
        assert len({tuple(q) for q in batch.obs["at"][batch.is_last].tolist()}) == replay.ends


def test_without_any_end_the_share_falls_back_to_all_windows():
    replay = fill(store(), 4)
    assert len(set(sequences(replay.sample(100, 2, np.random.default_rng(0), terminal_fraction=1.0))[:, 0])) == 3


def test_newest_windows_end_at_each_streams_newest_row_in_turn():
    replay = fill(fill(store(capacity=40, num_envs=4), 8), 5, [1, 3])
    batch = replay.sample(8, 6, np.random.default_rng(0), recent_fraction=1.0)
    assert sequences(batch)[:, -1].tolist() in ([7, 12] * 4, [12, 7] * 4)
    assert sorted(batch.obs["at"][:, 0, 0].tolist()) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert (batch.action[:, -1] == 0).all()


def test_shares_hold_on_average_and_leave_room_for_the_rest():
    replay = fill(store(capacity=400), 400)
    rng = np.random.default_rng(0)
    newest = np.mean([(sequences(replay.sample(4, 3, rng, recent_fraction=0.1))[:, -1] == 399).mean() for _ in range(2000)])
    assert newest == pytest.approx(0.1 + 0.9 / 398, abs=0.015)
    assert len(set(sequences(replay.sample(16, 3, rng, recent_fraction=0.25, terminal_fraction=0.25))[:, 0])) > 8


def every_window(replay: Replay, length: int) -> list[tuple[int, int]]:
    """(stream, first sequence number) of all windows."""
    spans = zip(replay.added_by_stream, replay.lengths)
    return [(s, q) for s, (upto, held) in enumerate(spans) for q in range(upto - held, upto - length + 1)]


def chances(replay: Replay, length: int, newest: float, ends: float) -> dict[tuple[int, int], float]:
    """How likely `sample` draws each window, counted out: the windows around each end in turn, and each stream's last one."""
    windows, last = every_window(replay, length), {}
    for stream, start in windows:
        last[stream] = start
    found = [(s, e) for s in last for e in range(replay.added_by_stream[s]) if e % EPISODE == EPISODE - 1]
    found = [(s, e) for s, e in found if e >= replay.added_by_stream[s] - replay.lengths[s]]
    chance = dict.fromkeys(windows, (1 - newest - ends) / len(windows))
    for s, e in found:
        around = [(t, q) for t, q in windows if t == s and q <= e < q + length]
        for window in around:
            chance[window] += ends / len(found) / len(around)
    for window in last.items():
        chance[window] += newest / len(last)
    return chance


def weighed(batch: Batch) -> dict[tuple[int, int], float]:
    """{(stream, first sequence number): weight} of the windows in a batch, each of which has one weight."""
    assert (batch.weight == batch.weight[:, :1]).all()
    found = {}
    for (stream, start), weight in zip(batch.obs["at"][:, 0].int().tolist(), batch.weight[:, 0].tolist()):
        assert found.setdefault((stream, start), weight) == weight
    return found


SHARES = [(0.0, 0.25), (0.2, 0.0), (0.1, 0.6), (0.0, 0.0)]


@pytest.mark.parametrize("newest,ends", SHARES)
@pytest.mark.parametrize("length", [1, 4, 9])
def test_weighed_by_its_weight_the_mixture_of_windows_is_the_uniform_law_of_all(length, newest, ends):
    replay = fill(fill(store(capacity=42, num_envs=3), 4), 18, [0, 2])  # 14, 4 and 14 rows held, the oldest overwritten
    batch = replay.sample(3000, length, np.random.default_rng(0), recent_fraction=newest, terminal_fraction=ends)
    weight, chance = weighed(batch), chances(replay, length, newest, ends)
    assert weight.keys() == chance.keys() and max(weight.values()) <= 1 / (1 - newest - ends) + 1e-6
    for window, p in chance.items():  # so for whatever is said of a window
        assert weight[window] * p * len(chance) == pytest.approx(1, rel=1e-5)


def test_what_is_weighed_has_the_mean_of_all_windows_also_where_shares_are_no_whole_numbers():
    replay, rng = fill(store(capacity=100), 97), np.random.default_rng(0)
    truth = np.mean([any(e % EPISODE == EPISODE - 1 for e in range(q, q + 3)) for _, q in every_window(replay, 3)])
    draws = [replay.sample(2, 3, rng, recent_fraction=0.3, terminal_fraction=0.45) for _ in range(8000)]
    ended, weight = (torch.cat(parts) for parts in zip(*((b.is_last.any(1), b.weight[:, 0]) for b in draws)))
    assert float((weight * ended).mean()) == pytest.approx(truth, abs=0.02)
    assert float(weight.mean()) == pytest.approx(1, abs=0.03) and float(ended.float().mean()) > truth + 0.05


def test_without_a_uniform_share_weights_are_those_among_what_is_drawn():
    replay = fill(fill(store(capacity=60, num_envs=2), 8), 5, [1])
    newest = replay.sample(4, 3, np.random.default_rng(0), recent_fraction=1.0)
    assert newest.weight.tolist() == [[1.0] * 3] * 4
    batch = replay.sample(200, 3, np.random.default_rng(0), terminal_fraction=1.0)
    weight, chance = weighed(batch), chances(replay, 3, 0.0, 1.0)
    products = [weight[window] * chance[window] for window in weight]
    assert max(products) == pytest.approx(min(products)) and float(batch.weight.mean()) == pytest.approx(1)


def test_without_any_end_nothing_is_weighed_for_ends():
    assert (fill(store(), 4).sample(16, 2, np.random.default_rng(0), terminal_fraction=0.5).weight == 1).all()


def test_windows_are_drawn_uniformly_over_all_streams():
    replay = fill(fill(store(capacity=60, num_envs=3), 8), 22, [0, 2])  # 20, 8 and 20 rows held
    batch = replay.sample(39_000, 6, np.random.default_rng(0))
    stream, start = batch.obs["at"][:, 0].numpy().astype(int).T
    counts = np.unique(stream * 100 + start, return_counts=True)[1]
    assert len(counts) == 15 + 3 + 15
    expected = 39_000 / 33
    assert ((counts - expected) ** 2 / expected).sum() < 62.5  # chi-square, 32 degrees of freedom, p = 0.001


def test_the_same_generator_gives_the_same_batch_and_another_one_another():
    replay = fill(store(capacity=200, num_envs=2), 100)
    a, b, c = (replay.sample(8, 4, np.random.default_rng(s), recent_fraction=0.1, terminal_fraction=0.3) for s in (1, 1, 2))
    assert torch.equal(a.obs["at"], b.obs["at"])
    assert torch.equal(a.action, b.action)
    assert not torch.equal(a.obs["at"], c.obs["at"])


def test_a_batch_shares_no_memory_with_the_store():
    replay = fill(store(capacity=20, image=True), 20)
    batch = replay.sample(1, 20, np.random.default_rng(0))
    before = batch.map(torch.clone)
    batch.map(lambda x: x.zero_())
    again = replay.sample(1, 20, np.random.default_rng(0))
    check_rows(replay, again)
    assert torch.equal(again.action, before.action)
    again.prev_action.zero_()
    assert torch.equal(again.action, before.action)
    assert replay.sample(2, 9, np.random.default_rng(0)).prev_action.is_contiguous()


def test_streams_may_grow_unevenly():
    replay = fill(store(capacity=90, num_envs=3), 6)
    fill(replay, 9, [2, 0])
    assert replay.lengths == (15, 6, 15)
    batch = replay.sample(200, 10, np.random.default_rng(0), recent_fraction=0.3, terminal_fraction=0.3)
    check_rows(replay, batch)
    assert set(batch.obs["at"][:, 0, 0].tolist()) == {0.0, 2.0}


def test_a_batch_needs_one_window_and_says_what_is_missing():
    replay = fill(store(capacity=60, num_envs=2), 6)
    assert replay.sample(50, 6, np.random.default_rng(0)).shape == (50, 6)
    with pytest.raises(ValueError, match=r"holds 12 steps, 6 in its longest stream.*needs 7.*train\.batch_length \(now 7\)"):
        replay.sample(1, 7, np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"keeps 30 steps.*Raise the replay's capacity \(now 60\)"):
        replay.sample(1, 31, np.random.default_rng(0))
    with pytest.raises(ValueError, match="holds 0 steps"):
        store().sample(1, 1, np.random.default_rng(0))


GOOD = dict(obs={"at": np.zeros((1, 2), np.float32)}, prev_action=[[0, 0]], reward=[0], is_first=[1], is_last=[0], is_terminal=[0])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"obs": {"at": np.zeros((1, 3), np.float32)}}, r"'at' of shape \[1, 3\], expected \[1, 2\]"),
        ({"obs": {"at": np.zeros((1, 2), complex)}}, "dtype complex128, expected float32"),
        ({"obs": {"to": np.zeros((1, 2), np.float32)}}, r"keys \['to'\], expected \['at'\]"),
        ({"obs": {"at": np.zeros((1, 2), np.float32), "to": np.zeros(1)}}, r"keys \['at', 'to'\]"),
        ({"prev_action": [[0]]}, r"prev_action of shape \[1, 1\], expected \[1, 2\]"),
        ({"reward": [np.nan]}, "not finite"),
        ({"prev_action": [[0, np.inf]]}, "not finite"),
        ({"reward": 0.0}, r"reward of shape \[\]"),
        ({"is_terminal": [1]}, "is_terminal but not is_last"),
        ({"streams": [1]}, r"streams 0\.\.0"),
        ({"streams": [0, 0]}, "one row per stream"),
    ],
)
def test_a_row_that_does_not_fit_is_refused_whole(bad, message):
    replay = store()
    with pytest.raises(ValueError, match=message):
        replay.add(**{**GOOD, **bad})
    assert (replay.added, replay.ends) == (0, 0)
    replay.add(**GOOD)


def test_a_replay_that_could_hold_nothing_is_refused():
    with pytest.raises(ValueError, match="each of 4 environments"):
        Replay(3, {"x": ((), np.float32)}, 1, 4)
    with pytest.raises(ValueError, match="'x' of dtype object"):
        Replay(3, {"x": ((), object)}, 1, 1)
