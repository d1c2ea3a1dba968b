"""Roll-outs beside real episodes: the figures, videos and returns that `worldmodel dream` and TensorBoard show."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worldmodel.agents.belief import ActsOnBelief, keep_legal
from worldmodel.agents.evaluation import isolated_rng
from worldmodel.agents.guidance import Guidance, initial_states
from worldmodel.agents.held_out import HELD_OUT_SEED, RANDOM_ACTION_SHARE, collect
from worldmodel.data import Episodes, Sampling, State
from worldmodel.diagnostics.calibration import Calibration, calibrate
from worldmodel.diagnostics.rollouts import OpenLoop, open_loop, roll_out, spaced_starts
from worldmodel.envs.draw import Viewer
from worldmodel.envs.make import EnvConfig
from worldmodel.errors import ConfigError
from worldmodel.model import WorldModel
from worldmodel.storage import files
from worldmodel.storage.run import Run
from worldmodel.view import pictures

SAMPLES = 8
"""Roll-outs whose mean is the prediction, and whose spread is drawn."""
GAP_STARTS, GAP_STEPS = 64, 50
"""Greedy dreams whose rewards are compared with real ones, and the first steps of an episode that they begin in."""
GAP_LEVEL, GAP_RESAMPLES = 0.9, 1000


# Videos ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RolloutVideo:
    """One open-loop roll-out as frames uint8 [T, H, W, 3], None where there is nothing to draw or to plot.

    video    real | imagined | error, of one sampled roll-out
    signals  every number of the observation over time: the observed one, and the mean and spread of the roll-outs
    """

    video: np.ndarray | None = None
    signals: np.ndarray | None = None


def rollout_video(
    world: WorldModel, viewer: Viewer, episodes: Episodes, context: int, horizon: int, generator: torch.Generator | None = None
) -> RolloutVideo:
    """The first steps of the longest episode, `context` rows of which the model sees; shorter where the episode ends."""
    longest = int(episodes.lengths.argmax())
    horizon = min(horizon, int(episodes.lengths[longest]) - context)
    if world.decoder is None or horizon < 1:
        return RolloutVideo()
    which, start = torch.tensor([longest]), torch.tensor([0])
    roll = roll_out(world, episodes, which, start, context, horizon, samples=SAMPLES, generator=generator)
    real = {name: x[0] for name, x in roll.truth.items()}
    imagined = {name: torch.cat([roll.seen[name].expand(SAMPLES, -1, *x.shape[3:]), x[0]], 1) for name, x in roll.imagined.items()}
    video = None
    if viewer.can_draw:
        sample = {name: x[0] for name, x in imagined.items()}
        video = pictures.open_loop_panels(viewer.frames(real), viewer.frames(sample), context)
    return RolloutVideo(video, viewer.signals(real, imagined, context))


# Returns --------------------------------------------------------------------------------------------------------------


def _act(
    agent: ActsOnBelief, state: State, steps: int, random: float, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(feature [N, F], reward [N], continue [N]) after each step that the greedy agent takes in its own world model."""
    world, controller = agent.policy.world, agent.policy.controller
    rng = np.random.default_rng(int(torch.randint(2**31, (), generator=generator, device=generator.device)))
    memory = controller.memory(world, state.batch_size)
    for _ in range(steps):
        with torch.no_grad():
            action, memory = controller.act(world, state, memory, True, generator)
            drawn = torch.as_tensor(world.action.sample(state.batch_size, rng), device=action.device)
            is_random = torch.as_tensor(rng.random((state.batch_size, 1)) < random, device=action.device)
            action = keep_legal(world, torch.where(is_random, drawn, action), state, generator)
            dream = world.imagine(state, lambda feature, step, action=action: action, 1, Sampling(generator=generator))
        state = dream.last
        yield dream.feature[:, 1], dream.reward[:, 0], dream.cont[:, 0]


