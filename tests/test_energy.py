"""Energy-based priors: what only they promise."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import generator, known_batch, small, small_latent, small_world
from test_contracts import two_moons
from torch import Tensor, nn

from worldmodel import registry
from worldmodel.data import Sampling
from worldmodel.distributions import Energy
from worldmodel.errors import ConfigError, NumericsError
from worldmodel.learner import Learner, TrainConfig
from worldmodel.nn.moments import RunningMoments

OPTIONS = {"layers": 2, "steps": 10, "candidates": 64, "buffer": 64, "base": small("distribution", "gaussian")}


def energy(context: int = 0, **options) -> Energy:
    config = small("distribution", "energy", **{**OPTIONS, **options})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return registry.build("distribution", config, small_latent("gaussian"), context)


class Bowl(nn.Module):
    """f = -curve / 2 |u|^2 + slope . u in the base's units u: the prior is a Gaussian, and Z is known."""

    curve, slope = 2.0, torch.tensor([1.0, -0.5])

    def forward(self, u: Tensor) -> Tensor:
        u = u[..., :2]
        return (-0.5 * self.curve * u.square().sum(-1) + (self.slope * u).sum(-1)).unsqueeze(-1)

    @property
    def log_z(self) -> float:
        """ln E exp f under N(0, I) = |slope|^2 / 2 (1 + curve) - ln(1 + curve)."""
        return float(self.slope.square().sum() / (2 * (1 + self.curve))) - math.log(1 + self.curve)


def bowl(**options) -> Energy:
    prior = energy(base=small("distribution", "gaussian", standard=True), **options)
    prior.net = Bowl()
    prior._fixed_generator = generator  # it has no parameters
    return prior


def test_a_base_is_fitted_to_the_same_bits_whatever_the_size_of_the_energys_own_loss():
    latents, bases = 5 + torch.randn(200, 2, generator=generator()), []
    for magnitude in (1e-3, 1e6):
        prior = energy(magnitude=magnitude)
        nn.init.normal_(prior.net[-1].weight, generator=generator())
        prior.fit(latents, steps=5, lr=0.1, generator=generator())
        bases.append([p.detach() for p in prior.base.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*bases, strict=True))


@pytest.mark.parametrize("ais", [False, True], ids=["weighted draws", "annealed"])
def test_the_estimate_of_z_is_within_its_error_of_a_known_one(ais):
    prior = bowl()
    each = torch.stack([prior.log_z(None, 400, Sampling(generator=generator(seed)), ais=ais)[0] for seed in range(5)])
    assert abs(float(each.mean()) - Bowl().log_z) < 2 * float(each.std()) / math.sqrt(5) + 1e-3


def test_annealing_keeps_the_effective_sample_size_where_weighted_draws_lose_it():
    prior = bowl()
    prior.net.slope = torch.tensor([6.0, -6.0])
    (_, few), (estimate, many) = prior.log_z(None, 300), prior.log_z(None, 300, ais=True)
    assert float(few) < 30 < 90 < float(many)
    assert abs(float(estimate) - prior.net.log_z) < 0.2


@pytest.mark.parametrize("sampler", ["langevin", "resampling"])
def test_draws_have_the_moments_of_a_known_prior(sampler):
    prior = bowl(sampler=sampler, steps=30)
    x = prior.sample(None, 8000, Sampling(generator=generator()))[:, 0]
    torch.testing.assert_close(x.mean(0), Bowl.slope / 3, atol=0.03, rtol=0)
    torch.testing.assert_close(x.var(0), torch.full((2,), 1 / 3), atol=0.03, rtol=0)


def test_the_mode_is_uphill_from_the_base_and_longer_chains_stay_at_the_prior():
    prior = bowl(sampler="langevin")
    mode = prior.sample(None, 1, Sampling(mode=True, steps=60))[0, 0]
    torch.testing.assert_close(mode, Bowl.slope / 3, atol=0.02, rtol=0)
    spread = [float(prior.sample(None, 4000, Sampling(generator=generator(), steps=n)).var()) for n in (20, 100)]
    assert spread[0] == pytest.approx(spread[1], abs=0.05)


