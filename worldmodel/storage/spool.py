"""Observations that lie on the disk: a replay larger than memory.

Rows of sealed segments (`segments.py`) are read where they lie; the newest ones wait in memory until a segment takes them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from worldmodel.storage import segments

MOST_ROOMS = 4
"""Times its room that the waiting rows may grow to while the disk is full."""


class Spool:
    """Columns of rows, of which memory holds only those that no segment holds yet.

    folder    where the segments lie
    spec      {column: (shape of one row, dtype)}
    room      rows of each stream that wait in memory
    writable  False: the segments are another process's, and nothing is written beside them
    """

    def __init__(self, folder: Path, spec: segments.Columns, num_envs: int, room: int, writable: bool = True):
        self.folder, self.spec, self.room, self.writable = Path(folder), spec, room, writable
        self.named: list[list[int]] = []
        """[number, seal] of the segments, oldest first."""
        self.sealed = np.zeros(num_envs, np.int64)
        """Sequence number of each stream's first row that no segment holds."""
        self._waiting = {name: np.empty((num_envs, room, *shape), dtype) for name, (shape, dtype) in spec.items()}
        self._held: list[segments.Sealed] = []
        self._sort()

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return sum(column.nbytes for column in self._waiting.values())

    @property
    def _places(self) -> int:
        return next(iter(self._waiting.values())).shape[1]

    def is_full(self, following: np.ndarray) -> bool:
        """Whether a stream whose next row is following[s] has no place for it in memory."""
        return bool((following - self.sealed >= self._places).any())

    def grow(self) -> bool:
        """Makes place for rows that could not be written; False where too many of them wait already."""
        if self._places >= MOST_ROOMS * self.room:
            return False
        for name, column in self._waiting.items():
            more = np.empty((len(column), self.room, *column.shape[2:]), column.dtype)
            self._waiting[name] = np.concatenate([column, more], 1)
        return True

    def put(self, streams: np.ndarray, sequence: np.ndarray, rows: Mapping[str, np.ndarray]) -> None:
        """One row [n, ...] of each of n streams, at its sequence number [n]."""
        at = sequence - self.sealed[streams]
        for name, column in self._waiting.items():
            column[streams, at] = rows[name]

    def hold(self, segment: segments.Sealed, following: np.ndarray) -> None:
        """From now on the rows of this segment, which follow those before it, are read from there.

        following  [S] sequence number of each stream's next row: those from the segment's end up to there go on waiting
        """
        stops = np.array(segment.header.stops)
        for stream, (gone, left) in enumerate(zip((stops - self.sealed).tolist(), np.maximum(following - stops, 0).tolist())):
            for column in self._waiting.values():
                column[stream, :left] = column[stream, gone : gone + left]
        self.sealed = stops
        self.named.append([segment.header.number, segment.seal])
        self._held.append(segment)
        self._sort()

    def keep(self, named: list[list[int]]) -> None:
        """Forgets the segments that are not named."""
        self.named = [list(entry) for entry in named]
        numbers = {number for number, _ in named}
        self._held = [segment for segment in self._held if segment.header.number in numbers]
        self._sort()

    def _sort(self) -> None:
        self._by_stream = []
        for stream in range(len(self.sealed)):
            mine = [s for s in self._held if s.header.starts[stream] < s.header.stops[stream]]
            self._by_stream.append(([s.header.starts[stream] for s in mine], mine))

    def windows(self, name: str, streams: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
        """[B, length, ...] rows of one column, from sequence numbers `starts` [B] on. CorruptError where a file is gone or cut."""
        shape, dtype = self.spec[name]
        out = np.empty((len(streams), length, *shape), dtype)
        for rows, stream, start in zip(out, streams.tolist(), starts.tolist()):
            self._fill(rows, name, stream, start)
        return out

    def _fill(self, out: np.ndarray, name: str, stream: int, start: int) -> None:
        """Rows of one stream from `start` on: from as many segments as they lie in, then from memory."""
        done, border = 0, int(self.sealed[stream])
        starts, mine = self._by_stream[stream]
        while done < len(out) and start + done < border:
            segment = mine[bisect_right(starts, start + done) - 1]
            upto = min(len(out), segment.header.stops[stream] - start)
            segments.read_rows(segment, name, stream, start + done, out[done:upto])
            done = upto
        if done < len(out):
            first = start + done - border
            out[done:] = self._waiting[name][stream, first : first + len(out) - done]
