"""What TensorBoard shows of a run: images, texts, hyperparameters, charts and points; and reading a run's event files back.

`writer` is a `torch.utils.tensorboard.SummaryWriter`; what is written goes into its one event file, never into a sub-run.
"""

from __future__ import annotations

import io
import itertools
import math
import os
import re
import socket
import struct
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from google.protobuf import text_format
from google.protobuf.message import DecodeError
from PIL import Image, UnidentifiedImageError
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import CRC_TABLE

from worldmodel.errors import ConfigError, CorruptError, StorageError, did_you_mean
from worldmodel.storage.files import storage_errors, write

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

POINTS, THUMBNAIL = 1000, 48
"""The projector's largest number of points, and of pixels a side of a point's image: a sprite of 1536 px, far below 8192."""

LAYOUT = {
    "World model": {
        "error over persistence, by horizon": ["Multiline", ["world/ratio/.*"]],
        "losses": ["Multiline", ["world/loss/.*"]],
    },
    "Agent": {
        "real and imagined return": ["Multiline", ["dream/real_return$", "dream/imagined_return$"]],
        "return of an episode": ["Multiline", ["rollout/ep_rew_mean$", "eval/mean_reward$"]],
    },
}
"""The custom charts: {category: {title: [kind, regular expressions of tags]}}."""

_TEXT_SUFFIX = "/text_summary"  # torch appends it to a text's tag
_files = itertools.count()

# Writing --------------------------------------------------------------------------------------------------------------


class EventFile:
    """An event file that survives a full disk: what cannot be written waits in memory until there is space again.

    It replaces TensorBoard's EventFileWriter, whose thread ends at the first error and takes the run with it.

    warn  gets one line when writing begins to fail
    """

    FLUSH_BYTES, MAX_BUFFER_BYTES = 1 << 20, 64 << 20

    def __init__(self, folder: Path, warn: Callable[[str], object]):
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_files)}"
        self.path, self._warn = Path(folder) / name, warn
        self._buffer, self._failing = bytearray(), False
        self.add_event(Event(wall_time=time.time(), file_version="brain.Event:2"))
        self.flush()

    def add_event(self, event: Event) -> None:
        body = event.SerializeToString()
        length = struct.pack("<Q", len(body))
        record = length + _masked(length) + body + _masked(body)
        if len(self._buffer) + len(record) <= self.MAX_BUFFER_BYTES or not self._failing:
            self._buffer += record
        if len(self._buffer) >= self.FLUSH_BYTES and not self._failing:
            self.flush()

    def flush(self) -> None:
        """Writes what waits. A part that is written stays: the rest of its record follows at the next flush."""
        try:
            with storage_errors("write", self.path), open(self.path, "ab", buffering=0) as file:
                while self._buffer:
                    del self._buffer[: file.write(self._buffer)]
            self._failing = False
        except StorageError as error:
            if not self._failing:
                self._warn(f"{error} What is logged waits in memory, up to {self.MAX_BUFFER_BYTES >> 20} MiB.")
            self._failing = True

    def close(self) -> None:
        self.flush()

    def get_logdir(self) -> str:
        return str(self.path.parent)


def image(writer: SummaryWriter, tag: str, encoded: bytes, step: int) -> None:
    """Writes a GIF or PNG, byte for byte, so that an animation stays one. Raises ValueError on other bytes."""
    try:
        with Image.open(io.BytesIO(encoded), formats=("GIF", "PNG")) as picture:
            width, height = picture.size
    except UnidentifiedImageError:
        raise ValueError(f"The image '{tag}' is neither a GIF nor a PNG: it begins with {encoded[:8]!r}.") from None
    content = Summary.Image(encoded_image_string=encoded, height=height, width=width, colorspace=3)
    # add_image would decode and encode it again, which keeps only the first frame of an animation
    writer._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=tag, image=content)]), step)


def text(writer: SummaryWriter, tag: str, content: str, step: int) -> None:
    """Writes a text that the Text tab shows as it stands (YAML, code): indented, Markdown leaves it alone."""
    writer.add_text(tag, textwrap.indent(content, "    "), step)


