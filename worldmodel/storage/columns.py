"""Where the columns of a replay lie: rings in memory, or segments on the disk with a buffer of the newest rows in memory.

Both take rows by stream and sequence number and give windows of consecutive rows.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from worldmodel.errors import StorageError
from worldmodel.storage import segments

SLICE_BYTES = 1024
"""Rows of at least this size are copied as one slice per window: there, memcpy beats gathering row by row."""
MAX_BUFFER_GROWTH = 4
"""Times its size that the buffer may grow to while the disk is full."""


class MemoryColumns:
    """Columns in memory, one ring of `size` rows for each stream: row q of stream s lies at s * size + q modulo size.

    spec  {column: (shape of one row, dtype)}
    """

    def __init__(self, spec: segments.Columns, num_envs: int, size: int) -> None:
        self.spec, self.size = spec, size
        self._columns = {name: np.empty((num_envs * size, *shape), dtype) for name, (shape, dtype) in spec.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        """The column itself, [num_envs * size, ...], indexed by `at`."""
        return self._columns[name]

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return sum(column.nbytes for column in self._columns.values())

    def free_rows(self, next_rows: np.ndarray) -> int:
        """Rows of one stream that can be put at once."""
        return self.size

    def at(self, streams: np.ndarray, sequence: np.ndarray) -> np.ndarray:
        """Indices of the rows in the columns."""
        return streams * self.size + sequence % self.size

    def put(self, streams: np.ndarray, sequence: np.ndarray, rows: Mapping[str, np.ndarray]) -> None:
        """Rows [n, ...] of streams [n] or [1] at their sequence numbers [n]; no place may occur twice."""
        at = self.at(streams, sequence)
        for name, column in self._columns.items():
            column[at] = rows[name]

    def windows(self, name: str, streams: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
        """[B, length, ...] rows of one column, from sequence numbers `starts` [B] on."""
        column, (shape, dtype) = self._columns[name], self.spec[name]
        if dtype.itemsize * int(np.prod(shape)) < SLICE_BYTES:
            return column[self.at(streams[:, None], starts[:, None] + np.arange(length))]
        out = np.empty((len(streams), length, *shape), dtype)
        for rows, stream, offset in zip(out, streams.tolist(), (starts % self.size).tolist()):
            ring = column[stream * self.size : (stream + 1) * self.size]
            before = min(length, self.size - offset)  # rows up to the ring's physical end
            rows[:before] = ring[offset : offset + before]
            rows[before:] = ring[: length - before]
        return out


class DiskColumns:
    """Columns in the segments of a folder; memory holds only the rows that no segment holds yet.

    folder         where the segments lie
    spec           {column: (shape of one row, dtype)}
    segment_spec   the same of all columns of a segment
    buffer_rows    rows of each stream that the buffer in memory takes
    writable       False: the segments are another process's, and nothing is written beside them
    """

    def __init__(
        self,
        folder: Path,
        spec: segments.Columns,
        segment_spec: segments.Columns,
        num_envs: int,
        buffer_rows: int,
        writable: bool = True,
    ) -> None:
        self.folder, self.spec, self.segment_spec, self.writable = Path(folder), spec, segment_spec, writable
        self.first_in_memory = np.zeros(num_envs, np.int64)
        """Sequence number of each stream's first row that no segment holds."""
        self._buffer_rows = buffer_rows
        self._buffer = {name: np.empty((num_envs, buffer_rows, *shape), dtype) for name, (shape, dtype) in spec.items()}
        self._segments: list[segments.StoredSegment] = []
        self._index_by_stream()

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return sum(column.nbytes for column in self._buffer.values())

    @property
    def entries(self) -> list[list[int]]:
        """[number, seal] of the segments, oldest first."""
        return [[segment.header.number, segment.seal] for segment in self._segments]

    def free_rows(self, next_rows: np.ndarray) -> int:
        """Rows that the buffer still takes of each stream; next_rows [S] are their next sequence numbers."""
        return self._buffer_size - int((next_rows - self.first_in_memory).max())

    @property
    def _buffer_size(self) -> int:
        return next(iter(self._buffer.values())).shape[1]

    def enlarge_buffer(self) -> bool:
        """Makes room for rows that could not be written; False where it has grown too large already."""
        if not self.writable or self._buffer_size >= MAX_BUFFER_GROWTH * self._buffer_rows:
            return False
        for name, column in self._buffer.items():
            more = np.empty((len(column), self._buffer_rows, *column.shape[2:]), column.dtype)
            self._buffer[name] = np.concatenate([column, more], 1)
        return True

    def check_writes_to(self, folder: Path) -> None:
        """StorageError where the rows cannot be saved to this folder."""
        if folder != self.folder or not self.writable:
            raise StorageError(f"This replay lies in {self.folder}, where its run writes it. It cannot be saved to {folder}.")

    def put(self, streams: np.ndarray, sequence: np.ndarray, rows: Mapping[str, np.ndarray]) -> None:
        """Rows [n, ...] of streams [n] or [1] at their sequence numbers [n], which the buffer must have free rows for."""
        at = sequence - self.first_in_memory[streams]
        for name, column in self._buffer.items():
            column[streams, at] = rows[name]

    def attach(self, number: int, next_rows: np.ndarray) -> None:
        """Reads the rows of a segment, which follow those before it, from there from now on.

        next_rows  [S] sequence number of each stream's next row: those from the segment's end on stay in the buffer
        """
        segment = segments.locate(self.folder, number, self.segment_spec, len(next_rows))
        stops = np.array(segment.header.stops)
        gone, kept = stops - self.first_in_memory, np.maximum(next_rows - stops, 0)
        for stream, (first, count) in enumerate(zip(gone.tolist(), kept.tolist())):
            for column in self._buffer.values():
                column[stream, :count] = column[stream, first : first + count]
        self.first_in_memory = stops
        self._segments.append(segment)
        self._index_by_stream()

    def keep(self, entries: list[list[int]]) -> None:
        """Forgets the segments that are not named."""
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
