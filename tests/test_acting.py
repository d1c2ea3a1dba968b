"""Acting needs states alone: no distribution is asked for a rate, and none of its draws moves the policy's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import known_batch, small, small_world
from test_diamond import diamond

from worldmodel import registry
from worldmodel.agents.belief import BeliefPolicy
from worldmodel.agents.random import RandomController
from worldmodel.data import Sampling
from worldmodel.distributions import ConditionalDistribution
from worldmodel.errors import ConfigError
from worldmodel.learner import Learner, TrainConfig
from worldmodel.model import ModelConfig, WorldModel


def transitions() -> list[str]:
    """Every kind that may be the transition of Gaussian latents."""
    fit = []
    for kind in registry.kinds("distribution"):
        try:
            ModelConfig.parse({"dynamics": {"latent": {"kind": "gaussian"}}, "transition": {"kind": kind}})
        except ConfigError:
            continue
        fit.append(kind)
    return fit


def of_kind(kind: str) -> WorldModel:
    prior = small("distribution", kind)
    return small_world(latent="gaussian", transition=prior, initial=prior)


def policy(world: WorldModel) -> BeliefPolicy:
    return BeliefPolicy(world.obs.space, world.action.space, world, RandomController(), seed=0)


def played(world: WorldModel, steps: int = 4) -> torch.Tensor:
    """The state of a policy's generator after some steps of two environments."""
    acts, state = policy(world), None
    for t in range(steps):
        obs = np.random.default_rng(t).uniform(-1, 1, (2, 4)).astype(np.float32)
        _, state = acts.predict(obs, state, np.array([t == 0, t == 2]))
    return acts.generator.get_state()


@pytest.mark.parametrize("kind", transitions())
def test_acting_asks_no_distribution_for_a_rate_whatever_its_kind(kind, monkeypatch):
    asked = []

    world = of_kind(kind)
    for prior in (m for m in world.modules() if isinstance(m, ConditionalDistribution)):
        for name in ("rate", "rates", "log_prob", "loss", "antithetic"):
            monkeypatch.setattr(type(prior), name, lambda *args, name=name, **kwargs: asked.append(name))
    played(world)
    assert asked == []


@pytest.mark.parametrize("kind", transitions())
def test_what_a_policy_draws_does_not_depend_on_the_form_of_the_prior(kind):
    assert torch.equal(played(of_kind(kind)), played(of_kind("gaussian")))


@pytest.mark.parametrize("kind", ["dyn", "diamond"])
def test_a_trace_holds_no_loss_and_the_rate_is_reported_once_they_are_asked_for(kind):
    world = of_kind("flow") if kind == "dyn" else diamond()
    batch = known_batch() if kind == "dyn" else known_batch(world.obs.space)
    trace = world.trace(batch.with_obs(world.preprocess(batch.obs)), None, Sampling())
    assert set(vars(trace)) == {"embed", "posterior", "z", "h", "feature", "start", "last", "states"}
    learner = Learner(world, TrainConfig(burn_in=0, warmup=0))
    metrics, _, _ = learner.update(learner.prepare(batch))
    assert ("rate" in metrics) == (kind == "dyn")
    if kind == "dyn":
        assert metrics["rate"] == metrics["loss/dyn"] > 0
