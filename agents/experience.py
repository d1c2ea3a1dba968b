"""An agent's experience: a replay of the size and at the place that the config says, and what goes into it."""

from __future__ import annotations

import io
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv, VecMonitor, is_vecenv_wrapped

from worldmodel.envs.vectors.restarts import RESTARTED
from worldmodel.envs.vectors.workers import drain
from worldmodel.errors import ConfigError, CorruptError, EnvError
from worldmodel.learner import TrainConfig
from worldmodel.model import WorldModel, tensors
from worldmodel.spaces import ActionSpec, ObsSpec
from worldmodel.storage import checkpoint
from worldmodel.storage.replay import Replay, row_bytes

_log = logging.getLogger(__name__)
ROWS_AT_ONCE = 4096
"""Rows that the running statistics take in one go."""

COLUMNS = ("prev_action", "reward", "is_first", "is_last", "is_terminal")


def replay_capacity(train: TrainConfig, obs: ObsSpec, action: ActionSpec) -> int:
    """Steps that the replay holds at most: train.capacity, or what train.replay_gib has room for."""
    most = math.inf if train.replay_gib is None else train.replay_gib * 2**30 // row_bytes(obs.store, action.dim)
    return int(min(train.capacity, most))


def new_replay(train: TrainConfig, obs: ObsSpec, action: ActionSpec, streams: int, folder: Path | None) -> Replay:
    """An empty one. ConfigError where it would not fit into the memory, or there is no folder for it."""
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
    """The running statistics take in all that the replay holds."""
    vectors = {name: world.obs.keys[name] for name in world.scaling.vectors}
    for stream, held in enumerate(replay.lengths):
        world.heads.scale.update(torch.from_numpy(replay.rewards(stream)))
        if not vectors:
            continue
        for start in range(0, held, ROWS_AT_ONCE):
            rows = tensors(replay.observations(stream, start, min(held, start + ROWS_AT_ONCE)), world.device)
            world.scaling.update({name: key.canonical(rows[name]) for name, key in vectors.items()})


def pack_replay(file: Path | io.BufferedIOBase, step: int, replay: Replay, obs: ObsSpec, action: ActionSpec) -> None:
    """All that the replay holds as one file or into a stream: a zip of safetensors and JSON, as of an agent.

    It passes through memory. Its name may be any, and one that SB3's callbacks choose ends in .pkl; no pickle is in it.
    """
    arrays = {}
    for number in range(replay.num_envs):
        rows = replay.stream(number)
        arrays |= {f"{number}/obs/{key}": x[0].numpy() for key, x in rows.obs.items()}
        arrays |= {f"{number}/{name}": getattr(rows, name)[0].numpy() for name in COLUMNS}
    state = {"holds": "replay", "num_envs": replay.num_envs, "observation": obs.to_json(), "action": action.to_json()}
    pack = checkpoint.pack_into if hasattr(file, "write") else checkpoint.pack
    pack(file, step, {"replay": arrays}, state)


def unpack_replay(file: Path | io.BufferedIOBase, replay: Replay, obs: ObsSpec, action: ActionSpec) -> None:
    """Fills an empty replay with what `pack_replay` wrote; its oldest rows are left out where it has no room for all.

    ConfigError for experience of other spaces or of another number of environments, CorruptError for any other file.
    """
    arrays, state, _ = checkpoint.unpack(file)
    if state.get("holds") != "replay":
        raise ConfigError(f"{file} holds no experience. Expected a file that save_replay_buffer wrote.")
    with _corrupt_if_malformed(file):
        streams, seen = state["num_envs"], ObsSpec.from_json(state["observation"])
        done = ActionSpec.from_json(state["action"])
    if streams != replay.num_envs:
        raise ConfigError(f"{file} holds experience of {streams} environments, and this agent has {replay.num_envs}. Use as many.")
    for what, saved, own in (("observation", seen, obs), ("action", done, action)):
        if saved != own:
            raise ConfigError(f"{file} holds experience with the {what} space {saved.space}, but this agent has {own.space}.")
    with _corrupt_if_malformed(file):
        for number in range(replay.num_envs):
            rows = {key: arrays["replay"][f"{number}/obs/{key}"] for key in obs.keys}
            obs.check(rows, f"{file}, environment {number}")
            replay.extend(rows, *(arrays["replay"][f"{number}/{name}"] for name in COLUMNS), stream=number)


