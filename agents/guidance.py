"""Where dreams begin: at recorded rows, between two of them, or where a score is high."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from worldmodel.agents.belief import ActsOnBelief
from worldmodel.data import Sampling, State
from worldmodel.diagnostics.geometry import interpolation, spherical
from worldmodel.envs.draw import Viewer
from worldmodel.errors import ConfigError
from worldmodel.model import WorldModel
from worldmodel.storage.replay import Replay
from worldmodel.storage.run import Run
from worldmodel.view import pictures

TOWARDS = ("reward", "value", "goal")


@dataclass(frozen=True)
class ReplayPosition:
    """A row of a run's replay: `EPISODE:STEP`, both from 0; episodes whose beginning is no longer held do not count."""

    episode: int
    step: int

    @classmethod
    def parse(cls, text: str) -> ReplayPosition:
        if not re.fullmatch(r"\d+:\d+", text):
            raise ConfigError(f"'{text}' names no row; expected EPISODE:STEP of the run's replay, such as 0:12.")
        return cls(*map(int, text.split(":")))


@torch.no_grad()
def state_at(world: WorldModel, replay: Replay, position: ReplayPosition) -> State:
    """The filter's state [1, ...] at a recorded row, noise left out. Raises ConfigError where the replay has no such row."""
    before = 0
    for number in range(replay.num_envs):
        rows = replay.stream(number)
        first = rows.is_first[0].nonzero().flatten().tolist()
        if position.episode < before + len(first):
            start, *end = first[position.episode - before :][:2]
            length = (end[0] if end else rows.is_first.shape[1]) - start
            if position.step >= length:
                raise ConfigError(
                    f"Episode {position.episode} of the replay has {length} rows, and none of number {position.step}."
                )
            rows = rows.window(start, start + position.step + 1).to(world.device)
            return world.trace(rows.with_obs(world.preprocess(rows.obs)), None, Sampling(mode=True)).last
        before += len(first)
    raise ConfigError(f"The replay holds {before} whole episodes, and none of number {position.episode}; they are counted from 0.")


@dataclass(frozen=True)
class Guidance:
    """A score that initial states are tilted by: p(s) is multiplied by exp(strength * score).

    toward    reward: expected on arriving there; value: the agent's estimate; goal: minus the squared distance of latents
    strength  what the score is multiplied by, in nats per unit of it; of rewards and values, per unit of the rewards' own size
    goal      for toward=goal, the row whose latent is meant
    """

    toward: str
    strength: float = 1.0
    goal: ReplayPosition | None = None

    def __post_init__(self) -> None:
        if self.toward not in TOWARDS:
            raise ConfigError(f"toward is '{self.toward}'; expected one of {', '.join(TOWARDS)}.")
        if (self.toward == "goal") != (self.goal is not None):
            raise ConfigError("toward=goal and a goal, EPISODE:STEP of the run's replay, belong together: give both or neither.")

    def nats_per_unit(self, world: WorldModel) -> float:
        """Nats for each unit of `score`."""
        return self.strength if self.toward == "goal" else self.strength / float(world.heads.scale.value)

    def score(self, agent: ActsOnBelief, run: Run) -> Callable[[Tensor], Tensor]:
        """Features [N, F] -> [N]."""
        world = agent.policy.world
        if self.toward == "reward":
            return world.heads.reward
        if self.toward == "value":
            if agent.policy.controller.estimate(torch.zeros(1, world.feature_dim, device=world.device)) is None:
                raise ConfigError(
                    f"toward=value: an agent of kind '{run.config.agent.kind}' estimates no value. Use toward=reward."
                )
            return agent.policy.controller.estimate
        goal = state_at(world, run.replay(), self.goal)["z"]
        return lambda feature: -(world.dynamics.z_of(feature) - goal).square().sum(-1)


def initial_states(
    agent: ActsOnBelief, run: Run, guidance: Guidance | None, count: int, generator: torch.Generator
) -> tuple[State, dict[str, Any] | None]:
    """(states from the initial distribution, what guidance changed); the score without it is a mean over 1,000 states."""
    world, sampling = agent.policy.world.eval(), Sampling(generator=generator)
    if guidance is None:
        return world.sample_initial(count, sampling), None
    score = guidance.score(agent, run)
    state, size = world.sample_initial_tilted(score, count, guidance.nats_per_unit(world), sampling)
    with torch.no_grad():
        unguided, guided = (float(score(world.dynamics.feature(s)).mean()) for s in (world.sample_initial(1000, sampling), state))
    return state, {
        "toward": guidance.toward,
        "strength": guidance.strength,
        "effective": size,
        "score": guided,
        "score_unguided": unguided,
    }


@torch.no_grad()
def interpolation_video(
    run: Run | str | Path, one: str, other: str, out: str | Path, *, steps: int = 25, trust: bool = False
) -> dict[str, Any]:
    """A video of what lies between two rows of a run's replay: along the line of latents, and beside it along the arc.

    one, other   EPISODE:STEP
    out          a .gif or .mp4
    Gives the JSON of `worldmodel dream --between`. Raises ConfigError.
    """
    run = run if isinstance(run, Run) else Run.open(run)
    out = pictures.checked(Path(out))
    positions, replay = [ReplayPosition.parse(text) for text in (one, other)], run.replay()
    world = run.agent("newest", trust=trust).policy.world.eval()
    viewer = Viewer(run.config.env.id, world.obs, run.config.env.names)
    first, last = (world.dynamics.feature(state_at(world, replay, position))[0] for position in positions)
    line, arc = interpolate_features(world, first, last, steps)
    decoded = [world.decode(path) for path in (line, arc)]
    if viewer.can_draw:
        frames = [viewer.frames(obs) for obs in decoded]
    else:
        frames = [viewer.signals(None, {name: x[None] for name, x in obs.items()}) for obs in decoded]
    pictures.save(out, np.concatenate(frames, 2), fps=10)  # side by side
    latents = [world.dynamics.z_of(path) for path in (line, arc)]
    return {
        "run": str(run.path),
        "between": [one, other],
        "steps": steps,
        "distance": float((latents[0][-1] - latents[0][0]).norm()),
        "line_norm": latents[0].norm(dim=-1).tolist(),
        "arc_norm": latents[1].norm(dim=-1).tolist(),
        "out": str(out),
    }


def interpolate_features(
    world: WorldModel, one: Tensor, other: Tensor, steps: int
) -> tuple[Float[Tensor, "S F"], Float[Tensor, "S F"]]:
    """(on a line, with latents on an arc): features between two; the recurrent state is on the line in both."""
    line, size = interpolation(one, other, steps), world.dynamics.latent.size
    share = torch.linspace(0, 1, steps, device=one.device).unsqueeze(-1)
    arc = spherical(world.dynamics.z_of(one), world.dynamics.z_of(other), share)
    return line, torch.cat([line[:, :-size], arc], -1)
