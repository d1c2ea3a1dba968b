"""The learner: one gradient step, its scales, its clipping, and what it does with numbers that are not finite."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from conftest import VECTOR, generator, known_batch, small, small_world
from gymnasium import spaces

from worldmodel import registry
from worldmodel.data import Batch
from worldmodel.errors import NumericsError
from worldmodel.learner import Learner, ScaleConfig, TrainConfig
from worldmodel.model import WorldModel
from worldmodel.spaces.specs import ACTION_MASK
from worldmodel.storage.weights import optimizer_arrays, restore_optimizer


def make_learner(world: WorldModel | None = None, **options) -> Learner:
    options = {"lr": 1e-2, "clip": 1e3, "burn_in": 0, "warmup": 0, "precision": "fp32", **options}
    options["scales"] = dict.fromkeys(ScaleConfig.model_fields, 1.0) | options.get("scales", {})
    return Learner(world or small_world(), TrainConfig(**options))


def step(learner: Learner, seed: int = 0, spoil=lambda batch: batch) -> dict[str, float]:
    """One update on the known batch with this seed; the metrics."""
    return learner.update(spoil(learner.prepare(known_batch(seed=seed))), generator(seed))[0]


def content(world: WorldModel) -> dict[str, torch.Tensor]:
    """Parameters and buffers, copied."""
    return {name: x.clone() for name, x in world.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# Scales ----------------------------------------------------------------------------------------------------------------


def test_every_loss_has_a_scale_and_every_scale_a_loss():
    parts = {"marginal": small("distribution", "gaussian"), "ensemble": small("ensemble", "standard", members=2)}
    parts["decoder"] = small("decoder", "diffusion")
    predictive = {"latent": "point", "dynamics": {"posterior": "observation"}, "objective": small("objective", "jepa")}
    masked = spaces.Dict({"vector": VECTOR, ACTION_MASK: spaces.Box(0, 1, (2,), bool)})
    scaled = set()
    for observation, options in ((VECTOR, {"latent": "gaussian", **parts}), (VECTOR, predictive), (masked, {})):
        world = small_world(observation, **options)
        batch = make_learner(world).prepare(known_batch(observation))
        losses = world.loss(world.trace(batch), batch)
        scaled |= {"cont" if name == "continue" else name.partition("/")[0] for name in losses}
    assert scaled == set(ScaleConfig.model_fields)


def test_a_loss_without_a_scale_is_an_error():
    with pytest.raises(AttributeError):
        make_learner().weight("novelty")


OWNERS = {
    "observation": ["objective.decoder"],
    "reward": ["heads.reward_net"],
    "cont": ["heads.cont_net"],
    "dyn": ["dynamics.transition", "dynamics.initial_prior"],
    "rep": ["dynamics.posterior_out"],
    "marginal": ["marginal"],
}
"""Where each loss, alone, must have a gradient; the others' own parts must have none."""


@pytest.mark.parametrize("alone", OWNERS)
def test_a_scale_counts_for_its_own_loss_alone(alone):
    world = small_world(latent="gaussian", marginal=small("distribution", "gaussian"))
    world.heads.reward_net[-1].weight.data += 0.1  # zero weights would hide the gradient
    learner = make_learner(world, scales={name: float(name == alone) for name in ScaleConfig.model_fields})
    before = content(world)
    step(learner)
    moved = {name for name, p in world.named_parameters() if not torch.equal(p, before[name])}
    for part in OWNERS[alone]:
        assert any(name.startswith(part) for name in moved)
    shared = ("dynamics.posterior_out",)  # every loss but dyn may pass through the posterior
    for part in set(itertools.chain(*OWNERS.values())) - set(OWNERS[alone]) - set(shared):
        assert not any(name.startswith(part) for name in moved), part


def test_a_scale_multiplies():
    gradients = []
    for scale in (1.0, 3.0):
        world = small_world()
        step(make_learner(world, clip=1e6, scales={name: scale for name in ScaleConfig.model_fields}))
        gradients.append(torch.cat([p.grad.flatten() for p in world.parameters() if p.grad is not None]))
    torch.testing.assert_close(3 * gradients[0], gradients[1])


