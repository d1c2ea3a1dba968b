"""An agent's experience: a replay of the size and at the place that the config says, and what goes into it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

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
    for stream, held in enumerate(replay.lengths):
        world.heads.scale.update(torch.from_numpy(replay.rewards(stream)))
        if not vectors:
            continue
        for start in range(0, held, ROWS_AT_ONCE):
            rows = tensors(replay.observations(stream, start, min(held, start + ROWS_AT_ONCE)), world.device)
            world.scaling.update({name: key.canonical(rows[name]) for name, key in vectors.items()})


def arrivals(
    following: dict[str, np.ndarray], dones: np.ndarray, infos: list[dict], to_rows: Callable[[Any], dict[str, np.ndarray]]
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
