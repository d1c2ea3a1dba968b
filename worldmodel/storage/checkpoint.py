"""Atomic checkpoints: safetensors for arrays, JSON for the rest, a manifest of sizes and SHA-256 over both; no pickle.

    parent/step-000000001500/{world,agent,optim}.safetensors  state.json  manifest.json

A checkpoint is whole or absent. It is written under a temporary name, every file is forced to the disk, the manifest
comes last, and one rename publishes it. No file points at the latest one: it is the highest step that verifies.
safetensors does not notice flipped bits, so nothing is parsed before its size and hash agree with the manifest.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
import shutil
import stat
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors
import safetensors.numpy

from worldmodel.errors import CorruptError, NumericsError, StorageError
from worldmodel.storage import files
from worldmodel.storage.files import dump_json, parse_json, storage_errors

Arrays = dict[str, np.ndarray]
Content = tuple[dict[str, Arrays], dict, dict]

SCHEMA = 1
MANIFEST, STATE, DATA = "manifest.json", "state.json", "data"
MAX_FILES = 64
_STEP = re.compile(r"step-(\d{12})")
_STEM = re.compile(r"[a-z][a-z0-9_-]{0,63}")
_FILE = re.compile(r"state\.json|data|[a-z][a-z0-9_-]{0,63}\.safetensors")
_RESERVED = ("schema", "step", "files", "hash")
_log = logging.getLogger(__name__)


def folder_of(parent: Path, step: int) -> Path:
    """The folder of a step's checkpoint."""
    return Path(parent) / f"step-{step:012d}"


# Content <-> bytes ----------------------------------------------------------------------------------------------------


