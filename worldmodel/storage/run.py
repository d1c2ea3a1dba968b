"""A run folder: config, checkpoints, replay and result of one training, readable while it is written.

    RUN/config.yaml  result.json  best.json  replay/segment-*.bin  checkpoints/step-000000001500/...  events.out.tfevents.*

One process writes (it holds a lock on RUN/.lock), any number may read. A checkpoint commits the replay's rows too: its
manifest names them. No file points at the latest checkpoint: it is the newest one that verifies. best.json names the one
that was evaluated best.
"""

from __future__ import annotations

import importlib.metadata
import logging
import math
import platform
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from worldmodel import registry
from worldmodel.config import Config, Frozen
from worldmodel.distributions import Posterior
from worldmodel.errors import ConfigError, CorruptError, NumericsError
from worldmodel.forecasts import Forecast, PlanRanking, what_if
from worldmodel.model import WorldModel
from worldmodel.registry import register
from worldmodel.spaces import ActionSpec, ObsSpec
from worldmodel.spaces.names import signal_names
from worldmodel.storage import best, checkpoint, files, segments
from worldmodel.storage.files import storage_errors
from worldmodel.storage.replay import Replay
from worldmodel.storage.run_folder import CONFIG, FolderLock, default_folder, make_numbered, refuse_existing, require_run

RESULT = "result.json"
Step = int | Literal["best", "newest"] | None
"""Which checkpoint: of so many real steps, the one evaluated best, the newest that verifies; None: the method's default."""
_log = logging.getLogger(__name__)
PACKAGES = ("worldmodel", "torch", "numpy", "gymnasium", "stable-baselines3", "safetensors")


