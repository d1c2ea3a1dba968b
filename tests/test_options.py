"""No default makes another option inert: under defaults each option of each part changes what is learned or drawn."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import zip_longest
from typing import Any, Literal, get_args, get_origin

import numpy as np
import pytest
import torch
from conftest import SIZES, TWO_ACTIONS, VECTOR, generator, known_batch
from gymnasium import spaces
from torch import Tensor

from worldmodel import registry
from worldmodel.data import Sampling
from worldmodel.errors import ConfigError, NumericsError
from worldmodel.learner import Learner, TrainConfig
from worldmodel.model import ModelConfig, WorldModel

PICTURE = spaces.Box(0, 255, (16, 16, 1), np.uint8)
BOTH = spaces.Dict({"eye": PICTURE, "arm": VECTOR})
SEEN = {"picture": PICTURE, "vector": VECTOR, "both": BOTH}
ROLES = ("encoder", "decoder", "latent", "dynamics", "distribution", "objective", "heads", "ensemble")
WIDTHS = ("units", "depth", "deter", "refine_depth", "refine_units")
"""Small here; all other options have their defaults."""

POINTS = {
    "dynamics": {"kind": "rssm", "posterior": "observation", "latent": {"kind": "point"}},
    "transition": {"kind": "gaussian"},
    "initial": {"kind": "gaussian"},
}
BESIDE: dict[tuple[str, str], dict[str, Any]] = {
    ("latent", "point"): {**POINTS, "objective": {"kind": "jepa"}},
    ("objective", "jepa"): POINTS,
    ("objective", "hybrid"): POINTS,
}
"""What a part needs beside it."""

BELONGS: dict[tuple[str, str], dict[str, Any]] = {
    ("decoder", "levels"): {"image": "logistic"},
    ("objective", "covariance"): {"anti_collapse": "vicreg"},
    **{("ensemble", name): {"members": 2} for name in ("units", "layers")},
    **{("energy", name): {"trainer": "pcd"} for name in ("buffer", "reinit")},
    **{("energy", name): {"trainer": "cd"} for name in ("max_gap", "max_displacement")},
    ("energy", "candidates"): {"sampler": "resampling"},
    **{("energy", name): {"sampler": "langevin"} for name in ("steps", "step", "clip")},
    ("rssm", "posterior_layers"): {"posterior": "observation"},
    ("rssm", "slow_every"): {"slow": 4},
    ("vamp", "renew"): {"pseudo_inputs": "exemplar"},
}
"""Options of one choice of another one, as their descriptions say, and that choice."""

KINDS = {"base": ["mixture"], "latent": ["gaussian"], "upper": ["mixture"], "lower": ["mixture"]}
"""Other kinds for options that hold a part."""

PICTURES = {("anchored", "code"), ("anchored", "posterior_layers")}
"""(kind, option) of dynamics that act on pictures alone."""

EYES = {"depth", "image", "levels", "min_sigma_image", "weight_sigma_image", "image_weight", "refine_depth", "frames"}
HANDS = {"units", "layers", "min_sigma", "refine_units"}
"""Options of decoders that are about pictures, and about vectors; all others act on each."""


def part(role: str, kind: str, options: dict[str, Any]) -> dict[str, Any]:
    config = registry.config_class(role, kind)
    return {"kind": kind, **{name: SIZES[name] for name in WIDTHS if name in config.model_fields}, **options}


def model(role: str, kind: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options of a whole model with one part as given."""
    whole = {name: part(name, "standard", {}) for name in ("encoder", "decoder", "heads")}
    whole |= {"dynamics": {"kind": "rssm"}, **BESIDE.get((role, kind), {})}
    own = part(role, kind, options)
    if role == "latent":
        whole["dynamics"] = {**whole["dynamics"], "latent": own}
    elif role == "distribution":
        whole["dynamics"] = {"kind": "rssm", "latent": {"kind": "categorical" if kind == "categorical" else "gaussian"}}
        whole |= dict.fromkeys(("transition", "initial", "marginal"), own)
    else:
        whole[role] = own
    for name in ("encoder", "dynamics"):
        whole[name] = part(name, whole[name]["kind"], whole[name])
    return whole


def built(role: str, kind: str, options: dict[str, Any], seen: str) -> WorldModel:
    """The model; a distribution fills the slots that take it, with a context and without."""
    whole = model(role, kind, options)
    if role == "distribution":
        every = {"transition": None, "initial": None, "marginal": None}
        alone = [slot for slot in every if fits(whole | {**every, slot: whole[slot]})]
        whole |= {**every, **{slot: whole[slot] for slot in [*alone[:1], *alone[-1:]]}}
        if not alone:
            raise ConfigError(f"{options} fit no slot")
    return WorldModel.from_spaces(SEEN[seen], TWO_ACTIONS, whole, seed=0)


