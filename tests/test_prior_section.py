"""Regret of a prior against known truth, and the section that judges the priors of a world model."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import generator, small, small_world, unchecked
from gymnasium import spaces
from torch import Tensor

from worldmodel import registry
from worldmodel.data import Batch, Episodes, Sampling
from worldmodel.diagnostics.evidence import Evidence, Figure, SlotLatents, prior_of, slot_latents
from worldmodel.diagnostics.geometry import FilteredStates, filter_episodes
from worldmodel.diagnostics.prior import (
    ITSELF,
    Regret,
    _sentences,
    compare,
    form_candidate,
    forms_for,
    log_scores,
    principal,
    prior,
    refitted,
    regret,
    residuals,
    vamp_candidate,
)
from worldmodel.distributions import (
    ConditionalDistribution,
    Gaussian,
    GaussianConfig,
    GaussianLatent,
    GaussianLatentConfig,
    PointPosterior,
)
from worldmodel.model import WorldModel
from worldmodel.spaces import ObsSpec

PAIR = spaces.Box(-np.inf, np.inf, (2,), np.float32)
LATENT = GaussianLatent(GaussianLatentConfig(size=2))


# Priors whose truth is known --------------------------------------------------------------------------------------------


def gaussian(mean: float = 0.0, std: float = 1.0, context: int = 0) -> Gaussian:
    """N(mean, std^2 I); with a context of 2 numbers N(context + mean, std^2 I)."""
    form = Gaussian(GaussianConfig(units=4, layers=0), LATENT, context).eval()
    raw = math.log(math.expm1(std - LATENT.min_std)) - math.log(math.expm1(1.0))
    with torch.no_grad():
        for parameter in form.parameters():
            parameter.zero_()
        bias = form.net.bent[0].bias if context else form.free[0]
        bias.copy_(torch.tensor([mean, mean, raw, raw]))
        if context:
            form.net.straight.weight[:2] = torch.eye(2)
    return form


def rows(z: Tensor, form: ConditionalDistribution, seed: int, context: Tensor | None = None) -> SlotLatents:
    """Latents in episodes of 10 rows, and draws of the form in their place."""
    sampling = Sampling(generator=generator(seed + 50))
    drawn = form.sample(None, len(z), sampling)[:, 0] if context is None else form.sample(context, 1, sampling)[0]
    return SlotLatents(z, drawn.detach(), context, torch.arange(len(z)) // 10)


def normal(count: int, seed: int) -> Tensor:
    return torch.randn(count, 2, generator=generator(seed))


def ring(count: int, seed: int) -> Tensor:
    """Mean 0 and covariance I, as of the normal distribution."""
    angle = 2 * math.pi * torch.rand(count, generator=generator(seed))
    return (2**0.5 + 0.07 * normal(count, seed + 1)[:, :1]) * torch.stack([angle.cos(), angle.sin()], 1)


def clusters(count: int, seed: int) -> Tensor:
    """N((-2, 0), I / 4) and N((2, 0), I / 4), one as often as the other."""
    side = 4 * (torch.rand(count, generator=generator(seed + 2)) < 0.5).float() - 2
    return 0.5 * normal(count, seed) + torch.stack([side, torch.zeros_like(side)], 1)


def kl_of_clusters(std: float) -> float:
    """KL(clusters || N(0, std^2 I)) on a grid; their second numbers, N(0, 1 / 4), in closed form."""
    x = torch.linspace(-8, 8, 20_001, dtype=torch.float64)
    at = torch.distributions.Normal(torch.tensor([-2.0, 2.0], dtype=torch.float64), 0.5)
    log_q = at.log_prob(x.unsqueeze(-1)).logsumexp(-1) - math.log(2)
    log_p = torch.distributions.Normal(0.0, std).log_prob(x)
    other = math.log(std / 0.5) + 0.25 / (2 * std**2) - 0.5
    return float(torch.trapezoid(log_q.exp() * (log_q - log_p), x)) + other


def measured(sample, form: ConditionalDistribution, kinds=("mixture",), count: int = 2000, steps: int = 300) -> Regret:
    """Regret of a form at latents that `sample(count, seed)` draws, (latents, context) where they have one."""
    with unchecked():
        parts = [sample(n, seed) for n, seed in ((count, 1), (count // 2, 2), (count, 3))]
        parts = [part if isinstance(part, tuple) else (part, None) for part in parts]
        fitted, validation, test = (rows(z, form, i, context) for i, (z, context) in enumerate(parts))
        candidates = {kind: (kind, form_candidate(form, kind, fitted, generator(6), steps)) for kind in kinds}
        candidates[ITSELF] = ITSELF, refitted(form, fitted, generator(5), steps)
        return regret(form, candidates, validation, test, generator(7))


def test_a_prior_that_is_the_truth_has_no_regret():
    found = measured(normal, gaussian(), ("mixture", "flow"), 1500, 100)
    assert found.nats.low <= 0.002 and found.nats.high >= 0 and abs(found.nats.value) < 0.02
    fitted = gaussian(0.5, 1.5)
    with unchecked():
        fitted.fit(normal(2000, 9), steps=400, lr=1e-2, generator=generator())
    assert abs(measured(normal, fitted).nats.value) < 0.01


def test_a_gaussian_regrets_a_ring_of_the_same_moments():
    found = measured(ring, gaussian(), ("flow",), steps=200)
    assert found.kind == "flow" and found.nats.surely_above(0.5)


def test_regret_is_never_above_the_true_divergence_and_comes_near_it():
    for std in (1.5, 2.1):
        truth, found = kl_of_clusters(std), measured(clusters, gaussian(0.0, std), count=1200, steps=200).nats
        assert found.low <= truth and found.value > 0.8 * truth
    assert truth == pytest.approx(1.4, abs=0.3)


def test_a_worse_prior_reads_worse():
    found = [measured(normal, gaussian(*wrong), steps=150) for wrong in ((0.0, 1.0), (0.3, 1.2), (1.0, 2.0))]
    values = [one.nats.value for one in found]
    truth = [2 * (math.log(std) + (1 + mean**2) / (2 * std**2) - 0.5) for mean, std in ((0.3, 1.2), (1.0, 2.0))]
    assert values == sorted(values) and found[1].nats.low > found[0].nats.high and found[2].nats.low > found[1].nats.high
    assert all(0.6 * kl < value < 1.3 * kl for value, kl in zip(values[1:], truth))


def test_regret_given_a_context_is_that_of_the_errors_alone():
    def moved(count: int, seed: int) -> tuple[Tensor, Tensor]:
        context = 30 * normal(count, seed + 20)
        return context + normal(count, seed), context

    right, wide, biased = (measured(moved, gaussian(*wrong, context=2), steps=100).nats for wrong in ((0, 1), (0, 3), (1, 1)))
    assert right.low <= 0.01 and abs(right.value) < 0.03
    assert wide.value == pytest.approx(2 * (math.log(3) + 1 / 18 - 0.5), rel=0.15)
    assert biased.value == pytest.approx(1, rel=0.2)


def test_where_every_candidate_is_worse_the_prior_itself_is_best():
    form = gaussian()
    validation, test = rows(normal(200, 1), form, 1), rows(normal(200, 2), form, 2)
    found = regret(form, {"bad": ("mixture", lambda at: -10 - at.inferred.square().sum(-1))}, validation, test, generator())
    assert found.kind is None and (found.nats.value, found.nats.low, found.nats.high) == (0, 0, 0)
    assert regret(form, {}, validation, test, generator()) is None


def test_candidates_are_normalised_densities():
    form, fitted = gaussian(0.0, 2.0), rows(5 + 3 * clusters(600, 4), gaussian(), 0)
    side = torch.linspace(-40, 50, 500)
    grid = torch.cartesian_prod(side, side)
    with unchecked():
        for kind in ("mixture", "flow"):
            score = form_candidate(form, kind, fitted, generator(), 100)
            total = score(SlotLatents(grid, grid, None, torch.zeros(len(grid)))).exp().sum() * (side[1] - side[0]) ** 2
            assert float(total) == pytest.approx(1, abs=0.02)
        moved = gaussian(context=2)
        context = torch.tensor([[3.0, -1.0]]).expand(600, -1) + 0.1 * normal(600, 5)
        given = rows(context + 2 * normal(600, 6), moved, 0, context)
        score = form_candidate(moved, "mixture", given, generator(), 50)
        same = context[:1].expand(len(grid), -1)

        class OneScale(Gaussian):
            """Its draws are the same at each row, so that the units do not vary over the grid."""

            def sample(self, context, count=1, sampling=None):
                one = super().sample(context[:1], count, sampling)
                return one.expand(-1, len(context), -1)

        moved.__class__ = OneScale
        total = score(SlotLatents(grid, grid, same, torch.zeros(len(grid)))).exp().sum() * (side[1] - side[0]) ** 2
        assert float(total) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("kind", ["energy", "diffusion", "hierarchical"])
def test_priors_without_a_plain_log_probability_are_scored_in_normalised_nats(kind):
    for context in (0, 3):
        form = registry.build("distribution", small("distribution", kind), LATENT, context, None).eval()
        z, h = 0.5 * normal(12, 1), torch.randn(12, 3, generator=generator(2)) if context else None
        nats = log_scores(form, z, h, generator())
        assert nats.shape == (12,) and nats.isfinite().all()
    if kind == "energy":
        with torch.no_grad():
            wanted = form.log_prob(z, h) - form.log_z(h, 4000, Sampling(generator=generator(3)))[0]
        assert float((nats - wanted).abs().mean()) < 0.3


# Draws ------------------------------------------------------------------------------------------------------------------


def test_draws_of_a_worse_prior_are_told_apart_more_often():
    found = []
    for wrong in ((0.0, 1.0), (0.6, 1.2), (2.0, 1.0)):
        figures = compare(gaussian(*wrong), rows(normal(400, 1), gaussian(*wrong), 4), generator(), "some").figures
        found.append(figures)
    for name in ("some_auc", "some_mmd", "some_sliced_w2", "some_ks_share"):
        values = [one[name].value for one in found]
        assert values == sorted(values) and values[0] < values[-1], name
    assert [one["some_auc_p"].value <= 0.05 for one in found] == [False, True, True]
    assert found[0]["some_auc"].low < 0.5 < found[0]["some_auc"].high and found[1]["some_auc"].low > 0.5
    assert found[0]["some_sliced_w2"].value < found[0]["some_sliced_w2_floor"].high < found[2]["some_sliced_w2"].value


def test_draws_given_a_context_are_compared_in_the_units_of_the_prior():
    context = 30 * normal(400, 5)
    z = context + normal(400, 6)
    right, narrow = (
        compare(form, rows(z, form, 7, context), generator(), "some").figures
        for form in (gaussian(context=2), gaussian(0.0, 0.3, context=2))
    )
    assert right["some_auc_p"].value > 0.05 and right["some_ks_share"].value == 0
    assert narrow["some_auc"].low > 0.65 and narrow["some_ks_share"].value == 1  # a hundredth of the latents' own deviation
    shift, scale = residuals(gaussian(0.5, 2.0, context=2), rows(z, gaussian(context=2), 7, context), generator())
    torch.testing.assert_close(shift, context + 0.5)
    assert float(scale.mean()) == pytest.approx(2, rel=0.1)


def test_principal_directions_are_as_long_as_one_another_and_few():
    h = normal(300, 8) @ torch.randn(2, 20, generator=generator(9))
    found = principal(h)
    assert found.shape == (300, 2)  # the rest is a line of these
    torch.testing.assert_close(found.T @ found / 300, torch.eye(2), rtol=0, atol=1e-2)
    assert principal(torch.randn(300, 20, generator=generator(10))).shape == (300, 8) and principal(None) is None


# Of a world model -------------------------------------------------------------------------------------------------------


def walks(observation: spaces.Space = PAIR, count: int = 8, length: int = 12, seed: int = 0) -> Episodes:
    """Vectors that move at random around 0; pictures, categories and bits are random."""
    rng, spec, total, obs = np.random.default_rng(seed), ObsSpec.from_space(observation), count * length, {}
    for name, key in spec.keys.items():
        space = key.space  # a new one at each call
        space.seed(seed)
        x = np.zeros((count, length, 2))
        for t in range(length):
            x[:, t] = 0.9 * x[:, t - 1] * (t > 0) + rng.normal(size=(count, 2))
        x = x.reshape(total, 2) if key.kind == "vector" else np.stack([space.sample() for _ in range(total)])
        obs[name] = torch.from_numpy(np.asarray(x).reshape(1, total, *key.raw_shape).astype(key.raw_dtype))
    first = (torch.arange(total) % length == 0).unsqueeze(0)
    last = first.roll(-1, 1)
    action = torch.eye(2)[torch.from_numpy(rng.integers(0, 2, total))].unsqueeze(0) * ~last.unsqueeze(-1)
    return Episodes(Batch(obs, action, action.roll(1, 1), torch.ones(1, total), first, last, last & False))


def evidence_of(world: WorldModel, observation: spaces.Space = PAIR, count: int = 8) -> Evidence:
    with unchecked():
        seen = [filter_episodes(world.eval(), walks(observation, count, seed=seed)) for seed in (1, 2, 3)]
    return Evidence(world, "runs/some", *seen, walks(observation, count, seed=3))


def true_evidence(slot: str, count: int = 30, **parts) -> Evidence:
    """Of a world whose latents are draws of its own prior in a slot: that prior is the truth."""
    evidence = evidence_of(small_world(PAIR, **parts), PAIR, count)
    if hasattr(evidence.world.dynamics.transition, "largest"):
        evidence.world.dynamics.transition.largest += 100  # nothing that is drawn is compressed

    def drawn(seen: FilteredStates, seed: int) -> FilteredStates:
        latents = slot_latents(evidence.world, seen, slot, generator(seed))
        z = seen.z.clone()
        z[seen.step > 0 if slot == "transition" else seen.step >= 0] = latents.drawn
        posterior = seen.posterior
        return replace(seen, posterior=replace(posterior, observed=z) if hasattr(posterior, "observed") else PointPosterior(z))

    parts = {name: drawn(getattr(evidence, name), 100 + seed) for seed, name in enumerate(("fitted", "validation", "test"))}
    return replace(evidence, **parts)


GAUSSIAN = small("distribution", "gaussian")
ANCHORED = {"dynamics": {"kind": "anchored"}, "transition": small("distribution", "ensemble"), "initial": None}
WORLDS = {
    "gaussian": (PAIR, {"latent": "gaussian"}),
    "vae": (PAIR, {"latent": "gaussian", "dynamics": {"posterior": "observation"}, "marginal": GAUSSIAN}),
    "categorical": (PAIR, {"latent": "categorical"}),
    "points": (PAIR, {"latent": "point", "dynamics": {"posterior": "observation"}}),
    "anchored": (PAIR, ANCHORED),
    "anchored mixed": (spaces.Dict({"a": PAIR, "c": spaces.Discrete(3)}), ANCHORED),
    "anchored discrete": (spaces.Discrete(4), ANCHORED),
    "anchored pictures": (spaces.Dict({"a": PAIR, "b": spaces.Box(0, 255, (16, 16, 3), np.uint8)}), ANCHORED),
    "energy": (
        PAIR,
        {"latent": "gaussian", "initial": small("distribution", "energy"), "marginal": small("distribution", "energy")},
    ),
    "vamp": (PAIR, {"latent": "gaussian", "marginal": small("distribution", "vamp")}),
}


@pytest.mark.parametrize("kind", WORLDS)
def test_every_kind_of_world_is_judged_in_every_slot_it_has_and_stays_as_it_was(kind):
    observation, parts = WORLDS[kind]
    evidence = evidence_of(small_world(observation, **parts), observation, 22)
    before = {name: x.clone() for name, x in evidence.world.state_dict().items()}
    state = torch.get_rng_state()
    with unchecked():
        for slot in ("initial", "transition", "marginal"):
            found = prior(evidence, slot, steps=3)
            if prior_of(evidence.world, slot) is None:
                assert not found.figures and "has none" in found.skipped
                continue
            assert found.figures[f"{slot}_regret"].known and all(name.startswith(slot) for name in found.figures)
            assert 0 <= found.figures[f"{slot}_auc"].value <= 1 and 0 < found.figures[f"{slot}_mmd_p"].value <= 1
            assert found.sentences and all(slot in text for text in found.sentences)
            assert (found.skipped is not None) == (kind in ("anchored mixed", "anchored discrete"))
    assert all(torch.equal(x, before[name]) for name, x in evidence.world.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in evidence.world.parameters())
    assert torch.equal(torch.get_rng_state(), state) and not evidence.world.training


def test_the_same_evidence_gives_the_same_figures():
    evidence = evidence_of(small_world(PAIR, latent="gaussian"))
    with unchecked():
        one, other = (prior(evidence, "transition", steps=5) for _ in range(2))
    assert one == other


def test_a_marginal_that_is_the_truth_is_right_and_one_that_was_moved_is_not():
    evidence = true_evidence("marginal", **WORLDS["vae"][1])
    with unchecked():
        right = prior(evidence, "marginal", steps=60)
        with torch.no_grad():
            evidence.world.marginal.free[:, :2] += 2  # the deviation is 1
        wrong = prior(evidence, "marginal", steps=150)
    assert wrong.figures["marginal_regret"].surely_above(2) and wrong.figures["marginal_regret"].low < 4  # KL: 2^2 / 2 a number
    assert right.figures["marginal_regret"].low <= 0.01 and right.figures["marginal_regret"].value < 0.02
    assert right.figures["marginal_auc"].low < 0.5 < 0.8 < wrong.figures["marginal_auc"].low
    assert right.figures["marginal_auc_p"].value > 0.05 and right.figures["marginal_ks_share"].value == 0
    assert wrong.figures["marginal_sliced_w2"].value > 5 * wrong.figures["marginal_sliced_w2_floor"].value
    assert wrong.figures["marginal_ks_share"].value == 1 and wrong.figures["marginal_mmd_p"].value < 0.02
    assert len(right.sentences) == 1 and "right" in right.sentences[0]
    assert any("worldmodel fit-prior runs/some --slot marginal --kind" in text for text in wrong.sentences)
    assert any(str(wrong.figures["marginal_regret"]) in text for text in wrong.sentences)


def test_an_anchored_transition_with_deviations_that_are_too_wide_is_found_out():
    evidence = true_evidence("transition", **ANCHORED)
    form = evidence.world.dynamics.transition.form
    with unchecked():
        right = prior(evidence, "transition", steps=60)
        form.calibration.mean[0] *= 16  # four times as wide
        wrong = prior(evidence, "transition", steps=60)
    truth = 2 * (math.log(4) + 1 / 32 - 0.5)
    assert wrong.figures["transition_regret"].value == pytest.approx(truth, rel=0.2)
    assert right.figures["transition_regret"].low <= 0.01 and right.figures["transition_regret"].value < 0.05
    assert right.figures["transition_auc"].low < 0.5 < 0.6 < wrong.figures["transition_auc"].low
    assert any("--slot transition" in text or "--resume" in text for text in wrong.sentences)


def test_a_prior_that_is_right_gets_one_sentence_and_one_that_is_wrong_a_command():
    evidence = evidence_of(small_world(PAIR, **WORLDS["vae"][1]), count=20)
    figures = {"marginal_auc": Figure(0.5, 0.45, 0.55), "marginal_auc_p": Figure(0.4)}
    told = {"marginal_auc": Figure(0.8, 0.75, 0.85), "marginal_auc_p": Figure(0.005)}
    right = _sentences(evidence, "marginal", Regret(Figure(0.01, -0.01, 0.03, "nats"), "flow"), figures)
    assert len(right) == 1 and "0.01 nats (-0.01 to 0.03)" in right[0] and "worldmodel" not in right[0]
    lost = _sentences(evidence, "marginal", Regret(Figure(2.0, 1.5, 2.5, "nats"), "mixture"), told)
    assert len(lost) == 2 and all("`worldmodel fit-prior runs/some --slot marginal --kind mixture`" in text for text in lost)
    again = _sentences(evidence, "marginal", Regret(Figure(2.0, 1.5, 2.5, "nats"), ITSELF), figures)
    assert "`worldmodel train runs/some --resume" in again[0]
    only = _sentences(evidence, "marginal", None, told)
    assert "0.8 (0.75 to 0.85)" in only[0] and "--kind flow" in only[0]


def test_forms_are_those_that_a_config_could_name():
    assert forms_for(small_world(PAIR, latent="gaussian"), "marginal") == ["mixture", "flow", "vamp"]
    assert forms_for(small_world(PAIR, latent="categorical"), "transition") == ["mixture", "vamp"]
    assert forms_for(small_world(PAIR, latent="point", dynamics={"posterior": "observation"}), "initial") == ["mixture", "flow"]
    assert forms_for(small_world(PAIR, **ANCHORED), "transition") == ["mixture", "flow"]


def test_a_mixture_of_posteriors_explains_latents_better_than_a_prior_far_away():
    evidence = evidence_of(small_world(PAIR, **WORLDS["vae"][1]), count=20)
    own = slot_latents(evidence.world, evidence.fitted, "marginal", generator(1))
    with unchecked():
        score = vamp_candidate(evidence.world, evidence.fitted, "marginal", own, generator(2), 100)
    test = slot_latents(evidence.world, evidence.test, "marginal", generator(3))
    standard = log_scores(evidence.world.marginal, test.inferred, None, generator())
    assert float(score(test).mean()) > float(standard.mean()) + 0.3


def test_too_few_rows_are_said_and_not_judged():
    evidence = evidence_of(small_world(PAIR, latent="gaussian"), count=3)
    with unchecked():
        found = prior(replace(evidence, fitted=evidence_of(evidence.world, count=20).fitted), "initial", steps=2)
        assert "5 are needed" in found.skipped and "initial_regret" in found.figures and "initial_auc" not in found.figures
        none = prior(replace(evidence, test=filter_episodes(evidence.world, walks(count=1))), "transition", steps=2)
    assert not none.figures and "1 episodes" in none.skipped