def _hash(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of the manifest without its own hash, in one canonical spelling."""
    body = {k: v for k, v in manifest.items() if k != "hash"}
    return hashlib.sha256(json.dumps(body, allow_nan=False, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _array(value: np.ndarray, where: str) -> np.ndarray:
    """The array as safetensors can take it: it writes the memory as it lies, so that must be in C order."""
    numeric = isinstance(value, np.ndarray | np.generic)
    if not numeric or value.dtype.kind not in "biuf" or value.dtype.itemsize > 8:
        kind = value.dtype if numeric else type(value).__name__
        raise ValueError(f"{where} is a {kind}; a checkpoint holds numpy arrays of booleans, integers and floats.")
    if value.dtype.kind == "f" and not np.isfinite(value).all():
        raise NumericsError(f"{where} holds a value that is not finite. The checkpoint is not written; the last one stays.")
    return np.asarray(value, order="C")


def _encode(
    step: int, tensors: Mapping[str, Mapping[str, np.ndarray]], state: Mapping, manifest: Mapping, data: Mapping | None = None
) -> Iterator[tuple[str, bytes]]:
    """(file name, bytes) of every file, the manifest last; only one file's bytes live at a time."""
    if not 0 <= step < 10**12:
        raise ValueError(f"A checkpoint's step lies in 0..10^12 - 1, not {step}.")
    for stem in tensors:
        if not _STEM.fullmatch(stem):
            raise ValueError(f"'{stem}' cannot name a checkpoint's file: use small letters, digits, '_' and '-'.")
    for name in _RESERVED:
        if name in manifest:
            raise ValueError(f"The manifest's entry '{name}' is written by the checkpoint itself. Choose another name.")
    # All of the JSON before the first byte is written.
    described = {STATE: files.json_value(state, "state"), **({DATA: files.json_value(data, "data")} if data is not None else {})}
    own = files.json_value(manifest, "manifest")
    entries = {}
    for name in [*(f"{stem}.safetensors" for stem in tensors), *described]:
        if name in described:
            content = dump_json(described[name])
        else:
            stem = name.removesuffix(".safetensors")
            content = safetensors.numpy.save({k: _array(v, f"{stem}.{k}") for k, v in tensors[stem].items()})
        entries[name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        yield name, content
    complete = {"schema": SCHEMA, "step": int(step), "files": entries, **own}
    yield MANIFEST, dump_json({**complete, "hash": _hash(complete)})


def _check_manifest(data: bytes, where: Path | str) -> dict:
    """The manifest that hashes to what it says, with well-formed entries of its own."""
    manifest = parse_json(data, where)
    if manifest.get("hash") != _hash(manifest):
        raise CorruptError(f"{where} is damaged: its own SHA-256 differs. Use an older checkpoint.")
    schema, step, entries = (manifest.get(k) for k in ("schema", "step", "files"))
    if type(schema) is not int or schema < 1 or type(step) is not int or not isinstance(entries, dict) or STATE not in entries:
        raise CorruptError(f"{where} is no checkpoint's manifest: 'schema', 'step' or 'files' is missing or odd.")
    if schema > SCHEMA:
        raise StorageError(f"{where} has schema {schema}, but this version reads up to {SCHEMA}. Install a newer worldmodel.")
    if len(entries) > MAX_FILES:
        raise CorruptError(f"{where} names {len(entries)} files; at most {MAX_FILES} belong to a checkpoint.")
    for name, entry in entries.items():
        if not _FILE.fullmatch(name) or not isinstance(entry, dict) or type(entry.get("size")) is not int:
            raise CorruptError(f"{where} names a file that cannot belong to a checkpoint: {name!r}.")
    return manifest


def _decode(manifest: dict, get: Callable[[str], bytes], where: str) -> Content:
    """(tensors, state, manifest) from bytes that the manifest vouches for; `where` stands before a file's name in messages."""
    tensors = {}
    for name in manifest["files"]:
        if name in (STATE, DATA):
            continue
        try:
            arrays = safetensors.numpy.load(get(name))
            tensors[name.removesuffix(".safetensors")] = {k: x if x.flags.writeable else x.copy() for k, x in arrays.items()}
        except (safetensors.SafetensorError, KeyError, ValueError, TypeError) as error:
            raise CorruptError(f"{where}{name} is no safetensors file of numbers: {error}. Use an older checkpoint.") from error
    if DATA in manifest["files"]:  # for other readers; but a file is whole or refused
        parse_json(get(DATA), where + DATA)
    return tensors, parse_json(get(STATE), where + STATE), manifest


# Folders --------------------------------------------------------------------------------------------------------------


def write(
    parent: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, np.ndarray]],
    state: Mapping,
    manifest: Mapping | None = None,
    *,
    replace: bool = False,
) -> Path:
    """Commits `parent/step-<12 digits>` and returns it. When this returns, the checkpoint survives a power cut.

    tensors   {file stem: {name: array}}, numbers and booleans, finite
    state     JSON with finite numbers (tuples come back as lists)
    manifest  further JSON entries of the manifest; `schema`, `step`, `files` and `hash` are its own
    replace   whether an intact one of this step makes room, once the new one is on the disk

    ValueError or NumericsError on content that does not fit, StorageError where the disk is full, not writable or the
    step is committed already; a damaged checkpoint of that step is replaced. Whatever fails, earlier ones stay as they were.
    """
    final, temporary = folder_of(parent, step), files.temporary_name(parent)
    files.make_folder(parent)
    replace = final.exists() and (replace or damage(final) is not None)
    if final.exists() and not replace:
        raise StorageError(f"{final} is there already and intact. A checkpoint is never overwritten: save at a later step.")
    try:
        with storage_errors("create", temporary):
            temporary.mkdir()
        for name, data in _encode(step, tensors, state, manifest or {}):
            with files.durable(temporary / name) as file:
                file.write(data)
        files.sync_folder(temporary)
        if replace:
            files.discard(final)
        with storage_errors("write", final):
            os.rename(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    files.sync_folder(parent)
    return final


def steps(parent: Path) -> list[int]:
    """Steps that have a folder, damaged ones included, ascending; empty where the parent does not exist."""
    with storage_errors("read", parent):
        try:
            return sorted(int(m[1]) for path in parent.iterdir() if (m := _STEP.fullmatch(path.name)) and path.is_dir())
        except FileNotFoundError:
            return []


def intact(parent: Path, log: Callable[[str], object] = _log.warning) -> Iterator[tuple[int, Path]]:
    """(step, path) of the checkpoints that verify, newest first; every damaged one that is skipped is reported to `log`."""
    for step in reversed(steps(parent)):
        path = folder_of(parent, step)
        if error := damage(path):
            log(f"Checkpoint of step {step} is skipped: {error}")
        else:
            yield step, path


def newest(parent: Path, log: Callable[[str], object] = _log.warning) -> tuple[int, Path] | None:
    """(step, path) of the highest step that verifies; `log` gets which ones are damaged and how many steps that costs."""
    found = next(intact(parent, log), None)
    if found is not None and (lost := steps(parent)[-1] - found[0]) > 0:
        log(f"Step {found[0]} is the newest that verifies: {lost} steps behind it are lost.")
    return found


def verify(path: Path) -> dict:
    """The manifest, after every file's size and SHA-256 were compared with it; CorruptError names file and check."""
    manifest = read_manifest(path)
    for name in manifest["files"]:
        _check(path / name, manifest["files"][name])
    return manifest


def read(path: Path) -> Content:
    """(tensors, state, manifest) of a checkpoint; the bytes that are parsed are those that were verified."""
    manifest = read_manifest(path)
    return _decode(manifest, lambda name: _check(path / name, manifest["files"][name], keep=True), f"{path}{os.sep}")


def read_manifest(path: Path) -> dict:
    """A checkpoint's manifest, which vouches for itself; the files that it names are not read (see `verify`)."""
    where = path / MANIFEST
    manifest = _check_manifest(_check(where, None, keep=True), where)
    named = _STEP.fullmatch(path.name)
    if named and int(named[1]) != manifest["step"]:
        raise CorruptError(f"{where} is of step {manifest['step']}, but its folder is {path.name}: files were mixed up.")
    return manifest


def _check(path: Path, entry: Mapping | None, keep: bool = False) -> bytes:
    """Compares a file with its manifest entry (None: only a size limit); its bytes if `keep`, else none."""
    digest, parts = hashlib.sha256(), []
    with storage_errors("read", path):
        try:
            found = path.stat()
        except FileNotFoundError:
            raise CorruptError(f"{path} is missing. Use an older checkpoint, or restore the file from a copy.") from None
        size = found.st_size if entry is None else entry["size"]
        if not stat.S_ISREG(found.st_mode):  # opening a FIFO would wait for ever
            raise CorruptError(f"{path} is no regular file.")
        if found.st_size != size:
            raise CorruptError(f"{path} has {found.st_size} bytes, but its manifest says {size}: it was cut or changed.")
        if size > files.MAX_JSON_BYTES and (path.suffix == ".json" or path.name == DATA):
            raise CorruptError(f"{path} has {size} bytes; at most {files.MAX_JSON_BYTES} are read.")
        with open(path, "rb") as file:
            while part := file.read(1 << 20):
                digest.update(part)
                if keep:
                    parts.append(part)
    if entry is not None and digest.hexdigest() != entry.get("sha256"):
        raise CorruptError(f"{path} is damaged: its SHA-256 is not the manifest's. Use an older checkpoint.")
    return b"".join(parts)


def damage(path: Path) -> CorruptError | None:
    """What is wrong with a checkpoint; None where it verifies."""
    try:
        verify(path)
    except CorruptError as error:
        return error
    return None


def prune(parent: Path, keep: int = 2, needs: Callable[[dict], Collection[int]] = lambda manifest: ()) -> list[int]:
    """Deletes what is older than the `keep` newest checkpoints that verify; returns the steps deleted.

    needs  older steps that a kept checkpoint's manifest cannot do without; they stay as long as it does

    Damaged ones do not count as kept, so the last valid ones always stay.
    """
    if keep < 1:
        raise ValueError(f"prune keeps at least one checkpoint, not {keep}.")
    kept: list[dict] = []
    newest_first = steps(parent)[::-1]
    for i, step in enumerate(newest_first):
        try:
            kept.append(verify(folder_of(parent, step)))
        except CorruptError:
            continue
        if len(kept) == keep:
            needed = {other for manifest in kept for other in needs(manifest)}
            deleted = [old for old in newest_first[i + 1 :] if old not in needed]
            for old in deleted:
                files.discard(folder_of(parent, old))
            return deleted
    return []


# One zip --------------------------------------------------------------------------------------------------------------


def pack(
    path: Path | BinaryIO,
    step: int,
    tensors: Mapping[str, Mapping[str, np.ndarray]],
    state: Mapping,
    manifest: Mapping | None = None,
    data: Mapping | None = None,
) -> Path | BinaryIO:
    """The same content as one zip of stored members; a file of that name is replaced at once or not at all.

    path  or an open binary file or stream, which stays open
    data  JSON that stands in a member `data`, as in SB3's zips, for tools that read there what a model is; `unpack` does not use it
    """
    if hasattr(path, "write"):
        target = nullcontext(path)
    else:
        path = Path(path)
        files.make_folder(path.parent)
        target = files.replacing(path)
    with target as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, content in _encode(step, tensors, state, manifest or {}, data):
            archive.writestr(zipfile.ZipInfo(name), content)  # ZipInfo's fixed date: equal content, equal bytes
    return path


def unpack(path: Path | BinaryIO) -> Content:
    """(tensors, state, manifest) of a zip that `pack` wrote, or of a stream that holds one. Nothing is extracted to the disk.

    CorruptError where a member is compressed, encrypted, extra, missing, named twice or oddly, or larger than the file.
    """
    if hasattr(path, "read"):
        if path.seekable():
            path.seek(0)
        return _unpack(io.BytesIO(path.read()), Path("the stream"))
    path = Path(path)
    with storage_errors("read", path):
        if path.exists() and not path.is_file():  # opening a FIFO would wait for ever
            raise CorruptError(f"{path} is no regular file.")
        with path.open("rb") as file:
            return _unpack(file, path)


def _unpack(file: BinaryIO, path: Path) -> Content:
    """The content of an open zip; `path` names it in errors."""
    size = file.seek(0, os.SEEK_END)
    with storage_errors("read", path):
        try:
            with zipfile.ZipFile(file) as archive:
                members = _members(archive, path, size)
                manifest = _check_manifest(archive.read(members[MANIFEST]), f"{path}:{MANIFEST}")
                unexpected = members.keys() ^ {MANIFEST, *manifest["files"]}
                if unexpected:
                    raise CorruptError(f"{path} and its manifest differ on the members {sorted(unexpected)}.")
                return _decode(manifest, lambda name: _member(archive, members[name], manifest["files"][name], path), f"{path}:")
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, UnicodeDecodeError) as error:
            raise CorruptError(f"{path} is no intact zip: {error}. Restore it from a copy.") from error


