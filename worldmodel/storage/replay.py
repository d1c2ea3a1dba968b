"""Sequence store: rows of experience in one ring per stream, drawn as windows of consecutive rows.

A stream is one environment's unbroken sequence of rows. A row is complete on arrival: the observation, the action
that led to it, the reward received on arriving, and the three flags. The action taken AT a row is the next row's
`prev_action`, so a batch reads one row further than its window.

Rows have a sequence number within their stream that never changes; row q lies at q modulo the ring's size. The
write head is therefore no special case: a window is a range of sequence numbers that are all still held.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from worldmodel.data import Batch
from worldmodel.errors import CorruptError, StorageError
from worldmodel.storage import checkpoint, segments
from worldmodel.storage.disk_columns import DiskColumns
from worldmodel.storage.windows import Ends, Windows

_log = logging.getLogger(__name__)

FIRST, LAST, TERMINAL = 1, 2, 4
"""Bits of a row's flags."""

SLICE_BYTES = 1024
"""Rows of at least this size are copied as one slice per window: there, memcpy beats gathering row by row."""


class Replay:
    """Holds the newest `capacity // num_envs` rows of every stream.

    capacity    rows over all streams
    obs         {key: (shape of one row, dtype)}, the raw dtype of the environment
    action_dim  A, the canonical action's size
    num_envs    number of streams
    folder      observations lie there, in the segments that `save` writes, and only those that no segment holds yet, at most
                segments.MAX_BYTES of them, are in memory; None: all of them are
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
        rows = self.size * self.num_envs
        in_memory = self.obs_spec if folder is None else {}
        self._obs = {k: np.empty((rows, *shape), dtype) for k, (shape, dtype) in in_memory.items()}
        self._prev_action = np.empty((rows, self.action_dim), np.float32)
        self._reward = np.empty(rows, np.float32)
        self._flags = np.empty(rows, np.uint8)
        self._next = np.zeros(self.num_envs, np.int64)  # sequence number of the row that each stream gets next
        self._last_rows = [Ends() for _ in range(self.num_envs)]
        self._disk: DiskColumns | None = None
        if folder is not None:
            buffer_rows = min(self.size, self._rows_per_segment)
            self._disk = DiskColumns(
                folder, {f"obs/{k}": x for k, x in self.obs_spec.items()}, self.num_envs, buffer_rows, writable
            )

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
        return sum(column.nbytes for column in self._columns.values()) + (self._disk.nbytes if self._disk else 0)

    @property
    def disk_bytes(self) -> int:
        """Bytes of all rows of a full store in its folder."""
        return self.capacity * row_bytes(self.obs_spec, self.action_dim)

    @property
    def _rows_per_segment(self) -> int:
        """Rows of each stream that a segment of the greatest size takes."""
        return max(1, segments.MAX_BYTES // max(1, row_bytes(self.obs_spec, self.action_dim) * self.num_envs))

    @property
    def _held(self) -> np.ndarray:
        return np.minimum(self._next, self.size)

    @property
    def _columns(self) -> dict[str, np.ndarray]:
        """What lies in memory as rings."""
        obs = {f"obs/{k}": v for k, v in self._obs.items()}
        return {**obs, "prev_action": self._prev_action, "reward": self._reward, "flags": self._flags}

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
        n = len(where)
        if n == 0:
            return
        rows = self._checked(n, obs, prev_action, reward, is_first, is_last, is_terminal)
        if self._disk is not None:
            self._flush_if_full()
            self._disk.put(where, self._next[where], rows)
        at = where * self.size + self._next[where] % self.size
        for name, column in self._columns.items():
            column[at] = rows[name]
        last = (rows["flags"] & LAST) != 0
        self._next[where] += 1  # first: an exception behind it, as Ctrl-C, leaves no end of a row that is not there
        for stream in where[last].tolist():
            self._last_rows[stream].append(int(self._next[stream]) - 1)
        for stream in where.tolist():
            self._last_rows[stream].drop_before(int(self._next[stream]) - self.size)

    def extend(
        self,
        obs: Mapping[str, np.ndarray],
        prev_action: np.ndarray,
        reward: np.ndarray,
        is_first: np.ndarray,
        is_last: np.ndarray,
        is_terminal: np.ndarray,
        stream: int = 0,
    ) -> None:
        """Appends n rows to one stream, in order: what n times `add` does, at once."""
        self._check_streams(np.array([stream]))
        n = len(reward)
        rows = self._checked(n, obs, prev_action, reward, is_first, is_last, is_terminal)
        if self._disk is not None:  # a segment may fill up at any of them
            for i in range(n):
                one = [np.asarray(x)[i : i + 1] for x in (prev_action, reward, is_first, is_last, is_terminal)]
                self.add({k: np.asarray(x)[i : i + 1] for k, x in obs.items()}, *one, streams=[stream])
            return
        none = {name: column[:0] for name, column in self._columns.items()}
        stops = self._next + n * (np.arange(self.num_envs) == stream)
        header = segments.Header(0, tuple(self._next.tolist()), tuple(stops.tolist()))
        self._append(header, [rows if s == stream else none for s in range(self.num_envs)])

    def _checked(self, n: int, obs: Mapping[str, np.ndarray], prev_action, reward, is_first, is_last, is_terminal) -> dict:
        """n rows as columns. Raises ValueError on what does not fit."""
        first, last, terminal = (np.asarray(f, bool) for f in (is_first, is_last, is_terminal))
        prev_action, reward = np.asarray(prev_action, np.float32), np.asarray(reward, np.float32)
        rows = {k: np.asarray(obs[k]) for k in self.obs_spec if k in obs}
        self._check_obs(rows, obs, n)
        entries = {"reward": reward, "is_first": first, "is_last": last, "is_terminal": terminal}
        for name, value, shape in [(k, v, (n,)) for k, v in entries.items()] + [("prev_action", prev_action, (n, self.action_dim))]:
            if value.shape != shape:
                raise ValueError(f"Replay got {name} of shape {list(value.shape)}, expected {list(shape)}.")
        if not (np.isfinite(reward).all() and np.isfinite(prev_action).all()):
            raise ValueError("Replay got a reward or an action that is not finite. Check the environment's step().")
        if (terminal & ~last).any():
            raise ValueError("Replay got a row that is_terminal but not is_last: a world that ends closes its episode.")
        return {
            **{f"obs/{k}": x for k, x in rows.items()},
            "prev_action": np.where(first[:, None], np.float32(0), prev_action),
            "reward": np.where(first, np.float32(0), reward),
            "flags": (FIRST * first + LAST * last + TERMINAL * terminal).astype(np.uint8),
        }

    def _flush_if_full(self) -> None:
        """Writes the rows that wait for a segment once no more of them fit; where the disk is full, more of them may wait."""
        if not self._disk.is_full(self._next):
            return
        try:
            self.save(self._disk.folder)
        except StorageError as error:
            if not (self._disk.writable and self._disk.enlarge_buffer()):
                raise
            _log.warning("The replay could not be written; its rows wait in memory: %s", error)

    def _check_streams(self, where: np.ndarray) -> None:
        if where.ndim != 1 or len(set(where.tolist())) != len(where):
            raise ValueError(f"Replay takes one row per stream and call, but the streams were {where.tolist()}.")
        if len(where) and (where.min() < 0 or where.max() >= self.num_envs):
            raise ValueError(f"Replay has streams 0..{self.num_envs - 1}, but the streams were {where.tolist()}.")

    def _check_obs(self, rows: dict[str, np.ndarray], obs: Mapping[str, np.ndarray], n: int) -> None:
        if rows.keys() != obs.keys() or len(rows) != len(self.obs_spec):
            raise ValueError(f"Replay got observation keys {sorted(obs)}, expected {sorted(self.obs_spec)}.")
        for key, (shape, dtype) in self.obs_spec.items():
            if rows[key].shape != (n, *shape):
                raise ValueError(f"Replay got observation '{key}' of shape {list(rows[key].shape)}, expected {[n, *shape]}.")
            if rows[key].dtype != dtype and not np.can_cast(rows[key].dtype, dtype, "same_kind"):
                raise ValueError(f"Replay got observation '{key}' of dtype {rows[key].dtype}, expected {dtype}.")

    def recover(self, folder: Path, log: Callable[[str], object] = _log.warning) -> None:
        """Takes over what lies in a folder without marks, as far as it is intact and without a hole; this replay must be empty."""
        self._load_uncommitted(Path(folder), 0, True, log)
        self._restore_truncations()

    def truncate_open_episodes(self, streams: Sequence[int] | None = None) -> None:
        """Closes the open episodes of these streams (None: of all) as a truncation does: the newest row is_last, not is_terminal.

        For environments that cannot go on from where they were; the next row of each stream must open an episode.
        """
        for stream in np.flatnonzero(self._next).tolist() if streams is None else streams:
            self._mark_last(stream, int(self._next[stream]) - 1)

    def _mark_last(self, stream: int, sequence: int) -> None:
        at = stream * self.size + sequence % self.size
        if not self._flags[at] & LAST:
            self._flags[at] |= LAST
            self._last_rows[stream].append(sequence)

    def observations(self, stream: int, start: int, stop: int) -> dict[str, np.ndarray]:
        """{key: [stop - start, ...]} of the rows of one stream that come start.. after its oldest."""
        oldest = int(self._next[stream]) - self.lengths[stream]
        return {key: self._rows(f"obs/{key}", stream, oldest + start, oldest + stop) for key in self.obs_spec}

    def rewards(self, stream: int) -> np.ndarray:
        """All rewards [R] that one stream holds, in order; 0 where an episode begins."""
        after = int(self._next[stream])
        return self._rows("reward", stream, after - self.lengths[stream], after)

    # Out ------------------------------------------------------------------------------------------------------------

    def stream(self, number: int) -> Batch:
        """All rows [1, R] that one stream holds, in order, as tensors that share no memory with the store."""
        self._check_streams(np.array([number]))
        held = self.lengths[number]
        return self._gather(np.array([number]), self._next[[number]] - held, held)

    def sample(
        self, batch: int, length: int, rng: np.random.Generator, *, recent_fraction: float = 0.0, terminal_fraction: float = 0.0
    ) -> Batch:
        """`batch` windows of `length` consecutive rows, as tensors that share no memory with the store.

        recent_fraction  share of the windows that end at the newest row of a stream, streams in turn
        terminal_fraction    share of the windows drawn so that an is_last row (each alike) lies inside, where there is any
        The rest is uniform over all windows of all streams. A share that is no whole number of windows is
        rounded up or down at random, so that it holds on average. The same rng state gives the same batch.
        `weight` undoes the shares: its product with anything said of a window has, averaged over batches, the mean of that
        over all windows alike.
        Raises ValueError where no stream holds `length` rows.
        """
        if batch < 1 or length < 1:
            raise ValueError(f"A batch needs at least one window of one step, not {batch} x {length}.")
        if not (recent_fraction >= 0 and terminal_fraction >= 0 and recent_fraction + terminal_fraction <= 1):
            raise ValueError(
                f"Shares recent_fraction={recent_fraction} and terminal_fraction={terminal_fraction} must be at least 0 and add up to at most 1."
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
        at = streams[:, None] * self.size + sequence % self.size
        flags = self._flags[at[:, :-1]]
        is_last = (flags & LAST) != 0
        taken = self._prev_action[at]
        action = taken[:, 1:].copy()
        action[is_last | (sequence[:, 1:] == self._next[streams][:, None])] = 0
        return Batch(
            obs={k: torch.from_numpy(self._windows(k, streams, starts, at, length)) for k in self.obs_spec},
            action=torch.from_numpy(action),
            prev_action=torch.from_numpy(taken[:, :-1].copy()),
            reward=torch.from_numpy(self._reward[at[:, :-1]]),
            is_first=torch.from_numpy((flags & FIRST) != 0),
            is_last=torch.from_numpy(is_last),
            is_terminal=torch.from_numpy((flags & TERMINAL) != 0),
            row=torch.from_numpy(sequence[:, :-1] * self.num_envs + streams[:, None]),
        )

    def _windows(self, key: str, streams: np.ndarray, starts: np.ndarray, at: np.ndarray, length: int) -> np.ndarray:
        """[B, length, ...] of one observation; `at` [B, length + 1] are the rows' places in a ring."""
        if self._disk is not None:
            return self._disk.windows(f"obs/{key}", streams, starts, length)
        column = self._obs[key]
        if column.dtype.itemsize * int(np.prod(column.shape[1:])) < SLICE_BYTES:
            return column[at[:, :-1]]
        out = np.empty((len(streams), length, *column.shape[1:]), column.dtype)
        for b, (stream, offset) in enumerate(zip(streams.tolist(), (starts % self.size).tolist())):
            ring = column[stream * self.size : (stream + 1) * self.size]
            before = min(length, self.size - offset)  # rows up to the ring's physical end
            out[b, :before] = ring[offset : offset + before]
            out[b, before:] = ring[: length - before]
        return out

    # On disk --------------------------------------------------------------------------------------------------------

    def save(self, folder: Path, previous: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Writes the rows that `since` does not cover as new segments and returns the marks: JSON that `load` takes.

        since  marks of an earlier save of this replay into this folder, or None: everything held is written. A replay that
               lies in `folder` knows by itself what is there
        Marks name the segments that hold what the replay holds now; a checkpoint keeps them, and so commits the rows.
        Nothing is deleted here (see `sweep`), so that a kill or a full disk leaves earlier marks loadable.
        Raises StorageError where the disk is full or not writable.
        """
        folder, disk = Path(folder), self._disk
        if disk is not None:
            if folder != disk.folder or not disk.writable:
                raise StorageError(f"This replay lies in {disk.folder}, where its run writes it. It cannot be saved to {folder}.")
            previous = {"rows": disk.first_in_memory.tolist(), "segments": disk.entries, **self._identity()}
        checkpoint.make_folder(folder)
        taken = segments.numbers(folder)
        entries = self._entries_of(previous) if previous is not None else []
        folder_changed = previous is None or not {number for number, _ in entries} <= set(taken)
        if folder_changed and disk is None:
            previous, entries = {"rows": [0] * self.num_envs}, []
        entries = self._drop_evicted(folder, entries)
        if disk is not None:
            disk.keep(entries)

        low = np.maximum(np.array(previous["rows"], np.int64), self._next - self._held)
        columns, missing = self._column_spec, self._next - low
        number = max([*taken, *(n for n, _ in entries)], default=0)
        for done in range(0, int(missing.max()), self._rows_per_segment):
            number += 1
            starts, stops = (low + np.minimum(missing, upto) for upto in (done, done + self._rows_per_segment))
            header = segments.Header(number, tuple(starts.tolist()), tuple(stops.tolist()))
            try:
                entries.append([number, segments.write(folder, header, columns, self._rows)])
            except StorageError:  # a retry writes all of them anew: on a full disk the first ones must not be in its way
                if disk is None:
                    segments.delete(folder, [n for n, _ in entries if n not in taken])
                raise
            if disk is not None:
                disk.attach(segments.locate(folder, number, columns, self.num_envs), self._next)
        if missing.any():
            checkpoint.sync_folder(folder)
        return {"rows": self._next.tolist(), "segments": entries, **self._identity()}

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
        """The replay as it was when `marks` were made; with `on_disk`, its observations stay where they are (`writable`: as above).

        Rows saved later belong to a future that the checkpoint does not know: they are dropped, or kept with
        `keep_newer`, as far as they are intact; both is told to `log`. CorruptError names the file and the offset
        of damage to any row that the marks name.
        """
        replay = cls._from_identity(snapshot, folder if on_disk else None, writable)
        try:
            rows, entries = np.array(snapshot["rows"], np.int64), [(int(n), int(seal)) for n, seal in snapshot["segments"]]
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise CorruptError(f"The replay's marks are damaged: {error!r}.") from error
        low = np.zeros(replay.num_envs, np.int64)  # from here on, each stream's rows are without a hole
        for number, seal in entries:
            header, streams = segments.read(folder, number, replay._column_spec, replay.num_envs, seal)
            low = np.where(np.array(header.starts) == replay._next, low, header.starts)
            replay._append(header, streams)
            del streams  # before the next segment is read
        if rows.shape != low.shape or (replay._next != rows).any() or (low > rows - replay._held).any():
            raise CorruptError(f"{folder} does not hold the rows that the checkpoint names: segments are missing from its marks.")
        replay._load_uncommitted(folder, max((n for n, _ in entries), default=0), keep_newer, log)
        replay._restore_truncations()
        return replay

    @staticmethod
    def sweep(folder: Path, keep: Iterable[Mapping[str, Any]]) -> None:
        """Deletes the segments that none of the marks in `keep` names, and leftovers of interrupted writes.

        Call it with the marks of every checkpoint that is still there, after old ones were pruned.
        """
        checkpoint.sweep(folder)
        entries = {int(number) for snapshot in keep for number, _ in snapshot["segments"]}
        segments.delete(folder, [n for n in segments.numbers(folder) if n not in entries])

    @property
    def _column_spec(self) -> segments.Columns:
        obs = {f"obs/{k}": column for k, column in self.obs_spec.items()}
        return {**obs, **{k: (x.shape[1:], x.dtype) for k, x in self._columns.items() if k not in obs}}

    def _identity(self) -> dict[str, Any]:
        """What marks say about the replay that they are of."""
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
            raise CorruptError(f"The replay's marks are damaged: {error!r}.") from error

    def _entries_of(self, previous: Mapping[str, Any]) -> list[list[int]]:
        mine = self._identity()
        rows = np.array(previous["rows"])
        if any(previous.get(k) != v for k, v in mine.items()) or rows.shape != self._next.shape or (rows > self._next).any():
            raise ValueError("The marks given as `since` are of another replay. Pass what its last save returned, or None.")
        return [list(entry) for entry in previous["segments"]]

    def _drop_evicted(self, folder: Path, entries: list[list[int]]) -> list[list[int]]:
        """The segments that still hold a row that the ring holds: eviction goes from the oldest on."""
        oldest = self._next - self._held
        while entries:
            try:
                header = segments.read_header(folder, entries[0][0], self._column_spec, self.num_envs)
            except CorruptError:  # not this save's business: whoever loads the marks learns of it
                break
            if (np.array(header.stops) > oldest).any():
                break
            entries = entries[1:]
        return entries

    def _rows(self, name: str, stream: int, start: int, stop: int) -> np.ndarray:
        if self._disk is not None and name in self._disk.spec:
            return self._disk.windows(name, np.array([stream]), np.array([start]), stop - start)[0]
        return self._columns[name][stream * self.size + np.arange(start, stop) % self.size]

    def _append(self, header: segments.Header, streams: list[dict[str, np.ndarray]]) -> None:
        """Puts a segment's rows at their sequence numbers; on disk, its observations stay where they are."""
        if self._disk is not None:
            self._disk.attach(segments.locate(self._disk.folder, header.number, self._column_spec, self.num_envs), self._next)
        for stream, (start, stop) in enumerate(zip(header.starts, header.stops)):
            kept = max(start, stop - self.size)
            at = stream * self.size + np.arange(kept, stop) % self.size
            for name, column in self._columns.items():
                column[at] = streams[stream][name][kept - start :]
            for i in np.flatnonzero(streams[stream]["flags"] & LAST).tolist():
                self._last_rows[stream].append(start + i)
            self._next[stream] = stop
            self._last_rows[stream].drop_before(stop - self.size)

    def _restore_truncations(self) -> None:
        """Closes the episodes that `cut` had closed after their last row was on the disk: another one opens behind them."""
        for stream, held in enumerate(self._held.tolist()):
            kept = np.arange(self._next[stream] - held, self._next[stream])
            flags = self._flags[stream * self.size + kept % self.size]
            flags[:-1] |= np.where(flags[1:] & FIRST, LAST, 0).astype(np.uint8)
            self._flags[stream * self.size + kept % self.size] = flags
            self._last_rows[stream] = Ends()
            for sequence in kept[(flags & LAST) != 0].tolist():
                self._last_rows[stream].append(sequence)

    def _load_uncommitted(self, folder: Path, after: int, keep: bool, log: Callable[[str], object]) -> None:
        """Tells of what lies behind the marks and is dropped, or appends it as far as it is intact."""
        chain = segments.continuation(folder, after, self.added_by_stream, self._column_spec, log)
        if not keep:
            if chain:
                log(f"Replay: {sum(h.rows for h in chain)} steps newer than the checkpoint are dropped.")
            return
        count = 0
        for header in chain:
            try:
                self._append(*segments.read(folder, header.number, self._column_spec, self.num_envs))
            except CorruptError as error:
                log(f"A newer replay segment and all behind it are ignored: {error}")
                break
            count += header.rows
        log(f"Replay: {count} steps {'newer than the checkpoint' if after else 'without a checkpoint'} are kept.")


def row_bytes(obs: Mapping[str, tuple[Sequence[int], Any]], action_dim: int) -> int:
    """Bytes of one row: observation, action, reward and flags."""
    return segments.row_bytes({k: (tuple(shape), np.dtype(dtype)) for k, (shape, dtype) in obs.items()}) + 4 * action_dim + 5
