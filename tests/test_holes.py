"""Holes of a prior: planted ones are found with their mass, honest priors have none, and a section says where they are."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from conftest import descend, generator, unchecked
from test_usage import KINDS, PAIR, PICTURE, circling, evidence_of, learned, world_of
from torch import Tensor, nn

from worldmodel.data import Sampling
from worldmodel.diagnostics.evidence import Evidence, Section, bootstrap, joined, rows_of
from worldmodel.diagnostics.geometry import filter_episodes
from worldmodel.diagnostics.holes import (
    MIN_ROWS,
    SlotRows,
    _cycle,
    _pictures,
    _validity,
    cycle_distance,
    holes,
    holes_between,
    imagined_latents,
    nearest,
    out_of_range,
    outside,
    slot_features,
)
from worldmodel.distributions import CategoricalPosterior, GaussianPosterior, PointPosterior
from worldmodel.distributions.gaussian import GaussianLatent, GaussianLatentConfig

EPISODES = torch.arange(40).repeat_interleave(30)


def square(seed: int, rows: int = len(EPISODES)) -> Tensor:
    """Uniform points of [0, 1]^2."""
    return torch.rand(rows, 2, generator=generator(seed))


# Estimators -------------------------------------------------------------------------------------------------------------


def test_the_kth_neighbour_is_found():
    line = torch.arange(5.0).unsqueeze(-1)
    assert nearest(torch.tensor([[0.0], [10.0]]), line, 3).tolist() == [2, 8]
    assert nearest(line, line[:2], 9).tolist() == [1, 1, 2, 3, 4]  # the farthest of two
    assert nearest(line[:0], line).shape == (0,)


def test_points_of_one_distribution_are_outside_at_the_floor():
    far, floor = outside(square(0), square(1), square(2))
    assert float(floor.float().mean()) == pytest.approx(0.01, abs=0.002) and float(far.float().mean()) < 0.02


def test_the_same_distribution_has_neither_holes_nor_missed_mass():
    found = holes_between(square(0), square(1), EPISODES)
    for part in (found.hole, found.missed):
        figure = bootstrap(part, EPISODES)
        assert abs(figure.value) < 0.01 and not figure.surely_above(0.01)


@pytest.mark.parametrize("removed", [0.1, 0.3])
def test_a_planted_hole_is_found_with_its_mass(removed):
    kept = square(0)
    kept[:, 0] = removed + (1 - removed) * kept[:, 0]  # no real latent in a part of the square
    found = holes_between(kept, square(1), EPISODES)
    assert removed - 0.08 < float(found.hole.mean()) < removed + 0.01  # near its border real latents are near
    assert abs(float(found.missed.mean())) < 0.02
    swapped = holes_between(square(1), kept, EPISODES)
    assert float(swapped.missed.mean()) > removed - 0.08 and abs(float(swapped.hole.mean())) < 0.02


def test_draws_that_repeat_the_latents_themselves_are_not_judged_by_their_own_rows():
    real = square(0)
    found = holes_between(real, real, EPISODES)
    assert float(found.hole.abs().max()) == 0 == float(found.missed.abs().max())


def test_units_and_rare_categories_do_not_decide():
    scale = torch.tensor([1.0, 1e-4])
    kept = square(0)
    kept[:, 1] = 0.3 + 0.7 * kept[:, 1]
    assert float(holes_between(kept * scale, square(1) * scale, EPISODES).hole.mean()) > 0.2
    assert float(holes_between(kept * scale, square(1) * scale, EPISODES, scaled=False).hole.mean()) < 0.05


def test_too_few_rows_or_one_episode_have_no_holes():
    assert holes_between(square(0, 20), square(1, 20), EPISODES[:20]) is None
    assert holes_between(square(0), square(1), EPISODES * 0) is None


def test_the_distance_of_a_cycle_is_in_deviations_of_the_posterior():
    mean, std, z = torch.zeros(3, 2), torch.tensor([0.5, 2.0]).expand(3, 2), torch.tensor([[0.0, 0], [0.5, 2], [1, 4]])
    assert cycle_distance(GaussianPosterior(mean, std), z, torch.ones(2)).tolist() == [0, 1, 2]
    assert cycle_distance(PointPosterior(mean), z, torch.tensor([1.0, 4.0])).tolist() == pytest.approx([0, 0.5, 1])
    sure = CategoricalPosterior(torch.tensor([[[1.0, 0], [0.5, 0.5]]]))
    assert float(cycle_distance(sure, sure.mode, torch.ones(4))) == pytest.approx(0.5 * 0.6931, abs=1e-3)


def test_a_number_is_out_of_range_beyond_its_margin():
    real = torch.tensor([[0.0, 10.0], [1.0, 20.0]])
    x = torch.tensor([[0.5, 15.0], [1.05, 9.5], [1.2, 15.0], [0.5, 22.0]])
    assert out_of_range(x, real).tolist() == [False, False, True, True]


# Without KL, islands ------------------------------------------------------------------------------------------------------


def autoencoder(beta: float, x: Tensor, steps: int = 300) -> GaussianPosterior:
    """q(z|x) of an autoencoder of points with a latent of two numbers, trained on the ELBO whose KL weighs `beta`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder, decoder = (nn.Sequential(nn.Linear(2, 32), nn.SiLU(), nn.Linear(32, n)) for n in (4, 2))
    latent, rng, normal = (
        GaussianLatent(GaussianLatentConfig(size=2)),
        generator(),
        GaussianPosterior(torch.zeros(2), torch.ones(2)),
    )

    def loss(step: int) -> Tensor:
        some = x[step % 4 :: 4]
        posterior = latent.distribution(encoder(some))
        z = posterior.sample(torch.randn(len(some), 2, generator=rng))
        return ((decoder(z) - some).square().sum(-1) / (2 * 0.3**2) + beta * posterior.kl(normal)).mean()

    with unchecked():
        descend(loss, [*encoder.parameters(), *decoder.parameters()], 1e-2, steps)
    return latent.distribution(encoder(x).detach())


