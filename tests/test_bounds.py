"""The section of likelihoods against a world whose ln p(x) is known, and against worlds that are made worse."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from conftest import generator, small, small_world
from test_usage import KINDS, PAIR, circling, evidence_of, learned, world_of

from worldmodel.data import Loss
from worldmodel.diagnostics.bounds import NUMBERS_TO_DECODE, bits_per_dimension, draws_and_rows, likelihood
from worldmodel.diagnostics.evidence import Evidence
from worldmodel.diagnostics.geometry import filter_episodes
from worldmodel.diagnostics.likelihood import FactorModel
from worldmodel.distributions import GaussianPosterior

DRAWS = 50


def noisy(world, module: torch.nn.Module, size: float):
    """The world with noise on the weights of one of its parts, which is left as it is in the original."""
    other = copy.deepcopy(world)
    part = dict(other.named_modules())[next(name for name, x in world.named_modules() if x is module)]
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator()))
    return other


# A model whose likelihood is known ----------------------------------------------------------------------------------------


def linear_evidence(shift: float = 0.0) -> tuple[Evidence, float]:
    """(evidence of a world that is a `FactorModel` with its exact posterior, ln p(x) per row), by the marginal N(0, I).

    shift   of the posterior's mean, in its deviations
    """
    _, parts = KINDS["vae"]
    world = small_world(PAIR, vector_scaling="raw", **parts).eval()
    model = FactorModel(torch.tensor([0.1, -0.2]), torch.tensor([[0.9, 0.0], [0.0, 0.6]]), 0.4)

    def loss(feature, obs, sampling=None):
        mean = model.mean + world.dynamics.z_of(feature) @ model.weight.T
        return {"observation": Loss(-GaussianPosterior(mean, torch.full_like(mean, model.sigma)).log_prob(obs["obs"]))}

    world.decoder.loss = loss
    evidence = evidence_of(world)
    x = evidence.test.rows.obs["obs"][:, 0]
    variance = 1 / (1 + model.weight.diagonal().square() / model.sigma**2)
    mean = variance * (x - model.mean) * model.weight.diagonal() / model.sigma**2
    posterior = GaussianPosterior(mean + shift * variance.sqrt(), variance.sqrt().expand_as(mean))
    test = replace(evidence.test, posterior=posterior)
    return replace(evidence, test=test), float(model.log_prob(x).mean())


def test_with_the_exact_posterior_every_bound_is_the_likelihood():
    evidence, truth = linear_evidence()
    found = likelihood(evidence, DRAWS).figures
    for name in ("elbo", "likelihood"):
        figure = found[f"marginal {name}"]
        assert figure.value == pytest.approx(truth, abs=0.05) and figure.low <= truth + 0.05 and figure.high >= truth - 0.05
    assert found["marginal effective draws"].value == pytest.approx(1, abs=1e-3)
    assert found["marginal rate"].value + found["marginal distortion"].value == pytest.approx(-truth, abs=0.06)


def test_a_worse_posterior_lowers_the_elbo_and_more_draws_make_up_for_it():
    (exact, truth), (near, _), (far, _) = (linear_evidence(shift) for shift in (0.0, 0.7, 1.5))
    sections = [likelihood(x, DRAWS) for x in (exact, near, far)]
    elbo, bound, gap, draws = (
        [x.figures[f"marginal {name}"].value for x in sections]
        for name in ("elbo", "likelihood", "posterior gap", "effective draws")
    )
    assert elbo[0] > elbo[1] > elbo[2] and gap[0] < gap[1] < gap[2] and draws[0] > draws[1] > draws[2]
    for low, high in zip(elbo, bound):
        assert low <= high + 1e-3 and high < truth + 0.05
    assert elbo[2] < truth - 1.5 and bound[2] > elbo[2] + 1
    curve = sections[2].curves["Bound of the likelihood by the marginal"]
    assert curve.x == [1, 10, 50] and curve.lines["bound"] == sorted(curve.lines["bound"])
    assert any("learn for longer" in x and "--resume" in x for x in sections[2].sentences if "`" in x)
    assert not any("`" in x for x in sections[0].sentences if "marginal" in x)


# Worlds that are made worse -----------------------------------------------------------------------------------------------


def test_a_worse_transition_costs_rate_and_a_worse_decoder_distortion():
    evidence = learned()
    world = evidence.world
    good, expects_less, decodes_worse = (
        likelihood(replace(evidence, world=x), DRAWS).figures
        for x in (world, noisy(world, world.dynamics.transition, 0.5), noisy(world, world.decoder, 0.5))
    )
    assert expects_less["transition rate"].value > good["transition rate"].value + 0.5
    assert expects_less["transition distortion"].value == pytest.approx(good["transition distortion"].value, abs=1e-4)
    assert decodes_worse["transition distortion"].value > good["transition distortion"].value + 0.5
    for worse in (expects_less, decodes_worse):
        assert worse["transition likelihood"].value < good["transition likelihood"].value - 0.1
        assert worse["transition elbo"].value < good["transition elbo"].value - 0.3


def test_of_latents_that_are_the_observation_the_rate_is_the_exact_likelihood():
    world, observation = world_of("anchored")
    evidence = evidence_of(world, observation)
    found, seen, later = likelihood(evidence), evidence.test, evidence.test.step > 0
    assert set(found.figures) == {"transition rate"} and found.skipped is None and "costs" in found.sentences[0]
    later = later.nonzero()[:, 0][::2]  # at most 200 rows
    with torch.no_grad():
        exact = -world.dynamics.transition.log_prob(seen.z[later], seen.h[later]).mean()
    assert found.figures["transition rate"].value == pytest.approx(float(exact), rel=1e-4)
    worse = replace(evidence, world=noisy(world, world.dynamics.transition, 0.3))
    assert likelihood(worse).figures["transition rate"].value > found.figures["transition rate"].value


def test_pictures_beside_anchored_numbers_are_bounded_together_with_them():
    world, observation = world_of("anchored with pictures")
    found = likelihood(evidence_of(world, observation, 2, 8), 8)
    parts = {name: found.figures[f"transition {name}"].value for name in ("rate", "distortion", "elbo", "likelihood")}
    assert parts["elbo"] == pytest.approx(-parts["rate"] - parts["distortion"], rel=1e-4) and parts["likelihood"] > parts["elbo"]
    assert "transition bits" not in found.figures  # nor of anything else than pictures alone


# Bits and sizes -----------------------------------------------------------------------------------------------------------


def test_bits_say_what_kind_of_likelihood_they_are_of():
    uniform = bits_per_dimension(10 * math.log(256), 10, "logistic")
    assert uniform.value == pytest.approx(8) and "logistic" in uniform.unit and "bound" in uniform.unit
    density = bits_per_dimension(0.0, 10, "gaussian")  # a density of 1 on [0, 1] is uniform over 256 levels
    assert density.value == pytest.approx(8) and "no bound" in density.unit
    assert "bernoulli" in bits_per_dimension(1.0, 10, "bernoulli").unit and not bits_per_dimension(None, 10, "logistic").known


@pytest.mark.parametrize(("image", "word"), [("gaussian", "density"), ("logistic", "discretised logistic")])
def test_pictures_have_bits_of_their_decoders_kind(image, word):
    observation, parts = KINDS["pictures"]
    world = small_world(observation, **parts, decoder=small("decoder", "standard", image=image)).eval()
    found = likelihood(evidence_of(world, observation, 2, 6), 4).figures
    bits, bound = found["transition bits"], found["transition likelihood"].value
    shift = 8 if image == "gaussian" else 0
    assert word in bits.unit and bits.value == pytest.approx(-bound / (16 * 16 * 3) / math.log(2) + shift, rel=1e-4)


def test_large_pictures_get_fewer_draws_and_rows():
    assert draws_and_rows(4) == (256, 200)
    draws, rows = draws_and_rows(3 * 64 * 64)
    assert draws >= 16 and rows >= 32 and draws * rows * 3 * 64 * 64 <= NUMBERS_TO_DECODE
    assert draws_and_rows(10**9) == (16, 32)


# Every kind of world ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_world_has_a_likelihood_or_says_why_not(kind):
    world, observation = world_of(kind)
    found = likelihood(evidence_of(world, observation, 2, 6), 4)
    none = {"jepa", "jepa without a decoder", "diamond"}
    assert ("transition rate" in found.figures) == (kind not in none) == bool(found.sentences)
    assert ("marginal rate" in found.figures) == (kind == "vae")
    assert (found.skipped is not None) == (kind in none) and "because" in (found.skipped or "because")


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        ({"transition": "energy"}, "up to a constant"),
        ({"decoder": "latent_diffusion"}, "draws without a density"),
    ],
)
def test_what_has_no_density_is_skipped_with_the_reason(parts, why):
    configs = {role: small({"transition": "distribution"}.get(role, role), kind) for role, kind in parts.items()}
    world = small_world(PAIR, latent="gaussian", **configs).eval()
    found = likelihood(evidence_of(world, PAIR, 2, 6), 4)
    assert not found.figures and why in found.skipped


def test_few_rows_are_no_error():
    few = replace(learned(), test=filter_episodes(learned().world, circling(count=1, length=1)))
    assert "no rows" in likelihood(few).skipped


def test_the_same_seed_gives_the_same_figures():
    one, same, other = (likelihood(replace(learned(), seed=seed), DRAWS).figures["transition elbo"].value for seed in (0, 0, 1))
    assert one == same != other
