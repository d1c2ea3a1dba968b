"""Smoothness of decoders: estimators against maps whose slope is known, and a section that finds cliffs where a prior draws."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from conftest import generator
from test_usage import KINDS, circling, evidence_of, learned, world_of
from torch import Tensor

from worldmodel.diagnostics.evidence import Evidence
from worldmodel.diagnostics.geometry import filter_episodes, spherical
from worldmodel.diagnostics.smoothness import (
    decoder_sensitivity,
    difference_sensitivity,
    drawn_decoding,
    draws_by_diffusion,
    path_ratio,
    smoothness,
    straightness,
)
from worldmodel.diagnostics.usage import decoded_keys

MATRIX = torch.randn(3, 5, generator=torch.Generator().manual_seed(7))
SLOPE = float(MATRIX.square().sum() / 3) ** 0.5


# Estimators -------------------------------------------------------------------------------------------------------------


def test_the_slope_of_a_linear_decoder_is_the_norm_of_its_matrix():
    z = torch.randn(400, 3, generator=generator())
    for sensitivity in (decoder_sensitivity, difference_sensitivity):
        found = sensitivity(lambda x: x @ MATRIX, z, generator=generator())
        assert float(found.square().mean().sqrt()) == pytest.approx(SLOPE, rel=0.02)
        assert decoder_sensitivity(lambda x: x, z, probes=1).allclose(torch.ones(400))


def test_differences_agree_with_derivatives_of_a_curved_decoder():
    z = torch.randn(50, 3, generator=generator())
    one, other = (f(lambda x: (x @ MATRIX).sin(), z, generator=generator()) for f in (decoder_sensitivity, difference_sensitivity))
    torch.testing.assert_close(one, other, rtol=0.05, atol=0.02)


def test_a_straight_path_has_no_detour_and_a_half_circle_has_its_own():
    one, other = torch.zeros(2, 1), torch.tensor([[1.0], [2.0]])
    assert path_ratio(lambda z: z @ torch.ones(1, 4), one, other).tolist() == pytest.approx([1, 1])
    half = path_ratio(lambda z: torch.cat([z.cos(), z.sin()], 1), torch.zeros(1, 1), torch.tensor([[math.pi]]), 64)
    assert float(half) == pytest.approx(math.pi / 2, rel=1e-3)
    right = torch.eye(2)
    on_circle = path_ratio(lambda z: z, right[:1], right[1:], 64, spherical)
    assert float(on_circle) == pytest.approx(math.pi / 2 / math.sqrt(2), rel=1e-3)


def test_straightness_tells_a_line_from_a_walk_and_from_noise():
    noise = torch.randn(4000, 8, generator=generator())
    episode, step = torch.zeros(4000, dtype=torch.int64), torch.arange(4000)
    line = step.unsqueeze(-1) * torch.ones(1, 3)
    values = [float(straightness(z, episode, step)[0].mean()) for z in (line, noise.cumsum(0), noise)]
    assert values[0] == pytest.approx(1, abs=1e-4) and abs(values[1]) < 0.02 and values[2] == pytest.approx(-0.5, abs=0.03)


def test_changes_are_taken_within_episodes_and_where_there_are_any():
    z = torch.tensor([[0.0], [1], [2], [2], [3], [50], [49], [48]])
    episode, step = torch.tensor([0] * 5 + [1] * 3), torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])
    cosine, numbers = straightness(z, episode, step)
    assert cosine.tolist() == [1, 1] and numbers.tolist() == [0, 1]


# The section ------------------------------------------------------------------------------------------------------------


def with_decoder(evidence: Evidence, change) -> Evidence:
    """With `change(mean, latent)` for the decoder's mean of its first key."""
    world = copy.deepcopy(evidence.world)
    mean, name = world.decoder.mean, next(iter(world.obs.keys))
    world.decoder.mean = lambda feature: {name: change(mean(feature)[name], world.dynamics.z_of(feature))}
    return replace(evidence, world=world)


def drawing_wide(evidence: Evidence, share: float) -> Evidence:
    """With draws of the transition that are `share` times as far from the middle of the latents."""
    world = copy.deepcopy(evidence.world)
    sample = world.dynamics.transition.sample
    world.dynamics.transition.sample = lambda *given: share * sample(*given)
    return replace(evidence, world=world)


