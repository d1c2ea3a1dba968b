"""Decisions: a true model picks the best plan, a perverse one never does, and what cannot be copied is skipped."""

from __future__ import annotations

import copy

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import CHAIN, generator, small_world, unchecked
from gymnasium.utils import EzPickle

from worldmodel.agents.belief import BeliefPolicy
from worldmodel.agents.decisions import (
    Decisions,
    copied,
    decisions,
    fault_of_copies,
    gap_of_planning,
    model_returns,
    plan_in_both,
    real_returns,
    stepped,
)
from worldmodel.agents.exploitation import Acting
from worldmodel.agents.random import RandomController
from worldmodel.data import Dream, State
from worldmodel.diagnostics.evidence import Evidence
from worldmodel.envs.make import EnvConfig, make_env
from worldmodel.envs.tiny import Chain
from worldmodel.spaces import ActionSpec

ENV = EnvConfig(id=CHAIN, kwargs={"length": 7, "limit": 200})
SPACES = Chain(length=7).observation_space, Chain(length=7).action_space
FEW = {"episodes": 4, "horizon": 8, "plan_episodes": 3, "plan_steps": 8}


def chain_world(sign: float = 1.0, noise: float = 0.0):
    """The chain as it is, with rewards of another sign, or with noise on the return of each plan."""
    with unchecked():
        world = small_world(*SPACES, vector_scaling="raw").eval()
    rng, cells = generator(5), torch.eye(7)

    def imagine(state, policy, horizon, sampling=None):
        x, actions = [state["x"]], []
        for step in range(horizon):
            actions.append(policy(x[-1], step))
            cell = x[-1].argmax(-1) + 2 * actions[-1].argmax(-1) - 1
            x.append(cells[cell.clamp(0, 6)])
        feature = torch.stack(x, 1)
        cell = feature[:, 1:].argmax(-1)
        reward = sign * torch.where(cell == 6, 1.0, (cell - 6) / 10)
        reward = reward + noise * torch.randn(reward.shape, generator=rng)
        return Dream(torch.stack(actions, 1), reward, (cell < 6).float(), 0 * reward, feature, State({"x": x[-1]}))

    world.initial = lambda size: State({"x": torch.zeros(size, 7)})
    world.observe = lambda state, rows, before, first, sampling=None: State({"x": rows["obs"].float()})
    world.imagine = imagine
    return world


def agent_of(world, controller=None):
    policy = BeliefPolicy(*SPACES, world, controller or RandomController(), 0)
    return Acting(policy, world.obs, world.action, world.device)


class PredictingAgent:
    """What `evaluate` needs beside a belief."""

    def __init__(self, acting):
        self.__dict__.update(vars(acting))
        self.predict = acting.policy.predict


def found(world, env=ENV, **options):
    evidence = Evidence(world, "runs/some", None, None, None, None)
    return decisions(PredictingAgent(agent_of(world)), env, evidence, **{**FEW, **options})


# Planted models ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def true():
    return found(chain_world())


def test_a_perfect_model_picks_the_best_plan_always_and_loses_nothing(true):
    assert true.skipped is None
    assert true.figures["best plan picked"].value == 1 and true.figures["best plan picked"].low == 1
    assert true.figures["decision regret"].value == 0 and true.figures["decision regret over chance"].value == 0
    assert true.figures["best plan over chance"].surely_above(0.3) and true.figures["deciding states"].value > 0.5
    assert true.figures["best plan by chance"].value >= 0.2
    assert not [text for text in true.sentences if "`" in text], true.sentences


def test_a_model_of_negated_rewards_picks_it_never_and_holds_planning_back(true):
    wrong = found(chain_world(sign=-1.0))
    assert wrong.figures["best plan picked"].value == 0 and wrong.figures["decision regret over chance"].low > 1
    assert wrong.figures["planning gap"].surely_above(0) and not true.figures["planning gap"].surely_above(0)
    decides, plans = wrong.sentences
    assert "no better than chance" in decides and decides.endswith("with N above the run's steps.")
    assert "The model holds planning back" in plans and "--resume --steps N`" in plans


