"""The state behind an environment's pictures, in its own numbers and units, at the rows of held-out episodes."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import torch

from worldmodel.agents.decisions import stacked
from worldmodel.data import Episodes
from worldmodel.diagnostics.probe import States
from worldmodel.envs.make import EnvConfig, make_env
from worldmodel.errors import ConfigError, EnvError, MissingExtraError, UnsupportedSpaceError
from worldmodel.model import WorldModel
from worldmodel.spaces import ObsSpec
from worldmodel.spaces.names import signal_names

SAME_PICTURE, SAME_REWARD = 16, 1e-3
"""Grey levels of 255, and the share of a reward, within which a step is the recorded one: actions are kept rounded."""


def states_of(env: EnvConfig, world: WorldModel, episodes: Episodes, seed: int) -> States | str:
    """The state at each row of episodes that were played in `env`, number i from `seed` + i on; or why there is none.

    They are played again under their actions. With `env.pixels` the state is what the environment observes without it; else its
    attribute `state`, or the real numbers of its `info`, where these are there at every step.
    """
    found: list[np.ndarray] = []
    names: tuple[str, ...] = ()
    try:
        for number, (first, length) in enumerate(zip(episodes.offsets.tolist(), episodes.lengths.tolist())):
            one = make_env(env.model_copy(update={"pixels": None}), number, seed)
            try:
                rows = _played(one, env, world, episodes, first, length)
            finally:
                one.close()
            if isinstance(rows, str):
                return rows
            numbers, names = rows
            found.append(numbers)
    except (ConfigError, EnvError, MissingExtraError, UnsupportedSpaceError) as error:
        return f"because the environment did not play: {error}"
    if len({x.shape[1] for x in found}) != 1:
        return "because the environment's state has not always the same numbers"
    return States(torch.from_numpy(np.concatenate(found)), names)


def _played(
    one: gym.Env, env: EnvConfig, world: WorldModel, episodes: Episodes, first: int, length: int
) -> tuple[np.ndarray, tuple[str, ...]] | str:
    """(the numbers at each row of an episode [T, S], their names)."""
    rows, spec = episodes.rows, ObsSpec.from_space(one.observation_space) if env.pixels else None
    obs, info = one.reset()
    found: list[list[float]] = []
    names: tuple[str, ...] = ()
    for row in range(first, first + length):
        if row > first:
            action = world.action.decode(rows.prev_action[0, row : row + 1].numpy())[0]
            obs, reward, terminated, _, info = one.step(action)
            if not np.isclose(reward, float(rows.reward[0, row]), SAME_REWARD, SAME_REWARD) or terminated != bool(
                rows.is_terminal[0, row]
            ):
                return "because the environment did not repeat a held-out episode under its seed and actions"
        if spec is None and not _same(world, obs, {name: x[0, row].numpy() for name, x in rows.obs.items()}):
            return "because the environment did not repeat a held-out episode's pictures under its seed and actions"
        numbers = _kept(one, info) if spec is None else _observed(spec, obs, env)
        if not numbers or (names and tuple(numbers) != names):
            return "because the environment gives no numbers of fixed length: neither vectors, nor `state`, nor in `info`"
        names = tuple(numbers)
        found.append(list(numbers.values()))
    return np.asarray(found, np.float64), names


def _same(world: WorldModel, obs: Any, recorded: dict[str, np.ndarray]) -> bool:
    raw = world.obs.to_raw(stacked([obs]))
    return all(np.abs(raw[name][0].astype(np.float64) - x).max() <= SAME_PICTURE for name, x in recorded.items())


def _observed(spec: ObsSpec, obs: Any, env: EnvConfig) -> dict[str, float]:
    """{name: number} of the vectors of an observation."""
    raw = spec.to_raw(stacked([obs]))
    named, found = signal_names(spec, None, env.id), {}
    for key in (key for key in spec.keys.values() if key.kind == "vector"):
        found |= dict(zip(named[key.name], map(float, key.canonical(torch.from_numpy(raw[key.name]))[0])))
    return found


def _kept(one: gym.Env, info: dict[str, Any]) -> dict[str, float]:
    """{name: number} of what the environment itself keeps."""
    state = getattr(one.unwrapped, "state", None)
    arrays = {"state": state} if isinstance(state, np.ndarray) else info
    real = {name: x for name, x in arrays.items() if isinstance(x, np.ndarray) and x.dtype.kind == "f" and x.ndim == 1}
    return {f"{name}[{i}]": float(value) for name, x in real.items() for i, value in enumerate(x)}
