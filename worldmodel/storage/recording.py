"""Recorded episodes as others keep them, in memory and as one NPZ file that numpy alone reads and writes.

    FILE.npz   episodes.json   observation/KEY.npy   action.npy   reward.npy   terminated.npy   truncated.npy   lengths.npy

The convention is Minari's: an episode of T steps has T + 1 observations, and T actions, rewards and flags; row t of those
belongs to the step from observation t to observation t + 1. Episodes lie one after the other, `lengths` says their steps.
episodes.json holds the spaces. Files are read without numpy's own loader: nothing in them can run code, and every size
is compared with what the spaces and lengths imply before anything is allocated.
"""

from __future__ import annotations

import os
import re
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from secrets import token_hex
from typing import Any, BinaryIO

import gymnasium as gym
import numpy as np
from numpy.lib import format as npy

from worldmodel.errors import ConfigError, CorruptError, StorageError
from worldmodel.spaces import ActionSpec, ObsSpec
from worldmodel.spaces.casts import cast, numbers
from worldmodel.spaces.keys import KeySpec
from worldmodel.spaces.layouts import Layout
from worldmodel.storage import checkpoint
from worldmodel.storage.replay import Replay

FORMAT, VERSION = "worldmodel-episodes", 1
METADATA_NAME = "episodes.json"
MAX_MEMBERS, MAX_KEY = 4096, 1000
MAX_DEFLATE_RATIO = 1032
"""Bytes that one compressed byte can stand for: no honest member claims more."""


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
    env_id       Gymnasium id, None where nobody said
    origin       where it comes from, for messages and for people
    env_options  what EnvConfig said besides the id, as far as it differs from the defaults; None where several said several things

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
        observation_space: gym.Space,
        action_space: gym.Space,
        episodes: Iterable[Mapping[str, Any]],
        *,
        layout: Layout | Mapping[str, Layout] | None = None,
        env_id: str | None = None,
        origin: str = "the recording",
    ) -> Recording:
        """The recording of episodes like those that `episode` gives: arrays, or dicts of arrays, in any number type that fits.

        An episode whose last step has no flag was cut there, and counts as truncated. Raises ConfigError, UnsupportedSpaceError.
        """
        specs = ObsSpec.from_space(observation_space, layout), ActionSpec.from_space(action_space)
        return cls.stacked(*specs, episodes, env_id=env_id, origin=origin)

    @classmethod
    def stacked(
        cls,
        obs_spec: ObsSpec,
        action_spec: ActionSpec,
        episodes: Iterable[Mapping[str, Any]],
        *,
        env_id: str | None = None,
        origin: str = "the recording",
        env_options: Mapping[str, Any] | None = None,
    ) -> Recording:
        """`from_episodes` for spaces that are known in this form already."""
        parts = [_episode(obs_spec, action_spec, episode, f"{origin}: episode {i}") for i, episode in enumerate(episodes)]
        if not parts:
            raise ConfigError(f"{origin} holds no episode of at least one step. Record some first.")
        obs, *columns = zip(*parts)
        action, reward, terminated, truncated = map(np.concatenate, columns)
        joined = {name: np.concatenate([rows[name] for rows in obs]) for name in obs_spec.keys}
        lengths = np.array([len(x) for x in columns[1]], np.int64)
        provenance = {"env_id": env_id, "origin": origin, "env_options": env_options or {}}
        return cls(joined, action, reward, terminated, truncated, lengths, obs_spec, action_spec, **provenance)

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
        provenance = {"env_id": env_id, "origin": origin, "env_options": env_options or {}}
        return cls(obs, action, reward[~first], terminated, last_step & ~terminated, lengths, obs_spec, action_spec, **provenance)

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
        path = free_name(path)
        for name in self.obs:
            _check_key(name)
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "env_id": self.env_id,
            "env_options": None if self.env_options is None else dict(self.env_options),
            "origin": self.origin,
            "observation": self.obs_spec.to_json(),
            "action": self.action_spec.to_json(),
        }
        checkpoint.make_folder(path.parent)
        temporary = path.parent / f".tmp-{token_hex(8)}"
        with checkpoint.durable(temporary) as file, zipfile.ZipFile(file, "w") as archive:
            archive.writestr(_member(METADATA_NAME), checkpoint.dump_json(metadata))
            for name, array in self._arrays().items():
                with archive.open(_member(f"{name}.npy"), "w", force_zip64=True) as member:
                    npy.write_array(member, array.astype(array.dtype.newbyteorder("<"), copy=False))
        with checkpoint.storage_errors("write", path):
            os.replace(temporary, path)
        checkpoint.sync_folder(path.parent)
        return path

    @classmethod
    def read(cls, path: str | Path) -> Recording:
        """What `write` wrote. ConfigError for a file that is something else, CorruptError for a damaged one."""
        path = Path(path)
        if not path.is_file():
            raise ConfigError(f"'{path}' is no file. Expected an NPZ file of episodes, as `worldmodel data export` writes it.")
        with checkpoint.storage_errors("read", path):
            _refuse_other_formats(path)
            try:
                with zipfile.ZipFile(path) as archive:
                    return cls(**_content(archive, path))
            except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, UnicodeDecodeError) as error:
                raise CorruptError(f"{path} is no intact NPZ file: {error}. Restore it from a copy, or export it again.") from error
            except MemoryError as error:
                raise StorageError(f"{path} does not fit into memory: {error}. Split it into several files.") from error

    def _arrays(self) -> dict[str, np.ndarray]:
        steps = {name: getattr(self, name) for name in ("lengths", "action", "reward", "terminated", "truncated")}
        return {**steps, **{f"observation/{name}": x for name, x in self.obs.items()}}

    # Checks ---------------------------------------------------------------------------------------------------------

    def _check_shapes(self) -> None:
        if self.lengths.ndim != 1 or not len(self.lengths) or (self.lengths < 1).any():
            raise ConfigError(f"{self.origin}: expected at least one episode, and each of at least one step.")
        if self.obs.keys() != self.obs_spec.keys.keys():
            raise ConfigError(f"{self.origin} has the observation keys {sorted(self.obs)}; expected {sorted(self.obs_spec.keys)}.")
        for name, (shape, dtype) in _expected(self.obs_spec, self.action_spec, self.lengths).items():
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


