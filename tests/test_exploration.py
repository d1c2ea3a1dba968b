"""Random actions that last, as long as rewards tell nothing about states."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
from conftest import small_dreamer

from worldmodel.agents import Dreamer
from worldmodel.agents.exploration import ENOUGH, LONGEST, PIECE, Exploration
from worldmodel.spaces import ActionSpec

BOX, TWO = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Discrete(2)


def fed(space, rewards, *, ends=(), length=20, episodes=30, seed=0):
    """An exploration that has seen a row for each function of (action, step, episode), in episodes of some length."""
    spec, rng = ActionSpec.from_space(space), np.random.default_rng(seed)
    found = Exploration(spec)
    found.begin(1)
    for episode in range(episodes):
        for step in range(length + 1):
            action = spec.sample(1, rng) if step else np.zeros((1, spec.dim), np.float32)
            reward = np.array([rewards(action[0], step, episode) if step else 0.0], np.float32)
            last = step == length
            found.add(action, reward, np.array([step == 0]), np.array([last and episode in ends]), np.array([0]))
    found.act(np.array([True]), rng)
    return found


@pytest.mark.parametrize(
    ("space", "reward"),
    [
        (BOX, lambda a, step, episode: 0.0),
        (BOX, lambda a, step, episode: -1.0),
        (BOX, lambda a, step, episode: -0.1 * a[0] ** 2 - 0.3 * abs(a[1]) + 0.2 * a[1]),
        (TWO, lambda a, step, episode: -0.5 * a[1]),
    ],
)
def test_where_rewards_follow_from_the_actions_episodes_are_random_until_some_find_more(space, reward):
    assert fed(space, reward).found_nothing
    for finds in (1, 3):
        found = fed(space, lambda a, step, episode, n=finds: reward(a, step, episode) + 5.0 * (episode < n and step == 20))
        assert found.is_on and found.found == finds
    assert fed(space, lambda a, step, episode: reward(a, step, episode) + 5.0 * (episode < ENOUGH and step == 20)).is_over


def test_rewards_that_depend_on_the_state_are_never_searched_for():
    noise = np.random.default_rng(1)
    assert fed(BOX, lambda a, step, episode: float(noise.normal())).is_over
    assert fed(TWO, lambda a, step, episode: 0.01 * step).is_over


def test_an_end_is_a_find_where_rewards_add_up_and_none_where_they_are_zero():
    assert fed(TWO, lambda a, step, episode: -1.0, ends=(3, 9)).found == 2
    assert fed(TWO, lambda a, step, episode: 0.0, ends=(3, 9)).found_nothing


def test_where_half_of_the_episodes_find_something_by_chance_nothing_is_searched_for():
    """As in CartPole, which ends every few steps, whatever is done: four ends of five episodes are no five finds, but enough."""
    assert fed(TWO, lambda a, step, episode: 1.0, ends=range(4), episodes=5).is_over
    assert fed(TWO, lambda a, step, episode: 1.0, ends=range(2), episodes=5).found == 2


def test_a_long_episode_counts_once_per_piece():
    found = fed(TWO, lambda a, step, episode: float(episode == 0 and step % 100 == 0), length=3 * PIECE, episodes=10)
    assert 3 <= found.found <= 4


def test_random_actions_last_from_one_step_to_the_longest_in_equal_shares_of_the_octaves():
    spec, rng = ActionSpec.from_space(BOX), np.random.default_rng(0)
    found = fed(BOX, lambda a, step, episode: 0.0)
    played = np.concatenate([found.act(np.array([False]), rng)[1].copy() for _ in range(10_000)])
    changes = np.flatnonzero((np.diff(played, axis=0) != 0).any(1))
    lasted = np.diff(changes)
    assert lasted.min() == 1 and LONGEST // 2 < lasted.max() < LONGEST
    octaves = np.histogram(np.log2(lasted + 0.5), bins=6, range=(0, 6))[0] / len(lasted)
    assert np.allclose(octaves, 1 / 6, atol=0.08)
    assert spec.dim == played.shape[1]


def test_the_share_of_random_episodes_falls_with_each_find():
    rng = np.random.default_rng(0)
    for finds in (0, 1, 3):
        found = fed(TWO, lambda a, step, episode, n=finds: float(episode < n and step == 20))
        played = [bool(found.act(np.array([True]), rng)[0][0]) for _ in range(1000)]
        assert np.mean(played) == pytest.approx(1 / (1 + finds), abs=0.05)


class Corridor(gym.Env):
    """Sixty places in a row; walking is free, and only the far end pays."""

    observation_space, action_space = gym.spaces.Box(-1, 1, (1,)), gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.at, self.step_count = 40, 0
        return self._obs(), {}

    def step(self, action):
        self.at, self.step_count = int(np.clip(self.at + 2 * int(action) - 1, 0, 60)), self.step_count + 1
        return self._obs(), float(self.at == 60), self.at == 60, self.step_count == 80, {}

    def _obs(self):
        return np.array([self.at / 30 - 1], np.float32)


def trained(steps, **options):
    config = {"train.prefill": 60, "train.ratio": 0.2, **options}
    return small_dreamer(Corridor(), **config).learn(steps)


def test_an_actor_waits_until_something_was_found():
    agent = trained(75)
    assert agent.exploration.found_nothing and agent.learner.updates > 2 and agent.behaviour.updates == 0


def test_the_actor_learns_once_random_actions_that_last_have_found_the_far_end():
    agent = trained(600, **{"train.ratio": 0.03})
    assert agent.exploration.found > 1 and agent.behaviour.updates > 0
    assert float(agent.replay.rewards(0).max()) == 1


def test_without_the_option_nothing_is_random_after_the_prefill():
    agent = trained(75, **{"train.explore": False})
    assert not agent.exploration.is_on and agent.behaviour.updates > 0


def test_what_was_found_is_saved(tmp_path):
    agent = trained(75)
    agent.exploration.found = 3
    agent.save(tmp_path / "agent.zip")
    again = Dreamer.load(tmp_path / "agent.zip")
    assert again.exploration.state() == agent.exploration.state() and again.exploration.is_on


def test_rows_that_say_too_little_yet_are_saved_and_count_later(tmp_path):
    agent = trained(40)
    assert not agent.exploration.is_on and not agent.exploration.is_over
    agent.save(tmp_path / "agent.zip")
    again = Dreamer.load(tmp_path / "agent.zip").exploration
    for exploration in (agent.exploration, again):
        exploration.begin(1)
        exploration.act(np.ones(1, bool), np.random.default_rng(0))
        assert not exploration.is_on  # still too few
        for _ in range(20):
            one = np.ones((1, exploration.spec.dim), np.float32)
            exploration.add(one, np.zeros(1), np.zeros(1, bool), np.zeros(1, bool), np.zeros(1, int))
        exploration.act(np.ones(1, bool), np.random.default_rng(0))
        assert exploration.found_nothing
    assert again.state() == agent.exploration.state()
