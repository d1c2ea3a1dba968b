"""What is said to reach only itself: no other weight differs by a bit, whatever the size of a loss, and whether it is there.

All of it with pictures, whose gradients are far longer than those of vectors, and with a clip that every update exceeds.
"""

from __future__ import annotations

import copy
import importlib.resources
from typing import Any

import pytest
import torch
from conftest import IMAGE, TWO_ACTIONS, generator, known_batch, reached

from worldmodel import registry
from worldmodel.config import Config
from worldmodel.data import Sampling
from worldmodel.learner import Learner, ScaleConfig, TrainConfig
from worldmodel.model import WorldModel

RECIPES = sorted(file.name.removesuffix(".yaml") for file in (importlib.resources.files("worldmodel.configs") / "model").iterdir())
CLIP = 0.1
SMALL = {"size": "nano", "model.encoder.depth": 4, "model.decoder.depth": 4, "train.ema_decay": 0.0, "train.burn_in": 0}
PICTURES = {"model.dynamics.depth": 4, "model.dynamics.past": 2, "model.dynamics.frames": 4}


def recipe(name: str, **options: Any) -> Config:
    """A recipe of configs/model for pictures of 16 x 16, at a size for tests; names in `options` have __ for a dot."""
    given = {**SMALL, **(PICTURES if name == "diamond" else {}), **{k.replace("__", "."): v for k, v in options.items()}}
    return Config.from_recipe("catch", {"model": name, **given})


def build(config: Config, like: WorldModel | None = None) -> WorldModel:
    """The world model of a config; what it has in common with another one has that one's weights."""
    world = WorldModel.from_spaces(IMAGE, TWO_ACTIONS, config.model, seed=0)
    for p in world.parameters():
        if not p.any():  # what begins at zero would hide where gradients go
            torch.nn.init.normal_(p, std=0.02, generator=generator(7))
    if like is not None:
        weights, own = like.state_dict(), world.state_dict()
        common = {name: weights[name] for name, x in own.items() if name in weights and weights[name].shape == x.shape}
        world.load_state_dict(own | common)
    return world


def after(world: WorldModel, scales: dict[str, float], updates: int = 2) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """(weights and buffers after some updates, what the shared generator would draw next); each gradient is far over the clip."""
    learner, shared = Learner(world, TrainConfig(clip=CLIP, scales=scales, reuse_memory=False)), generator()
    for seed in range(updates):
        metrics, *_ = learner.update(learner.prepare(known_batch(IMAGE, seed=seed)), shared)
        assert metrics["gradient_norm"] > 10 * CLIP
    return content(world), torch.rand(3, generator=shared)


def content(world: WorldModel) -> dict[str, torch.Tensor]:
    """Parameters and buffers, each under one name."""
    return {name: x.detach().clone() for name, x in (*world.named_parameters(), *world.named_buffers())}


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> set[str]:
    """Names in both whose values are not the same bits."""
    return {name for name in one.keys() & other.keys() if not torch.equal(one[name], other[name])}


# The size of a loss ----------------------------------------------------------------------------------------------------

ONES = dict.fromkeys(ScaleConfig.model_fields, 1.0)
STOPPED: list[tuple[str, dict[str, Any]]] = [
    ("dreamer", {"model__heads__gradient": "stop", "model__ensemble__members": 2}),
    ("hybrid", {"model__objective__decoder_grad": "stop"}),
    ("gaussian", {"model__decoder__kind": "latent_diffusion", "model__decoder__gradient": "stop"}),
    ("diffusion_decoder", {"model__decoder__gradient": "stop", "model__marginal__kind": "energy"}),
    ("gaussian", {"model__marginal__kind": "diffusion", "model__initial__kind": "energy"}),
]
"""Models in which options cut gradients off, beside the recipes."""


