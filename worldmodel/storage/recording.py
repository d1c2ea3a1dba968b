"""Recorded episodes in Minari's convention, out of a replay, into a replay, and as one NPZ file (`npz.py`).

An episode of T steps has T + 1 observations, and T actions, rewards and flags; row t of those
belongs to the step from observation t to observation t + 1. Episodes lie one after the other, `lengths` says their steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from worldmodel.data import Episodes
from worldmodel.errors import ConfigError
from worldmodel.spaces import ActionSpec, ObsSpec
from worldmodel.spaces.casts import numbers
from worldmodel.spaces.keys import KeySpec
from worldmodel.spaces.layouts import Layout
from worldmodel.storage import npz
from worldmodel.storage.replay import Replay


@dataclass(frozen=True, repr=False)
class Recording:
    """N whole episodes of S steps in all, in the environment's own form.

    obs          {key: [S + N, *raw_shape]}  each episode's observations, its first and its last included
    action       [S, *raw_shape]             taken at an observation
    reward       float32 [S]                 received on arriving at the next one
    terminated   bool [S]                    the world ended there; only on an episode's last step
    truncated    bool [S]                    the episode was cut there; only on its last step, and there unless terminated
    lengths      int64 [N]                   steps of each episode, at least 1
    obs_spec, action_spec                    the spaces
    env_id       Gymnasium id, None where unknown
    origin       where it comes from, for messages
    env_options  EnvConfig's other options that are not the defaults; None where joined recordings differ in them

    Raises ConfigError that names the episode and the step of what does not fit: shapes, NaN, what is no category.
    """

    obs: dict[str, np.ndarray]
    action: np.ndarray
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    lengths: np.ndarray
    obs_spec: ObsSpec
    action_spec: ActionSpec
    env_id: str | None = None
    origin: str = "the recording"
    env_options: Mapping[str, Any] | None = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check_shapes()
        if (early_end := (self.terminated | self.truncated) & ~self._last_step).any():
            self._refuse_step(early_end, "ends the episode, but more steps follow", "flags on the last step only")
        if (unfinished := self._last_step & ~(self.terminated | self.truncated)).any():
            self._refuse_step(unfinished, "is the episode's last and neither terminated nor truncated", "one of them")
        if (bad := ~np.isfinite(self.reward)).any():
            self._refuse_step(bad, f"has the reward {self.reward[bad][0]}", "a finite 32-bit float")
        for name, key in self.obs_spec.keys.items():
            self._check_values(f"observation '{name}'", key, self.obs[name], np.repeat(np.arange(self.episodes), self.lengths + 1))
        self._check_values("the action", self.action_spec.key, self.action, np.repeat(np.arange(self.episodes), self.lengths))

    def __repr__(self) -> str:
        return f"Recording({self.episodes} episodes, {self.steps} steps, {self.env_id}, from {self.origin})"

    # What it holds --------------------------------------------------------------------------------------------------

    @property
    def episodes(self) -> int:
        return len(self.lengths)

    @property
    def steps(self) -> int:
        return len(self.reward)

    @property
    def returns(self) -> np.ndarray:
        """Sum of the rewards of each episode, float64 [N]."""
        return np.add.reduceat(self.reward.astype(np.float64), np.cumsum(self.lengths) - self.lengths)

    @cached_property
    def _last_step(self) -> np.ndarray:
        """Which steps are an episode's last."""
        out = np.zeros(self.steps, bool)
        out[np.cumsum(self.lengths) - 1] = True
        return out

    def episode(self, number: int) -> dict[str, Any]:
        """One episode under Minari's names: observations (a dict where the space is a Dict), actions, rewards and flags."""
        step, row = int(self.lengths[:number].sum()), int(self.lengths[:number].sum()) + number
        stop, end = step + int(self.lengths[number]), row + int(self.lengths[number]) + 1
        return {
            "observations": self.obs_spec.to_env({name: x[row:end] for name, x in self.obs.items()}),
            "actions": self.action[step:stop],
            "rewards": self.reward[step:stop],
            "terminations": self.terminated[step:stop],
            "truncations": self.truncated[step:stop],
        }

    # Made of ----------------------------------------------------------------------------------------------------------

    @classmethod
    def from_episodes(
        cls,
        observation_space: gym.Space | ObsSpec,
        action_space: gym.Space | ActionSpec,
        episodes: Iterable[Mapping[str, Any]],
        *,
        layout: Layout | Mapping[str, Layout] | None = None,
        env_id: str | None = None,
        origin: str = "the recording",
        env_options: Mapping[str, Any] | None = None,
    ) -> Recording:
        """The recording of episodes like those that `episode` gives: arrays, or dicts of arrays, in any number type that fits.

        An episode whose last step has no flag was cut there, and counts as truncated. Raises ConfigError, UnsupportedSpaceError.
        """
        obs_spec, action_spec = observation_space, action_space
        if not isinstance(obs_spec, ObsSpec):
            obs_spec = ObsSpec.from_space(obs_spec, layout)
        if not isinstance(action_spec, ActionSpec):
            action_spec = ActionSpec.from_space(action_spec)
        parts = [_episode(obs_spec, action_spec, episode, f"{origin}: episode {i}") for i, episode in enumerate(episodes)]
        if not parts:
            raise ConfigError(f"{origin} holds no episode of at least one step. Record some first.")
        obs, *columns = zip(*parts)
        action, reward, terminated, truncated = map(np.concatenate, columns)
        joined = {name: np.concatenate([rows[name] for rows in obs]) for name in obs_spec.keys}
        lengths = np.array([len(x) for x in columns[1]], np.int64)
        flags = terminated, truncated
        return cls(joined, action, reward, *flags, lengths, obs_spec, action_spec, env_id, origin, env_options or {})

    @classmethod
    def from_replay(
        cls,
        replay: Replay,
        obs_spec: ObsSpec,
        action_spec: ActionSpec,
        *,
        env_id: str | None = None,
        origin: str = "the replay",
        env_options: Mapping[str, Any] | None = None,
    ) -> Recording:
        """The episodes of a replay whose beginning it still holds; one that is still open is cut where it stands."""
        kept = [_complete_episodes(replay, stream) for stream in range(replay.num_envs)]
        obs = {name: np.concatenate([rows[0][name] for rows in kept]) for name in obs_spec.keys}
        prev_action, reward, first, terminal = (np.concatenate([rows[i] for rows in kept]) for i in range(1, 5))
        if not len(first):
            raise ConfigError(f"{origin} holds no episode of at least one step. Collect some first.")
        opens = np.flatnonzero(first)
        lengths = np.diff(opens, append=len(first)) - 1
        terminated = terminal[~first]
        last_step = np.zeros(len(terminated), bool)
        last_step[np.cumsum(lengths) - 1] = True
        action = action_spec.decode(prev_action[~first])
        flags = terminated, last_step & ~terminated
        return cls(obs, action, reward[~first], *flags, lengths, obs_spec, action_spec, env_id, origin, env_options or {})

    @classmethod
    def joined(cls, recordings: Sequence[Recording], origin: str | None = None) -> Recording:
        """All episodes, one recording after the other. ConfigError where their spaces differ."""
        first = recordings[0]
        if len(recordings) == 1:
            return first
        for other in recordings[1:]:
            other.check_same_spaces(first.obs_spec, first.action_spec, first.origin)
        arrays = {
            name: np.concatenate([getattr(r, name) for r in recordings])
            for name in ("action", "reward", "terminated", "truncated", "lengths")
        }
        obs = {name: np.concatenate([r.obs[name] for r in recordings]) for name in first.obs}
        ids = sorted({r.env_id for r in recordings} - {None})
        if len(ids) > 1:
            raise ConfigError(f"The recordings are of different environments: {', '.join(ids)}. Expected one: keep them apart.")
        return cls(
            obs=obs,
            **arrays,
            obs_spec=first.obs_spec,
            action_spec=first.action_spec,
            env_id=ids[0] if ids else None,
            env_options=first.env_options if all(r.env_options == first.env_options for r in recordings) else None,
            origin=origin or ", ".join(r.origin for r in recordings),
        )

    def check_same_spaces(self, obs_spec: ObsSpec, action_spec: ActionSpec, whose: str) -> None:
        """ConfigError that shows both sides, unless these are the recording's spaces."""
        for word, mine, theirs in (("observations", self.obs_spec, obs_spec), ("actions", self.action_spec, action_spec)):
            if mine.to_json() != theirs.to_json():
                raise ConfigError(
                    f"{self.origin} has the {word} {_shown(mine)}, but {whose} has {_shown(theirs)}. Expected the same spaces "
                    "everywhere: they may be of different environments, or of one seen through different wrappers or layouts."
                )

    def to_episodes(self) -> Episodes:
        """Its episodes one after the other as rows, which diagnostics take."""
        replay = Replay(self.steps + self.episodes, self.obs_spec.store, self.action_spec.dim, 1)
        self.append_to(replay)
        return Episodes(replay.stream(0))

    def append_to(self, replay: Replay) -> None:
        """Appends all rows to the first stream of a replay."""
        first = np.zeros(self.steps + self.episodes, bool)
        first[np.cumsum(self.lengths + 1) - self.lengths - 1] = True
        prev_action = np.zeros((len(first), self.action_spec.dim), np.float32)
        prev_action[~first] = self.action_spec.encode(self.action)
        reward, last, terminal = np.zeros(len(first), np.float32), np.zeros(len(first), bool), np.zeros(len(first), bool)
        reward[~first], last[~first], terminal[~first] = self.reward, self._last_step, self.terminated
        replay.extend(self.obs, prev_action, reward, first, last, terminal)

    # Files ----------------------------------------------------------------------------------------------------------

    def write(self, path: str | Path) -> Path:
        """One NPZ file, whole or absent. ConfigError where the name is taken or no .npz, or a key is none; StorageError."""
        path = npz.free_name(path)
        for name in self.obs:
            npz.check_key(name)
        metadata = {
            "env_id": self.env_id,
            "env_options": None if self.env_options is None else dict(self.env_options),
            "origin": self.origin,
            "observation": self.obs_spec.to_json(),
            "action": self.action_spec.to_json(),
        }
        npz.write(path, metadata, self._arrays())
        return path

    @classmethod
    def read(cls, path: str | Path) -> Recording:
        """What `write` wrote. ConfigError for a file that is something else, CorruptError for a damaged one."""
        return cls(**npz.read(Path(path)))

    def _arrays(self) -> dict[str, np.ndarray]:
        steps = {name: getattr(self, name) for name in ("lengths", "action", "reward", "terminated", "truncated")}
        return {**steps, **{f"observation/{name}": x for name, x in self.obs.items()}}

    # Checks ---------------------------------------------------------------------------------------------------------

    def _check_shapes(self) -> None:
        if self.lengths.ndim != 1 or not len(self.lengths) or (self.lengths < 1).any():
            raise ConfigError(f"{self.origin}: expected at least one episode, and each of at least one step.")
        if self.obs.keys() != self.obs_spec.keys.keys():
            raise ConfigError(f"{self.origin} has the observation keys {sorted(self.obs)}; expected {sorted(self.obs_spec.keys)}.")
        for name, (shape, dtype) in npz.expected_arrays(self.obs_spec, self.action_spec, self.lengths).items():
            found = self._arrays()[name]
            if found.shape != shape or found.dtype != dtype:
                raise ConfigError(
                    f"{self.origin}: '{name}' is {found.dtype} {list(found.shape)}; expected {dtype} {list(shape)} for "
                    f"{self.episodes} episodes of {int(self.lengths.sum())} steps in all. Make it with Recording.from_episodes."
                )

    def _check_values(self, what: str, key: KeySpec, rows: np.ndarray, episode: np.ndarray) -> None:
        fault = key.fault(rows)
        if fault is not None:
            row = int(fault[0].argmax())
            step = row - int(np.flatnonzero(episode == episode[row])[0])
            raise ConfigError(
                f"{self.origin}: episode {episode[row]}, step {step}: {what} {fault[1]}. Expected finite values of {key.space}. "
                "Correct the recording, or leave that episode out."
            )

    def _refuse_step(self, bad: np.ndarray, what: str, expected: str) -> None:
        at = int(bad.argmax())
        number = int(np.searchsorted(np.cumsum(self.lengths), at, side="right"))
        step = at - int(self.lengths[:number].sum())
        raise ConfigError(
            f"{self.origin}: episode {number}, step {step} {what}. Expected {expected}. Correct the recording, or leave that "
            "episode out."
        )


