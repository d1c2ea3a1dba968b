"""An intrinsic reward for what is seldom seen or badly known, as long as real rewards tell nothing."""

from __future__ import annotations

from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch

import worldmodel as wm
from worldmodel import Run
from worldmodel.agents import Dreamer
from worldmodel.agents.novelty import Novelty
from worldmodel.data import Sampling


class Lock(gym.Env):
    """A row of places, each with one of two moves that goes on; the other goes back to the first. Only the last one pays."""

    def __init__(self, places=12, pays=True, box=False):
        self.places, self.pays = places, pays
        self.observation_space = gym.spaces.Box(0, 1, (places,)) if box else gym.spaces.Discrete(places)
        self.action_space, self.box = gym.spaces.Discrete(2), box

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.at, self.steps = 0, 0
        return self._obs(), {}

    def step(self, action):
        self.at, self.steps = (self.at + 1 if action == self.at * (self.at + 1) // 2 % 2 else 0), self.steps + 1
        self.at = min(self.at, self.places - 1)
        ended = self.at == self.places - 1
        return self._obs(), float(ended and self.pays), ended and self.pays, self.steps == 2 * self.places, {}

    def _obs(self):
        return np.eye(self.places, dtype=np.float32)[self.at] if self.box else self.at


SMALL = {
    **{"model": "anchored", "model.dynamics.deter": 4, "model.dynamics.units": 8, "model.heads.units": 8, "model.heads.layers": 1},
    **{"agent.units": 32, "agent.layers": 1, "agent.bins": 41, "agent.horizon": 8, "agent.starts": 32, "agent.lr": 3e-3},
    **{"train.batch_size": 8, "train.batch_length": 8, "train.lr": 3e-3, "train.prefill": 60, "train.ratio": 0.1},
    "train.early_ratio": None,
}


def agent_in(env, steps, **options):
    return Dreamer("MlpPolicy", env, config={**SMALL, **options}, seed=0, device="cpu").learn(steps)


@pytest.fixture(scope="module")
def searching() -> Dreamer:
    """An agent that has found nothing in a row of four places that pays nowhere; tests leave it as it is."""
    return agent_in(Lock(4, pays=False), 80)


def dreamt(agent, places):
    """A dream of one step that arrives at each of some places."""
    world = agent.learner.ema
    state = world.dynamics.initial(len(places))
    dream = world.imagine(state, lambda feature, step: torch.eye(2)[[0] * len(places)], 1, Sampling(generator=torch.Generator()))
    feature = dream.feature.clone()
    feature[:, 1, -world.dynamics.latent.size :] = torch.eye(agent.observation_space.n)[places]
    return replace(dream, feature=feature)


def test_what_is_seen_n_times_is_worth_one_over_the_root_of_one_more(searching):
    replay = searching.replay
    visits = np.bincount(replay.observations(0, 0, replay.lengths[0])["obs"].ravel(), minlength=4)
    reward = searching.exploration.novelty(dreamt(searching, [0, 1, 2, 3])).squeeze(1)
    expected = torch.as_tensor(1 + visits).rsqrt()
    assert torch.allclose(reward, (expected / expected.mean()).float(), atol=1e-5) and reward.mean().item() == pytest.approx(1)


def test_counts_made_anew_from_the_replay_are_those_that_were_kept_row_by_row(searching):
    novelty, replay = searching.exploration.novelty, searching.replay
    kept = novelty._visits.clone()
    novelty.recount(replay)
    assert kept.sum() == replay.lengths[0] > 80 and torch.equal(kept, novelty._visits)


def test_numbers_are_as_new_as_the_members_of_the_transition_disagree():
    agent = agent_in(Lock(4, pays=False, box=True), 80)
    world, novelty = agent.learner.ema, agent.exploration.novelty
    dream = world.imagine(
        world.dynamics.initial(8),
        lambda feature, step: torch.eye(2)[[0, 1] * 4],
        3,
        Sampling(generator=torch.Generator().manual_seed(0), uncertainty=True),
    )
    assert novelty.is_known and dream.uncertainty.std() > 0
    assert torch.allclose(novelty(dream), dream.uncertainty / dream.uncertainty.mean())


def test_a_model_that_neither_counts_nor_disagrees_says_nothing_and_its_actor_waits():
    agent = agent_in(Lock(4, pays=False), 80, **{"model": "dreamer"})
    assert not agent.exploration.novelty.is_known and agent.exploration.is_blind
    assert agent.learner.updates > 1 and agent.behaviour.updates == 0


def test_an_actor_that_is_curious_plays_half_of_the_episodes_until_one_finds_something(searching, monkeypatch):
    exploration, rng = searching.exploration, np.random.default_rng(0)
    assert searching.behaviour.is_intrinsic and searching.behaviour.updates > 1

    def share():
        return np.mean([bool(exploration.act(np.ones(1, bool), rng)[0][0]) for _ in range(1000)])

    assert share() == pytest.approx(1 / 2, abs=0.05)
    monkeypatch.setattr(exploration, "found", 1)
    assert exploration.intrinsic is None and share() == pytest.approx(1 / 2, abs=0.05)
    monkeypatch.setattr(exploration, "found", 2)
    assert share() == pytest.approx(1 / 3, abs=0.05)


def test_with_the_first_find_actor_and_critic_begin_anew():
    agent = agent_in(Lock(4, pays=False), 80)
    before = agent.behaviour.behaviour.critic.state_dict()
    before = {name: x.clone() for name, x in before.items()}
    agent.exploration.found = 1
    agent.update()
    after, optimizer = agent.behaviour.behaviour.critic.state_dict(), agent.behaviour.critic_optimizer
    assert not agent.behaviour.is_intrinsic
    assert any(not torch.allclose(before[name], after[name], atol=1e-2) for name in before)
    assert {int(state["step"]) for state in optimizer.state.values()} == {1}
    assert optimizer.param_groups[0]["params"][0] is next(agent.controller.critic.parameters())
    kept = {name: x.clone() for name, x in after.items()}
    agent.update()  # and only once
    assert {int(state["step"]) for state in optimizer.state.values()} == {2}
    assert all(torch.allclose(kept[name], x, atol=2e-2) for name, x in agent.behaviour.behaviour.critic.state_dict().items())


def test_what_actor_and_critic_learned_from_is_saved(searching, tmp_path, monkeypatch):
    searching.save(tmp_path / "agent.zip")
    assert Dreamer.load(tmp_path / "agent.zip").behaviour.is_intrinsic
    monkeypatch.setattr(searching.behaviour, "is_intrinsic", False)
    searching.save(tmp_path / "agent.zip")
    assert not Dreamer.load(tmp_path / "agent.zip").behaviour.is_intrinsic


def test_curiosity_opens_a_lock_that_random_moves_do_not(monkeypatch):
    """Twelve places: one of 2,048 sequences of random moves opens it, and moves that last more than two steps never do."""
    assert agent_in(Lock(), 700, **{"train.ratio": 0.5}).exploration.found > 0
    monkeypatch.setattr(Novelty, "is_known", False)
    assert agent_in(Lock(), 700, **{"train.ratio": 0.5}).exploration.found == 0


def test_a_run_that_begins_with_an_actor_of_novelty_knows_that_it_is_one(tmp_path):
    """Without exploration of its own it learns from rewards, and so begins with new weights at its first update."""
    options = {**SMALL, "eval.every": 0, "eval.episodes": 1, "eval.max_steps": 5, "log.tensorboard": False}
    quiet = {"device": "cpu", "log": [].append}
    wm.train("FrozenLake-v1", 80, run_dir=tmp_path / "first", overrides=options, **quiet)
    assert Run.open(tmp_path / "first").agent("newest").behaviour.is_intrinsic
    still = {**options, "train.explore": False, "train.ratio": 0.0}
    wm.train("FrozenLake-v1", 12, run_dir=tmp_path / "next", from_run=tmp_path / "first", overrides=still, **quiet)
    agent = Run.open(tmp_path / "next").agent("newest")
    assert agent.behaviour.is_intrinsic and agent.exploration.intrinsic is None and not agent.exploration.is_on
