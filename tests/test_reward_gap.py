"""Are rewards of dreams flattered? Imagined against real rewards, where both are known by hand."""

from __future__ import annotations

import pytest
import torch
from conftest import CHAIN, generator, small_dreamer

from worldmodel.agents.held_out import collect
from worldmodel.agents.rollouts import RewardGap, _bootstrapped, reward_gap
from worldmodel.data import Episodes
from worldmodel.envs.tiny import Chain


def dreamer(reward: float, cont: float):
    """An agent whose world promises `reward` at each step, after which it goes on with probability `cont`."""
    agent = small_dreamer(Chain(limit=7))
    heads = agent.policy.world.heads
    heads.reward, heads.cont = (lambda feature, x=x: torch.full(feature.shape[:-1], x) for x in (reward, cont))
    return agent


def episodes_of(agent, lengths: list[int], rewards: list[float], ends: bool) -> Episodes:
    """Greedy episodes of Chain's shapes, of so many rows, the same reward at each step of one of them."""
    whole = collect(agent, CHAIN, 1, steps=3, random=0.0).rows
    row = torch.tensor([i % whole.shape[1] for n in lengths for i in range(n)])
    rows = whole.map(lambda x: x[:, row].clone())
    position = torch.tensor([i for n in lengths for i in range(n)])
    rows.reward[0] = torch.tensor([r for n, r in zip(lengths, rewards) for _ in range(n)])
    rows.is_first[0] = position == 0
    rows.is_last[0] = torch.tensor([i == n - 1 for n in lengths for i in range(n)])
    rows.is_terminal[0] = rows.is_last[0] & ends
    return Episodes(rows)


def test_imagined_rewards_count_by_the_chance_to_reach_them_and_real_ones_as_collected():
    agent = dreamer(2.0, 0.5)
    gap = reward_gap(agent, episodes_of(agent, [12, 12], [1.0, 1.0], ends=False), 2, 4, generator(), every=4)
    assert gap.count.tolist() == [6, 6, 4, 4]  # starts at rows 0, 4 and 8 of each; from 8 two steps are left
    assert gap.mean.tolist() == pytest.approx([2 - 1, 1 - 1, 0.5 - 1, 0.25 - 1])
    torch.testing.assert_close(gap.low, gap.mean)  # the episodes are alike
    torch.testing.assert_close(gap.high, gap.mean)


def test_a_dream_that_goes_on_behind_an_end_is_flattered_and_behind_a_truncation_unknown():
    agent = dreamer(1.0, 1.0)
    ended = reward_gap(agent, episodes_of(agent, [4, 4], [1.0, 1.0], ends=True), 2, 4, generator())
    assert ended.count.tolist() == [2] * 4 and ended.mean.tolist() == pytest.approx([0, 0, 1, 1])
    cut = reward_gap(agent, episodes_of(agent, [4, 4], [1.0, 1.0], ends=False), 2, 4, generator())
    assert cut.count.tolist() == [2, 2, 0, 0] and cut.mean[:2].tolist() == [0, 0] and cut.mean[2:].isnan().all()
    for column in (cut.low, cut.high):
        assert column[:2].tolist() == [0, 0] and column[2:].isnan().all()


def test_the_interval_is_over_episodes_since_starts_of_one_are_alike():
    """Two episodes of many starts: draws of two among them are (a, a), (a, b) or (b, b), however many starts each has."""
    gaps = torch.tensor([0.0] * 100 + [1.0] * 100).unsqueeze(1)
    found = _bootstrapped(gaps, torch.ones(200, 1, dtype=torch.bool), torch.tensor([0] * 100 + [5] * 100))
    assert (float(found.low), float(found.mean), float(found.high)) == (0.0, 0.5, 1.0)
    noise = torch.randn(400, 1, generator=generator())
    wide = _bootstrapped(noise, torch.ones(400, 1, dtype=torch.bool), torch.arange(400))
    assert float(wide.high - wide.low) == pytest.approx(2 * 1.645 / 400**0.5, rel=0.15)  # as the normal distribution has it
    one = _bootstrapped(gaps, torch.ones(200, 1, dtype=torch.bool), torch.zeros(200, dtype=torch.int64))
    assert float(one.mean) == 0.5 and one.low.isnan() and one.high.isnan()


def test_the_dream_is_acted_greedily_by_the_agents_own_controller():
    agent = dreamer(1.0, 1.0)
    asked, act = [], agent.policy.controller.act

    def watched(world, state, memory, deterministic, *rest):
        asked.append((state.batch_size, deterministic))
        return act(world, state, memory, deterministic, *rest)

    episodes = episodes_of(agent, [30, 30], [1.0, 1.0], ends=False)
    agent.policy.controller.act = watched
    reward_gap(agent, episodes, 2, 5, generator(), every=1, starts=16)
    assert asked == [(16, True)] * 5


def test_greedy_episodes_are_the_policys_own_and_nothing_else():
    agent = small_dreamer(Chain(limit=7))
    one, two = (collect(agent, CHAIN, 2, random=0.0).rows.action for _ in range(2))
    assert torch.equal(one, two)
    gap = reward_gap(agent, collect(agent, CHAIN, 3, random=0.0), 2, 4, generator())
    assert gap.mean.isfinite().any() and gap.count[0] == 3


def test_without_a_real_step_nothing_is_measured():
    agent = dreamer(1.0, 1.0)
    gap = reward_gap(agent, episodes_of(agent, [3, 3], [1.0, 1.0], ends=True), 5, 4, generator())
    nothing = RewardGap.unknown(4)
    for found in (gap, nothing):
        assert found.count.tolist() == [0] * 4 and all(x.isnan().all() for x in (found.mean, found.low, found.high))
