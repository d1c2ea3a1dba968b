"""Open-loop errors against a world whose answer is known by hand, and measures of the latent space."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import generator, known_batch, small, small_world
from gymnasium import spaces

from worldmodel import registry
from worldmodel.data import Batch, Dream, Episodes, Sampling, State
from worldmodel.diagnostics.geometry import filter_episodes, interpolation, traversal, usage
from worldmodel.diagnostics.rollouts import open_loop, roll_out

LINE = spaces.Box(-np.inf, np.inf, (2,), np.float32)
STEP, BIAS, DEVIATION = torch.tensor([1.0, 10.0]), torch.tensor([0.1, 0.0]), torch.tensor([2.0, 5.0])


def line_episodes(*lengths: int) -> Episodes:
    """Two numbers that grow by 1 and 10 at each row; the action taken at row t of an episode is the category t % 2; reward 1."""
    rows, first, action = [], [], []
    for n, length in enumerate(lengths):
        t = torch.arange(length, dtype=torch.float32)
        rows.append(100 * n + t.unsqueeze(-1) * STEP)
        first.append(t == 0)
        action.append(torch.eye(2)[(t % 2).long()])
        action[-1][-1] = 0
    first = torch.cat(first).unsqueeze(0)
    last = torch.cat([first[:, 1:], torch.ones(1, 1, dtype=torch.bool)], 1)
    taken = torch.cat(action).unsqueeze(0)
    previous = torch.cat([torch.zeros(1, 1, 2), taken[:, :-1]], 1)
    return Episodes(Batch({"obs": torch.cat(rows).unsqueeze(0)}, taken, previous, (~first).float(), first, last, last))


class Oracle:
    """Methods for a world model that knows how the line grows, but for a bias in each step; it writes down the actions it gets."""

    def __init__(self, bias: torch.Tensor = BIAS):
        self.bias, self.actions, self.seen = bias, [], []

    def trace(self, batch, state=None, sampling=None):
        self.seen.append(batch)
        return SimpleNamespace(last=State({"x": batch.obs["obs"][:, -1]}), feature=batch.obs["obs"])

    def imagine(self, state, policy, horizon, sampling=None):
        features, actions = [state["x"]], []
        for step in range(horizon):
            actions.append(policy(features[-1], step))
            features.append(features[-1] + STEP + self.bias)
        self.actions.append(torch.stack(actions, 1))
        half = torch.full((len(features[0]), horizon), 0.5)
        return Dream(self.actions[-1], half, half, torch.zeros_like(half), torch.stack(features, 1), State({"x": features[-1]}))

    def installed(self):
        world = small_world(LINE, vector_scaling="raw")
        world.trace, world.imagine, world.decode = self.trace, self.imagine, lambda feature: {"obs": feature}
        world.scaling.deviation = lambda name: DEVIATION
        return world


# Episodes ---------------------------------------------------------------------------------------------------------------


def test_windows_stay_within_their_episode():
    episodes = line_episodes(4, 7)
    assert episodes.offsets.tolist() == [0, 4] and episodes.lengths.tolist() == [4, 7]
    window, inside = episodes.windows(torch.tensor([0, 1]), torch.tensor([2, 3]), 3)
    assert window.obs["obs"][..., 0].tolist() == [[2, 3, 3], [103, 104, 105]]
    assert inside.tolist() == [[True, True, False], [True, True, True]]


# Errors by horizon ------------------------------------------------------------------------------------------------------


def test_errors_grow_with_the_bias_and_are_in_deviations():
    errors = open_loop(Oracle().installed(), line_episodes(12, 25), 5, 15, samples=2)
    for h in errors.horizons:
        assert float(errors.error()[h - 1]) == pytest.approx(math.sqrt(((h * BIAS / DEVIATION) ** 2).mean()), rel=1e-4)
        assert float(errors.baseline()[h - 1]) == pytest.approx(math.sqrt(((h * STEP / DEVIATION) ** 2).mean()), rel=1e-4)
        assert float(errors.ratio()[h - 1]) == pytest.approx(float(errors.error()[h - 1] / errors.baseline()[h - 1]))
    assert errors.reward.tolist() == [0.5] * 15
    key, index, error, ratio = errors.worst(10, ["obs"])
    assert (key, index) == ("obs", 0) and error == pytest.approx(0.5, rel=1e-4) and ratio == pytest.approx(0.1, rel=1e-4)


def test_a_start_counts_at_every_horizon_that_fits():
    errors = open_loop(Oracle().installed(), line_episodes(12, 25), 5, 15)
    assert errors.count.tolist() == [3] * 7 + [2] * 3 + [1] * 5
    assert open_loop(Oracle().installed(), line_episodes(12, 25), 5, 15, every=5).count[0] == 2 + 4


def test_errors_are_reported_by_the_part_of_the_episode_in_which_a_dream_starts():
    errors = open_loop(Oracle().installed(), line_episodes(12, 260), 5, 15, samples=2)
    assert {name: int(part.count[0]) for name, part in errors.parts.items()} == {"0-50": 1 + 5, "50-200": 15, "200-": 6}
    assert sum(part.count for part in errors.parts.values()).equal(errors.count)
    for part in errors.parts.values():
        torch.testing.assert_close(part.error(), errors.error(), rtol=1e-4, atol=0)  # the bias is the same everywhere


def test_the_continue_head_is_scored_by_brier_on_arrival():
    errors = open_loop(Oracle().installed(), line_episodes(8), 5, 4)
    assert errors.cont[:3].tolist() == [0.25] * 3 and errors.cont[3].isnan()


def test_a_horizon_that_fits_nowhere_has_no_number():
    errors = open_loop(Oracle().installed(), line_episodes(8, 6), 5, 5)
    assert errors.longest(5) == 3 and errors.longest(2) == 2
    for column in (errors.error(), errors.baseline(), errors.ratio(), errors.reward, errors.cont):
        assert column[:3].isfinite().all() and column[3:].isnan().all()
    assert errors.worst(4, ["obs"]) is None
    nothing = open_loop(Oracle().installed(), line_episodes(5, 3), 5, 5)
    assert nothing.longest(5) is None and nothing.error().isnan().all()


def test_the_model_sees_the_context_alone_and_dreams_under_the_recorded_actions():
    oracle = Oracle()
    open_loop(oracle.installed(), line_episodes(20), 5, 4, samples=3, every=10)
    (seen,), (actions,) = oracle.seen, oracle.actions
    assert seen.obs["obs"].shape == (6, 5, 2) and seen.obs["obs"][3, :, 0].tolist() == [10, 11, 12, 13, 14]
    assert seen.is_first[:, 0].tolist() == [True] * 3 + [False] * 3
    assert actions[0].argmax(-1).tolist() == [0, 1, 0, 1] == [t % 2 for t in (4, 5, 6, 7)]
    assert torch.equal(actions[3], torch.eye(2)[[0, 1, 0, 1]])


def test_predictions_are_the_mean_over_samples():
    """Roll-outs that miss by +1 and -1 in turn are right on average."""
    oracle = Oracle(torch.zeros(2))
    world, truth = oracle.installed(), oracle.imagine

    def imagine(state, policy, horizon, sampling=None):
        dream = truth(state, policy, horizon, sampling)
        sign = torch.tensor([1.0, -1.0]).repeat(len(dream.feature) // 2).view(-1, 1, 1)
        return Dream(dream.action, dream.reward, dream.cont, dream.uncertainty, dream.feature + sign, dream.last)

    world.imagine = imagine
    assert float(open_loop(world, line_episodes(20), 5, 4, samples=2).error().max()) < 1e-5
    assert float(open_loop(world, line_episodes(20), 5, 4, samples=1).error().min()) > 0.1


def test_how_many_are_rolled_out_at_once_changes_no_error(monkeypatch):
    from worldmodel.diagnostics import rollouts

    whole = open_loop(Oracle().installed(), line_episodes(12, 25, 40), 5, 15, samples=2)
    monkeypatch.setattr(rollouts, "ROLLOUTS_AT_ONCE", 4)
    parts = open_loop(Oracle().installed(), line_episodes(12, 25, 40), 5, 15, samples=2)
    assert torch.equal(whole.count, parts.count)
    torch.testing.assert_close(whole.error(), parts.error())
    torch.testing.assert_close(whole.cont, parts.cont, equal_nan=True)


def mixed_episodes(observation: spaces.Space) -> Episodes:
    """One episode of 12 random rows of any space."""
    batch = known_batch(observation, rows=4).map(lambda x: x[2:].flatten(0, 1).unsqueeze(0))
    first = torch.arange(12).unsqueeze(0) == 0
    return Episodes(Batch(batch.obs, batch.action, batch.prev_action, batch.reward, first, first & False, first & False))


@pytest.mark.parametrize("latent", registry.kinds("latent"))
@pytest.mark.parametrize(
    "observation",
    [LINE, spaces.Discrete(3), spaces.Box(0, 255, (16, 16, 3), np.uint8), spaces.Dict({"a": LINE, "b": spaces.MultiBinary(3)})],
    ids=["vector", "categories", "image", "dict"],
)
def test_every_space_and_latent_has_errors_and_the_same_seed_gives_the_same(observation, latent):
    world, episodes = small_world(observation, latent=latent), mixed_episodes(observation)
    one, same, other = (open_loop(world, episodes, 3, 4, generator=generator(seed)) for seed in (0, 0, 1))
    assert one.error().isfinite().all() and (one.error() > 0).all() and one.squares.keys() == world.obs.keys.keys()
    assert torch.equal(one.error(), same.error()) and not torch.equal(one.error(), other.error())
    roll = roll_out(world, episodes, torch.tensor([0]), torch.tensor([2]), 3, 4, samples=2, generator=generator())
    for name, key in world.obs.keys.items():
        assert roll.truth[name].shape == (1, 7, *key.shape)
        assert roll.seen[name].shape == (1, 3, *key.shape) and roll.imagined[name].shape == (1, 2, 4, *key.shape)


def test_without_a_decoder_rewards_and_ends_are_measured_alone():
    world, episodes = small_world(LINE), mixed_episodes(LINE)
    world.decoder = None
    errors = open_loop(world, episodes, 3, 4, generator=generator())
    assert errors.error().isnan().all() and errors.ratio().isnan().all()
    assert errors.reward.isfinite().all() and errors.cont.isfinite().all()


# The latent space -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("latent", ["gaussian", "categorical"])
def test_the_rates_of_the_variables_add_up_to_the_rate_of_the_latent(latent):
    world, episodes = small_world(LINE, latent=latent), mixed_episodes(LINE)
    seen = filter_episodes(world, episodes)
    rate = usage(world, seen)
    rows = episodes.rows.with_obs(world.preprocess(episodes.rows.obs))
    trace = world.trace(rows, None, Sampling(mode=True))
    each = world.dynamics.losses(trace, rows, Sampling())["dyn"].value.detach()
    assert float(rate.sum()) == pytest.approx(float(each[0, 1:].mean()), rel=1e-4)
    assert seen.rate == pytest.approx(float(each.mean()), rel=1e-4)
    assert len(seen.step) == 12 and filter_episodes(world, episodes, max_steps=5).step.tolist() == [0, 1, 2, 3, 4]


def test_a_transition_that_is_no_closed_form_has_no_rate_by_variable():
    world = small_world(LINE, latent="gaussian", transition=small("distribution", "flow"))
    assert usage(world, filter_episodes(world, mixed_episodes(LINE))) is None


@pytest.mark.parametrize("latent", registry.kinds("latent"))
@pytest.mark.parametrize("slow", [0, 5])
def test_a_traversal_moves_one_variable_at_a_time(latent, slow):
    world = small_world(LINE, latent=latent, dynamics={"slow": slow})
    seen = filter_episodes(world, mixed_episodes(LINE))
    moved = traversal(world, seen, 4, steps=3)
    family, own = world.dynamics.latent, seen.feature[4]
    assert moved.shape[1:] == (3, world.feature_dim)
    size = moved.shape[0] and family.size // moved.shape[0]  # numbers of each variable in a flat latent
    changed = (moved != own).any(1)
    for v in range(moved.shape[0]):
        inside = slice(world.feature_dim - family.size + v * size, world.feature_dim - family.size + (v + 1) * size)
        assert changed[v, inside].any() and int(changed[v].sum()) == int(changed[v, inside].sum())
    assert (moved[:, 0] != moved[:, 1]).any(-1).all()


def test_an_interpolation_goes_straight_from_one_to_the_other():
    one, other = torch.zeros(4), torch.tensor([1.0, 2, 3, 4])
    path = interpolation(one, other, 5)
    assert torch.equal(path[0], one) and torch.equal(path[-1], other) and torch.allclose(path[2], other / 2)


def test_the_deviation_of_a_vector_is_known_whatever_the_scale_of_the_inputs():
    for inputs in ("standardise", "symlog", "raw"):
        world = small_world(LINE, vector_scaling=inputs)
        x = torch.randn(500, 2, generator=generator()) * torch.tensor([3.0, 0.1])
        world.scaling.update({"obs": x})
        torch.testing.assert_close(world.scaling.deviation("obs"), x.std(0, unbiased=False))
    assert float(small_world(spaces.Discrete(3)).scaling.deviation("obs")) == 1
