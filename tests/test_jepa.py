"""Objectives that predict latents: what each loss trains, what prevents a collapse, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import CHAIN, TWO_ACTIONS, VECTOR, generator, known_batch, reached, small
from gymnasium import spaces
from small_runs import OPTIONS
from torch import Tensor

from worldmodel.commands.train import train
from worldmodel.data import Batch, Loss, Sampling, Trace
from worldmodel.errors import ConfigError
from worldmodel.learner import Learner, ScaleConfig, TrainConfig
from worldmodel.model import ModelConfig, WorldModel
from worldmodel.objectives import covariance, epps_pulley, variance
from worldmodel.storage.run import Run

POINT = {"dynamics": {"latent": {"kind": "point", "size": 3}, "posterior": "observation", "deter": 12, "units": 16}}
FITTED = small("distribution", "gaussian", std="fitted")
UPSTREAM = ("encoder", "dynamics.posterior_net", "dynamics.gru", "dynamics.transition")


def jepa_world(kind: str = "jepa", action: spaces.Space = TWO_ACTIONS, heads: str = "stop", seed: int = 0, **options) -> WorldModel:
    """A small world model of point latents, in training mode."""
    parts = {name: small(name, "standard") for name in ("encoder", "decoder")}
    parts |= {"heads": small("heads", "standard", gradient=heads), "transition": FITTED, "initial": FITTED}
    config = {**POINT, **parts, "objective": {"kind": kind, "units": 16, **options}}
    return WorldModel.from_spaces(VECTOR, action, config, seed=seed).train()


def losses(world: WorldModel, batch: Batch) -> tuple[dict[str, Loss], Trace]:
    prepared = batch.with_obs(world.preprocess(batch.obs))
    trace = world.trace(prepared, None, Sampling(generator=generator()))
    return world.loss(trace, prepared, Sampling(generator=generator())), trace


def parts_reached(world: WorldModel, loss: Tensor) -> set[str]:
    """Names of the modules that a loss has a gradient for."""
    names = reached(loss, **{name: p for name, p in world.named_parameters() if p.requires_grad})
    return {".".join(name.split(".")[: 2 if name.startswith(("dynamics", "objective")) else 1]) for name in names}


# Gradients -------------------------------------------------------------------------------------------------------------


def test_prediction_trains_encoder_dynamics_and_transition_and_other_losses_their_own_modules():
    world = jepa_world()
    terms, _ = losses(world, known_batch())
    found = {name: parts_reached(world, term.mean()) for name, term in terms.items()}
    assert {*UPSTREAM, "dynamics.z_in", "dynamics.action_in"} <= found["prediction"]
    assert not any(name.startswith(("objective", "heads", "dynamics.initial")) for name in found["prediction"])
    assert found["collapse/sigreg"] == {"encoder", "dynamics.posterior_net"}
    assert found["inverse"] == {"encoder", "dynamics.posterior_net", "objective.inverse"}
    assert found["observation"] == {"objective.decoder"}
    assert found["prior/initial/error"] == {"dynamics.initial_prior"}
    assert found["reward"] == found["continue"] == {"heads"}


def test_the_observed_latent_is_trained_to_be_predictable():
    world = jepa_world()
    batch = known_batch()
    _, trace = losses(world, batch)
    frozen, alive = (world.dynamics.predict(trace, batch, z, Sampling())["error"].mean() for z in (trace.z.detach(), trace.z))
    weight = world.dynamics.posterior_net.straight.weight
    one, other = (torch.autograd.grad(x, weight, retain_graph=True)[0] for x in (frozen, alive))
    assert not torch.allclose(one, other)


@pytest.mark.parametrize("heads", ["full", "stop"])
@pytest.mark.parametrize("decoder_grad", ["full", "stop"])
def test_a_hybrids_decoder_and_heads_reach_what_their_options_say(heads, decoder_grad):
    world = jepa_world("hybrid", heads=heads, decoder_grad=decoder_grad)
    terms, _ = losses(world, known_batch())
    assert ("encoder" in parts_reached(world, terms["observation"].mean())) == (decoder_grad == "full")
    assert ("encoder" in parts_reached(world, terms["continue"].mean())) == (heads == "full")


def test_without_a_probe_nothing_is_decoded_and_decode_is_refused():
    world = jepa_world(probe=False)
    assert "observation" not in losses(world, known_batch())[0]
    with pytest.raises(ConfigError, match="no decoder"):
        world.decode(torch.zeros(1, world.feature_dim))


# An episode's first row -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("action", [TWO_ACTIONS, spaces.Box(-1, 1, (2,)), spaces.MultiBinary(3)], ids=["Discrete", "Box", "Bits"])
def test_nothing_is_predicted_across_an_episodes_border(action):
    batch = known_batch(action=action)
    terms, _ = losses(jepa_world(action=action), batch)
    first = batch.is_first
    assert not (terms["prediction"].value * terms["prediction"].mask)[first].any()
    assert not (terms["inverse"].value * terms["inverse"].mask)[first[:, 1:]].any()
    assert (terms["inverse"].value * terms["inverse"].mask)[~first[:, 1:]].all()


def test_an_episodes_first_row_is_not_in_the_fitted_deviation():
    batch = known_batch()
    world = jepa_world()
    trace = world.trace(batch.with_obs(world.preprocess(batch.obs)), None, Sampling(mode=True))
    far = 100 * batch.is_first.unsqueeze(-1)
    value = world.dynamics.predict(trace, batch, trace.z + far, Sampling())["error"].value
    assert world.dynamics.transition.variance.max() < 5 and not value[batch.is_first].any() and value[~batch.is_first].all()
    world.dynamics.predict(trace, batch, trace.z + 100, Sampling())
    assert world.dynamics.transition.variance.min() > 100


# Against collapse -------------------------------------------------------------------------------------------------------


def directions(size: int, count: int, g: torch.Generator) -> Tensor:
    x = torch.randn(size, count, generator=g)
    return x / x.norm(dim=0)


def test_the_statistic_has_its_known_mean_for_gaussian_latents_of_any_number_and_size():
    """E[T] is the integral of (1 - exp(-t^2)) exp(-t^2 / 2) over [-3, 3]: 1.052."""
    g = generator()
    for rows, size in ((128, 1), (256, 4), (512, 16)):
        draws = torch.cat([epps_pulley(torch.randn(rows, size, generator=g), directions(size, 4, g)) for _ in range(500)])
        assert abs(float(draws.mean()) - 1.052) < 0.12, (rows, size)  # neighbouring slices are not independent


def test_the_statistic_is_large_for_points_and_clusters():
    g = generator()
    ways = directions(4, 64, g)
    assert math.isclose(float(epps_pulley(torch.zeros(256, 4), ways).mean()), 102.92, rel_tol=1e-3)
    signs = torch.randint(0, 2, (256, 1), generator=g) * 2.0 - 1
    lumps = epps_pulley(signs + 0.1 * torch.randn(256, 1, generator=g), torch.ones(1, 1))
    even = epps_pulley((torch.rand(256, 1, generator=g) - 0.5) * math.sqrt(12), torch.ones(1, 1))
    small_ones = epps_pulley(0.5 * torch.randn(256, 4, generator=g), ways).mean()
    assert lumps > 10 and 2 < even < 8 and small_ones > 10


def test_vicreg_accepts_white_latents_and_no_small_or_equal_numbers():
    latents = torch.randn(4096, 3, generator=generator())
    assert variance(latents) < 0.02 and covariance(latents) < 0.01
    assert abs(float(variance(0.25 * latents)) - 0.75) < 0.02
    assert abs(float(covariance(latents[:, :1].expand(-1, 3))) - 2) < 0.2


def spread_after_training(**options) -> tuple[Tensor, Tensor]:
    """(eigenvalues of the latents' covariance, final prediction loss) after 60 updates on random walks."""
    world = jepa_world(probe=False, **options)
    scales = dict.fromkeys(ScaleConfig.model_fields, 1.0) | {"collapse": 50.0, "reward": 0.0, "cont": 0.0}
    learner = Learner(world, TrainConfig(lr=1e-2, eps=1e-8, clip=100.0, burn_in=0, warmup=0, ema_decay=0.0, scales=scales))
    g = generator()
    batch = known_batch(rows=32)
    walk = torch.randn(32, 6, 4, generator=g).cumsum(1)
    batch = learner.prepare(batch.with_obs({"obs": walk}))
    for _ in range(60):
        metrics, trace, _ = learner.update(batch, g)
    return torch.linalg.eigvalsh(torch.cov(trace.z.detach().flatten(0, 1).T)), metrics["loss/prediction"]


def test_latents_collapse_only_without_the_losses_against_it():
    alone, predicted = spread_after_training(anti_collapse="none", inverse=False)
    assert alone.max() < 0.1 and predicted < 0.02  # all latents are nearly one, which is easy to predict
    for anti in ("sigreg", "vicreg"):
        kept, _ = spread_after_training(anti_collapse=anti)
        assert kept.min() > 0.3, anti


# The target encoder ----------------------------------------------------------------------------------------------------


def test_the_target_encoder_is_an_average_and_its_latents_are_predicted():
    world = jepa_world(ema_decay=0.9)
    start = [p.clone() for p in world.objective.slow.parameters()]
    with torch.no_grad():
        for p in world.encoder.parameters():
            p += 1.0
    world.update_targets()
    terms, trace = losses(world, known_batch())
    moved = [after - before for before, after in zip(start, world.objective.slow.parameters(), strict=True)]
    count = len(list(world.encoder.parameters()))
    assert all(torch.allclose(x, torch.full_like(x, 0.1), atol=1e-5) for x in moved[:count])
    assert not any(x.any() for x in moved[count:])
    own = world.dynamics.predict(trace, known_batch(), trace.z, Sampling())
    assert not torch.allclose(terms["prediction"].value, own["error"].value)
    assert len(moved) == count + len(list(world.dynamics.posterior_net.parameters()))  # recurrence and priors have no copy
    assert not any(name.startswith("objective.slow") for name in parts_reached(world, terms["prediction"].mean()))
    assert torch.equal(moved[0] + start[0], next(world.objective.slow.parameters()))  # a loss alone does not update it


def test_a_skipped_update_does_not_move_the_target_encoder():
    learner = Learner(jepa_world(ema_decay=0.9), TrainConfig(burn_in=0, warmup=0))
    slow = [[p.clone() for p in learner.world.objective.slow.parameters()]]
    for spoil in (1.0, torch.nan):
        batch = learner.prepare(known_batch())
        learner.update(batch.with_obs({name: spoil * x for name, x in batch.obs.items()}), generator())
        slow.append([p.clone() for p in learner.world.objective.slow.parameters()])
    assert learner.skipped == 1
    assert not all(map(torch.equal, slow[0], slow[1])) and all(map(torch.equal, slow[1], slow[2]))


# Configs ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jepa", "hybrid"])
@pytest.mark.parametrize("dynamics", [{"latent": {"kind": "gaussian"}, "posterior": "observation"}, {"latent": {"kind": "point"}}])
def test_latents_that_are_no_points_and_filters_are_refused_with_what_to_set(kind, dynamics):
    with pytest.raises(ConfigError, match=r"latent\.kind=point.*posterior=observation"):
        ModelConfig.parse({"objective": {"kind": kind}, "dynamics": dynamics})


@pytest.mark.parametrize("model", ["jepa", "hybrid"])
def test_the_recipes_train_with_one_option_on_any_environment(model, tmp_path):
    options = {k: v for k, v in OPTIONS.items() if ".latent" not in k} | {"model": model, "model.dynamics.latent.size": 3}
    result = train(CHAIN, steps=30, run_dir=tmp_path / "run", overrides=options, device="cpu")
    assert result.real_steps == 30
    world = Run.open(tmp_path / "run").world_model()
    assert world.decode(torch.zeros(1, world.feature_dim))["obs"].shape == (1, 5)
