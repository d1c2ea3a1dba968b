"""Files of replay rows: `segment-000000001.bin`, written once, never changed, each byte under a CRC32.

    magic | header length | header CRC | header JSON | (block | block CRC) ... | seal

All integers are little-endian uint32. The header says the segment's number, the columns (name, shape of one row, dtype)
and, for every stream, the sequence numbers [start, stop) that it holds. The blocks follow, stream by stream and column by
column, rows in order; their sizes are known from the header. The seal chains all CRCs: a reader that names a segment by number
and seal (a checkpoint's snapshot of the replay) notices a segment of another run, or of an attempt that was given up, too.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import numpy as np

from worldmodel.errors import CorruptError
from worldmodel.storage.files import dump_json, parse_json, replacing, storage_errors

MAGIC = b"WMREPLAY"
VERSION = 1
MAX_BYTES = 64 << 20
"""Rows beyond this size start another segment, so that eviction frees the disk in small steps."""
MAX_HEADER = 16 << 20
_NAME = re.compile(r"segment-(\d{9})\.bin")
_UINT = struct.Struct("<I")

Columns = dict[str, tuple[tuple[int, ...], np.dtype]]
"""{name: (shape of one row, dtype)}, in the order of the blocks."""


@dataclass(frozen=True)
class Header:
    """What a segment says of itself: per stream the sequence numbers starts[s] .. stops[s] - 1 that it holds."""

    number: int
    starts: tuple[int, ...]
    stops: tuple[int, ...]

    @property
    def rows(self) -> int:
        return sum(self.stops) - sum(self.starts)


@dataclass(frozen=True)
class StoredSegment:
    """A segment whose rows are read where they lie; `offsets` are of the first byte of each block (stream, column)."""

    path: Path
    header: Header
    seal: int
    offsets: dict[tuple[int, str], int]


def path_of(folder: Path, number: int) -> Path:
    return Path(folder) / f"segment-{number:09d}.bin"


def numbers(folder: Path) -> list[int]:
    """Numbers of the segments in the folder, ascending; empty where it does not exist."""
    with storage_errors("read", Path(folder)):
        try:
            return sorted(int(m[1]) for p in Path(folder).iterdir() if (m := _NAME.fullmatch(p.name)))
        except FileNotFoundError:
            return []


def columns_to_json(columns: Columns) -> dict[str, list]:
    return {name: [list(shape), dtype.newbyteorder("<").str] for name, (shape, dtype) in columns.items()}


def row_bytes(columns: Columns) -> int:
    return sum(prod(shape) * dtype.itemsize for shape, dtype in columns.values())


def write(folder: Path, header: Header, columns: Columns, block: Callable[[str, int, int, int], np.ndarray]) -> int:
    """Writes a segment, forced to the disk, and returns its seal. `block(column, stream, start, stop)` gives the rows."""
    streams = [[start, stop] for start, stop in zip(header.starts, header.stops)]
    header_json = dump_json({"version": VERSION, "number": header.number, "columns": columns_to_json(columns), "streams": streams})
    length = _UINT.pack(len(header_json))
    seal = zlib.crc32(header_json, zlib.crc32(length))
    with replacing(path_of(folder, header.number)) as file:
        file.write(MAGIC + length + _UINT.pack(seal) + header_json)
        for stream, (start, stop) in enumerate(streams):
            for name, (_, dtype) in columns.items():
                if start < stop:
                    rows = np.ascontiguousarray(block(name, stream, start, stop), dtype.newbyteorder("<"))
                    data = rows.reshape(-1).view(np.uint8).data
                    crc = _UINT.pack(zlib.crc32(data))
                    file.write(data)
                    file.write(crc)
                    seal = zlib.crc32(crc, seal)
        file.write(_UINT.pack(seal))
    return seal


def read_header(folder: Path, number: int, columns: Columns, num_streams: int) -> Header:
    """The header alone; CorruptError naming file and offset where it is damaged or of other columns."""
    path = path_of(folder, number)
    with _opened(path) as file:
        return _header(file, path, number, columns, num_streams)[0]


def read(
    folder: Path, number: int, columns: Columns, num_streams: int, seal: int | None = None
) -> tuple[Header, list[dict[str, np.ndarray]]]:
    """(header, per stream {column: rows}), after every byte agreed with its CRC and the whole with `seal`.

    CorruptError names the file and the offset of the block that differs.
    """
    path = path_of(folder, number)
    with _opened(path) as file:
        header, found = _header(file, path, number, columns, num_streams)
        streams = []
        for start, stop in zip(header.starts, header.stops):
            rows = {}
            for name, (shape, dtype) in columns.items():
                rows[name] = np.empty((stop - start, *shape), dtype.newbyteorder("<"))
                if start < stop:
                    found = zlib.crc32(_fill(file, rows[name], path), found)
            streams.append(rows)
        at = file.tell()
        if file.read() != _UINT.pack(found):
            raise CorruptError(f"{path} is damaged at offset {at}: its seal differs from its content.")
        if seal is not None and found != seal:
            raise CorruptError(f"{path} is not the file that the checkpoint names (seal {found}, expected {seal}, at offset {at}).")
    return header, streams


def continuation(
    folder: Path, after: int, reached: tuple[int, ...], size: int, columns: Columns, log: Callable[[str], object]
) -> list[Header]:
    """Headers of the segments behind number `after` that go on from the sequence numbers `reached` [S] of rings of `size` rows.

    A later file that starts further back is a retry: it replaces what it repeats. Rows may be missing where those behind them
    fill the rings: the missing ones were evicted before any save.
    """
    best: list[Header] = []
    tried: list[Header] = []  # lacks rows that those behind them do not replace yet
    for number in numbers(folder):
        if number <= after:
            continue
        try:
            header = read_header(folder, number, columns, len(reached))
            base = best if header.starts in [reached, *(h.stops for h in best)] else tried
            stops = [reached, *(h.stops for h in base)]
            before = [i for i, stop in enumerate(stops) if all(a <= b for a, b in zip(stop, header.starts))]
            if not before:
                continue
            chain = [*base[: before[-1]], header]
            behind_hole = _rows_behind_hole(reached, chain)
            if behind_hole.min() < np.inf:  # then it takes the place of rows, so it must be whole
                read(folder, number, columns, len(reached))
        except CorruptError as error:
            log(f"A newer replay segment is ignored: {error}")
            continue
        tried = chain
        if behind_hole.min() >= size:
            best = chain
    return best


def _rows_behind_hole(reached: tuple[int, ...], chain: list[Header]) -> np.ndarray:
    """Rows of each stream [S] behind the last that is missing; infinity where none is."""
    rows, stops = np.full(len(reached), np.inf), reached
    for header in chain:
        rows = np.where(np.equal(header.starts, stops), rows, 0) + np.subtract(header.stops, header.starts)
        stops = header.stops
    return rows


def locate(folder: Path, number: int, columns: Columns, num_streams: int) -> StoredSegment:
    """A segment's header, seal and where its blocks lie, by what `write` laid down; nothing else of it is read."""
    path = path_of(folder, number)
    with _opened(path) as file:
        header, _ = _header(file, path, number, columns, num_streams)
        at, offsets = file.tell(), {}
        for stream, (start, stop) in enumerate(zip(header.starts, header.stops)):
            for name, (shape, dtype) in columns.items():
                if start < stop:
                    offsets[stream, name] = at
                    at += (stop - start) * prod(shape) * dtype.itemsize + 4
        file.seek(at)
        return StoredSegment(path, header, _UINT.unpack(_take(file, 4))[0], offsets)


