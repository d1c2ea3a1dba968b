"""An agent's experience: a replay of the size and at the place that the config says, and what goes into it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.base_class import BaseAlgorithm

from worldmodel.envs.workers import drain
from worldmodel.errors import ConfigError
from worldmodel.learner import TrainConfig
from worldmodel.model import WorldModel, tensors
from worldmodel.replay import Replay, row_bytes
from worldmodel.spaces import ActionSpec, ObsSpec

ROWS_AT_ONCE = 4096
"""Rows that the running statistics take in one go."""


def steps_held(train: TrainConfig, obs: ObsSpec, action: ActionSpec) -> int:
    """Steps that the replay holds at most: train.capacity, or what train.replay_gib has room for."""
    most = math.inf if train.replay_gib is None else train.replay_gib * 2**30 // row_bytes(obs.store, action.dim)
    return int(min(train.capacity, most))


def new_replay(train: TrainConfig, obs: ObsSpec, action: ActionSpec, streams: int, folder: Path | None) -> Replay:
    """An empty one. ConfigError where it would not fit into the memory, or there is no folder for it."""
    capacity, each = steps_held(train, obs, action), row_bytes(obs.store, action.dim)
    if train.replay == "disk":
        if folder is None:
            raise ConfigError(
                "train.replay=disk keeps experience in a run folder, and there is none here. Train with `worldmodel train` or "
                "worldmodel.agents.train, or leave it at train.replay=memory."
            )
        return Replay(capacity, obs.store, action.dim, streams, folder)
    if capacity * each > (there := _memory()):
        raise ConfigError(
            f"The replay would take {capacity * each / 2**30:.1f} GiB ({capacity:,} steps of {each:,} bytes), and this machine has "
            f"{there / 2**30:.1f}. Lower train.capacity, set train.replay_gib, or keep it on the disk with train.replay=disk."
        )
    return Replay(capacity, obs.store, action.dim, streams)


def fit_scaling(world: WorldModel, replay: Replay) -> None:
    """The running statistics take in all that the replay holds."""
    vectors = {name: world.obs.keys[name] for name in world.scaling.vectors}
    for stream, held in enumerate(replay.lengths if vectors else ()):
        for start in range(0, held, ROWS_AT_ONCE):
            rows = tensors(replay.observations(stream, start, min(held, start + ROWS_AT_ONCE)), world.device)
            world.scaling.update({name: key.canonical(rows[name]) for name, key in vectors.items()})


def arrivals(
    following: dict[str, np.ndarray], dones: np.ndarray, infos: Sequence[dict], to_rows: Callable[[Any], dict[str, np.ndarray]]
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """(the rows [N, ...] that a VecEnv's step arrived at, where the world ended [N]) from the rows that come after a reset.

    SB3 resets at once, and hands an episode's last observation over in `terminal_observation`.
    """
    ended = np.flatnonzero(dones)
    truncated = np.array([bool(info.get("TimeLimit.truncated", False)) for info in infos])
    if not len(ended):
        return following, dones & ~truncated
    arrived = {name: x.copy() for name, x in following.items()}
    for name, x in to_rows(_stack([infos[i]["terminal_observation"] for i in ended])).items():
        arrived[name][ended] = x
    return arrived, dones & ~truncated


class Pursuit:
    """Whether an SB3 algorithm still stands where its environments do, as far as a callback can see.

    SB3 moves its `_last_obs` on behind the callbacks. An exception, or a callback that stops the training, comes between; a
    `learn` that resets nothing then goes on from an observation that its environments have left.
    """

    def __init__(self) -> None:
        self.sure, self.known = True, []

    def begin(self, model: BaseAlgorithm) -> None:
        """At the start of `learn`: environments that were left are reset."""
        if not self.sure and any(model._last_obs is obs for obs in self.known):
            drain(model.env)
            model._last_obs = model.env.reset()
            model._last_episode_starts = np.ones(model.n_envs, bool)
        self.sure, self.known = False, [model._last_obs]

    def step(self, model: BaseAlgorithm, new_obs: Any) -> None:
        self.known = [model._last_obs, new_obs]

    def end(self, model: BaseAlgorithm) -> None:
        """At the end of `learn`."""
        self.sure = model._last_obs is self.known[-1]


def _stack(observations: list[Any]) -> Any:
    if isinstance(observations[0], Mapping):
        return {name: np.stack([obs[name] for obs in observations]) for name in observations[0]}
    return np.stack(observations)


def _memory() -> float:
    """Bytes of memory that this machine has; infinite where it does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return float("inf")
