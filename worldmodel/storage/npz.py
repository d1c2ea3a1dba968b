"""The NPZ file of recorded episodes, which numpy alone reads and writes.

    FILE.npz   episodes.json   observation/KEY.npy   action.npy   reward.npy   terminated.npy   truncated.npy   lengths.npy

episodes.json holds the spaces. Files are read without numpy's own loader: nothing in them can run code, and every size
is compared with what the spaces and lengths imply before anything is allocated.
"""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy

from worldmodel.errors import ConfigError, CorruptError, StorageError
from worldmodel.spaces import ActionSpec, ObsSpec
from worldmodel.storage import files

FORMAT, VERSION = "worldmodel-episodes", 1
METADATA_NAME = "episodes.json"
MAX_MEMBERS, MAX_KEY = 4096, 1000
MAX_DEFLATE_RATIO = 1032
"""Bytes that one compressed byte can stand for: no honest member claims more."""


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


def check_key(name: str) -> None:
    """ConfigError for a key that no member of a zip can be called after, or whose member would lead out of a folder."""
    nameable = "\0" not in name and not re.search("[\ud800-\udfff]", name) and len(name) <= MAX_KEY
    if not nameable or ".." in re.split(r"[/\\]", name):
        shown = repr(name if len(name) <= 40 else name[:40] + "...")
        raise ConfigError(
            f"The observation key {shown} cannot name an array of an NPZ file. Expected at most {MAX_KEY} characters, none of them "
            "NUL or half a character, and no '..' between slashes: rename it with a wrapper."
        )


def write(path: Path, metadata: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Writes the file whole or not at all. `metadata` is JSON, `arrays` are named as `expected_arrays` names them."""
    metadata = {"format": FORMAT, "version": VERSION, **metadata}
    files.make_folder(path.parent)
    with files.replacing(path) as file, zipfile.ZipFile(file, "w") as archive:
        archive.writestr(_member(METADATA_NAME), files.dump_json(metadata))
        for name, array in arrays.items():
            with archive.open(_member(f"{name}.npy"), "w", force_zip64=True) as member:
                npy.write_array(member, np.asarray(array, array.dtype.newbyteorder("<"), order="C"))


def read(path: Path) -> dict[str, Any]:
    """The fields of a recording. ConfigError for a file that is something else, CorruptError for a damaged one."""
    with _opened(path) as archive:
        return _content(archive, path)


def read_arrays(path: Path) -> dict[str, np.ndarray] | None:
    """{name: array} of a file that `numpy.savez` wrote; None for a recording. Raises as `read`."""
    with _opened(path) as archive:
        members = _members(archive, path)
        if METADATA_NAME in members:
            return None
        found = {}
        for name, info in members.items():
            with archive.open(info) as member:
                shape_dtype = _header(member, path, name)
            found[name.removesuffix(".npy")] = _array(archive, info, shape_dtype, path)
        return found


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """The file as a zip that is open for reading, with its errors as this library's."""
    if not path.is_file():
        raise ConfigError(f"'{path}' is no file. Expected an NPZ file of episodes, as `worldmodel data export` writes it.")
    with files.storage_errors("read", path):
        _refuse_other_formats(path)
        try:
            with zipfile.ZipFile(path) as archive:
                yield archive
        except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, UnicodeDecodeError) as error:
            raise CorruptError(f"{path} is no intact NPZ file: {error}. Restore it from a copy, or export it again.") from error
        except MemoryError as error:
            raise StorageError(f"{path} does not fit into memory: {error}. Split it into several files.") from error


def expected_arrays(obs_spec: ObsSpec, action_spec: ActionSpec, lengths: np.ndarray) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
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
    members = _members(archive, path)
    if METADATA_NAME not in members:
        raise ConfigError(
            f"{path} is no recording of this library: it has no {METADATA_NAME}, which says the spaces. Make one with "
            "wm.Recording.from_episodes(observation_space, action_space, episodes).write(FILE)."
        )
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
    expected = expected_arrays(obs_spec, action_spec, lengths)
    if unexpected := {f"{name}.npy" for name in expected} ^ (members.keys() - {METADATA_NAME}):
        raise CorruptError(f"{path} and its {METADATA_NAME} differ on the arrays {sorted(unexpected)}. Restore it from a copy.")
    arrays = {name: _array(archive, members[f"{name}.npy"], shape_dtype, path) for name, shape_dtype in expected.items()}
    obs = {name: arrays.pop(f"observation/{name}") for name in obs_spec.keys}
    provenance = {"env_id": metadata.get("env_id"), "env_options": metadata.get("env_options", {}), "origin": str(path)}
    return {"obs": obs, **arrays, "obs_spec": obs_spec, "action_spec": action_spec, **provenance}


def _members(archive: zipfile.ZipFile, path: Path) -> dict[str, zipfile.ZipInfo]:
    """{name: member} of an open zip; CorruptError where their sizes or places cannot be."""
    infos = archive.infolist()
    members = {info.filename: info for info in infos}
    if len(members) != len(infos) or len(infos) > MAX_MEMBERS:
        raise CorruptError(f"{path} has members of one name, or more than {MAX_MEMBERS}. Export it again.")
    for info in infos:
        if not 0 <= info.header_offset < path.stat().st_size:
            raise CorruptError(f"{path}: '{info.filename}' lies outside of the file. Restore it from a copy.")
        if info.file_size > MAX_DEFLATE_RATIO * (info.compress_size + 64):
            raise CorruptError(f"{path}: '{info.filename}' claims {info.file_size} bytes, more than its own can stand for.")
    return members


def _read_metadata(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> tuple[dict, ObsSpec, ActionSpec]:
    if info.file_size > files.MAX_JSON_BYTES:
        raise CorruptError(f"{path}: {METADATA_NAME} has {info.file_size} bytes; at most {files.MAX_JSON_BYTES} are read.")
    metadata = files.parse_json(archive.read(info), f"{path}:{METADATA_NAME}")
    if (metadata.get("format"), metadata.get("version")) != (FORMAT, VERSION):
        raise ConfigError(
            f"{path} has format {metadata.get('format')!r}, version {metadata.get('version')!r}; "
            f"this version reads {FORMAT!r} {VERSION}."
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
