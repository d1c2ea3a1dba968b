"""Planning where the model is valid: latents unlike real ones cost reward."""

from __future__ import annotations

import types

import numpy as np
import pytest
import torch
from conftest import generator, known_batch, small, small_world
from gymnasium import spaces

from worldmodel import ConfigError
from worldmodel.agents.actor_critic import ActorCritic, ActorCriticConfig, ActorCriticLearner
from worldmodel.agents.planner import PlannerConfig, PlannerController
from worldmodel.data import Sampling, State
from worldmodel.envs.imagined import ImaginedWorld
from worldmodel.model import UNKNOWN

ONE = spaces.Box(-1, 1, (1,), np.float32)
NORMAL = small("distribution", "gaussian", standard=True)


def slide(marginal=NORMAL):
    """A world whose latents are normal; an action moves the latent's first number, and reward is how far along it is."""
    world = small_world(action=ONE, latent="gaussian", marginal=marginal).eval()

    def imagine(self, state: State, action, sampling) -> State:
        return State({**state, "z": state["z"] + torch.cat([action, torch.zeros_like(action)], -1)})

    world.dynamics.imagine = types.MethodType(imagine, world.dynamics)
    world.heads.reward = lambda feature: world.dynamics.z_of(feature)[..., 0]
    world.heads.cont = lambda feature: torch.ones_like(feature[..., 0])
    if marginal is not None:
        world.fit_typicality(torch.randn(5000, 2, generator=generator()))
    return world


def furthest(typicality_penalty: float) -> float:
    """How far out the plan goes that a search of 8 steps takes."""
    plan = {"method": "cem", "horizon": 8, "samples": 200, "iterations": 5, "elites": 20, "proposals": 0, "terminal": False}
    config, world = PlannerConfig(units=8, layers=1, bins=21, gamma=1.0, typicality_penalty=typicality_penalty, plan=plan), slide()
    controller = PlannerController(config, world.feature_dim, world.action)
    found = controller.search(world, world.initial(1), controller.memory(world, 1), generator())
    return float(found.best[0, :, 0].cumsum(0).max())


def test_a_planner_leaves_the_typical_set_for_reward_unless_that_costs():
    assert furthest(0.0) > 5.0  # no latent was ever seen there
    assert 1.0 < furthest(20.0) < 3.0


def test_the_log_density_is_that_of_the_latent_and_what_is_off_begins_at_the_quantile():
    world = slide()
    z = torch.tensor([[0.0, 0.0], [2.0, 0.0], [4.0, 0.0]])
    feature = torch.cat([torch.randn(3, world.feature_dim - 2, generator=generator()), z], -1)
    torch.testing.assert_close(world.log_density(feature), world.marginal.log_prob(z, None))
    off = world.atypicality(feature.view(1, 3, -1))[0]
    assert off[0] == off[1] == 0 and off[2] == pytest.approx((float(world.marginal_low) + 8 + 1.8379) / 2, abs=1e-3)
    inside = world.marginal.log_prob(torch.randn(5000, 2, generator=generator(1)), None) >= world.marginal_low
    assert float(inside.float().mean()) == pytest.approx(0.95, abs=0.01)


def test_training_follows_the_quantile_and_evaluation_leaves_it():
    world, batch = small_world(latent="gaussian", marginal=NORMAL), known_batch()
    batch = batch.with_obs(world.preprocess(batch.obs))
    assert float(world.marginal_low) == pytest.approx(UNKNOWN) and not world.atypicality(torch.full((1, world.feature_dim), 99.0))
    world.eval().loss(world.trace(batch), batch)
    assert float(world.marginal_low) == pytest.approx(UNKNOWN)
    trace = world.train().trace(batch, None, Sampling(generator=generator()))
    world.loss(trace, batch)
    seen = world.marginal.log_prob(trace.z.flatten(0, 1), None).quantile(0.05)
    torch.testing.assert_close(world.marginal_low, seen)
    asked = []
    world.fit_typicality = lambda latents, share: asked.append(len(latents))
    for _ in range(100):
        world.loss(trace, batch)
    assert asked == [18, 18]  # at the 51st update and the 101st: a likelihood may cost more than all else
    del world.fit_typicality
    world.fit_typicality(torch.full((20, 2), 10.0), 0.01)
    far = world.marginal.log_prob(torch.full((1, 2), 10.0), None)[0]
    torch.testing.assert_close(world.marginal_low, seen.lerp(far, 0.01))


def test_latents_that_are_not_finite_leave_the_quantile_as_it_was():
    world = slide()
    before = world.marginal_low.clone()
    world.fit_typicality(torch.full((20, 2), torch.nan), 0.01)
    assert torch.equal(world.marginal_low, before)


def test_the_imagined_world_and_the_actor_critic_pay_the_same_price():
    world = slide()
    far = State({**world.initial(2).map(torch.clone), "z": torch.tensor([[5.0, 0.0], [0.0, 0.0]])})
    rewards = []
    for typicality_penalty in (0.0, 2.0):
        worlds = ImaginedWorld(world, 2, start="prior", seed=0, typicality_penalty=typicality_penalty)
        worlds.reset()
        worlds.state = far
        rewards.append(worlds.step(torch.zeros(2, 1)).reward)
    price = 2.0 * world.atypicality(world.dynamics.feature(far))
    torch.testing.assert_close(rewards[0] - rewards[1], price)
    assert price[0] > 1 and price[1] == 0


def test_options_that_need_a_marginal_say_how_to_get_one():
    world = slide(marginal=None)
    options = ActorCriticConfig(units=8, typicality_penalty=1.0)
    for use in (
        lambda: world.log_density(torch.zeros(1, world.feature_dim)),
        lambda: ImaginedWorld(world, 2, start="prior", typicality_penalty=1.0),
        lambda: ActorCriticLearner(world, ActorCritic(options, world.feature_dim, world.action)),
    ):
        with pytest.raises(ConfigError, match=r"fit-prior RUN .*--slot marginal"):
            use()