def _members(archive: zipfile.ZipFile, path: Path, size: int) -> dict[str, zipfile.ZipInfo]:
    """{name: member}, after the refusals that need no reading. Sizes are limited by the file's, so nothing can blow up."""
    infos = archive.infolist()
    names = [i.filename for i in infos]
    for info in infos:
        if info.filename != MANIFEST and not _FILE.fullmatch(info.filename):
            raise CorruptError(
                f"{path} has a member {info.filename!r}, which no archive of this library has. "
                "A zip that another library saved needs that library."
            )
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 0x1:
            raise CorruptError(
                f"{path}: the member {info.filename!r} is compressed or encrypted. Expected a zip of this library's save()."
            )
    if len(set(names)) != len(names):
        raise CorruptError(f"{path} has two members of one name.")
    if MANIFEST not in names:
        raise CorruptError(f"{path} has no {MANIFEST}: it was not saved by this library, or not to its end.")
    if len(names) > MAX_FILES + 1 or sum(i.file_size for i in infos) > size:
        raise CorruptError(f"{path} claims more members or bytes than it can hold.")
    if archive.comment or min(i.header_offset for i in infos) != 0:
        raise CorruptError(f"{path} holds more than its members: something was put before them or into the comment.")
    return {i.filename: i for i in infos}


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, entry: Mapping, path: Path) -> bytes:
    data = archive.read(info)
    if len(data) != entry["size"] or hashlib.sha256(data).hexdigest() != entry.get("sha256"):
        raise CorruptError(f"{path}: the member {info.filename!r} is damaged: size or SHA-256 differ from the manifest's.")
    return data
