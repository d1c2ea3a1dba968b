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
from worldmodel.storage.weights import as_arrays, cpu_randomness, fill

SLOTS = ("initial", "transition", "marginal")
CHUNK = 256
"""Rows that the filter sees at once."""
DRAWS = 16
"""Draws of each belief where an episode gives one row only."""
HELD_OUT = 0.2
"""Share of the episodes that no form is fitted to."""


@dataclass(frozen=True)
class Codes:
    """Draws of the beliefs at R rows of experience.

    code     [R Z]
    carry    [R D]  before the row was seen: the transition's context
    first    [R]    the row opens an episode
    episode  [R]    the number of the row's episode
    row      [R]    the row's number in the store
    again    [R]    one more draw of a row that is here already
    """

    code: Float[Tensor, "R Z"]
    carry: Float[Tensor, "R D"]
    first: Bool[Tensor, " R"]
    episode: Int[Tensor, " R"]
    row: Int[Tensor, " R"]
    again: Bool[Tensor, " R"]

    def index(self, rows: Tensor) -> Codes:
        return Codes(**{x.name: getattr(self, x.name)[rows] for x in fields(self)})


@torch.no_grad()
def posterior_codes(world: WorldModel, replay: Replay, generator: torch.Generator) -> Codes:
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
            trace = world.trace(part.with_obs(world.inputs(part.obs)), state, Sampling(generator=generator))
            state = trace.last
            first = part.is_first[0]
            numbers = episode[start : start + CHUNK].to(first.device), part.row[0]
            own = Codes(trace.z[0], trace.h[0], first, *numbers, torch.zeros_like(first))
            begun = own.index(own.episode > episodes)
            opening = own.index(first)
            for _ in range(DRAWS - 1 if len(opening.code) else 0):
                belief = trace.posterior.index(part.is_first)
                shape, device = opening.code.shape[:1], opening.code.device
                drawn = world.dynamics.latent.draw(belief, Sampling(generator=generator), shape, device)
                found.append(replace(opening, code=drawn, again=torch.ones_like(opening.again)))
            found.append(begun)
        episodes = int(episode[-1])
    return Codes(**{x.name: torch.cat([getattr(part, x.name) for part in found]) for x in fields(Codes)})


@dataclass(frozen=True)
class Scores:
    """nats [R] of a law at held-out codes, None where it has no density; `effective`: share of the draws that count in ln Z."""

    nats: Float[Tensor, " R"] | None
    effective: float | None


@torch.no_grad()
def scores(law: ConditionalDistribution, codes: Float[Tensor, "R Z"], context: Tensor | None, generator: torch.Generator) -> Scores:
    """Normalised log-likelihoods; ln Z of an unnormalised law is estimated, by annealing where weighted draws are too few."""
    if law.density == "none":
        return Scores(None, None)
    parts, effective, sampling, log_z = [], [], Sampling(generator=generator), None
    if law.density == "unnormalised" and context is None:
        draws = 10_000
        log_z, size = law.log_z(None, draws, sampling)
        if float(size) < draws / 10:
            draws = 1000
            log_z, size = law.log_z(None, draws, sampling, ais=True)
        effective = [size / draws]
    for start in range(0, len(codes), 1024):
        rows = slice(start, start + 1024)
        given = None if context is None else context[rows]
        if law.density == "unnormalised" and given is not None:
            log_z, size = law.log_z(given, 200, sampling)
            effective.append(size / 200)
        parts.append(likelihood(law, codes[rows], given, log_z))
    return Scores(torch.cat(parts), float(torch.cat(effective).mean()) if effective else None)


def paired(gain: Float[Tensor, " R"], episode: Int[Tensor, " R"]) -> tuple[float, float | None]:
    """(mean over rows, its standard error over episodes: the rows of one are no independent draws; None for one episode)."""
    _, which = episode.unique(return_inverse=True)
    count = torch.zeros(int(which.max()) + 1, dtype=gain.dtype, device=gain.device).index_add(0, which, torch.ones_like(gain))
    total, mean = torch.zeros_like(count).index_add(0, which, gain), gain.mean()
    n = len(count)
    if n < 2:
        return float(mean), None
    error = (total - mean * count).square().sum() * n / (n - 1)
    return float(mean), float(error.sqrt() / count.sum())