def test_the_weights_of_the_rates_that_train_the_posterior_grow_over_the_warm_up():
    learner = make_learner(warmup=4, scales={"rep": 0.5, "marginal": 2.0, "dyn": 1.0})
    seen = []
    for seed in range(6):
        seen.append((learner.weight("rep"), learner.weight("marginal"), learner.weight("dyn")))
        step(learner, seed)
    assert [rep for rep, _, _ in seen] == [0, 0.125, 0.25, 0.375, 0.5, 0.5]
    assert [marginal for _, marginal, _ in seen] == [0, 0.5, 1.0, 1.5, 2.0, 2.0]
    assert {dyn for _, _, dyn in seen} == {1.0}


# One step --------------------------------------------------------------------------------------------------------------


def test_an_update_reports_what_it_lost_and_lowers_it():
    learner = make_learner()
    first = step(learner)
    assert {f"loss/{name}" for name in ("observation", "reward", "continue", "dyn", "rep")} < set(first)
    assert {"gradient_norm", "rate", "active_units"} < set(first) and all(np.isfinite(list(first.values())))
    for _ in range(30):
        last = step(learner)
    assert last["loss/observation"] < first["loss/observation"] and last["loss/reward"] < first["loss/reward"]
    assert learner.updates == 31 and learner.skipped == 0


def test_an_update_fits_the_deviation_of_the_decoder():
    learner = make_learner()
    learner.world.eval()
    before = learner.world.decoder.log_std("obs").clone()
    step(learner)
    assert not torch.equal(learner.world.decoder.log_std("obs"), before)


def test_batches_are_prepared_without_touching_them():
    space = spaces.Dict({"camera": spaces.Box(0, 255, (16, 16, 3), np.uint8), "gear": spaces.Discrete(3)})
    learner, raw = make_learner(small_world(space)), known_batch(space)
    copy = raw.map(torch.clone)
    prepared = learner.prepare(raw)
    assert prepared.obs["camera"].shape == (3, 6, 3, 16, 16) and prepared.obs["camera"].dtype == torch.float32
    assert prepared.obs["gear"].shape == (3, 6, 3) and torch.equal(prepared.reward, raw.reward)
    assert all(torch.equal(raw.obs[name], copy.obs[name]) for name in raw.obs)


def test_the_same_seed_gives_the_same_bits():
    worlds = [small_world(), small_world()]
    for world in worlds:
        learner = make_learner(world)
        for seed in range(3):
            step(learner, seed)
    assert same(*map(content, worlds))


def test_each_parameters_gradient_is_clipped_to_the_largest_norm_and_the_whole_one_reported_as_it_was():
    reported, norms = {}, {}
    for clip in (1e9, 1e-1, 1e-3):
        world = small_world()
        reported[clip] = step(make_learner(world, clip=clip))["gradient_norm"]
        norms[clip] = {name: float(p.grad.norm()) for name, p in world.named_parameters() if p.grad is not None}
    whole = norms[1e9]
    for clip in (1e-1, 1e-3):
        assert norms[clip] == pytest.approx({name: min(clip, norm) for name, norm in whole.items()}, rel=1e-4)
    assert any(0 < norm < 1e-1 for norm in whole.values()) and max(whole.values()) > 1e-1
    assert set(reported.values()) == {reported[1e9]} and reported[1e9] == pytest.approx(sum(n**2 for n in whole.values()) ** 0.5)


def test_the_learning_rate_stays_and_then_falls_as_one_over_the_root_of_the_updates():
    rates = []
    learner = make_learner(lr=1e-2, lr_decay_from=4)
    for seed in range(9):
        before = content(learner.world)["heads.cont_net.0.weight"]
        step(learner, seed)
        rates.append(learner.optimizer.param_groups[0]["lr"])
        assert not torch.equal(content(learner.world)["heads.cont_net.0.weight"], before)
    assert rates == pytest.approx([1e-2] * 4 + [1e-2 * (4 / n) ** 0.5 for n in range(5, 10)])
    learner.updates = 399  # as after a resume
    step(learner)
    assert learner.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)
    constant = make_learner(lr=1e-2)
    constant.updates = 399
    step(constant)
    assert constant.optimizer.param_groups[0]["lr"] == 1e-2


