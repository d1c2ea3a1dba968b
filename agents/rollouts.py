"""Roll-outs beside what really came: the figures, films and returns that `worldmodel dream` and TensorBoard show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worldmodel.agents.belief import ActsOnBelief
from worldmodel.agents.evaluation import isolated_rng
from worldmodel.agents.guidance import Guidance
from worldmodel.agents.held_out import HELD_OUT_SEED, RANDOM_ACTION_SHARE, collect
from worldmodel.data import Episodes, Obs, Sampling, State
from worldmodel.diagnostics.rollouts import OpenLoop, open_loop, roll_out
from worldmodel.envs.draw import Viewer
from worldmodel.errors import ConfigError
from worldmodel.model import WorldModel
from worldmodel.storage import files
from worldmodel.storage.run import Run
from worldmodel.view import pictures

SAMPLES = 8
"""Roll-outs whose mean is the prediction, and whose spread is drawn."""


# Films ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RolloutVideo:
    """One open-loop roll-out as pictures: uint8 [T, H, W, 3], None where there is nothing to draw or to plot.

    video    real | imagined | error, of one sampled roll-out
    signals  every number of the observation over time: what came, and the mean and spread of the roll-outs
    """

    video: np.ndarray | None
    signals: np.ndarray | None


def rollout_video(
    world: WorldModel, viewer: Viewer, episodes: Episodes, context: int, horizon: int, generator: torch.Generator | None = None
) -> RolloutVideo:
    """The first steps of the longest episode, `context` rows of which the model sees; shorter where the episode ends."""
    longest = int(episodes.lengths.argmax())
    horizon = min(horizon, int(episodes.lengths[longest]) - context)
    if world.decoder is None or horizon < 1:
        return RolloutVideo(None, None)
    which, start = torch.tensor([longest]), torch.tensor([0])
    roll = roll_out(world, episodes, which, start, context, horizon, samples=SAMPLES, generator=generator)
    imagined = {name: torch.cat([roll.seen[name].expand(SAMPLES, -1, *x.shape[3:]), x[0]], 1) for name, x in roll.imagined.items()}
    video = signals = None
    if viewer.can_draw:
        real, imagined_frames = (viewer.frames({k: x[0] for k, x in obs.items()}) for obs in (roll.truth, imagined))
        video = pictures.open_loop_panels(real, imagined_frames, context)
    if viewer.names:
        true, drawn = numbers(viewer, {k: x[0] for k, x in roll.truth.items()}), numbers(viewer, imagined)
        signals = pictures.signal_frames(true, drawn, labels(viewer), context)
    return RolloutVideo(video, signals)


def from_prior(agent: ActsOnBelief, viewer: Viewer, state: State, horizon: int, generator: torch.Generator) -> RolloutVideo:
    """Dreams from states that no observation led to, in which the agent acts greedily; the first one is drawn."""
    world = agent.policy.world.eval()
    features = [world.dynamics.feature(state)]
    for _, feature, _, _ in _act(agent, state, horizon, 0.0, generator):
        features.append(feature)
    obs = {name: x.unflatten(0, (state.batch_size, -1)) for name, x in world.decode(torch.stack(features, 1).flatten(0, 1)).items()}
    video = viewer.frames({name: x[0] for name, x in obs.items()}) if viewer.can_draw else None
    signals = None
    if viewer.names:
        drawn = numbers(viewer, obs)
        signals = pictures.signal_frames(np.full(drawn.shape[1:], np.nan), drawn, labels(viewer), 0)
    return RolloutVideo(video, signals)


def numbers(viewer: Viewer, obs: Obs) -> np.ndarray:
    """The observation's numbers that are no picture, side by side [..., D]."""
    return torch.cat([obs[name] for name in viewer.names], -1).cpu().numpy()


def labels(viewer: Viewer) -> list[str]:
    """What those numbers are called."""
    return [word for words in viewer.names.values() for word in words]


# Returns --------------------------------------------------------------------------------------------------------------


