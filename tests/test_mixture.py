"""Mixtures: what only they promise."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import generator, small, small_latent

from worldmodel import registry
from worldmodel.data import Sampling
from worldmodel.distributions import Components, GaussianPosterior
from worldmodel.errors import ConfigError


def diagonal(weights: tuple[float, float] = (0.5, 0.5), std: float = 0.5) -> Components:
    """Two round components on the diagonal, at (-3, -3) and (3, 3)."""
    mean = torch.tensor([[[-3.0, -3.0], [3.0, 3.0]]])
    return Components(torch.tensor([weights]).log(), GaussianPosterior(mean, torch.full_like(mean, std)))


def prior(context: int = 0, latent: str = "gaussian", seed: int = 0, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return registry.build("distribution", small("distribution", "mixture", **options), small_latent(latent), context)


def test_a_component_explains_a_whole_latent_and_not_each_number_for_itself():
    corners = torch.tensor([[3.0, 3.0], [-3.0, -3.0], [3.0, -3.0]])
    nats = diagonal().log_prob(corners)
    peak = math.log(0.5) - math.log(2 * math.pi * 0.5**2)
    torch.testing.assert_close(nats[:2], torch.full((2,), peak))
    assert nats[2] < peak - 50  # a product of one-dimensional mixtures would give it as much as the others


def test_draws_lie_on_the_diagonal_and_are_as_wide_as_the_density_says():
    mix, n = diagonal(), 20_000
    x = mix.sample(small_latent("gaussian"), n, Sampling(generator=generator()))[:, 0]
    assert torch.corrcoef(x.T)[0, 1] > 0.95
    inner = x - 3 * x.sign()
    torch.testing.assert_close(inner.std(0), torch.tensor([0.5, 0.5]), rtol=0, atol=0.02)  # exp(ln variance) would be 0.25
    entropy = math.log(2) + math.log(2 * math.pi * math.e * 0.5**2)
    assert float(-mix.log_prob(x).mean()) == pytest.approx(entropy, abs=0.03)


def test_weights_say_how_often_a_component_is_drawn_and_temperature_sharpens_them():
    mix, latent = diagonal((0.8, 0.2)), small_latent("gaussian")
    shares = []
    for temperature in (1.0, 0.25):
        x = mix.sample(latent, 4000, Sampling(generator=generator(), temperature=temperature))
        shares.append(float((x[..., 0] < 0).float().mean()))
    assert shares[0] == pytest.approx(0.8, abs=0.03) and shares[1] > 0.98
    assert torch.equal(mix.sample(latent, 3, Sampling(mode=True)), torch.full((3, 1, 2), -3.0))


def test_a_draw_is_differentiable_in_the_drawn_components_parameters():
    mean = torch.tensor([[[-3.0, -3.0], [3.0, 3.0]]], requires_grad=True)
    mix = Components(torch.tensor([[0.5, 0.5]]).log(), GaussianPosterior(mean, torch.ones_like(mean)))
    x = mix.sample(small_latent("gaussian"), 100, Sampling(generator=generator()))
    (by_mean,) = torch.autograd.grad(x.sum(), mean)
    assert by_mean.sum() == 200 and (by_mean > 0).all()


def test_every_row_of_a_context_has_its_own_mixture():
    form, context = prior(3), torch.randn(4, 3, generator=generator())
    mix = form.given(context)
    assert mix.log_weights.shape == (4, 5) and mix.distributions.mean.shape == (4, 5, 2)
    torch.testing.assert_close(mix.log_weights.exp().sum(-1), torch.ones(4))
    x = torch.randn(4, 2, generator=generator(1))
    torch.testing.assert_close(form.log_prob(x, context)[2], form.log_prob(x[2:3], context[2:3])[0])


@pytest.mark.parametrize("context", [0, 3])
def test_components_start_apart_and_all_in_use(context):
    form = prior(context)
    given = torch.randn(256, context, generator=generator()) if context else None
    x = form.sample(given, 1 if context else 256, Sampling(generator=generator())).view(256, 2)
    seen = form.measures(x, given)
    assert seen["used"] > 3 and seen["spread"] > 0.5


def test_no_component_dies_whatever_the_weights_and_none_narrows_onto_one_latent():
    form = prior(floor=0.05)
    form.logits.data[0] = 1000.0
    form.raw.data[:, 2:] = -1000.0
    mix = form.given(None)
    assert float(mix.log_weights.detach().exp().min()) == pytest.approx(0.01)
    assert float(mix.distributions.std.detach().min()) == pytest.approx(form.latent.min_std)
    form.log_prob(mix.distributions.mean[0], None).sum().backward()
    assert (form.raw.grad[:, :2].isfinite()).all() and form.logits.grad.isfinite().all()


def test_what_is_used_and_how_far_apart_components_are_is_measured():
    form = prior(components=4)
    form.raw.data[:] = 0
    assert form.measures(torch.zeros(8, 2), None)["spread"] == pytest.approx(0, abs=1e-5)
    form.raw.data[:, 0] = torch.tensor([0.0, 50.0, 100.0, 150.0])
    alone = form.measures(torch.zeros(8, 2), None)
    assert alone["used"] == pytest.approx(1, abs=1e-3) and alone["spread"] > 100


def test_categorical_components_make_variables_depend_on_one_another():
    form = prior(latent="categorical", components=2)
    form.raw.data = torch.tensor([[50.0, 0, 0, 50, 0, 0], [0, 50, 0, 0, 50, 0]])
    x = form.sample(None, 500, Sampling(generator=generator())).view(500, 2, 3)
    assert float((x[:, 0] == x[:, 1]).all(-1).float().mean()) > 0.95


def test_a_mixture_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="components"):
        prior(components=0)


def test_many_narrow_components_are_scored_as_well_as_few():
    latent = small_latent("gaussian", size=8)
    raw = torch.cat([3 * torch.randn(200, 8, generator=generator()), torch.full((200, 8), -20.0)], -1)  # deviations of 0.01
    distributions = latent.distribution(raw)
    x = distributions.mean[:50] + 0.01 * torch.randn(50, 8, generator=generator(1))
    each = torch.stack([distributions.index(slice(k, k + 1)).log_prob(x) for k in range(200)], -1)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(distributions.log_prob_each(x), each, rtol=1e-4, atol=1e-3)


def test_over_mirrored_draws_a_sampled_rate_moves_the_mean_as_the_closed_form_does():
    """Drawn alone, z pulls the mean towards itself; of z and its mirror image only the posterior's mean is left."""
    narrow = prior(components=1)
    posterior = GaussianPosterior(torch.tensor([[0.3, -0.2]]), torch.tensor([[0.5, 0.2]]))
    z = posterior.sample(torch.tensor([[1.3, -0.7]]))
    gradients = {}
    for name, draws in (("one", (z,)), ("both", narrow.antithetic(posterior, z))):
        rates = [narrow.rates(posterior, x, None)[0] for x in draws]
        gradients[name] = torch.autograd.grad(sum(rates).sum() / len(rates), narrow.raw)[0][0, :2]
    closed = torch.autograd.grad(posterior.kl(narrow.given(None).distributions).sum(), narrow.raw)[0][0, :2]
    torch.testing.assert_close(gradients["both"], closed)
    assert (gradients["one"] - closed).abs().max() > 0.1
    gaussian = registry.build("distribution", small("distribution", "gaussian"), small_latent("gaussian"), 0)
    assert gaussian.antithetic(posterior, z) == (z,)
    assert small_latent("categorical").distribution(torch.zeros(1, 6)).mirror(torch.zeros(1, 6)) is None
