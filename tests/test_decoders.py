"""Decoders: p(x | feature) is normalised for every kind of observation, and its deviation is the error's size."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import assert_near, descend, generator, reached, small
from gymnasium import spaces
from torch import Tensor
from torch.distributions import Bernoulli, Normal, OneHotCategorical

from worldmodel import registry
from worldmodel.data import Sampling
from worldmodel.decoders.standard import discrete_logistic, logistic_mean
from worldmodel.errors import ConfigError
from worldmodel.spaces import ObsSpec

SPACES = {
    "image": spaces.Box(0, 255, (16, 17, 3), np.uint8),
    "vector": spaces.Box(-1, 1, (4,), np.float32),
    "category": spaces.Discrete(3),
    "categories": spaces.MultiDiscrete([2, 4, 3]),
    "bits": spaces.MultiBinary(5),
}
MIXED = spaces.Dict(SPACES)
FEATURES, LATENT = 9, 4

every_decoder = pytest.mark.parametrize("kind", registry.kinds("decoder"))
every_likelihood = pytest.mark.parametrize("kind", ["standard", "diffusion"])
"""Decoders whose "observation" is a negative log-likelihood."""
every_space = pytest.mark.parametrize("space", [*SPACES.values(), MIXED], ids=[*SPACES, "all"])


def build(kind: str, space: spaces.Space, **options):
    torch.manual_seed(0)
    return registry.build("decoder", small("decoder", kind, **options), ObsSpec.from_space(space), FEATURES, LATENT)


def feature(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, FEATURES, generator=generator(seed))


def nll(decoder, given: Tensor, x: Tensor) -> Tensor:
    """The negative log-likelihood of the one key "obs" [N]."""
    return decoder.loss(given, {"obs": x})["observation"].value


def spread_sigma(decoder, offsets) -> None:
    """Moves each learned deviation by `offsets(its parameter)`."""
    for p in (p for name, p in decoder.named_parameters() if name.startswith("log_std")):
        p.data += offsets(p)


def observations(spec: ObsSpec, n: int, seed: int = 0) -> dict[str, Tensor]:
    rows = {}
    for name, key in spec.keys.items():
        space = key.space
        space.seed(seed)
        rows[name] = torch.from_numpy(np.stack([np.asarray(space.sample()) for _ in range(n)]))
    return spec.canonical(rows)


def log_prob(decoder, x: Tensor, name: str, output: Tensor) -> Tensor:
    """ln p of one key by torch.distributions [N]."""
    key = decoder.spec.keys[name]
    if key.kind == "categorical":
        groups = zip(x.split(key.sizes, -1), output.split(key.sizes, -1))
        return sum(OneHotCategorical(logits=logits).log_prob(part) for part, logits in groups)
    if key.kind == "binary":
        return Bernoulli(logits=output).log_prob(x).sum(-1)
    std = decoder.log_std(name).exp().view(1, -1, *[1] * (x.ndim - 2))
    return Normal(output, std.expand_as(output)).log_prob(x).flatten(1).sum(-1)


@every_likelihood
@every_space
def test_the_loss_is_the_negative_log_likelihood_in_nats_summed_over_all_elements(kind, space):
    decoder = build(kind, space, sigma="learned")
    spread_sigma(decoder, lambda p: 0.7 * torch.randn(p.shape, generator=generator(4)))
    obs = observations(decoder.spec, 5)
    terms = decoder.loss(feature(5), obs)
    expected = -sum(log_prob(decoder, obs[name], name, out) for name, out in decoder.output(feature(5)).items())
    assert terms["observation"].unit == "nats" and all(term.value.shape == (5,) for term in terms.values())
    torch.testing.assert_close(terms["observation"].value, expected)


@every_decoder
@every_space
@pytest.mark.parametrize("what", ["mean", "mode", "sample"])
def test_means_and_samples_look_like_observations(kind, space, what):
    decoder = build(kind, space)
    sampling = Sampling(generator=generator(), mode=what == "mode")
    out = decoder.mean(feature(6)) if what == "mean" else decoder.sample(feature(6), sampling)
    assert out.keys() == decoder.spec.keys.keys()
    for name, key in decoder.spec.keys.items():
        x = out[name]
        assert x.shape == (6, *key.shape) and x.dtype == torch.float32 and x.isfinite().all()
        if key.kind == "categorical":
            for part in x.split(key.sizes, -1):
                torch.testing.assert_close(part.sum(-1), torch.ones(6))
        if key.kind in ("categorical", "binary") or (key.kind == "image" and what != "mean"):
            assert (0 <= x).all() and (x <= 1).all()
            assert what == "mean" or key.kind == "image" or set(x.unique().tolist()) <= {0.0, 1.0}


def test_samples_have_the_mean_and_the_deviation_of_the_distribution():
    decoder, n = build("standard", MIXED, sigma="learned"), 3000
    spread_sigma(decoder, lambda p: torch.linspace(-1, 0.5, p.numel()))
    decoder.perceptron.bent[-1].weight.data *= 3  # categories far from equal
    same = feature(1).expand(n, -1)
    mean, drawn = decoder.mean(feature(1)), decoder.sample(same, Sampling(generator=generator()))
    for name, key in decoder.spec.keys.items():
        x, center = drawn[name].detach(), mean[name][0].detach()
        if key.kind in ("image", "vector"):
            std = decoder.log_std(name).detach().exp().view(-1, *[1] * (x.ndim - 2)).expand_as(x[0])
            if key.kind == "image":  # given that they lie in [0, 1]
                middle = center.clamp(0, 1)
                likely = torch.normal(middle.expand(n, -1, -1, -1), std.expand(n, -1, -1, -1), generator=generator(1))
                likely = likely.masked_fill((likely < 0) | (likely > 1), torch.nan)
                center = likely.nanmean(0)
                std = (likely - center).square().nanmean(0).sqrt()
            torch.testing.assert_close(x.std(0), std, rtol=0.15, atol=0.03 if key.kind == "image" else 0)
        assert_near(x.mean(0), center, n if key.kind != "image" else n / 2, x.std(0))


@every_likelihood
def test_categories_are_drawn_as_often_as_they_are_likely(kind):
    decoder, n = build(kind, spaces.Discrete(8)), 20_000
    decoder.perceptron.bent[-1].bias.data[0] = 3.0
    probability = decoder.mean(feature(1))["obs"].detach()
    drawn = decoder.sample(feature(1).expand(n, -1), Sampling(generator=generator()))["obs"]
    assert_near(drawn.mean(0), probability[0], n, drawn.std(0))


@every_decoder
def test_the_same_generator_draws_the_same_observation_and_a_low_temperature_stays_near_the_mean(kind):
    decoder = build(kind, MIXED)
    one, same, other = (decoder.sample(feature(3), Sampling(generator=generator(seed))) for seed in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one) and not torch.equal(one["image"], other["image"])
    cold = decoder.sample(feature(3), Sampling(generator=generator(), temperature=0.0))
    torch.testing.assert_close(cold["vector"], decoder.mean(feature(3))["vector"])


@every_likelihood
@pytest.mark.parametrize("sigma", ["fitted", "learned"])
def test_the_deviation_approaches_the_size_of_the_error(kind, sigma):
    """Per number of a vector; an observation that the feature says nothing about, with deviations 0.2 and 3."""
    decoder = build(kind, spaces.Box(-10, 10, (2,), np.float32), sigma=sigma).train()
    for p in decoder.perceptron.parameters():
        p.requires_grad_(False).zero_()
    truth = torch.tensor([0.2, 3.0])
    given = feature(256).requires_grad_()
    loss = lambda step: nll(decoder, given, truth * torch.randn(256, 2, generator=generator(step))).mean()  # noqa: E731
    descend(loss, decoder.parameters(), 0.05, 150)
    torch.testing.assert_close(decoder.log_std("obs").detach().exp(), truth, rtol=0.1, atol=0)


@every_likelihood
def test_the_deviation_of_a_picture_is_one_number_and_the_error_of_all_its_pixels(kind):
    decoder = build(kind, SPACES["image"]).train()
    x = torch.rand(64, 3, 16, 17, generator=generator())
    for _ in range(200):
        nll(decoder, feature(64), x)
    error = (x - decoder.mean(feature(64))["obs"]).square().mean().sqrt()
    assert decoder.log_std("obs").shape == (1,)
    assert float(decoder.log_std("obs").exp()) == pytest.approx(float(error.detach()), rel=0.02)


@every_likelihood
@pytest.mark.parametrize(("key", "option"), [("vector", "min_sigma"), ("image", "min_sigma_image")])
def test_a_fitted_deviation_is_fixed_in_evaluation_and_has_a_minimum(kind, key, option):
    decoder = build(kind, SPACES[key], **{option: 0.3})
    exact = decoder.eval().mean(feature(8))["obs"].detach()
    before = decoder.log_std("obs").clone()
    nll(decoder, feature(8), exact)
    assert torch.equal(decoder.log_std("obs"), before)
    decoder.train()
    for _ in range(200):
        nll(decoder, feature(8), exact)
    torch.testing.assert_close(decoder.log_std("obs"), torch.full_like(before, math.log(0.3)))


@every_likelihood
def test_a_number_that_is_not_finite_does_not_stay_in_the_fitted_deviation(kind):
    decoder = build(kind, SPACES["vector"]).train()
    x = torch.zeros(8, 4)
    x[0, 0] = torch.nan
    assert nll(decoder, feature(8), x).isnan().any()
    assert nll(decoder, feature(8), torch.zeros(8, 4)).isfinite().all()


@every_decoder
def test_a_decoder_of_the_latent_does_not_see_the_recurrent_state(kind):
    decoder = build(kind, MIXED, reads="latent")
    one, other = feature(3), feature(3)
    other[:, :-LATENT] += 5
    assert decoder.in_features == LATENT
    assert all(torch.equal(x, decoder.mean(other)[name]) for name, x in decoder.mean(one).items())
    assert all(torch.equal(x, decoder.mean(one[:, -LATENT:])[name]) for name, x in decoder.mean(one).items())
    whole = build(kind, MIXED)
    for p in whole.parameters():  # an untrained prior ignores the feature
        p.data += 0.1 * torch.randn(p.shape, generator=generator())
    assert not torch.equal(whole.mean(one)["vector"], whole.mean(other)["vector"])


# Distributions of pixels -------------------------------------------------------------------------------------------------

GREY = spaces.Box(0, 255, (8, 8, 1), np.uint8)


@pytest.mark.parametrize("levels", [2, 6, 256])
def test_the_probabilities_of_a_logistic_pixels_levels_sum_to_one(levels):
    middle, scale = torch.tensor([-0.3, 0.2, 0.51, 1.4]).view(-1, 1), torch.tensor([0.05, 0.002, 0.3, 0.1]).view(-1, 1)
    values = torch.linspace(0, 1, levels).expand(4, levels)
    nats = discrete_logistic(values, middle, scale, levels)
    torch.testing.assert_close((-nats).exp().sum(1), torch.ones(4))
    mean = ((-nats).exp() * values).sum(1)
    torch.testing.assert_close(logistic_mean(middle, scale).squeeze(1), mean, rtol=0, atol=0.5 / (levels - 1) + 1e-3)


@pytest.mark.parametrize("image", ["logistic", "bernoulli"])
def test_discrete_pixels_are_drawn_as_often_as_they_are_likely(image):
    decoder, n = build("standard", GREY, image=image, levels=5, sigma="learned", min_sigma_image=0.2), 4000
    decoder.log_std0 = torch.nn.Parameter(torch.full((1,), math.log(0.2)))
    drawn = decoder.sample(feature(1).expand(n, -1), Sampling(generator=generator()))["obs"].detach()
    possible = torch.linspace(0, 1, 2 if image == "bernoulli" else 5)
    seen = torch.stack([(drawn - value).abs().lt(1e-6).float().mean(0) for value in possible])
    torch.testing.assert_close(seen.sum(0), torch.ones(1, 8, 8))
    for value, share in zip(possible, seen, strict=True):  # one pixel at a time: the others stay at a level of their own
        base = torch.zeros(1, 1, 8, 8)
        before = nll(decoder, feature(1), base)
        base[0, 0, 3, 3] = value
        ratio = (before - nll(decoder, feature(1), base)).exp()
        assert float(share[0, 3, 3]) == pytest.approx(float(ratio.detach() * seen[0][0, 3, 3]), abs=0.04)
    torch.testing.assert_close(decoder.mean(feature(1))["obs"][0].detach(), drawn.mean(0), rtol=0, atol=0.06)


def knows_its_picture(kind: str, **options):
    """(a decoder at defaults whose mean is one picture for every feature, that picture)."""
    config = registry.config_class("decoder", kind)(**options)
    decoder = registry.build("decoder", config, ObsSpec.from_space(GREY), FEATURES, LATENT)
    for p in decoder.convolutions.parameters():
        p.requires_grad_(False).mul_(0.1)
    mean = decoder.output(feature(1))["obs"]
    assert 0 <= float(mean.min()) and float(mean.max()) <= 1
    return decoder, (mean * 255).round() / 255


@every_likelihood
@pytest.mark.parametrize("sigma", ["fitted", "learned"])
def test_a_picture_that_is_known_costs_less_than_evenly_coded_bytes_under_defaults(kind, sigma):
    decoder, picture = knows_its_picture(kind, image="logistic", sigma=sigma)
    given = feature(1).requires_grad_()
    descend(
        lambda step: nll(decoder.train(), given, picture).mean(), [decoder.log_std0] if sigma == "learned" else [given], 0.1, 120
    )
    bits = float(nll(decoder.eval(), feature(1), picture).detach()) / (64 * math.log(2))
    assert bits < 2.0, "evenly coded, each of 256 levels costs 8"


@every_likelihood
@pytest.mark.parametrize("deviation", [0.01, 0.1, 0.49, 0.8])
def test_the_gradient_of_pictures_is_that_of_a_deviation_of_at_least_a_half_and_their_loss_is_not_weighted(kind, deviation):
    decoder = build(kind, GREY, min_sigma_image=0.001).eval()
    decoder.errors0.mean.fill_(deviation**2)
    means = torch.rand(3, 1, 8, 8, generator=generator()).requires_grad_()
    x = torch.rand(3, 1, 8, 8, generator=generator(1))
    nats = decoder._nll({"obs": means}, {"obs": x})
    torch.testing.assert_close(nats, -Normal(means, torch.tensor(deviation)).log_prob(x).flatten(1).sum(-1))
    (slope,) = torch.autograd.grad(nats.sum(), means)
    torch.testing.assert_close(slope, (means - x).detach() / max(deviation, 0.5) ** 2)


@every_likelihood
@pytest.mark.parametrize("image", ["gaussian", "logistic", "bernoulli"])
def test_a_weight_of_pictures_multiplies_their_gradient_and_neither_their_loss_nor_that_of_vectors(kind, image):
    obs = {"picture": torch.rand(3, 1, 16, 16, generator=generator(1)), "vector": torch.randn(3, 2, generator=generator(2))}
    found = {}
    for weight, floor in ((None, 1e-6), (1.0, 0.5), (0.2, 0.5), (3.0, 0.5)):  # the least floor leaves the gradient as it is
        decoder = build(kind, BOTH, image=image, image_weight=weight, weight_sigma_image=floor, min_sigma_image=0.001).eval()
        out = {name: x.detach().clone().requires_grad_() for name, x in decoder.output(feature(3)).items()}
        nats = decoder._nll(out, obs)
        found[weight] = nats.detach(), *torch.autograd.grad(nats.sum(), [out["picture"], out["vector"]])
    for weight in (1.0, 0.2, 3.0):
        assert torch.equal(found[weight][0], found[None][0]) and torch.equal(found[weight][2], found[None][2])
        torch.testing.assert_close(found[weight][1], found[None][1] * weight)


def test_under_defaults_draws_of_a_known_picture_are_near_it_and_none_lies_outside():
    for image in ("gaussian", "logistic"):
        decoder, picture = knows_its_picture("standard", image=image)
        for _ in range(100):
            nll(decoder.train(), feature(1), picture)
        drawn = decoder.sample(feature(1).expand(50, -1), Sampling(generator=generator()))["obs"].detach()
        assert 0 <= float(drawn.min()) and float(drawn.max()) <= 1
        assert float((drawn - picture).square().mean().sqrt()) < 0.02


def test_gaussian_pixels_are_drawn_inside_the_range_and_do_not_pile_up_at_its_ends():
    decoder, n = build("standard", GREY, min_sigma_image=0.001), 4000
    levels = torch.tensor([0.0, 0.02, 0.5, 0.98, 1.0, 1.3]).view(6, 1, 1, 1).expand(6, 1, 8, 8)
    for std in (0.01, 0.1, 1.0):
        decoder.errors0.mean.fill_(std**2)
        draw = lambda seed: decoder._sample_from({"obs": levels}, Sampling(generator=generator(seed)))["obs"]  # noqa: E731
        drawn = torch.stack([draw(seed) for seed in range(n // 64)])
        assert float(((drawn == 0) | (drawn == 1)).float().mean()) < 0.001
        for level, x in zip(levels[:, 0, 0, 0].clamp(0, 1).tolist(), drawn.transpose(0, 1).flatten(1)):
            nearest = Normal(level, std)
            low, high = nearest.cdf(torch.tensor(0.0)), nearest.cdf(torch.tensor(1.0))
            for quantile in (0.1, 0.5, 0.9):
                wanted = nearest.icdf(low + quantile * (high - low))
                assert float((x < wanted).float().mean()) == pytest.approx(quantile, abs=0.03)
    still = decoder._sample_from({"obs": levels}, Sampling(generator=generator(), temperature=0.0))["obs"]
    assert torch.equal(still, levels.clamp(0, 1))


def test_bernoulli_refuses_pixels_outside_of_zero_and_one():
    decoder = build("standard", GREY, image="bernoulli")
    assert nll(decoder, feature(2), torch.rand(2, 1, 8, 8)).isfinite().all()
    with pytest.raises(ConfigError, match="image=gaussian"):
        nll(decoder, feature(2), torch.full((2, 1, 8, 8), 1.5))


@pytest.mark.parametrize("image", ["logistic", "bernoulli"])
def test_discrete_pixels_learn_a_picture(image):
    decoder = build("standard", GREY, image=image, min_sigma_image=0.001).train()
    x = (torch.rand(1, 1, 8, 8, generator=generator()) < 0.5).float().expand(4, -1, -1, -1)
    same = feature(1).expand(4, -1)
    descend(lambda step: nll(decoder, same, x).mean(), decoder.parameters(), 1e-2, 150)
    assert float((decoder.mean(same)["obs"] - x).abs().mean().detach()) < 0.12
    assert float(((decoder.sample(same, Sampling(generator=generator()))["obs"] > 0.5) == (x > 0.5)).float().mean()) > 0.9


# Decoders that draw -----------------------------------------------------------------------------------------------------

every_diffusion = pytest.mark.parametrize("kind", ["diffusion", "latent_diffusion"])


def either(n: int, seed: int = 0) -> dict[str, Tensor]:
    """Pictures [n, 1, 16, 16] of one of two bright bars, and vectors [n, 2] at one of two places, whatever the feature."""
    side = torch.rand(n, generator=generator(seed)) < 0.5
    pictures = torch.zeros(n, 1, 16, 16)
    pictures[side, :, 2:6, 2:14] = 1.0
    pictures[~side, :, 10:14, 2:14] = 1.0
    return {"picture": pictures, "vector": torch.where(side.unsqueeze(1), 1.0, -1.0) * torch.tensor([1.0, -1.0])}


BOTH = spaces.Dict({"picture": spaces.Box(0, 255, (16, 16, 1), np.uint8), "vector": spaces.Box(-9, 9, (2,), np.float32)})
DRAWING = {"diffusion": {"refine_depth": 8, "refine_units": 64, "frames": 32}}


def trained(kind: str, steps: int = 150, **options):
    decoder = build(kind, BOTH, units=64, depth=8, **{**DRAWING.get(kind, {}), **options}).train()

    def loss(step: int) -> Tensor:
        terms = decoder.loss(torch.ones(32, FEATURES), either(32, step), Sampling(generator=generator(step)))
        return sum(term.mean() for term in terms.values())

    descend(loss, decoder.parameters(), 4e-3, steps)
    return decoder.eval()


@every_diffusion
def test_a_draw_is_one_of_the_possible_observations_where_the_mean_lies_between_them(kind):
    decoder, same = trained(kind), torch.ones(60, FEATURES)
    with torch.no_grad():
        mean, drawn = decoder.mean(same[:1]), decoder.sample(same, Sampling(generator=generator(), steps=5))
    distance = lambda x, real: (x - real).flatten(1).square().mean(1)  # noqa: E731
    picture, vector = either(40).values()
    reals = picture[:1], picture[(vector != vector[0]).any(1)][:1]
    nearest = torch.minimum(*[distance(drawn["picture"], real) for real in reals])
    apart = min(distance(mean["picture"], real) for real in reals)
    assert float(nearest.median()) < 0.5 * float(apart)
    assert 5 < int((drawn["vector"][:, 0] > 0).sum()) < 55
    assert float((drawn["vector"].abs() - 1).abs().median()) < 0.45


@pytest.mark.parametrize("image", ["gaussian", "bernoulli", "logistic"])
def test_a_latents_picture_is_drawn_whole_and_not_pixel_by_pixel(image):
    decoder = build("latent_diffusion", BOTH, image=image)
    decoder.prior.sample = lambda seen, count, sampling: torch.zeros(count, len(seen), decoder.config.size)
    drawn = decoder.sample(feature(2), Sampling(generator=generator()))
    assert torch.equal(drawn["picture"][0], drawn["picture"][1])  # one latent, one picture
    torch.testing.assert_close(drawn["picture"], decoder.mean(feature(2))["picture"].clamp(0, 1))


@every_diffusion
@pytest.mark.parametrize("gradient", ["stop", "full"])
def test_denoising_reaches_the_feature_only_where_it_may(kind, gradient):
    decoder = trained(kind, steps=3, gradient=gradient)
    given = feature(4).requires_grad_()
    terms = decoder.loss(given, either(4), Sampling(generator=generator()))
    denoise = sum(term.value for name, term in terms.items() if name.startswith("denoise"))
    assert reached(denoise, feature=given) == ({"feature"} if gradient == "full" else set())
    likelihood = reached(terms["observation"].value, **dict(decoder.named_parameters()))
    own = reached(denoise, **dict(decoder.named_parameters()))
    assert likelihood and own and not likelihood & own, "the refiner trains nothing that the likelihood trains"


@pytest.mark.parametrize(("kind", "unit"), [("diffusion", "nats"), ("latent_diffusion", "score")])
def test_only_what_belongs_to_the_elbo_is_in_nats(kind, unit):
    terms = trained(kind, steps=1).loss(feature(4), either(4), Sampling(generator=generator()))
    assert {name.partition("/")[0] for name in terms} == {"observation", "denoise"}  # each has a scale in training
    assert {name: term.unit for name, term in terms.items()} == {**dict.fromkeys(terms, "score"), "observation": unit}


def test_the_expected_observation_is_that_of_the_standard_decoder():
    one, other = build("standard", BOTH), build("diffusion", BOTH)
    other.load_state_dict(one.state_dict(), strict=False)
    values = [decoder.loss(feature(4), either(4))["observation"].value for decoder in (one, other)]
    assert torch.equal(*values)
    assert all(torch.equal(x, other.mean(feature(4))[name]) for name, x in one.mean(feature(4)).items())


def test_the_loss_of_some_pictures_stands_for_that_of_all():
    means = []
    for frames in (16, 64):
        decoder = build("diffusion", BOTH, frames=frames)
        losses = [decoder.loss(feature(64), either(64), Sampling(generator=generator(seed)))["denoise"] for seed in range(20)]
        means.append(sum(float(loss.mean().detach()) for loss in losses) / 20)
    assert means[0] == pytest.approx(means[1], rel=0.1)