def test_an_autoencoder_without_kl_has_three_times_the_holes_of_a_vae():
    rng = generator(3)
    angle = 6.283 * torch.rand(1200, generator=rng)
    ring = torch.stack([angle.cos(), angle.sin()], -1) * math.sqrt(2) + 0.07 * torch.randn(1200, 2, generator=rng)
    mass = []
    for beta in (0.0, 1.0):
        posterior = autoencoder(beta, ring)
        z = posterior.sample(torch.randn(1200, 2, generator=rng))
        found = holes_between(z, torch.randn(1200, 2, generator=rng), EPISODES)
        mass.append(float(found.hole.mean()))
    assert mass[0] > 0.5 and mass[0] > 3 * mass[1] > 0


# The section ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long() -> Evidence:
    """Of a trained world, with episodes that have room for dreams."""
    return evidence_of(learned().world, count=10, length=60)


def spoilt(evidence: Evidence, spoil) -> Evidence:
    """With `spoil(draws, generator)` done to all draws of the transition."""
    world = copy.deepcopy(evidence.world)
    sample = world.dynamics.transition.sample

    def worse(context, count=1, sampling=None):
        return spoil(sample(context, count, sampling), (sampling or Sampling()).generator)

    world.dynamics.transition.sample = worse
    return replace(evidence, world=world)


def wide(share: float):
    """Noise of `share` on draws."""
    return lambda z, rng: z + share * torch.randn(z.shape, generator=rng)


FIGURES = ["hole mass", "out of range", "invalid", "cycle ratio", "cycle distance"]


def test_the_wider_a_transition_draws_the_more_of_it_is_wrong(long):
    found = [holes(x, "transition").figures for x in (long, spoilt(long, wide(1.0)), spoilt(long, wide(6.0)))]
    for name in [*(f"transition {name}" for name in FIGURES), "imagined hole mass", "teleports"]:
        right, worse, wrong = (x[name].value for x in found)
        assert right < wrong and worse < wrong + 0.02, name
    assert found[2]["transition hole mass"].surely_above(0.3) and found[2]["teleports"].surely_above(0.1)


