"""Trainings that end badly, forked from a process that has warmed up: torch's imports and first update cost more than a run.

    python forked_runs.py kills FOLDER COUNT KIND      SIGKILL at random moments, up to three in a run
    python forked_runs.py signals FOLDER COUNT KIND    SIGINT, SIGTERM, SIGHUP at random moments; some get a second one

KIND: fence, disk (with a fence, and the replay on the disk) or none.

Prints one JSON object of counts. A forked training tells of each commit through a pipe, and of each update in a file.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import random
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from small_runs import Nervous, small_train

from worldmodel.agents.loop import WorldModelAlgorithm
from worldmodel.agents.training.signals import Interrupted
from worldmodel.storage import checkpoint
from worldmodel.storage.run import Run

STEPS, SEED = 80, 0
FENCE = {"checkpoint.fence": True, "checkpoint.flush": 7, "env.num_envs": 2, "train.ema_decay": 0.9, "train.ratio": 0.3}
KINDS = {"fence": FENCE, "disk": {**FENCE, "train.replay": "disk"}, "none": {**FENCE, "checkpoint.fence": False}}
SAVE = 0.02
"""About how many seconds a save takes."""
SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER
HANG = 60.0
"""Seconds after which a training counts as hung; a signal's own limit is in `signals`."""


def digest(folder: Path) -> dict[str, str]:
    """SHA-256 of each part of the newest checkpoint: weights, optimisers and generators, state, evaluations, replay."""
    run = Run.open(folder)
    tensors, state, manifest = run.read()
    found = {}
    for file, arrays in tensors.items():
        content = hashlib.sha256()
        for name in sorted(arrays):
            content.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode() + arrays[name].tobytes())
        found[file] = content.hexdigest()
    for name, value in state.items():
        found[name] = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
    progress = {k: v for k, v in manifest["progress"].items() if "seconds" not in k}
    found["progress"] = hashlib.sha256(json.dumps(progress, sort_keys=True).encode()).hexdigest()
    replay, rows = run.replay(), hashlib.sha256()
    for number in range(replay.num_envs):
        batch = replay.stream(number)
        for x in (*batch.obs.values(), batch.prev_action, batch.reward, batch.is_first, batch.is_last, batch.is_terminal):
            rows.update(x.numpy().tobytes())
    return {**found, "replay": rows.hexdigest()}


def keep_losses(file: Path) -> Callable[[], None]:
    """From here on, each update's number and metrics are a line of the file; the returned function ends that."""
    update = WorldModelAlgorithm.update

    def noted(self, improve: bool = True) -> dict[str, float]:
        metrics = update(self, improve)
        with open(file, "a") as out:
            out.write(json.dumps([self._n_updates, metrics]) + "\n")
        return metrics

    WorldModelAlgorithm.update = noted
    return lambda: setattr(WorldModelAlgorithm, "update", update)


