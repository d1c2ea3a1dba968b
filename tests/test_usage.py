"""Use of latents: estimators against known truth, and a section that says so when the latent is made useless."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from conftest import descend, generator, small, small_world, unchecked
from gymnasium import spaces
from torch import Tensor

from worldmodel.data import Batch, Episodes, Sampling
from worldmodel.diagnostics.evidence import Evidence, resampled
from worldmodel.diagnostics.geometry import filter_episodes
from worldmodel.diagnostics.usage import (
    decoded_keys,
    effective_rank,
    information,
    latents,
    scaled_rows,
    shuffled_errors,
    variational_bound,
    with_latent,
)
from worldmodel.distributions import CategoricalLatent, CategoricalPosterior, GaussianLatent, GaussianPosterior, PointPosterior
from worldmodel.distributions.categorical import CategoricalLatentConfig
from worldmodel.distributions.gaussian import GaussianLatentConfig
from worldmodel.model import WorldModel
from worldmodel.spaces import ObsSpec

PAIR = spaces.Box(-np.inf, np.inf, (2,), np.float32)
PICTURE = spaces.Box(0, 255, (16, 16, 3), np.uint8)
MIXED = spaces.Dict({"a": PAIR, "b": PICTURE, "c": spaces.Discrete(3)})


def circling(observation: spaces.Space = PAIR, count: int = 8, length: int = 30, seed: int = 0) -> Episodes:
    """Points that go round a noisy circle; pictures, categories and bits are random."""
    rng, spec, rows = np.random.default_rng(seed), ObsSpec.from_space(observation), count * length
    angle = rng.uniform(0, 6, (count, 1)) + 0.2 * np.arange(length) + 0.05 * rng.normal(size=(count, length)).cumsum(1)
    circle = np.stack([np.cos(angle), np.sin(angle)], -1).reshape(rows, 2)
    obs = {}
    for name, key in spec.keys.items():
        space = key.space  # a new one at each call
        space.seed(seed)
        x = circle if key.kind == "vector" else np.stack([space.sample() for _ in range(rows)])
        obs[name] = torch.from_numpy(x.reshape(1, rows, *key.raw_shape).astype(key.raw_dtype))
    first = (torch.arange(rows) % length == 0).unsqueeze(0)
    last = first.roll(-1, 1)
    action = torch.eye(2)[torch.from_numpy(rng.integers(0, 2, rows))].unsqueeze(0) * ~last.unsqueeze(-1)
    previous = action.roll(1, 1)
    return Episodes(Batch(obs, action, previous, torch.ones(1, rows), first, last, last & False))


def evidence_of(world: WorldModel, observation: spaces.Space = PAIR, count: int = 8, length: int = 30) -> Evidence:
    """What a diagnosis reads, of `circling` points."""
    seen = [filter_episodes(world, circling(observation, count, length, seed)) for seed in (1, 2, 3)]
    return Evidence(world, "runs/some", *seen, circling(observation, count, length, 3))


def trained(observation: spaces.Space = PAIR, steps: int = 60, seed: int = 0, scales: dict | None = None, **parts) -> WorldModel:
    """A small world that has learned from `circling` points; `scales` weigh losses by the beginning of their name."""
    world = small_world(observation, seed=seed, **parts)
    rows = circling(observation, 16, 15, 5).windows(torch.arange(16), torch.zeros(16, dtype=torch.int64), 15)[0]
    world.scaling.update(world.obs.canonical({name: x.flatten(0, 1) for name, x in rows.obs.items()}))
    batch = rows.with_obs(world.preprocess(rows.obs))
    rng, scales = generator(seed), {"observation": 1.0, "dyn": 1.0, "rep": 0.1, **(scales or {})}

    def loss(step: int) -> Tensor:
        trace = world.trace(batch, None, Sampling(generator=rng))
        terms = world.loss(trace, batch, Sampling(generator=rng))
        return sum(scales.get(name.split("/")[0], 1.0) * term.mean() for name, term in terms.items())

    with unchecked():
        world.train()
        descend(loss, world.parameters(), 1e-2, steps)
    return world.eval()


LAW, POINTS = small("distribution", "gaussian", std="fitted"), {"latent": "point", "dynamics": {"posterior": "observation"}}
ANCHORED = {"dynamics": {"kind": "anchored"}, "transition": None, "initial": None}
KINDS = {
    "gaussian": (PAIR, {"latent": "gaussian"}),
    "categorical": (PAIR, {"latent": "categorical"}),
    "vae": (
        PAIR,
        {
            "latent": "gaussian",
            "dynamics": {"posterior": "observation"},
            "decoder": small("decoder", "standard", reads="latent"),
            "marginal": small("distribution", "gaussian", standard=True),
        },
    ),
    "anchored": (PAIR, ANCHORED),
    "anchored with pictures": (MIXED, ANCHORED),
    "jepa": (PAIR, {**POINTS, "transition": LAW, "objective": small("objective", "jepa")}),
    "jepa without a decoder": (PAIR, {**POINTS, "transition": LAW, "objective": small("objective", "jepa", probe=False)}),
    "pictures": (PICTURE, {"latent": "gaussian"}),
    "categories": (spaces.Discrete(3), {"latent": "categorical"}),
    "flow": (PAIR, {"latent": "gaussian", "transition": small("distribution", "flow")}),
    "drawn": (PAIR, {"latent": "gaussian", "decoder": small("decoder", "diffusion")}),
    "diamond": (PICTURE, {"dynamics": {"kind": "diamond"}, "transition": None, "initial": None}),
}
"""{name: (observations, parts of a small world)} of the kinds of worlds that a diagnosis meets."""


def world_of(kind: str, seed: int = 0) -> tuple[WorldModel, spaces.Space]:
    """(an untrained small world of a kind, its observations)."""
    observation, parts = KINDS[kind]
    return small_world(observation, seed=seed, **parts).eval(), observation


@cache
def learned() -> Evidence:
    """Of a world with a Gaussian latent that has learned from these points; made once for all test modules."""
    return evidence_of(trained(latent="gaussian"))


@pytest.fixture
def gaussian() -> Evidence:
    return learned()


def changed(evidence: Evidence, **parts) -> Evidence:
    """The same evidence with other content of its test rows."""
    return replace(evidence, test=replace(evidence.test, **parts))


# Estimators -------------------------------------------------------------------------------------------------------------


def linear(size: int, sigma: float, count: int = 2000, seed: int = 0) -> tuple[GaussianPosterior, Tensor, float]:
    """(q(z|x), draws of it, I(x; z)) of x = z + sigma e, z and e ~ N(0, I)."""
    rng, variance = generator(seed), sigma**2 / (1 + sigma**2)
    x = torch.randn(count, size, generator=rng) + sigma * torch.randn(count, size, generator=rng)
    posterior = GaussianPosterior(x / (1 + sigma**2), torch.full_like(x, variance**0.5))
    return posterior, posterior.sample(torch.randn(count, size, generator=rng)), 0.5 * size * math.log(1 + sigma**-2)


def test_the_information_of_a_linear_gaussian_model_lies_between_its_bounds():
    posterior, z, truth = linear(2, 0.1)
    found = information(posterior, z)
    assert float(found.lower.mean()) < truth < float(found.upper.mean())
    assert float(found.upper.mean() - found.lower.mean()) < 0.5 and not found.saturated


def test_many_numbers_saturate_the_lower_bound_and_not_the_variational_one():
    posterior, z, truth = linear(16, 0.2)
    found, (other, drawn, _) = information(posterior, z), linear(16, 0.2, seed=1)
    assert found.saturated and float(found.lower.mean()) <= math.log(2000) < truth < float(found.upper.mean())
    bound = variational_bound(GaussianLatent(GaussianLatentConfig(size=16)), posterior, z, other, drawn)
    assert truth - 0.3 < float(bound.mean()) < truth + 0.5


def test_rows_of_the_same_episode_do_not_spoil_the_upper_bound():
    posterior, z, truth = linear(2, 0.1, 200)
    posterior, z = posterior.map(lambda x: x.repeat_interleave(5, 0)), z.repeat_interleave(5, 0)
    episode = torch.arange(200).repeat_interleave(5)
    assert float(information(posterior, z).upper.mean()) < truth - 0.3
    assert float(information(posterior, z, episode).upper.mean()) > truth - 0.2
    assert not information(posterior, z, episode * 0).upper.isfinite().any()


def test_categories_tell_the_logarithm_of_their_number():
    latent = CategoricalLatent(CategoricalLatentConfig(variables=1, classes=4))
    posterior = CategoricalPosterior(torch.eye(4).repeat(50, 1).unsqueeze(1))
    z = posterior.mode
    for each in (information(posterior, z).lower, variational_bound(latent, posterior, z, posterior, z)):
        assert float(each.mean()) == pytest.approx(math.log(4), abs=1e-4) and len(each) == 200


def test_a_posterior_that_is_the_same_for_all_rows_tells_nothing():
    _, z, _ = linear(2, 0.1, 300)
    found = information(GaussianPosterior(torch.zeros_like(z), torch.ones_like(z)), z)
    assert abs(float(found.lower.mean())) < 1e-4 and abs(float(found.upper.mean())) < 1e-4


def test_the_effective_rank_counts_directions():
    x = torch.randn(4000, 3, generator=generator())
    assert effective_rank(x) == pytest.approx(3, abs=0.02)
    assert effective_rank(x * torch.tensor([1.0, 1.0, 0.0])) == pytest.approx(2, abs=0.02)
    assert effective_rank(x[:, :1] @ torch.ones(1, 5)) == pytest.approx(1, abs=1e-3)
    unequal = effective_rank(x[:, :2] * torch.tensor([3.0, 1.0]))
    assert unequal == pytest.approx(math.exp(-0.9 * math.log(0.9) - 0.1 * math.log(0.1)), abs=0.02)
    assert math.isnan(effective_rank(torch.ones(9, 3)))


def test_a_resampled_median_has_the_truth_in_its_interval_in_nine_of_ten_cases():
    held, episode = 0, torch.arange(30).repeat_interleave(4)
    for seed in range(40):
        x = torch.randn(120, generator=generator(seed)) + torch.randn(30, generator=generator(seed + 100)).repeat_interleave(4)
        figure = resampled(lambda rows, x=x: float(x[rows].median()), episode, seed)
        held += figure.low <= 0 <= figure.high
    assert held >= 33
    assert resampled(lambda rows: 1.0, torch.zeros(3)).low is None and not resampled(lambda rows: 1.0, torch.zeros(0)).known


# The section ------------------------------------------------------------------------------------------------------------


def test_a_trained_latent_is_used_and_the_section_says_so(gaussian):
    found = latents(gaussian)
    assert found.skipped is None and found.figures["active variables"].value == 1
    assert found.figures["shuffled latent"].surely_above(2) and found.figures["effective rank"].surely_above(1.5)
    low, high = (found.figures[f"information at {end}"] for end in ("least", "most"))
    assert 1 < low.value <= high.value < 7 and low.value < found.figures["information ceiling"].value
    assert not [text for text in found.sentences if "`" in text]  # nothing is to be mended
    assert found.curves["KL of each latent variable"].x == [1, 2]


def test_a_collapsed_posterior_is_found_out(gaussian):
    posterior = gaussian.test.posterior.map(torch.ones_like)
    same = changed(gaussian, posterior=posterior, active=0)
    found = latents(replace(same, validation=same.test))
    assert found.figures["active variables"].value == 0 and not found.figures["effective rank"].known
    assert abs(found.figures["information at most"].value) < 0.05
    alarms = [text for text in found.sentences if "collapsed" in text]
    assert len(alarms) == 2 and all(
        "worldmodel train runs/some/config.yaml model.dynamics.free_nats=1.0" in text for text in alarms
    )


def test_the_less_a_decoder_reads_of_the_latent_the_lower_is_its_ratio(gaussian):
    world, seen = copy.deepcopy(gaussian.world), gaussian.test
    mean, ratios = world.decoder.mean, []
    for share in (1.0, 0.5, 0.0):
        world.decoder.mean = lambda feature, share=share: mean(with_latent(feature, share * world.dynamics.z_of(feature)))
        own, other = shuffled_errors(world, seen.feature, scaled_rows(world, seen), generator())
        ratios.append(float(other.mean() / own.mean()))
    assert ratios[0] > 2 * ratios[1] > ratios[1] > 1.1 and ratios[2] == pytest.approx(1, abs=1e-5)
    found = latents(replace(gaussian, world=world))
    assert found.figures["shuffled latent"].value == pytest.approx(1, abs=1e-5)
    assert any("hardly reads the latent" in text and "`worldmodel train" in text for text in found.sentences)


def test_a_worse_transition_expects_less_of_the_latent(gaussian):
    world = copy.deepcopy(gaussian.world)
    with torch.no_grad():
        for parameter in world.dynamics.transition.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator()))
    before, after = (latents(x).figures["largest kl"].value for x in (gaussian, replace(gaussian, world=world)))
    assert after > 1.5 * before


def test_points_on_a_line_and_dead_classes_are_found_out():
    world, observation = world_of("jepa")
    evidence = evidence_of(world, observation)
    line = evidence.test.z[:, :1] @ torch.ones(1, 2)
    found = latents(changed(evidence, z=line, posterior=PointPosterior(line)))
    assert found.figures["effective rank"].value == pytest.approx(1, abs=0.01)
    assert any("on a line" in text and "train.scales.collapse=25" in text for text in found.sentences)
    world, observation = world_of("categorical")
    evidence = evidence_of(world, observation)
    one = torch.zeros_like(evidence.test.posterior.probs)
    one[..., 0] = 1
    assert latents(evidence).figures["dead classes"].value == 0
    found = latents(changed(evidence, posterior=CategoricalPosterior(one)))
    assert found.figures["dead classes"].value == pytest.approx(2 / 3) and any("never used" in text for text in found.sentences)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_world_has_the_figures_that_it_can_have(kind):
    world, observation = world_of(kind)
    found = latents(evidence_of(world, observation, 3, 8))
    assert found.figures["effective rank"].known and found.sentences
    assert ("shuffled latent" in found.figures) == bool(decoded_keys(world))
    assert ("information at least" in found.figures) == (kind not in ("anchored", "jepa", "jepa without a decoder", "diamond"))
    assert (found.skipped is None) == (kind in ("gaussian", "categorical", "vae", "pictures", "categories", "drawn"))
    assert found.skipped is None or "because" in found.skipped


def test_few_rows_are_no_error(gaussian):
    few = filter_episodes(gaussian.world, circling(count=1, length=3))
    found = latents(replace(gaussian, test=few, validation=few))
    assert found.figures["information at most"].value is None and "two episodes" in found.skipped
    assert latents(replace(gaussian, test=filter_episodes(gaussian.world, circling(count=1, length=1)))).skipped