def test_a_transition_that_draws_one_latent_misses_the_others(long):
    stuck = spoilt(long, lambda z, rng: 0 * z + 0.01 * torch.randn(z.shape, generator=rng))
    for name in ("transition missed mass", "imagined missed mass"):
        right, wrong = (holes(x, "transition").figures[name] for x in (long, stuck))
        assert wrong.surely_above(0.5) and right.value < 0.2, name


def test_sentences_name_what_is_wrong_and_what_mends_it(long):
    wrong = holes(spoilt(long, wide(6.0)), "transition").sentences
    assert len(wrong) >= 5 and sum("`worldmodel fit-prior runs/some --slot transition --kind flow`" in x for x in wrong) >= 3
    assert sum("`worldmodel train runs/some --resume --steps N`" in x for x in wrong) == 2


def test_fresh_draws_of_the_posterior_are_the_best_prior_there_is(long):
    masses = []
    rows = slot_features(long.world, long.test, "transition", generator(1), 2000)
    again = slot_features(long.world, long.test, "transition", generator(2), 2000)
    z_of = long.world.dynamics.z_of
    for drawn in (again.inferred, rows.drawn, rows.drawn + 3 * torch.randn(rows.drawn.shape, generator=generator())):
        masses.append(float(holes_between(z_of(rows.inferred), z_of(drawn), rows.episode).hole.mean()))
    assert masses[0] < 0.03 and masses[0] <= masses[1] + 0.01 < masses[2]


def test_imagined_latents_start_where_real_ones_are_and_stand_at_their_rows(long):
    made, real, episode = imagined_latents(long.world, long.episodes, generator())
    assert made.shape == real.shape == (len(episode), 16, long.world.feature_dim)
    assert torch.equal(made[:, 0], real[:, 0]) and not torch.equal(made[:, 1], real[:, 1])
    short = imagined_latents(long.world, circling(length=19), generator())
    assert len(short[0]) == 0


