"""The priors that every registered prior of latents and every kind of latent keeps. A new one is tested by being registered."""

from __future__ import annotations

import itertools
import math
import types
from typing import NamedTuple

import pytest
import torch
from conftest import assert_near, generator, reached, small, small_latent, small_source
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from worldmodel import registry
from worldmodel.data import Sampling
from worldmodel.distributions import ConditionalDistribution, GaussianPosterior, Latent, Posterior, likelihood
from worldmodel.errors import ConfigError
from worldmodel.model import ModelConfig

LATENTS = [kind for kind in registry.kinds("latent") if not registry.part("latent", kind).deterministic]
KINDS = registry.kinds("distribution")
SLOTS = ("initial", "transition", "marginal")
PROMISED = {"gaussian": "ITM", "categorical": "IT", "mixture": "ITM", "vamp": "ITM", "flow": "ITM", "energy": "ITM"}
PROMISED |= {"hierarchical": "IT", "diffusion": "ITM", "ensemble": "ITM"}
"""First letters of the slots that each form fills."""
CONTEXT = 3


class Cell(NamedTuple):
    """A form in a slot, over a kind of latent."""

    kind: str
    slot: str
    latent: str

    def accepted(self) -> bool:
        try:
            ModelConfig.parse({"dynamics": {"latent": {"kind": self.latent}}, self.slot: {"kind": self.kind}})
        except ConfigError:
            return False
        return True

    def build(self, seed: int = 0) -> ConditionalDistribution:
        """The form with random parameters, so that no prior holds only because all of them are zero."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            latent = small_latent(self.latent)
            context = CONTEXT if self.slot == "transition" else 0
            prior = registry.build("distribution", small("distribution", self.kind), latent, context, small_source(latent, CONTEXT))
            for p in prior.parameters():
                p.data += 0.15 * torch.randn(p.shape)
        return prior.eval()

    def context(self, rows: int = 2) -> Tensor | None:
        return torch.linspace(-1.0, 1.0, rows * CONTEXT).view(rows, CONTEXT) if self.slot == "transition" else None

    def rows(self) -> int:
        return 2 if self.slot == "transition" else 1


ALL = [Cell(*names) for names in itertools.product(KINDS, SLOTS, LATENTS)]
CELLS = [cell for cell in ALL if cell.accepted()]
REFUSED = [cell for cell in ALL if not cell.accepted()]
EXACT = [cell for cell in CELLS if registry.part("distribution", cell.kind).density == "exact"]
BOUND = [cell for cell in CELLS if registry.part("distribution", cell.kind).density == "bound"]
UNNORMALISED = [cell for cell in CELLS if registry.part("distribution", cell.kind).density == "unnormalised"]


def cells(which: list[Cell]):
    return pytest.mark.parametrize("cell", which, ids="-".join)


# Every latent there is, with the volume that each stands for -------------------------------------------------------------


def grid(latent: Latent) -> tuple[Tensor, Tensor]:
    """Points to 15 on all sides, dense in the middle, where priors bend most."""
    even = torch.linspace(-4, 4, 251)
    side, width = (15 / math.sinh(4) * x for x in (even.sinh(), even.cosh() * (even[1] - even[0])))
    return torch.cartesian_prod(*[side] * latent.size), torch.cartesian_prod(*[width] * latent.size).prod(-1)


def one_hots(latent: Latent) -> tuple[Tensor, Tensor]:
    one_hot = torch.eye(latent.classes)
    points = [torch.cat(choice) for choice in itertools.product(one_hot, repeat=latent.variables)]
    return torch.stack(points), torch.ones(len(points))


SUPPORT = {"gaussian": grid, "categorical": one_hots}


@torch.no_grad()
def whole_space(prior: ConditionalDistribution, cell: Cell) -> tuple[Tensor, Tensor, Tensor]:
    """(latents [S, D], their volumes [S], log_prob [S, N] for each row of the context)."""
    points, volume = SUPPORT[cell.latent](prior.latent)
    rows = cell.rows()
    context = cell.context()
    context = None if context is None else context.expand(len(points), rows, CONTEXT)
    return points, volume, prior.log_prob(points.unsqueeze(1).expand(-1, rows, -1), context)


class HostReads(TorchDispatchMode):
    """Counts what makes a program wait for its device: numbers read, and shapes that follow from values."""

    OPERATIONS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in self.OPERATIONS
        return func(*args, **(kwargs or {}))


# Distributions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", [prior for prior in KINDS if prior in PROMISED])
@pytest.mark.parametrize("slot", SLOTS)
def test_a_form_is_accepted_where_it_must_work_and_refused_elsewhere_with_a_reason(prior, slot):
    accepted = [cell for cell in CELLS if cell[:2] == (prior, slot)]
    assert bool(accepted) == (slot[0].upper() in PROMISED[prior])


@cells(REFUSED)
def test_a_refusal_names_the_slot_and_what_to_change(cell):
    with pytest.raises(ConfigError, match=rf"model\.{cell.slot}|{cell.slot}") as error:
        ModelConfig.parse({"dynamics": {"latent": {"kind": cell.latent}}, cell.slot: {"kind": cell.kind}})
    assert "latent" in str(error.value)


@cells([cell for cell in REFUSED if not any(c.kind == cell.kind and c.latent == cell.latent for c in CELLS)])
def test_the_wrong_kind_of_latent_is_a_type_error_that_names_the_option(cell):
    with pytest.raises(TypeError, match=r"model\.dynamics\.latent\.kind"):
        cell.build()


@cells(EXACT)
def test_an_exact_prior_sums_to_one(cell):
    prior = cell.build()
    _, volume, logp = whole_space(prior, cell)
    torch.testing.assert_close(logp.exp().mul(volume.unsqueeze(-1)).sum(0), torch.ones(cell.rows()), rtol=0, atol=5e-4)


@cells(UNNORMALISED)
def test_an_unnormalised_prior_sums_to_one_after_log_z(cell):
    prior = cell.build()
    _, volume, logp = whole_space(prior, cell)
    log_z, size = prior.log_z(cell.context(), 5000, Sampling(generator=generator()))
    assert log_z.shape == size.shape == (cell.rows(),) and (size > 500).all()
    total = (logp - log_z).exp().mul(volume.unsqueeze(-1)).sum(0)
    torch.testing.assert_close(total, torch.ones(cell.rows()), rtol=0, atol=float(5 / size.min().sqrt()))


@cells(UNNORMALISED)
def test_draws_of_an_unnormalised_prior_have_its_moments(cell):
    prior, draws = cell.build(), 5000
    points, volume, logp = whole_space(prior, cell)
    mass = (logp + volume.log().unsqueeze(-1)).softmax(0)
    x = prior.sample(cell.context(), draws, Sampling(generator=generator())).detach()
    assert x.shape == (draws, cell.rows(), prior.latent.size)
    for power in (1, 2):
        assert_near((x**power).mean(0), torch.einsum("sn,sd->nd", mass, points**power), draws, (x**power).std(0))


@cells(UNNORMALISED)
def test_a_likelihood_of_an_unnormalised_prior_asks_for_log_z(cell):
    prior, x = cell.build(), torch.zeros(cell.rows(), 2)
    with pytest.raises(ConfigError, match="log_z"):
        likelihood(prior, x, cell.context())
    log_z, _ = prior.log_z(cell.context())
    assert torch.equal(likelihood(prior, x, cell.context(), log_z), prior.log_prob(x, cell.context()) - log_z)


@cells(EXACT)
def test_samples_agree_with_log_prob(cell):
    prior, draws = cell.build(), 20_000
    points, volume, logp = whole_space(prior, cell)
    mass = logp.exp() * volume.unsqueeze(-1)  # [S, N]
    x = prior.sample(cell.context(), draws, Sampling(generator=generator())).detach()
    assert x.shape == (draws, cell.rows(), prior.latent.size)
    context = cell.context()
    surprise = -prior.log_prob(x, None if context is None else context.expand(draws, -1, -1)).detach()
    assert_near(surprise.mean(0), -(mass * logp.clamp_min(-1e4)).sum(0).detach(), draws, surprise.std(0))
    for power in (1, 2):
        assert_near((x**power).mean(0), torch.einsum("sn,sd->nd", mass.detach(), points**power), draws, (x**power).std(0))


def sampled(prior: ConditionalDistribution) -> ConditionalDistribution:
    """The same form with the base class's estimate at z, which forms without a closed form use."""
    for name in ("forward", "rate", "rates"):
        setattr(prior, name, types.MethodType(getattr(ConditionalDistribution, name), prior))
    return prior


