"""The loop that agents share: what really happened reaches the replay, and learning follows the ratio."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TWO_ACTIONS, VECTOR, Toy, all_weights, sequence, small_dreamer, stored
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv

from worldmodel.envs.tiny import Chain
from worldmodel.errors import EnvError

# What it stores --------------------------------------------------------------------------------------------------------


def assert_chain(rows: SimpleNamespace, limit: int) -> None:
    """From the first episode's start on, every row follows from the one before by Chain's table."""
    cells, taken = rows.obs["obs"].argmax(-1).tolist(), rows.prev_action.argmax(-1).tolist()
    assert torch.equal(rows.obs["obs"].sum(-1), torch.ones(len(cells)))
    begin = steps = int(rows.is_first.int().argmax())
    for t, cell in list(enumerate(cells))[begin:]:
        if rows.is_first[t]:
            steps = 0
            assert cell == 0 and rows.prev_action[t].abs().sum() == 0 and (t == begin or rows.is_last[t - 1])
            continue
        steps += 1
        came_from = cells[t - 1]
        assert not rows.is_last[t - 1], "an episode's last row is followed by a first one"
        assert cell == (came_from + 1 if taken[t] == 1 else max(came_from - 1, 0))
        assert float(rows.reward[t]) == pytest.approx(1.0 if cell == 4 else (cell - 4) / 10)
        assert bool(rows.is_terminal[t]) == (cell == 4)
        assert bool(rows.is_last[t]) == (cell == 4 or steps == limit)
        assert torch.equal(rows.action[t - 1], rows.prev_action[t])


def is_chain(rows: SimpleNamespace, limit: int) -> bool:
    try:
        assert_chain(rows, limit)
    except AssertionError:
        return False
    return True


def test_the_replay_holds_the_chain_as_its_table_says():
    agent = small_dreamer(Chain(limit=5)).learn(100)
    rows = stored(agent)
    assert_chain(rows, limit=5)
    terminal, truncated = rows.is_terminal.sum(), (rows.is_last & ~rows.is_terminal).sum()
    assert terminal > 1 and truncated > 1  # both occurred
    assert len(agent.replay) == 100 + int(rows.is_first.sum())


def test_several_environments_fill_a_stream_each():
    agent = small_dreamer(DummyVecEnv([lambda: Chain(limit=5), lambda: Chain(limit=6), lambda: Chain(limit=7)])).learn(120)
    assert agent.num_timesteps == 120 and agent.replay.num_envs == 3
    assert agent.replay.added == 120 + 3 + agent._episode_num  # a row for each step and for each episode's start
    made = agent.learner.updates - 2
    assert 0.2 * (120 - 21) - 1 <= made <= 0.2 * (120 - 12)
    windows = agent.replay.sample(60, min(agent.replay.lengths), np.random.default_rng(0))
    limits = {limit for row in range(60) for limit in (5, 6, 7) if is_chain(sequence(windows, row), limit)}
    assert limits == {5, 6, 7}


def test_a_new_environment_begins_a_new_episode():
    agent = small_dreamer(Chain(limit=5)).learn(33)
    agent.set_env(DummyVecEnv([lambda: Chain(limit=5)]))
    agent.learn(34, reset_num_timesteps=False)
    rows = stored(agent)
    assert agent.num_timesteps == 67 and len(rows.reward) == 67 + int(rows.is_first.sum())
    steps = (~rows.is_first).int().cumsum(0)
    after = int((steps == 33).int().argmax()) + 1  # the row behind the 33rd step
    assert rows.is_last[after - 1] and not rows.is_terminal[after - 1]  # the open episode is cut off
    assert rows.is_first[after] and int(rows.obs["obs"][after].argmax()) == 0
    for t in range(1, len(rows.reward)):
        if not rows.is_first[t]:
            assert not rows.is_last[t - 1]
            assert abs(int(rows.obs["obs"][t].argmax()) - int(rows.obs["obs"][t - 1].argmax())) <= 1


def test_learning_on_continues_the_episode_and_starting_over_begins_one():
    agent = small_dreamer(Chain(limit=50)).learn(21)
    rows = len(agent.replay)
    agent.learn(2, reset_num_timesteps=False)
    assert agent.num_timesteps == 23
    assert_chain(stored(agent), limit=50)
    firsts = int(stored(agent).is_first.sum())
    agent.learn(3, reset_num_timesteps=True)
    assert agent.num_timesteps == 3 and len(agent.replay) >= rows + 2 + 4
    assert int(stored(agent).is_first.sum()) > firsts


@pytest.mark.parametrize("checked", [True, False], ids=["env", "vec env"])
@pytest.mark.parametrize("what", ["observation", "reward"])
def test_what_is_not_a_number_stops_the_run_and_nothing_of_it_is_stored(what, checked):
    def spoil(obs, reward):
        if len(env.actions) < 28:
            return obs, reward
        return (obs * np.nan, reward) if what == "observation" else (obs, float("nan"))

    env = Toy(VECTOR, TWO_ACTIONS, spoil)
    agent = small_dreamer(env if checked else DummyVecEnv([lambda: env]))
    with pytest.raises(EnvError, match=r"environment 0, episode \d+"):
        agent.learn(60)
    rows = stored(agent)
    assert int((~rows.is_first).sum()) == 27 == agent.num_timesteps
    assert rows.obs["obs"].isfinite().all() and rows.reward.isfinite().all()
    assert all(x.isfinite().all() for x in agent.world.state_dict().values())


# When it learns --------------------------------------------------------------------------------------------------------


NUMBERS = spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, 10.0], np.float32))


class Counter(BaseCallback):
    """Updates of the world model after each step."""

    def _on_training_start(self) -> None:
        self.seen: list[int] = []

    def _on_step(self) -> bool:
        self.seen.append(self.model.learner.updates)
        return True


def test_updates_follow_the_prefill_and_then_the_ratio():
    counter = Counter()
    agent = small_dreamer(Chain(limit=50), **{"train.prefill": 10, "train.pretrain": 3, "train.ratio": 0.5})
    agent.learn(30, counter)
    start = next(i for i, n in enumerate(counter.seen) if n)
    assert set(counter.seen[:start]) == {0} and 7 <= start + 1 <= 10  # rows, not steps: the first observation counts
    assert counter.seen[start:] == [3 + (i + 1) // 2 for i in range(30 - start)]
    assert agent._n_updates == agent.learner.updates


def test_behaviour_does_not_move_while_the_world_model_is_trained_before_it():
    agent = small_dreamer(**{"train.ratio": 0.0})
    before = [p.clone() for p in agent.controller.parameters()]
    agent.learn(30)
    assert agent.learner.updates == 2 and all(torch.equal(p, old) for p, old in zip(agent.controller.parameters(), before))


def test_vectors_are_scaled_by_all_that_was_collected():
    agent = small_dreamer(Toy(spaces.Box(-50, 90, (2,), np.float32))).learn(30)
    seen = stored(agent).obs["obs"].numpy().astype(np.float64)
    mean, std = agent.world.scaling.statistics(0, torch.zeros((), dtype=torch.float64))
    assert int(agent.world.scaling.count) == len(agent.replay) == len(seen)
    np.testing.assert_allclose(mean, seen.mean(0))
    np.testing.assert_allclose(std, seen.std(0))


def test_the_belief_forgets_the_past_where_an_episode_begins():
    agent, starts = small_dreamer(Chain(limit=5)), []
    filter_and_act = agent.policy.filter_and_act
    agent.policy.filter_and_act = lambda *args, **options: starts.append(bool(args[2][0])) or filter_and_act(*args, **options)
    agent.learn(60)
    rows = stored(agent)
    acted_at = rows.is_first[:-1][~rows.is_first[1:]].tolist()  # the rows at which an action was taken
    assert starts == acted_at[-len(starts) :] and sum(starts) > 3


def test_an_update_reports_under_the_promised_tags():
    agent = small_dreamer().learn(30)
    tags = agent.update()
    names = ("observation", "reward", "continue", "dyn", "rep")
    assert {f"world/loss/{name}" for name in names} | {"world/rate", "world/active_units", "dream/return"} <= set(tags)
    assert all(np.isfinite(list(tags.values())))


def test_tensorboard_gets_sb3s_tags_and_ours(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    agent = small_dreamer(Chain(limit=5), tensorboard_log=str(tmp_path))
    agent.learn(60, log_interval=2)
    events = EventAccumulator(str(next(tmp_path.glob("Dreamer_1/events*")).parent)).Reload()
    assert {"rollout/ep_rew_mean", "time/fps", "world/loss/observation", "dream/return"} <= set(events.Tags()["scalars"])


@pytest.mark.parametrize("seed", [0, 3])
def test_the_same_seed_gives_the_same_bits_and_another_one_others(seed):
    agents = []
    for s in (seed, seed, seed + 1):
        torch.rand(1)  # the seed counts, whatever torch's own random state is
        agents.append(small_dreamer(Toy(VECTOR, NUMBERS), seed=s))
    assert torch.equal(all_weights(agents[0]), all_weights(agents[1]))
    assert not torch.equal(all_weights(agents[0]), all_weights(agents[2]))
    assert len({agent.policy.generator.initial_seed() for agent in agents}) == 2
    one, same, other = (agent.learn(40) for agent in agents)
    assert torch.equal(all_weights(one), all_weights(same)) and not torch.equal(all_weights(one), all_weights(other))
    assert torch.equal(stored(one).prev_action, stored(same).prev_action)
