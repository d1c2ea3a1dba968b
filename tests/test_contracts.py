"""The laws that every registered law of codes and every kind of code keeps. A new one is tested by being registered."""

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
LAWS = registry.kinds("distribution")
SLOTS = ("initial", "transition", "marginal")
PROMISED = {"gaussian": "ITM", "categorical": "IT", "mixture": "ITM", "vamp": "ITM", "flow": "ITM", "energy": "ITM"}
PROMISED |= {"hierarchical": "IT", "diffusion": "ITM"}
"""First letters of the slots that each form fills."""
CONTEXT = 3


class Cell(NamedTuple):
    """A form in a slot, over a kind of code."""

    law: str
    slot: str
    latent: str

    def accepted(self) -> bool:
        try:
            ModelConfig.parse({"dynamics": {"latent": {"kind": self.latent}}, self.slot: {"kind": self.law}})
        except ConfigError:
            return False
        return True

    def build(self, seed: int = 0) -> ConditionalDistribution:
        """The form with random parameters, so that no law holds only because all of them are zero."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            latent = small_latent(self.latent)
            context = CONTEXT if self.slot == "transition" else 0
            law = registry.build("distribution", small("distribution", self.law), latent, context, small_source(latent, CONTEXT))
            for p in law.parameters():
                p.data += 0.15 * torch.randn(p.shape)
        return law.eval()

    def context(self, rows: int = 2) -> Tensor | None:
        return torch.linspace(-1.0, 1.0, rows * CONTEXT).view(rows, CONTEXT) if self.slot == "transition" else None

    def rows(self) -> int:
        return 2 if self.slot == "transition" else 1


ALL = [Cell(*names) for names in itertools.product(LAWS, SLOTS, LATENTS)]
CELLS = [cell for cell in ALL if cell.accepted()]
REFUSED = [cell for cell in ALL if not cell.accepted()]
EXACT = [cell for cell in CELLS if registry.part("distribution", cell.law).density == "exact"]
BOUND = [cell for cell in CELLS if registry.part("distribution", cell.law).density == "bound"]
UNNORMALISED = [cell for cell in CELLS if registry.part("distribution", cell.law).density == "unnormalised"]


def cells(which: list[Cell]):
    return pytest.mark.parametrize("cell", which, ids="-".join)


# Every code there is, with the volume that each stands for -------------------------------------------------------------


def grid(latent: Latent) -> tuple[Tensor, Tensor]:
    """Points to 15 on all sides, dense in the middle, where laws bend most."""
    even = torch.linspace(-4, 4, 251)
    side, width = (15 / math.sinh(4) * x for x in (even.sinh(), even.cosh() * (even[1] - even[0])))
    return torch.cartesian_prod(*[side] * latent.size), torch.cartesian_prod(*[width] * latent.size).prod(-1)


def codes(latent: Latent) -> tuple[Tensor, Tensor]:
    one_hot = torch.eye(latent.classes)
    points = [torch.cat(choice) for choice in itertools.product(one_hot, repeat=latent.variables)]
    return torch.stack(points), torch.ones(len(points))


SUPPORT = {"gaussian": grid, "categorical": codes}


@torch.no_grad()
def whole_space(law: ConditionalDistribution, cell: Cell) -> tuple[Tensor, Tensor, Tensor]:
    """(codes [S, D], their volumes [S], log_prob [S, N] for each row of the context)."""
    points, volume = SUPPORT[cell.latent](law.latent)
    rows = cell.rows()
    context = cell.context()
    context = None if context is None else context.expand(len(points), rows, CONTEXT)
    return points, volume, law.log_prob(points.unsqueeze(1).expand(-1, rows, -1), context)


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


@pytest.mark.parametrize("law", [law for law in LAWS if law in PROMISED])
@pytest.mark.parametrize("slot", SLOTS)
def test_a_form_is_accepted_where_it_must_work_and_refused_elsewhere_with_a_reason(law, slot):
    accepted = [cell for cell in CELLS if cell[:2] == (law, slot)]
    assert bool(accepted) == (slot[0].upper() in PROMISED[law])


@cells(REFUSED)
def test_a_refusal_names_the_slot_and_what_to_change(cell):
    with pytest.raises(ConfigError, match=rf"model\.{cell.slot}|{cell.slot}") as error:
        ModelConfig.parse({"dynamics": {"latent": {"kind": cell.latent}}, cell.slot: {"kind": cell.law}})
    assert "latent" in str(error.value)


@cells([cell for cell in REFUSED if not any(c.law == cell.law and c.latent == cell.latent for c in CELLS)])
def test_the_wrong_kind_of_code_is_a_type_error_that_names_the_option(cell):
    with pytest.raises(TypeError, match=r"model\.dynamics\.latent\.kind"):
        cell.build()


@cells(EXACT)
def test_an_exact_law_sums_to_one(cell):
    law = cell.build()
    _, volume, logp = whole_space(law, cell)
    torch.testing.assert_close(logp.exp().mul(volume.unsqueeze(-1)).sum(0), torch.ones(cell.rows()), rtol=0, atol=5e-4)


@cells(UNNORMALISED)
def test_an_unnormalised_law_sums_to_one_after_log_z(cell):
    law = cell.build()
    _, volume, logp = whole_space(law, cell)
    log_z, size = law.log_z(cell.context(), 5000, Sampling(generator=generator()))
    assert log_z.shape == size.shape == (cell.rows(),) and (size > 500).all()
    total = (logp - log_z).exp().mul(volume.unsqueeze(-1)).sum(0)
    torch.testing.assert_close(total, torch.ones(cell.rows()), rtol=0, atol=float(5 / size.min().sqrt()))


@cells(UNNORMALISED)
def test_draws_of_an_unnormalised_law_have_its_moments(cell):
    law, draws = cell.build(), 5000
    points, volume, logp = whole_space(law, cell)
    mass = (logp + volume.log().unsqueeze(-1)).softmax(0)
    x = law.sample(cell.context(), draws, Sampling(generator=generator())).detach()
    assert x.shape == (draws, cell.rows(), law.latent.size)
    for power in (1, 2):
        assert_near((x**power).mean(0), torch.einsum("sn,sd->nd", mass, points**power), draws, (x**power).std(0))


@cells(UNNORMALISED)
def test_a_likelihood_of_an_unnormalised_law_asks_for_log_z(cell):
    law, x = cell.build(), torch.zeros(cell.rows(), 2)
    with pytest.raises(ConfigError, match="log_z"):
        likelihood(law, x, cell.context())
    log_z, _ = law.log_z(cell.context())
    assert torch.equal(likelihood(law, x, cell.context(), log_z), law.log_prob(x, cell.context()) - log_z)


@cells(EXACT)
def test_samples_agree_with_log_prob(cell):
    law, draws = cell.build(), 20_000
    points, volume, logp = whole_space(law, cell)
    mass = logp.exp() * volume.unsqueeze(-1)  # [S, N]
    x = law.sample(cell.context(), draws, Sampling(generator=generator())).detach()
    assert x.shape == (draws, cell.rows(), law.latent.size)
    context = cell.context()
    surprise = -law.log_prob(x, None if context is None else context.expand(draws, -1, -1)).detach()
    assert_near(surprise.mean(0), -(mass * logp.clamp_min(-1e4)).sum(0).detach(), draws, surprise.std(0))
    for power in (1, 2):
        assert_near((x**power).mean(0), torch.einsum("sn,sd->nd", mass.detach(), points**power), draws, (x**power).std(0))


def sampled(law: ConditionalDistribution) -> ConditionalDistribution:
    """The same form with the base class's estimate at z, which forms without a closed form use."""
    for name in ("forward", "rate", "rates"):
        setattr(law, name, types.MethodType(getattr(ConditionalDistribution, name), law))
    return law