def cliff(mean: Tensor, z: Tensor) -> Tensor:
    """A decoder that is as it was where latents are, and steep far away from there."""
    return mean + 30 * (z.norm(dim=-1, keepdim=True) - 8).clamp_min(0)


def test_a_smooth_decoder_is_as_smooth_at_draws_and_the_section_says_so():
    found = smoothness(learned(), "transition")
    assert found.skipped is None and not [text for text in found.sentences if "`" in text]
    for name in ("slope ratio", "steepest ratio"):
        assert 0.7 < found.figures[f"transition {name}"].value < 1.4
    assert found.figures["transition path ratio"].value >= 1 and found.figures["straightness"].surely_above(0.5)


def test_cliffs_where_the_prior_draws_are_found():
    honest, beyond = (drawing_wide(with_decoder(learned(), cliff), share) for share in (1.0, 12.0))
    at_home, outside = (smoothness(x, "transition") for x in (honest, beyond))
    for name in ("slope ratio", "steepest ratio", "drawn path ratio"):
        assert outside.figures[f"transition {name}"].value > at_home.figures[f"transition {name}"].value, name
    assert outside.figures["transition steepest ratio"].surely_above(2)
    assert any("cliffs" in x and "`worldmodel fit-prior runs/some --slot transition --kind flow`" in x for x in outside.sentences)
    assert not any("cliffs" in x for x in at_home.sentences)


def test_the_more_a_decoder_bends_the_longer_are_its_paths_and_the_steeper_it_is():
    def bent(size: float):
        return lambda mean, z: mean + size * (6 * z).sin().sum(-1, keepdim=True)

    found = [smoothness(with_decoder(learned(), bent(size)), "transition").figures for size in (0.0, 0.3, 1.0)]
    for name in ("slope", "path ratio", "spherical path ratio", "drawn path ratio"):
        values = [figures[f"transition {name}"].value for figures in found]
        assert values[0] < values[1] < values[2], name


def test_latents_that_jump_are_less_straight():
    evidence = learned()
    noise = torch.randn(evidence.test.z.shape, generator=generator())
    found = [
        smoothness(replace(evidence, test=replace(evidence.test, z=evidence.test.z + s * noise)), "transition") for s in (0, 0.2, 5)
    ]
    values = [section.figures["straightness"].value for section in found]
    assert values[0] > values[1] > values[2] and values[2] < -0.3


def test_a_decoder_that_draws_is_asked_with_the_same_noise():
    world, observation = world_of("drawn")
    evidence = evidence_of(world, observation, 2, 10)
    assert draws_by_diffusion(world, evidence.test) and not draws_by_diffusion(learned().world, learned().test)
    decode = drawn_decoding(world, decoded_keys(world), 0)
    assert torch.equal(decode(evidence.test.feature), decode(evidence.test.feature))
    other = drawn_decoding(world, decoded_keys(world), 1)
    assert not torch.equal(decode(evidence.test.feature), other(evidence.test.feature))
    assert smoothness(evidence, "transition").figures["transition slope"].value > 0


@pytest.mark.parametrize("slot", ["initial", "transition", "marginal"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_world_has_the_figures_that_it_can_have(kind, slot):
    world, observation = world_of(kind)
    found = smoothness(evidence_of(world, observation, 12, 4), slot)
    bare = {"anchored", "jepa without a decoder", "categorical", "categories", "diamond"}
    assert (f"{slot} slope" in found.figures) == (kind not in bare and (slot != "marginal" or kind == "vae"))
    assert ("straightness" in found.figures) == (slot == "transition" and kind not in ("categorical", "categories"))
    assert (found.skipped is None) == (f"{slot} slope" in found.figures) and "because" in (found.skipped or "because")


def test_few_rows_are_no_error():
    few = replace(learned(), test=filter_episodes(learned().world, circling(count=1, length=2)))
    found = smoothness(few, "transition")
    assert not found.figures and "fewer than" in found.skipped and "no three test rows" in found.skipped