def test_an_untrained_energy_is_its_base():
    prior, x = energy(3), torch.randn(5, 2, generator=generator())
    context = torch.randn(5, 3, generator=generator(1))
    assert torch.equal(prior.log_prob(x, context), prior.base.log_prob(x, context))
    torch.testing.assert_close(prior.log_z(context)[0], torch.zeros(5), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("trainer", "base"), [("nce", "gaussian"), ("cd", "gaussian"), ("pcd", "standard")])
def test_every_trainer_beats_a_gaussian_on_two_moons(trainer, base):
    train, test = two_moons(2000, 0), two_moons(2000, 10)
    prior = energy(trainer=trainer, units=32, base=small("distribution", "gaussian", standard=base == "standard"))
    prior.fit(train, steps=100, batch=128, lr=2e-2, generator=generator())
    best_gaussian = torch.distributions.Normal(train.mean(0), train.std(0)).log_prob(test).sum(-1).mean()
    log_z, size = prior.log_z(None, 4000)
    assert float(prior.log_prob(test, None).detach().mean() - log_z - best_gaussian) > 0.3
    assert float(size) > 400


def test_with_a_context_f_is_learned_for_each_context():
    side, other = ((torch.rand(1000, generator=generator(seed)) < 0.5).float() * 2 - 1 for seed in (0, 1))
    latents = torch.stack([side, other], -1) + 0.3 * torch.randn(1000, 2, generator=generator(2))
    context = side.unsqueeze(-1)
    for trainer in ("nce", "cd"):
        prior = energy(1, trainer=trainer, steps=5)
        prior.fit(latents, context, steps=100, batch=128, lr=2e-2, generator=generator())
        right, wrong = (prior.log_prob(latents, c) - prior.log_z(c, 100)[0] for c in (context, -context))
        base = prior.base.log_prob(latents, context)
        assert right.mean() > wrong.mean() + 1 and right.mean() > base.mean() + 0.1


def test_its_measures_say_how_far_the_prior_has_left_its_base():
    x = torch.randn(200, 2, generator=generator())
    assert energy().measures(x, None) == pytest.approx({"f": 0.0, "effective": 1.0}, abs=1e-5)
    seen = bowl().measures(0.3 * x, None)
    assert seen["f"] > 0.3 and seen["effective"] < 0.8


def test_persistent_chains_are_saved_with_the_weights_and_move_in_training_alone():
    prior, x = energy(trainer="pcd"), torch.randn(20, 2, generator=generator())
    before = prior.state_dict()["chains"].clone()
    prior.eval().loss(x, None, sampling=Sampling(generator=generator()))
    assert torch.equal(prior.chains, before)
    prior.train().loss(x, None, sampling=Sampling(generator=generator()))
    assert 0 < int((prior.chains != before).any(-1).sum()) <= 20


def test_persistent_chains_are_refused_with_a_context():
    with pytest.raises(ConfigError, match="trainer=nce or trainer=cd"):
        energy(3, trainer="pcd")


@pytest.mark.parametrize("base", ["energy", "categorical"])
def test_a_base_must_be_an_exact_prior_of_such_latents(base):
    with pytest.raises(ConfigError, match="base=gaussian"):
        small("distribution", "energy", base={"kind": base})


@pytest.mark.parametrize("trainer", ["cd", "pcd"])
def test_a_gap_between_energies_stops_training_and_says_what_to_change(trainer):
    prior = energy(trainer=trainer, max_gap=5.0)
    prior.net = Bowl()
    x = torch.tensor([[9.0, 9.0]]).expand(30, 2)
    with pytest.raises(NumericsError, match=r"max_gap=5 .*step.*magnitude.*trainer=nce"):
        prior.loss(x, None, sampling=Sampling(generator=generator()))


@pytest.mark.parametrize("trainer", ["nce", "cd", "pcd"])
def test_latents_that_are_not_finite_are_no_divergence_but_a_loss_that_is_not_finite(trainer):
    x = torch.zeros(30, 2).index_fill(0, torch.tensor([3]), torch.nan)
    terms = energy(trainer=trainer).loss(x, None, sampling=Sampling(generator=generator()))
    assert not sum(term.mean() for term in terms.values()).isfinite()


def test_chains_that_run_away_stop_training():
    prior = energy(trainer="cd", max_displacement=1.0)
    prior.net = Bowl()
    prior.net.slope, prior.net.curve = torch.tensor([50.0, 0.0]), 0.0
    with pytest.raises(NumericsError, match="max_displacement=1 "):
        prior.loss(torch.zeros(30, 2), None, sampling=Sampling(generator=generator()))