@pytest.mark.parametrize("slot", ["initial", "transition", "marginal"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_world_has_the_figures_that_it_can_have(kind, slot):
    world, observation = world_of(kind)
    found = holes(evidence_of(world, observation, 4, 15), slot)
    measured = (slot == "transition" and kind != "diamond") or (slot == "marginal" and kind == "vae")
    assert (f"{slot} hole mass" in found.figures) == measured == bool(found.sentences)
    assert found.skipped is None or "because" in found.skipped or "reads the observation off" in found.skipped
    assert ("transition cycle ratio" in found.figures) == (
        measured and slot == "transition" and kind not in ("anchored", "jepa without a decoder")
    )
    pictures = measured and kind in ("pictures", "anchored with pictures")
    assert ("transition picture distance" in found.figures) == pictures
    assert ("transition picture cycle" in found.figures) == (pictures and "transition cycle ratio" in found.figures)


def test_enough_episodes_give_the_initial_slot_its_holes():
    world, _ = world_of("vae")
    found = holes(evidence_of(world, PAIR, MIN_ROWS + 2, 2), "initial")
    assert {"initial hole mass", "initial missed mass", "initial out of range"} <= set(found.figures)


def test_a_section_without_rows_is_skipped(long):
    few = replace(long, test=filter_episodes(long.world, circling(count=1, length=4)))
    found = holes(few, "transition")
    assert isinstance(found, Section) and not found.figures and "too few" in found.skipped


# Pictures ---------------------------------------------------------------------------------------------------------------


def picture(place: Tensor) -> Tensor:
    """[N, 2] within the unit circle -> a soft square there, [N, 3, 16, 16]."""
    across, down = (torch.sigmoid(10 - 4 * (torch.arange(16) - 8 - 5 * x.unsqueeze(-1)).abs()) for x in place.unbind(-1))
    return (down.unsqueeze(2) * across.unsqueeze(1)).unsqueeze(1).expand(-1, 3, -1, -1)


def on_the_circle(pictures: Tensor) -> Tensor:
    """Where the square is, [N, 2], as an encoder sees it that knows the unit circle alone."""
    grey, axis = pictures.mean(1), torch.arange(16.0) - 8
    return nn.functional.normalize(torch.stack([(grey.sum(1) * axis).sum(-1), (grey.sum(2) * axis).sum(-1)], -1), dim=-1)


@pytest.fixture(scope="module")
def squares() -> tuple[Evidence, Tensor]:
    """(a world of such pictures whose encoder and decoder are right on the circle, the latents of its test rows)."""
    world = world_of("pictures")[0]
    world.decoder.mean = lambda feature: {"obs": picture(feature[:, -2:])}
    world.encoder.forward = lambda obs: on_the_circle(obs["obs"])
    world.dynamics.posterior = lambda embed, h: GaussianPosterior(embed, torch.full_like(embed, 0.1))
    places = [nn.functional.normalize(circling(seed=seed).rows.obs["obs"][0], dim=-1) for seed in (1, 2)]
    seen = [filter_episodes(world_of("pictures")[0], circling(PICTURE, seed=seed)) for seed in (1, 2)]
    for part, place in zip(seen, places):
        raw = (255 * picture(place)).round().to(torch.uint8).permute(0, 2, 3, 1).unsqueeze(1)
        part.rows.obs["obs"] = raw
    return Evidence(world, "runs/some", seen[0], seen[1], seen[1], circling(PICTURE)), places[1]


def of_pictures(squares: tuple[Evidence, Tensor], change) -> Section:
    """What is said of pictures of draws, which are `change` of the real latents."""
    evidence, place = squares
    later = rows_of(evidence.test, "transition")
    inferred, h = place[later], evidence.test.h[later]
    features = [torch.cat([h, z], -1) for z in (inferred, change(inferred))]
    rows = SlotRows(*features, h, evidence.test.episode[later])
    return joined(
        [_cycle(evidence, "transition", rows), _validity(evidence, "transition", rows), _pictures(evidence, "transition", rows)]
    )


def test_pictures_of_right_draws_stay_in_a_cycle_and_are_those_of_the_run(squares):
    found = of_pictures(squares, lambda z: z.flip(0))
    assert found.skipped is None and found.figures["transition picture cycle"].value < 0.005
    assert found.figures["transition picture cycle ratio"].value < 1  # both below a grey level
    assert found.figures["transition picture distance over decoded"].value == pytest.approx(1, abs=0.1)
    assert found.figures["transition picture distance over real"].value == pytest.approx(1, abs=0.2)
    assert len(found.sentences) == 3 and not [text for text in found.sentences if "`" in text]


def test_pictures_that_the_run_never_had_are_found_by_both_and_the_more_so_the_more_they_differ(squares):
    some, more = (of_pictures(squares, lambda z, share=share: share * z) for share in (0.9, 0.4))
    names = [name for name in more.figures if "picture" in name]
    assert len(names) == 5
    for name in names:
        assert some.figures[name].value < more.figures[name].value, name
    assert more.figures["transition picture cycle ratio"].low > 3 and more.figures["transition picture distance over real"].low > 2
    alarms = [text for text in more.sentences if "icture" in text]
    assert len(alarms) == 2 and all("`worldmodel fit-prior runs/some --slot transition --kind flow`" in text for text in alarms)


def test_blurred_pictures_are_not_held_against_the_prior(squares):
    evidence, place = squares
    world = copy.deepcopy(evidence.world)
    mean = world.decoder.mean
    world.decoder.mean = lambda feature: {"obs": nn.functional.avg_pool2d(mean(feature)["obs"], 5, 1, 2)}
    found = of_pictures((replace(evidence, world=world), place), lambda z: z.flip(0))
    assert found.figures["transition picture distance over real"].surely_above(1.5)
    assert found.figures["transition picture distance over decoded"].value == pytest.approx(1, abs=0.1)
    assert not [text for text in found.sentences if "none of the run's" in text]
