"""Planners find plans that are known to be best, remember them, and keep Stable-Baselines3's contract."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import CHAIN, SMALL_BEHAVIOUR, SMALL_WORLD, generator
from gymnasium import spaces
from small_runs import small_train
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv
from test_imagined import LEARNS
from torch import nn

from worldmodel.agents import Planner
from worldmodel.agents.evaluation import evaluate
from worldmodel.agents.planner import PlanConfig, PlanDistribution, PlannerConfig, PlannerController, colored_noise, flops, uniform
from worldmodel.data import Dream, State
from worldmodel.envs.tiny import Chain
from worldmodel.errors import ConfigError, EnvError
from worldmodel.heads import Heads, HeadsConfig
from worldmodel.model import WorldModel
from worldmodel.spaces import ActionSpec
from worldmodel.storage.run import Run

METHODS = ("random", "cem", "icem", "mppi")
ACTIONS = {
    "Box": spaces.Box(-1, 1, (2,), np.float32),
    "Discrete": spaces.Discrete(3),
    "MultiDiscrete": spaces.MultiDiscrete([2, 3]),
    "MultiBinary": spaces.MultiBinary(3),
}
WANTED = {  # canonical actions of two states
    "Box": [[0.6, -0.3], [-0.5, 0.8]],
    "Discrete": [[0, 0, 1], [1, 0, 0]],
    "MultiDiscrete": [[1, 0, 0, 0, 1], [0, 1, 1, 0, 0]],
    "MultiBinary": [[1, 0, 1], [0, 1, 1]],
}
WIDE = {"horizon": 3, "samples": 400, "elites": 20, "iterations": 6, "proposals": 0, "terminal": False}


class Bandit(WorldModel):
    """A world whose state says which action is best at every step: the reward is minus the squared distance to it.

    The feature is that action, and how many steps were taken; the world ends after `end` steps.
    """

    def __init__(self, action: spaces.Space, end: int = 99, uncertain: float = 0.0):
        nn.Module.__init__(self)
        self.action, self.end, self.uncertain = ActionSpec.from_space(action), end, uncertain
        self.ensemble = nn.Identity() if uncertain else None
        self.dynamics = None  # which would have members
        self.heads = Heads(HeadsConfig(units=1), 1)
        self.feature_dim = self.action.dim + 1
        self.anything = nn.Parameter(torch.zeros(()))

    def state(self, wanted) -> State:
        wanted = torch.tensor(wanted, dtype=torch.float32)
        return State({"feature": torch.cat([wanted, torch.zeros(len(wanted), 1)], -1)})

    def imagine(self, state, policy, horizon, sampling=None) -> Dream:
        features, actions = [state["feature"]], []
        for step in range(horizon):
            actions.append(self.action.project(policy(features[-1], step)))
            features.append(features[-1] + nn.functional.one_hot(torch.tensor(self.action.dim), self.feature_dim))
        taken, feature = torch.stack(actions, 1), torch.stack(features, 1)
        reward = -(taken - feature[:, :-1, :-1]).square().sum(-1)
        cont = (feature[:, 1:, -1] < self.end).float()
        uncertainty = self.uncertain * taken[..., 0].abs()
        return Dream(taken, reward, cont, uncertainty, feature, State({"feature": features[-1]}))


def controller(world: WorldModel, **plan) -> PlannerController:
    return PlannerController(PlannerConfig(units=8, layers=1, bins=21, plan={**WIDE, **plan}), world.feature_dim, world.action)


def search(world: Bandit, kind: str, **plan):
    made = controller(world, **plan)
    return made.search(world, world.state(WANTED[kind]), made.memory(world, 2), generator())


# The search -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ACTIONS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_finds_the_best_plan_of_each_state_with_every_kind_of_action(method, kind):
    world = Bandit(ACTIONS[kind])
    found = search(world, kind, method=method, samples=4000 if method == "random" else 400, horizon=2 if method == "random" else 3)
    wanted = torch.tensor(WANTED[kind], dtype=torch.float32).unsqueeze(1)
    atol = 0.0 if kind != "Box" else 0.25 if method == "random" else 0.1
    torch.testing.assert_close(found.best, wanted.expand_as(found.best).contiguous(), rtol=0, atol=atol)
    if method != "random":
        torch.testing.assert_close(found.distribution.mode(), wanted.expand_as(found.best).contiguous(), rtol=0, atol=atol)


def test_a_fitted_distribution_narrows_and_better_elites_weigh_more_with_mppi():
    world = Bandit(ACTIONS["Box"])
    one, six = (search(world, "Box", method="cem", iterations=n) for n in (1, 6))
    assert six.distribution.std.mean() < 0.5 * one.distribution.std.mean()
    made = controller(world, method="mppi")
    weight = made._weights(torch.tensor([[3.0, 2.0, 1.0]]))
    torch.testing.assert_close(weight, torch.tensor([[3.0, 2.0, 1.0]]).mul(2.0).softmax(1))  # deviation 1, temperature 0.5
    torch.testing.assert_close(made._weights(torch.tensor([[300.0, 200.0, 100.0]])), weight)  # the rewards' unit is no matter


def test_rewards_behind_a_predicted_end_count_nothing():
    found = search(Bandit(ACTIONS["Box"], end=1), "Box", method="icem")
    assert found.value.abs().max() < 0.02
    spoilt = controller(world := Bandit(ACTIONS["Box"], end=1))
    late = world.imagine(world.state(WANTED["Box"]), lambda feature, step: torch.full((2, 2), float(step > 0)), 3)
    first = world.imagine(world.state(WANTED["Box"]), lambda feature, step: torch.zeros(2, 2), 1)
    torch.testing.assert_close(spoilt._value(world, late, 0.0), spoilt._value(world, first, 0.0))


def test_the_critic_values_what_follows_the_horizon():
    world = Bandit(ACTIONS["Box"])
    made = controller(world, terminal=True)
    with torch.no_grad():
        made.critic[-1].bias.copy_(torch.linspace(0, 1, made.config.bins))
    dream = world.imagine(world.state(WANTED["Box"]), lambda feature, step: torch.zeros(2, 2), 3)
    gamma = made.config.gamma
    expected = dream.reward @ torch.tensor([1.0, gamma, gamma**2]) + gamma**3 * made.value(dream.feature[:, -1])
    torch.testing.assert_close(made._value(world, dream, 0.0), expected)
    assert made.value(dream.feature[:, -1]).abs().min() > 0.1


def test_a_lambda_averages_a_candidates_value_over_depths():
    world, values = Bandit(ACTIONS["Box"]), {}
    for lam in (0.0, 0.5, 1.0):
        made = controller(world, terminal=True, lam=lam)
        with torch.no_grad():
            made.critic[-1].bias.copy_(torch.linspace(0, 1, made.config.bins))
        dream = world.imagine(world.state(WANTED["Box"]), lambda feature, step: torch.zeros(2, 2), 2)
        values[lam] = made._value(world, dream, 0.0)
    gamma, value = made.config.gamma, made.value(dream.feature)
    depth1 = dream.reward[:, 0] + gamma * value[:, 1]
    depth2 = dream.reward @ torch.tensor([1.0, gamma]) + gamma**2 * value[:, 2]
    torch.testing.assert_close(values[0.0], depth1)
    torch.testing.assert_close(values[0.5], 0.5 * depth1 + 0.5 * depth2)
    torch.testing.assert_close(values[1.0], depth2)


class Uncertain(Bandit):
    """Every second roll-out is far better than it should be, the others as much worse; the most likely one is as it should be."""

    def imagine(self, state, policy, horizon, sampling=None) -> Dream:
        dream = super().imagine(state, policy, horizon, sampling)
        luck = torch.zeros(len(dream.reward)) if sampling.mode else 1 - 2.0 * (torch.arange(len(dream.reward)) % 2)
        return replace(dream, reward=dream.reward + 50 * luck.unsqueeze(1))


def test_a_candidates_value_is_the_mean_of_its_draws():
    world = Uncertain(ACTIONS["Discrete"])
    for draws in (0, 2):  # of two draws one is lucky
        found = search(world, "Discrete", method="icem", draws=draws)
        assert found.value.abs().max() < 1e-3
        assert torch.equal(found.best[:, 0], torch.tensor(WANTED["Discrete"], dtype=torch.float32))
    assert search(world, "Discrete", method="icem", draws=1).value.min() > 100


def test_all_draws_of_a_proposal_take_the_actions_of_its_first():
    world = Bandit(ACTIONS["Box"])
    made = controller(world, proposals=5, draws=3)
    rows = world.state(WANTED["Box"]).map(lambda x: x.repeat_interleave(3 * WIDE["samples"], 0))
    plans = torch.zeros(2, WIDE["samples"], WIDE["horizon"], 2)
    broad = PlanDistribution.centered(world.action, plans[:, 0], 1.0)
    taken = made._imagine(world, rows, plans, 5, generator(), broad).action.unflatten(0, (2, WIDE["samples"], 3))
    assert torch.equal(taken, taken[:, :, :1].expand_as(taken)) and taken[:, :5].abs().min() > 0 and not taken[:, 5:].any()


def test_the_policys_proposals_are_found_where_chance_would_not_find_them():
    many = spaces.MultiDiscrete([50] * 4)
    world = Bandit(many)
    wanted = torch.zeros(1, 200)
    wanted[0, [7, 58, 109, 160]] = 1
    config = {"samples": 8, "iterations": 1, "elites": 1, "horizon": 1}
    made = controller(world, **config, proposals=2)
    blind = controller(world, **config)
    with torch.no_grad():
        made.actor[-1].bias.copy_(40 * wanted[0])
    for planner, finds in ((made, True), (blind, False)):
        planner.config = planner.config.replace(unimix=0.0)
        found = planner.search(world, world.state(wanted.tolist()), planner.memory(world, 1), generator())
        assert torch.equal(found.best[0, 0], wanted[0]) == finds


def test_uncertain_plans_are_avoided_for_a_penalty_and_sought_for_a_bonus():
    world = Bandit(ACTIONS["Box"], uncertain=1.0)
    state = world.state([[0.0, 0.0]])
    made = controller(world, uncertainty_penalty=0.0, bonus=4.0, method="icem")
    plain, away, towards = (made.search(world, state, made.memory(world, 1), generator(), p) for p in (0.0, 4.0, -4.0))
    assert plain.best[0, 0, 0].abs() < 0.1 and away.best[0, 0, 0].abs() < 0.1 and towards.best[0, 0, 0].abs() > 0.9
    greedy, _ = made.act(world, state, made.memory(world, 1), True, generator())
    curious, _ = made.act(world, state, made.memory(world, 1), False, generator())
    assert greedy[0, 0].abs() < 0.1 and curious[0, 0].abs() > 0.7  # the bonus is for collecting alone
    with pytest.raises(ConfigError, match=r"agent\.plan\.uncertainty_penalty.*ensemble"):
        made.search(Bandit(ACTIONS["Box"]), state, made.memory(world, 1), generator(), 1.0)


# Memory -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ACTIONS)
def test_the_next_search_begins_with_the_plan_shifted_by_one_step(kind):
    world = Bandit(ACTIONS[kind])
    made = controller(world, method="icem", keep=3)
    start = made.memory(world, 2)
    torch.testing.assert_close(start["plan"], uniform(world.action, start["plan"]).contiguous())
    found = made.search(world, world.state(WANTED[kind]), start, generator(5))
    _, memory = made.act(world, world.state(WANTED[kind]), start, True, generator(5))
    torch.testing.assert_close(memory["plan"][:, :-1], found.distribution.center[:, 1:])
    torch.testing.assert_close(memory["plan"][:, -1], start["plan"][:, -1])
    torch.testing.assert_close(memory["elites"][:, :, :-1], found.elites[:, :3, 1:])
    assert memory["elites"].shape == (2, 3, 3, world.action.dim)


def test_kept_elites_are_candidates_of_the_next_search():
    world = Bandit(spaces.Discrete(50))
    wanted = [[float(i == 31) for i in range(50)]]
    made = controller(world, method="icem", samples=4, elites=2, keep=2, iterations=1, horizon=2)
    memory = State({**made.memory(world, 1), "elites": torch.tensor(wanted).expand(1, 2, 2, 50).contiguous()})
    assert made.search(world, world.state(wanted), memory, generator()).value.item() == 0


def test_a_search_follows_its_generator_bit_for_bit():
    world = Bandit(ACTIONS["Box"])
    one, same = search(world, "Box"), search(world, "Box")
    made = controller(world)
    other = made.search(world, world.state(WANTED["Box"]), made.memory(world, 2), generator(1))
    assert torch.equal(one.elites, same.elites) and not torch.equal(one.elites, other.elites)


# Distributions ----------------------------------------------------------------------------------------------------------


def test_draws_of_categories_and_bits_have_its_probabilities():
    noise = torch.randn(1, 20_000, 1, 2, generator=generator())
    groups = ActionSpec.from_space(ACTIONS["MultiDiscrete"])
    center = torch.tensor([[[0.9, 0.1, 0.2, 0.5, 0.3]]])
    torch.testing.assert_close(PlanDistribution(groups, center, None).sample(noise).mean(1), center, rtol=0, atol=0.02)
    bits = ActionSpec.from_space(spaces.MultiBinary(2))
    share = torch.tensor([[[0.8, 0.25]]])
    torch.testing.assert_close(PlanDistribution(bits, share, None).sample(noise).mean(1), share, rtol=0, atol=0.02)


def test_a_distribution_over_categories_keeps_a_share_of_each():
    spec = ActionSpec.from_space(ACTIONS["Discrete"])
    distribution = PlanDistribution(spec, torch.full((1, 1, 3), 1 / 3), None)
    elites = torch.tensor([1.0, 0, 0]).expand(1, 4, 1, 3)
    fitted = distribution.fitted(elites, torch.full((1, 4), 0.25), PlanConfig(momentum=0.0, min_std=0.06), 1.0)
    torch.testing.assert_close(fitted.center, torch.tensor([[[0.96, 0.02, 0.02]]]))


def test_coloured_noise_has_unit_variance_and_lasts():
    white = torch.randn(1, 20_000, 12, 1, generator=generator())
    assert colored_noise(white, 0.0) is white
    for exponent in (1.0, 2.0):
        noise = colored_noise(white, exponent)[0, :, :, 0]
        torch.testing.assert_close(noise.var(0), torch.ones(12), rtol=0, atol=0.05)
        assert (noise[:, :-1] * noise[:, 1:]).mean() > 0.35
    assert colored_noise(white[:, :, :1], 2.0).shape == (1, 20_000, 1, 1)


def test_the_counter_of_operations_counts_every_candidate():
    agent = small_planner()
    counted = flops(agent.policy.world, agent.controller)
    agent.controller.config = agent.controller.config.replace(plan={"samples": 32})
    assert 1.8 < flops(agent.policy.world, agent.controller) / counted < 2.2


# The agent --------------------------------------------------------------------------------------------------------------

SMALL_PLAN = {"agent.plan.samples": 16, "agent.plan.iterations": 2, "agent.plan.horizon": 3, "agent.plan.elites": 4}
SMALL_PLAN |= {"agent.plan.proposals": 2}


def small_planner(env=CHAIN, **config) -> Planner:
    return Planner("MlpPolicy", env, config={**SMALL_WORLD, **SMALL_BEHAVIOUR, **SMALL_PLAN, **config}, seed=0, device="cpu")


@pytest.mark.parametrize("method", METHODS)
def test_it_learns_predicts_and_comes_back_from_a_file_as_it_was(method, tmp_path):
    agent = small_planner(**{"agent.plan.method": method})
    agent.learn(40)
    assert agent.learner.updates > 2
    agent.save(tmp_path / "planner")
    loaded = Planner.load(tmp_path / "planner")
    obs, beliefs = agent.env.reset(), [None, None]
    for _ in range(4):
        actions = []
        for i, model in enumerate((agent, loaded)):
            model.policy.generator.manual_seed(7)
            action, beliefs[i] = model.predict(obs, beliefs[i], np.zeros(1, bool), deterministic=True)
            actions.append(action)
        assert np.array_equal(*actions)
        obs = agent.env.step(actions[0])[0]
    mean, _ = evaluate_policy(loaded, DummyVecEnv([Chain] * 2), n_eval_episodes=2, warn=False)
    assert -8 <= mean <= 0.4


def test_an_episodes_start_forgets_the_plan():
    agent = small_planner(**{"agent.plan.samples": 64})
    obs = np.repeat(agent.env.reset(), 2, 0)
    _, belief = agent.predict(obs, None, None)
    _, belief = agent.predict(obs, belief, np.zeros(2, bool))
    fresh = agent.policy.controller.memory(agent.policy.world, 2)["plan"]
    names = list(agent.policy.initial_belief(2))
    held = dict(zip(names, belief))["plan"]
    assert not np.allclose(held, fresh.numpy())
    seen = []
    agent.controller.search = lambda world, state, memory, *rest: seen.append(memory["plan"]) or _stop()
    with pytest.raises(StopIteration):
        agent.predict(obs, belief, np.array([True, False]))
    np.testing.assert_allclose(seen[0][0], fresh[0])
    np.testing.assert_allclose(seen[0][1], held[1])


def _stop():
    raise StopIteration


def test_without_proposals_and_terminal_value_nothing_but_the_world_model_learns():
    agent = small_planner(**{"agent.plan.proposals": 0, "agent.plan.terminal": False})
    before = torch.cat([p.flatten().clone() for p in agent.controller.parameters()])
    agent.learn(40)
    assert agent.learner.updates > 2
    assert torch.equal(before, torch.cat([p.flatten() for p in agent.controller.parameters()]))
    trained = small_planner()
    trained.learn(40)
    assert not torch.equal(before, torch.cat([p.flatten() for p in trained.controller.parameters()]))


@pytest.fixture(scope="module")
def planned(tmp_path_factory) -> Run:
    """A planner whose world model has learned Chain from random steps."""
    folder = tmp_path_factory.mktemp("planned") / "run"
    options = {**LEARNS, "agent": "planner", "agent.units": 8, "agent.layers": 1, "agent.bins": 15, "agent.horizon": 2}
    options |= {"agent.plan.samples": 32, "agent.plan.horizon": 4, "agent.plan.proposals": 0, "agent.plan.terminal": False}
    small_train(folder, 300, options=options)
    return Run.open(folder)


@pytest.mark.parametrize("method", METHODS)
def test_a_search_in_a_learned_chain_walks_to_its_end(planned, method):
    agent = planned.agent()
    agent.controller.config = agent.controller.config.replace(plan={"method": method})
    returns, lengths = evaluate(agent, planned.config.env, 3)
    assert lengths == [4, 4, 4] and np.allclose(returns, 0.4)


def test_a_goal_is_reached_by_the_distance_of_codes(planned):
    agent = planned.agent()
    cells = np.eye(5, dtype=np.float32)
    for goal in (1, 2):
        agent.set_goal(cells[goal])
        env, belief = Chain(), None
        obs, _ = env.reset()
        visited = []
        for _ in range(6):
            action, belief = agent.predict(obs, belief, np.zeros(1, bool), deterministic=True)
            obs, *_ = env.step(int(action))
            visited.append(env.position)
        assert visited[goal - 1] == goal and max(visited) <= goal + 1, visited
        assert sum(abs(cell - goal) for cell in visited[goal:]) <= len(visited[goal:]), visited  # it cannot stand still
    agent.set_goal(None)
    assert evaluate(agent, planned.config.env, 1)[1] == [4]


def test_each_environment_has_a_goal_of_its_own(planned):
    agent, cells = planned.agent(), np.eye(5, dtype=np.float32)
    for goals, way in (([1, 3], [0, 1]), ([3, 1], [1, 0])):  # from the cell between them, to the left and to the right
        agent.set_goal(cells[goals])
        assert agent.predict(cells[[2, 2]], None, np.ones(2, bool), deterministic=True)[0].tolist() == way
    with pytest.raises(ValueError, match="2 goals for 3 states"):
        agent.predict(cells[:3], None, None)


def test_the_end_of_the_world_is_no_way_to_a_goal(planned):
    agent, cells = planned.agent(), np.eye(5, dtype=np.float32)
    agent.set_goal(cells[0])
    ends = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    features = torch.zeros(2, 3, agent.world.feature_dim)
    dream = Dream(torch.zeros(2, 2, 2), torch.zeros(2, 2), ends, torch.zeros(2, 2), features, agent.world.initial(2))
    value = agent.controller._value(agent.world, dream, 0.0)
    assert value[0] == value[1] < 0


def test_options_of_the_search_are_found_from_python_and_from_the_command_line(planned):
    assert planned.config.agent.plan.samples == 32
    assert Planner("MlpPolicy", CHAIN, config=["agent.plan.method=cem"], device="cpu").config.agent.plan.method == "cem"


def test_a_goal_of_another_space_is_refused(planned):
    agent = planned.agent()
    for goal in (9, np.zeros(3, np.int64), 0.5):
        with pytest.raises(EnvError):
            agent.set_goal(goal)
    assert agent.controller.goal is None


def test_random_shooting_collects_near_the_best_plan_and_not_at_random():
    world = Bandit(ACTIONS["Box"])
    made = controller(world, method="random", samples=4000, horizon=2)
    for deterministic, atol in ((True, 0.25), (False, 0.6)):
        action, _ = made.act(world, world.state(WANTED["Box"]), made.memory(world, 2), deterministic, generator())
        torch.testing.assert_close(action, torch.tensor(WANTED["Box"]), rtol=0, atol=atol)


def test_a_pure_search_estimates_nothing():
    world = Bandit(ACTIONS["Box"])
    assert controller(world).estimate(torch.zeros(2, 3)) is None
    assert controller(world, terminal=True).estimate(torch.zeros(2, 3)).shape == (2,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"agent.plan.elites": 99}, "elites=99 are more than the 16 samples"),
        ({"agent.plan.proposals": 16}, "leave none of the samples=16"),
        ({"agent.plan.method": "icem", "agent.plan.keep": 5}, "keep=5 is more than the 4 elites"),
        ({"agent.plan.horizon": 0}, "agent.plan.horizon"),
        ({"agent.plan.uncertainty_penalty": 1.0}, r"agent.plan.uncertainty_penalty=1 needs uncertainty"),
        ({"agent.plan.method": "cma"}, "agent.plan.method"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        small_planner(**options)