def hparams(writer: SummaryWriter, options: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
    """Names the run's options and the tags of its metrics for the HParams tab; the metrics' values are not written here.

    Options that are no bool, int, float or str are written as str, None is left out. Raises ValueError without metrics:
    TensorBoard shows no run that has none.
    """
    if not metrics:
        raise ValueError("hparams needs at least one metric, the tag of a scalar that this run writes, such as 'eval/mean_reward'.")
    from torch.utils.tensorboard.summary import hparams as summaries  # slow to import

    plain = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in options.items() if v is not None}
    for summary in summaries(plain, dict(metrics)):
        writer._get_file_writer().add_summary(summary)


def layout(writer: SummaryWriter) -> None:
    """Puts related scalars into one chart of the Custom Scalars tab; see `LAYOUT`."""
    writer.add_custom_scalars(LAYOUT)


# Projector ------------------------------------------------------------------------------------------------------------


def projector(
    folder: Path, latents: np.ndarray, metadata: Mapping[str, Sequence[Any]], thumbnails: np.ndarray | None = None
) -> None:
    """Writes points for the Projector tab of the run in `folder`, in place of earlier ones.

    latents     [N, Z], finite; at most `POINTS` of them are written, evenly over N
    metadata    {column: N values}; tabs and line breaks become spaces
    thumbnails  uint8 [N, H, W, 3], reduced to `THUMBNAIL` pixels, or None

    Each file is replaced at once, the configuration last. Raises ValueError on shapes that differ, StorageError.
    """
    from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig

    latents = np.asarray(latents)
    _check_points(latents, metadata, thumbnails)
    chosen = np.linspace(0, len(latents) - 1, min(len(latents), POINTS)).round().astype(int)
    config = ProjectorConfig()
    entry = config.embeddings.add(tensor_name="latents", tensor_path="projector/tensors.tsv")
    files = {"tensors.tsv": _table([f"{x:.7g}" for x in row] for row in latents[chosen].tolist())}
    if metadata:
        header = [list(metadata)] if len(metadata) > 1 else []  # TensorBoard takes one column without
        files["metadata.tsv"] = _table([*header, *([values[i] for values in metadata.values()] for i in chosen)])
        entry.metadata_path = "projector/metadata.tsv"
    if thumbnails is not None:
        files["sprite.png"], size = _sprite(thumbnails[chosen])
        entry.sprite.image_path = "projector/sprite.png"
        entry.sprite.single_image_dim.extend(size)
    for name in ("tensors.tsv", "metadata.tsv", "sprite.png"):
        path = Path(folder) / "projector" / name
        if name in files:
            write(path, files[name])
        else:
            with storage_errors("delete", path):
                path.unlink(missing_ok=True)
    write(Path(folder) / "projector_config.pbtxt", text_format.MessageToString(config).encode())


def _check_points(latents: np.ndarray, metadata: Mapping[str, Sequence[Any]], thumbnails: np.ndarray | None) -> None:
    if latents.ndim != 2 or 0 in latents.shape:
        raise ValueError(f"The projector's latents are an array [N, Z] with at least one point, not {list(latents.shape)}.")
    if not np.isfinite(latents).all():
        raise ValueError("The projector's latents hold a value that is not finite, which TensorBoard cannot place.")
    for name, values in metadata.items():
        if len(values) != len(latents):
            raise ValueError(f"The projector's column '{name}' has {len(values)} values, but there are {len(latents)} latents.")
    if thumbnails is None:
        return
    shape = thumbnails.shape
    if thumbnails.dtype != np.uint8 or len(shape) != 4 or shape[0] != len(latents) or shape[3] != 3 or 0 in shape:
        wanted = f"uint8 [{len(latents)}, H, W, 3]"
        raise ValueError(f"The projector's thumbnails are {wanted}, not {thumbnails.dtype} {list(shape)}.")


def _table(rows: Iterable[Iterable[Any]]) -> bytes:
    """Tab-separated lines. No cell is empty: a blank line would be skipped, and every label after it would move up by one."""
    lines = ["\t".join(" ".join(re.split(r"[\t\r\n]+", str(cell))).strip() or "-" for cell in row) for row in rows]
    return "".join(line + "\n" for line in lines).encode()


