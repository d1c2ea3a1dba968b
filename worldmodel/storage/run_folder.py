"""The folder of a run: which one it is, and the lock of the one process that writes it."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path
from typing import Any

from worldmodel.config import Config
from worldmodel.errors import ConfigError, StorageError, did_you_mean
from worldmodel.storage.files import make_folder, storage_errors

try:
    import fcntl
except ImportError:  # Windows: two writers are not kept apart there
    fcntl = None

CONFIG, LOCK = "config.yaml", ".lock"


class FolderLock:
    """The lock on a folder, for this process. The system frees it when the process ends, however it ends."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._file = folder, folder / LOCK
        with storage_errors("write", self._file):  # not through a link, which may lead out of the folder
            self._handle = os.open(self._file, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
        try:
            if fcntl is not None:
                with storage_errors("lock", self._file):
                    self._lock_or_refuse()
            with storage_errors("write", self._file):
                os.ftruncate(self._handle, 0)
                os.pwrite(self._handle, f"pid {os.getpid()} on host {socket.gethostname()}\n".encode(), 0)
        except BaseException:
            self.close()
            raise

    def _lock_or_refuse(self) -> None:
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            who = os.pread(self._handle, 200, 0).decode(errors="replace").strip() or "another process"
            raise StorageError(f"{self.folder} is being written by {who}. Wait for it, stop it, or choose another --run.") from None

    def check_not_replaced(self) -> None:
        """StorageError where the folder was deleted, moved or replaced: writing would begin another one, which is no run."""
        with storage_errors("write", self._file):
            if not (self._file.exists() and os.path.samestat(os.fstat(self._handle), os.stat(self._file))):
                raise StorageError(
                    f"{self.folder} is no longer the folder that was opened: it was deleted, moved or replaced meanwhile."
                )

    def close(self) -> None:
        os.close(self._handle)


def recipe_or_run(recipe: Any, run_dir: str | Path | None, resume: bool) -> tuple[Any, str | Path | None]:
    """(recipe, run folder) where a run folder may be given as the recipe; then there is no recipe to compare with."""
    if not isinstance(recipe, str | Path) or not is_run(Path(recipe)):
        return recipe, run_dir
    if not resume:
        raise ConfigError(f"'{recipe}' is a run folder, not a recipe. Go on with it: add --resume (resume=True).")
    if run_dir is not None and Path(run_dir).resolve() != Path(recipe).resolve():
        raise ConfigError(f"'{recipe}' and --run '{run_dir}' are two run folders. Name the one to go on with.")
    return None, recipe


def is_run(path: Path) -> bool:
    """Whether the folder is a run's."""
    with storage_errors("read", path):
        return (path / CONFIG).is_file()


def require_run(path: Path) -> None:
    """ConfigError with the nearest name of a run where the folder is none."""
    if is_run(path):
        return
    siblings = sorted(p.parent.name for p in path.parent.glob(f"*/{CONFIG}")) if path.parent.is_dir() else []
    near = did_you_mean(path.name, siblings) if not path.exists() else ""
    hint = near if near.startswith(" Did") else " Expected the folder of a run, as `worldmodel train` names it."
    raise ConfigError(f"'{path}' is no run folder: it has no {CONFIG}.{hint}")


def refuse_existing(path: Path) -> None:
    """ConfigError where a new run may not begin: the folder is there and holds something."""
    if is_run(path):
        raise ConfigError(f"'{path}' holds a run already. Continue it with --resume (resume=True), or choose another --run.")
    with storage_errors("read", path):
        # a run that was killed before its config was written has left at most these two
        taken = path.is_dir() and any(entry.name != LOCK and not entry.name.startswith(".tmp-") for entry in path.iterdir())
    if taken:
        raise ConfigError(f"'{path}' is there already and is no run folder. Choose another --run; nothing in it is overwritten.")


def latest_default(config: Config, seed: int) -> Path:
    """The default folder that was made last for this recipe and seed. ConfigError where there is none."""
    base = default_folder(config, seed)
    numbered = [(1, base)] if is_run(base) else []
    for path in base.parent.glob(f"{base.name}-*"):
        match = re.fullmatch(re.escape(base.name) + r"-(\d+)", path.name)
        if match and is_run(path):
            numbered.append((int(match[1]), path))
    if not numbered:
        raise ConfigError(f"There is no run to resume at '{base}'. Name its folder with --run, or leave --resume out.")
    return max(numbered)[1]


def default_folder(config: Config, seed: int) -> Path:
    return Path("runs") / f"{config.recipe_name}-s{seed}"


def make_numbered(base: Path) -> Path:
    """Makes the folder, or the first one with a number behind its name that does not exist yet."""
    make_folder(base.parent)
    number, path = 1, base
    with storage_errors("create", path):
        while True:
            try:
                path.mkdir()
                return path
            except FileExistsError:
                number += 1
                path = base.with_name(f"{base.name}-{number}")
