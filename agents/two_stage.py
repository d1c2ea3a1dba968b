"""Two-stage priors: another form is fitted to the codes of a finished run, whose encoder and decoder stay as they are.

Source: Ghosh et al. 2020 (RAE), section 4: a density fitted after the fact; Aneja et al. 2021 (NCP-VAE) for an energy.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from worldmodel import registry
from worldmodel.config import Config
from worldmodel.data import Sampling
from worldmodel.distributions import ConditionalDistribution, Gaussian, GaussianConfig, likelihood
from worldmodel.errors import ConfigError
from worldmodel.model import WorldModel
from worldmodel.spaces import ActionSpec, ObsSpec
from worldmodel.storage import checkpoint
from worldmodel.storage.replay import Replay
from worldmodel.storage.run import Run
from worldmodel.storage.weights import as_arrays, cpu_randomness, load_arrays

SLOTS = ("initial", "transition", "marginal")
CHUNK = 256
"""Rows that the filter sees at once."""
SAMPLES_PER_FIRST_ROW = 16
"""Draws of each belief where an episode gives one row only."""
HELD_OUT_SHARE = 0.2
"""Share of the episodes that no form is fitted to."""


@dataclass(frozen=True)
class LatentSamples:
    """Draws of the beliefs at R rows of experience.

    code     [R Z]
    carry    [R D]  before the row was seen: the transition's context
    first    [R]    the row opens an episode
    episode  [R]    the number of the row's episode
    row      [R]    the row's number in the store
    again    [R]    one more draw of a row that is here already
    """

    z: Float[Tensor, "R Z"]
    h: Float[Tensor, "R D"]
    first: Bool[Tensor, " R"]
    episode: Int[Tensor, " R"]
    row: Int[Tensor, " R"]
    repeated: Bool[Tensor, " R"]

    def index(self, rows: Tensor) -> LatentSamples:
        return LatentSamples(**{x.name: getattr(self, x.name)[rows] for x in fields(self)})


@torch.no_grad()
def posterior_samples(world: WorldModel, replay: Replay, generator: torch.Generator) -> LatentSamples:
    """Every row's code as the filter drew it; rows whose episode's beginning is no longer held are left out.

    A row that opens an episode comes DRAWS times, with as many draws of its belief; all but one are marked as `again`.
    """
    found, episodes = [], 0
    for number in range(replay.num_envs):
        if not replay.lengths[number]:
            continue
        rows, state = replay.stream(number), None
        episode = rows.is_first[0].cumsum(0) + episodes
        for start in range(0, len(episode), CHUNK):
            part = rows.window(start, min(start + CHUNK, len(episode))).to(world.device)
            trace = world.trace(part.with_obs(world.preprocess(part.obs)), state, Sampling(generator=generator))
            state = trace.last
            first = part.is_first[0]
            numbers = episode[start : start + CHUNK].to(first.device), part.row[0]
            own = LatentSamples(trace.z[0], trace.h[0], first, *numbers, torch.zeros_like(first))
            known_start = own.index(own.episode > episodes)
            opening = own.index(first)
            for _ in range(SAMPLES_PER_FIRST_ROW - 1 if len(opening.z) else 0):
                posterior = trace.posterior.index(part.is_first)
                shape, device = opening.z.shape[:1], opening.z.device
                drawn = world.dynamics.latent.draw(posterior, Sampling(generator=generator), shape, device)
                found.append(replace(opening, z=drawn, repeated=torch.ones_like(opening.repeated)))
            found.append(known_start)
        episodes = int(episode[-1])
    return LatentSamples(**{x.name: torch.cat([getattr(part, x.name) for part in found]) for x in fields(LatentSamples)})


@dataclass(frozen=True)
class Scores:
    """nats [R] of a law at held-out codes, None where it has no density; `effective`: share of the draws that count in ln Z."""

    nats: Float[Tensor, " R"] | None
    effective: float | None


@torch.no_grad()
def scores(
    prior: ConditionalDistribution, latents: Float[Tensor, "R Z"], context: Tensor | None, generator: torch.Generator
) -> Scores:
    """Normalised log-likelihoods; ln Z of an unnormalised law is estimated, by annealing where weighted draws are too few."""
    if prior.density == "none":
        return Scores(None, None)
    parts, effective, sampling, log_z = [], [], Sampling(generator=generator), None
    if prior.density == "unnormalised" and context is None:
        draws = 10_000
        log_z, size = prior.log_z(None, draws, sampling)
        if float(size) < draws / 10:
            draws = 1000
            log_z, size = prior.log_z(None, draws, sampling, ais=True)
        effective = [size / draws]
    for start in range(0, len(latents), 1024):
        rows = slice(start, start + 1024)
        given = None if context is None else context[rows]
        if prior.density == "unnormalised" and given is not None:
            log_z, size = prior.log_z(given, 200, sampling)
            effective.append(size / 200)
        parts.append(likelihood(prior, latents[rows], given, log_z))
    return Scores(torch.cat(parts), float(torch.cat(effective).mean()) if effective else None)


def clustered_mean(gain: Float[Tensor, " R"], episode: Int[Tensor, " R"]) -> tuple[float, float | None]:
    """(mean over rows, its standard error over episodes: the rows of one are no independent draws; None for one episode)."""
    _, which = episode.unique(return_inverse=True)
    count = torch.zeros(int(which.max()) + 1, dtype=gain.dtype, device=gain.device).index_add(0, which, torch.ones_like(gain))
    total, mean = torch.zeros_like(count).index_add(0, which, gain), gain.mean()
    n = len(count)
    if n < 2:
        return float(mean), None
    error = (total - mean * count).square().sum() * n / (n - 1)
    return float(mean), float(error.sqrt() / count.sum())


def prior_of(world: WorldModel, slot: str) -> ConditionalDistribution | None:
    """The law in a slot; None where there is none."""
    return {"initial": world.dynamics.initial_prior, "transition": world.dynamics.transition, "marginal": world.marginal}[slot]


def fit(
    run: Run,
    target: Path,
    kind: str,
    slot: str,
    where: str,
    options: Mapping[str, Any] | Sequence[str],
    *,
    steps: int,
    lr: float,
    device: str,
    trust: bool,
    log: Callable[[str], object],
) -> dict[str, Any]:
    """What `worldmodel.fit_prior` does and returns."""
    config = _with_prior(run.config, kind, slot, options)
    tensors, state, manifest = run.read()
    specs = ObsSpec.from_json(state["observation"]), ActionSpec.from_json(state["action"])
    old = WorldModel.from_arrays(run.config.model, *specs, tensors["world"]).to(device).eval()
    new, prefix = _with_fresh_prior(config, specs, tensors["world"], slot, state["seed"])
    new = new.to(device).eval()
    generator = torch.Generator(old.device).manual_seed(state["seed"])
    replay = run.replay()
    train, held_out = _split(_rows_for_slot(posterior_samples(old, replay, generator), slot, where), generator)
    log(f"{len(train.z)} codes of {len(train.episode.unique())} episodes; {len(held_out.episode.unique())} episodes held out.")
    started = time.perf_counter()
    given = (lambda latents: latents.h) if slot == "transition" else (lambda latents: None)
    _init_pseudo_inputs(prior_of(new, slot), old, replay, train, generator)
    prior_of(new, slot).fit(train.z, given(train), steps=steps, lr=lr, generator=generator)
    if slot == "marginal" and prior_of(new, slot).density != "none":
        new.fit_typicality(train.z)
    seconds = time.perf_counter() - started
    before = prior_of(old, slot) or Gaussian(GaussianConfig(standard=True), old.dynamics.latent.family, 0).to(device)
    scores_before, scores_after = (scores(prior, held_out.z, given(held_out), generator) for prior in (before, prior_of(new, slot)))
    comparable = scores_before.nats is not None and scores_after.nats is not None
    gain, error = clustered_mean(scores_after.nats - scores_before.nats, held_out.episode) if comparable else (None, None)
    _write(target, config, (tensors, state, manifest), old, new, prefix, replay, trust)
    return {
        "run": str(run.path),
        "out": str(target),
        "slot": slot,
        "kind": kind,
        "density": prior_of(new, slot).density,
        "before": None if prior_of(old, slot) is None else _kind(run.config, slot),
        "nats_before": None if scores_before.nats is None else float(scores_before.nats.mean()),
        "nats": None if scores_after.nats is None else float(scores_after.nats.mean()),
        "gain": gain,
        "standard_error": error,
        "effective": scores_after.effective,
        "codes": len(train.z),
        "held_out_codes": len(held_out.z),
        "held_out_episodes": len(held_out.episode.unique()),
        "steps": steps,
        "seconds": seconds,
    }


def check(kind: str | None, slot: str, where: str, steps: int) -> None:
    if kind is None:
        raise ConfigError(
            f"Which form shall be fitted? Say --kind (kind=...), one of: {', '.join(registry.kinds('distribution'))}."
        )
    if slot not in SLOTS:
        raise ConfigError(f"slot is '{slot}'; expected one of {', '.join(SLOTS)}.")
    if where not in ("start", "anywhere"):
        raise ConfigError(f"where is '{where}'; expected 'start' or 'anywhere'.")
    if where == "anywhere" and slot != "initial":
        raise ConfigError(f"where=anywhere concerns the initial slot only; {slot} reads all rows that it is a law of anyway.")
    if steps < 1:
        raise ConfigError(f"steps is {steps}; expected at least 1.")


def _kind(config: Config, slot: str) -> str:
    chosen = getattr(config.model, slot)
    return config.model.dynamics.latent.kind if chosen is None else chosen.kind


def _with_prior(config: Config, kind: str, slot: str, options: Mapping[str, Any] | Sequence[str]) -> Config:
    """The run's config with nothing but this form in the slot."""
    emptied = config.override({f"model.{slot}": None})
    if isinstance(options, Mapping):
        return emptied.override({f"model.{slot}.kind": kind, **{f"model.{slot}.{name}": x for name, x in options.items()}})
    return emptied.override([f"model.{slot}.kind={kind}", *(f"model.{slot}.{text}" for text in options)])