RATES = {"own": lambda law: law, "sampled": sampled}


@cells(EXACT)
@pytest.mark.parametrize("form", RATES.values(), ids=RATES)
def test_the_rate_is_the_divergence_between_posterior_and_prior(cell, form):
    law, draws, rows = form(cell.build()), 20_000, cell.rows()
    posterior = random_belief(law, rows)
    points, volume, logp = whole_space(law, cell)
    logq = posterior.log_prob(points.unsqueeze(1).expand(-1, rows, -1))
    truth = (logq.exp() * volume.unsqueeze(-1) * (logq - logp)).sum(0)
    many = posterior.map(lambda x: x.expand(draws, *x.shape))
    z = law.latent.draw(many, Sampling(generator=generator()), (draws, rows), "cpu")
    context = cell.context()
    nats = law.rate(many, z, None if context is None else context.expand(draws, -1, -1))
    assert nats.shape == (draws, rows)
    assert_near(nats.mean(0), truth, draws, nats.std(0))


@cells(CELLS)
@pytest.mark.parametrize("form", RATES.values(), ids=RATES)
def test_a_frozen_rate_trains_the_posterior_alone(cell, form):
    law, context, parameters = gradient_setting(cell)
    law = form(law)
    posterior = law.latent.distribution(parameters)
    z = posterior.sample(law.latent.noise((cell.rows(),), generator(), "cpu"))
    inputs = {"belief": parameters, **own_inputs(law, context)}
    frozen = law.rate(posterior, z, context, frozen=True, sampling=Sampling(generator=generator(1)))
    assert reached(frozen, **inputs) == {"belief"}
    free = law.rate(posterior, z, context, sampling=Sampling(generator=generator(1)))
    assert reached(free, **inputs) == set(inputs)
    torch.testing.assert_close(frozen, free)