@contextmanager
def _corrupt_if_malformed(file: Any) -> Iterator[None]:
    """What is missing or of another form than `pack_replay` writes is a CorruptError."""
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
    """(the rows [N, ...] that a VecEnv's step arrived at, where the world ended [N]) from the rows that come after a reset.

    SB3 resets at once, and hands an episode's last observation over in `terminal_observation`. Where a VecEnv does not, the
    environment's row before the step, `before(number)` [...], stands in: the next episode's first would be a leap.
    """
    ended = np.flatnonzero(dones)
    truncated = np.array([bool(info.get("TimeLimit.truncated", False)) for info in infos])
    if not len(ended):
        return rows_after_reset, dones & ~truncated
    arrived = {name: x.copy() for name, x in rows_after_reset.items()}
    told = np.array([i for i in ended if infos[i].get("terminal_observation") is not None], np.int64)
    if len(told):
        for name, x in to_raw(_stack([infos[i]["terminal_observation"] for i in told])).items():
            arrived[name][told] = x
    for i in np.setdiff1d(ended, told).tolist():
        for name, x in previous_row(i).items():
            arrived[name][i] = x
    return arrived, dones & ~truncated


class EpisodeStatistics:
    """Returns and lengths of episodes, told as Monitor tells them where it does not.

    It does not where there is none, and at truncations where it stands inside of a time limit. An end that a Monitor does not
    know of is left alone: the lost lives of Atari end episodes outside of it on purpose.
    """

    def __init__(self, venv: VecEnv):
        self.monitored = is_vecenv_wrapped(venv, VecMonitor)
        try:
            self.monitored |= all(venv.env_is_wrapped(Monitor))
        except (AttributeError, NotImplementedError):  # a VecEnv need not know
            pass
        self.start_time = time.time()
        self.returns, self.lengths = np.zeros(venv.num_envs), np.zeros(venv.num_envs, np.int64)

    def with_episode_info(self, rewards: np.ndarray, dones: np.ndarray, infos: Any) -> list[dict[str, Any]]:
        """The infos of a step, one dict for each environment, with `episode` in each that ended one."""
        infos = list(infos) if infos is not None and len(infos) == len(dones) else [{} for _ in dones]
        self.returns += rewards
        self.lengths += 1
        for i in np.flatnonzero(dones).tolist():
            ours = not self.monitored or infos[i].get("TimeLimit.truncated", False)
            if "episode" not in infos[i] and ours and RESTARTED not in infos[i]:
                seen = {"r": float(self.returns[i]), "l": int(self.lengths[i]), "t": round(time.time() - self.start_time, 6)}
                infos[i] = {**infos[i], "episode": seen}
            if "episode" in infos[i] or not self.monitored or RESTARTED in infos[i]:
                self.returns[i] = self.lengths[i] = 0
        return infos


class EnvSyncCheck:
    """Whether an SB3 algorithm still stands where its environments do, as far as a callback can see.

    SB3 moves its `_last_obs` on behind the callbacks. An exception, or a callback that stops the training, comes between; a
    `learn` that resets nothing then goes on from an observation that its environments have left.
    """

    def __init__(self) -> None:
        self.in_sync, self.last_obs = True, []

    def on_training_start(self, model: BaseAlgorithm) -> None:
        """At the start of `learn`: environments that were left are reset."""
        if not self.in_sync and any(model._last_obs is obs for obs in self.last_obs):
            drain(model.env)
            model._last_obs = model.env.reset()
            model._last_episode_starts = np.ones(model.n_envs, bool)
        self.in_sync, self.last_obs = False, [model._last_obs]

    def step(self, model: BaseAlgorithm, new_obs: Any) -> None:
        self.last_obs = [model._last_obs, new_obs]

    def end(self, model: BaseAlgorithm) -> None:
        """At the end of `learn`."""
        self.in_sync = model._last_obs is self.last_obs[-1]


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
