"""The ensemble: it is uncertain where it has no data, in every dream, and trains nothing else."""

from __future__ import annotations

import pytest
import torch
from conftest import descend, generator, known_batch, reached, small, small_world

from worldmodel.config import Config
from worldmodel.data import Sampling
from worldmodel.diagnostics.rollouts import OpenLoop
from worldmodel.ensemble import Ensemble, EnsembleConfig
from worldmodel.errors import ConfigError
from worldmodel.learner import Learner, TrainConfig
from worldmodel.model import needs_ensemble


def with_ensemble(members: int = 5, **options):
    """A small world with an ensemble."""
    return small_world(ensemble=small("ensemble", "standard", members=members, **options))


def test_members_agree_where_they_have_learned_and_disagree_elsewhere():
    torch.manual_seed(0)
    ensemble = Ensemble(EnsembleConfig(members=5, units=32), 2, 1, 3)

    def loss(step: int):
        feature, action = torch.rand(1, 64, 2), torch.rand(1, 64, 1)
        following = torch.cat([feature + action, feature[..., :1] * action], -1)
        return ensemble.loss(feature, action, following, torch.ones(1, 64, dtype=torch.bool)).mean()

    descend(loss, ensemble.parameters(), 1e-2, 300)
    inside = ensemble.disagreement(torch.rand(200, 2), torch.rand(200, 1)).mean()
    outside = ensemble.disagreement(4 + torch.rand(200, 2), torch.rand(200, 1)).mean()
    assert inside < 0.1 < 0.3 < outside


def test_disagreement_is_in_deviations_of_the_embedding_whatever_their_unit():
    def learned(unit: float):
        torch.manual_seed(0)
        ensemble = Ensemble(EnsembleConfig(members=3), 2, 1, 3)
        feature, action, following = torch.randn(1, 50, 2), torch.randn(1, 50, 1), unit * torch.randn(1, 50, 3)
        ensemble.loss(feature, action, following, torch.ones(1, 50, dtype=torch.bool)).mean().backward()
        return [p.grad for p in ensemble.parameters()]

    for one, other in zip(learned(1.0), learned(1000.0)):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_nothing_across_an_episodes_end_is_predicted():
    world, batch = with_ensemble(), known_batch()
    batch = batch.with_obs(world.preprocess(batch.obs))
    trace = world.trace(batch, None, Sampling(generator=generator()))
    loss = world.loss(trace, batch)["ensemble"]
    assert torch.equal(loss.mask, ~batch.is_first[:, 1:]) and loss.unit == "score"
    moved = batch.with_obs({name: torch.where(batch.is_first[..., None], x + 9, x) for name, x in batch.obs.items()})
    other = world.trace(moved, None, Sampling(generator=generator()))
    world.eval()  # running statistics stay
    before, after = (world.loss(t, b)["ensemble"].value * loss.mask for t, b in ((trace, batch), (other, moved)))
    assert not torch.equal(trace.embed, other.embed)
    torch.testing.assert_close(before[0, 2], after[0, 2])  # the row before a first one


def test_no_gradient_leaves_the_ensemble():
    world, batch = with_ensemble(), known_batch()
    batch = batch.with_obs(world.preprocess(batch.obs))
    trace = world.trace(batch, None, Sampling(generator=generator()))
    loss = world.loss(trace, batch)["ensemble"].value
    parameters = {name: p for name, p in world.named_parameters() if p.requires_grad}
    assert reached(loss, **parameters) == {name for name in parameters if name.startswith("ensemble.")}


def test_the_world_model_learns_the_same_with_and_without_an_ensemble():
    plain, watched = small_world(), with_ensemble()
    for world in (plain, watched):
        learner = Learner(world, TrainConfig(clip=1e9))
        for seed in range(3):
            learner.update(learner.prepare(known_batch(seed=seed)), generator(seed))
    theirs = watched.state_dict()
    for name, x in plain.state_dict().items():
        torch.testing.assert_close(x, theirs[name], msg=name)


def test_a_dream_holds_the_uncertainty_of_each_step():
    world = with_ensemble()
    state = world.initial(4)
    action = world.action.project(torch.eye(2)[torch.tensor([0, 1, 0, 1])])
    dream = world.imagine(state, lambda feature, step: action, 3, Sampling(generator=generator()))
    expected = world.ensemble.disagreement(dream.feature[:, :-1], dream.action)
    torch.testing.assert_close(dream.uncertainty, expected)
    assert dream.uncertainty.shape == (4, 3) and (dream.uncertainty > 0).all()
    without = small_world().imagine(small_world().initial(4), lambda feature, step: action, 3)
    assert not without.uncertainty.any()


def test_without_an_ensemble_its_options_are_refused_with_the_way_out():
    needs_ensemble(small_world(), "penalty", 0.0)
    needs_ensemble(with_ensemble(), "penalty", 1.0)
    with pytest.raises(ConfigError, match=r"penalty=1 needs uncertainty.*model\.ensemble\.members=5"):
        needs_ensemble(small_world(), "penalty", 1.0)


def test_a_single_member_is_refused():
    with pytest.raises(ConfigError, match=r"members.*cannot disagree"):
        Config.from_recipe("cartpole", ["model.ensemble.members=1"])


def test_errors_of_dreams_from_nothing_have_no_uncertainty():
    assert OpenLoop.unknown(5, 3).uncertainty.isnan().all()