RATES = {"own": lambda prior: prior, "sampled": sampled}


@cells(EXACT)
@pytest.mark.parametrize("form", RATES.values(), ids=RATES)
def test_the_rate_is_the_divergence_between_posterior_and_prior(cell, form):
    prior, draws, rows = form(cell.build()), 20_000, cell.rows()
    posterior = random_posterior(prior, rows)
    points, volume, logp = whole_space(prior, cell)
    logq = posterior.log_prob(points.unsqueeze(1).expand(-1, rows, -1))
    truth = (logq.exp() * volume.unsqueeze(-1) * (logq - logp)).sum(0)
    many = posterior.map(lambda x: x.expand(draws, *x.shape))
    z = prior.latent.draw(many, Sampling(generator=generator()), (draws, rows), "cpu")
    context = cell.context()
    nats = prior.rate(many, z, None if context is None else context.expand(draws, -1, -1))
    assert nats.shape == (draws, rows)
    assert_near(nats.mean(0), truth, draws, nats.std(0))


@cells(CELLS)
@pytest.mark.parametrize("form", RATES.values(), ids=RATES)
def test_a_frozen_rate_trains_the_posterior_alone(cell, form):
    prior, context, parameters = gradient_setting(cell)
    prior = form(prior)
    posterior = prior.latent.distribution(parameters)
    z = posterior.sample(prior.latent.noise((cell.rows(),), generator(), "cpu"))
    inputs = {"posterior": parameters, **own_inputs(prior, context)}
    frozen = prior.rate(posterior, z, context, frozen=True, sampling=Sampling(generator=generator(1)))
    assert reached(frozen, **inputs) == {"posterior"}
    free = prior.rate(posterior, z, context, sampling=Sampling(generator=generator(1)))
    assert reached(free, **inputs) == set(inputs)
    torch.testing.assert_close(frozen, free)


