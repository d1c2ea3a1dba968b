"""VampPrior: what only it promises, for pseudo-inputs of every kind."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from conftest import SmallEyes, generator, known_batch, reached, small, small_latent, small_source, small_world

from worldmodel import registry
from worldmodel.distributions import VampPrior
from worldmodel.errors import ConfigError
from worldmodel.learner import Learner, TrainConfig
from worldmodel.model import ModelConfig

KINDS = ("observation", "feature", "exemplar")
every_kind = pytest.mark.parametrize("kind", KINDS)


def prior(kind: str = "observation", context: int = 0, h: int = 0, seed: int = 0, **options) -> VampPrior:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        latent = small_latent("gaussian")
        config = small("distribution", "vamp", pseudo_inputs=kind, **options)
        return registry.build("distribution", config, latent, context, small_source(latent, h))


def eyes(form: VampPrior) -> SmallEyes:
    return form.source.posterior.__self__


def observations(n: int, seed: int = 0) -> dict[str, torch.Tensor]:
    return {name: torch.rand(n, *shape, generator=generator(seed)) for name, shape in SmallEyes.SHAPES.items()}


def rows(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers)


@every_kind
def test_a_component_is_the_posterior_at_a_pseudo_input(kind):
    form = prior(kind)
    mix, posterior = form.given(None), form.source.posterior(form.embeddings(), torch.zeros(5, 0))
    torch.testing.assert_close(mix.distributions.mean, posterior.mean)
    x = torch.randn(7, 2, generator=generator())
    each = torch.stack([posterior.index(slice(k, k + 1)).log_prob(x) for k in range(5)])
    torch.testing.assert_close(form.log_prob(x, None), torch.logsumexp(each, 0) - math.log(5))


def test_pseudo_images_stay_between_black_and_white():
    form, seen = prior("observation"), {}
    form.input1.data.mul_(100)
    encode = eyes(form).encode
    watched = replace(form.source.encoder, encode=lambda obs: seen.update(obs) or encode(obs))
    form.source = replace(form.source, encoder=watched)
    form.embeddings()
    assert 0 <= seen["image"].min() < 0.01 and 0.99 < seen["image"].max() <= 1 and seen["vector"].abs().max() > 1


@every_kind
@pytest.mark.parametrize("where", [{}, {"h": 3}, {"context": 3, "h": 3}, {"context": 3}], ids=str)
def test_the_rate_trains_pseudo_inputs_and_encoder_and_a_frozen_one_neither(kind, where):
    form = prior(kind, **where)
    context = torch.randn(4, 3, generator=generator()) if where.get("context") else None
    posterior = form.latent.distribution(torch.randn(4, 4, generator=generator(1)))
    z = posterior.mean.clone()
    inputs = {f"own {n}": p for n, p in form.named_parameters()} | {f"eyes {n}": p for n, p in eyes(form).named_parameters()}
    if kind == "feature":
        inputs = {n: p for n, p in inputs.items() if not n.startswith("eyes see")}
    assert reached(form.rate(posterior, z, context), **inputs) == set(inputs)
    assert reached(form.rates(posterior, z, context)[0], **inputs) == set(inputs)
    assert not reached(form.rate(posterior, z, context, frozen=True), **inputs)
    assert not reached(form.rates(posterior, z, context)[1], **inputs)
    own = {name for name, _ in form.named_parameters()}
    pseudo = {"observation": {"input0", "input1"}, "feature": {"embed"}, "exemplar": set()}[kind]
    assert pseudo <= own and ("h" in own) == (where == {"h": 3} and kind != "exemplar")


def test_the_weights_are_equal_learned_or_given_by_the_context():
    assert torch.allclose(prior().given(None).log_weights.exp(), torch.tensor(0.2))
    free = prior(weights="learned")
    free.logits.data[0, 2] = 50
    assert float(free.given(None).log_weights.detach().exp()[0, 2]) == pytest.approx(1)
    far = prior(context=3).given(torch.tensor([[-9.0] * 3, [9.0] * 3])).log_weights
    assert (far[0] - far[1]).abs().max() > 0.1


# Exemplars -------------------------------------------------------------------------------------------------------------


def test_an_exemplar_is_left_out_of_the_prior_of_its_own_row_and_of_no_other():
    form = prior("exemplar")
    form.replace_exemplars(observations(5), torch.zeros(5, 0), rows(10, 11, 12, 13, 14))
    posterior = eyes(form).posterior(eyes(form).encode(observations(5)), torch.zeros(5, 0))
    z = posterior.mean.detach()
    order = form.row.argsort()
    held_out = []
    for i in range(5):
        others = [int(k) for k in order if form.row[k] != 10 + i]
        parts = torch.stack([form.given(None).distributions.index(k).log_prob(z[i]) for k in others])
        held_out.append(posterior.index(i).log_prob(z[i]) - (torch.logsumexp(parts, 0) - math.log(4)))
    torch.testing.assert_close(form.rate(posterior, z, None, rows=rows(10, 11, 12, 13, 14)), torch.stack(held_out))
    unseen = form.rate(posterior, z, None, rows=rows(90, 91, 92, 93, 94))
    torch.testing.assert_close(unseen, form.rate(posterior, z, None))
    assert not torch.allclose(unseen, torch.stack(held_out))


def test_exemplars_start_with_their_rows_and_recurrent_states_and_are_left_out_of_their_own_priors():
    form, given = prior("exemplar", h=3), observations(7)
    h = torch.randn(7, 3, generator=generator())
    form.init_pseudo_inputs(given, h, torch.arange(20, 27))
    assert form.row.tolist() == [20, 21, 22, 23, 24] and torch.equal(form.h, h[:5])
    weights = form.given(None, rows(22, 99)).log_weights.exp()
    torch.testing.assert_close(weights[0], torch.tensor([0.25, 0.25, 0.0, 0.25, 0.25]))
    form.init_pseudo_inputs(given)
    assert (form.row == -1).all()


def test_the_oldest_exemplars_make_room_and_no_row_is_held_twice():
    form = prior("exemplar", renew=2)
    for start in range(0, 8, 2):
        form.replace_exemplars(observations(4, start), torch.zeros(4, 0), rows(start, start + 1, start, start + 1))
    assert sorted(form.row.tolist()) == [3, 4, 5, 6, 7]
    before = form.row.clone()
    form.replace_exemplars(observations(3), torch.zeros(3, 0), rows(3, 4, 5))
    assert torch.equal(before, form.row)
    assert torch.equal(form.input0[form.row == 6][0], observations(4, 6)["vector"][0])


def test_an_observation_that_is_not_finite_is_no_exemplar():
    form, seen = prior("exemplar"), observations(3)
    seen["vector"][1, 0] = torch.nan
    form.replace_exemplars(seen, torch.zeros(3, 0), rows(1, 2, 3))
    assert set(form.row.tolist()) == {-1, 1, 3} and form.input0.isfinite().all()


def test_exemplars_are_saved_with_the_weights():
    form, fresh = prior("exemplar"), prior("exemplar", seed=1)
    form.replace_exemplars(observations(5), torch.zeros(5, 0), rows(1, 2, 3, 4, 5))
    fresh.load_state_dict(form.state_dict())
    x = torch.randn(3, 2, generator=generator())
    assert torch.equal(form.log_prob(x, None), fresh.log_prob(x, None)) and torch.equal(form.row, fresh.row)


@pytest.mark.parametrize("slot", ["initial", "transition", "marginal"])
def test_training_shows_each_slot_the_rows_that_it_is_a_prior_of_and_eval_shows_none(slot):
    config = small("distribution", "vamp", pseudo_inputs="exemplar", renew=5, weights="equal")
    world = small_world(latent="gaussian", **{slot: config})
    prior = world.marginal if slot == "marginal" else getattr(world.dynamics, "initial_prior" if slot == "initial" else slot)
    batch = known_batch()
    batch = batch.with_obs(world.preprocess(batch.obs))
    numbered = replace(batch, row=torch.arange(18).view(3, 6))
    world.eval().trace(numbered)
    assert (prior.row == -1).all()
    world.train().trace(batch)  # rows that no store numbers
    assert (prior.row == -1).all()
    world.trace(numbered)
    held = set(prior.row.tolist()) - {-1}
    first = set(numbered.row[numbered.is_first].tolist())
    assert held and (held <= first if slot == "initial" else not held & first if slot == "transition" else True)
    at = int((prior.row >= 0).nonzero()[0])
    key = next(iter(numbered.obs))
    assert torch.equal(prior.input0[at], numbered.obs[key].flatten(0, 1)[prior.row[at]])


@every_kind
@pytest.mark.parametrize("posterior", ["filtering", "observation"])
def test_a_model_learns_with_a_vamp_prior_in_every_slot(kind, posterior):
    config = small("distribution", "vamp", pseudo_inputs=kind, renew=2)
    world = small_world(latent="gaussian", dynamics={"posterior": posterior}, transition=config, initial=config, marginal=config)
    learner = Learner(world, TrainConfig(burn_in=0, warmup=0, ema_decay=0.9))
    measured = []
    for seed in range(3):
        batch = replace(known_batch(seed=seed), row=torch.arange(18).view(3, 6) + 18 * seed)
        metrics, _, _ = learner.update(learner.prepare(batch), generator(seed))
        measured.append({name for name in metrics if name.startswith("prior/")})
    reported = {f"prior/{slot}/{name}" for slot in ("initial", "transition", "marginal") for name in ("used", "spread")}
    assert learner.updates == 3 and measured == [reported, set(), set()]  # the priors are measured now and then
    assert all(torch.equal(a, b) for a, b in zip(world.buffers(), learner.ema.buffers()))


# Its place in a model ---------------------------------------------------------------------------------------------------


def test_a_copied_world_asks_its_own_encoder():
    world = small_world(latent="gaussian", marginal=small("distribution", "vamp"))
    twin = copy.deepcopy(world)
    with torch.no_grad():
        for p in twin.encoder.parameters():
            p.zero_()
    assert not torch.equal(world.marginal.embeddings(), twin.marginal.embeddings())
    assert not any(name.startswith("marginal.source") for name, _ in world.named_parameters())


def test_pseudo_inputs_that_are_all_alike_have_no_spread():
    form = prior("feature")
    assert form.measures(torch.zeros(4, 2), None)["spread"] > 0.1
    form.embed.data[:] = form.embed.data[:1].clone()
    assert form.measures(torch.zeros(4, 2), None)["spread"] == pytest.approx(0, abs=1e-5)


def test_without_an_encoder_the_error_says_what_to_take_instead():
    with pytest.raises(ConfigError, match=r"given none.*'mixture'"):
        registry.build("distribution", small("distribution", "vamp"), small_latent("gaussian"), 0)


def test_a_recurrent_state_that_the_context_cannot_replace_is_refused():
    with pytest.raises(ConfigError, match=r"dynamics\.posterior=observation"):
        prior(context=3, h=5)


def test_latents_without_posteriors_are_refused_when_the_config_is_read():
    with pytest.raises(ConfigError, match=r"model\.dynamics\.latent\.kind=point"):
        ModelConfig.parse({"dynamics": {"latent": {"kind": "point"}}, "marginal": {"kind": "vamp"}})


def test_components_are_seen_through_the_encoder_in_use_after_it_was_exchanged():
    world = small_world(latent="gaussian", marginal=small("distribution", "vamp"))
    other = copy.deepcopy(world.encoder)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.5)
    for model in (copy.deepcopy(world), world):
        before, alone = model.marginal.embeddings(), world.marginal.embeddings()
        model.encoder = other
        assert not torch.allclose(model.marginal.embeddings(), before)
        if model is not world:  # a copy has its own encoder, and the other model's stays what it was
            torch.testing.assert_close(world.marginal.embeddings(), alone)
