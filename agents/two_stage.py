"""Two-stage priors: another prior is fitted to the latents of a finished run, whose encoder and decoder stay as they are.

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
from worldmodel.diagnostics.evidence import prior_of
from worldmodel.distributions import ConditionalDistribution, Gaussian, GaussianConfig, likelihood
from worldmodel.errors import ConfigError
from worldmodel.model import WorldModel, default_distribution
from worldmodel.spaces import ActionSpec, ObsSpec
from worldmodel.storage import checkpoint
from worldmodel.storage.replay import Replay
from worldmodel.storage.run import Run
from worldmodel.storage.weights import as_arrays, cpu_randomness, load_arrays

SLOTS = ("initial", "transition", "marginal")
FILTERED_ROWS = 256
"""Rows that are filtered at once."""
SAMPLES_PER_FIRST_ROW = 16
"""Samples of the posterior at an episode's first row, of which an episode has only one."""
HELD_OUT_SHARE = 0.2
"""Share of the episodes that nothing is fitted to."""


def check(kind: str | None, slot: str, where: str, steps: int) -> None:
    """ConfigError for what `fit` cannot do."""
    if kind is None:
        raise ConfigError(
            f"Which form shall be fitted? Say --kind (kind=...), one of: {', '.join(registry.kinds('distribution'))}."
        )
    if slot not in SLOTS:
        raise ConfigError(f"slot is '{slot}'; expected one of {', '.join(SLOTS)}.")
    if where not in ("start", "anywhere"):
        raise ConfigError(f"where is '{where}'; expected 'start' or 'anywhere'.")
    if where == "anywhere" and slot != "initial":
        raise ConfigError(f"where=anywhere concerns the initial slot only; {slot} is fitted to all its rows anyway.")
    if steps < 1:
        raise ConfigError(f"steps is {steps}; expected at least 1.")


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
    content = arrays, state, _ = run.read()
    specs = ObsSpec.from_json(state["observation"]), ActionSpec.from_json(state["action"])
    old = WorldModel.from_arrays(run.config.model, *specs, arrays["world"]).to(device).eval()
    new, fresh = _with_fresh_prior(config, specs, arrays["world"], slot, state["seed"])
    old_prior, prior = prior_of(old, slot), prior_of(new.to(device).eval(), slot)
    generator, replay = torch.Generator(old.device).manual_seed(state["seed"]), run.replay()
    train, held_out = _split(_rows_for_slot(posterior_samples(old, replay, generator), slot, where), generator)
    episodes = len(held_out.episode.unique())
    log(f"{len(train.z)} latents of {len(train.episode.unique())} episodes; {episodes} episodes held out.")

    started = time.perf_counter()
    _init_pseudo_inputs(prior, old, replay, train, generator)
    prior.fit(train.z, _context(train, slot), steps=steps, lr=lr, generator=generator)
    if slot == "marginal" and prior.density != "none":
        new.fit_typicality(train.z)
    seconds = time.perf_counter() - started

    chosen = getattr(run.config.model, slot) or default_distribution(run.config.model.dynamics, slot)
    before = old_prior or Gaussian(GaussianConfig(standard=True), old.dynamics.latent.family, 0).to(device)
    compared = _compare(before, prior, held_out, _context(held_out, slot), generator)
    _write(target, config, content, (old, new), fresh, replay, trust)
    return {
        "run": str(run.path),
        "out": str(target),
        "slot": slot,
        "kind": kind,
        "density": prior.density,
        "before": None if old_prior is None else chosen.kind,
        **compared,
        "codes": len(train.z),
        "held_out_codes": len(held_out.z),
        "held_out_episodes": episodes,
        "steps": steps,
        "seconds": seconds,
    }