@cells(CELLS)
@pytest.mark.parametrize("form", RATES.values(), ids=RATES)
def test_of_the_two_rates_one_trains_the_prior_and_one_the_posterior(cell, form):
    prior, context, parameters = gradient_setting(cell)
    prior = form(prior)
    posterior = prior.latent.distribution(parameters)
    z = posterior.sample(prior.latent.noise((cell.rows(),), generator(), "cpu"))
    inputs = {"posterior": parameters, **own_inputs(prior, context)}
    dyn, rep = prior.rates(posterior, z, context)
    torch.testing.assert_close(dyn, rep)
    assert reached(dyn, **inputs) == (set(inputs) - {"posterior"} if prior.density == "exact" else set())
    assert reached(rep, **inputs) == {"posterior"}


@cells(BOUND)
def test_a_bound_of_a_density_holds_no_more_than_one(cell):
    prior, side = cell.build(), torch.linspace(-8, 8, 33)
    points = torch.cartesian_prod(*[side] * prior.latent.size)
    mass = prior.log_prob(points, None if cell.context() is None else cell.context()[:1].expand(len(points), -1)).exp().sum()
    assert 0 < float(mass.detach()) * float(side[1] - side[0]) ** prior.latent.size < 1.02


@cells(BOUND)
def test_fitted_to_a_gaussian_a_bound_is_below_the_truth(cell):
    prior, mean, std = cell.build(), torch.tensor([2.0, -1.0]), torch.tensor([0.5, 1.5])
    train, test = (mean + std * torch.randn(500, 2, generator=generator(seed)) for seed in (0, 1))
    context = torch.zeros(500, CONTEXT) if cell.slot == "transition" else None
    prior.fit(train, context, steps=200, lr=1e-2, generator=generator())
    truth = torch.distributions.Normal(mean, std).log_prob(test).sum(-1).mean()
    assert truth - 0.5 < float(prior.log_prob(test, context).mean().detach()) < truth