def test_the_noisier_the_model_the_less_it_picks_and_the_more_it_loses(true):
    noisy, noisier = (found(chain_world(noise=size)) for size in (0.7, 20.0))
    picked = [x.figures["best plan over chance"].value for x in (true, noisy, noisier)]
    lost = [x.figures["decision regret over chance"].value for x in (true, noisy, noisier)]
    assert picked == sorted(picked, reverse=True) and lost == sorted(lost)
    assert picked[0] > picked[1] + 0.05 and abs(picked[2]) < 0.3 and lost[2] == pytest.approx(1, abs=0.5)


def test_the_same_search_in_a_true_model_and_in_copies_returns_the_same():
    world = chain_world()
    real, imagined = plan_in_both(ENV, Evidence(world, "r", None, None, None, None), 3, 10)
    assert real == imagined and all(x > -2 for x in real)


# Estimators -------------------------------------------------------------------------------------------------------------


def test_states_that_decide_nothing_are_left_out_and_ties_raise_what_chance_has():
    real = torch.tensor([[1.0, 1.0, 1.0], [2.0, 0.0, 0.0], [2.0, 2.0, 0.0]], dtype=torch.float64)
    imagined = torch.tensor([[0.0, 9.0, 0.0], [0.0, 1.0, 0.0], [0.0, 1.0, 0.5]], dtype=torch.float64)
    figures = Decisions(real, imagined, torch.arange(3)).figures()
    assert figures["deciding states"].value == pytest.approx(2 / 3)
    assert figures["best plan picked"].value == 0.5 and figures["best plan by chance"].value == pytest.approx(0.5)
    assert figures["decision regret"].value == 1 and figures["decision regret over chance"].value == pytest.approx(2 / 2)
    nothing = Decisions(real[:1], imagined[:1], torch.zeros(1, dtype=torch.int64)).figures()
    assert not nothing["best plan picked"].known and nothing["deciding states"].value == 0


def test_a_model_that_guesses_picks_as_chance_does():
    rng = generator()
    real, imagined = torch.randn(2, 2000, 5, generator=rng).double()
    figures = Decisions(real, imagined, torch.arange(2000) // 5).figures()
    assert figures["best plan picked"].value == pytest.approx(0.2, abs=0.03)
    assert figures["best plan over chance"].low < 0 < figures["best plan over chance"].high
    assert figures["decision regret over chance"].value == pytest.approx(1, abs=0.05)


def test_returns_of_plans_are_those_by_hand_in_both_worlds_and_the_environment_is_where_it_was():
    env = make_env(ENV, 0, 0)
    env.reset()
    left, right = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    plans = torch.stack([right.expand(8, 2), left.expand(8, 2)])
    world = chain_world()
    by_hand = [-0.5 - 0.4 - 0.3 - 0.2 - 0.1 + 1, 8 * -0.6]
    assert real_returns(env, plans, world.action) == pytest.approx(by_hand)
    start = State({"x": torch.eye(7)[:1]})
    assert model_returns(world, start, plans.unsqueeze(0), generator())[0].tolist() == pytest.approx(by_hand)
    assert env.unwrapped.position == 0 and env.unwrapped.steps == 0


def test_which_of_the_two_holds_planning_back_follows_from_the_intervals():
    evidence = Evidence(chain_world(), "runs/some", None, None, None, None)
    noise = torch.randn(10, generator=generator()).double()
    low, high = noise, noise + 50
    for returns, words in (
        ((high, low, low), "The model holds planning back"),
        ((low, low, high), "The planner holds planning back"),
        ((high, high, high), "does as well as in the real environment"),
        ((low, high, high), "The planner holds planning back"),
    ):
        assert words in gap_of_planning(evidence, *returns).sentences[0]


# Copies -----------------------------------------------------------------------------------------------------------------


class Odd(Chain):
    """A chain that cannot be copied, or whose copies have a chance of their own, or share it with the original."""

    def __init__(self, fault: str = "", length: int = 7, limit: int = 200):
        super().__init__(length, limit)
        self.fault, self.handle = fault, np.zeros(1, int)
        self.rng = np.random.default_rng()

    def __deepcopy__(self, memo):
        if self.fault == "refuses":
            raise TypeError("cannot pickle a simulator")
        made = copy.copy(self)
        if self.fault == "chance":
            made.rng = np.random.default_rng()
        return made

    def step(self, action):
        obs, reward, *rest = super().step(action)
        self.handle += 1
        reward += self.rng.normal() if self.fault == "chance" else 0
        reward += float(self.handle[0]) if self.fault == "shares" else 0
        return obs, reward, *rest


gym.register("OddChain-v0", entry_point=Odd)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("refuses", "TypeError: cannot pickle a simulator"), ("chance", "two copies of it differ"), ("shares", "copies of it differ")],
)
def test_an_environment_that_cannot_be_copied_is_skipped_with_the_reason(fault, reason):
    section = found(chain_world(), EnvConfig(id="OddChain-v0", kwargs={"fault": fault}))
    assert not section.figures and "the environment cannot be copied" in section.skipped and reason in section.skipped


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1", CHAIN, "worldmodel.envs:Catch-v0", "worldmodel.envs:Heating-v0"])
def test_copies_of_these_environments_step_alike(env):
    made = make_env(env, 0, 3)
    made.reset()
    assert fault_of_copies(made, np.stack([made.action_space.sample() for _ in range(6)])) is None