# Episodes -------------------------------------------------------------------------------------------------------------


def _episode(obs_spec: ObsSpec, action_spec: ActionSpec, episode: Mapping[str, Any], where: str) -> tuple:
    """(obs, action, reward, terminated, truncated) of one episode, in the spaces' own number types."""
    names = ("observations", "actions", "rewards", "terminations", "truncations")
    if missing := [name for name in names if name not in episode]:
        raise ConfigError(f"{where} has no {missing}. Expected the entries {list(names)}.")
    given = {"obs": episode["observations"]} if obs_spec.single else episode["observations"]
    if not isinstance(given, Mapping) or given.keys() != obs_spec.keys.keys():
        found = sorted(given) if isinstance(given, Mapping) else type(given).__name__
        raise ConfigError(f"{where} has the observations {found}; expected a dict with the keys {sorted(obs_spec.keys)}.")
    reward = numbers(episode["rewards"])
    if reward is None or reward.ndim != 1 or not len(reward):
        found = "no numbers" if reward is None else f"{reward.dtype} {list(reward.shape)}"
        raise ConfigError(f"{where}: rewards are {found}; expected one number for each of 1 or more steps.")
    steps = len(reward)
    counts = ": T + 1 observations, T actions"
    obs = {
        name: key.fitted(given[name], steps + 1, f"{where}: observation '{name}'", counts) for name, key in obs_spec.keys.items()
    }
    action = action_spec.key.fitted(episode["actions"], steps, f"{where}: actions", counts)
    terminated, truncated = (np.asarray(episode[name]).astype(bool) for name in names[3:])
    for name, flags in zip(names[3:], (terminated, truncated)):
        if flags.shape != (steps,):
            raise ConfigError(f"{where}: {name} have shape {list(flags.shape)}; expected [{steps}], one for each reward.")
    truncated[-1] |= not terminated[-1]
    with np.errstate(over="ignore"):  # what leaves float32 is refused as infinite
        return obs, action, reward.astype(np.float32), terminated, truncated


def _complete_episodes(replay: Replay, stream: int) -> tuple:
    """(obs, prev_action, reward, first, terminal) of a stream's episodes: those that begin in it and have a step."""
    rows = replay.stream(stream)
    prev_action, reward, first, terminal = (x[0].numpy() for x in (rows.prev_action, rows.reward, rows.is_first, rows.is_terminal))
    number = np.cumsum(first)  # 0: an episode whose beginning was evicted
    keep = (number > 0) & (np.bincount(number, minlength=1)[number] > 1)
    obs = {name: x[0].numpy()[keep] for name, x in rows.obs.items()}
    return obs, prev_action[keep], reward[keep], first[keep], terminal[keep]


def _shown(spec: ObsSpec | ActionSpec) -> str:
    """A space in a message; keys with their kinds, as equal spaces may be read in different layouts."""
    if isinstance(spec, ActionSpec):
        return str(spec.space)
    return f"{spec.space} ({', '.join(f'{k}: {key.layout or key.kind}' for k, key in spec.keys.items())})"
