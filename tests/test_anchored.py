"""Anchored dynamics: a latent that is the observation, predicted by its change; exact, finite everywhere, and of known spread."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import IMAGE, generator, reached, small, small_world, unchecked
from gymnasium import spaces
from torch import Tensor

from worldmodel.data import Batch, Sampling, State, Trace
from worldmodel.envs import ImaginedVecEnv
from worldmodel.errors import ConfigError
from worldmodel.learner import Learner, TrainConfig
from worldmodel.model import WorldModel, needs_ensemble

MODE = Sampling(mode=True)
MIXED = spaces.Dict(
    {
        "arm": spaces.Box(-np.inf, np.inf, (3,), np.float32),
        "eye": IMAGE,
        "lamp": spaces.MultiDiscrete([3, 2]),
        "keys": spaces.MultiBinary(4),
    }
)


def vector(size: int) -> spaces.Box:
    return spaces.Box(-np.inf, np.inf, (size,), np.float32)


def anchored(space: spaces.Space, transition: str = "ensemble", **parts) -> WorldModel:
    """A small anchored model whose encoder and decoder are its own."""
    options = {"members": 4, "units": 32, "spread_units": 16} if transition == "ensemble" else {}
    law = small("distribution", transition, **options)
    return small_world(space, latent="gaussian", dynamics={"kind": "anchored", "deter": 16}, transition=law, **parts)


def batch_of(obs: dict[str, Tensor], reward: Tensor | None = None, opens: bool = True) -> Batch:
    """Windows [B, T] of random actions; `opens`: each begins an episode, else it opens within one."""
    shape = next(iter(obs.values())).shape[:2]
    action = torch.eye(2)[torch.randint(2, (shape[0], shape[1] + 1), generator=generator(1))]
    first, no = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    first[:, 0] = opens
    previous = action[:, :-1] * (~first).unsqueeze(-1)
    return Batch(obs, action[:, 1:], previous, torch.zeros(shape) if reward is None else reward, first, no, no)


def seen(world: WorldModel, rows: dict[str, Tensor]) -> None:
    """Takes raw rows [B, T, ...] into the statistics that observations are scaled by."""
    world.scaling.update(world.obs.canonical({name: x.flatten(0, 1) for name, x in rows.items()}))


def samples(space: spaces.Dict, batch: int = 4, length: int = 6) -> dict[str, Tensor]:
    space.seed(0)
    found = [space.sample() for _ in range(batch * length)]
    return {name: torch.from_numpy(np.stack([x[name] for x in found])).unflatten(0, (batch, length)) for name in space}


def traced(world: WorldModel, batch: Batch) -> tuple[Trace, Batch]:
    """(trace by the mode, prepared batch), with gradients."""
    batch = batch.with_obs(world.preprocess(batch.obs))
    return world.trace(batch, None, MODE), batch


def walk(size: int = 1, sigma: float = 1.0, batch: int = 16, length: int = 16, seed: int = 0) -> Tensor:
    """Random walks [B, T, D] whose steps have deviation `sigma`."""
    g = generator(seed)
    return 3 * sigma * torch.randn(batch, 1, size, generator=g) + (sigma * torch.randn(batch, length, size, generator=g)).cumsum(1)


def train(world: WorldModel, draw, updates: int, **options) -> Learner:
    """`updates` updates on what `draw(seed)` gives as a Batch."""
    seen(world, draw(0).obs)
    learner = Learner(world, TrainConfig(**{"lr": 3e-3, "ema_decay": 0.95, "warmup": 0, **options}))
    with unchecked():
        for seed in range(updates):
            learner.update(learner.prepare(draw(seed)), generator(seed))
    learner.ema.eval()
    return learner


@torch.no_grad()
def dreamt(world: WorldModel, state: State, steps: int, seed: int = 0) -> list[State]:
    """States of a dream of random actions."""
    sampling, states = Sampling(generator=generator(seed)), []
    actions = torch.eye(2)[torch.randint(2, (steps, len(state["z"])), generator=generator(seed))]
    with unchecked():
        for action in actions:
            state = world.dynamics.imagine(state, action, sampling)
            states.append(state)
    return states


@pytest.fixture(scope="module")
def walker() -> WorldModel:
    """A model that has learned random walks with steps of deviation 0.7."""
    draw = lambda seed: batch_of({"obs": walk(2, 0.7, length=8, seed=seed)}, opens=bool(seed % 2))  # noqa: E731
    return train(anchored(vector(2)), draw, 250).ema


# Encode and decode ------------------------------------------------------------------------------------------------------


def test_what_was_seen_comes_back_exactly_however_far_from_the_data():
    world, rows = anchored(MIXED).eval(), samples(MIXED)
    scale = torch.tensor([5.0, 1e-3, 1e4])
    seen(world, {**rows, "arm": 3 + scale * torch.randn(4, 6, 3, generator=generator())})
    far = torch.logspace(-2, 3, 24).view(4, 6, 1) * scale * torch.randn(4, 6, 3, generator=generator(1)).sign()
    rows = {**rows, "arm": 3 + far}
    with torch.no_grad():
        trace, _ = traced(world, batch_of(rows))
        back, wanted = world.decode(trace.feature.flatten(0, 1)), world.obs.canonical(rows)
    tolerance = 1e-5 * (3 + far.abs())  # of float32 numbers whose logarithm was taken
    assert ((back["arm"].unflatten(0, (4, 6)) - rows["arm"]).abs() <= tolerance).all()
    for name in ("lamp", "keys"):
        assert torch.equal(back[name].unflatten(0, (4, 6)), wanted[name].float())


def test_a_latent_alone_is_an_observation():
    world = anchored(vector(3)).eval()
    z = torch.randn(5, 3, generator=generator())
    assert torch.equal(world.decode(z)["obs"], world.scaling.inverse({"obs": z})["obs"])


@pytest.mark.parametrize("objective", ["jepa", "hybrid"])
def test_an_objective_that_learns_latents_is_refused_where_they_are_observations(objective):
    with pytest.raises(ConfigError, match=rf"model\.objective\.kind={objective} has no place.*anchored.*model=gaussian"):
        anchored(vector(2), objective={"kind": objective})


def test_a_roll_out_through_observations_is_one_through_latents():
    dreams = []
    for rollouts in ("latent", "observation"):
        world = anchored(vector(2), rollouts=rollouts).eval()
        trace, batch = traced(world, batch_of({"obs": walk(2)}))
        policy = lambda feature, step, batch=batch: batch.action[:, step]  # noqa: E731
        dreams.append(world.imagine(trace.last.map(torch.Tensor.detach), policy, 4, Sampling(generator=generator())))
    torch.testing.assert_close(dreams[0].feature, dreams[1].feature)


def test_half_precision_is_kept_from_what_was_seen():
    space = spaces.Dict({"arm": vector(2), "eye": IMAGE})
    world, rows = anchored(space), samples(space)
    learner = Learner(world, TrainConfig(warmup=0, precision="bf16"))
    metrics, trace, batch = learner.update(learner.prepare(batch_of(rows)), generator())
    assert np.isfinite(list(metrics.values())).all() and all(p.dtype == torch.float32 for p in world.parameters())
    assert trace.z.dtype == torch.float32 and torch.equal(trace.z[..., :2], batch.obs["arm"])


def test_pictures_vectors_categories_and_bits_are_learned_imagined_and_drawn_together():
    world, rows = anchored(MIXED), samples(MIXED)
    before = {name: p.detach().clone() for name, p in world.named_parameters()}
    learner = Learner(world, TrainConfig(lr=1e-3, warmup=0))
    seen(world, rows)
    for seed in range(2):
        metrics, *_ = learner.update(learner.prepare(batch_of(rows)), generator(seed))
    assert np.isfinite(list(metrics.values())).all() and {"dyn", "rep", "observation"} <= {name.split("/")[-1] for name in metrics}
    moved = {name.split(".")[0] for name, p in world.named_parameters() if not torch.equal(p, before[name])}
    assert {"encoder", "dynamics", "objective", "heads"} <= moved
    env = ImaginedVecEnv(world, 3, horizon=4, start="prior", observation="decoded", seed=0)
    obs, first = env.reset(), None
    for _ in range(6):
        for row in range(3):
            assert MIXED.contains({name: x[row].astype(MIXED[name].dtype) for name, x in obs.items()})
        first = first or obs
        obs = env.step(np.array([0, 1, 0]))[0]
    assert any(not np.array_equal(first[name], obs[name]) for name in ("arm", "lamp", "keys"))


def test_a_world_of_categories_alone_is_learned_and_has_no_members():
    def draw(seed: int) -> Batch:
        batch = batch_of({"obs": torch.zeros(8, 6, 1)})
        start = torch.randint(6, (8, 1), generator=generator(seed))
        moved = (1 + batch.prev_action[..., 1].long()).cumsum(1) - 1
        return batch.with_obs({"obs": ((start + moved) % 6)})

    world = train(anchored(spaces.Discrete(6)), draw, 80, lr=1e-2).ema
    trace, batch = traced(world, draw(999))
    dream = world.dynamics.imagine(trace.states.index((slice(None), 4)), batch.prev_action[:, 5], MODE)
    assert torch.equal(dream["z"].argmax(-1), batch.obs["obs"][:, 5].argmax(-1))
    every = torch.eye(6).unsqueeze(1).expand(-1, 8, -1)
    total = world.dynamics.transition.log_prob(every, trace.h[:, 5].expand(6, -1, -1)).exp().sum(0)
    torch.testing.assert_close(total, torch.ones(8))
    assert not world.has_uncertainty and world.dynamics.latent.size == 6


# Numbers of every kind --------------------------------------------------------------------------------------------------


def jumps(seed: int) -> Tensor:
    x = walk(2, 1e-3, seed=seed)
    return x + (torch.rand(x.shape, generator=generator(seed + 50)) < 0.01)  # a thousand deviations of a step


NUMBERS = {
    "constant": (2, lambda seed: torch.full((16, 16, 2), 7.0)),
    "huge": (2, lambda seed: walk(2, 1e6, seed=seed)),
    "tiny": (2, lambda seed: walk(2, 1e-6, seed=seed)),
    "jumping": (2, jumps),
    "one": (1, lambda seed: walk(1, seed=seed)),
    "four hundred": (400, lambda seed: walk(400, batch=4, length=6, seed=seed)),
}


@pytest.mark.parametrize("kind", NUMBERS)
def test_observations_of_every_size_are_learned_and_their_dreams_stay_finite(kind):
    size, numbers = NUMBERS[kind]
    world = anchored(vector(size))
    learner = train(world, lambda seed: batch_of({"obs": numbers(seed)}, opens=bool(seed % 2)), 20)
    batch = learner.prepare(batch_of({"obs": numbers(0)}))
    metrics, trace, _ = learner.update(batch, generator())
    assert np.isfinite(list(metrics.values())).all()
    assert all(p.isfinite().all() for p in world.parameters())
    states = dreamt(learner.ema.eval(), trace.last.map(torch.Tensor.detach), 200)
    assert all(state["z"].isfinite().all() and state["uncertainty"].isfinite().all() for state in states)
    decoded = world.decode(world.dynamics.feature(states[-1]))["obs"]
    assert decoded.isfinite().all()


def test_drawn_numbers_are_compressed_far_beyond_what_was_seen_and_nowhere_else():
    change = anchored(vector(2)).dynamics.transition
    change.largest = torch.tensor([1.0, 3.0])
    inside = torch.tensor([[3.9, -7.9]])
    assert torch.equal(change._bounded(inside), inside)
    outside = change._bounded(torch.tensor([[1e30, -1e30]]))
    assert (outside.abs() > torch.tensor([4.0, 8.0])).all() and (outside.abs() < 100).all() and outside[0, 1] < 0


def test_a_dream_stays_near_what_was_seen_also_where_latents_are_logarithms():
    world = anchored(vector(2))
    change = world.dynamics.transition
    seen = world.scaling({"obs": torch.tensor([[15.0, 150.0]])})["obs"]  # in deviations, the second beyond their range
    change.largest = seen[0].float()
    drawn = change._bounded(torch.tensor([[1e30, 1e30]]))
    far = world.scaling.inverse({"obs": drawn})["obs"]
    assert (far.abs() < 10 * torch.tensor([15.0, 150.0])).all()
    assert (far.abs() > torch.tensor([15.0, 150.0])).all()


# The first row, and the first prediction --------------------------------------------------------------------------------


def test_where_a_window_opens_within_an_episode_nothing_is_learned_of_its_first_row():
    space = spaces.Dict({"arm": vector(2), "lamp": spaces.Discrete(3)})
    world = anchored(space)
    trace, batch = traced(world, batch_of(samples(space), opens=False))
    loss = world.dynamics.losses(trace, batch, Sampling())["dyn"].value
    parameters = dict(world.dynamics.named_parameters())
    assert not reached(loss[:, 0], **parameters)
    assert {name.split(".")[0] for name in reached(loss[:, 1], **parameters)} == {"transition"}
    torch.testing.assert_close(loss[:, 0], torch.full((4,), float(np.log(3))))  # a category of which nothing is known
    first = batch_of(samples(space))
    begun, first = traced(world, first)
    assert "initial_prior" in {
        name.split(".")[0] for name in reached(world.dynamics.losses(begun, first, Sampling())["dyn"].value[:, 0], **parameters)
    }


def test_before_anything_is_learned_the_next_observation_is_nearly_the_last():
    world, x = anchored(vector(2)), walk(2, 1e-2)
    seen(world, {"obs": x})
    trace, batch = traced(world, batch_of({"obs": x}))
    world.dynamics.losses(trace, batch, Sampling())  # takes in how large changes are
    world.eval()
    with torch.no_grad():
        dream = world.dynamics.imagine(trace.states.index((slice(None), 5)), batch.prev_action[:, 6], MODE)
    change, persistence = dream["z"] - trace.z[:, 5], trace.z[:, 6] - trace.z[:, 5]
    assert change.square().mean().sqrt() < 0.6 * persistence.square().mean().sqrt()


def test_at_first_neither_memory_nor_the_last_change_is_read():
    world = anchored(vector(2)).eval()
    dynamics = world.dynamics
    trace, _ = traced(world, batch_of({"obs": walk(2)}))
    h, reads = trace.h[:, 3], dynamics.transition.reads
    other = h.clone()
    other[:, reads.first : reads.before] += torch.randn(16, reads.before - reads.first, generator=generator())
    other[:, reads.after : reads.after + 2] += 1
    one, same = (dynamics.transition.draw(x, 1, MODE)[0] for x in (h, other))
    assert torch.equal(one, same) and all(not gate.any() for gate in dynamics.transition.gates)
    for gate in dynamics.transition.gates:
        gate.data += 0.5
    assert not torch.equal(*(dynamics.transition.draw(x, 1, MODE)[0] for x in (h, other)))


# What is learned --------------------------------------------------------------------------------------------------------


def test_what_an_observation_hides_is_remembered():
    """Steps of +1, +1, -2 from anywhere: the last change does not say what comes next, and the one before does."""

    def draw(seed: int) -> Batch:
        start = 20 * torch.rand(16, 1, generator=generator(seed))
        phase = torch.randint(3, (16, 1), generator=generator(seed + 1))
        return batch_of({"obs": (start + (phase + torch.arange(10)) % 3).unsqueeze(-1)})

    world = train(anchored(vector(1)), draw, 180, lr=1e-2).ema
    trace, _ = traced(world, draw(9999))
    with torch.no_grad():
        means = world.dynamics.transition.draw(trace.h[:, 4:].flatten(0, 1), 1, MODE)[0][0]
    error = world.scaling.deviation("obs") * (means - trace.z[:, 4:].flatten(0, 1))
    assert error.square().mean().sqrt() < 0.4, "a model without memory has 1.2, and one that predicts no change 1.4"


def by_rows(categories: Tensor) -> Batch:
    """Windows [B, T] of a store, whose rows have numbers."""
    batch = batch_of({"obs": categories})
    return replace(batch, row=torch.arange(categories.numel()).view_as(categories))


@torch.no_grad()
def surprise(world: WorldModel, batch: Batch) -> float:
    """-ln p(z_t | h_t) on average, of the rows from the fifth on."""
    trace, _ = traced(world, batch)
    return float(-world.dynamics.transition.log_prob(trace.z[:, 4:], trace.h[:, 4:]).mean())


def test_a_memory_that_learns_chance_by_heart_is_not_used():
    known, new = (by_rows(torch.randint(4, (16, 24), generator=generator(seed))) for seed in (0, 1))
    world = train(anchored(spaces.Discrete(4)), lambda seed: known, 200, lr=1e-2).ema
    assert surprise(world, new) < math.log(4) + 0.2, "chance among four"
    world.dynamics.transition.evidence.mean += 100
    assert surprise(world, known) < math.log(4) - 0.3 and surprise(world, new) > math.log(4) + 0.5, "with the memory"


def test_a_memory_that_tells_what_comes_is_used():
    """0, 0, 1, 0, 0, 1, ... from anywhere: what follows a 0 is known to who remembers what was before it."""
    draw = lambda seed: by_rows((torch.randint(3, (16, 1), generator=generator(seed)) + torch.arange(24)) % 3 // 2)  # noqa: E731
    world = train(anchored(spaces.Discrete(2)), draw, 150, lr=1e-2).ema
    assert surprise(world, draw(999)) < 0.1
    world.dynamics.transition.evidence.mean -= 100
    assert surprise(world, draw(999)) > 0.3, "without the memory"


def test_draws_cover_a_random_walk_as_often_as_they_say(walker):
    x = walk(2, 0.7, batch=300, length=10, seed=77)
    trace, _ = traced(walker, batch_of({"obs": x}))
    start, many = trace.states.index((slice(None), 3)), 60
    rows = start.map(lambda y: y.repeat_interleave(many, 0).detach())
    for horizon, state in enumerate(dreamt(walker, rows, 5), 1):
        draws = walker.scaling.inverse({"obs": state["z"]})["obs"].view(300, many, 2)
        low, high = draws.quantile(0.05, 1), draws.quantile(0.95, 1)
        truth = x[:, 3 + horizon]
        covered = float(((low < truth) & (truth < high)).float().mean())
        assert 0.85 <= covered <= 0.95, (horizon, covered)
        spread = float((draws - x[:, 3:4]).square().mean().sqrt())
        assert spread == pytest.approx(0.7 * horizon**0.5, rel=0.15)


def test_a_reward_of_what_was_shown_at_the_first_step_alone_is_learned():
    def draw(seed: int) -> Batch:
        x = torch.randn(16, 6, 2, generator=generator(seed))
        x[..., 1] = 0
        x[:, 0, 1] = torch.randint(2, (16,), generator=generator(seed + 1)) * 2.0 - 1
        return batch_of({"obs": x}, reward=x[:, :1, 1].expand(-1, 6).contiguous())

    world = train(anchored(vector(2)), draw, 150, lr=1e-2).ema
    trace, batch = traced(world, draw(9999))
    error = (world.heads.reward(trace.feature) - batch.reward)[:, 1:].abs()
    assert error.mean() < 0.2, "without the memory n it is 1"
    forgotten = trace.feature.clone()
    forgotten[..., : world.config.dynamics.deter] = 0
    assert (world.heads.reward(forgotten) - batch.reward)[:, 3:].abs().mean() > 0.5  # nothing else of h reaches back that far


# Gradients --------------------------------------------------------------------------------------------------------------


def test_rewards_and_ends_train_their_own_memory_and_no_part_of_the_transition():
    world = anchored(MIXED)
    for p in world.parameters():
        p.data += 0.05 * torch.randn(p.shape, generator=generator())  # opens the gates
    trace, batch = traced(world, batch_of(samples(MIXED)))
    losses, parameters = world.loss(trace, batch), dict(world.named_parameters())
    memories = [p for name, p in parameters.items() if name.startswith("dynamics.memories.")]
    for name, own in (("reward", 0), ("continue", 0), ("dyn", 1)):
        parts = {".".join(p.split(".")[:2]) for p in reached(losses[name].mean(), **parameters) if p.startswith("dynamics.")}
        transition = {"dynamics.transition", "dynamics.initial_prior"}
        assert parts & transition == (transition if name == "dyn" else set())
        for gradient in torch.autograd.grad(losses[name].mean(), memories, retain_graph=True):
            assert gradient[own].any() and not gradient[1 - own].any()


# Members ----------------------------------------------------------------------------------------------------------------


def test_one_member_imagines_a_whole_dream_and_the_mode_is_the_mean_of_all(walker):
    trace, batch = traced(walker, batch_of({"obs": walk(2, 0.7, batch=40)}))
    start = trace.last.map(torch.Tensor.detach)
    states = dreamt(walker, start, 5)
    members = states[0]["member"]
    assert not start["member"].any() and set(members.flatten().tolist()) == {1.0, 2.0, 3.0, 4.0}
    assert all(torch.equal(state["member"], members) for state in states)
    change, h = walker.dynamics.transition, trace.h[:, 5].detach()
    noiseless = Sampling(noise=torch.zeros(1, 40, 2))
    each = torch.stack([change.draw(h, 1, noiseless, torch.full((40,), k))[0][0] for k in range(4)])
    torch.testing.assert_close(change.draw(h, 1, MODE)[0][0], each.mean(0))
    assert (each.std(0) > 0).all()
    torch.testing.assert_close(change.draw(h, 1, MODE)[1], each.var(0).mean(-1).sqrt(), rtol=1e-3, atol=1e-6)
    silent = walker.dynamics.imagine(start, batch.prev_action[:, 0], MODE)
    assert not silent["member"].any()


def test_a_dream_is_the_same_where_its_uncertainty_is_not_asked_for(walker):
    trace, batch = traced(walker, batch_of({"obs": walk(2, 0.7, batch=40)}))
    start, policy = trace.last.map(torch.Tensor.detach), lambda feature, step: batch.action[:, step]
    asked, plain = (
        walker.imagine(start, policy, 4, Sampling(generator=generator(), uncertainty=uncertainty)) for uncertainty in (True, False)
    )
    torch.testing.assert_close(asked.feature, plain.feature)
    assert (asked.uncertainty > 0).all() and not plain.uncertainty.any()


def test_members_disagree_far_from_the_data_more_than_on_it(walker):
    def uncertainty(shift: float) -> Tensor:
        trace, batch = traced(walker, batch_of({"obs": shift + walk(2, 0.7, batch=40)}))
        policy = lambda feature, step: batch.action[:, 0]  # noqa: E731
        return walker.imagine(trace.last.map(torch.Tensor.detach), policy, 3, Sampling(generator=generator())).uncertainty

    on, off = uncertainty(0.0), uncertainty(60.0)
    assert on.shape == (40, 3) and (on > 0).all() and off.mean() > 3 * on.mean()


def test_an_ensemble_in_the_transition_is_one_that_options_may_ask_for():
    needs_ensemble(anchored(vector(2)), "penalty", 1.0)
    for other in (anchored(vector(2), "gaussian"), anchored(spaces.Discrete(3))):
        with pytest.raises(ConfigError, match=r"penalty=1 needs uncertainty"):
            needs_ensemble(other, "penalty", 1.0)


def test_deviations_are_calibrated_on_the_errors_of_the_averaged_weights():
    world = anchored(vector(2))
    learner = train(world, lambda seed: batch_of({"obs": walk(2, seed=seed)}), 6)
    assert float(world.dynamics.transition.form.calibration.count) == 1  # at every fifth update
    batch, used = learner.prepare(batch_of({"obs": walk(2, seed=3)})), copy.deepcopy(learner.ema)
    used.dynamics.transition.form.means.out.bias.data += 10.0  # errors of ten deviations and more
    weights = {name: p.detach().clone() for name, p in world.named_parameters()}
    form = world.dynamics.transition.form
    before = form.calibration.mean
    world.calibrate(used, batch)
    assert (form.calibration.mean[0] > before[0] + 20).all() and float(form.calibration.count) == 2
    assert all(torch.equal(p, weights[name]) for name, p in world.named_parameters())
    spread = form.members_given(torch.zeros(1, form.context_dim))[1] / form._uncalibrated(torch.zeros(1, form.context_dim))[1]
    errors, predicted = form.calibration.mean
    torch.testing.assert_close(spread, (errors / predicted).sqrt().float().expand(4, 1, 2))


def test_draws_are_as_wide_as_their_errors_where_a_few_rows_err_far_more_than_was_predicted():
    form = anchored(vector(1)).dynamics.transition.form
    rows = torch.zeros(1000, form.context_dim)
    mean, std = (x[0, 0, 0] for x in form._uncalibrated(rows[:1]))
    errors = torch.where(torch.arange(1000) % 100 == 0, 30.0, 0.3) * std
    x = (mean + errors).unsqueeze(-1).detach()
    with torch.no_grad():
        for net in (form.means, form.log_stds):  # members that agree
            for layer in net.modules():
                for p in layer.parameters(recurse=False):
                    p.copy_(p[:1].expand_as(p))
        form.calibrate(form, x, rows)
        drawn = form.members_given(rows)[1]
    torch.testing.assert_close(drawn.square().mean(), errors.square().mean(), rtol=1e-3, atol=0)