def test_burn_in_rows_warm_up_the_state_and_get_no_gradient():
    world = small_world()
    learner, plain = make_learner(world, burn_in=2), make_learner(small_world())
    batch = learner.prepare(known_batch())
    batch = batch.with_obs({name: x.requires_grad_() for name, x in batch.obs.items()})
    _, trace, covered = learner.update(batch, generator())
    _, cold, _ = plain.update(plain.prepare(known_batch()).window(2), generator())
    assert covered.shape == (3, 4) and torch.equal(covered.reward, batch.reward[:, 2:]) and trace.h.shape[1] == 4
    gradient = batch.obs["obs"].grad
    assert (gradient[:, :2] == 0).all() and (gradient[:, 2:].abs().sum(-1) > 0).all()
    assert (trace.h[2, 0] - cold.h[2, 0]).abs().max() > 1e-3  # row 2 goes on from what was burnt in
    torch.testing.assert_close(trace.h[0, 1], cold.h[0, 1])  # row 0 begins an episode there


@pytest.mark.parametrize("latent", registry.kinds("latent"))
@pytest.mark.parametrize("posterior", ["filtering", "observation"])
def test_bf16_runs_and_keeps_parameters_in_full_precision(posterior, latent):
    space = spaces.Dict({"camera": spaces.Box(0, 255, (16, 16, 3), np.uint8), "speed": spaces.Box(-1, 1, (2,), np.float32)})
    world = small_world(space, latent=latent, dynamics={"posterior": posterior})
    learner, before = make_learner(world, precision="bf16"), content(world)
    metrics = learner.update(learner.prepare(known_batch(space)), generator())[0]
    assert all(np.isfinite(list(metrics.values()))) and learner.updates == 1
    assert all(p.dtype == torch.float32 for p in world.parameters()) and not same(content(world), before)
    precise = make_learner(small_world(space, latent=latent, dynamics={"posterior": posterior}))
    full = precise.update(precise.prepare(known_batch(space)), generator())[0]
    assert metrics["loss/observation"] == pytest.approx(full["loss/observation"], rel=0.05)
    assert metrics["loss/observation"] != full["loss/observation"]


# Numbers that are not finite -------------------------------------------------------------------------------------------


def not_a_number(batch: Batch) -> Batch:
    obs = {name: x.clone() for name, x in batch.obs.items()}
    obs["obs"][1, 2, 0] = torch.nan
    return batch.with_obs(obs)


def test_an_observation_that_is_not_a_number_is_caught_at_its_update_and_changes_nothing():
    learner = make_learner()
    step(learner)
    before, state = content(learner.world), optimizer_arrays(learner.optimizer)
    metrics = step(learner, 1, not_a_number)
    assert np.isnan(metrics["loss/observation"])
    assert (learner.updates, learner.skipped) == (1, 1)
    weights = {name for name, _ in learner.world.named_parameters()}
    assert same({k: x for k, x in content(learner.world).items() if k in weights}, {k: before[k] for k in weights})
    assert all(np.array_equal(x, state[name]) for name, x in optimizer_arrays(learner.optimizer).items())
    assert all(x.isfinite().all() for x in content(learner.world).values())
    assert all(np.isfinite(list(step(learner, 2).values()))) and learner.updates == 2