@register("group", "checkpoint")
class CheckpointConfig(Frozen):
    """When the state is saved. At the start, at each evaluation and at the end it always is."""

    every: int = Field(5000, ge=0, description="real steps between checkpoints besides those of evaluations; 0: no others")
    flush: int = Field(
        1000, ge=0, description="real steps after which new experience is on disk (for --keep-newer); 0: as checkpoint.every"
    )
    keep: int = Field(2, ge=1, description="newest checkpoints that stay; the one that was evaluated best stays beside them")
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
        self._lock: FolderLock | None = None
        self._snapshot: dict[str, Any] | None = None

    @classmethod
    def create(cls, directory: str | Path | None, config: Config, seed: int) -> Run:
        """A new run, locked for writing. Without `directory`: runs/<recipe>-s<seed>, with a number behind it if that exists.

        ConfigError where the folder holds something already, StorageError where it cannot be written.
        """
        if directory is None:
            path = make_numbered(default_folder(config, seed))
        else:
            path = Path(directory)
            refuse_existing(path)
            files.make_folder(path)
        run = cls(path, config)
        with run._locked():
            run.write_config(config)
        return run

    @classmethod
    def open(cls, path: str | Path, *, write: bool = False) -> Run:
        """The run in a folder. ConfigError where there is none; with `write`, StorageError where another process writes."""
        path = Path(path)
        require_run(path)
        file = path / CONFIG
        with storage_errors("read", file):
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
        self._lock = FolderLock(self.path)
        try:
            for folder in ("", best.CHECKPOINTS, "replay", "projector"):
                files.sweep(self.path / folder)
            yield
        except BaseException:
            self.close()
            raise

    def _check_not_replaced(self) -> None:
        if self._lock is not None:
            self._lock.check_not_replaced()

    def close(self) -> None:
        """Frees the lock."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Writing --------------------------------------------------------------------------------------------------------

    def write_config(self, config: Config) -> None:
        """Replaces config.yaml at once or not at all."""
        with files.replacing(self.path / CONFIG) as file:
            file.write(config.to_yaml().encode())
        self.config = config

    def save(self, algorithm: Algorithm, progress: Mapping[str, Any], *, fenced: bool = False) -> Path:
        """Commits the algorithm, its replay and `progress` (JSON) as the checkpoint of its step; then deletes old ones.

        What `progress` names as `best` gets into best.json, and is not deleted.
        fenced  the algorithm begins new episodes behind it: what follows depends on this checkpoint alone
        A step that is committed already is left as it is, unless updates were still pending then. Raises StorageError,
        NumericsError; earlier checkpoints stay.
        """
        self._check_not_replaced()
        folder, path = self.checkpoint_folder, self._path_of(algorithm.num_timesteps)
        tensors, state = algorithm.content()
        updates = state.get("counters", {}).get("n_updates", 0)
        named = best.of_progress(progress, "the progress")
        if algorithm.num_timesteps in self.checkpoints and checkpoint.damage(path) is None:
            if checkpoint.read_manifest(path).get("updates", updates) >= updates:
                best.write(self.path, named)
                return path
        _check_finite(state, "state")
        snapshot = algorithm.replay.save(self.replay_folder, self._snapshot) if algorithm.replay is not None else None
        self._snapshot = snapshot  # these rows are on the disk even if the checkpoint fails; a retry need not write them again
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
        # One of this step was saved while updates were still pending.
        path = checkpoint.write(folder, algorithm.num_timesteps, tensors, state, manifest, replace=True)
        best.write(self.path, named)
        if fenced or not self.config.checkpoint.fence:  # an unfenced one does not replace the fence that a resume starts from
            checkpoint.prune(folder, self.config.checkpoint.keep, _best_steps)
        self._sweep_replay()
        return path

    def flush(self, algorithm: Algorithm) -> None:
        """Writes the experience that is not on the disk yet, so that a kill loses no more of it. Only a checkpoint commits it."""
        self._snapshot = algorithm.replay.save(self.replay_folder, self._snapshot)
        self._sweep_replay()

    def _sweep_replay(self) -> None:
        """Deletes the segments that neither a checkpoint nor the newest snapshot of the replay names.

        None while a manifest cannot be read: it may name them, and be restored later.
        """
        if self._snapshot is None:
            return
        try:
            manifests = [checkpoint.read_manifest(self._path_of(step)) for step in self.checkpoints]
        except CorruptError:
            return
        Replay.sweep(self.replay_folder, [self._snapshot, *(m["replay"] for m in manifests if m.get("replay") is not None)])

    def resume(self, algorithm: Algorithm, *, keep_newer: bool, log: Callable[[str], object]) -> dict[str, Any] | None:
        """Restores the newest good checkpoint, its replay and all counters; its `progress`, or None where there is none.

        A checkpoint is good where its own files and its replay are whole; with checkpoint.fence it is a fenced one. How many
        steps are lost is reported to `log`. Intact ones behind it are deleted: they will be made again. `best` is a Best, or
        None: the best so far at that checkpoint.
        """
        if not self.checkpoints:
            self._recover_experience(algorithm, log)
            return None
        last = self.checkpoints[-1]
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
        newer = [path for at, path in checkpoint.intact(self.checkpoint_folder, log=lambda text: None) if at > step]
        last_progress = checkpoint.read_manifest(newer[0] if newer else path)["progress"]
        if last != step:
            log(f"Back to step {step}: the {last - step} steps saved behind it are lost, and will be made again.")
        so_far = self._best_of(manifest, log)
        best.write(self.path, so_far)  # before what it named is deleted
        for path in newer:
            files.discard(path)
        kept = {k: last_progress[k] for k in ("wall_seconds", "eval_seconds")}
        return {**manifest["progress"], **kept, "best": so_far}

    def _best_of(self, manifest: Mapping[str, Any], log: Callable[[str], object]) -> best.Best | None:
        """The best evaluation up to a checkpoint, where its weights are still there and whole."""
        found = best.of_progress(manifest["progress"], self.checkpoint_folder)
        if found is None or (error := checkpoint.damage(self._path_of(found.step))) is None:
            return found
        log(f"The best checkpoint, of step {found.step}, is lost: {error} The next evaluation is the best so far.")
        return None

    def _recover_experience(self, algorithm: Algorithm, log: Callable[[str], object]) -> None:
        """Loads the experience that was written although no checkpoint names it."""
        if segments.numbers(self.replay_folder):
            algorithm.recover(self.replay_folder, log)

    def _newest_valid(
        self, log: Callable[[str], object], *, keep_newer: bool = False, fenced: bool = False, writable: bool = False
    ) -> tuple[int, Path, Replay | None]:
        """(step, path, replay) of the newest checkpoint whose files and replay are whole; what is skipped is reported to `log`."""
        if not self.checkpoints:
            raise self._no_checkpoint_error()
        damage: CorruptError | None = None
        for step, path in checkpoint.intact(self.checkpoint_folder, log):
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
        if fenced and any(checkpoint.damage(self._path_of(step)) is None for step in self.checkpoints):
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
            if files.dump_json({name: value}) != files.dump_json({name: state[name]}):
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

    def _path_of(self, step: int) -> Path:
        return checkpoint.folder_of(self.checkpoint_folder, step)

    @property
    def checkpoint_bytes(self) -> int:
        """What the newest checkpoint takes on the disk; 0 where there is none."""
        found = self.manifest()
        return sum(entry["size"] for entry in found["files"].values()) if found else 0

    @property
    def replay_bytes(self) -> int:
        """What the replay takes on the disk."""
        with storage_errors("read", folder := self.replay_folder):
            return sum(p.stat().st_size for p in folder.iterdir()) if folder.is_dir() else 0

    def write_result(self, result: Mapping[str, Any] | None) -> None:
        """Replaces result.json at once or not at all; None deletes it: the run goes on."""
        self._check_not_replaced()
        if result is None:
            with storage_errors("delete", file := self.path / RESULT):
                file.unlink(missing_ok=True)
        else:
            with files.replacing(self.path / RESULT) as file:
                file.write(files.dump_json(dict(result)))

    # Reading --------------------------------------------------------------------------------------------------------

    @property
    def result(self) -> dict[str, Any] | None:
        """What `worldmodel train --json` printed at the end; None while the run is not finished."""
        file = self.path / RESULT
        with storage_errors("read", file):
            return files.parse_json(file.read_bytes(), file) if file.is_file() else None

    @property
    def checkpoints(self) -> list[int]:
        """Real steps at which a checkpoint is there, ascending."""
        return checkpoint.steps(self.checkpoint_folder)

    @property
    def best(self) -> best.Best | None:
        """The best evaluation and its checkpoint; None before the first, and with eval.every=0. CorruptError where damaged."""
        return best.read(self.path)

    def manifest(self) -> dict[str, Any] | None:
        """The manifest of the newest good checkpoint: its `progress`, `seed`, `versions`, ...; None where there is none."""
        return checkpoint.read_manifest(self._newest(lambda text: None)) if self.checkpoints else None

    def read(self, step: Step = None) -> checkpoint.Content:
        """(tensors, state, manifest) of a checkpoint (default: the newest good one). Raises ConfigError, CorruptError."""
        if step in (None, "newest"):
            return checkpoint.read(self._newest(_log.warning))
        if step == "best":
            if (found := self.best) is None:
                raise ConfigError(f"'{self.path}' has no best checkpoint: nothing was evaluated yet. Ask for the newest one.")
            return checkpoint.read(self._path_of(found.step))
        if isinstance(step, str):
            raise ConfigError(f"step is '{step}'; expected 'best', 'newest' or one of {self.checkpoints}.")
        if step not in self.checkpoints:
            raise ConfigError(f"'{self.path}' has no checkpoint of step {step}, only of {self.checkpoints}. Choose one of them.")
        return checkpoint.read(self._path_of(step))

    def _newest(self, log: Callable[[str], object]) -> Path:
        """The newest checkpoint that verifies; ConfigError where there is none, CorruptError where none of them does."""
        if not self.checkpoints:
            raise self._no_checkpoint_error()
        found = checkpoint.newest(self.checkpoint_folder, log)
        if found is None:
            raise self._all_damaged_error()
        return found[1]

    def world_model(self, step: Step = None, device: torch.device | str = "cpu") -> WorldModel:
        """The world model of a checkpoint (default: the newest, which has seen the most), in eval mode.

        The best agent acts by that of its own checkpoint, `world_model("best")`.
        """
        tensors, state, _ = self.read(step)
        specs = ObsSpec.from_json(state["observation"]), ActionSpec.from_json(state["action"])
        return WorldModel.from_arrays(self.config.model, *specs, tensors["world"]).to(device).eval()

    def agent(self, step: Step = None, env: Any = None, device: torch.device | str = "cpu", *, trust: bool = False) -> Any:
        """The agent of a checkpoint: an SB3 algorithm that predicts at once and learns on after `set_env` (or with `env`).

        Without `step`, of the one that was evaluated best; of the newest good one where none was evaluated, and, with a warning,
        where the best is damaged. Its `num_timesteps` says which it is.
        trust: its agent.path, where it has one, may be opened although that can run code. Raises TrustError without.
        """
        tensors, state, _ = (best.content(self.path) if step is None else None) or self.read(step)
        return registry.part("agent", state["agent"]).from_content(tensors, state, env=env, device=device, trust=trust)

    @property
    def checkpoint_folder(self) -> Path:
        return self.path / best.CHECKPOINTS

    @property
    def replay_folder(self) -> Path:
        return self.path / "replay"

    def replay(self, step: Step = None) -> Replay:
        """The experience that a checkpoint names; without `step` or with "newest", of the newest one whose experience is whole.

        For reading, also while another process goes on writing the run. With train.replay=disk it lies in the folder, and what
        the writer evicts later is a CorruptError: open it again then.
        """
        for attempt in range(best.READ_ATTEMPTS):
            try:
                if step in (None, "newest"):
                    replay = self._newest_valid(_log.warning)[2]
                else:
                    replay = self._load_replay(self.read(step)[2]["replay"], writable=False)
                break
            except CorruptError:  # a writer may have replaced the checkpoint, and deleted what it alone named
                if attempt == best.READ_ATTEMPTS - 1:
                    raise
        if replay is None:
            raise ConfigError(f"'{self.path}' holds no experience yet. Train it first, or resume it with --resume.")
        return replay

    @cached_property
    def _world(self) -> WorldModel:
        return self.world_model()

    def encode(self, obs: Any) -> Posterior:
        """The posterior over the latents of observations [N, ...] in the environment's own form, as at an episode's start."""
        return self._world.encode(obs)

    def decode(self, feature: Tensor | np.ndarray) -> dict[str, np.ndarray]:
        """The expected observations of features [N, F] (or latents) in the environment's own form: {key: [N, ...]}."""
        feature = torch.as_tensor(feature, dtype=torch.float32, device=self._world.device)
        return self._world.obs.raw(self._world.decode(feature))

    def what_if(self, observations: Any, actions: Any, plan: Any, samples: int = 32, **options: Any) -> Forecast | PlanRanking:
        """What the newest good checkpoint's world model expects of the H actions of a plan, or of several plans that it ranks.

        observations, actions  the T + 1 of an episode up to now, and the T taken between them (None where T = 0), in the
                               environment's own units. Options (seed, discount) and errors: `worldmodel.forecasts.what_if`
        """
        names = signal_names(self._world.obs, self.config.env.names, self.config.env.id)
        return what_if(self._world, observations, actions, plan, samples, names=names, **options)

    def resume_command(self, device: str = "auto", trust: bool = False) -> str:
        """The whole command that goes on with this run in the current folder, for a shell."""
        words = ["worldmodel", "train", str(self.path), "--resume"]
        words += ["--device", device] if device in ("cpu", "cuda") else []
        return shlex.join(words + (["--trust"] if trust else []))

    def __repr__(self) -> str:
        return f"Run('{self.path}')"


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


def _best_steps(manifest: Mapping[str, Any]) -> list[int]:
    """The checkpoint that was the best when this one was saved: a resume from this one goes on with it."""
    found = best.of_progress(manifest.get("progress") or {}, "the progress")
    return [] if found is None else [found.step]


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
