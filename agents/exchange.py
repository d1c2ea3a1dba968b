"""Dreamed episodes as a recording."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from worldmodel.agents.belief import keep_legal
from worldmodel.envs.imagined import ImaginedWorld
from worldmodel.errors import ConfigError
from worldmodel.storage.recording import Recording
from worldmodel.storage.run import Run

DREAM_BATCH = 256
"""Imagined episodes that are stepped together."""


def dreamed_episodes(
    run: Run | str | Path,
    episodes: int = 100,
    horizon: int = 50,
    *,
    start: Literal["replay", "prior"] = "replay",
    seed: int = 0,
    trust: bool = False,
) -> Recording:
    """Imagined episodes: the run's agent acts in its own world model, its actions sampled.

    horizon  steps after which an episode is truncated; it terminates where the model samples an end
    start    filtered states at recorded rows, or the initial distribution
    trust    the run's agent.path may be opened, where it has one

    Observations are the decoder's means in the environment's own space, rewards the model's means. Raises ConfigError.
    """
    run = run if isinstance(run, Run) else Run.open(run)
    if episodes < 1:
        raise ConfigError(f"{episodes} dreams were asked for; expected at least 1.")
    agent = run.agent(trust=trust)
    replay = run.replay() if start == "replay" else None
    parts = []
    for done in range(0, episodes, DREAM_BATCH):
        count = min(DREAM_BATCH, episodes - done)
        worlds = ImaginedWorld(agent.policy.world, count, horizon, start=start, seed=seed + done, replay=replay)
        parts += _dreams(agent, worlds, torch.Generator(agent.device).manual_seed(seed + done))
        done += count
    env, origin = run.config.env, f"dreamed by {run.path}, step {agent.num_timesteps}, from {start}"
    return Recording.from_episodes(agent.obs_spec, agent.action_spec, parts, env_id=env.id, env_options=env.options, origin=origin)


@torch.no_grad()
def _dreams(agent: Any, worlds: ImaginedWorld, generator: torch.Generator) -> list[dict[str, Any]]:
    """One episode of each world, under Minari's names."""
    world, controller = worlds.world, agent.policy.controller
    memory = controller.memory(world, worlds.num_envs)
    obs = [world.obs.raw(world.decode(worlds.reset()))]
    steps: list[tuple[np.ndarray, ...]] = []
    lengths = np.zeros(worlds.num_envs, np.int64)
    while not lengths.all():
        action, memory = controller.act(world, worlds.state, memory, False, generator)
        env_action = world.action.decode(keep_legal(world, world.action.project(action), worlds.state, generator))
        arrival = worlds.step(worlds.encode(env_action))
        terminated, truncated = arrival.terminated.cpu().numpy(), arrival.truncated.cpu().numpy()
        obs.append(world.obs.raw(world.decode(arrival.feature)))
        steps.append((env_action, arrival.reward.cpu().numpy(), terminated, truncated))
        lengths[(lengths == 0) & (terminated | truncated)] = len(steps)
    observed = {name: np.stack([rows[name] for rows in obs], 1) for name in world.obs.keys}
    columns = dict(zip(("actions", "rewards", "terminations", "truncations"), (np.stack(x, 1) for x in zip(*steps))))  # [N, H, ...]
    return [
        {
            "observations": world.obs.to_env({name: x[i, : n + 1] for name, x in observed.items()}),
            **{name: x[i, :n] for name, x in columns.items()},
        }
        for i, n in enumerate(lengths.tolist())
    ]