def test_where_the_base_has_no_closed_form_f_reads_latents_in_their_running_units():
    prior = energy(base=small("distribution", "gaussian"))
    prior.moments = RunningMoments(2, prior.MEMORY)
    prior.train().loss(5 + 3 * torch.randn(5000, 2, generator=generator()), None, sampling=Sampling(generator=generator()))
    torch.testing.assert_close(prior.moments.mean.float(), torch.full((2,), 5.0), atol=0.2, rtol=0)
    torch.testing.assert_close(prior.moments.deviation(0), torch.full((2,), 3.0), atol=0.2, rtol=0)


def running(base: str = "mixture") -> Energy:
    """An energy over a base without a closed form."""
    return energy(base=small("distribution", base), units=8, negatives=2, normaliser=4).train()


@pytest.mark.parametrize("base", ["gaussian", "fitted", "mixture", "flow", "hierarchical"])
@pytest.mark.parametrize("slot", ["initial", "transition", "marginal"])
def test_a_model_learns_with_an_energy_over_every_base_in_every_slot(base, slot):
    inner = {"std": "fitted"} if base == "fitted" else {}
    prior = small(
        "distribution", "energy", base=small("distribution", "gaussian" if inner else base, **inner), negatives=2, normaliser=4
    )
    world = small_world(latent="gaussian", **{slot: prior})
    learner = Learner(world, TrainConfig(burn_in=0, warmup=0))
    for seed in range(2):
        learner.update(learner.prepare(known_batch(seed=seed)), generator(seed))
    assert learner.updates == 2


@pytest.mark.parametrize("base", ["gaussian", "hierarchical"])
def test_a_base_with_statistics_of_its_own_keeps_them_in_training(base):
    inner = (
        {"kind": "gaussian", "std": "fitted"}
        if base == "gaussian"
        else {"kind": "hierarchical", "top": 1, "upper": {"kind": "flow"}}
    )
    prior = energy(base=inner, negatives=2).train()
    before = {name: x.clone() for name, x in prior.base.named_buffers()}
    prior.loss(torch.full((3, 2), 50.0) + torch.eye(3, 2), None, sampling=Sampling(generator=generator()))
    assert before and all(not torch.equal(x, before[name]) for name, x in prior.base.named_buffers())


def test_its_measures_hold_those_of_the_base():
    assert "base/outside" in running("flow").measures(torch.randn(5, 2, generator=generator()), None)


def test_latents_that_are_not_finite_leave_the_running_units_as_they_are():
    prior = running()
    prior.loss(torch.tensor([[1.0, torch.nan], [1.0, 2.0]]), None, sampling=Sampling(generator=generator()))
    assert torch.equal(prior.moments.mean.float(), torch.zeros(2)) and torch.equal(prior.moments.deviation(0), torch.ones(2))


def test_training_after_a_fit_hardly_moves_the_units_that_were_fitted():
    prior = running()
    prior.fit(5 + torch.randn(200, 2, generator=generator()), steps=1, generator=generator())
    prior.loss(100 + torch.randn(200, 2, generator=generator()), None, sampling=Sampling(generator=generator()))
    torch.testing.assert_close(prior.moments.mean.float(), torch.full((2,), 5.95), atol=0.3, rtol=0)


@pytest.mark.parametrize("sampler", ["langevin", "resampling"])
def test_the_callers_noise_is_no_matter_to_a_prior_that_chooses_or_refines(sampler):
    prior, noise = energy(sampler=sampler), torch.zeros(3, 1, 2)
    draws = [prior.sample(None, 3, Sampling(generator=generator(), noise=given)) for given in (None, noise)]
    assert torch.equal(*draws)


def test_a_base_made_of_posteriors_is_refused_with_the_reason():
    with pytest.raises(ConfigError, match=r"made of the encoder's posteriors.*base=mixture"):
        small("distribution", "energy", base="vamp")


def test_looking_at_an_energy_moves_no_random_state():
    prior = registry.build("distribution", small("distribution", "energy"), small_latent("gaussian"), 0)
    x, before = torch.randn(9, prior.latent.size, generator=generator()), torch.get_rng_state()
    assert prior.measures(x, None) == prior.measures(x, None)
    assert torch.equal(torch.get_rng_state(), before)