@cells(BOUND)
def test_of_a_bounded_prior_the_own_loss_trains_it_and_its_context(cell):
    prior, context, _ = gradient_setting(cell)
    x = torch.randn(cell.rows(), prior.latent.size, generator=generator(5))
    found = set()
    for term in prior.loss(x, context, sampling=Sampling(generator=generator())).values():
        assert term.value.shape == (cell.rows(),) and term.unit in ("nats", "score")
        found |= reached(term.value, **own_inputs(prior, context))
    assert found == set(own_inputs(prior, context))


def gradient_setting(cell: Cell) -> tuple[ConditionalDistribution, Tensor | None, Tensor]:
    """(prior, context, a posterior's parameters), the last two asking for gradients."""
    prior, context = cell.build(), cell.context()
    parameters = torch.randn(cell.rows(), prior.latent.parameters, generator=generator(3)).requires_grad_()
    return prior, None if context is None else context.requires_grad_(), parameters


def own_inputs(prior: ConditionalDistribution, context: Tensor | None) -> dict[str, Tensor]:
    """What trains a prior: its parameters and its context."""
    return dict(prior.named_parameters()) | ({} if context is None else {"context": context})


@cells([cell for cell in CELLS if cell.slot == "transition"])
def test_the_context_moves_the_samples(cell):
    prior = cell.build()
    far = torch.tensor([[-4.0] * CONTEXT, [4.0] * CONTEXT])
    x = prior.sample(far, 2000, Sampling(generator=generator())).mean(0)
    assert (x[0] - x[1]).abs().max() > 0.2


@cells(CELLS)
def test_a_low_temperature_concentrates_the_samples(cell):
    prior = cell.build()
    settings = [Sampling(generator=generator(), temperature=t) for t in (1.0, 0.5, 0.01)]
    spread = [prior.sample(cell.context(), 2000, sampling).var(0).sum() for sampling in settings]
    assert spread[0] > spread[1] > spread[2]
    assert cell.kind == "vamp" or spread[2] < 0.5 * spread[0]  # between components of equal weight a mixture keeps choosing


@cells(CELLS)
def test_the_mode_needs_no_noise(cell):
    prior = cell.build()
    drawn = [prior.sample(cell.context(), 3, Sampling(generator=generator(seed), mode=True)) for seed in (0, 1)]
    assert torch.equal(*drawn) and torch.equal(drawn[0][0], drawn[0][2])


@cells(CELLS)
def test_all_randomness_comes_from_the_generator(cell):
    prior, before = cell.build(), torch.get_rng_state()
    one, same, other = (prior.sample(cell.context(), 50, Sampling(generator=generator(seed))) for seed in (5, 5, 6))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


@cells(CELLS)
def test_a_saved_prior_is_the_same_prior(cell):
    prior, copy = cell.build(seed=0), cell.build(seed=1)
    x = prior.sample(cell.context(), 20, Sampling(generator=generator()))
    context = cell.context()
    context = None if context is None else context.expand(20, -1, -1)
    if any(True for _ in prior.parameters()):
        assert not torch.equal(prior.log_prob(x, context), copy.log_prob(x, context))
    copy.load_state_dict(prior.state_dict())
    assert torch.equal(prior.log_prob(x, context), copy.log_prob(x, context))
    assert torch.equal(x, copy.sample(cell.context(), 20, Sampling(generator=generator())))