def _with_fresh_prior(
    config: Config, specs: tuple, arrays: Mapping[str, np.ndarray], slot: str, seed: int
) -> tuple[WorldModel, str]:
    """(the model with a fresh law in the slot and all else as saved, what that law's weights begin with)."""
    with cpu_randomness(seed):
        world = WorldModel(config.model, *specs)
    prior = prior_of(world, slot)
    prefix = next(name for name, module in world.named_modules() if module is prior) + "."
    saved = {
        name: x
        for name, x in arrays.items()
        if not name.startswith(prefix) and (slot != "marginal" or not name.startswith("marginal_"))
    }
    load_arrays(world, as_arrays(world) | saved)
    return world, prefix


def _rows_for_slot(latents: LatentSamples, slot: str, where: str) -> LatentSamples:
    """The rows that the slot's law speaks of, each once; where only episodes' first rows count, with all their draws."""
    if slot == "transition":
        return latents.index(~latents.first)
    return latents.index(latents.first if slot == "initial" and where == "start" else ~latents.repeated)


def _init_pseudo_inputs(
    prior: ConditionalDistribution, world: WorldModel, replay: Replay, latents: LatentSamples, generator: torch.Generator
) -> None:
    """A law that is made of observations starts at some rows of the codes; others have nothing to begin with."""
    if not prior.num_pseudo_inputs:
        return
    latents, count = latents.index(~latents.repeated), prior.num_pseudo_inputs
    if len(latents.row) < count:
        raise ConfigError(
            f"A law of {count} pseudo-inputs begins at as many rows, and there are {len(latents.row)} that its slot is a law of. "
            f"Choose fewer with components={len(latents.row)}, or train for longer."
        )
    latents = latents.index(torch.randperm(len(latents.row), generator=generator, device=latents.row.device)[:count].sort().values)
    found = []
    for number in range(replay.num_envs):
        if replay.lengths[number]:
            rows = replay.stream(number)
            wanted = torch.isin(rows.row[0], latents.row.cpu())
            found.append({name: x[0, wanted].to(world.device) for name, x in rows.obs.items()})
    raw = {name: torch.cat([part[name] for part in found]) for name in found[0]}
    prior.init_pseudo_inputs(world.preprocess(raw), latents.h, latents.row)