def law_of(world: WorldModel, slot: str) -> ConditionalDistribution | None:
    """The law in a slot; None where there is none."""
    return {"initial": world.dynamics.initial_law, "transition": world.dynamics.transition, "marginal": world.marginal}[slot]


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
    config = _with_form(run.config, kind, slot, options)
    tensors, state, manifest = run.read()
    specs = ObsSpec.from_json(state["observation"]), ActionSpec.from_json(state["action"])
    old = WorldModel.from_arrays(run.config.model, *specs, tensors["world"]).to(device).eval()
    new, prefix = _grown(config, specs, tensors["world"], slot, state["seed"])
    new = new.to(device).eval()
    generator = torch.Generator(old.device).manual_seed(state["seed"])
    replay = run.replay()
    train, held_out = _split(_rows_of(posterior_codes(old, replay, generator), slot, where), generator)
    log(f"{len(train.code)} codes of {len(train.episode.unique())} episodes; {len(held_out.episode.unique())} episodes held out.")
    started = time.perf_counter()
    given = (lambda codes: codes.carry) if slot == "transition" else (lambda codes: None)
    _begin(law_of(new, slot), old, replay, train, generator)
    law_of(new, slot).fit(train.code, given(train), steps=steps, lr=lr, generator=generator)
    if slot == "marginal" and law_of(new, slot).density != "none":
        new.mark_typical(train.code)
    seconds = time.perf_counter() - started
    before = law_of(old, slot) or Gaussian(GaussianConfig(standard=True), old.dynamics.latent.family, 0).to(device)
    was, now = (scores(law, held_out.code, given(held_out), generator) for law in (before, law_of(new, slot)))
    comparable = was.nats is not None and now.nats is not None
    gain, error = paired(now.nats - was.nats, held_out.episode) if comparable else (None, None)
    _write(target, config, (tensors, state, manifest), old, new, prefix, replay, trust)
    return {
        "run": str(run.path),
        "out": str(target),
        "slot": slot,
        "kind": kind,
        "density": law_of(new, slot).density,
        "before": None if law_of(old, slot) is None else _kind(run.config, slot),
        "nats_before": None if was.nats is None else float(was.nats.mean()),
        "nats": None if now.nats is None else float(now.nats.mean()),
        "gain": gain,
        "standard_error": error,
        "effective": now.effective,
        "codes": len(train.code),
        "held_out_codes": len(held_out.code),
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


def _with_form(config: Config, kind: str, slot: str, options: Mapping[str, Any] | Sequence[str]) -> Config:
    """The run's config with nothing but this form in the slot."""
    emptied = config.override({f"model.{slot}": None})
    if isinstance(options, Mapping):
        return emptied.override({f"model.{slot}.kind": kind, **{f"model.{slot}.{name}": x for name, x in options.items()}})
    return emptied.override([f"model.{slot}.kind={kind}", *(f"model.{slot}.{text}" for text in options)])


def _grown(config: Config, specs: tuple, arrays: Mapping[str, np.ndarray], slot: str, seed: int) -> tuple[WorldModel, str]:
    """(the model with a fresh law in the slot and all else as saved, what that law's weights begin with)."""
    with cpu_randomness(seed):
        world = WorldModel(config.model, *specs)
    law = law_of(world, slot)
    prefix = next(name for name, module in world.named_modules() if module is law) + "."
    kept = {
        name: x
        for name, x in arrays.items()
        if not name.startswith(prefix) and (slot != "marginal" or not name.startswith("marginal_"))
    }
    fill(world, as_arrays(world) | kept)
    return world, prefix


def _rows_of(codes: Codes, slot: str, where: str) -> Codes:
    """The rows that the slot's law speaks of, each once; where only episodes' first rows count, with all their draws."""
    if slot == "transition":
        return codes.index(~codes.first)
    return codes.index(codes.first if slot == "initial" and where == "start" else ~codes.again)


def _begin(law: ConditionalDistribution, world: WorldModel, replay: Replay, codes: Codes, generator: torch.Generator) -> None:
    """A law that is made of observations starts at some rows of the codes; others have nothing to begin with."""
    if not hasattr(law, "begin"):
        return
    codes, count = codes.index(~codes.again), law.config.components
    if len(codes.row) < count:
        raise ConfigError(
            f"A law of {count} pseudo-inputs begins at as many rows, and there are {len(codes.row)} that its slot is a law of. "
            f"Choose fewer with components={len(codes.row)}, or train for longer."
        )
    codes = codes.index(torch.randperm(len(codes.row), generator=generator, device=codes.row.device)[:count].sort().values)
    found = []
    for number in range(replay.num_envs):
        if replay.lengths[number]:
            rows = replay.stream(number)
            wanted = torch.isin(rows.row[0], codes.row.cpu())
            found.append({name: x[0, wanted].to(world.device) for name, x in rows.obs.items()})
    raw = {name: torch.cat([part[name] for part in found]) for name in found[0]}
    law.begin(world.inputs(raw), codes.carry, codes.row)


def _split(codes: Codes, generator: torch.Generator) -> tuple[Codes, Codes]:
    """(to fit, held out), by episode."""
    episodes = codes.episode.unique()
    if len(episodes) < 2:
        raise ConfigError(f"The replay holds {len(episodes)} whole episode(s), and one has to be held out. Train for longer.")
    order = torch.randperm(len(episodes), generator=generator, device=episodes.device)
    held_out = torch.isin(codes.episode, episodes[order[: max(min(2, len(order) // 2), math.floor(HELD_OUT * len(order)))]])
    return codes.index(~held_out), codes.index(held_out)


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
    optim |= _moved(tensors["optim"], *([name for name, _ in world.named_parameters()] for world in (old, new)), prefix)
    arrays = {**tensors, "world": own, "optim": optim}
    made = {**state, "config": config.to_yaml()}
    agent = registry.part("agent", state["agent"]).from_content(arrays, made, device="cpu", trust=trust)
    agent.replay = replay
    with Run.create(target, config, state["seed"]) as fresh:
        fresh.save(agent, manifest["progress"], fenced=bool(manifest.get("fenced")))


def _moved(arrays: Mapping[str, np.ndarray], old: list[str], new: list[str], prefix: str) -> dict[str, np.ndarray]:
    """The optimiser's state under the new numbers of the parameters that stayed."""
    numbers = {str(old.index(name)): i for i, name in enumerate(new) if name in old and not name.startswith(prefix)}
    moved = {}
    for key, x in arrays.items():
        if key.startswith("world/"):
            _, number, quantity = key.split("/")
            if number in numbers:
                moved[f"world/{numbers[number]}/{quantity}"] = x
    return moved
