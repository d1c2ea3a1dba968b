"""Sequence store: rows of experience in one ring per stream, drawn as windows of consecutive rows.

A stream is one environment's unbroken sequence of rows. A row is complete on arrival: the observation, the action
that led to it, the reward received on arriving, and the three flags. The action taken AT a row is the next row's
`prev_action`, so a batch reads one row further than its window.

Rows have a sequence number within their stream that never changes. A window is a range of sequence numbers that are all
still held, wherever they lie (`columns.py`).
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from worldmodel.data import Batch
from worldmodel.errors import CorruptError, StorageError
from worldmodel.storage import files, segments
from worldmodel.storage.columns import DiskColumns, MemoryColumns
from worldmodel.storage.windows import Windows

_log = logging.getLogger(__name__)

FIRST, LAST, TERMINAL = 1, 2, 4
"""Bits of a row's flags."""


class Replay:
    """Holds the newest `capacity // num_envs` rows of every stream.

    capacity    rows over all streams
    obs         {key: (shape of one row, dtype)}, the raw dtype of the environment
    action_dim  A, the canonical action's size
    num_envs    number of streams
    folder      observations lie there, in the segments that `save` writes; memory holds those that no segment holds yet, at
                most segments.MAX_BYTES of them. None: all observations are in memory
    writable    False: `folder` is another process's, and no row can be added

    Memory is reserved at once but touched only as rows arrive; `nbytes` is what a full store takes.
    """

    def __init__(
        self,
        capacity: int,
        obs: Mapping[str, tuple[Sequence[int], object]],
        action_dim: int,
        num_envs: int,
        folder: Path | None = None,
        writable: bool = True,
    ) -> None:
        if num_envs < 1 or capacity < num_envs:
            raise ValueError(f"Replay needs room for one step of each of {num_envs} environments, but its capacity is {capacity}.")
        if not obs:
            raise ValueError("Replay needs at least one observation key.")
        self.num_envs, self.action_dim = int(num_envs), int(action_dim)
        self.size = int(capacity) // self.num_envs
        self.capacity = int(capacity)
        self.obs_spec = {k: (tuple(int(n) for n in shape), np.dtype(dtype)) for k, (shape, dtype) in obs.items()}
        for key, (_, dtype) in self.obs_spec.items():
            if dtype.kind not in "biuf":
                raise ValueError(f"Replay cannot store observation '{key}' of dtype {dtype}: only numbers and booleans.")
        obs_columns = {f"obs/{k}": x for k, x in self.obs_spec.items()}
        scalars = {"prev_action": ((self.action_dim,), np.dtype(np.float32)), "reward": ((), np.dtype(np.float32))}
        self._scalars = MemoryColumns({**scalars, "flags": ((), np.dtype(np.uint8))}, self.num_envs, self.size)
        self._spec = {**obs_columns, **self._scalars.spec}
        if folder is None:
            self._obs: MemoryColumns | DiskColumns = MemoryColumns(obs_columns, self.num_envs, self.size)
        else:
            buffer_rows = min(self.size, self._rows_per_segment)
            self._obs = DiskColumns(folder, obs_columns, self._spec, self.num_envs, buffer_rows, writable)
        self._next = np.zeros(self.num_envs, np.int64)  # sequence number of the row that each stream gets next
        self._last_rows = [deque[int]() for _ in range(self.num_envs)]  # their sequence numbers, ascending

    # What is held ---------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Rows held, over all streams."""
        return int(self._held.sum())

    @property
    def added(self) -> int:
        """Rows ever added, over all streams."""
        return int(self._next.sum())

    @property
    def lengths(self) -> tuple[int, ...]:
        """Rows held by each stream."""
        return tuple(self._held.tolist())

    @property
    def ends(self) -> int:
        """is_last rows held, over all streams."""
        return sum(map(len, self._last_rows))

    @property
    def added_by_stream(self) -> tuple[int, ...]:
        """Rows ever added to each stream: the sequence number of its next row."""
        return tuple(self._next.tolist())

    @property
    def nbytes(self) -> int:
        """Bytes of memory of the full store."""
        return self._obs.nbytes + self._scalars.nbytes

    @property
    def disk_bytes(self) -> int:
        """Bytes of all rows of a full store in its folder."""
        return self.capacity * row_bytes(self.obs_spec, self.action_dim)

    @property
    def _rows_per_segment(self) -> int:
        """Rows of each stream that a segment takes at most."""
        return max(1, segments.MAX_BYTES // max(1, row_bytes(self.obs_spec, self.action_dim) * self.num_envs))

    @property
    def _held(self) -> np.ndarray:
        return np.minimum(self._next, self.size)

    # In -------------------------------------------------------------------------------------------------------------

    def add(
        self,
        obs: Mapping[str, np.ndarray],
        prev_action: np.ndarray,
        reward: np.ndarray,
        is_first: np.ndarray,
        is_last: np.ndarray,
        is_terminal: np.ndarray,
        streams: Sequence[int] | None = None,
    ) -> None:
        """Appends one row to each of n streams (`streams` names them; None: all, in order).

        obs {key: [n, *shape]}, prev_action [n, A], reward [n], flags [n]. prev_action and reward are stored as 0
        where is_first: nothing led there. Raises ValueError, with nothing stored, on what does not fit.
        """
        where = np.arange(self.num_envs) if streams is None else np.asarray(streams, np.int64)
        if streams is not None:
            self._check_streams(where)
        if not len(where):
            return
        rows = self._checked(len(where), obs, prev_action, reward, is_first, is_last, is_terminal)
        self._flush_if_full()
        self._put(where, self._next[where], rows)

    def extend(self, obs: Mapping[str, np.ndarray], *columns: np.ndarray, stream: int = 0) -> None:
        """Appends n rows, with the columns of `add`, to one stream in order: what n times `add` does, at once."""
        self._check_streams(np.array([stream]))
        n, done = len(columns[1]), 0
        rows = self._checked(n, obs, *columns)
        while done < n:
            self._flush_if_full()
            part = {name: column[done : done + self._obs.free_rows(self._next)] for name, column in rows.items()}
            count = len(part["flags"])
            self._put(np.array([stream]), self._next[stream] + np.arange(count), part)
            done += count

    def _put(self, streams: np.ndarray, sequence: np.ndarray, rows: Mapping[str, np.ndarray], with_obs: bool = True) -> None:
        """Rows [n, ...] of streams [n], each once, or [1] at the sequence numbers [n], which follow those that are there."""
        if not len(sequence):
            return
        if with_obs:
            self._obs.put(streams, sequence, rows)
        self._scalars.put(streams, sequence, rows)
        self._next[streams] = sequence[-len(streams) :] + 1  # first: Ctrl-C behind it leaves no end of a row that is not there
        for i in np.flatnonzero(rows["flags"] & LAST).tolist():
            self._last_rows[streams[i % len(streams)]].append(int(sequence[i]))
        for stream in streams.tolist():
            ends, oldest = self._last_rows[stream], int(self._next[stream]) - self.size
            while ends and ends[0] < oldest:
                ends.popleft()

    def _checked(self, n: int, obs: Mapping[str, np.ndarray], *numbers: np.ndarray) -> dict[str, np.ndarray]:
        """n rows as columns; `numbers` are prev_action, reward and the three flags. Raises ValueError on what does not fit."""
        prev_action, reward, *flags = numbers
        if obs.keys() != self.obs_spec.keys():
            raise ValueError(f"Replay got observation keys {sorted(obs)}, expected {sorted(self.obs_spec)}.")
        rows = {f"obs/{key}": np.asarray(obs[key]) for key in self.obs_spec}
        for key, (shape, dtype) in self.obs_spec.items():
            value = rows[f"obs/{key}"]
            if value.shape != (n, *shape):
                raise ValueError(f"Replay got observation '{key}' of shape {list(value.shape)}, expected {[n, *shape]}.")
            if value.dtype != dtype and not np.can_cast(value.dtype, dtype, "same_kind"):
                raise ValueError(f"Replay got observation '{key}' of dtype {value.dtype}, expected {dtype}.")
        first, last, terminal = (np.asarray(flag, bool) for flag in flags)
        prev_action, reward = np.asarray(prev_action, np.float32), np.asarray(reward, np.float32)
        scalars = {"prev_action": prev_action, "reward": reward, "is_first": first, "is_last": last, "is_terminal": terminal}
        for name, value in scalars.items():
            shape = (n, self.action_dim) if name == "prev_action" else (n,)
            if value.shape != shape:
                raise ValueError(f"Replay got {name} of shape {list(value.shape)}, expected {list(shape)}.")
        if not (np.isfinite(reward).all() and np.isfinite(prev_action).all()):
            raise ValueError("Replay got a reward or an action that is not finite. Check the environment's step().")
        if (terminal & ~last).any():
            raise ValueError("Replay got a row that is_terminal but not is_last: a world that ends closes its episode.")
        return {
            **rows,
            "prev_action": np.where(first[:, None], np.float32(0), prev_action),
            "reward": np.where(first, np.float32(0), reward),
            "flags": (FIRST * first + LAST * last + TERMINAL * terminal).astype(np.uint8),
        }

    def _flush_if_full(self) -> None:
        """Writes the buffer as a segment once it is full; while the disk is full, it may grow."""
        if self._obs.free_rows(self._next) > 0:
            return
        try:
            self.save(self._obs.folder)
        except StorageError as error:
            if not self._obs.enlarge_buffer():
                raise
            _log.warning("The replay could not be written; its rows wait in memory: %s", error)

    def _check_streams(self, where: np.ndarray) -> None:
        if where.ndim != 1 or len(set(where.tolist())) != len(where):
            raise ValueError(f"Replay takes one row per stream and call, but the streams were {where.tolist()}.")
        if len(where) and (where.min() < 0 or where.max() >= self.num_envs):
            raise ValueError(f"Replay has streams 0..{self.num_envs - 1}, but the streams were {where.tolist()}.")

    def recover(self, folder: Path, log: Callable[[str], object] = _log.warning) -> None:
        """Loads a folder's segments without a snapshot, as far as they are intact and no row is missing, into this empty replay."""
        self._load_uncommitted(Path(folder), 0, True, log)
        self._restore_truncations()

    def truncate_open_episodes(self, streams: Sequence[int] | None = None) -> None:
        """Closes the open episodes of these streams (None: of all) as a truncation does: the newest row is_last, not is_terminal.

        For environments that cannot go on from where they were; the next row of each stream must open an episode.
        """
        flags = self._scalars["flags"]
        for stream in np.flatnonzero(self._next).tolist() if streams is None else streams:
            newest = int(self._next[stream]) - 1
            if not flags[at := self._scalars.at(stream, newest)] & LAST:
                flags[at] |= LAST
                self._last_rows[stream].append(newest)

    def observations(self, stream: int, start: int, stop: int) -> dict[str, np.ndarray]:
        """{key: [stop - start, ...]} of the rows of one stream that come start.. after its oldest."""
        oldest = int(self._next[stream]) - self.lengths[stream]
        return {key: self._rows(f"obs/{key}", stream, oldest + start, oldest + stop) for key in self.obs_spec}

    def rewards(self, stream: int) -> np.ndarray:
        """All rewards [R] that one stream holds, in order; 0 where an episode begins."""
        after = int(self._next[stream])
        return self._rows("reward", stream, after - self.lengths[stream], after)

    # Out ------------------------------------------------------------------------------------------------------------

    def stream(self, number: int, start: int = 0, stop: int | None = None) -> Batch:
        """Rows [1, R] start.. to stop (None: all) of those that one stream holds, in order, sharing no memory with the store."""
        self._check_streams(np.array([number]))
        held = self.lengths[number]
        stop = held if stop is None else min(stop, held)
        return self._gather(np.array([number]), self._next[[number]] - held + start, stop - start)

    def sample(
        self, batch: int, length: int, rng: np.random.Generator, *, recent_fraction: float = 0.0, terminal_fraction: float = 0.0
    ) -> Batch:
        """`batch` windows of `length` consecutive rows, as tensors that share no memory with the store.

        recent_fraction    fraction of the windows that end at the newest row of a stream, streams in turn
        terminal_fraction  fraction of the windows that contain an is_last row, drawn uniformly, where there is any
        The rest is uniform over all windows of all streams. A fraction that is no whole number of windows is rounded up or
        down at random, so that it holds on average. The same rng state gives the same batch. `weight` [batch, length] are
        importance weights: the weighted mean over batches is the mean over all windows, uniformly.
        Raises ValueError where no stream holds `length` rows.
        """
        if batch < 1 or length < 1:
            raise ValueError(f"A batch needs at least one window of one step, not {batch} x {length}.")
        if not (recent_fraction >= 0 and terminal_fraction >= 0 and recent_fraction + terminal_fraction <= 1):
            raise ValueError(
                f"Shares recent_fraction={recent_fraction} and terminal_fraction={terminal_fraction} must be at least 0 "
                "and add up to at most 1."
            )
        windows = Windows(self._next, self._held, self._last_rows, length)
        if not windows.counts.any():
            raise ValueError(self._too_short(length))
        streams, starts, weight = windows.draw(batch, rng, recent_fraction, terminal_fraction)
        weight = torch.from_numpy(weight.astype(np.float32)).unsqueeze(1).repeat(1, length)
        return replace(self._gather(streams, starts, length), weight=weight)

    def _too_short(self, length: int) -> str:
        if length > self.size:
            return (
                f"Replay keeps {self.size} steps of each of {self.num_envs} streams but a window needs {length}. "
                f"Raise the replay's capacity (now {self.capacity}), or lower train.batch_length (now {length})."
            )
        return (
            f"Replay holds {len(self)} steps, {max(self.lengths)} in its longest stream, but a window needs {length} steps "
            f"of one stream. Collect more first, or lower train.batch_length (now {length})."
        )

    def _gather(self, streams: np.ndarray, starts: np.ndarray, length: int) -> Batch:
        sequence = starts[:, None] + np.arange(length + 1)  # one more: its prev_action is the window's last action
        at = self._scalars.at(streams[:, None], sequence)
        flags = self._scalars["flags"][at[:, :-1]]
        is_last = (flags & LAST) != 0
        prev_action = self._scalars["prev_action"][at]
        action = prev_action[:, 1:].copy()
        action[is_last | (sequence[:, 1:] == self._next[streams][:, None])] = 0
        return Batch(
            obs={k: torch.from_numpy(self._obs.windows(f"obs/{k}", streams, starts, length)) for k in self.obs_spec},
            action=torch.from_numpy(action),
            prev_action=torch.from_numpy(prev_action[:, :-1].copy()),
            reward=torch.from_numpy(self._scalars["reward"][at[:, :-1]]),
            is_first=torch.from_numpy((flags & FIRST) != 0),
            is_last=torch.from_numpy(is_last),
            is_terminal=torch.from_numpy((flags & TERMINAL) != 0),
            row=torch.from_numpy(sequence[:, :-1] * self.num_envs + streams[:, None]),
        )

    # On disk --------------------------------------------------------------------------------------------------------

    def save(self, folder: Path, previous: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Writes the rows that `previous` does not cover as new segments and returns a snapshot: JSON that `load` takes.

        previous  snapshot of an earlier save of this replay into this folder, or None: all rows held are written. Not used by a
                  replay on disk, which knows its segments
        A snapshot lists the segments that hold the rows of now, [number, seal] each, the seal being a checksum; rows are
        committed once a checkpoint keeps it.
        No segment is deleted here (see `sweep`), so that a kill or a full disk leaves earlier snapshots loadable.
        Raises StorageError where the disk is full or not writable.
        """
        folder = Path(folder)
        if isinstance(self._obs, DiskColumns):
            entries = self._save_buffer(folder, self._obs)
        else:
            entries = self._save_copy(folder, previous)
        return {"rows": self._next.tolist(), "segments": entries, **self._identity()}

    def _save_buffer(self, folder: Path, disk: DiskColumns) -> list[list[int]]:
        """Moves the rows of the buffer into segments, one by one: where one cannot be written, those before it stay."""
        disk.check_writes_to(folder)
        files.make_folder(folder)
        disk.keep(self._drop_evicted(folder, disk.entries))
        for header in self._new_segments(folder, disk.first_in_memory, disk.entries):
            segments.write(folder, header, self._spec, self._rows)
            disk.attach(header.number, self._next)
        return disk.entries

    def _save_copy(self, folder: Path, previous: Mapping[str, Any] | None) -> list[list[int]]:
        """Writes a copy of the rows behind `previous`; where that fails, none of the new segments stays."""
        files.make_folder(folder)
        rows, entries = self._covered(folder, previous)
        entries, written = self._drop_evicted(folder, entries), []
        try:
            for header in self._new_segments(folder, rows, entries):
                written.append([header.number, segments.write(folder, header, self._spec, self._rows)])
        except StorageError:  # a retry writes all of them anew: on a full disk the first ones must not be in its way
            segments.delete(folder, [number for number, _ in written])
            raise
        return entries + written

    def _covered(self, folder: Path, previous: Mapping[str, Any] | None) -> tuple[np.ndarray, list[list[int]]]:
        """(rows [S], segments) that a snapshot covers; none where there is none, or where the folder was emptied since."""
        nothing = np.zeros(self.num_envs, np.int64), []
        if previous is None:
            return nothing
        rows = np.array(previous["rows"])
        differs = any(previous.get(k) != v for k, v in self._identity().items())
        if differs or rows.shape != self._next.shape or (rows > self._next).any():
            raise ValueError("The snapshot given as `previous` is of another replay. Pass what its last save returned, or None.")
        entries = [list(entry) for entry in previous["segments"]]
        return (rows, entries) if {number for number, _ in entries} <= set(segments.numbers(folder)) else nothing

    def _new_segments(self, folder: Path, covered: np.ndarray, entries: list[list[int]]) -> Iterator[segments.Header]:
        """Headers of the segments to write: the rows held from sequence numbers `covered` [S] on, in parts of the largest size."""
        low = np.maximum(covered, self._next - self._held)
        missing, step = self._next - low, self._rows_per_segment
        number = max([*segments.numbers(folder), *(n for n, _ in entries)], default=0)
        for done in range(0, int(missing.max()), step):
            number += 1
            starts, stops = (low + np.minimum(missing, upto) for upto in (done, done + step))
            yield segments.Header(number, tuple(starts.tolist()), tuple(stops.tolist()))

    def _drop_evicted(self, folder: Path, entries: list[list[int]]) -> list[list[int]]:
        """The segments that still hold a row that the ring holds: eviction goes from the oldest on."""
        oldest = self._next - self._held
        for i, (number, _) in enumerate(entries):
            try:
                header = segments.read_header(folder, number, self._spec, self.num_envs)
            except CorruptError:  # reported to whoever loads the snapshot
                return entries[i:]
            if (np.array(header.stops) > oldest).any():
                return entries[i:]
        return []

    @classmethod
    def load(
        cls,
        folder: Path,
        snapshot: Mapping[str, Any],
        *,
        keep_newer: bool = False,
        log: Callable[[str], object] = _log.warning,
        on_disk: bool = False,
        writable: bool = True,
    ) -> Replay:
        """The replay as it was when the snapshot was made.

        on_disk, writable  its observations stay in `folder`, which this process may write: as of `Replay`
        Rows saved after the snapshot are dropped, or kept with `keep_newer`, as far as they are intact; `log` gets a line.
        CorruptError names the file and the offset of damage to any row of the snapshot.
        """
        replay = cls._from_identity(snapshot, folder if on_disk else None, writable)
        try:
            rows, entries = np.array(snapshot["rows"], np.int64), [(int(n), int(seal)) for n, seal in snapshot["segments"]]
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise CorruptError(f"The replay's snapshot is damaged: {error!r}.") from error
        low = np.zeros(replay.num_envs, np.int64)  # from here on, no row of the stream is missing
        for number, seal in entries:
            header, streams = segments.read(folder, number, replay._spec, replay.num_envs, seal)
            low = np.where(np.array(header.starts) == replay._next, low, header.starts)
            replay._append(header, streams)
            del streams  # before the next segment is read
        if rows.shape != low.shape or (replay._next != rows).any() or (low > rows - replay._held).any():
            raise CorruptError(
                f"{folder} does not hold the rows that the checkpoint names: segments are missing from its snapshot."
            )
        replay._load_uncommitted(folder, max((n for n, _ in entries), default=0), keep_newer, log)
        replay._restore_truncations()
        return replay

    @staticmethod
    def sweep(folder: Path, keep: Iterable[Mapping[str, Any]]) -> None:
        """Deletes the segments that none of the snapshots in `keep` names, and leftovers of interrupted writes.

        Call it with the snapshots of every checkpoint that is still there, after old ones were pruned.
        """
        files.sweep(Path(folder))
        entries = {int(number) for snapshot in keep for number, _ in snapshot["segments"]}
        segments.delete(folder, [n for n in segments.numbers(folder) if n not in entries])

    def _identity(self) -> dict[str, Any]:
        """What a snapshot says about the replay that it is of."""
        obs = segments.columns_to_json(self.obs_spec)
        return {"capacity": self.capacity, "num_envs": self.num_envs, "action_dim": self.action_dim, "obs": obs}

    @classmethod
    def _from_identity(cls, snapshot: Mapping[str, Any], folder: Path | None, writable: bool) -> Replay:
        try:
            obs = {k: (shape, np.dtype(dtype).newbyteorder("=")) for k, (shape, dtype) in snapshot["obs"].items()}
            return cls(snapshot["capacity"], obs, snapshot["action_dim"], snapshot["num_envs"], folder, writable)
        except MemoryError as error:
            raise StorageError(f"The replay's {snapshot['capacity']} steps do not fit into memory: {error}.") from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CorruptError(f"The replay's snapshot is damaged: {error!r}.") from error

    def _rows(self, name: str, stream: int, start: int, stop: int) -> np.ndarray:
        """[stop - start, ...] of one column and stream, by sequence numbers."""
        columns = self._scalars if name in self._scalars.spec else self._obs
        return columns.windows(name, np.array([stream]), np.array([start]), stop - start)[0]

    def _append(self, header: segments.Header, streams: list[dict[str, np.ndarray]]) -> None:
        """Takes a segment's rows at their sequence numbers; on disk, its observations stay where they are."""
        if on_disk := isinstance(self._obs, DiskColumns):
            self._obs.attach(header.number, self._next)
        for stream, (start, stop) in enumerate(zip(header.starts, header.stops)):
            kept = max(start, stop - self.size)
            rows = {name: column[kept - start :] for name, column in streams[stream].items()}
            self._put(np.array([stream]), np.arange(kept, stop), rows, with_obs=not on_disk)

    def _restore_truncations(self) -> None:
        """Closes the episodes that were truncated after their last row was on the disk: the next row opens another one."""
        column = self._scalars["flags"]
        for stream, held in enumerate(self._held.tolist()):
            sequence = np.arange(self._next[stream] - held, self._next[stream])
            at = self._scalars.at(stream, sequence)
            flags = column[at]
            flags[:-1] |= np.where(flags[1:] & FIRST, LAST, 0).astype(np.uint8)
            column[at] = flags
            self._last_rows[stream] = deque(sequence[(flags & LAST) != 0].tolist())

    def _load_uncommitted(self, folder: Path, after: int, keep: bool, log: Callable[[str], object]) -> None:
        """Appends what lies behind segment `after` as far as it is intact, or drops it; `log` gets a line."""
        chain = segments.continuation(folder, after, self.added_by_stream, self.size, self._spec, log)
        if not keep:
            if chain:
                log(f"Replay: {sum(h.rows for h in chain)} steps newer than the checkpoint are dropped.")
            return
        count = 0
        for header in chain:
            try:
                self._append(*segments.read(folder, header.number, self._spec, self.num_envs))
            except CorruptError as error:
                log(f"A newer replay segment and all behind it are ignored: {error}")
                break
            count += header.rows
        log(f"Replay: {count} steps {'newer than the checkpoint' if after else 'without a checkpoint'} are kept.")


def row_bytes(obs: Mapping[str, tuple[Sequence[int], Any]], action_dim: int) -> int:
    """Bytes of one row: observation, action, reward and flags."""
    return segments.row_bytes({k: (tuple(shape), np.dtype(dtype)) for k, (shape, dtype) in obs.items()}) + 4 * action_dim + 5