def cut_options() -> set[tuple[str, str, str]]:
    """(role, kind, option) of every registered option that cuts gradients off."""
    parts = [(role, kind) for role in ("decoder", "heads", "objective", "dynamics", "ensemble") for kind in registry.kinds(role)]
    fields = {part: registry.config_class(*part).model_fields for part in parts}
    return {(*part, name) for part in parts for name, field in fields[part].items() if "'stop'" in str(field.annotation)}


def test_every_option_that_cuts_gradients_off_is_tried_here():
    tried = set()
    for name, options in STOPPED:
        model = recipe(name, **options).model
        for role in ("decoder", "heads", "objective"):
            part = getattr(model, role)
            tried |= {(role, part.kind, option) for option, value in part.model_dump().items() if value == "stop"}
    assert cut_options() <= tried and cut_options()


@pytest.mark.parametrize(("name", "options"), [*((name, {}) for name in RECIPES), *STOPPED], ids=str)
def test_a_loss_a_million_times_as_large_moves_nothing_that_its_gradient_does_not_reach(name, options):
    world = build(recipe(name, **options)).train()
    batch = Learner(world, TrainConfig()).prepare(known_batch(IMAGE))
    sampling = Sampling(generator=generator())
    looked_at = copy.deepcopy(world)
    losses = looked_at.loss(looked_at.trace(batch, None, sampling), batch, sampling)
    reach: dict[str, set[str]] = {}
    for loss, term in losses.items():
        scale = "cont" if loss == "continue" else loss.partition("/")[0]
        reach[scale] = reach.get(scale, set()) | reached(term.mean(), **dict(looked_at.named_parameters()))
    plain, _ = after(copy.deepcopy(world), ONES, updates=1)
    apart = {scale: own for scale, own in reach.items() if own < set().union(*reach.values())}
    assert {"reward", "cont"} <= set(apart)
    for scale, own in apart.items():
        loud, _ = after(copy.deepcopy(world), ONES | {scale: 1e6}, updates=1)
        assert differing(plain, loud) <= own, scale


# Whether a part is there -----------------------------------------------------------------------------------------------

PROBED, ENERGY = {"model__objective__probe": False}, {"model__marginal__kind": "energy"}
REMOVED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "a probe": ("jepa", {}, PROBED),
    "a probe that draws": ("jepa", {"model__decoder__kind": "diffusion"}, PROBED),
    "an ensemble": ("gaussian", {"model__ensemble__members": 2}, {}),
    "a refiner": ("gaussian", {**ENERGY, "model__decoder__kind": "diffusion"}, ENERGY),
}
"""What is taken away, from which recipe, and the options with it and without it."""
DISTRIBUTIONS = {kind: registry.part("distribution", kind) for kind in registry.kinds("distribution")}
for kind in (kind for kind, part in DISTRIBUTIONS.items() if "gaussian" in part.latent_kinds):
    if "marginal" in DISTRIBUTIONS[kind].slots:
        REMOVED[f"a weightless marginal {kind}"] = ("gaussian", {"model__marginal__kind": kind}, {})
    if "initial" in DISTRIBUTIONS[kind].slots and not DISTRIBUTIONS[kind].of_posteriors:
        REMOVED[f"an initial {kind} of points"] = ("jepa", {"model__initial__kind": kind}, {"model__initial__kind": "gaussian"})


@pytest.mark.parametrize("what", REMOVED)
def test_what_reaches_only_itself_leaves_all_else_and_the_shared_draws_as_they_are_without_it(what):
    name, options, others = REMOVED[what]
    without = build(recipe(name, **others))
    with_it = build(recipe(name, **options), like=without)
    scales = ONES | {"marginal": float("weightless" not in what)}
    (there, drawn), (gone, as_drawn) = (after(world, scales) for world in (with_it, without))
    changed = {x for x in differing(there, gone) if not ("initial" in what and x.startswith("dynamics.initial_prior"))}
    assert there.keys() & gone.keys() and not changed
    assert torch.equal(drawn, as_drawn)