def _act(agent: ActsOnBelief, state: State, steps: int, random: float, generator: torch.Generator):
    """(state, feature, reward [N], continue [N]) after each step that the greedy agent takes in its own world model."""
    world, controller = agent.policy.world, agent.policy.controller
    rng = np.random.default_rng(int(torch.randint(2**31, (), generator=generator, device=generator.device)))
    memory = controller.memory(world, state.batch_size)
    for _ in range(steps):
        with torch.no_grad():
            action, memory = controller.act(world, state, memory, True, generator)
            drawn = torch.as_tensor(world.action.sample(state.batch_size, rng), device=action.device)
            mixed = torch.as_tensor(rng.random((state.batch_size, 1)) < random, device=action.device)
            action = torch.where(mixed, drawn, action)
            dream = world.imagine(state, lambda feature, step, action=action: action, 1, Sampling(generator=generator))
        state = dream.last
        yield state, dream.feature[:, 1], dream.reward[:, 0], dream.cont[:, 0]


def returns(
    agent: ActsOnBelief, episodes: Episodes, generator: torch.Generator, steps: int = 100, random: float = RANDOM_ACTION_SHARE
) -> tuple[Tensor, Tensor]:
    """(imagined, real) returns [N] of the first `steps` steps of each episode, undiscounted.

    Both sides act alike, greedily but for random actions; the dream sees an episode's first observation only. A reward
    counts for as much as its step is likely to be reached, and not beyond the row at which the real episode was truncated.
    """
    world = agent.policy.world.eval()
    each = torch.arange(len(episodes.lengths))
    rows, inside = episodes.windows(each, torch.zeros_like(each), steps + 1)
    rows, inside = rows.to(agent.device), inside.to(agent.device)
    ended = (rows.is_terminal & inside).any(1, keepdim=True)
    counts = (inside | ended)[:, 1:].float()
    first = torch.ones(len(each), dtype=torch.bool, device=agent.device)
    start = {name: x[:, 0] for name, x in rows.obs.items()}
    state = world.observe(world.initial(len(each)), start, rows.prev_action[:, 0], first, Sampling(generator=generator))
    imagined, alive = torch.zeros(len(each), device=agent.device), torch.ones(len(each), device=agent.device)
    for step, (_, _, reward, cont) in enumerate(_act(agent, state, steps, random, generator)):
        imagined += alive * reward * counts[:, step]
        alive = alive * cont
    return imagined.cpu(), (rows.reward * inside)[:, 1:].sum(1).cpu()


# Figures --------------------------------------------------------------------------------------------------------------


def compare(
    agent: ActsOnBelief,
    run: Run,
    viewer: Viewer,
    context: int,
    horizon: int,
    *,
    episodes: int,
    draw: bool,
    log: Callable[[str], object],
) -> tuple[OpenLoop, RolloutVideo]:
    """(errors, one roll-out as pictures where `draw`) of the agent's world model on fresh episodes."""
    fresh = collect(agent, run.config.env, episodes, steps=run.config.eval.max_steps)
    generator = torch.Generator(agent.device).manual_seed(HELD_OUT_SEED)
    errors = open_loop(agent.policy.world, fresh, context, horizon, samples=SAMPLES, generator=generator)
    _log_unmeasured_horizons(errors, fresh, log)
    if (sentence := worse_than_persistence(errors)) is not None:
        log(sentence)
    return errors, rollout_video(agent.policy.world, viewer, fresh, context, horizon, generator) if draw else RolloutVideo(
        None, None
    )


def unguided_or_guided(
    agent: ActsOnBelief, run: Run, viewer: Viewer, guide: Guidance | None, horizon: int, *, draw: bool
) -> tuple[RolloutVideo, dict[str, Any] | None]:
    """(dreams from nothing as pictures where `draw`, how far they were led)."""
    generator = torch.Generator(agent.device).manual_seed(HELD_OUT_SEED)
    with isolated_rng(agent, HELD_OUT_SEED):
        state, guided = _initial_states(agent, run, guide, generator)
        return from_prior(agent, viewer, state, horizon, generator) if draw else RolloutVideo(None, None), guided