def returns(
    agent: ActsOnBelief, episodes: Episodes, generator: torch.Generator, steps: int = 100, random: float = RANDOM_ACTION_SHARE
) -> tuple[Tensor, Tensor]:
    """(imagined, real) returns [N] of the first `steps` steps of each episode, undiscounted.

    Both sides act alike, greedily but for random actions; the dream sees an episode's first observation only. A reward
    is weighed by the probability that its step is reached, and by 0 behind the row at which the real episode was truncated.
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
    for step, (_, reward, cont) in enumerate(_act(agent, state, steps, random, generator)):
        imagined += alive * reward * counts[:, step]
        alive = alive * cont
    return imagined.cpu(), (rows.reward * inside)[:, 1:].sum(1).cpu()


@dataclass(frozen=True)
class RewardGap:
    """Imagined minus real reward of each of the steps 1..H, under the greedy policy; NaN where nothing is measured.

    count      [H]  starts at which the step is known in reality
    mean       [H]  in reward units; above 0 dreams flatter
    low, high  [H]  the central interval of GAP_LEVEL by bootstrap over episodes; NaN of fewer than two
    """

    count: Tensor
    mean: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def unknown(cls, horizon: int) -> RewardGap:
        """Without real episodes."""
        return cls(torch.zeros(horizon, dtype=torch.int64), *torch.full((3, horizon), torch.nan))


def reward_gap(
    agent: ActsOnBelief,
    episodes: Episodes,
    context: int,
    horizon: int,
    generator: torch.Generator,
    *,
    every: int = 10,
    starts: int = GAP_STARTS,
) -> RewardGap:
    """Are rewards of dreams flattered? Greedy dreams from real rows, against what the same policy collected from there on.

    episodes   of the greedy policy without random actions: `collect(..., random=0)`
    every      rows between starts, of which at most `starts` are used, evenly spaced; each is dreamed once

    The model filters `context` rows, then the agent acts in the dream on what it believes there; a search begins its plan anew.
    An imagined reward is weighed by the probability that its step is reached, a real one is 0 behind a termination, and steps
    behind a truncation are left out.
    """
    world = agent.policy.world.eval()
    episode, start = spaced_starts(episodes, context, every)
    if not len(episode):
        return RewardGap.unknown(horizon)
    chosen = torch.linspace(0, len(episode) - 1, min(starts, len(episode))).round().long()
    episode, start = episode[chosen], start[chosen]
    rows, inside = (x.to(agent.device) for x in episodes.windows(episode, start, context + horizon))
    seen = rows.window(0, context).with_obs(world.preprocess({name: x[:, :context] for name, x in rows.obs.items()}))
    with torch.no_grad():
        state = world.trace(seen, None, Sampling(generator=generator)).last
    imagined, alive = [], torch.ones(len(episode), device=agent.device)
    for _, reward, cont in _act(agent, state, horizon, 0.0, generator):
        imagined.append(alive * reward)
        alive = alive * cont
    gaps = torch.stack(imagined, 1) - (rows.reward * inside)[:, context:]
    known = (inside | (rows.is_terminal & inside).any(1, keepdim=True))[:, context:]
    return _bootstrapped(gaps.cpu(), known.cpu(), episode)


def _bootstrapped(gaps: Tensor, known: Tensor, episode: Tensor) -> RewardGap:
    """Means of gaps [S, H] where known, and their intervals: starts of one episode are no independent ones, episodes are."""
    which = episode.unique(return_inverse=True)[1]
    count = int(which.max()) + 1
    sums, counts = (
        torch.zeros(count, gaps.shape[1], dtype=torch.float64).index_add_(0, which, x.double()) for x in (gaps * known, known)
    )
    rng = torch.Generator().manual_seed(HELD_OUT_SEED)
    drawn = torch.randint(count, (GAP_RESAMPLES, count), generator=rng)
    resampled = sums[drawn].sum(1) / counts[drawn].sum(1)  # a horizon that no drawn episode knows is left out
    tail = torch.tensor([(1 - GAP_LEVEL) / 2, (1 + GAP_LEVEL) / 2], dtype=torch.float64)
    low, high = torch.where((counts > 0).sum(0) > 1, resampled.nanquantile(tail, 0), torch.nan).float()
    return RewardGap(known.sum(0), (sums.sum(0) / counts.sum(0)).float(), low, high)


# The dream command ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figures:
    """What `worldmodel dream` and TensorBoard measure of a world model, by horizon."""

    errors: OpenLoop
    calibration: Calibration
    gap: RewardGap

    @classmethod
    def unknown(cls, context: int, horizon: int) -> Figures:
        """Of dreams without real observations to compare with."""
        return cls(OpenLoop.unknown(context, horizon), Calibration.unknown(horizon), RewardGap.unknown(horizon))


def figures(
    agent: ActsOnBelief,
    env: EnvConfig,
    fresh: Episodes,
    context: int,
    horizon: int,
    generator: torch.Generator,
    *,
    steps: int | None,
    should_abort: Callable[[], bool] = lambda: False,
) -> Figures:
    """The figures of fresh held-out episodes; as many greedy ones of GAP_STEPS are played besides, to compare rewards with.

    generator  of the errors alone: calibration and rewards have generators of their own
    steps      of a greedy episode at most, where that is less than GAP_STEPS

    Raises EvaluationAborted as soon as `should_abort` says yes, EnvError, MissingExtraError.
    """
    world = agent.policy.world
    longest = max(GAP_STEPS, context + horizon)
    longest = longest if steps is None else min(steps, longest)
    greedy = collect(agent, env, len(fresh.lengths), steps=longest, random=0.0, should_abort=should_abort)
    draws, dreams = (torch.Generator(agent.device).manual_seed(HELD_OUT_SEED + 1 + i) for i in range(2))
    return Figures(
        errors=open_loop(world, fresh, context, horizon, samples=SAMPLES, generator=generator),
        calibration=calibrate(world, fresh, context, horizon, generator=draws),
        gap=reward_gap(agent, greedy, context, horizon, dreams),
    )


def dream_of_episodes(
    agent: ActsOnBelief,
    run: Run,
    viewer: Viewer,
    context: int,
    horizon: int,
    *,
    episodes: int,
    draw: bool,
    log: Callable[[str], object],
) -> tuple[Figures, RolloutVideo]:
    """(figures of so many fresh episodes, one roll-out where `draw`) of the agent's world model."""
    world, fresh = agent.policy.world, collect(agent, run.config.env, episodes, steps=run.config.eval.max_steps)
    generator = torch.Generator(agent.device).manual_seed(HELD_OUT_SEED)
    found = figures(agent, run.config.env, fresh, context, horizon, generator, steps=run.config.eval.max_steps)
    errors = found.errors
    fits = errors.longest(horizon) or 0
    if fits < horizon:
        log(
            f"The longest of {len(fresh.lengths)} episodes has {int(fresh.lengths.max())} observations: with a context of "
            f"{context}, horizons beyond {fits} fit into none and are null."
        )
    if (sentence := worse_than_persistence(errors)) is not None:
        log(sentence)
    return found, rollout_video(world, viewer, fresh, context, horizon, generator) if draw else RolloutVideo()