def _split(latents: LatentSamples, generator: torch.Generator) -> tuple[LatentSamples, LatentSamples]:
    """(to fit, held out), by episode."""
    episodes = latents.episode.unique()
    if len(episodes) < 2:
        raise ConfigError(f"The replay holds {len(episodes)} whole episode(s), and one has to be held out. Train for longer.")
    order = torch.randperm(len(episodes), generator=generator, device=episodes.device)
    held_out = torch.isin(latents.episode, episodes[order[: max(min(2, len(order) // 2), math.floor(HELD_OUT_SHARE * len(order)))]])
    return latents.index(~held_out), latents.index(held_out)


def _write(
    target: Path,
    config: Config,
    content: checkpoint.Content,
    old: WorldModel,
    new: WorldModel,
    prefix: str,
    replay: Replay,
    trust: bool,
) -> None:
    """The new run: the old checkpoint with the new world, its agent, its optimisers and its replay."""
    tensors, state, manifest = content
    own = as_arrays(new.cpu())
    changed = (prefix, "marginal_") if prefix == "marginal." else prefix
    optim = {k: x for k, x in tensors["optim"].items() if not k.startswith(("world/", "live/"))}
    if any(k.startswith("live/") for k in tensors["optim"]):
        optim |= {f"live/{name}": x if name.startswith(changed) else tensors["optim"][f"live/{name}"] for name, x in own.items()}
    optim |= _remapped_optimizer(
        tensors["optim"], *([name for name, _ in world.named_parameters()] for world in (old, new)), prefix
    )
    arrays = {**tensors, "world": own, "optim": optim}
    made = {**state, "config": config.to_yaml()}
    agent = registry.part("agent", state["agent"]).from_content(arrays, made, device="cpu", trust=trust)
    agent.replay = replay
    with Run.create(target, config, state["seed"]) as fresh:
        fresh.save(agent, manifest["progress"], fenced=bool(manifest.get("fenced")))


def _remapped_optimizer(arrays: Mapping[str, np.ndarray], old: list[str], new: list[str], prefix: str) -> dict[str, np.ndarray]:
    """The optimiser's state under the new numbers of the parameters that stayed."""
    numbers = {str(old.index(name)): i for i, name in enumerate(new) if name in old and not name.startswith(prefix)}
    moved = {}
    for key, x in arrays.items():
        if key.startswith("world/"):
            _, number, quantity = key.split("/")
            if number in numbers:
                moved[f"world/{numbers[number]}/{quantity}"] = x
    return moved
