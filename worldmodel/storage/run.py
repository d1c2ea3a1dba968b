"""A run folder: config, checkpoints, replay and result of one training, readable while it is written.

    RUN/config.yaml  result.json  replay/segment-*.bin  checkpoints/step-000000001500/...  events.out.tfevents.*

One process writes (it holds a lock on RUN/.lock), any number may read. A checkpoint commits the replay's rows too: its
manifest names them. No file points at the latest checkpoint: it is the newest one that verifies.
"""

from __future__ import annotations

import importlib.metadata
import logging
import math
import os
import platform
import re
import shlex
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, cached_property
from pathlib import Path
from secrets import token_hex
from typing import Any, Protocol

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from worldmodel import registry
from worldmodel.config import Config, Frozen
from worldmodel.distributions import Posterior
from worldmodel.errors import ConfigError, CorruptError, NumericsError, StorageError, did_you_mean
from worldmodel.model import WorldModel
from worldmodel.registry import register
from worldmodel.spaces import ActionSpec, ObsSpec
from worldmodel.storage import checkpoint, segments
from worldmodel.storage.replay import Replay

try:
    import fcntl
except ImportError:  # Windows: two writers are not kept apart there
    fcntl = None

CONFIG, RESULT, LOCK = "config.yaml", "result.json", ".lock"
READ_ATTEMPTS = 3
"""Times that a reader looks for a checkpoint whose files the writer is not deleting just then."""
_log = logging.getLogger(__name__)
PACKAGES = ("worldmodel", "torch", "numpy", "gymnasium", "stable-baselines3", "safetensors")


@register("group", "checkpoint")
class CheckpointConfig(Frozen):
    """When the state is saved. At the start, at each evaluation and at the end it always is."""

    every: int = Field(5000, ge=0, description="real steps between checkpoints besides those of evaluations; 0: no others")
    flush: int = Field(
        1000, ge=0, description="real steps after which new experience is on the disk at the latest (for --keep-newer); 0: as every"
    )
    keep: int = Field(2, ge=1, description="newest checkpoints that stay")
    failures: int = Field(3, ge=1, description="saves in a row that fail, as on a full disk, at which the run stops")
    fence: bool = Field(
        False,
        description="each checkpoint of `every` truncates open episodes and reseeds, so that a resumed run equals an unbroken one",
    )


class Algorithm(Protocol):
    """What a run saves."""

    replay: Replay | None
    num_timesteps: int
    n_envs: int
    obs_spec: ObsSpec
    action_spec: ActionSpec

    def content(self) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, Any]]: ...
    def restore(self, arrays: Mapping[str, Mapping[str, np.ndarray]], state: Mapping[str, Any]) -> None: ...
    def recover(self, folder: Path, log: Callable[[str], object]) -> None: ...