def dream_from_prior(
    agent: ActsOnBelief, run: Run, viewer: Viewer, guidance: Guidance | None, horizon: int, *, draw: bool
) -> tuple[RolloutVideo, dict[str, Any] | None]:
    """(roll-outs from the initial distribution where `draw`, how much `guidance` raised their score)."""
    generator = torch.Generator(agent.device).manual_seed(HELD_OUT_SEED)
    with isolated_rng(agent, HELD_OUT_SEED):
        state, guided = initial_states(agent, run, guidance, SAMPLES, generator)
        return _prior_video(agent, viewer, state, horizon, generator) if draw else RolloutVideo(), guided


def _prior_video(agent: ActsOnBelief, viewer: Viewer, state: State, horizon: int, generator: torch.Generator) -> RolloutVideo:
    """Roll-outs from states that no observation led to, in which the agent acts greedily; `video` is the first one."""
    dynamics = agent.policy.world.dynamics
    features = [dynamics.feature(state), *(feature for feature, _, _ in _act(agent, state, horizon, 0.0, generator))]
    decoded = agent.policy.world.decode(torch.stack(features, 1).flatten(0, 1))
    obs = {name: x.unflatten(0, (state.batch_size, -1)) for name, x in decoded.items()}
    video = viewer.frames({name: x[0] for name, x in obs.items()}) if viewer.can_draw else None
    return RolloutVideo(video, viewer.signals(None, obs))


def save_rollout(out: Path, shown: RolloutVideo, errors: OpenLoop, viewer: Viewer, log: Callable[[str], object]) -> None:
    """Writes the video, and the figure of errors beside it."""
    frames = shown.video if shown.video is not None else shown.signals
    if frames is None:
        raise ConfigError(f"{out}: no episode is longer than the context of {errors.context}. Lower --context.")
    pictures.save(out, frames, fps=10)
    if errors.count.any():
        figure = out.with_suffix(".png")
        files.write(figure, error_figure(errors, viewer))
        log(f"Errors by horizon are drawn in {figure}.")


# Figures --------------------------------------------------------------------------------------------------------------


def worst_number(errors: OpenLoop, viewer: Viewer, max_horizon: int = 15) -> dict[str, Any] | None:
    """The number that is predicted worst at the longest measured horizon up to `max_horizon`: its name, error and ratio."""
    horizon = errors.longest(max_horizon)
    found = None if horizon is None else errors.worst(horizon, [name for name in viewer.names if name in errors.squares])
    if found is None:
        return None
    key, index, error, ratio = found
    ratio = ratio if np.isfinite(ratio) else None
    return {"horizon": horizon, "name": viewer.names[key][index], "observation": error, "ratio": ratio}


def worse_than_persistence(errors: OpenLoop, max_horizon: int = 15) -> str | None:
    """One sentence where the model predicts worse than persistence, in all or in a part of the episode; else None."""
    horizon = errors.longest(max_horizon)
    if horizon is None:
        return None
    named = {"all episodes": errors, **{f"steps {part}": own for part, own in errors.parts.items()}}
    ratios = {name: float(own.ratio()[horizon - 1]) for name, own in named.items()}
    worse = [f"{ratio:.2f} in {name}" for name, ratio in ratios.items() if ratio > 1]
    if not worse:
        return None
    return (
        f'At horizon {horizon} the error is more than that of persistence ("nothing changes"), by a ratio of {", ".join(worse)}: '
        "dreams mean nothing there until the model has learned from more steps of that kind."
    )


def error_figure(errors: OpenLoop, viewer: Viewer) -> bytes:
    """PNG of the errors by horizon: all numbers together, each by itself where there are few, and persistence."""
    curves, persistence = {"all": errors.error().tolist()}, {"all": errors.baseline().tolist()}
    names = [(key, i, word) for key, words in viewer.names.items() for i, word in enumerate(words) if key in errors.squares]
    for key, i, word in names if len(names) <= 8 else ():
        curves[word], persistence[word] = (side[key][:, i].sqrt().tolist() for side in (errors.squares, errors.persistence))
    unit = "deviations" if viewer.names else "of [0, 1]"
    return pictures.error_figure(errors.horizons, curves, persistence, "Open-loop error (dashed: persistence)", unit)
