"""Encoders and the scaling of vectors: running statistics are numpy's, and every scale inverts."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import generator, small, small_world
from gymnasium import spaces

from worldmodel import registry
from worldmodel.encoders import VectorScaling
from worldmodel.spaces import ObsSpec

INF = np.inf
MIXED = spaces.Dict(
    {
        "camera": spaces.Box(0, 255, (16, 16, 3), np.uint8),
        "map": spaces.Box(0, 255, (8, 24, 1), np.uint8),
        "speed": spaces.Box(-INF, INF, (3,), np.float32),
        "far": spaces.Box(-INF, INF, (2,), np.float64),
        "gear": spaces.Discrete(4),
        "switches": spaces.MultiBinary(3),
    }
)
SPEC = ObsSpec.from_space(MIXED)


def canonical(n: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """n random observations of MIXED; `speed` lives around 50 and varies by 0.01, 1 and 100."""
    rng = np.random.default_rng(seed)
    MIXED.seed(seed)
    rows = [MIXED.sample() for _ in range(n)]
    out = SPEC.canonical({name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in MIXED})
    out["speed"] = torch.from_numpy((50 + rng.normal(size=(n, 3)) * [0.01, 1, 100]).astype(np.float32))
    return out


def test_running_statistics_are_those_of_all_that_was_seen():
    scaling, batches = VectorScaling("standardise", SPEC), [canonical(n, seed) for seed, n in enumerate((1, 7, 32, 3))]
    for batch in batches:
        scaling.update(batch)
    assert float(scaling.count) == 43
    for name in ("speed", "far"):
        seen = np.concatenate([batch[name].numpy() for batch in batches]).astype(np.float64)
        mean, std = scaling.statistics(scaling.vectors.index(name), torch.zeros((), dtype=torch.float64))
        np.testing.assert_allclose(mean, seen.mean(0), rtol=1e-10)
        np.testing.assert_allclose(std, seen.std(0), rtol=1e-10)


def test_many_small_updates_far_from_zero_lose_no_precision():
    scaling, rng = VectorScaling("standardise", ObsSpec.from_space(spaces.Box(-INF, INF, (1,)))), np.random.default_rng(0)
    seen = (1e4 + 0.5 * rng.normal(size=(2000, 1))).astype(np.float32)
    for row in seen:
        scaling.update({"obs": torch.from_numpy(row).unsqueeze(0)})
    assert float(scaling.statistics(0, torch.zeros(()))[1]) == pytest.approx(seen.astype(np.float64).std(), rel=1e-6)


def test_standardised_vectors_have_mean_zero_and_deviation_one():
    scaling, batch = VectorScaling("standardise", SPEC), canonical(500)
    scaling.update(batch)
    scaled = scaling(batch)
    for name in ("speed", "far"):
        torch.testing.assert_close(scaled[name].mean(0), torch.zeros_like(scaled[name][0]), atol=1e-2, rtol=0)
        torch.testing.assert_close(scaled[name].std(0, unbiased=False), torch.ones_like(scaled[name][0]), atol=1e-2, rtol=0)


@pytest.mark.parametrize("kind", ["standardise", "symlog", "raw"])
def test_every_scale_inverts_and_touches_vectors_alone(kind):
    scaling, batch = VectorScaling(kind, SPEC), canonical(200)
    scaling.update(batch)
    before = {name: x.clone() for name, x in batch.items()}
    scaled = scaling(batch)
    back = scaling.inverse(scaled)
    for name, x in batch.items():
        assert torch.equal(x, before[name])
        if SPEC.keys[name].kind == "vector":
            torch.testing.assert_close(back[name], x, rtol=1e-4, atol=1e-4)
            assert (kind == "raw") == torch.equal(scaled[name], x.float())
        else:
            assert torch.equal(scaled[name], x) and torch.equal(back[name], x)


def test_before_anything_was_seen_vectors_pass_unchanged_and_constants_never_explode():
    scaling, batch = VectorScaling("standardise", SPEC), canonical(5)
    torch.testing.assert_close(scaling({**batch, "speed": torch.ones(5, 3)})["speed"], torch.ones(5, 3))
    constant = {**batch, "speed": torch.full((5, 3), 3.0)}
    scaling.update(constant)
    torch.testing.assert_close(scaling({**batch, "speed": torch.full((5, 3), 3.5)})["speed"], torch.full((5, 3), 0.5))


def test_numbers_far_from_all_that_was_seen_keep_their_order_and_come_back():
    scaling = VectorScaling("standardise", ObsSpec.from_space(spaces.Box(-INF, INF, (1,))))
    scaling.update({"obs": 0.05 * torch.randn(300, 1, generator=generator())})
    track = torch.linspace(-2.4, 2.4, 97).unsqueeze(1).requires_grad_()  # up to 48 deviations
    scaled = scaling({"obs": track})["obs"]
    assert (scaled.diff(dim=0) > 0).all()
    assert (torch.autograd.grad(scaled.sum(), track)[0] > 0).all()
    torch.testing.assert_close(scaling.inverse({"obs": scaled.detach()})["obs"], track.detach(), rtol=1e-4, atol=1e-5)
    assert 0.3 < float(scaling.compressed_fraction({"obs": scaled})) < 0.7
    assert scaling({"obs": torch.full((1, 1), INF)})["obs"].isnan().all()


def test_after_300_random_steps_of_cartpole_all_of_its_track_is_told_apart():
    env = gym.make("CartPole-v1")
    env.action_space.seed(0)
    world, rows = small_world(env.observation_space), [env.reset(seed=0)[0]]
    for _ in range(300):
        obs, _, *ended, _ = env.step(env.action_space.sample())
        rows += [obs] + [env.reset()[0]] * any(ended)
    world.scaling.update(world.obs.canonical({"obs": torch.from_numpy(np.stack(rows))}))
    track = torch.zeros(23, 4)
    track[:, 0] = torch.linspace(1.3, 2.4, 23)
    seen = world.preprocess({"obs": track})  # what is encoded, and what is decoded towards
    assert (seen["obs"][:, 0].diff() > 0.01).all()
    unlikely = world.decoder.eval().loss(torch.zeros(23, world.feature_dim), seen)["observation"].value
    assert (unlikely.diff() > 0).all()
    torch.testing.assert_close(world.scaling.inverse(seen)["obs"], track, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float64, np.int64], ids=["float64", "int64"])
def test_a_clock_in_seconds_since_1970_keeps_its_seconds(dtype):
    spec = ObsSpec.from_space(spaces.Box(0, 2**40, (1,), dtype))
    for step in (1, 900):
        scaling, seconds = VectorScaling("standardise", spec), 1_700_000_000 + step * np.arange(100).reshape(-1, 1)
        rows = spec.canonical({"obs": torch.from_numpy(seconds.astype(dtype))})
        scaling.update(rows)
        scaled = scaling(rows)["obs"]
        right = (np.arange(100) - 49.5) / np.arange(100).std()
        torch.testing.assert_close(scaled[:, 0], torch.from_numpy(right).float(), rtol=1e-5, atol=1e-5)
        assert np.abs(spec.raw(scaling.inverse({"obs": scaled}))["obs"] - seconds).max() <= 0.01 * step


def test_statistics_are_saved_with_the_model_and_are_not_trained():
    scaling, twin = VectorScaling("standardise", SPEC), VectorScaling("standardise", SPEC)
    scaling.update(canonical(50))
    assert not list(scaling.parameters())
    twin.load_state_dict(scaling.state_dict())
    batch = canonical(5, seed=1)
    assert all(torch.equal(scaling(batch)[name], twin(batch)[name]) for name in batch)


def test_a_world_without_vectors_has_nothing_to_scale():
    scaling = VectorScaling("standardise", ObsSpec.from_space(spaces.Discrete(3)))
    scaling.update({"obs": torch.eye(3)})
    assert torch.equal(scaling({"obs": torch.eye(3)})["obs"], torch.eye(3))


# Encoders --------------------------------------------------------------------------------------------------------------


def build(kind: str, space: spaces.Space):
    torch.manual_seed(0)
    return registry.build("encoder", small("encoder", kind), ObsSpec.from_space(space))


every_encoder = pytest.mark.parametrize(
    "kind",
    registry.kinds("encoder"),
)


@every_encoder
@pytest.mark.parametrize("space", [*MIXED.values(), MIXED], ids=[*MIXED, "all"])
def test_every_kind_of_observation_is_encoded(kind, space):
    encoder, spec = build(kind, space), ObsSpec.from_space(space)
    obs = {name: torch.rand(5, *key.shape, generator=generator()) for name, key in spec.keys.items()}
    embedding = encoder(obs)
    assert embedding.shape == (5, encoder.out_features) and embedding.isfinite().all()
    for name in obs:  # every key counts
        other = {**obs, name: 1 - obs[name]}
        assert (encoder(other) - embedding).abs().max() > 1e-4


@every_encoder
def test_rows_are_encoded_apart(kind):
    encoder = build(kind, MIXED).eval()
    obs = VectorScaling("raw", SPEC)(canonical(6))
    torch.testing.assert_close(encoder({name: x[2:4] for name, x in obs.items()}), encoder(obs)[2:4], rtol=1e-4, atol=1e-5)


@every_encoder
def test_a_picture_too_small_is_refused_with_the_way_out(kind):
    with pytest.raises(ValueError, match="layout=vector"):
        build(kind, spaces.Box(0, 255, (7, 7, 3), np.uint8))