class Run:
    """A run folder. `create` and `open(path, write=True)` hold its lock until `close`; `open(path)` only reads.

    path    the folder
    config  the run's Config
    """

    def __init__(self, path: Path, config: Config):
        self.path, self.config = path, config
        self._lock: int | None = None
        self._snapshot: dict[str, Any] | None = None

    @classmethod
    def create(cls, directory: str | Path | None, config: Config, seed: int) -> Run:
        """A new run, locked for writing. Without `directory`: runs/<recipe>-s<seed>, with a number behind it if that exists.

        ConfigError where the folder holds something already, StorageError where it cannot be written.
        """
        if directory is None:
            path = _create_numbered(Path("runs") / f"{config.recipe_name}-s{seed}")
        else:
            path = Path(directory)
            refuse_existing(path)
            checkpoint.make_folder(path)
        run = cls(path, config)
        with run._locked():
            run.write_config(config)
        return run

    @classmethod
    def open(cls, path: str | Path, *, write: bool = False) -> Run:
        """The run in a folder. ConfigError where there is none; with `write`, StorageError where another process writes."""
        path = Path(path)
        file = path / CONFIG
        with checkpoint.storage_errors("read", file):
            there = file.is_file()
        if not there:
            near = did_you_mean(path.name, _runs_in(path.parent)) if not path.exists() else ""
            hint = near if near.startswith(" Did") else " Expected the folder of a run, as `worldmodel train` names it."
            raise ConfigError(f"'{path}' is no run folder: it has no {CONFIG}.{hint}")
        with checkpoint.storage_errors("read", file):
            data = file.read_bytes()
        try:
            run = cls(path, Config.from_saved(data.decode(), str(file)))
        except UnicodeDecodeError as error:
            raise ConfigError(f"{file}: cannot be read ({error}). Expected a YAML file in UTF-8.") from None
        if write:
            with run._locked():
                pass
        return run

    # One writer -----------------------------------------------------------------------------------------------------

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Locks and sweeps the folder; where that or the block fails, the lock is free again."""
        self._take_lock()
        try:
            for folder in ("", "checkpoints", "replay", "projector"):
                checkpoint.sweep(self.path / folder)
            yield
        except BaseException:
            self.close()
            raise

    def _take_lock(self) -> None:
        """Locks the folder for this process. The system frees the lock when the process ends, however it ends."""
        file = self.path / LOCK
        with checkpoint.storage_errors("write", file):  # not through a link, which may lead out of a stranger's run
            handle = os.open(file, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
        try:
            if fcntl is not None:
                with checkpoint.storage_errors("lock", file):
                    self._lock_or_refuse(handle, file)
            with checkpoint.storage_errors("write", file):
                os.ftruncate(handle, 0)
                os.pwrite(handle, f"pid {os.getpid()} on host {socket.gethostname()}\n".encode(), 0)
        except BaseException:
            os.close(handle)
            raise
        self._lock = handle

    def _check_not_replaced(self) -> None:
        """StorageError where the folder was deleted, moved or replaced: writing would begin another one, which is no run."""
        file = self.path / LOCK
        with checkpoint.storage_errors("write", file):
            if self._lock is not None and not (file.exists() and os.path.samestat(os.fstat(self._lock), os.stat(file))):
                raise StorageError(
                    f"{self.path} is no longer the folder that was opened: it was deleted, moved or replaced meanwhile."
                )

    def _lock_or_refuse(self, handle: int, file: Path) -> None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            who = os.pread(handle, 200, 0).decode(errors="replace").strip() or "another process"
            raise StorageError(f"{self.path} is being written by {who}. Wait for it, stop it, or choose another --run.") from None

    def close(self) -> None:
        """Frees the lock."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Writing --------------------------------------------------------------------------------------------------------

    def write_config(self, config: Config) -> None:
        """Replaces config.yaml at once or not at all."""
        _replace(self.path / CONFIG, config.to_yaml().encode())
        self.config = config

    def save(self, algorithm: Algorithm, progress: Mapping[str, Any], *, fenced: bool = False) -> Path:
        """Commits the algorithm, its replay and `progress` (JSON) as the checkpoint of its step; then deletes old ones.

        fenced  the algorithm begins new episodes behind it: what follows depends on this checkpoint alone
        A step that is committed already is left as it is, unless updates were still owed to it. Raises StorageError, NumericsError;
        earlier checkpoints stay.
        """
        self._check_not_replaced()
        folder = self.path / "checkpoints"
        path = folder / f"step-{algorithm.num_timesteps:012d}"
        tensors, state = algorithm.content()
        updates = state.get("counters", {}).get("n_updates", 0)
        if algorithm.num_timesteps in checkpoint.steps(folder) and self._is_intact(path):
            if checkpoint.read_manifest(path).get("updates", updates) >= updates:
                return path
            checkpoint.discard(path)  # saved while updates were still owed
        _check_finite(state, "state")
        snapshot = algorithm.replay.save(self.replay_folder, self._snapshot) if algorithm.replay is not None else None
        self._snapshot = snapshot  # these rows are on the disk, whatever becomes of the rest; a retry need not write them again
        manifest = {
            "replay": snapshot,
            "fenced": fenced,
            "seed": state["seed"],
            "updates": updates,
            "threads": torch.get_num_threads(),
            "versions": versions(),
            "config": self.config.model_dump(mode="json"),
            "progress": dict(progress),
        }
        path = checkpoint.write(folder, algorithm.num_timesteps, tensors, state, manifest)
        if fenced or not self.config.checkpoint.fence:  # an unfenced one does not replace the fence that a resume starts from
            checkpoint.prune(folder, self.config.checkpoint.keep)
        self._sweep_replay()
        return path

    def flush(self, algorithm: Algorithm) -> None:
        """Writes the experience that is not on the disk yet, so that a kill costs no more of it. A checkpoint alone commits it."""
        self._snapshot = algorithm.replay.save(self.replay_folder, self._snapshot)
        self._sweep_replay()

    def _sweep_replay(self) -> None:
        """Deletes the segments that neither a checkpoint names nor the replay as it was written last.

        None while a manifest cannot be read: it may name them, and be read later.
        """
        if self._snapshot is None:
            return
        try:
            manifests = [checkpoint.read_manifest(self.path / "checkpoints" / f"step-{step:012d}") for step in self.checkpoints]
        except CorruptError:
            return
        Replay.sweep(self.replay_folder, [self._snapshot, *(m["replay"] for m in manifests if m.get("replay") is not None)])

    def resume(self, algorithm: Algorithm, *, keep_newer: bool, log: Callable[[str], object]) -> dict[str, Any] | None:
        """Restores the newest good checkpoint, its replay and all counters; its `progress`, or None where there is none.

        A checkpoint is good where its own files and its replay are whole; with checkpoint.fence it is a fenced one. How many
        steps that costs is told to `log`. Intact ones behind it are deleted: they will be made again.
        """
        if not self.checkpoints:
            self._recover_experience(algorithm, log)
            return None
        folder, last = self.path / "checkpoints", self.checkpoints[-1]
        step, path, replay = self._newest_valid(log, keep_newer=keep_newer, fenced=self.config.checkpoint.fence, writable=True)
        tensors, state, manifest = checkpoint.read(path)
        self._same_spaces(algorithm, state)
        algorithm.restore(tensors, state)
        if replay is not None:
            algorithm.replay, self._snapshot = replay, manifest["replay"]
        elif keep_newer:  # the first checkpoint, made before there was any
            self._recover_experience(algorithm, log)
        before, now = manifest.get("versions", {}), versions()
        changed = [f"{name} {old} -> {now.get(name, 'none')}" for name, old in before.items() if now.get(name) != old]
        if changed:
            log(f"Saved with other versions, so the numbers may differ from an unbroken run's: {', '.join(changed)}.")
        newer_steps = [newer for newer, _ in checkpoint.intact(folder, log=lambda text: None) if newer > step]
        last_progress = checkpoint.read_manifest(folder / f"step-{max([step, *newer_steps]):012d}")["progress"]
        if last != step:
            log(f"Back to step {step}: the {last - step} steps saved behind it are lost, and will be made again.")
        for newer in newer_steps:
            checkpoint.discard(folder / f"step-{newer:012d}")
        return {**manifest["progress"], **{k: last_progress[k] for k in ("wall_seconds", "eval_seconds")}}

    def _recover_experience(self, algorithm: Algorithm, log: Callable[[str], object]) -> None:
        """Where no checkpoint names any, the experience that was written is taken over all the same."""
        if segments.numbers(self.replay_folder):
            algorithm.recover(self.replay_folder, log)

    def _newest_valid(
        self, log: Callable[[str], object], *, keep_newer: bool = False, fenced: bool = False, writable: bool = False
    ) -> tuple[int, Path, Replay | None]:
        """(step, path, replay) of the newest checkpoint whose files and replay are whole; what is passed over is told to `log`."""
        if not self.checkpoints:
            raise self._no_checkpoint_error()
        damage: CorruptError | None = None
        for step, path in checkpoint.intact(self.path / "checkpoints", log):
            manifest = checkpoint.read_manifest(path)
            if fenced and not manifest.get("fenced"):
                continue
            try:
                return step, path, self._load_replay(manifest["replay"], keep_newer=keep_newer, log=log, writable=writable)
            except CorruptError as error:
                log(f"Checkpoint of step {step} is skipped, as its replay is damaged: {error}")
                damage = damage or error
        if damage is not None:
            raise CorruptError(
                f"No checkpoint of {self.path} has a whole replay: {damage} Its weights are whole: evaluate them, or "
                "restore that file."
            ) from damage
        if fenced and any(self._is_intact(self.path / "checkpoints" / f"step-{step:012d}") for step in self.checkpoints):
            raise CorruptError(
                f"{self.path} has no intact fenced checkpoint left. Restore the folder from a copy, or start a new run."
            )
        raise self._all_damaged_error()

    def _load_replay(self, snapshot: Mapping[str, Any] | None, **options: Any) -> Replay | None:
        on_disk = self.config.train.replay == "disk"
        return None if snapshot is None else Replay.load(self.replay_folder, snapshot, on_disk=on_disk, **options)

    def _same_spaces(self, algorithm: Algorithm, state: Mapping[str, Any]) -> None:
        now = {"observation": algorithm.obs_spec.to_json(), "action": algorithm.action_spec.to_json(), "num_envs": algorithm.n_envs}
        for name, value in now.items():
            if checkpoint.dump_json({name: value}) != checkpoint.dump_json({name: state[name]}):
                raise ConfigError(
                    f"The environment's '{name}' is no longer the one that {self.path} was made with: {state[name]} -> {value}. "
                    f"{_why_spaces_differ(state[name], value)}Restore the environment, or start a new run."
                )

    def _no_checkpoint_error(self) -> ConfigError:
        return ConfigError(f"'{self.path}' holds no checkpoint yet. Train it first, or go on with --resume.")

    def _all_damaged_error(self) -> CorruptError:
        return CorruptError(
            f"No checkpoint of {self.path} verifies, of steps {self.checkpoints}. Restore one from a copy, or start anew."
        )

    def _is_intact(self, path: Path) -> bool:
        try:
            checkpoint.verify(path)
        except CorruptError:
            return False
        return True

    @property
    def checkpoint_bytes(self) -> int:
        """What the newest checkpoint takes on the disk; 0 where there is none."""
        found = self.manifest()
        return sum(entry["size"] for entry in found["files"].values()) if found else 0

    @property
    def replay_bytes(self) -> int:
        """What the replay takes on the disk."""
        folder = self.path / "replay"
        with checkpoint.storage_errors("read", folder):
            return sum(p.stat().st_size for p in folder.iterdir()) if folder.is_dir() else 0

    def write_result(self, result: Mapping[str, Any] | None) -> None:
        """Replaces result.json at once or not at all; None deletes it: the run goes on."""
        self._check_not_replaced()
        if result is None:
            with checkpoint.storage_errors("delete", file := self.path / RESULT):
                file.unlink(missing_ok=True)
        else:
            _replace(self.path / RESULT, checkpoint.dump_json(dict(result)))

    # Reading --------------------------------------------------------------------------------------------------------

    @property
    def result(self) -> dict[str, Any] | None:
        """What `worldmodel train --json` printed at the end; None while the run is not finished."""
        file = self.path / RESULT
        with checkpoint.storage_errors("read", file):
            return checkpoint.parse_json(file.read_bytes(), file) if file.is_file() else None

    @property
    def checkpoints(self) -> list[int]:
        """Real steps at which a checkpoint is there, ascending."""
        return checkpoint.steps(self.path / "checkpoints")

    def manifest(self) -> dict[str, Any] | None:
        """The manifest of the newest good checkpoint: its `progress`, `seed`, `versions`, ...; None where there is none."""
        found = checkpoint.newest(self.path / "checkpoints", log=lambda text: None)
        if found is None and self.checkpoints:
            raise self._all_damaged_error()
        return checkpoint.read_manifest(found[1]) if found else None

    def read(self, step: int | None = None) -> checkpoint.Content:
        """(tensors, state, manifest) of a checkpoint; without `step`, of the newest good one."""
        folder = self.path / "checkpoints"
        if step is None:
            found = checkpoint.newest(folder)
            if found is None and self.checkpoints:
                raise self._all_damaged_error()
            if found is None:
                raise self._no_checkpoint_error()
            return checkpoint.read(found[1])
        if step not in self.checkpoints:
            raise ConfigError(f"'{self.path}' has no checkpoint of step {step}, only of {self.checkpoints}. Choose one of them.")
        return checkpoint.read(folder / f"step-{step:012d}")

    def world_model(self, step: int | None = None, device: torch.device | str = "cpu") -> WorldModel:
        """The world model of a checkpoint (default: the newest good one), in eval mode."""
        tensors, state, _ = self.read(step)
        specs = ObsSpec.from_json(state["observation"]), ActionSpec.from_json(state["action"])
        return WorldModel.from_arrays(self.config.model, *specs, tensors["world"]).to(device).eval()

    def agent(self, step: int | None = None, env: Any = None, device: torch.device | str = "cpu", *, trust: bool = False) -> Any:
        """The agent of a checkpoint: an SB3 algorithm that predicts at once and learns on after `set_env` (or with `env`).

        trust: its agent.path, where it has one, may be opened although that can run code. Raises TrustError without.
        """
        tensors, state, _ = self.read(step)
        return registry.part("agent", state["agent"]).from_content(tensors, state, env=env, device=device, trust=trust)

    @property
    def replay_folder(self) -> Path:
        return self.path / "replay"

    def replay(self, step: int | None = None) -> Replay:
        """The experience that a checkpoint names; without `step`, of the newest one whose experience is whole.

        For reading, also while another process goes on writing the run. With train.replay=disk it lies in the folder, and what
        the writer evicts later is a CorruptError: open it again then.
        """
        for attempt in range(READ_ATTEMPTS):
            try:
                if step is None:
                    replay = self._newest_valid(_log.warning)[2]
                else:
                    replay = self._load_replay(self.read(step)[2]["replay"], writable=False)
                break
            except CorruptError:  # a writer may have replaced the checkpoint, and deleted what it alone named
                if attempt == READ_ATTEMPTS - 1:
                    raise
        if replay is None:
            raise ConfigError(f"'{self.path}' holds no experience yet. Train it first, or resume it with --resume.")
        return replay

    @cached_property
    def _world(self) -> WorldModel:
        return self.world_model()

    def encode(self, obs: Any) -> Posterior:
        """The belief about the code of observations [N, ...] in the environment's own form, as at an episode's start."""
        return self._world.encode(obs)

    def decode(self, feature: Tensor | np.ndarray) -> dict[str, np.ndarray]:
        """The expected observations of features [N, F] (or codes) in the environment's own form: {key: [N, ...]}."""
        feature = torch.as_tensor(feature, dtype=torch.float32, device=self._world.device)
        return self._world.obs.raw(self._world.decode(feature))

    def resume_command(self, device: str = "auto", trust: bool = False) -> str:
        """The whole command that goes on with this run in the current folder, for a shell."""
        words = ["worldmodel", "train", str(self.path), "--resume"]
        words += ["--device", device] if device in ("cpu", "cuda") else []
        return shlex.join(words + (["--trust"] if trust else []))

    def __repr__(self) -> str:
        return f"Run('{self.path}')"