def two_clusters(latent: Latent, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """(latents [n, D] of two groups, context [n, C] that tells them apart)."""
    side = (torch.rand(n, generator=generator(seed)) < 0.8).long()
    context = (2.0 * side - 1).unsqueeze(-1).expand(n, CONTEXT)
    raw = torch.tensor([[3.0, -2.0], [-3.0, 1.0]])[side].repeat(1, -(-latent.parameters // 2))[:, : latent.parameters]
    posterior = latent.distribution(raw)
    return posterior.sample(latent.noise((n,), generator(seed + 1), "cpu")), context


@cells(EXACT + BOUND)
def test_fitting_two_clusters_improves_what_was_held_out_and_moves_nothing_upstream(cell):
    prior = cell.build()
    train, test = (two_clusters(prior.latent, 500, seed) for seed in (0, 10))
    given = (lambda c: c) if cell.slot == "transition" else (lambda c: None)
    before = prior.log_prob(test[0], given(test[1])).mean()
    upstream = train[0].clone().requires_grad_()
    last = prior.fit(upstream, given(train[1]), steps=100, lr=2e-2, generator=generator())
    assert prior.log_prob(test[0], given(test[1])).mean() > before + 0.2
    assert math.isfinite(last) and upstream.grad is None


@cells(EXACT + BOUND)
def test_fitting_with_the_same_generator_gives_the_same_bits(cell):
    fitted = []
    for _ in range(2):
        prior = cell.build()
        train, context = two_clusters(prior.latent, 100, 0)
        prior.fit(train, context if cell.slot == "transition" else None, steps=5, batch=20, generator=generator())
        fitted.append(torch.cat([p.detach().flatten() for p in prior.parameters()] or [torch.zeros(1)]))
    assert torch.equal(*fitted)


def two_moons(n: int, seed: int) -> Tensor:
    """Two half circles that reach into one another [n, 2], centred."""
    angle = math.pi * torch.rand(n, generator=generator(seed))
    upper = torch.rand(n, generator=generator(seed + 1)) < 0.5
    x = torch.where(upper, angle.cos(), 1 - angle.cos()) - 0.5
    y = torch.where(upper, angle.sin(), 0.5 - angle.sin()) - 0.25
    return torch.stack([x, y], 1) + 0.05 * torch.randn(n, 2, generator=generator(seed + 2))


@cells([cell for cell in EXACT if cell.slot == "marginal" and cell.latent == "gaussian"])
def test_fitting_two_moons_beats_a_gaussian_on_held_out_data(cell):
    prior, train, test = cell.build(), two_moons(2000, 0), two_moons(2000, 10)
    prior.fit(train, steps=300, batch=128, lr=5e-2, generator=generator())
    best_gaussian = torch.distributions.Normal(train.mean(0), train.std(0)).log_prob(test).sum(-1).mean()
    gain = float(prior.log_prob(test, None).detach().mean() - best_gaussian)
    assert abs(gain) < 0.02 if cell.kind in ("gaussian", "ensemble") else gain > 0.1  # each member of an ensemble learns alone


# Codes -----------------------------------------------------------------------------------------------------------------


def random_posterior(prior: ConditionalDistribution, rows: int, seed: int = 3) -> Posterior:
    return prior.latent.distribution(torch.randn(rows, prior.latent.parameters, generator=generator(seed)))


def as_torch(posterior: Posterior, latent: Latent) -> torch.distributions.Distribution:
    """The same posterior in torch's own words."""
    if isinstance(posterior, GaussianPosterior):
        return torch.distributions.Independent(torch.distributions.Normal(posterior.mean, posterior.std), 1)
    return torch.distributions.Independent(torch.distributions.OneHotCategorical(posterior.probs), 1)


@pytest.mark.parametrize("kind", LATENTS)
def test_a_posterior_agrees_with_torchs_own(kind):
    latent = small_latent(kind)
    one, other = (latent.distribution(torch.randn(3, 5, latent.parameters, generator=generator(seed))) for seed in (0, 1))
    z = one.sample(latent.noise((3, 5), generator(2), "cpu"))
    assert z.shape == one.mean.shape == one.mode.shape == (3, 5, latent.size)
    reference = as_torch(one, latent)
    shaped = z.view(reference.batch_shape + reference.event_shape)
    torch.testing.assert_close(one.log_prob(z), reference.log_prob(shaped))
    torch.testing.assert_close(one.entropy(), reference.entropy())
    torch.testing.assert_close(one.kl(other), torch.distributions.kl_divergence(reference, as_torch(other, latent)))
    torch.testing.assert_close(one.kl(one), torch.zeros(3, 5), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", LATENTS)
def test_the_mode_is_the_most_likely_latent(kind):
    latent = small_latent(kind)
    posterior = latent.distribution(torch.randn(40, latent.parameters, generator=generator()))
    many = posterior.map(lambda x: x.expand(200, *x.shape))
    drawn = many.sample(latent.noise((200, 40), generator(1), "cpu"))
    assert (posterior.log_prob(posterior.mode) >= many.log_prob(drawn).max(0).values - 1e-6).all()
    assert torch.equal(latent.draw(posterior, Sampling(mode=True), (40,), "cpu"), posterior.mode)


@pytest.mark.parametrize("kind", LATENTS)
def test_rows_of_a_posterior_are_picked_and_cut_from_the_graph(kind):
    latent = small_latent(kind)
    raw = torch.randn(4, 6, latent.parameters, generator=generator()).requires_grad_()
    posterior, mask = latent.distribution(raw), torch.rand(4, 6, generator=generator(1)) < 0.5
    assert torch.equal(posterior.index(mask).mean, posterior.mean[mask])
    assert posterior.mean.requires_grad and not posterior.detach().mean.requires_grad


@pytest.mark.parametrize("kind", LATENTS)
def test_the_callers_noise_is_the_draw(kind):
    latent = small_latent(kind)
    posterior = latent.distribution(torch.randn(5, latent.parameters, generator=generator()))
    noise = latent.noise((5,), generator(1), "cpu")
    drawn = latent.draw(posterior, Sampling(noise=noise, generator=generator(99)), (5,), "cpu")
    assert torch.equal(drawn, posterior.sample(noise))
    assert torch.equal(drawn, latent.draw(posterior, Sampling(generator=generator(1)), (5,), "cpu"))


@pytest.mark.parametrize("kind", LATENTS)
def test_families_do_not_mix(kind):
    other = next(name for name in LATENTS if name != kind)
    posteriors = [latent.distribution(torch.zeros(1, latent.parameters)) for latent in map(small_latent, (kind, other))]
    with pytest.raises(TypeError, match="no closed form"):
        posteriors[0].kl(posteriors[1])


# Devices ---------------------------------------------------------------------------------------------------------------


@cells(CELLS)
@pytest.mark.parametrize("sampling", [{}, {"mode": True}, {"temperature": 0.5, "steps": 3}], ids=["draw", "mode", "colder"])
def test_a_draw_never_waits_for_the_device(cell, sampling):
    prior, g = cell.build(), generator()
    with torch.no_grad(), HostReads() as reads:
        prior.sample(cell.context(), 3, Sampling(generator=g, **sampling))
    assert reads.count == 0


SAMPLERS = [("diffusion", {"sampler": sampler}) for sampler in ("euler", "heun", "multistep")]
SAMPLERS += [("energy", {"sampler": sampler}) for sampler in ("langevin", "resampling")]


@pytest.mark.parametrize(("prior", "options"), SAMPLERS, ids=str)
def test_no_sampler_of_a_prior_waits_for_the_device(prior, options):
    prior = registry.build("distribution", small("distribution", prior, **options), small_latent("gaussian"), CONTEXT).eval()
    with torch.no_grad(), HostReads() as reads:
        prior.sample(torch.zeros(2, CONTEXT), 3, Sampling(generator=generator()))
    assert reads.count == 0
