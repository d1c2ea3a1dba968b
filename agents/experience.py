"""An agent's experience: its replay as the config asks for it, files of one, and the rows that a VecEnv's steps become."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from worldmodel.errors import ConfigError, CorruptError, EnvError
from worldmodel.learner import TrainConfig
from worldmodel.model import WorldModel, tensors
from worldmodel.spaces import ActionSpec, ObsSpec
from worldmodel.storage import checkpoint
from worldmodel.storage.replay import Replay, row_bytes

ROWS_AT_ONCE = 4096
"""Rows that the running statistics are updated with at once."""
COLUMNS = ("prev_action", "reward", "is_first", "is_last", "is_terminal")


def replay_capacity(train: TrainConfig, obs: ObsSpec, action: ActionSpec) -> int:
    """The capacity of the replay in steps: train.capacity, or as many as fit into train.replay_gib."""
    limit = math.inf if train.replay_gib is None else train.replay_gib * 2**30 // row_bytes(obs.store, action.dim)
    return int(min(train.capacity, limit))


def new_replay(train: TrainConfig, obs: ObsSpec, action: ActionSpec, streams: int, folder: Path | None) -> Replay:
    """An empty replay. ConfigError where it would not fit into memory, or has no folder to be in."""
    capacity, each = replay_capacity(train, obs, action), row_bytes(obs.store, action.dim)
    if train.replay == "disk":
        if folder is None:
            raise ConfigError(
                "train.replay=disk keeps experience in a run folder, and there is none here. Train with `worldmodel train` or "
                "worldmodel.commands.train, or leave it at train.replay=memory."
            )
        return Replay(capacity, obs.store, action.dim, streams, folder)
    if capacity * each > (available := _physical_memory()):
        raise ConfigError(
            f"The replay would take {capacity * each / 2**30:.1f} GiB ({capacity:,} steps of {each:,} bytes), and this machine has "
            f"{available / 2**30:.1f}. Lower train.capacity, set train.replay_gib, or keep it on the disk with train.replay=disk."
        )
    return Replay(capacity, obs.store, action.dim, streams)


def fit_scaling(world: WorldModel, replay: Replay) -> None:
    """Updates the running statistics with all that the replay holds."""
    vectors = {name: world.obs.keys[name] for name in world.scaling.vectors}
    for stream, held in enumerate(replay.lengths):
        world.heads.scale.update(torch.from_numpy(replay.rewards(stream)))
        for start in range(0, held if vectors else 0, ROWS_AT_ONCE):
            rows = tensors(replay.observations(stream, start, min(held, start + ROWS_AT_ONCE)), world.device)
            world.scaling.update({name: key.canonical(rows[name]) for name, key in vectors.items()})


def append_rows(source: Replay, target: Replay) -> int:
    """Appends the episodes of one replay to another, its streams in turn; the rows appended. Open episodes end as by truncation.

    Rows of an episode whose beginning is no longer held are left out: they would follow another episode's without a reset.
    """
    before = target.added
    for number, held in enumerate(source.lengths):
        stream, is_within = number % target.num_envs, False
        for start in range(0, held, ROWS_AT_ONCE):
            rows = source.stream(number, start, start + ROWS_AT_ONCE)
            first = rows.is_first[0].numpy()
            kept = first.cumsum() + is_within > 0
            is_within |= bool(first.any())
            columns = (getattr(rows, name)[0].numpy()[kept] for name in COLUMNS)
            target.extend({key: x[0].numpy()[kept] for key, x in rows.obs.items()}, *columns, stream=stream)
        if is_within:
            target.truncate_open_episodes([stream])
    return target.added - before


def pack_replay(file: Path | io.BufferedIOBase, step: int, replay: Replay, obs: ObsSpec, action: ActionSpec) -> None:
    """Writes all that the replay holds as one zip of safetensors and JSON, through memory.

    The file may have any name. Those of SB3's callbacks end in .pkl; no pickle is in it.
    """
    arrays = {}
    for number in range(replay.num_envs):
        rows = replay.stream(number)
        arrays |= {f"{number}/obs/{key}": x[0].numpy() for key, x in rows.obs.items()}
        arrays |= {f"{number}/{name}": getattr(rows, name)[0].numpy() for name in COLUMNS}
    state = {"holds": "replay", "num_envs": replay.num_envs, "observation": obs.to_json(), "action": action.to_json()}
    checkpoint.pack(file, step, {"replay": arrays}, state)


def unpack_replay(file: Path | io.BufferedIOBase, replay: Replay, obs: ObsSpec, action: ActionSpec) -> None:
    """Fills an empty replay with what `pack_replay` wrote; its oldest rows are left out where it has no room for all.

    ConfigError for experience of other spaces or of another number of environments, CorruptError for any other file.
    """
    arrays, state, _ = checkpoint.unpack(file)
    if state.get("holds") != "replay":
        raise ConfigError(f"{file} holds no experience. Expected a file that save_replay_buffer wrote.")
    with _corrupt_if_malformed(file):
        streams = state["num_envs"]
        saved_obs, saved_action = ObsSpec.from_json(state["observation"]), ActionSpec.from_json(state["action"])
    if streams != replay.num_envs:
        raise ConfigError(f"{file} holds experience of {streams} environments, and this agent has {replay.num_envs}. Use as many.")
    for what, saved, own in (("observation", saved_obs, obs), ("action", saved_action, action)):
        if saved != own:
            raise ConfigError(f"{file} holds experience with the {what} space {saved.space}, but this agent has {own.space}.")
    with _corrupt_if_malformed(file):
        for number in range(replay.num_envs):
            rows = {key: arrays["replay"][f"{number}/obs/{key}"] for key in obs.keys}
            obs.check(rows, f"{file}, environment {number}")
            replay.extend(rows, *(arrays["replay"][f"{number}/{name}"] for name in COLUMNS), stream=number)


@contextmanager
def _corrupt_if_malformed(file: Any) -> Iterator[None]:
    """Turns the errors of a file that `pack_replay` would not write into CorruptError."""
    try:
        yield
    except (AttributeError, EnvError, KeyError, TypeError, ValueError) as error:
        raise CorruptError(f"{file} holds experience that does not fit together: {error}. Restore it from a copy.") from error


def rows_before_reset(
    rows_after_reset: dict[str, np.ndarray],
    dones: np.ndarray,
    infos: Sequence[dict],
    to_raw: Callable[[Any], dict[str, np.ndarray]],
    previous_row: Callable[[int], dict[str, np.ndarray]],
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """(rows [N, ...] that a VecEnv's step led to, where they are terminal [N]) from its rows, which follow a reset where done.

    SB3 resets at once, and gives an episode's last observation in `terminal_observation`. Where a VecEnv does not, the
    environment's row before the step, `previous_row(number)` [...], stands in: the next episode's first would be a leap.
    """
    rows = {name: x.copy() for name, x in rows_after_reset.items()} if dones.any() else rows_after_reset
    ended = np.flatnonzero(dones).tolist()
    given = [i for i in ended if infos[i].get("terminal_observation") is not None]
    if given:
        for name, x in to_raw(_stack([infos[i]["terminal_observation"] for i in given])).items():
            rows[name][given] = x
    for i in [i for i in ended if i not in given]:
        for name, x in previous_row(i).items():
            rows[name][i] = x
    truncated = np.array([bool(info.get("TimeLimit.truncated", False)) for info in infos])
    return rows, dones & ~truncated


def _stack(observations: list[Any]) -> Any:
    if isinstance(observations[0], Mapping):
        return {name: np.stack([obs[name] for obs in observations]) for name in observations[0]}
    return np.stack(observations)


def _physical_memory() -> float:
    """Bytes of memory that this machine has; infinite where it does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return float("inf")