def _is_run_folder(path: Path) -> bool:
    """Whether the folder is a run's."""
    with checkpoint.storage_errors("read", path):
        return (path / CONFIG).is_file()


def recipe_or_run(recipe: Any, run_dir: str | Path | None, resume: bool) -> tuple[Any, str | Path | None]:
    """(recipe, run folder) where a run folder may stand in the recipe's place; then there is no recipe to compare with."""
    if not isinstance(recipe, str | Path) or not _is_run_folder(Path(recipe)):
        return recipe, run_dir
    if not resume:
        raise ConfigError(f"'{recipe}' is a run folder, not a recipe. Go on with it: add --resume (resume=True).")
    if run_dir is not None and Path(run_dir).resolve() != Path(recipe).resolve():
        raise ConfigError(f"'{recipe}' and --run '{run_dir}' are two run folders. Name the one to go on with.")
    return None, recipe


def refuse_existing(path: Path) -> None:
    """ConfigError where a new run may not begin: the folder is there and holds something."""
    with checkpoint.storage_errors("read", path):
        run = (path / CONFIG).exists()
        # a run that was killed before its config was there has left at most these two
        taken = path.is_dir() and any(entry.name != LOCK and not entry.name.startswith(".tmp-") for entry in path.iterdir())
    if run:
        raise ConfigError(f"'{path}' holds a run already. Continue it with --resume (resume=True), or choose another --run.")
    if taken:
        raise ConfigError(f"'{path}' is there already and is no run folder. Choose another --run; nothing in it is overwritten.")