def free_name(path: str | Path) -> Path:
    """The path, if a recording may be written there. ConfigError for another suffix, or a name that is taken."""
    path = Path(path)
    if path.suffix.lower() != ".npz":
        raise ConfigError(
            f"'{path}': episodes are written as .npz. Give a name that ends in it; Minari's format is written by `data export`."
        )
    if path.exists():
        raise ConfigError(f"'{path}' is there already, and is not overwritten. Choose another name, or delete it first.")
    return path


def _check_key(name: str) -> None:
    """ConfigError for a key that no member of a zip can be called after, or whose member would lead out of a folder."""
    nameable = "\0" not in name and not re.search("[\ud800-\udfff]", name) and len(name) <= MAX_KEY
    if not nameable or ".." in re.split(r"[/\\]", name):
        shown = repr(name if len(name) <= 40 else name[:40] + "...")
        raise ConfigError(
            f"The observation key {shown} cannot name an array of an NPZ file. Expected at most {MAX_KEY} characters, none of them "
            "NUL or half a character, and no '..' between slashes: rename it with a wrapper."
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
    obs = {name: _fitted(key, given[name], steps + 1, f"{where}: observation '{name}'") for name, key in obs_spec.keys.items()}
    action = _fitted(action_spec.key, episode["actions"], steps, f"{where}: actions")
    terminated, truncated = (np.asarray(episode[name]).astype(bool) for name in names[3:])
    for name, flags in zip(names[3:], (terminated, truncated)):
        if flags.shape != (steps,):
            raise ConfigError(f"{where}: {name} have shape {list(flags.shape)}; expected [{steps}], one for each reward.")
    truncated[-1] |= not terminated[-1]
    with np.errstate(over="ignore"):  # what leaves float32 is refused as infinite
        return obs, action, reward.astype(np.float32), terminated, truncated


def _fitted(key: KeySpec, value: Any, rows: int, where: str) -> np.ndarray:
    """`value` as [rows, *raw_shape] in the space's number type; ConfigError where a number would change its meaning."""
    given = numbers(value)
    if given is None:
        raise ConfigError(f"{where} is no array of numbers. Expected {[rows, *key.raw_shape]}: T + 1 observations, T actions.")
    if given.shape == (rows, *(key.transposed_shape or ())) != (rows, *key.raw_shape):
        given = np.moveaxis(given, 1, -1) if key.layout == "hwc" else np.moveaxis(given, -1, 1)  # channels at the other end
    if given.shape != (rows, *key.raw_shape):
        expected = [rows, *key.raw_shape]
        raise ConfigError(f"{where} has shape {list(given.shape)}; expected {expected}: T + 1 observations, T actions.")
    if given.dtype == key.raw_dtype:
        return given
    converted = cast(given, key.raw_dtype)
    if converted is None:
        raise ConfigError(f"{where} has dtype {given.dtype}, which {key.raw_dtype} does not hold. Expected values of {key.space}.")
    return converted


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


# NPZ ------------------------------------------------------------------------------------------------------------------


def _expected(obs_spec: ObsSpec, action_spec: ActionSpec, lengths: np.ndarray) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """{array: (shape, dtype)} that spaces and lengths imply."""
    steps, rows = int(lengths.sum()), int(lengths.sum()) + len(lengths)
    flag = np.dtype(bool)
    return {
        "lengths": ((len(lengths),), np.dtype(np.int64)),
        "action": ((steps, *action_spec.key.raw_shape), action_spec.key.raw_dtype),
        "reward": ((steps,), np.dtype(np.float32)),
        "terminated": ((steps,), flag),
        "truncated": ((steps,), flag),
        **{f"observation/{name}": ((rows, *shape), dtype) for name, (shape, dtype) in obs_spec.store.items()},
    }


def _member(name: str) -> zipfile.ZipInfo:
    """A compressed member with a fixed date: equal episodes, equal bytes."""
    info = zipfile.ZipInfo(name)
    info.compress_type = zipfile.ZIP_DEFLATED
    return info


OTHER_FORMATS = {
    b"\x89HDF\r\n\x1a\n": "an HDF5 file",
    b"\x93NUMPY": "a single NumPy array",
    b"\x80": "a pickle, which is never opened",
    b"\x1f\x8b": "a gzip file",
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
}
"""How files begin that may hold experience, but are no NPZ."""


def _refuse_other_formats(path: Path) -> None:
    """ConfigError for a file that is whole, but something else."""
    with path.open("rb") as file:
        head = file.read(8)
    for begins, kind in OTHER_FORMATS.items():
        if head.startswith(begins):
            raise ConfigError(
                f"{path} is {kind}; expected an NPZ file of episodes, as `worldmodel data export` writes it. A data set of "
                "Minari is read by its name, minari:ID. Of other data make episodes in Python: "
                "Recording.from_episodes(observation_space, action_space, episodes).write(FILE)."
            )


def _content(archive: zipfile.ZipFile, path: Path) -> dict[str, Any]:
    """The fields of the recording in an open zip."""
    infos = archive.infolist()
    members = {info.filename: info for info in infos}
    if METADATA_NAME not in members:
        raise ConfigError(
            f"{path} is no recording of this library: it has no {METADATA_NAME}, which says the spaces. Make one with "
            "wm.Recording.from_episodes(observation_space, action_space, episodes).write(FILE)."
        )
    if len(members) != len(infos) or len(infos) > MAX_MEMBERS:
        raise CorruptError(f"{path} has members of one name, or more than {MAX_MEMBERS}. Export it again.")
    for info in infos:
        if not 0 <= info.header_offset < path.stat().st_size:
            raise CorruptError(f"{path}: '{info.filename}' lies outside of the file. Restore it from a copy.")
        if info.file_size > MAX_DEFLATE_RATIO * (info.compress_size + 64):
            raise CorruptError(f"{path}: '{info.filename}' claims {info.file_size} bytes, more than its own can stand for.")
    metadata, obs_spec, action_spec = _read_metadata(archive, members[METADATA_NAME], path)
    if "lengths.npy" not in members:
        raise CorruptError(f"{path} has no lengths.npy. Restore it from a copy, or export it again.")
    with archive.open(members["lengths.npy"]) as member:
        shape = _header(member, path, "lengths")[0]
        if len(shape) != 1:
            raise CorruptError(f"{path}: 'lengths' has shape {list(shape)}; expected one number for each episode.")
    lengths = _array(archive, members["lengths.npy"], (shape, np.dtype(np.int64)), path)
    if (lengths < 1).any() or (lengths > 2**40).any() or not len(lengths):
        raise CorruptError(f"{path}: 'lengths' holds what is no number of steps. Restore it from a copy, or export it again.")
    expected = _expected(obs_spec, action_spec, lengths)
    if unexpected := {f"{name}.npy" for name in expected} ^ (members.keys() - {METADATA_NAME}):
        raise CorruptError(f"{path} and its {METADATA_NAME} differ on the arrays {sorted(unexpected)}. Restore it from a copy.")
    arrays = {name: _array(archive, members[f"{name}.npy"], shape_dtype, path) for name, shape_dtype in expected.items()}
    obs = {name: arrays.pop(f"observation/{name}") for name in obs_spec.keys}
    provenance = {"env_id": metadata.get("env_id"), "env_options": metadata.get("env_options", {}), "origin": str(path)}
    return {"obs": obs, **arrays, "obs_spec": obs_spec, "action_spec": action_spec, **provenance}


def _read_metadata(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> tuple[dict, ObsSpec, ActionSpec]:
    if info.file_size > checkpoint.MAX_JSON_BYTES:
        raise CorruptError(f"{path}: {METADATA_NAME} has {info.file_size} bytes; at most {checkpoint.MAX_JSON_BYTES} are read.")
    metadata = checkpoint.parse_json(archive.read(info), f"{path}:{METADATA_NAME}")
    if (metadata.get("format"), metadata.get("version")) != (FORMAT, VERSION):
        raise ConfigError(
            f"{path} has format {metadata.get('format')!r}, version {metadata.get('version')!r}; this version reads {FORMAT!r} {VERSION}."
        )
    try:
        obs_spec, action_spec = ObsSpec.from_json(metadata["observation"]), ActionSpec.from_json(metadata["action"])
        keys = [*obs_spec.keys.values(), action_spec.key]
        if not obs_spec.keys or any(key.raw_dtype.kind not in "biuf" or min((1, *key.raw_shape)) < 1 for key in keys):
            raise ValueError("a space that holds no numbers")
        if not isinstance(metadata.get("env_id"), str | None):
            raise ValueError("an env_id that is no word")
        if not isinstance(metadata.get("env_options"), dict | None):
            raise ValueError("env_options that are no object")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptError(
            f"{path}: {METADATA_NAME} is damaged ({error!r}). Restore it from a copy, or export it again."
        ) from error
    return metadata, obs_spec, action_spec


def _header(member: BinaryIO, path: Path, name: str) -> tuple[tuple[int, ...], np.dtype]:
    """(shape, dtype) that an array's own header says; nothing of it is evaluated as code."""
    try:
        version = npy.read_magic(member)
        reader = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version]
        shape, fortran, dtype = reader(member)
    except (ValueError, KeyError) as error:
        raise CorruptError(f"{path}: '{name}' has no header of a numpy array ({error}). Restore it from a copy.") from error
    if fortran or dtype.kind not in "biuf":
        raise CorruptError(f"{path}: '{name}' is {dtype} in {'Fortran' if fortran else 'C'} order; expected numbers in C order.")
    return shape, dtype


def _array(
    archive: zipfile.ZipFile, info: zipfile.ZipInfo, shape_dtype: tuple[tuple[int, ...], np.dtype], path: Path
) -> np.ndarray:
    """One array of a known form; its size is compared before it is allocated, its CRC as it is read."""
    shape, dtype = shape_dtype
    with archive.open(info) as member:
        found = _header(member, path, info.filename)
        size = prod(shape) * dtype.itemsize
        if found != (shape, dtype) or info.file_size != member.tell() + size:
            raise CorruptError(
                f"{path}: '{info.filename}' is {found[1]} {list(found[0])} in {info.file_size} bytes; expected {dtype} "
                f"{list(shape)}. Restore it from a copy, or export it again."
            )
        out = np.empty(shape, dtype)
        left = out.reshape(-1).view(np.uint8).data
        while len(left):
            count = member.readinto(left[: 1 << 24])
            if not count:
                raise EOFError(f"'{info.filename}' is cut off")
            left = left[count:]
        member.read(1)  # at the very end zipfile compares the CRC
    return out
