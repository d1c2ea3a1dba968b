"""Likelihoods against exact models, gains paired by seed, and files of images that are refused where a byte is wrong."""

from __future__ import annotations

import gzip
import math
import struct

import digits
import mnist
import numpy as np
import pytest
import torch
import vae

from worldmodel.diagnostics.likelihood import FactorModel, Importance, concatenated, importance
from worldmodel.distributions import GaussianLatent, GaussianLatentConfig, GaussianPosterior
from worldmodel.errors import ConfigError
from worldmodel.model import active_units


@pytest.fixture(scope="module")
def data() -> tuple[torch.Tensor, ...]:
    return digits.digits()


# Importance weights -----------------------------------------------------------------------------------------------------


def normal(x, mean, std):
    return (-0.5 * ((x - mean) / std).square() - math.log(std) - 0.5 * math.log(2 * math.pi)).sum(-1)


def weighed(posterior_std: float, draws: int, rows: int = 50) -> tuple[Importance, torch.Tensor]:
    """z ~ N(0, 1), x = z + 0.5 e in two independent numbers; posteriors around the true one's mean, with the given deviation."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 2, generator=generator) * math.sqrt(1.25)
    posterior = GaussianPosterior(x / 1.25, torch.full_like(x, posterior_std))
    latent = GaussianLatent(GaussianLatentConfig(size=2))
    found = importance(posterior, latent, lambda z: normal(z, 0.0, 1.0), lambda z: normal(x, z, 0.5), draws, generator, chunk=70)
    return found, normal(x, 0.0, math.sqrt(1.25))


def test_the_true_posterior_weighs_all_draws_alike():
    found, exact = weighed(math.sqrt(0.2), 100)
    torch.testing.assert_close(found.nats, exact, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.bound(1), exact, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.ess, torch.full_like(exact, 100.0), atol=0.1, rtol=0)


def test_more_draws_make_up_for_a_wrong_posterior():
    found, exact = weighed(0.7, 3000)
    gaps = [float((exact - found.bound(k)).mean()) for k in (1, 10, 100, 1000)]
    assert gaps[0] > 0.3 and gaps == sorted(gaps, reverse=True)
    assert abs(float((exact - found.nats).mean())) < 0.01
    assert (found.ess > 1).all() and (found.ess < 2700).all()
    assert list(found.curve()) == [1, 10, 100, 1000, 3000]


def test_rate_and_distortion_make_up_the_elbo():
    found, _ = weighed(0.7, 140)
    torch.testing.assert_close(-(found.rate + found.distortion), found.bound(1), atol=1e-4, rtol=0)
    both = concatenated([found, found])
    torch.testing.assert_close(both.nats, found.nats.repeat(2))


def test_more_draws_than_there_are_bound_nothing():
    found, _ = weighed(0.7, 10)
    with pytest.raises(ValueError, match="11 draws needs as many weights"):
        found.bound(11)


def test_a_number_that_never_changes_is_no_active_unit():
    assert active_units(torch.stack([torch.arange(10.0), torch.full((10,), 0.3)], 1)) == 1


# Exact models -----------------------------------------------------------------------------------------------------------


def test_the_factor_model_is_a_normal_distribution():
    generator = torch.Generator().manual_seed(0)
    model = FactorModel(torch.randn(5, generator=generator), torch.randn(5, 2, generator=generator), 0.4)
    x = torch.randn(7, 5, generator=generator)
    normal = torch.distributions.MultivariateNormal(model.mean, model.weight @ model.weight.T + 0.16 * torch.eye(5))
    torch.testing.assert_close(model.log_prob(x).float(), normal.log_prob(x), atol=1e-4, rtol=1e-5)


def test_the_fitted_factor_model_is_the_most_likely():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 3, generator=generator) @ torch.randn(3, 6, generator=generator) + 0.3 * torch.randn(
        400, 6, generator=generator
    )
    best = FactorModel.fit(x, 3)
    assert abs(best.sigma - 0.3) < 0.02
    for other in (FactorModel(best.mean, 1.05 * best.weight, best.sigma), FactorModel(best.mean, best.weight, 1.05 * best.sigma)):
        assert other.log_prob(x).mean() < best.log_prob(x).mean()
    with pytest.raises(ValueError, match="leave no noise"):
        FactorModel.fit(x, 6)


def test_a_linear_vae_comes_to_the_exact_likelihood_of_probabilistic_pca(data):
    train, _, test = data
    found = digits.ppca(train[:500], test[:100], {"latents": 2, "seed": 0, "epochs": 40})
    assert abs(found["gap"]) < 0.1
    assert abs(found["nats"] - found["ppca"]) < 0.5


def test_discretised_logistic_levels_sum_to_one():
    out = torch.randn(4, 1, 2) * 3
    x = torch.linspace(0, 1, 17).view(17, 1)
    total = torch.stack([vae.Logistic(17)(out[:, 0].unsqueeze(1), level.expand(4, 1))[:, 0] for level in x]).logsumexp(0)
    torch.testing.assert_close(total, torch.zeros(4), atol=1e-4, rtol=0)


def test_many_posteriors_are_scored_as_one_by_one():
    generator = torch.Generator().manual_seed(0)
    mean, std = torch.randn(1, 200, 10, generator=generator), torch.rand(1, 200, 10, generator=generator) + 0.05
    many, x = GaussianPosterior(mean, std), torch.randn(4, 3, 10, generator=generator)
    assert mean.numel() >= GaussianPosterior.MATMUL_FROM
    torch.testing.assert_close(many.log_prob_each(x), many.log_prob(x.unsqueeze(-2)), atol=1e-2, rtol=1e-5)


def test_pseudo_inputs_begin_at_what_is_given(data):
    prior = digits.model("vamp", 0, {"components": 20}, data[0], vae.Setup(units=8)).prior
    given = data[0][:30]
    prior.init_pseudo_inputs({"image": given})
    torch.testing.assert_close(torch.sigmoid(prior.input0), given[:20].clamp(0.05, 0.95))
    with pytest.raises(ValueError, match="20 pseudo-inputs cannot start at 19"):
        prior.init_pseudo_inputs({"image": given[:19]})


# Pairs ------------------------------------------------------------------------------------------------------------------


def test_the_digits_are_split_once_and_for_all(data):
    assert [len(part) for part in data] == [1000, 350, 447]
    rows = torch.cat(data).flatten(1)
    assert ((rows * 16) == (rows * 16).round()).all() and rows.max() == 1
    assert torch.equal(torch.cat(digits.digits()).flatten(1), rows)


def test_all_forms_of_a_seed_begin_with_the_same_encoder_and_decoder(data):
    setup = vae.Setup(units=16)
    before = torch.get_rng_state()
    made = {form: digits.model(form, 3, {}, data[0], setup) for form in ("gaussian", "mixture", "vamp", "flow")}
    assert torch.equal(torch.get_rng_state(), before)
    for form, other in made.items():
        for name, value in made["gaussian"].state_dict().items():
            assert name.startswith("prior.") or torch.equal(other.state_dict()[name], value), (form, name)
    assert not torch.equal(digits.model("gaussian", 4, {}, data[0], setup).head.weight, made["gaussian"].head.weight)


def test_learning_is_the_same_twice_and_keeps_the_best(data):
    train, valid, _ = data
    setup = vae.Setup(units=16, layers=1, epochs=3, average=0.5)
    found = []
    for _ in range(2):
        made = digits.model("mixture", 0, {}, train[:200], setup)
        start = vae.validation(made, valid, setup.noises)
        found.append(vae.learn(made, train[:200], valid, setup, 0)["validation"])
        assert found[-1] > start
        assert vae.validation(made, valid, setup.noises) == found[-1]
    assert found[0] == found[1]


def test_patience_begins_after_the_warm_up(data):
    setup = vae.Setup(units=4, layers=1, epochs=8, warmup=0.7, patience=1, average=0)
    found = vae.learn(digits.model("gaussian", 0, {}, data[0], setup), data[0][:100], data[1][:50], setup, 0)
    assert found["best_epoch"] == 8 and math.isfinite(found["validation"])
    setup = vae.Setup(units=4, layers=1, epochs=8, seconds=1e-6)
    assert vae.learn(digits.model("gaussian", 0, {}, data[0], setup), data[0], data[1], setup, 0)["updates"] == 0


def test_gains_are_paired_by_seed():
    def row(nats):
        names = ("nats", "rate", "distortion", "active", "ess", "cpu_seconds", "parameters", "law_parameters", "best_epoch")
        return {**dict.fromkeys(names, 1.0), "nats": nats, "draws": 1000, "curve": {"1000": nats}}

    base = {seed: row(-100.0 - 10 * seed) for seed in range(3)}
    better = {seed: row(-99.0 - 10 * seed + 0.1 * seed) for seed in range(3)}
    gain, error = digits.clustered_mean(better, base)
    assert gain == pytest.approx(1.1) and error == pytest.approx(0.1 / math.sqrt(3))
    assert digits.clustered_mean({0: better[0]}, base) is None
    found = digits.summary({"gaussian": base, "vamp": better})
    assert [line["met"] for line in digits.targets(found, 2)] == [True, True]
    assert not digits.targets(digits.summary({"gaussian": better, "vamp": base}), 2)[0]["met"]


# Files ------------------------------------------------------------------------------------------------------------------

TRAIN, TEST = "train-images-idx3-ubyte", "t10k-images-idx3-ubyte"


def idx(pixels: np.ndarray, magic: int = 0x803, shape: tuple[int, int, int] | None = None) -> bytes:
    return struct.pack(">4I", magic, *(shape or pixels.shape)) + pixels.tobytes()


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (12, 28, 28), dtype=np.uint8)


@pytest.mark.parametrize("packed", [False, True])
def test_image_files_are_read_plain_and_packed(packed, pixels, tmp_path):
    raw = idx(pixels)
    (tmp_path / (TRAIN + ".gz" * packed)).write_bytes(gzip.compress(raw) if packed else raw)
    found = mnist.images(tmp_path, TRAIN)
    assert found.shape == (12, 1, 28, 28) and np.array_equal(found[:, 0].numpy(), pixels)


def test_damaged_files_are_refused(pixels, tmp_path):
    raw = idx(pixels)
    wrong = {
        "begins with": idx(pixels, magic=0x801),
        "tells of": idx(pixels, shape=(12, 28, 27)),
        "tells of 0 images": struct.pack(">4I", 0x803, 0, 28, 28),
        "tells of 4294967295 images": struct.pack(">4I", 0x803, 2**32 - 1, 28, 28),
        "within its head": raw[:10],
        "holds 9,407": raw[:-1],
        "holds more": raw + b"0",
    }
    for message, content in wrong.items():
        (tmp_path / TRAIN).write_bytes(content)
        with pytest.raises(ConfigError, match=message):
            mnist.images(tmp_path, TRAIN)
    (tmp_path / TRAIN).unlink()
    for content in (b"no gzip", gzip.compress(raw)[:-30], b"\x1f\x8b\x08\x00" + b"\xff" * 40):
        (tmp_path / f"{TRAIN}.gz").write_bytes(content)
        with pytest.raises(ConfigError, match="cannot be unpacked"):
            mnist.images(tmp_path, TRAIN)
    with pytest.raises(ConfigError, match=f"holds no {TEST}"):
        mnist.images(tmp_path, TEST)


def test_mnist_goes_from_files_to_likelihood(data, tmp_path):
    large = torch.nn.functional.interpolate(data[0][:300], size=(28, 28))
    for name, rows in ((TRAIN, large[:240]), (TEST, large[240:])):
        (tmp_path / name).write_bytes(idx((rows[:, 0] * 255).round().to(torch.uint8).numpy()))
    rows = []
    for form, options in (("gaussian", []), ("vamp", ["vamp.components=20"])):
        job = {"mnist": str(tmp_path), "form": form, "latents": 4, "seed": 0, "draws": 20, "seconds": 600.0}
        found = mnist.work({**job, "overrides": ["epochs=2", "warmup=0.5", "patience=1", *options]})
        assert found["updates"] == 4 and found["images"] == 60 and -600 < found["nats"] < 0
        rows.append({"key": {"form": form, "seed": 0}, **found})
    assert mnist.report(rows)["mnist"]["gain"] == pytest.approx(rows[1]["nats"] - rows[0]["nats"])