def test_the_loss_that_a_broken_parameter_spoils_is_named_after_three_updates_in_a_row():
    learner = make_learner()
    learner.world.heads.reward_net[-1].bias.data[3] = torch.nan
    for _ in range(2):
        metrics = step(learner)
        assert [name for name, value in metrics.items() if not np.isfinite(value)] == ["loss/reward"]
    where = r"heads\.reward_net\.\d+\.bias, loss/reward"
    with pytest.raises(NumericsError, match=rf"Update 3: not finite: {where}; 3 updates in a row.*lower train\.lr"):
        step(learner)
    assert (learner.updates, learner.skipped) == (0, 3)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_is_skipped_and_its_parameter_named(bad):
    learner = make_learner()
    learner.world.decoder.perceptron.bent[0].weight.register_hook(lambda gradient: gradient * bad)
    before = content(learner.world)
    for _ in range(2):
        assert not np.isfinite(step(learner)["gradient_norm"])
    weights = {name for name, _ in learner.world.named_parameters()}
    assert all(torch.equal(x, before[name]) for name, x in content(learner.world).items() if name in weights)
    with pytest.raises(NumericsError, match=r"not finite: objective\.decoder\.perceptron\.bent\.0\.weight;"):
        step(learner)


def test_two_bad_updates_are_forgiven_as_often_as_good_ones_come_between():
    learner = make_learner()
    for _ in range(3):
        step(learner, 0, not_a_number)
        step(learner, 1, not_a_number)
        step(learner, 2)
    assert (learner.updates, learner.skipped) == (3, 6)


# The optimiser's state -------------------------------------------------------------------------------------------------


def test_a_restored_optimiser_takes_the_same_next_step():
    one = make_learner()
    for seed in range(3):
        step(one, seed)
    arrays = optimizer_arrays(one.optimizer)
    assert all(isinstance(x, np.ndarray) for x in arrays.values())
    other, cold = make_learner(small_world(seed=9)), make_learner(small_world(seed=9))
    for learner in (other, cold):
        learner.world.load_state_dict(one.world.state_dict())
    restore_optimizer(other.optimizer, {name: x.copy() for name, x in arrays.items()})
    for learner in (one, other, cold):
        step(learner, 3)
    assert same(content(one.world), content(other.world)) and not same(content(one.world), content(cold.world))


def test_what_was_taken_out_of_an_optimiser_is_no_view_of_it_after_restoring():
    one, other = make_learner(), make_learner()
    step(one)
    arrays = optimizer_arrays(one.optimizer)
    restore_optimizer(other.optimizer, arrays)
    kept = {name: x.copy() for name, x in arrays.items()}
    step(other)
    assert all(np.array_equal(arrays[name], kept[name]) for name in arrays)


def test_an_optimiser_that_never_stepped_restores_to_one_that_never_stepped():
    one, other = make_learner(), make_learner()
    assert optimizer_arrays(one.optimizer) == {}
    restore_optimizer(other.optimizer, {})
    step(one)
    step(other)
    assert same(content(one.world), content(other.world))


# The average ------------------------------------------------------------------------------------------------------------


def test_the_average_is_the_exponential_mean_of_the_weights_after_each_update():
    learner = make_learner(ema_decay=0.9)
    expected = {name: p.detach().clone() for name, p in learner.world.named_parameters()}
    for i in range(1, 5):
        step(learner, i)
        keep = min(0.9, i / (i + 10))
        expected = {name: keep * expected[name] + (1 - keep) * p.detach() for name, p in learner.world.named_parameters()}
    for name, p in learner.ema.named_parameters():
        torch.testing.assert_close(p, expected[name])
    assert not any(p.requires_grad for p in learner.ema.parameters())
    assert not same(content(learner.ema), content(learner.world))


def test_the_average_shares_what_was_observed_and_takes_over_what_was_fitted():
    learner = make_learner(ema_decay=0.9)
    learner.world.scaling.update({"obs": 5 + torch.randn(50, 4, generator=generator())})
    assert float(learner.ema.scaling.count) == 50
    step(learner)
    assert torch.equal(learner.ema.decoder.log_std("obs"), learner.world.decoder.log_std("obs"))


def test_an_update_that_is_skipped_leaves_the_average_as_it_was():
    learner = make_learner(ema_decay=0.9)
    step(learner)
    before = content(learner.ema)
    learner.world.heads.reward_net[-1].bias.data[3] = torch.nan
    step(learner)
    assert learner.skipped == 1 and same(content(learner.ema), before)


def test_without_averaging_there_is_one_model():
    learner = make_learner(ema_decay=0.0)
    assert learner.ema is learner.world
