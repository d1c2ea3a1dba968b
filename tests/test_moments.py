"""Running moments: those of all rows or of the last ones, in float64, and never of what is not finite."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import generator, known_batch, small, small_world

from worldmodel.heads import Heads, HeadsConfig
from worldmodel.learner import Learner, TrainConfig
from worldmodel.nn.moments import RunningMoments
from worldmodel.storage.weights import as_arrays, load_arrays


def test_moments_of_parts_are_those_of_all_rows_even_far_from_zero():
    rows, moments = 1.7e9 + torch.randn(500, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), RunningMoments(3)
    for part in rows.split([1, 7, 92, 400]):
        moments.update(part)
    torch.testing.assert_close(moments.mean, rows.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(moments.variance, rows.var(0, correction=0), rtol=1e-6, atol=0)


def test_the_first_batch_counts_in_full_and_later_ones_by_the_memory():
    moments = RunningMoments(1, memory=0.9)
    moments.update(torch.full((4, 1), 5.0))
    assert float(moments.mean) == 5 and float(moments.variance) == 0
    for _ in range(200):
        moments.update(torch.tensor([[1.0], [3.0]]))
    torch.testing.assert_close(moments.mean, torch.tensor([2.0], dtype=torch.float64))
    torch.testing.assert_close(moments.variance, torch.tensor([1.0], dtype=torch.float64), rtol=1e-4, atol=0)


@pytest.mark.parametrize("memory", [None, 0.9])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_never_enters(memory, bad):
    moments = RunningMoments(2, memory)
    moments.update(torch.tensor([[bad, 0.0]]))
    assert float(moments.count) == 0 and not moments.mean.any()
    moments.update(torch.tensor([[1.0, 2.0], [bad, 7.0]]))
    moments.update(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    moments.update(torch.tensor([[1.0, 2.0], [bad, 7.0]]))
    assert moments.mean.tolist() == [2, 3] and moments.variance.tolist() == [1, 1]


@pytest.mark.parametrize("memory", [None, 0.9])
def test_statistics_that_are_fixed_on_what_is_not_finite_stay_as_they_were(memory):
    moments, bad = RunningMoments(2, memory), torch.tensor([[1.0, float("nan")], [2.0, 3.0]])
    moments.reset_to(bad)
    assert float(moments.count) == 0
    moments.reset_to(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    before = float(moments.count)
    moments.reset_to(bad)
    assert moments.mean.tolist() == [2, 3] and moments.variance.tolist() == [1, 1] and float(moments.count) == before > 1


@pytest.mark.parametrize("size", [1.0, 1e6, 1e-6])
def test_rewards_of_any_size_are_reported_apart(size):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        heads = Heads(HeadsConfig(), 4)
    optimizer, x, reward = torch.optim.Adam(heads.parameters(), 1e-2), torch.eye(4)[:2], size * torch.tensor([1.0, 0.5])
    heads.scale.update(reward)
    for _ in range(600):
        optimizer.zero_grad()
        heads.reward_loss(x, reward).mean().backward()
        optimizer.step()
    torch.testing.assert_close(heads.reward(x).detach(), reward, rtol=0.02, atol=0)


def test_rewards_of_one_keep_their_unit_and_zeros_do_not_shrink_it():
    heads = Heads(HeadsConfig(), 4)
    assert float(heads.scale.value) == 1
    for rewards in ([0.0, 1.0, -1.0, 0.0], [0.0, 0.0], [float("nan"), 5.0], [1.0]):
        heads.scale.update(torch.tensor(rewards))
        assert float(heads.scale.value) == 1


def test_statistics_under_the_names_of_0_1_0_are_taken_over():
    options = {"ensemble": {"members": 2, "units": 8}, "transition": small("distribution", "gaussian", std="fitted")}
    world, fresh = (small_world(latent="gaussian", **options) for _ in range(2))
    world.scaling.update({"obs": known_batch(rows=5).obs["obs"].flatten(0, 1)})
    learner = Learner(world, TrainConfig(burn_in=0, warmup=0))
    learner.update(learner.prepare(known_batch(rows=5)), generator())
    now = as_arrays(world)
    old = {
        name: x
        for name, x in now.items()
        if not any(f".{word}." in f".{name}" for word in ("moments", "errors0", "errors", "squares"))
    }
    scaling, ensemble = world.scaling.moments[0], world.ensemble.moments
    old |= {"scaling.count": now["scaling.moments.0.count"], "scaling.mean0": now["scaling.moments.0.mean"]}
    old |= {"scaling.square0": (scaling.variance * scaling.count).numpy()}
    old |= {
        f"{name.removesuffix('errors0.mean')}log_std0": 0.5 * np.log(x) for name, x in now.items() if name.endswith("errors0.mean")
    }
    old |= {"ensemble.mean": ensemble.mean.numpy(), "ensemble.variance": ensemble.variance.numpy(), "ensemble.batches": np.array(1)}
    old |= {f"{name.removesuffix('errors.mean')}variance": x for name, x in now.items() if name.endswith(".errors.mean")}
    load_arrays(fresh, old)
    for name, x in as_arrays(fresh).items():
        if not name.endswith((".count", "errors0.variance", "errors.variance", "squares.variance")):
            np.testing.assert_allclose(x, now[name], rtol=1e-6, err_msg=name)
    assert float(fresh.heads.scale.value) == 1