def _sprite(thumbnails: np.ndarray) -> tuple[bytes, tuple[int, int]]:
    """(PNG, (width, height) of a tile): the images in rows of a square grid, as TensorBoard counts them."""
    height, width = thumbnails.shape[1:3]
    scale = min(1.0, THUMBNAIL / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    side = math.ceil(math.sqrt(len(thumbnails)))
    sheet = Image.new("RGB", (side * size[0], side * size[1]))
    for i, picture in enumerate(thumbnails):
        tile = Image.fromarray(np.ascontiguousarray(picture))
        sheet.paste(tile.resize(size, Image.Resampling.BOX) if scale < 1 else tile, (i % side * size[0], i // side * size[1]))
    out = io.BytesIO()
    sheet.save(out, format="PNG")
    return out.getvalue(), size


# Reading --------------------------------------------------------------------------------------------------------------


@dataclass
class Events:
    """{tag: [(step, value)]} in order of step: numbers, encoded images as bytes, and texts."""

    scalars: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    images: dict[str, list[tuple[int, bytes]]] = field(default_factory=dict)
    texts: dict[str, list[tuple[int, str]]] = field(default_factory=dict)


def read(folder: Path) -> Events:
    """What a run's event files hold, over all of them. Numbers have the precision they are stored with, 32 bits.

    Where a resumed run began at step S (the writer's `purge_step`), earlier files' points from S on are left out, as
    TensorBoard leaves them out. Both checksums of each record are verified. A record that is cut off at the end of a file is
    what a running or killed writer leaves; everything before it is returned.

    ConfigError where there is no folder or no event file, CorruptError with file and offset on damage and on foreign files.
    """
    found: dict[tuple[str, str], list[tuple[int, Any]]] = {}
    plugins: dict[str, str] = {}
    for file in _event_files(Path(folder)):
        for event in _events(file):
            if event.HasField("session_log") and event.session_log.status == SessionLog.START:
                found = {key: [point for point in points if point[0] < event.step] for key, points in found.items()}
            for value in event.summary.value:
                kind, contents = _contents(value, plugins)
                tag = value.tag.removesuffix(_TEXT_SUFFIX) if kind == "texts" else value.tag
                found.setdefault((kind, tag), []).extend((event.step, content) for content in contents)
    events = Events()
    for (kind, tag), points in found.items():
        if points:
            getattr(events, kind)[tag] = sorted(points, key=lambda point: point[0])
    return events


def _event_files(folder: Path) -> list[Path]:
    """Oldest first, by the numbers in their names: the time, and of one second the process's own count."""
    with storage_errors("read", folder):
        if not folder.is_dir():
            state = "is a file" if folder.exists() else "does not exist"
            near = did_you_mean(folder.name, [p.name for p in folder.parent.glob("*") if p.is_dir()])
            raise ConfigError(f"{folder} {state}. Expected the folder that TensorBoard's event files lie in.{near}")
        found = (p for p in folder.glob("*tfevents*") if p.is_file())
        files = sorted(found, key=lambda p: [(int(n or 0), text) for n, text in re.findall(r"(\d*)(\D*)", p.name)])
        if not files:
            below = sorted({str(p.parent) for depth in ("*/", "*/*/") for p in folder.glob(f"{depth}*tfevents*")})
            hint = f" There are some in {', '.join(below[:3])}." if below else " Was the run started with TensorBoard logging?"
            raise ConfigError(f"{folder} holds no event file (expected 'events.out.tfevents.*').{hint}")
        return files


def _contents(value: Any, plugins: dict[str, str]) -> tuple[str, list[Any]]:
    """(field of `Events`, contents) of one summary value; none of a kind that `Events` has no field for."""
    stored = value.WhichOneof("value")
    if stored == "simple_value":
        return "scalars", [value.simple_value]
    if stored == "image":
        return "images", [value.image.encoded_image_string]
    # TensorFlow's writers name the plugin with a tag's first value only
    plugin = plugins.setdefault(value.tag, value.metadata.plugin_data.plugin_name) if stored == "tensor" else None
    if plugin not in ("text", "scalars", "images"):
        return "", []
    from tensorboard.util.tensor_util import make_ndarray

    found = make_ndarray(value.tensor).reshape(-1).tolist()
    if plugin == "scalars":
        return "scalars", [float(found[0])]
    if plugin == "images":  # width, height, frames
        return "images", found[2:]
    content = "\n".join(part.decode(errors="replace") for part in found)
    indented = all(line.startswith("    ") for line in content.splitlines() if line.strip())  # as `text` writes it
    return "texts", [re.sub(r"^    (?=.*\S)", "", content, flags=re.MULTILINE) if indented else content]


def _events(path: Path) -> Iterator[Event]:
    """The events of one file up to where it is cut off.

    It is a TFRecord file: length (8 bytes), its checksum (4), content, its checksum (4); and so on.
    """
    foreign = f"{path} is no file of TensorBoard's events, to judge by what it holds at byte"
    damaged = f"{path} is damaged at byte"
    advice = "Restore it from a copy, or move it out of the folder: the others are read without it."
    with storage_errors("read", path), open(path, "rb") as file:
        offset, size = 0, os.fstat(file.fileno()).st_size
        while True:
            header = file.read(12)
            if offset == 0 and header[1:8].strip(b"\0"):  # an event file begins with a record of few bytes
                raise CorruptError(f"{foreign} 0. Move it out of the folder.")
            if len(header) < 12:
                return
            length = int.from_bytes(header[:8], "little")
            if header[8:] != _masked(header[:8]):
                raise CorruptError(f"{damaged} {offset}: the checksum of a record's length differs. {advice}")
            if offset + 16 + length > size:
                return
            body = file.read(length)
            if file.read(4) != _masked(body):
                raise CorruptError(f"{damaged} {offset}: the checksum of a record differs. {advice}")
            try:
                event = Event.FromString(body)
            except DecodeError:
                event = None
            if event is None or (offset == 0 and not event.file_version.startswith("brain.Event:")):
                raise CorruptError(f"{foreign} {offset}. Move it out of the folder.")
            yield event
            offset += 16 + length


# CRC-32C --------------------------------------------------------------------------------------------------------------

_LANE = 256
_TABLE = np.array(CRC_TABLE, np.uint32)


@lru_cache(maxsize=1)
def _lane_of_zeros() -> list[list[int]]:
    """[4, 256]: what each byte of a state becomes `_LANE` zero bytes later."""
    later = np.arange(256, dtype=np.uint32) << np.arange(0, 32, 8, dtype=np.uint32)[:, None]
    for _ in range(_LANE):
        later = _TABLE[later & 0xFF] ^ (later >> 8)
    return later.tolist()


def _crc32c(data: bytes) -> int:
    """TensorBoard's own does 5 MB/s. Here numpy takes large data through the table in lanes, side by side."""
    state, lanes = 0xFFFFFFFF, len(data) // _LANE
    if lanes < 64:  # numpy's calls would cost more than they save
        lanes = 0
    else:
        columns = np.frombuffer(data, np.uint8, lanes * _LANE).reshape(lanes, _LANE).T.astype(np.uint32, order="C")
        parts = np.zeros(lanes, np.uint32)
        for column in columns:
            parts = _TABLE[(parts ^ column) & 0xFF] ^ (parts >> 8)
        a, b, c, d = _lane_of_zeros()
        for part in parts.tolist():  # checksums are linear: a state moves on by a lane of zeros, then the lane's own is added
            state = a[state & 0xFF] ^ b[state >> 8 & 0xFF] ^ c[state >> 16 & 0xFF] ^ d[state >> 24] ^ part
    for value in data[lanes * _LANE :]:
        state = CRC_TABLE[(state ^ value) & 0xFF] ^ (state >> 8)
    return state ^ 0xFFFFFFFF


def _masked(data: bytes) -> bytes:
    """The CRC-32C as TFRecord stores it."""
    crc = _crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
