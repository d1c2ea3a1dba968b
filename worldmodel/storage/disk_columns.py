"""Observations that lie on the disk: a replay larger than memory.

Rows of sealed segments (`segments.py`) are read where they lie; the newest ones wait in memory until a segment takes them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from worldmodel.storage import segments

MAX_BUFFER_GROWTH = 4
"""Times its room that the waiting rows may grow to while the disk is full."""


class DiskColumns:
    """Columns of rows, of which memory holds only those that no segment holds yet.

    folder    where the segments lie
    spec      {column: (shape of one row, dtype)}
    room      rows of each stream that wait in memory
    writable  False: the segments are another process's, and nothing is written beside them
    """

    def __init__(self, folder: Path, spec: segments.Columns, num_envs: int, buffer_rows: int, writable: bool = True):
        self.folder, self.spec, self.buffer_rows, self.writable = Path(folder), spec, buffer_rows, writable
        self.entries: list[list[int]] = []
        """[number, seal] of the segments, oldest first."""
        self.first_in_memory = np.zeros(num_envs, np.int64)
        """Sequence number of each stream's first row that no segment holds."""
        self._buffer = {name: np.empty((num_envs, buffer_rows, *shape), dtype) for name, (shape, dtype) in spec.items()}
        self._segments: list[segments.StoredSegment] = []
        self._index_by_stream()

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return sum(column.nbytes for column in self._buffer.values())

    @property
    def _buffer_size(self) -> int:
        return next(iter(self._buffer.values())).shape[1]

    def is_full(self, next_rows: np.ndarray) -> bool:
        """Whether a stream whose next row is following[s] has no place for it in memory."""
        return bool((next_rows - self.first_in_memory >= self._buffer_size).any())

    def enlarge_buffer(self) -> bool:
        """Makes place for rows that could not be written; False where too many of them wait already."""
        if self._buffer_size >= MAX_BUFFER_GROWTH * self.buffer_rows:
            return False
        for name, column in self._buffer.items():
            more = np.empty((len(column), self.buffer_rows, *column.shape[2:]), column.dtype)
            self._buffer[name] = np.concatenate([column, more], 1)
        return True

    def put(self, streams: np.ndarray, sequence: np.ndarray, rows: Mapping[str, np.ndarray]) -> None:
        """One row [n, ...] of each of n streams, at its sequence number [n]."""
        at = sequence - self.first_in_memory[streams]
        for name, column in self._buffer.items():
            column[streams, at] = rows[name]

    def attach(self, segment: segments.StoredSegment, next_rows: np.ndarray) -> None:
        """From now on the rows of this segment, which follow those before it, are read from there.

        following  [S] sequence number of each stream's next row: those from the segment's end up to there go on waiting
        """
        stops = np.array(segment.header.stops)
        for stream, (gone, left) in enumerate(
            zip((stops - self.first_in_memory).tolist(), np.maximum(next_rows - stops, 0).tolist())
        ):
            for column in self._buffer.values():
                column[stream, :left] = column[stream, gone : gone + left]
        self.first_in_memory = stops
        self.entries.append([segment.header.number, segment.seal])
        self._segments.append(segment)
        self._index_by_stream()

    def keep(self, entries: list[list[int]]) -> None:
        """Forgets the segments that are not named."""
        self.entries = [list(entry) for entry in entries]
        numbers = {number for number, _ in entries}
        self._segments = [segment for segment in self._segments if segment.header.number in numbers]
        self._index_by_stream()

    def _index_by_stream(self) -> None:
        self._by_stream = []
        for stream in range(len(self.first_in_memory)):
            mine = [s for s in self._segments if s.header.starts[stream] < s.header.stops[stream]]
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
        done, border = 0, int(self.first_in_memory[stream])
        starts, mine = self._by_stream[stream]
        while done < len(out) and start + done < border:
            segment = mine[bisect_right(starts, start + done) - 1]
            upto = min(len(out), segment.header.stops[stream] - start)
            segments.read_rows(segment, name, stream, start + done, out[done:upto])
            done = upto
        if done < len(out):
            first = start + done - border
            out[done:] = self._buffer[name][stream, first : first + len(out) - done]
