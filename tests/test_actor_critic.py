"""Behaviour learned in imagination: policies are normalised, values are what they should be, better actions win."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from conftest import TWO_ACTIONS, VECTOR, assert_near, generator, known_batch, small_world, unchecked
from gymnasium import spaces
from torch import Tensor
from torch.distributions import Normal

from worldmodel.agents.actor_critic import ActorCritic, ActorCriticConfig, ActorCriticLearner, MixedLogProbs, Policy, lambda_return
from worldmodel.data import Batch, Dream, Sampling, State, Trace
from worldmodel.errors import ConfigError
from worldmodel.model import WorldModel
from worldmodel.spaces import ActionSpec

SMALL = {"units": 16, "layers": 1, "horizon": 4, "starts": 16, "lr": 3e-3, "bins": 41, "limit": 6.0, "unimix": 0.01, "clip": 1e3}
SMALL |= {"gamma": 0.99, "lam": 0.95, "entropy": 3e-3, "slow": 0.02, "slow_weight": 1.0}
SMALL |= {"replay_value": 0.0, "gradient": "reinforce", "min_std": 0.1, "max_std": 1.0}
SPACES = {
    "discrete": TWO_ACTIONS,
    "groups": spaces.MultiDiscrete([2, 3]),
    "bits": spaces.MultiBinary(3),
    "numbers": spaces.Box(-3, 5, (2,), np.float32),
}
LISTS = {name: space for name, space in SPACES.items() if name != "numbers"}


def config(**options) -> ActorCriticConfig:
    return ActorCriticConfig(**{**SMALL, **options})


# Policies --------------------------------------------------------------------------------------------------------------


def policy(space: spaces.Space, rows: int = 4, **options) -> Policy:
    spec = ActionSpec.from_space(space)
    width = spec.dim * (2 if spec.kind == "continuous" else 1)
    return Policy(spec, 1.5 * torch.randn(rows, width, generator=generator()), config(**options))


def every_action(spec: ActionSpec) -> Tensor:
    if spec.kind == "binary":
        return torch.tensor(list(itertools.product([0.0, 1.0], repeat=spec.dim)))
    return torch.stack([torch.cat(parts) for parts in itertools.product(*(torch.eye(n) for n in spec.sizes))])


@pytest.mark.parametrize("space", LISTS.values(), ids=LISTS)
def test_a_policy_over_lists_of_actions_sums_to_one_and_draws_them_as_often_as_they_are_likely(space):
    one, n = policy(space, rows=1), 20_000
    actions = every_action(one.spec)
    likely = Policy(one.spec, one.parameters.expand(len(actions), -1), one.config).log_prob(actions).exp()
    assert float(likely.sum()) == pytest.approx(1, abs=1e-5)
    drawn = Policy(one.spec, one.parameters.expand(n, -1), one.config).sample(generator())
    drawn_as = (drawn.unsqueeze(1) == actions).all(-1).float()
    assert (drawn_as.sum(-1) == 1).all()
    assert_near(drawn_as.mean(0), likely, n, drawn_as.std(0))
    assert float(one.entropy()) == pytest.approx(float(-(likely * likely.log()).sum()), rel=1e-4)
    assert torch.equal(one.mode()[0], actions[likely.argmax()])


@pytest.mark.parametrize("space", LISTS.values(), ids=LISTS)
def test_no_action_is_ever_impossible(space):
    spec = ActionSpec.from_space(space)
    parts = spec.sizes if spec.kind == "categorical" else (2,) * spec.dim
    likely = [torch.tensor([500.0] + [-500.0] * (n - 1)) for n in spec.sizes] or [torch.full((spec.dim,), 500.0)]
    sure, actions = Policy(spec, torch.cat(likely).unsqueeze(0), config(unimix=0.06)), every_action(spec)
    smallest = Policy(spec, sure.parameters.expand(len(actions), -1), sure.config).log_prob(actions).exp().min()
    assert float(smallest) == pytest.approx(float(np.prod([0.06 / n for n in parts])), rel=1e-3)
    assert sure.entropy().isfinite().all()


def certain(space, wrong, right, share):
    """(spec, logits [1, A]) of a policy that was sure of `wrong`, after 300 updates in which `right` alone pays."""
    spec = ActionSpec.from_space(space)
    logits = torch.nn.Parameter((40 * (2 * wrong - 1)).unsqueeze(0))
    optimizer, g = torch.optim.Adam([logits], lr=0.3), generator()
    for _ in range(300):
        policy = Policy(spec, logits.expand(300, -1), config(unimix=share))
        action = policy.sample(g)
        reward = (action == right).all(-1).float()
        optimizer.zero_grad()
        (-policy.log_prob(action) * (reward - reward.mean())).mean().backward()
        optimizer.step()
    return spec, logits.detach()


@pytest.mark.parametrize("space", [spaces.Discrete(3), spaces.MultiBinary(1)])
def test_who_is_sure_of_the_wrong_action_learns_better(space):
    ends = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 1.0])
    wrong, right = ends if isinstance(space, spaces.Discrete) else (ends[0][1:2], ends[0][:1])
    spec, logits = certain(space, wrong, right, share=0.05)
    assert torch.equal(Policy(spec, logits, config(unimix=0.05)).mode(), right.unsqueeze(0))
    spec, logits = certain(space, wrong, right, share=0.0)  # never tried, so never found to be better
    assert torch.equal(Policy(spec, logits, config(unimix=0.0)).mode(), wrong.unsqueeze(0))


def test_the_gradient_of_a_mixture_is_that_of_logits_whose_softmax_it_is():
    logits, even, mix = torch.tensor([0.3, -0.2, 1.0], requires_grad=True), torch.full((3,), 1 / 3), 0.03
    found = MixedLogProbs.apply(logits, even, mix)
    p = (1 - mix) * logits.softmax(-1) + mix / 3
    torch.testing.assert_close(found.exp(), p)
    (gradient,) = torch.autograd.grad(found[1], logits)
    torch.testing.assert_close(gradient, torch.tensor([0.0, 1.0, 0.0]) - p)


def test_a_logit_below_the_even_share_falls_no_further_and_rises():
    logits, even = torch.tensor([0.0, -20.0], requires_grad=True), torch.full((2,), 0.5)
    for sign, expected in ((1, 0.0), (-1, -0.99)):  # what descent would lower, and what it raises
        (gradient,) = torch.autograd.grad(sign * MixedLogProbs.apply(logits, even, 0.02)[1], logits)
        assert float(gradient[1]) == pytest.approx(expected)


def test_a_policy_over_numbers_is_a_normal_around_a_mean_within_the_range():
    one, n = policy(SPACES["numbers"], rows=3, min_std=0.1, max_std=0.8), 20_000
    mean, raw = one.parameters.chunk(2, -1)
    std = 0.1 + 0.7 * torch.sigmoid(raw + 2)
    expected = Normal(torch.tanh(mean), std)
    many = Policy(one.spec, one.parameters.expand(n, 3, -1), one.config)
    x = many.sample(generator())
    assert_near(x.mean(0), expected.mean, n, x.std(0))
    torch.testing.assert_close(x.std(0), std, rtol=0.05, atol=0)
    torch.testing.assert_close(many.log_prob(x), expected.log_prob(x).sum(-1))
    torch.testing.assert_close(one.entropy(), expected.entropy().sum(-1))
    assert torch.equal(one.mode(), torch.tanh(mean))


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_draws_come_from_the_generator_alone(space):
    before = torch.get_rng_state()
    one, same, other = (policy(space, rows=60).sample(generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other) and torch.equal(torch.get_rng_state(), before)


# Starts ----------------------------------------------------------------------------------------------------------------


def made(space: spaces.Space = TWO_ACTIONS, members: int = 0, **options) -> tuple[ActorCriticLearner, Trace, Batch]:
    """(a learner with a world of its own, a trace of that world, the batch that it covers)."""
    world = small_world(action=space, ensemble={"members": members})
    batch = known_batch(VECTOR, space)
    batch = batch.with_obs(world.preprocess(batch.obs))
    with torch.no_grad():
        trace = world.trace(batch, None, Sampling(generator=generator()))
    torch.manual_seed(0)
    return ActorCriticLearner(world, ActorCritic(config(**options), world.feature_dim, world.action)), trace, batch


def weights_of(module: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()]).clone()


def test_imagination_starts_from_states_of_the_batch_and_where_the_world_has_ended_it_counts_for_nothing():
    learner, trace, batch = made(starts=None)
    state, alive = learner.starts(trace, batch, generator())
    assert torch.equal(state["h"], trace.h.flatten(0, 1)) and torch.equal(alive, (~batch.is_terminal).float().flatten())
    assert alive[2] == 0 and alive[9] == 1  # the terminal end, the truncated one
    learner, trace, batch = made(starts=5)
    some, alive = learner.starts(trace, batch, generator())
    rows = [int((state["h"] == h).all(-1).nonzero()[0]) for h in some["h"]]
    assert len(set(rows)) == 5 and alive.tolist() == [float(row != 2) for row in rows]


def test_a_temperature_spreads_what_is_dreamt():
    torch.manual_seed(0)
    world = small_world(latent="gaussian")
    learners = [ActorCriticLearner(world, ActorCritic(config(temperature=t), world.feature_dim, world.action)) for t in (1.0, 3.0)]
    features = [learner.imagine(world.initial(500), generator()).feature[:, 1, -2:] for learner in learners]
    torch.testing.assert_close(features[1].std(0), 3 * features[0].std(0), rtol=1e-3, atol=1e-3)


def test_dreams_are_truncated_where_they_are_uncertain_and_weigh_by_their_confidence():
    uncertainty = torch.tensor([[0.1, 0.2, 0.3, 0.2], [0.9, 0.1, 0.1, 0.1], [0.1, 0.1, 0.1, 0.1]])
    reward = torch.zeros(3, 4)
    dream = Dream(torch.zeros(3, 4, 2), reward, reward, uncertainty, torch.zeros(3, 5, 1), State({}))
    learner, *_ = made()
    learner.config = config(max_uncertainty=0.25, confidence=10.0, lam=0.5)
    lam, weight = learner._trust(dream)
    assert lam.tolist() == [[0.5, 0.0, 0.0, 0.5], [0.0, 0.0, 0.0, 0.5], [0.5, 0.5, 0.5, 0.5]]
    confidence = 1 / (1 + 10 * uncertainty)
    inside = torch.tensor([[1.0, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    torch.testing.assert_close(weight, confidence * inside)
    value = torch.arange(5.0).expand(3, 5)
    returns = lambda_return(reward, torch.ones(3, 4), value, lam)
    assert returns[0, 1] == 2.0  # the critic's value of the last state that is trusted
    learner.config = config(lam=0.5)
    lam, weight = learner._trust(dream)
    assert lam == 0.5 and torch.equal(weight, torch.ones(3, 4))


def test_dreams_beyond_the_limit_teach_nothing():
    learner, trace, batch = made(members=3, max_uncertainty=1e-6)
    before = weights_of(learner.behaviour)
    learner.update(trace, batch, generator())
    assert torch.equal(weights_of(learner.behaviour), before)
    learner.config = config(max_uncertainty=1e6)
    learner.update(trace, batch, generator())
    assert not torch.equal(weights_of(learner.behaviour), before)


@pytest.mark.parametrize("option", ["max_uncertainty", "confidence"])
def test_options_of_uncertainty_need_an_ensemble(option):
    with pytest.raises(ConfigError, match=rf"agent\.{option}=0\.5 needs uncertainty"):
        made(**{option: 0.5})


def test_nothing_is_learned_from_ended_worlds():
    learner, trace, batch = made(entropy=0.1)
    before = weights_of(learner.behaviour)
    ended = Batch(**{**vars(batch), "is_terminal": torch.ones_like(batch.is_terminal)})
    learner.update(trace, ended, generator())
    assert torch.equal(weights_of(learner.behaviour), before)
    learner.update(trace, batch, generator())
    assert not torch.equal(weights_of(learner.behaviour), before)


@pytest.mark.parametrize("gradient", ["reinforce", "dynamics"])
def test_the_world_does_not_move_while_behaviour_improves(gradient):
    learner, trace, batch = made(SPACES["numbers"], gradient=gradient)
    before = weights_of(learner.world)
    metrics = learner.update(trace, batch, generator())
    assert torch.equal(weights_of(learner.world), before) and all(np.isfinite(list(metrics.values())))


def test_the_slow_critic_follows_the_fast_one():
    learner, trace, batch = made(slow=0.25)
    old = weights_of(learner.behaviour.slow)
    learner.update(trace, batch, generator())
    torch.testing.assert_close(weights_of(learner.behaviour.slow), 0.75 * old + 0.25 * weights_of(learner.behaviour.critic))


def test_a_trace_that_is_not_finite_teaches_nothing_and_spoils_nothing():
    learner, trace, batch = made()
    learner.update(trace, batch, generator())
    parts = learner.behaviour.actor, learner.behaviour.critic
    before, scale = [weights_of(part) for part in parts], (learner.scale.low, learner.scale.high)
    spoilt = Trace(**{**vars(trace), "states": trace.states.map(lambda x: x * torch.nan)})
    learner.update(spoilt, batch, generator())
    assert all(torch.equal(weights_of(part), old) for part, old in zip(parts, before))
    assert (learner.scale.low, learner.scale.high) == scale


def test_the_same_seed_improves_by_the_same_bits():
    runs = []
    for _ in range(2):
        learner, trace, batch = made()
        for seed in range(3):
            learner.update(trace, batch, generator(seed))
        runs.append(weights_of(learner.behaviour))
    assert torch.equal(*runs)


def test_a_gradient_through_the_model_needs_actions_that_are_numbers():
    with pytest.raises(ConfigError, match=r"agent\.gradient.*reinforce"):
        made(TWO_ACTIONS, gradient="dynamics")


# Values ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gamma", "cont", "worth"), [(0.9, 1.0, 10.0), (0.9, 0.5, 1 / 0.55), (0.9, 0.0, 1.0)])
def test_a_constant_reward_of_one_is_worth_one_over_one_minus_the_discount(gamma, cont, worth):
    learner, trace, batch = made(gamma=gamma, lr=2e-2, slow_weight=0.0, horizon=6, starts=8)
    heads = learner.world.heads
    heads.reward = lambda feature: torch.ones(feature.shape[:-1])
    heads.cont = lambda feature: torch.full(feature.shape[:-1], cont)
    with unchecked():
        for seed in range(120):
            learner.update(trace, batch, generator(seed))
    value = learner.behaviour.value(trace.feature)
    np.testing.assert_allclose(value.detach(), np.full(value.shape, worth), rtol=0.04)


def test_replayed_returns_are_real_rewards_and_nothing_crosses_an_episodes_end():
    learner, trace, batch = made(replay_value=1.0, lam=1.0, gamma=0.5, slow_weight=0.0)
    learner.behaviour.critic[-1].bias.data[-8:] = 2.0  # the same value c everywhere
    c = learner.behaviour.value(trace.feature)[0, 0].detach()
    seen = []
    original = learner._value_loss
    learner._value_loss = lambda feature, logits, target: seen.append(target) or original(feature, logits, target)
    learner.update(trace, batch, generator())
    target, r, none = seen[-1], batch.reward, torch.tensor(torch.nan)
    end = [row[5] + 0.5 * c for row in r]  # the window's end says nothing about the episode: it goes on with c
    row0 = [r[0, 1] + 0.5 * r[0, 2], r[0, 2], none, r[0, 4] + 0.5 * end[0], end[0]]  # the world ends at 2
    cut = r[1, 3] + 0.5 * c  # the episode is cut off at 3, where its worth is the critic's
    row1 = [r[1, 1] + 0.5 * (r[1, 2] + 0.5 * cut), r[1, 2] + 0.5 * cut, cut, none, end[1]]
    expected = torch.stack([torch.stack(row0), torch.stack(row1)])
    counted = expected.isfinite()
    assert float(c) > 1 and torch.equal(counted, ~batch.is_last[:2, :-1])
    torch.testing.assert_close(target[:2][counted], expected[counted])


def test_padding_rewards_teach_nothing():
    taught = []
    for padding in (7.0, -900.0):
        learner, trace, batch = made(replay_value=1.0)
        padded = Batch(**{**vars(batch), "reward": batch.reward.masked_fill(batch.is_first, padding)})
        learner.update(trace, padded, generator())
        taught.append(weights_of(learner.behaviour))
    assert torch.equal(*taught)


def test_replayed_returns_count_by_the_weight_of_their_window():
    taught = []
    for weight in (None, 1.0, 0.0):
        learner, trace, batch = made(replay_value=1.0)
        weight = None if weight is None else torch.full_like(batch.reward, weight)
        taught.append(float(learner._replay_value_loss(trace, Batch(**{**vars(batch), "weight": weight})).detach()))
    assert taught[0] == taught[1] > 0 and taught[2] == 0


# Better actions --------------------------------------------------------------------------------------------------------


def forever(action: Tensor) -> Tensor:
    return torch.ones(len(action))


def play(learner: ActorCriticLearner, trace: Trace, batch: Batch, reward, cont=forever, updates: int = 80) -> Policy:
    """Improve in a world of one state, in which reward and continue are functions of the action; the policy then."""
    world: WorldModel = learner.world
    width = world.feature_dim

    def imagine(state, act, horizon, sampling=None) -> Dream:
        n = state.batch_size
        feature = torch.ones(n, horizon + 1, width)
        actions = [act(feature[:, t], t) for t in range(horizon)]
        rewards, conts = (torch.stack([f(a) for a in actions], 1) for f in (reward, cont))
        return Dream(torch.stack(actions, 1), rewards, conts, torch.zeros(n, horizon), feature, state)

    world.imagine = imagine
    with unchecked():
        for seed in range(updates):
            learner.update(trace, batch, generator(seed))
    return learner.behaviour.policy(torch.ones(1, width))


@pytest.mark.parametrize("scale", [0.2, 1000.0])
@pytest.mark.parametrize("better", [0, 1])
def test_the_better_of_two_actions_wins_whatever_the_size_of_rewards(better, scale):
    found = play(*made(lr=2e-2, limit=10.0), lambda action: scale * action[:, better])
    assert int(found.mode().argmax()) == better
    assert float(found.log_prob(torch.eye(2)[[better]]).detach().exp()) > 0.9


def test_an_action_that_ends_a_rewarding_world_loses():
    found = play(*made(lr=2e-2), lambda action: torch.ones(len(action)), lambda action: action[:, 1])
    assert float(found.log_prob(torch.eye(2)[[1]]).detach().exp()) > 0.9


def test_each_part_of_a_compound_action_is_found():
    groups = play(*made(SPACES["groups"], lr=2e-2), lambda action: action[:, 1] + action[:, 2])
    assert groups.mode()[0].tolist() == [0, 1, 1, 0, 0]
    bits = play(*made(SPACES["bits"], lr=2e-2), lambda action: action[:, 0] - action[:, 1] + action[:, 2])
    assert bits.mode()[0].tolist() == [1, 0, 1]


@pytest.mark.parametrize("gradient", ["reinforce", "dynamics"])
def test_the_best_number_is_found(gradient):
    goal = torch.tensor([0.5, -0.3])
    learner, trace, batch = made(SPACES["numbers"], lr=2e-2, gradient=gradient, entropy=1e-4)
    found = play(learner, trace, batch, lambda action: -(action - goal).square().sum(-1), updates=150)
    np.testing.assert_allclose(found.mode()[0].detach(), goal, atol=0.12)


def test_entropy_keeps_a_policy_open_where_little_is_at_stake():
    entropies = []
    for weight in (0.0, 0.5):
        found = play(*made(lr=2e-2, entropy=weight), lambda action: 0.05 * action[:, 0])
        entropies.append(float(found.entropy().detach()))
    assert entropies[0] < 0.5 * np.log(2) and entropies[1] > 0.9 * np.log(2)


def test_rewards_a_hundred_times_greater_pull_no_harder():
    pulls = []
    for scale in (100.0, 10_000.0):
        learner, trace, batch = made(entropy=0.0, lam=1.0, limit=12.0)
        metrics = []
        update = learner.update
        learner.update = lambda *args, update=update, metrics=metrics: metrics.append(update(*args)) or metrics[-1]
        play(learner, trace, batch, lambda action, scale=scale: scale * action[:, 0], updates=1)
        pulls.append(metrics[0]["train/actor_gradient_norm"])
    assert pulls[0] == pytest.approx(pulls[1], rel=1e-3) and pulls[0] > 1e-3
