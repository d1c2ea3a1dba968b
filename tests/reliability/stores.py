"""What the storage faults are dealt to: a checkpoint, a replay, a zip and a run, in an old state and with a step to a new one."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from gymnasium import spaces
from small_runs import CHAIN, merged

from worldmodel.config import Config
from worldmodel.spaces import ActionSpec, ObsSpec
from worldmodel.storage import checkpoint, segments
from worldmodel.storage.files import sweep
from worldmodel.storage.replay import Replay
from worldmodel.storage.run import Run

ARRAYS = {step: {"world": {"w": np.full(2000, step, np.float32)}, "agent": {"b": np.full(3, step)}} for step in (1, 2)}


def replay_of(step: int) -> Replay:
    """Twelve rows in two streams at step 1; at step 2 so many more that the first are evicted."""
    replay = Replay(20, {"obs": ((3,), np.float32)}, 1, 2)
    for row in range(6 if step == 1 else 18):
        value = np.full(2, row, np.float32)
        flags = (np.full(2, on) for on in (row % 6 == 0, row % 6 == 5, False))
        replay.add({"obs": value[:, None].repeat(3, 1)}, value[:, None], value, *flags)
    return replay


def same_rows(one: Replay, two: Replay) -> bool:
    pairs = [(one.stream(s), two.stream(s)) for s in range(2)] if one.lengths == two.lengths else []
    return one.added_by_stream == two.added_by_stream and all(
        torch.equal(a.obs["obs"], b.obs["obs"]) and torch.equal(a.is_last, b.is_last) for a, b in pairs
    )


class Checkpoints:
    """Commits step 2 behind step 1, then deletes step 1."""

    def prepare(self, folder: Path) -> None:
        checkpoint.write(folder, 1, ARRAYS[1], {"step": 1})

    def act(self, folder: Path) -> None:
        if 2 not in checkpoint.steps(folder):
            checkpoint.write(folder, 2, ARRAYS[2], {"step": 2})
        checkpoint.prune(folder, keep=1)

    def state(self, folder: Path) -> int:
        sweep(folder)
        return self.checked_step(folder)

    def checked_step(self, folder: Path) -> int:
        """The step that is there, whole; and nothing else is there that is not."""
        for path in folder.iterdir():
            checkpoint.verify(path)
        step, path = checkpoint.newest(folder)
        tensors, state, _ = checkpoint.read(path)
        assert state["step"] == step and all(np.array_equal(x, ARRAYS[step][f][k]) for f in tensors for k, x in tensors[f].items())
        return step


class Zip:
    """Replaces a zip of step 1 by one of step 2."""

    def prepare(self, folder: Path) -> None:
        checkpoint.pack(folder / "a.zip", 1, ARRAYS[1], {"step": 1})

    def act(self, folder: Path) -> None:
        checkpoint.pack(folder / "a.zip", 2, ARRAYS[2], {"step": 2})

    def state(self, folder: Path) -> int:
        sweep(folder)
        assert [p.name for p in folder.iterdir()] == ["a.zip"]
        return checkpoint.unpack(folder / "a.zip")[1]["step"]


class Runs:
    """Saves a run at step 2 behind step 1: rows, checkpoint, deletion of the old one and of the rows that it alone named."""

    def __init__(self, place: Path):
        self.template = place / "template"
        options = {**merged(), "checkpoint.keep": 1}
        with Run.create(self.template, Config.from_recipe(CHAIN, options), 0) as run:
            run.save(self.algorithm(1), {})

    def algorithm(self, step: int) -> SimpleNamespace:
        specs = ObsSpec.from_space(spaces.Box(0, 1, (3,))), ActionSpec.from_space(spaces.Discrete(2))
        content = ARRAYS[step], {"seed": 0, "step": step}
        return SimpleNamespace(
            replay=replay_of(step), num_timesteps=step, n_envs=2, obs_spec=specs[0], action_spec=specs[1], content=lambda: content
        )

    def prepare(self, folder: Path) -> None:
        shutil.copytree(self.template, folder)

    def act(self, folder: Path) -> None:
        with Run.open(folder, write=True) as run:
            run._snapshot = run.manifest()["replay"]
            run.save(self.algorithm(2), {})

    def state(self, folder: Path) -> int:
        with Run.open(folder, write=True) as run:
            step = Checkpoints().checked_step(folder / "checkpoints")
            assert same_rows(run.replay(), replay_of(step))
            if step == 2:  # the next save sweeps; a segment that no snapshot names may stay until then
                run._snapshot = run.manifest()["replay"]
                Replay.sweep(folder / "replay", [run._snapshot])
            for number in segments.numbers(folder / "replay"):
                segments.read(folder / "replay", number, replay_of(1)._spec, 2)
        assert not [p for p in folder.rglob("*") if p.name.startswith((".tmp-", ".trash-"))]
        return step