def read_rows(segment: StoredSegment, name: str, stream: int, start: int, out: np.ndarray) -> None:
    """Fills `out` with rows from sequence number `start` on. Their bytes are not compared with the block's CRC: `read` does that.

    Plain reads, no memory map: where a file shrinks or a disk fails, an error comes and no signal.
    """
    data = out.reshape(-1).view(np.uint8).data
    at = segment.offsets[stream, name] + (start - segment.header.starts[stream]) * (out.nbytes // max(1, len(out)))
    with _opened(segment.path) as file:
        file.seek(at)
        if file.readinto(data) != len(data):
            raise EOFError


def delete(folder: Path, which: list[int]) -> None:
    for number in which:
        with storage_errors("delete", path := path_of(folder, number)):
            path.unlink(missing_ok=True)


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    with storage_errors("read", path):
        try:
            if not path.is_file():
                raise CorruptError(f"{path} is missing. Restore it from a copy, or resume from another checkpoint.")
            with open(path, "rb") as file:
                yield file
        except (EOFError, struct.error) as error:
            raise CorruptError(f"{path} is cut off at offset {path.stat().st_size}.") from error


def _take(file: BinaryIO, count: int) -> bytes:
    data = file.read(count)
    if len(data) != count:
        raise EOFError
    return data


def _header(file: BinaryIO, path: Path, number: int, columns: Columns, num_streams: int) -> tuple[Header, int]:
    """(header, its CRC). The file's size is compared with what the header implies before anything is allocated."""
    if _take(file, len(MAGIC)) != MAGIC:
        raise CorruptError(f"{path} is no replay segment: its magic at offset 0 differs.")
    length = _take(file, 4)
    crc = _take(file, 4)
    count = _UINT.unpack(length)[0]
    header_json = _take(file, min(count, MAX_HEADER))
    found = zlib.crc32(header_json, zlib.crc32(length))
    if _UINT.pack(found) != crc:
        raise CorruptError(f"{path} is damaged at offset {len(MAGIC)}: its header's CRC differs.")
    at = f"at offset {len(MAGIC) + 8}"
    value = parse_json(header_json, f"{path}, {at},")
    if value.get("version") != VERSION:
        raise CorruptError(f"{path} has, {at}, format version {value.get('version')}; this version reads {VERSION}.")
    if value.get("number") != number or value.get("columns") != columns_to_json(columns):
        number = value.get("number")
        raise CorruptError(f"{path} says, {at}, that it is segment {number} of a replay with other columns; or it was renamed.")
    streams = value.get("streams")
    if not isinstance(streams, list) or len(streams) != num_streams or not all(map(_is_range, streams)):
        raise CorruptError(f"{path} does not hold {num_streams} streams, as its header {at} should say.")
    header = Header(number, tuple(a for a, _ in streams), tuple(b for _, b in streams))
    blocks = len(columns) * sum(a < b for a, b in streams)
    implied = file.tell() + header.rows * row_bytes(columns) + 4 * blocks + 4
    size = path.stat().st_size
    if size != implied:
        raise CorruptError(f"{path} has {size} bytes, but its header implies {implied}: it differs at offset {min(size, implied)}.")
    return header, found


def _is_range(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(v) is int for v in value) and 0 <= value[0] <= value[1] < 2**62


def _fill(file: BinaryIO, rows: np.ndarray, path: Path) -> bytes:
    """Reads one block into `rows` and returns its CRC as it was written."""
    at = file.tell()
    data = rows.reshape(-1).view(np.uint8).data
    if file.readinto(data) != len(data):
        raise EOFError
    crc = _take(file, 4)
    if _UINT.pack(zlib.crc32(data)) != crc:
        raise CorruptError(f"{path} is damaged at offset {at}: a block's CRC differs. Restore it, or use another checkpoint.")
    return crc
