"""Rewards of any size teach the same: what is learned from the same steps in another unit differs by the unit alone."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from conftest import (
    SMALL_BEHAVIOUR,
    SMALL_WORLD,
    TWO_ACTIONS,
    VECTOR,
    Toy,
    generator,
    known_batch,
    small,
    small_dreamer,
    small_world,
    stored,
)
from stable_baselines3 import A2C

from worldmodel.agents import JointWorldModel, Planner, latent_policy_kwargs
from worldmodel.agents.actor_critic import ActorCritic, ActorCriticConfig, ActorCriticLearner
from worldmodel.agents.experience import fit_scaling
from worldmodel.agents.guidance import Guidance
from worldmodel.data import Sampling
from worldmodel.envs import ImaginedWorld
from worldmodel.learner import Learner, TrainConfig
from worldmodel.storage.weights import cpu_randomness

POWERS = {"2^20": 2.0**20, "2^-20": 2.0**-20}
"""Sizes that floats multiply by without rounding, so that nothing but the unit may differ in a single bit."""
SIZES = {"1e6": 1e6, "1e-6": 1e-6}
OPTIONS = {
    "as it is": {},
    "replayed values, uncertainty penalty": {
        "agent.replay_value": 0.3,
        "agent.uncertainty_penalty": 0.5,
        "model.ensemble.members": 2,
        "model.ensemble.units": 8,
    },
}
UNITS = ("unit", "squares")
"""What is named so is in rewards."""


def env(size: float) -> Toy:
    """Random observations whose rewards can be read off them."""
    return Toy(VECTOR, TWO_ACTIONS, spoil=lambda obs, reward: (obs, size * (3.0 * float(obs[0]) - 1.0)))


def without_units(module: torch.nn.Module) -> torch.Tensor:
    """Every parameter and buffer that is not in rewards, in one vector."""
    kept = (x for name, x in module.state_dict().items() if not any(word in name for word in UNITS))
    return torch.cat([x.detach().flatten().double() for x in kept])


@pytest.fixture(scope="module")
def learned():
    """learned(name, size): a Dreamer with OPTIONS[name] that has learned from rewards of that size."""

    @cache
    def learn(name: str, size: float):
        return small_dreamer(env(size), **OPTIONS[name]).learn(36)

    return learn


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("size", POWERS.values(), ids=POWERS)
def test_in_another_unit_dreamer_learns_the_same_bits_and_reports_in_rewards(name, size, learned):
    one, other = learned(name, 1.0), learned(name, size)
    real = stored(one).reward[~stored(one).is_first]
    assert float(one.world.heads.scale.value) == pytest.approx(float(real.square().mean().sqrt()))
    assert torch.equal(stored(other).reward, size * stored(one).reward)
    assert torch.equal(stored(other).prev_action, stored(one).prev_action)
    assert torch.equal(without_units(other.policy), without_units(one.policy))
    feature = torch.randn(5, one.world.feature_dim, generator=generator())
    for found in (lambda agent: agent.world.heads.reward(feature), lambda agent: agent.controller.estimate(feature)):
        assert torch.equal(found(other), size * found(one)) and found(one).any()


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_metrics_of_rewards_are_in_rewards_and_losses_have_no_unit(size):
    found = []
    for factor in (1.0, size):
        world, batch = small_world(heads=small("heads", "standard", limit=10.0)), known_batch(rows=8)
        batch.reward.mul_(factor)
        world.heads.scale.update(batch.reward[~batch.is_first])
        learner = Learner(world, TrainConfig(burn_in=0, warmup=0))
        config = ActorCriticConfig(units=16, layers=1, horizon=4, replay_value=0.3)
        with cpu_randomness(0):
            behaviour = ActorCritic(config, world.feature_dim, world.action)
        torch.nn.init.normal_(behaviour.critic[-1].weight, std=0.3, generator=generator(3))
        actor = ActorCriticLearner(world, behaviour)
        for seed in range(3):
            metrics, trace, prepared = learner.update(learner.prepare(batch), generator(seed))
            metrics |= actor.update(trace, prepared, generator(seed))
        found.append(metrics)
    for tag, value in found[0].items():
        unit = size if tag in ("dream/return", "train/return_scale") else 1.0
        assert found[1][tag] == pytest.approx(unit * value, rel=1e-3, abs=1e-4 * unit), tag


def test_plans_are_the_same_and_worth_as_much_in_rewards():
    plans, size = [], 2.0**-20
    config = {
        "model.ensemble.members": 2,
        "model.ensemble.units": 8,
        "agent.plan.uncertainty_penalty": 0.5,
        "agent.plan.method": "mppi",
        "agent.plan.samples": 12,
        "agent.plan.horizon": 3,
        "agent.plan.elites": 4,
        "agent.plan.proposals": 2,
        "agent.plan.keep": 2,
    }
    for factor in (1.0, size):
        options = {**SMALL_WORLD, **SMALL_BEHAVIOUR, **config, "agent.plan.iterations": 2}
        agent = Planner("MlpPolicy", env(factor), config=options, seed=0, device="cpu").learn(30)
        actions = stored(agent).prev_action
        plans.append((agent, actions, agent.controller.estimate(torch.ones(1, agent.world.feature_dim))))
    (one, actions, value), (other, same, scaled) = plans
    assert torch.equal(actions, same) and torch.equal(scaled, size * value)
    assert torch.equal(without_units(one.policy), without_units(other.policy))


@pytest.mark.parametrize("size", POWERS.values(), ids=POWERS)
def test_imagined_worlds_pay_in_rewards(size, learned):
    paid = []
    for factor in (1.0, size):
        agent = learned("replayed values, uncertainty penalty", factor)
        worlds = ImaginedWorld(agent.world, 6, 5, seed=3, replay=agent.replay, uncertainty_penalty=0.5)
        worlds.reset()
        paid.append(torch.stack([worlds.step(worlds.world.action.project(torch.eye(2)[[0, 1] * 3])).reward for _ in range(4)]))
    assert torch.equal(paid[1], size * paid[0]) and paid[0].any()


@pytest.mark.parametrize("size", POWERS.values(), ids=POWERS)
@pytest.mark.parametrize("toward", ["reward", "value"])
def test_dreams_from_nothing_are_led_as_far_to_rewards_of_any_size(size, toward, learned):
    led = []
    for factor in (1.0, size):
        agent = learned("as it is", factor)
        world, score = agent.world.eval(), {"reward": agent.world.heads.reward, "value": agent.controller.estimate}[toward]
        led.append(
            world.sample_initial_tilted(score, 8, Guidance(toward, 3.0).nats_per_unit(world), Sampling(generator=generator()))
        )
    (state, effective), (same, as_effective) = led
    assert torch.equal(state["z"], same["z"]) and effective == as_effective > 1


@pytest.mark.parametrize("size", POWERS.values(), ids=POWERS)
def test_a_world_model_beside_an_algorithm_of_sb3_learns_the_same_bits(size):
    learned = []
    for factor in (1.0, size):
        world = small_world(dynamics={"posterior": "observation"}, latent="gaussian", seed=1)
        beside = {"train.prefill": 10, "train.batch_size": 3, "train.batch_length": 6, "train.burn_in": 0, "train.warmup": 0}
        callback = JointWorldModel(world, ratio=0.2, rl_gradients=False, config=beside)
        model = A2C(
            "MlpPolicy", env(factor), policy_kwargs=latent_policy_kwargs(world, "joint"), learning_rate=0.0, seed=0, device="cpu"
        )
        model.learn(40, callback=callback)
        assert callback.agent.learner.updates
        learned.append(callback.agent.world)
    assert torch.equal(*(without_units(world) for world in learned))
    assert float(learned[1].heads.scale.value) == size * float(learned[0].heads.scale.value)


def test_what_a_replay_holds_tells_the_unit_of_a_world_that_did_not_collect_it(learned):
    agent = learned("as it is", 1.0)
    world = small_dreamer(env(1.0)).world
    fit_scaling(world, agent.replay)
    assert float(world.heads.scale.value) == pytest.approx(float(agent.world.heads.scale.value), rel=1e-6)
