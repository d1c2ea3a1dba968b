"""The slow level of the recurrent model: it is updated when it should, and the fast one reads it."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from conftest import generator, known_batch, small_world

from worldmodel.data import Sampling, State

T = 6
every_posterior = pytest.mark.parametrize("posterior", ["filtering", "observation"])
STILL = torch.zeros(3, T, dtype=torch.bool)


def world(posterior: str = "filtering", every: int = 2, slow: int = 5):
    options = {"kind": "rssm", "posterior": posterior, "slow": slow, "slow_every": every}
    return small_world(latent="gaussian", dynamics=options).eval()


@torch.no_grad()
def states(model, is_first=None) -> State:
    batch = known_batch()
    is_first = batch.is_first if is_first is None else is_first
    embed = torch.randn(3, T, model.encoder.out_features, generator=generator())
    return model.dynamics.observe(model.initial(3), embed, batch.prev_action, is_first, Sampling(generator=generator()))[1].states


def updated(slow: torch.Tensor) -> list[bool]:
    """At which steps a slow state [T, S] changed."""
    before = torch.cat([torch.zeros_like(slow[:1]), slow[:-1]])
    return [bool(x) for x in (slow != before).any(-1)]


@every_posterior
def test_the_slow_state_changes_at_every_kth_step_only(posterior):
    assert updated(states(world(posterior, every=2), STILL)["slow"][0]) == [True, False, True, False, True, False]
    assert updated(states(world(posterior, every=4), STILL)["slow"][0]) == [True, False, False, False, True, False]
    assert updated(states(world(posterior, every=1), STILL)["slow"][0]) == [True] * T


@every_posterior
def test_an_episodes_first_step_is_an_update_and_starts_the_count_anew(posterior):
    seen = states(world(posterior, every=3))  # row 1 begins at 4, row 0 at 0 and 3
    assert torch.equal(seen["slow"][0, 3], seen["slow"][0, 0])  # a first update reads zeros
    assert updated(seen["slow"][1]) == [True, False, False, True, True, False]
    assert seen["clock"][1, :, 0].tolist() == [1, 2, 0, 1, 1, 2]


def test_the_slow_state_is_part_of_the_feature_and_read_by_the_fast_one():
    model = world()
    state = model.initial(2).map(lambda x: torch.randn(x.shape, generator=generator()))
    state, other = (State({**state, "slow": state["slow"] + more, "clock": torch.ones(2, 1)}) for more in (0, 1))
    assert model.feature_dim == model.dynamics.feature(state).shape[-1] == 12 + 5 + 2
    assert torch.equal(model.dynamics.z_of(model.dynamics.feature(state)), state["z"])
    one, two = (model.dynamics.imagine(s, torch.zeros(2, 2), Sampling(mode=True)) for s in (state, other))
    assert torch.equal(one["slow"], state["slow"]) and (one["h"] - two["h"]).abs().max() > 1e-4


def test_a_dream_keeps_the_time_of_the_episode_that_it_goes_on_from():
    model = world(every=4)
    last, slow = states(model, STILL).map(lambda x: x[:, -1]), []  # one step after an update
    for _ in range(4):
        last = model.dynamics.imagine(last, torch.zeros(3, 2), Sampling(generator=generator()))
        slow.append(last["slow"][0])
    assert [bool((a != b).any()) for a, b in pairwise(slow)] == [False, True, False]


def test_without_a_slow_level_nothing_of_it_is_there():
    model = world(slow=0)
    assert set(model.initial(1)) == {"h", "z"} and not any("slow" in name for name, _ in model.named_parameters())
