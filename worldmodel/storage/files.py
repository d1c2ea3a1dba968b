"""Files and folders that survive a power cut, named errors of the operating system, and JSON that is checked as it is read."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex
from typing import Any, BinaryIO

import numpy as np

from worldmodel.errors import CorruptError, StorageError

MAX_JSON_BYTES, MAX_JSON_DEPTH = 64 << 20, 64


@contextmanager
def storage_errors(doing: str, path: Path) -> Iterator[None]:
    """Turns the operating system's errors into a StorageError that names the path; a read error is damage."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        if error.errno == errno.EIO and doing == "read":
            raise CorruptError(f"{path} cannot be read: {error.strerror}. Restore it from a copy, or delete it.") from error
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "Free some disk space and try again" if full else "Check the path and what you may do there"
        raise StorageError(f"Could not {doing} {path}: {error.strerror or error}. {advice}.") from error


@contextmanager
def durable(path: Path, final: Path | None = None) -> Iterator[BinaryIO]:
    """A new file, open for writing, that is on the disk when the block ends, or gone where anything failed.

    final  the name that errors say, where the file gets another one afterwards
    After a failed fsync the pages may count as clean without being on the disk, so a retry must write anew.
    """
    with storage_errors("write", final or path):
        try:
            with open(path, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
        except FileExistsError:
            raise  # another process's file stays
        except BaseException:
            path.unlink(missing_ok=True)
            raise


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file, open for writing, that takes the name `path` when the block ends: at once, or not at all where anything failed."""
    temporary = temporary_name(path.parent)
    with durable(temporary, path) as file:
        yield file
    try:
        with storage_errors("write", path):
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write(path: Path, data: bytes) -> None:
    """Replaces a file at once or not at all; its folder is made where it is missing. Raises StorageError."""
    make_folder(path.parent)
    with replacing(path) as file:
        file.write(data)


def temporary_name(folder: Path) -> Path:
    """A free name in the folder; `sweep` deletes what a kill leaves under it."""
    return folder / f".tmp-{token_hex(8)}"


def sync_folder(path: Path) -> None:
    """Forces the folder's names to the disk: a rename is safe against a power cut only after this."""
    if os.name == "nt":  # Windows cannot open folders
        return
    with storage_errors("write", path):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def make_folder(path: Path) -> None:
    """Creates the folder and its parents, each forced to the disk."""
    with storage_errors("create", path):
        if path.is_dir():
            return
        make_folder(path.parent)
        try:
            path.mkdir(exist_ok=True)
        except ValueError as error:  # NUL, or half a character
            raise OSError(errno.EINVAL, f"no folder can have this name ({error})") from error
        sync_folder(path.parent)


def discard(path: Path) -> None:
    """Deletes a folder; a kill on the way leaves it whole under its name, or under a name that is never read."""
    trash = path.parent / f".trash-{token_hex(8)}"
    with storage_errors("delete", path):
        os.rename(path, trash)
        sync_folder(path.parent)
        shutil.rmtree(trash)


def sweep(parent: Path) -> None:
    """Removes what interrupted writes and deletions left in the folder. Only the run's one writer may call it."""
    with storage_errors("delete", parent):
        for path in [*parent.glob(".tmp-*"), *parent.glob(".trash-*")]:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


# JSON -----------------------------------------------------------------------------------------------------------------


def json_value(value: Any, where: str, depth: int = 0) -> Any:
    """`value` as what JSON gives back (tuples become lists, numpy scalars Python's); ValueError naming what does not fit."""
    if depth > MAX_JSON_DEPTH:
        raise ValueError(f"{where} is nested deeper than {MAX_JSON_DEPTH} levels.")
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where} is {value}, but a checkpoint holds finite numbers only. Store it as a string or as null.")
        return value
    if isinstance(value, list | tuple):
        return [json_value(v, f"{where}[{i}]", depth + 1) for i, v in enumerate(value)]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"{where} has the key {key!r}, but JSON keys are strings.")
        return {k: json_value(v, f"{where}.{k}", depth + 1) for k, v in value.items()}
    raise ValueError(f"{where} is a {type(value).__name__}, which JSON cannot hold. Arrays belong into `tensors`.")


def dump_json(value: Any) -> bytes:
    return (json.dumps(value, allow_nan=False, indent=1) + "\n").encode()


def parse_json(data: bytes, where: Path | str) -> dict:
    """One JSON object; CorruptError on what `dump_json` would never have written."""

    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict:
        if len({k for k, _ in pairs}) != len(pairs):
            raise ValueError("a key occurs twice")
        return dict(pairs)

    try:
        value = json.loads(data.decode(), object_pairs_hook=without_duplicates)
        if not isinstance(value, dict):
            raise ValueError("it is no object")
        return json_value(value, "it")  # NaN and infinity, which Python's parser lets through, and depth
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{where} is damaged: {error}. Use an older checkpoint, or restore the file from a copy.") from error