# The latents ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LatentSamples:
    """Samples of the posteriors at R rows of experience.

    h         the recurrent state before the row was observed: the transition's context
    first     the row opens an episode
    episode   number of the row's episode
    row       number of the row in the replay
    repeated  one more sample of a row that is here already
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
    """The latent of every row as the filter drew it; rows whose episode's beginning is no longer held are left out.

    A row that opens an episode has SAMPLES_PER_FIRST_ROW samples; all but one of them are marked as `repeated`.
    """
    found, episodes = [], 0
    for number in range(replay.num_envs):
        if not replay.lengths[number]:
            continue
        rows, state = replay.stream(number), None
        episode = rows.is_first[0].cumsum(0) + episodes
        for start in range(0, len(episode), FILTERED_ROWS):
            part = rows.window(start, min(start + FILTERED_ROWS, len(episode))).to(world.device)
            trace = world.trace(part.with_obs(world.preprocess(part.obs)), state, Sampling(generator=generator))
            state, first = trace.last, part.is_first[0]
            numbers = episode[start : start + FILTERED_ROWS].to(first.device), part.row[0]
            own = LatentSamples(trace.z[0], trace.h[0], first, *numbers, torch.zeros_like(first))
            opening, posterior = own.index(first), trace.posterior.index(part.is_first)
            for _ in range(SAMPLES_PER_FIRST_ROW - 1 if len(opening.z) else 0):
                z = world.dynamics.latent.draw(posterior, Sampling(generator=generator), opening.z.shape[:1], opening.z.device)
                found.append(replace(opening, z=z, repeated=torch.ones_like(opening.repeated)))
            found.append(own.index(own.episode > episodes))
        episodes = int(episode[-1])
    return LatentSamples(**{x.name: torch.cat([getattr(part, x.name) for part in found]) for x in fields(LatentSamples)})


def _rows_for_slot(latents: LatentSamples, slot: str, where: str) -> LatentSamples:
    """The rows that the slot's prior is for, each once; where only episodes' first rows count, with all their samples."""
    if slot == "transition":
        return latents.index(~latents.first)
    return latents.index(latents.first if slot == "initial" and where == "start" else ~latents.repeated)


def _split(latents: LatentSamples, generator: torch.Generator) -> tuple[LatentSamples, LatentSamples]:
    """(to fit, held out), by episode."""
    episodes = latents.episode.unique()
    if len(episodes) < 2:
        raise ConfigError(f"The replay holds {len(episodes)} whole episode(s), and one has to be held out. Train for longer.")
    order = torch.randperm(len(episodes), generator=generator, device=episodes.device)
    count = max(min(2, len(order) // 2), math.floor(HELD_OUT_SHARE * len(order)))
    held_out = torch.isin(latents.episode, episodes[order[:count]])
    return latents.index(~held_out), latents.index(held_out)


def _context(latents: LatentSamples, slot: str) -> Tensor | None:
    """What the slot's prior is conditioned on."""
    return latents.h if slot == "transition" else None


# The comparison -------------------------------------------------------------------------------------------------------


def _compare(
    before: ConditionalDistribution,
    after: ConditionalDistribution,
    held_out: LatentSamples,
    context: Tensor | None,
    generator: torch.Generator,
) -> dict[str, float | None]:
    """Mean nats of both at held-out latents, None where there is no density, and the gain with its standard error."""
    old, _ = scores(before, held_out.z, context, generator)
    new, effective = scores(after, held_out.z, context, generator)
    gain, error = (None, None) if old is None or new is None else clustered_mean(new - old, held_out.episode)
    return {
        "nats_before": None if old is None else float(old.mean()),
        "nats": None if new is None else float(new.mean()),
        "gain": gain,
        "standard_error": error,
        "effective": effective,
    }


@torch.no_grad()
def scores(
    prior: ConditionalDistribution, latents: Float[Tensor, "R Z"], context: Tensor | None, generator: torch.Generator
) -> tuple[Float[Tensor, " R"] | None, float | None]:
    """(log-likelihoods in nats, effective share of the samples in ln Z); None without a density, or with a normalised one.

    ln Z of an unnormalised prior is estimated, by annealing where importance sampling has too few effective samples.
    """
    if prior.density == "none":
        return None, None
    parts, effective, sampling, log_z = [], [], Sampling(generator=generator), None
    if prior.density == "unnormalised" and context is None:
        draws = 10_000
        log_z, size = prior.log_z(None, draws, sampling)
        if float(size) < draws / 10:
            draws = 1000
            log_z, size = prior.log_z(None, draws, sampling, ais=True)
        effective = [size / draws]
    for rows in torch.arange(len(latents), device=latents.device).split(1024):
        given = None if context is None else context[rows]
        if prior.density == "unnormalised" and given is not None:
            log_z, size = prior.log_z(given, 200, sampling)
            effective.append(size / 200)
        parts.append(likelihood(prior, latents[rows], given, log_z))
    return torch.cat(parts), float(torch.cat(effective).mean()) if effective else None