def losses(file: Path) -> list[tuple[int, dict[str, float]]]:
    """The whole lines of the file; a kill may have cut one off."""
    text = file.read_text() if file.exists() else ""
    return [tuple(json.loads(line)) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def differing(file: Path, truth: dict[int, dict[str, float]]) -> int:
    """Updates whose metrics are not those of the unbroken run, or that are missing, over all lives of a run."""
    made = losses(file)
    return sum(truth.get(number) != metrics for number, metrics in made) + len(truth.keys() - {n for n, _ in made})


# A training in a child ----------------------------------------------------------------------------------------------------


class Life:
    """One life of a run: a forked child that trains until it is through or ended."""

    def __init__(self, folder: Path, options: dict[str, Any]):
        self.started, (read, write) = time.monotonic(), os.pipe()
        self.heard, self._pipe = "", read
        self.pid = os.fork()
        if self.pid == 0:
            os.close(read)
            os._exit(self._train(folder, options, write))
        os.close(write)

    @staticmethod
    def _train(folder: Path, options: dict[str, Any], pipe: int) -> int:
        save = Run.save

        def told(self, algorithm, *args, fenced=False, **kwargs):
            os.write(pipe, b"begins ")
            path = save(self, algorithm, *args, fenced=fenced, **kwargs)
            if fenced or not self.config.checkpoint.fence:
                os.write(pipe, f"{algorithm.num_timesteps} ".encode())
            return path

        Run.save = told
        keep_losses(folder.with_suffix(".losses"))
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it would be ignored
        try:
            small_train(folder, STEPS, "Nervous-v0", options=options, resume=(folder / "config.yaml").exists())
            return 0
        except Interrupted as stop:
            return stop.exit_code
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
            return 99

    def wait(self, seconds: float) -> int | None:
        """The exit status, negative for a signal; None where the child still runs after so many seconds."""
        fd = os.pidfd_open(self.pid)
        try:
            if not select.select([fd], [], [], max(0.0, seconds))[0]:
                return None
        finally:
            os.close(fd)
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        with os.fdopen(self._pipe) as pipe:
            self.heard += pipe.read()
        return status

    def begins(self, saves: int) -> bool:
        """Waits for the beginning of so many saves; False where the child ends before."""
        while self.heard.count("begins") < saves:
            part = os.read(self._pipe, 4096)
            if not part:
                return False
            self.heard += part.decode()
        return True

    @property
    def acknowledged(self) -> int:
        """The last step that the child knows to be committed; -1 where it knows of none."""
        return max([-1, *(int(word) for word in self.heard.split() if word != "begins")])


def ended(life: Life) -> int:
    """The status of a child that is left alone, or -SIGKILL where it hangs."""
    status = life.wait(HANG)
    if status is None:
        os.kill(life.pid, signal.SIGKILL)
        status = life.wait(HANG)
    return status


def committed(folder: Path, fence: bool) -> int:
    """The step that a resume starts from; -1 where nothing was committed."""
    parent, found = folder / "checkpoints", -1
    for step in checkpoint.steps(parent):
        path = parent / f"step-{step:012d}"
        try:
            found = step if not fence or checkpoint.verify(path)["fenced"] else found
        except checkpoint.CorruptError:
            continue
    return found


# What is counted ----------------------------------------------------------------------------------------------------------


class Trial:
    """The unbroken run, and the counts of what differs from it."""

    def __init__(self, place: Path, options: dict[str, Any]):
        self.place, self.options, self.fence = place, options, options["checkpoint.fence"]
        place.mkdir(parents=True, exist_ok=True)
        small_train(place / "warm", STEPS, "Nervous-v0", options=self.options)  # torch's first update takes seconds
        folder, started = place / "unbroken", time.monotonic()
        assert ended(Life(folder, self.options)) == 0
        self.seconds = time.monotonic() - started
        self.truth, self.losses = digest(folder), dict(losses(folder.with_suffix(".losses")))
        self.counts = dict.fromkeys(
            ("runs", "struck", "do not open", "steps lost", "differ", "losses differ", "hung", "orphans"), 0
        )

    def finish(self, folder: Path) -> None:
        """Resumes a run to its end and compares it with the unbroken one."""
        self.counts["runs"] += 1
        self.counts["do not open"] += ended(Life(folder, self.options)) != 0
        if self.fence:
            self.counts["differ"] += digest(folder) != self.truth
            self.counts["losses differ"] += differing(folder.with_suffix(".losses"), self.losses)
        else:
            self.counts["differ"] += Run.open(folder).result["real_steps"] != STEPS

    def lost(self, folder: Path, life: Life) -> None:
        self.counts["steps lost"] += max(0, life.acknowledged - committed(folder, self.fence))


def kills(trial: Trial, count: int, rng: random.Random) -> dict[str, int]:
    """SIGKILL at random moments of runs, half of them within a save, up to three in each."""
    while trial.counts["struck"] < count:
        folder = trial.place / f"run-{trial.counts['runs']}"
        for _ in range(rng.randint(1, 3)):
            life = Life(folder, trial.options)
            within = rng.random() < 0.5 and life.begins(rng.randint(1, 3))
            status = life.wait(rng.uniform(0, SAVE if within else 0.6 * trial.seconds))
            if status is None:
                os.kill(life.pid, signal.SIGKILL)
                status = life.wait(HANG)
            trial.counts["struck"] += status == -signal.SIGKILL
            trial.counts["do not open"] += status not in (0, -signal.SIGKILL)
            trial.lost(folder, life)
        trial.finish(folder)
    return trial.counts


def signals(trial: Trial, count: int, rng: random.Random, limit: float = 5.0) -> dict[str, int]:
    """SIGINT, SIGTERM and SIGHUP in turn, at random moments of the training; each fourth one is followed by a second."""
    numbers, counts = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP), {**trial.counts, "wrong exit": 0, "twice": 0}
    trial.counts = counts
    while counts["struck"] < count:
        folder = trial.place / f"run-{counts['runs']}"
        life, number = Life(folder, trial.options), numbers[counts["struck"] % 3]
        status = None
        while status is None and committed(folder, trial.fence) < 0:  # before the first commit there is nothing to be kept
            status = life.wait(0.005)
        status = life.wait(rng.uniform(0, 0.7 * trial.seconds)) if status is None else status
        if status is None:
            twice = counts["struck"] % 4 == 3
            for _ in range(1 + twice):
                os.kill(life.pid, number)
                time.sleep(0.002)
            status = life.wait(limit)
            counts["hung"] += status is None
            status = ended(life) if status is None else status
            counts["struck"], counts["twice"] = counts["struck"] + 1, counts["twice"] + twice
            counts["wrong exit"] += status not in (128 + number, 0 if twice else None)
            trial.lost(folder, life)
        trial.finish(folder)
    try:
        counts["orphans"] += os.waitpid(-1, os.WNOHANG)[0] == 0
    except ChildProcessError:
        pass
    return counts


if __name__ == "__main__":
    torch.set_num_threads(1)
    ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)  # orphans of the children become ours, to be counted
    fault, place, count, kind = sys.argv[1:]
    assert Nervous.steps == 0
    act = {"kills": kills, "signals": signals}[fault]
    print(json.dumps(act(Trial(Path(place), KINDS[kind]), int(count), random.Random(SEED))))