@cells(CELLS)
@pytest.mark.parametrize("form", RATES.values(), ids=RATES)
def test_of_the_two_rates_one_trains_the_prior_and_one_the_posterior(cell, form):
    law, context, parameters = gradient_setting(cell)
    law = form(law)
    posterior = law.latent.distribution(parameters)
    z = posterior.sample(law.latent.noise((cell.rows(),), generator(), "cpu"))
    inputs = {"belief": parameters, **own_inputs(law, context)}
    dyn, rep = law.rates(posterior, z, context)
    torch.testing.assert_close(dyn, rep)
    assert reached(dyn, **inputs) == (set(inputs) - {"belief"} if law.density == "exact" else set())
    assert reached(rep, **inputs) == {"belief"}


@cells(BOUND)
def test_a_bound_of_a_density_holds_no_more_than_one(cell):
    law, side = cell.build(), torch.linspace(-8, 8, 33)
    points = torch.cartesian_prod(*[side] * law.latent.size)
    mass = law.log_prob(points, None if cell.context() is None else cell.context()[:1].expand(len(points), -1)).exp().sum()
    assert 0 < float(mass.detach()) * float(side[1] - side[0]) ** law.latent.size < 1.02


@cells(BOUND)
def test_fitted_to_a_gaussian_a_bound_is_below_the_truth(cell):
    law, mean, std = cell.build(), torch.tensor([2.0, -1.0]), torch.tensor([0.5, 1.5])
    train, test = (mean + std * torch.randn(500, 2, generator=generator(seed)) for seed in (0, 1))
    context = torch.zeros(500, CONTEXT) if cell.slot == "transition" else None
    law.fit(train, context, steps=200, lr=1e-2, generator=generator())
    truth = torch.distributions.Normal(mean, std).log_prob(test).sum(-1).mean()
    assert truth - 0.5 < float(law.log_prob(test, context).mean().detach()) < truth


@cells(BOUND)
def test_of_a_bounded_law_the_own_loss_trains_it_and_its_context(cell):
    law, context, _ = gradient_setting(cell)
    x = torch.randn(cell.rows(), law.latent.size, generator=generator(5))
    found = set()
    for term in law.loss(x, context, sampling=Sampling(generator=generator())).values():
        assert term.value.shape == (cell.rows(),) and term.unit in ("nats", "score")
        found |= reached(term.value, **own_inputs(law, context))
    assert found == set(own_inputs(law, context))