def _initial_states(
    agent: ActsOnBelief, run: Run, guide: Guidance | None, generator: torch.Generator
) -> tuple[State, dict[str, Any] | None]:
    """(states from nothing, how far they were led)."""
    world, sampling = agent.policy.world.eval(), Sampling(generator=generator)
    if guide is None:
        return world.sample_initial(SAMPLES, sampling), None
    score = guide.score(agent, run)
    state, size = world.sample_initial_tilted(score, SAMPLES, guide.nats_per_unit(world), sampling)
    with torch.no_grad():
        unguided_score, guided_score = (
            float(score(world.dynamics.feature(s)).mean()) for s in (world.sample_initial(1000, sampling), state)
        )
    guided_report = {
        "toward": guide.toward,
        "strength": guide.strength,
        "effective": size,
        "score": guided_score,
        "score_unguided": unguided_score,
    }
    return state, guided_report


def worst(errors: OpenLoop, viewer: Viewer, max_horizon: int = 15) -> dict[str, Any] | None:
    """The number that is predicted worst at the longest measured horizon up to `at_most`: its name, error and ratio."""
    horizon = errors.longest(max_horizon)
    found = None if horizon is None else errors.worst(horizon, [name for name in viewer.names if name in errors.squares])
    if found is None:
        return None
    key, index, error, ratio = found
    ratio = ratio if np.isfinite(ratio) else None
    return {"horizon": horizon, "name": viewer.names[key][index], "observation": error, "ratio": ratio}


def worse_than_persistence(errors: OpenLoop, max_horizon: int = 15) -> str | None:
    """One sentence where the model predicts worse than "nothing changes", in all or in a part of the episode; else None."""
    horizon = errors.longest(max_horizon)
    if horizon is None:
        return None
    named = {"all episodes": errors, **{f"steps {part}": own for part, own in errors.parts.items()}}
    ratios = {name: float(own.ratio()[horizon - 1]) for name, own in named.items()}
    worse = [f"{ratio:.2f} in {name}" for name, ratio in ratios.items() if ratio > 1]
    if not worse:
        return None
    return (
        f'At horizon {horizon} the error is more than that of "nothing changes", by a ratio of {", ".join(worse)}: '
        "dreams mean nothing there until the model has learned from more steps of that kind."
    )


def error_figure(errors: OpenLoop, viewer: Viewer) -> bytes:
    """PNG of the errors by horizon: all numbers together, each by itself where there are few, and persistence."""
    curves, persistence_curves = {"all": errors.error().tolist()}, {"all": errors.baseline().tolist()}
    names = [(key, i, word) for key, words in viewer.names.items() for i, word in enumerate(words) if key in errors.squares]
    for key, i, word in names if len(names) <= 8 else ():
        curves[word], persistence_curves[word] = (side[key][:, i].sqrt().tolist() for side in (errors.squares, errors.persistence))
    unit = "deviations" if viewer.names else "of [0, 1]"
    return pictures.error_figure(errors.horizons, curves, persistence_curves, "Open-loop error (dashed: nothing changes)", unit)


def _log_unmeasured_horizons(errors: OpenLoop, episodes: Episodes, log: Callable[[str], object]) -> None:
    fits = errors.longest(len(errors.count)) or 0
    if fits < len(errors.count):
        longest = int(episodes.lengths.max())
        log(
            f"The longest of {len(episodes.lengths)} episodes has {longest} observations: with a context of {errors.context}, "
            f"horizons beyond {fits} fit into none and are null."
        )


def write(out: Path, shown: RolloutVideo, errors: OpenLoop, viewer: Viewer, log: Callable[[str], object]) -> None:
    """The film, and the figure of errors beside it."""
    frames = shown.video if shown.video is not None else shown.signals
    if frames is None:
        raise ConfigError(f"{out}: no episode is longer than the context of {errors.context}. Lower --context.")
    pictures.save(out, frames, fps=10)
    if errors.count.any():
        figure = out.with_suffix(".png")
        files.write(figure, error_figure(errors, viewer))
        log(f"Errors by horizon are drawn in {figure}.")