def test_copies_of_mujoco_stand_where_it_stands_and_step_alike_and_leave_it_there():
    pytest.importorskip("mujoco")
    env = make_env("InvertedPendulum-v5", 0, 3)
    env.reset()
    actions = np.random.default_rng(0).uniform(-1, 1, (12, 1)).astype(np.float32)
    stepped(env, actions[:4])
    before = env.unwrapped.data.qpos.copy()
    returns = real_returns(env, torch.from_numpy(actions).unsqueeze(0), ActionSpec.from_space(env.action_space))
    assert np.array_equal(env.unwrapped.data.qpos, before) and len(returns) == 1 and returns[0] > 0
    assert np.array_equal(copied(env).unwrapped.data.qpos, before)
    assert fault_of_copies(env, actions[4:]) is None


def test_copies_of_box2d_cannot_be_made_and_the_section_says_why():
    pytest.importorskip("Box2D")
    env = make_env("LunarLander-v3", 0, 3)
    env.reset()
    assert "a copy of it failed: TypeError" in fault_of_copies(env, np.zeros(6, np.int64))


def test_a_copy_of_what_would_be_made_anew_is_where_the_original_is():
    class Anew(Chain, EzPickle):
        def __init__(self, length: int):
            Chain.__init__(self, length)
            EzPickle.__init__(self, length)

    env = gym.wrappers.TimeLimit(Anew(7), 50)
    env.reset(seed=0)
    assert [step[0].argmax() for step in stepped(env, np.ones(3, int))] == [1, 2, 3]
    made = copied(env)
    assert made.unwrapped.position == 3 and made.step(1)[0].argmax() == 4 and env.unwrapped.position == 3
    assert env.unwrapped.np_random.random() == made.unwrapped.np_random.random()
    assert fault_of_copies(env, np.ones(3, int)) is None


def test_plans_do_not_know_the_environments_own_chance():
    class Noisy(Chain):
        def step(self, action):
            obs, reward, *rest = super().step(action)
            return obs, reward + self.np_random.normal(), *rest

    env = Noisy(length=7)
    env.reset(seed=0)
    codec, plan = chain_world().action, torch.tensor([[[1.0, 0.0]] * 3] * 2)
    known, hidden, other = real_returns(env, plan, codec), real_returns(env, plan, codec, 1), real_returns(env, plan, codec, 2)
    assert known[0] == known[1] and hidden[0] == hidden[1] and len({known[0], hidden[0], other[0]}) == 3
    assert sum(env.step(0)[1] for _ in range(3)) == pytest.approx(known[0])


def test_other_actions_than_the_models_and_slow_copies_are_skipped_with_the_reason(monkeypatch):
    assert "actions are not the model's" in found(chain_world(), EnvConfig(id="Pendulum-v1")).skipped
    monkeypatch.setattr("worldmodel.agents.decisions.MOST_SECONDS", 0.0)
    section = found(chain_world())
    assert "The planning gap was not measured, because trying 12 plans" in section.skipped
    assert "best plan picked" in section.figures and "planning gap" not in section.figures
    assert "did not play" in found(chain_world(), EnvConfig(id="Nowhere-v0")).skipped