def latest_default(config: Config, seed: int) -> Path:
    """The default folder that `create` made last for this recipe and seed. ConfigError where there is none."""
    base = Path("runs") / f"{config.recipe_name}-s{seed}"
    numbered = [(1, base)] if (base / CONFIG).is_file() else []
    for path in base.parent.glob(f"{base.name}-*"):
        match = re.fullmatch(re.escape(base.name) + r"-(\d+)", path.name)
        if match and (path / CONFIG).is_file():
            numbered.append((int(match[1]), path))
    if not numbered:
        raise ConfigError(f"There is no run to resume at '{base}'. Name its folder with --run, or leave --resume out.")
    return max(numbered)[1]


@cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on, as this process found them."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _create_numbered(base: Path) -> Path:
    """Makes the folder, or the first numbered one that nobody has made before."""
    checkpoint.make_folder(base.parent)
    number, path = 1, base
    with checkpoint.storage_errors("create", path):
        while True:
            try:
                path.mkdir()
                return path
            except FileExistsError:
                number += 1
                path = base.with_name(f"{base.name}-{number}")


def _runs_in(folder: Path) -> list[str]:
    return sorted(p.parent.name for p in folder.glob(f"*/{CONFIG}")) if folder.is_dir() else []


def _why_spaces_differ(before: Any, now: Any) -> str:
    """Why specs of the same canonical form may differ: what the version that wrote the old one did to categories."""
    if not isinstance(now, Mapping):
        return ""
    old, new = ([spec["key"]] if "key" in spec else spec["keys"] for spec in (before, now))
    same = [[[key[name] for name in ("name", "kind", "shape", "sizes")] for key in keys] for keys in (old, new)]
    moved = [was for was, is_now in zip(old, new) if any(was[name] != is_now[name] for name in ("start", "raw_shape"))]
    if same[0] != same[1] or not moved or any(any(key["start"]) for key in moved):
        return ""
    return "Version 0.1 counted all categories from 0, in one row: its runs can be evaluated, but not gone on with. "


def _check_finite(value: Any, where: str) -> None:
    """NumericsError that names a number in nested plain data that is not finite: such a state is not worth keeping."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            _check_finite(item, f"{where}.{key}")
    elif isinstance(value, float) and not math.isfinite(value):
        raise NumericsError(f"{where} is {value}. A finite number was expected; nothing is saved, and the last checkpoint stays.")


def _replace(path: Path, data: bytes) -> None:
    temporary = path.parent / f".tmp-{token_hex(8)}"
    with checkpoint.durable(temporary) as file:
        file.write(data)
    with checkpoint.storage_errors("write", path):
        os.replace(temporary, path)
    checkpoint.sync_folder(path.parent)