def gradient_setting(cell: Cell) -> tuple[ConditionalDistribution, Tensor | None, Tensor]:
    """(law, context, a belief's parameters), the last two asking for gradients."""
    law, context = cell.build(), cell.context()
    parameters = torch.randn(cell.rows(), law.latent.parameters, generator=generator(3)).requires_grad_()
    return law, None if context is None else context.requires_grad_(), parameters


def own_inputs(law: ConditionalDistribution, context: Tensor | None) -> dict[str, Tensor]:
    """What trains a law: its parameters and its context."""
    return dict(law.named_parameters()) | ({} if context is None else {"context": context})


@cells([cell for cell in CELLS if cell.slot == "transition"])
def test_the_context_moves_the_samples(cell):
    law = cell.build()
    far = torch.tensor([[-4.0] * CONTEXT, [4.0] * CONTEXT])
    x = law.sample(far, 2000, Sampling(generator=generator())).mean(0)
    assert (x[0] - x[1]).abs().max() > 0.2


@cells(CELLS)
def test_a_low_temperature_concentrates_the_samples(cell):
    law = cell.build()
    settings = [Sampling(generator=generator(), temperature=t) for t in (1.0, 0.5, 0.01)]
    spread = [law.sample(cell.context(), 2000, sampling).var(0).sum() for sampling in settings]
    assert spread[0] > spread[1] > spread[2]
    assert cell.law == "vamp" or spread[2] < 0.5 * spread[0]  # between components of equal weight a mixture keeps choosing


@cells(CELLS)
def test_the_mode_needs_no_noise(cell):
    law = cell.build()
    drawn = [law.sample(cell.context(), 3, Sampling(generator=generator(seed), mode=True)) for seed in (0, 1)]
    assert torch.equal(*drawn) and torch.equal(drawn[0][0], drawn[0][2])


@cells(CELLS)
def test_all_randomness_comes_from_the_generator(cell):
    law, before = cell.build(), torch.get_rng_state()
    one, same, other = (law.sample(cell.context(), 50, Sampling(generator=generator(seed))) for seed in (5, 5, 6))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


@cells(CELLS)
def test_a_saved_law_is_the_same_law(cell):
    law, copy = cell.build(seed=0), cell.build(seed=1)
    x = law.sample(cell.context(), 20, Sampling(generator=generator()))
    context = cell.context()
    context = None if context is None else context.expand(20, -1, -1)
    if any(True for _ in law.parameters()):
        assert not torch.equal(law.log_prob(x, context), copy.log_prob(x, context))
    copy.load_state_dict(law.state_dict())
    assert torch.equal(law.log_prob(x, context), copy.log_prob(x, context))
    assert torch.equal(x, copy.sample(cell.context(), 20, Sampling(generator=generator())))