def fits(whole: dict[str, Any]) -> bool:
    try:
        ModelConfig.parse(whole)
    except ConfigError:
        return False
    return True


def does(world: WorldModel, seen: str) -> Iterator[tuple[str, Tensor]]:
    """What a model learns, draws and measures in two updates, after its decoder's deviations have settled; or that it fails."""
    for name, x in world.state_dict().items():
        if name.rpartition(".")[2].startswith("log_std"):
            x.fill_(math.log(0.1))
    for name, moments in world.named_modules():
        if name.rpartition(".")[2].startswith("errors"):
            moments.count.fill_(1e6), moments.mean.fill_(0.01)
    learner, batch = Learner(world, TrainConfig()), known_batch(SEEN[seen], rows=2)
    batch = learner.prepare(replace(batch, row=torch.arange(batch.reward.numel()).view(batch.shape)))
    try:
        for step in range(2):
            metrics, trace, rows = learner.update(batch, generator(step))
            yield from ((f"{step} {name}", torch.tensor(x)) for name, x in metrics.items() if name.startswith("loss"))
        with torch.no_grad():
            dream = world.eval().imagine(trace.last, lambda f, t: torch.eye(2), 2, Sampling(generator=generator(3)))
            yield from ((name, getattr(dream, name)) for name in ("feature", "reward", "cont", "uncertainty"))
            if world.decoder is not None:
                yield from world.decoder.sample(dream.feature.flatten(0, 1), Sampling(generator=generator(4))).items()
            for slot, (prior, where) in world._priors(rows.is_first).items():
                if prior.density != "none":
                    yield slot, prior.log_prob(trace.z[where], trace.h[where] if slot == "transition" else None)
    except NumericsError:
        yield "fails", torch.ones(())


def shapes(world: WorldModel) -> dict[str, torch.Size]:
    return {name: x.shape for name, x in world.state_dict().items()}


@cache
def shapes_as_they_are(role: str, kind: str, options: tuple, seen: str) -> dict[str, torch.Size]:
    return shapes(built(role, kind, dict(options), seen))


@cache
def as_it_is(role: str, kind: str, options: tuple, seen: str) -> list[tuple[str, Tensor]]:
    return list(does(built(role, kind, dict(options), seen), seen))


def others(role: str, kind: str, name: str) -> list[list[Any]]:
    """Values of an option beside its default; of each list one must act."""
    field = registry.config_class(role, kind).model_fields[name]
    default = SIZES[name] if name in WIDTHS else field.get_default()
    if get_origin(field.annotation) is Literal:
        return [[choice] for choice in get_args(field.annotation) if choice != default]
    if isinstance(default, bool):
        return [[not default]]
    if isinstance(default, int):
        return [[default + 1, default + 2, 2 * default, default // 2, default // 8, 1]]
    if isinstance(default, float):
        return [[default / 2, default * 2, default / 1e6, default * 10, default * 500, 0.5, -default]]
    return [[{"kind": other}] for other in KINDS.get(name, [])]


def acts(role: str, kind: str, name: str, value: Any, beside: dict[str, Any], seen: str) -> bool:
    try:
        world = built(role, kind, {**beside, name: value}, seen)
    except (ConfigError, ValueError):  # no value of this option
        return False
    plain = role, kind, tuple(beside.items()), seen
    if shapes(world) != shapes_as_they_are(*plain):
        return True
    both = zip_longest(as_it_is(*plain), does(world, seen), fillvalue=("", torch.zeros(())))
    return any(one != other or not torch.equal(x, y) for (one, x), (other, y) in both)


@pytest.mark.parametrize(("role", "kind"), [(role, kind) for role in ROLES for kind in registry.kinds(role)])
def test_each_option_of_a_part_changes_what_is_learned_or_drawn_under_defaults(role, kind):
    inert, own = [], registry.part(role, kind)
    parents = [other for other in registry.kinds(role) if other != kind and issubclass(own, registry.part(role, other))]
    inherited = {name for other in parents for name in registry.config_class(role, other).model_fields} - {"sigma", "image"}
    for name in registry.config_class(role, kind).model_fields.keys() - inherited:  # those are tried where they come from
        beside = BELONGS.get((role, name), BELONGS.get((kind, name), {}))
        seen = ["picture"] if kind == "diamond" else ["both" if role == "encoder" else "vector"]
        if (kind, name) in PICTURES:
            seen = ["both"]
        if role == "decoder":
            seen = [one for one, not_its in (("picture", HANDS), ("vector", EYES)) if name not in not_its]
        for one in seen:
            for values in others(role, kind, name) if name != "kind" else []:
                if not any(acts(role, kind, name, value, beside, one) for value in values):
                    inert.append(f"{name}={values} ({one})")
    assert not inert, f"{role} {kind}: whatever these are changes nothing: {inert}"