def clustered_mean(gain: Float[Tensor, " R"], episode: Int[Tensor, " R"]) -> tuple[float, float | None]:
    """(mean over rows, its standard error over episodes, as rows of one episode are dependent; None for one episode)."""
    _, which = episode.unique(return_inverse=True)
    count = torch.zeros(int(which.max()) + 1, dtype=gain.dtype, device=gain.device).index_add(0, which, torch.ones_like(gain))
    total, mean, n = torch.zeros_like(count).index_add(0, which, gain), gain.mean(), len(count)
    if n < 2:
        return float(mean), None
    error = (total - mean * count).square().sum() * n / (n - 1)
    return float(mean), float(error.sqrt() / count.sum())


# The new model and run ------------------------------------------------------------------------------------------------


def _with_prior(config: Config, kind: str, slot: str, options: Mapping[str, Any] | Sequence[str]) -> Config:
    """The run's config with nothing but this kind in the slot."""
    emptied = config.override({f"model.{slot}": None})
    if isinstance(options, Mapping):
        return emptied.override({f"model.{slot}.kind": kind, **{f"model.{slot}.{name}": x for name, x in options.items()}})
    return emptied.override([f"model.{slot}.kind={kind}", *(f"model.{slot}.{text}" for text in options)])


def _with_fresh_prior(
    config: Config, specs: tuple, arrays: Mapping[str, np.ndarray], slot: str, seed: int
) -> tuple[WorldModel, tuple[str, ...]]:
    """(the model with a fresh prior in the slot and all else as saved, what the names of its arrays begin with)."""
    with cpu_randomness(seed):
        world = WorldModel(config.model, *specs)
    prior = prior_of(world, slot)
    fresh = (next(name for name, module in world.named_modules() if module is prior) + ".",)
    fresh += ("marginal_",) if slot == "marginal" else ()
    load_arrays(world, as_arrays(world) | {name: x for name, x in arrays.items() if not name.startswith(fresh)})
    return world, fresh


def _init_pseudo_inputs(
    prior: ConditionalDistribution, world: WorldModel, replay: Replay, latents: LatentSamples, generator: torch.Generator
) -> None:
    """A prior with pseudo-inputs starts at observations of random rows; others have nothing to initialise."""
    if not prior.num_pseudo_inputs:
        return
    latents, count = latents.index(~latents.repeated), prior.num_pseudo_inputs
    if len(latents.row) < count:
        raise ConfigError(
            f"A prior of {count} pseudo-inputs begins at as many rows, and its slot has only {len(latents.row)}. "
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


def _write(
    target: Path,
    config: Config,
    content: checkpoint.Content,
    worlds: tuple[WorldModel, WorldModel],
    fresh: tuple[str, ...],
    replay: Replay,
    trust: bool,
) -> None:
    """The new run: the old checkpoint with the new world model, its agent, its optimisers and its replay."""
    arrays, state, manifest = content
    saved, own = arrays["optim"], as_arrays(worlds[1].cpu())
    optim = {name: x for name, x in saved.items() if not name.startswith(("world/", "live/"))}
    if any(name.startswith("live/") for name in saved):
        optim |= {f"live/{name}": x if name.startswith(fresh) else saved[f"live/{name}"] for name, x in own.items()}
    before, after = ([name for name, _ in world.named_parameters()] for world in worlds)
    optim |= _remapped_optimizer(saved, before, after, fresh)
    made = {**arrays, "world": own, "optim": optim}, {**state, "config": config.to_yaml()}
    agent = registry.part("agent", state["agent"]).from_content(*made, device="cpu", trust=trust)
    agent.replay = replay
    with Run.create(target, config, state["seed"]) as created:
        created.save(agent, {**manifest["progress"], "best": None}, fenced=bool(manifest.get("fenced")))


def _remapped_optimizer(
    arrays: Mapping[str, np.ndarray], old: list[str], new: list[str], fresh: tuple[str, ...]
) -> dict[str, np.ndarray]:
    """The optimiser's state `world/NUMBER/QUANTITY` under the new numbers of the parameters that were kept."""
    numbers = {str(old.index(name)): i for i, name in enumerate(new) if name in old and not name.startswith(fresh)}
    keys = {key: key.split("/") for key in arrays if key.startswith("world/")}
    return {f"world/{numbers[number]}/{name}": arrays[key] for key, (_, number, name) in keys.items() if number in numbers}
