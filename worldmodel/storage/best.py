"""`best.json`: which checkpoint of a run was evaluated best. It stays, however many newer ones there are."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from worldmodel.errors import CorruptError
from worldmodel.storage import checkpoint, files
from worldmodel.storage.files import storage_errors

FILE, CHECKPOINTS = "best.json", "checkpoints"
READ_ATTEMPTS = 3
"""Times that a reader tries to read a checkpoint which the writer may be deleting just then."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Best:
    """The best evaluation so far, and the checkpoint that was evaluated.

    step          real steps of the checkpoint
    mean_return   of the evaluation
    confirmation  mean return of as many other episodes, played right after it
    episodes      of each of the two
    """

    step: int
    mean_return: float
    confirmation: float
    episodes: int

    @property
    def score(self) -> float:
        """What both evaluations reach. The higher of two is luck in part; the lower one was reached again."""
        return min(self.mean_return, self.confirmation)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any], where: Path | str) -> Best:
        """CorruptError where `to_json` would never have written it."""
        whole = all(type(value.get(name)) is int for name in ("step", "episodes"))
        numbers = all(
            type(number) in (int, float) and math.isfinite(number)
            for number in (value.get("mean_return"), value.get("confirmation"))
        )
        if not whole or not numbers or set(value) != set(cls.__dataclass_fields__) or not 0 <= value["step"] < 10**12:
            raise CorruptError(
                f"{where} names no evaluated checkpoint: expected whole numbers `step` and `episodes`, and the numbers "
                "`mean_return` and `confirmation`. Delete it to use the newest checkpoint, or restore it from a copy."
            )
        return cls(**value)


def read(folder: Path) -> Best | None:
    """What a run's best.json says; None where there is none. CorruptError where it is damaged."""
    file = folder / FILE
    with storage_errors("read", file):
        try:
            size = file.stat().st_size
        except FileNotFoundError:
            return None
        if not file.is_file() or size > files.MAX_JSON_BYTES:  # opening a FIFO would wait for ever
            raise CorruptError(
                f"{file} is no file of at most {files.MAX_JSON_BYTES} bytes. Delete it to use the newest checkpoint."
            )
        try:
            data = file.read_bytes()
        except FileNotFoundError:  # a resume has just taken it back
            return None
    return Best.from_json(files.parse_json(data, file), file)


def write(folder: Path, best: Best | None) -> None:
    """Replaces best.json at once or not at all; None deletes it. What says the same already is left alone."""
    try:
        if read(folder) == best:
            return
    except CorruptError:
        pass
    if best is not None:
        files.write(folder / FILE, files.dump_json(best.to_json()))
        return
    with storage_errors("delete", folder / FILE):
        (folder / FILE).unlink(missing_ok=True)
        files.sync_folder(folder)


def content(folder: Path) -> checkpoint.Content | None:
    """The checkpoint that was evaluated best; None where none was, and, with a warning, where it or best.json is damaged."""
    damage: CorruptError | None = None
    before: Best | None = None
    for _ in range(READ_ATTEMPTS):
        try:
            found = read(folder)
            if found is None:
                return None
            if found == before:  # no writer has named another and deleted this one: it is damaged
                break
            before = found
            return checkpoint.read(checkpoint.folder_of(folder / CHECKPOINTS, found.step))
        except CorruptError as error:
            damage = error
    _log.warning(f"The best checkpoint cannot be used, so the newest one is. {damage}")
    return None


def of_progress(progress: Mapping[str, Any], where: Path | str) -> Best | None:
    """The best that a checkpoint's progress names; checkpoints of earlier versions name none."""
    found = progress.get("best")
    return None if found is None else Best.from_json(found, where)