def two_clusters(latent: Latent, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """(codes [n, D] of two groups, context [n, C] that tells them apart)."""
    side = (torch.rand(n, generator=generator(seed)) < 0.8).long()
    context = (2.0 * side - 1).unsqueeze(-1).expand(n, CONTEXT)
    raw = torch.tensor([[3.0, -2.0], [-3.0, 1.0]])[side].repeat(1, -(-latent.parameters // 2))[:, : latent.parameters]
    posterior = latent.distribution(raw)
    return posterior.sample(latent.noise((n,), generator(seed + 1), "cpu")), context


@cells(EXACT + BOUND)
def test_fitting_two_clusters_improves_what_was_held_out_and_moves_nothing_upstream(cell):
    law = cell.build()
    train, test = (two_clusters(law.latent, 500, seed) for seed in (0, 10))
    given = (lambda c: c) if cell.slot == "transition" else (lambda c: None)
    before = law.log_prob(test[0], given(test[1])).mean()
    upstream = train[0].clone().requires_grad_()
    last = law.fit(upstream, given(train[1]), steps=100, lr=2e-2, generator=generator())
    assert law.log_prob(test[0], given(test[1])).mean() > before + 0.2
    assert math.isfinite(last) and upstream.grad is None


@cells(EXACT + BOUND)
def test_fitting_with_the_same_generator_gives_the_same_bits(cell):
    fitted = []
    for _ in range(2):
        law = cell.build()
        train, context = two_clusters(law.latent, 100, 0)
        law.fit(train, context if cell.slot == "transition" else None, steps=5, batch=20, generator=generator())
        fitted.append(torch.cat([p.detach().flatten() for p in law.parameters()] or [torch.zeros(1)]))
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
    law, train, test = cell.build(), two_moons(2000, 0), two_moons(2000, 10)
    law.fit(train, steps=300, batch=128, lr=5e-2, generator=generator())
    best_gaussian = torch.distributions.Normal(train.mean(0), train.std(0)).log_prob(test).sum(-1).mean()
    gain = float(law.log_prob(test, None).detach().mean() - best_gaussian)
    assert abs(gain) < 0.02 if cell.law == "gaussian" else gain > 0.1


# Codes -----------------------------------------------------------------------------------------------------------------


def random_belief(law: ConditionalDistribution, rows: int, seed: int = 3) -> Posterior:
    return law.latent.distribution(torch.randn(rows, law.latent.parameters, generator=generator(seed)))


def as_torch(posterior: Posterior, latent: Latent) -> torch.distributions.Distribution:
    """The same belief in torch's own words."""
    if isinstance(posterior, GaussianPosterior):
        return torch.distributions.Independent(torch.distributions.Normal(posterior.mean, posterior.std), 1)
    return torch.distributions.Independent(torch.distributions.OneHotCategorical(posterior.probs), 1)


@pytest.mark.parametrize("kind", LATENTS)
def test_a_belief_agrees_with_torchs_own(kind):
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
def test_the_mode_is_the_most_likely_code(kind):
    latent = small_latent(kind)
    posterior = latent.distribution(torch.randn(40, latent.parameters, generator=generator()))
    many = posterior.map(lambda x: x.expand(200, *x.shape))
    drawn = many.sample(latent.noise((200, 40), generator(1), "cpu"))
    assert (posterior.log_prob(posterior.mode) >= many.log_prob(drawn).max(0).values - 1e-6).all()
    assert torch.equal(latent.draw(posterior, Sampling(mode=True), (40,), "cpu"), posterior.mode)


@pytest.mark.parametrize("kind", LATENTS)
def test_rows_of_a_belief_are_picked_and_cut_from_the_graph(kind):
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
    beliefs = [latent.distribution(torch.zeros(1, latent.parameters)) for latent in map(small_latent, (kind, other))]
    with pytest.raises(TypeError, match="no closed form"):
        beliefs[0].kl(beliefs[1])


# Devices ---------------------------------------------------------------------------------------------------------------


@cells(CELLS)
@pytest.mark.parametrize("sampling", [{}, {"mode": True}, {"temperature": 0.5, "steps": 3}], ids=["draw", "mode", "colder"])
def test_a_draw_never_waits_for_the_device(cell, sampling):
    law, g = cell.build(), generator()
    with torch.no_grad(), HostReads() as reads:
        law.sample(cell.context(), 3, Sampling(generator=g, **sampling))
    assert reads.count == 0


SAMPLERS = [("diffusion", {"sampler": sampler}) for sampler in ("euler", "heun", "multistep")]
SAMPLERS += [("energy", {"sampler": sampler}) for sampler in ("langevin", "resampling")]


@pytest.mark.parametrize(("law", "options"), SAMPLERS, ids=str)
def test_no_sampler_of_a_law_waits_for_the_device(law, options):
    law = registry.build("distribution", small("distribution", law, **options), small_latent("gaussian"), CONTEXT).eval()
    with torch.no_grad(), HostReads() as reads:
        law.sample(torch.zeros(2, CONTEXT), 3, Sampling(generator=generator()))
    assert reads.count == 0
