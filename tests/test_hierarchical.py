"""Two levels in one latent: what only they promise."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_near, generator, reached, small, small_latent

from worldmodel import registry
from worldmodel.data import Sampling
from worldmodel.distributions import Hierarchical
from worldmodel.errors import ConfigError

SIZES = {"gaussian": {"size": 3}, "categorical": {"variables": 3}}
every_latent = pytest.mark.parametrize("latent", ["gaussian", "categorical"])


def prior(latent: str = "gaussian", context: int = 0, **options) -> Hierarchical:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        whole = small_latent(latent, **SIZES[latent])
        form = registry.build("distribution", small("distribution", "hierarchical", **options), whole, context)
        for p in form.parameters():
            p.data += 0.3 * torch.randn(p.shape)
    return form.eval()


@every_latent
@pytest.mark.parametrize("context", [0, 3])
def test_the_density_is_that_of_the_upper_level_times_that_of_the_lower_given_it(latent, context):
    form = prior(latent, context)
    given = torch.randn(4, 3, generator=generator()) if context else None
    x = form.sample(given, 1 if context else 4, Sampling(generator=generator(1))).view(4, -1).detach()
    z1, z2 = x[:, : form.upper.latent.size], x[:, form.upper.latent.size :]
    below = z1 if given is None else torch.cat([given, z1], -1)
    torch.testing.assert_close(form.log_prob(x, given), form.upper.log_prob(z1, given) + form.lower.log_prob(z2, below))


@every_latent
def test_variables_of_a_latent_depend_on_one_another_through_the_upper_level(latent):
    form = prior(latent)
    x = form.sample(None, 4000, Sampling(generator=generator()))[:, 0].detach()
    cut, centred = form.upper.latent.size, x - x.mean(0)
    across = (centred[:, :cut].T @ centred[:, cut:] / len(x)).abs().max()
    assert across > 0.02


@every_latent
def test_the_rate_is_the_sum_of_the_levels_and_closed_forms_save_it_their_noise(latent):
    form, n = prior(latent), 20_000
    one = form.latent.distribution(torch.randn(1, form.latent.parameters, generator=generator(3)))
    posterior = one.map(lambda p: p.expand(n, *p.shape[1:]))
    z = posterior.sample(form.latent.noise((n,), generator(), "cpu"))
    nats, sampled = form.rate(posterior, z, None).detach(), (posterior.log_prob(z) - form.log_prob(z, None)).detach()
    assert_near(nats.mean(), sampled.mean(), n, sampled.std())
    assert nats.std() < sampled.std()


@every_latent
def test_a_frozen_rate_reaches_the_upper_latent_through_what_it_says_of_the_lower_and_no_parameter(latent):
    form = prior(latent)
    posterior = form.latent.distribution(torch.randn(1, form.latent.parameters, generator=generator(3)))
    z = posterior.sample(form.latent.noise((1,), generator(), "cpu")).requires_grad_()
    frozen = form.rate(posterior, z, None, frozen=True)
    (through,) = torch.autograd.grad(frozen.sum(), z, retain_graph=True)
    assert through[:, : form.upper.latent.size].abs().sum() > 0
    own = dict(form.named_parameters())
    assert not reached(frozen, **own)
    assert reached(form.rates(posterior, z, None)[0], **own) == set(own)


def test_levels_may_have_forms_of_their_own():
    form = prior(context=3, upper={"kind": "mixture", "components": 3}, lower={"kind": "flow"})
    assert [type(level).__name__ for level in (form.upper, form.lower)] == ["Mixture", "Flow"]
    context = torch.randn(6, 3, generator=generator())
    x = form.sample(context, 2, Sampling(generator=generator())).detach()
    assert x.shape == (2, 6, 3) and form.log_prob(x[0], context).isfinite().all()
    assert set(form.measures(x[0], context)) == {"upper/used", "upper/spread", "lower/outside"}


@pytest.mark.parametrize(
    ("options", "said"),
    [({"top": 3}, "top=3 leaves nothing"), ({"upper": {"kind": "vamp"}}, "posteriors over whole latents"), ({"top": 0}, "top")],
)
def test_what_cannot_be_two_levels_is_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        prior(**options)


def test_a_level_of_another_kind_of_latent_is_refused():
    with pytest.raises(ConfigError, match=r"lower\.kind=categorical .*model\.dynamics\.latent\.kind"):
        prior("gaussian", lower={"kind": "categorical"})


def test_each_level_is_fitted_as_it_is_by_itself():
    form = prior(upper={"kind": "flow"}, lower={"kind": "gaussian", "std": "fitted"})
    latents = 50 + torch.randn(300, 3, generator=generator())
    form.fit(latents, steps=20, generator=generator())
    z1, z2 = latents.tensor_split([1], -1)
    assert form.upper.outside(z1, None) == 0
    torch.testing.assert_close(form.lower.variance, (z2 - form.lower.given(z1).mean).square().mean(0))


def test_training_lets_each_level_keep_its_statistics_and_a_frozen_rate_does_not():
    form = prior(upper={"kind": "flow"}, lower={"kind": "gaussian", "std": "fitted"}).train()
    posterior = form.latent.distribution(torch.zeros(20, 6))
    z = 50 + torch.randn(20, 3, generator=generator())
    seen = {name: x.clone() for name, x in form.named_buffers()}
    form.rate(posterior, z, None, frozen=True)
    assert all(torch.equal(x, seen[name]) for name, x in form.named_buffers())
    for learn in (lambda: form.loss(z, None), lambda: form.rate(posterior, 2 * z, None)):
        learn()
        moved = dict(form.named_buffers())
        assert not any(torch.equal(moved[name], seen[name]) for name in ("upper.moments.mean", "lower.errors.mean"))
        seen = {name: x.clone() for name, x in moved.items()}
