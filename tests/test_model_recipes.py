"""Every recipe of configs/model says something: in the place of its form, a Gaussian's would give other losses."""

from __future__ import annotations

import importlib.resources

import pytest
import torch
from conftest import TWO_ACTIONS, VECTOR, generator, known_batch

from worldmodel.config import Config
from worldmodel.data import Loss, Sampling
from worldmodel.model import WorldModel

RECIPES = sorted(file.name.removesuffix(".yaml") for file in (importlib.resources.files("worldmodel.configs") / "model").iterdir())
PLAIN = {"kind": "gaussian"}
FORMS = {
    "vae": [("marginal", None)],
    "vamp": [("marginal", PLAIN)],
    "world_models_2018": [("transition", PLAIN), ("marginal", None), ("dynamics.kind", "rssm")],
    "diffusion_decoder": [("decoder", {"kind": "standard"})],
    "latent_diffusion_decoder": [("decoder", {"kind": "standard"})],
    "jepa": [("objective", {"kind": "reconstruction"}), ("transition.std", "learned")],
    "hybrid": [("objective", {"kind": "reconstruction"}), ("transition.std", "learned")],
    "transformer": [("dynamics.kind", "rssm")],
    "dreamer": [("dynamics.latent", {"kind": "gaussian", "size": 8})],
    "gaussian": [("dynamics.latent", {"kind": "categorical"})],
    "anchored": [("transition", PLAIN)],
    "diamond": [],
}
"""What makes a recipe, and what would stand there otherwise; those that are not named have their form in both slots of the code.
diamond has no codes in which a Gaussian could stand, and needs pictures: see test_diamond.py."""


def swaps(recipe: str) -> list[tuple[str, object]]:
    return FORMS.get(recipe, [("transition", PLAIN), ("initial", PLAIN)])


def losses(recipe: str, key: str | None = None, value: object = None) -> dict[str, Loss]:
    """The losses of a fresh model on a known batch, with one part exchanged; whatever else is alike has the same weights."""
    model = Config.from_recipe("cartpole", [f"model={recipe}", "size=nano"]).model
    world = WorldModel.from_spaces(VECTOR, TWO_ACTIONS, model, seed=0)
    if key is not None:
        part, _, option = key.partition(".")
        changed = {part: {**getattr(model, part).model_dump(), option: value} if option else value}
        if key == "dynamics.kind":
            known = {name: x for name, x in changed[part].items() if name in ("deter", "units", "latent", "free_nats")}
            changed = {part: {**known, "kind": value, "posterior": "observation"}}
        if key == "dynamics.latent":
            changed |= {"transition": None, "initial": None}
        data = {**model.model_dump(), **changed}
        other = WorldModel.from_spaces(VECTOR, TWO_ACTIONS, data, seed=0)
        weights = other.state_dict()
        own = {name: x for name, x in world.state_dict().items() if name in weights and weights[name].shape == x.shape}
        other.load_state_dict({**weights, **own})
        world = other
    batch = known_batch()
    batch = batch.with_obs(world.preprocess(batch.obs))
    sampling = Sampling(generator=generator())
    return world.loss(world.trace(batch, None, sampling), batch, sampling)


def same(one: dict[str, Loss], other: dict[str, Loss]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name].mean(), other[name].mean()) for name in one)


@pytest.mark.parametrize(("recipe", "key", "value"), [(r, *swap) for r in RECIPES for swap in swaps(r)])
def test_another_form_in_the_place_of_a_recipes_own_changes_a_loss(recipe, key, value):
    own = losses(recipe)
    assert same(own, losses(recipe)), "the same model has the same losses"
    assert not same(own, losses(recipe, key, value))
