"""Stopped, killed and resumed: nothing that was committed is lost, and behind a fence nothing is different either."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import forked_runs
import pytest
from catalogue import times
from small_runs import Nervous, small_train

from worldmodel.agents.loop import WorldModelAlgorithm
from worldmodel.agents.training.callback import RunCallback
from worldmodel.agents.training.signals import Interrupted
from worldmodel.storage.replay import Replay
from worldmodel.storage.run import Run
from worldmodel.view import tensorboard

STEPS, FENCE = forked_runs.STEPS, forked_runs.FENCE
LOGGED = {**FENCE, "log.tensorboard": True, "log.every": 1, "log.pictures": 0}
SHORT = 60
"""Steps of a run in which one item is forgotten: a fence, an evaluation and some updates come after it."""
STOPS = [(2,), (14,), (20,), (26,), (40,), (54, 68), (78,)]
"""Before anything is learned, mid-episode, on a fence and behind it, at the last step but one; and twice in a run."""


@pytest.fixture(autouse=True)
def _calm():
    Nervous.steps = 0


def trained(folder: Path, options: dict = LOGGED, steps: int = STEPS, **kwargs) -> None:
    """A run, or what is left of it; each update is noted beside the folder."""
    end = forked_runs.keep_losses(folder.with_suffix(".losses"))
    try:
        small_train(folder, steps, "Nervous-v0", options=options, **kwargs)
    finally:
        end()


def stopped(folder: Path, at: int, **kwargs) -> None:
    """The run up to real step `at`, where a signal stops it."""
    on_step = RunCallback._on_step

    def stop(self) -> bool:
        self.signals.received = signal.SIGTERM if self.model.num_timesteps >= at else None
        return on_step(self)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(RunCallback, "_on_step", stop)
        trained(folder, **kwargs)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    trained(folder)
    return folder


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """An unbroken run of SHORT steps, and one like it that was stopped at 48, to go on from the fence at 40."""
    folder = tmp_path_factory.mktemp("short")
    trained(folder / "unbroken", steps=SHORT)
    Nervous.steps = 0
    stopped(folder / "half", 48, steps=SHORT)
    return folder / "unbroken", folder / "half"


def differences(unbroken: Path, folder: Path) -> tuple[list[str], int]:
    """Parts of the last checkpoint, and updates over all lives of the run, that differ from the unbroken run's."""
    truth, found = forked_runs.digest(unbroken), forked_runs.digest(folder)
    losses = dict(forked_runs.losses(unbroken.with_suffix(".losses")))
    return [part for part in truth if found[part] != truth[part]], forked_runs.differing(folder.with_suffix(".losses"), losses)


def logged(folder: Path) -> list[int]:
    return [step for step, _ in tensorboard.read(folder).scalars["world/loss/reward"]]


# R1 -----------------------------------------------------------------------------------------------------------------------


def test_a_run_that_is_stopped_and_resumed_equals_the_unbroken_one(unbroken, tmp_path, figure):
    for number, stops in enumerate(STOPS):
        folder = tmp_path / str(number)
        for i, at in enumerate(stops):
            stopped(folder, at, resume=i > 0)
        trained(folder, resume=True)
        assert differences(unbroken, folder) == ([], 0), stops
        assert logged(folder) == logged(unbroken), stops
    updates, parts = len(forked_runs.losses(unbroken.with_suffix(".losses"))), len(forked_runs.digest(unbroken))
    figure("R1", f"{sum(map(len, STOPS))} stops in {len(STOPS)} runs: 0 of {updates} losses and 0 of {parts} hashes differ, 0 gaps")


def of(file: str, *starts: str):
    """Leaves a file's arrays of these names as they are in a new agent."""

    def omit(arrays, state, new_arrays, new_state):
        chosen = [name for name in arrays[file] if name.startswith(starts)]
        assert chosen
        for name in chosen:
            del arrays[file][name]
            if name in new_arrays[file]:
                arrays[file][name] = new_arrays[file][name]

    return omit


def number(group: str, name: str):
    """Leaves a number of the state as it is in a new agent."""

    def omit(arrays, state, new_arrays, new_state):
        state[group] = {**state[group], name: new_state[group][name]}

    return omit


def statistics(arrays, state, new_arrays, new_state):
    for file, prefix in (("world", ""), ("optim", "live/")):
        of(file, f"{prefix}scaling.")(arrays, state, new_arrays, new_state)


def random_state(arrays, state, new_arrays, new_state):
    state["rng"] = new_state["rng"]


OMISSIONS = {
    "averaged weights": of("world", ""),
    "live weights": of("optim", "live/"),
    "running statistics": statistics,
    "actor": of("agent", "actor"),
    "critic": of("agent", "critic"),
    "slow critic": of("agent", "slow"),
    "moments of the world model": of("optim", "world/"),
    "moments of the actor": of("optim", "actor/"),
    "moments of the critic": of("optim", "critic/"),
    "torch's generator of learning": of("optim", "generator/learn"),
    "torch's generator of acting": of("optim", "generator/act"),
    "numpy's generator": random_state,
    "real steps": number("counters", "num_timesteps"),
    "episodes": number("counters", "episodes"),
    "logged updates": number("counters", "n_updates"),
    "updates": number("counters", "updates"),
    "credit of the ratio": number("counters", "credit"),
    "low end of returns": number("behaviour", "return_low"),
    "high end of returns": number("behaviour", "return_high"),
    "replay": None,
    "evaluations": None,
    "last evaluation": None,
}
"""Each item of the saved state, and how a resume would forget it."""


def forgetful(patch: pytest.MonkeyPatch, item: str) -> None:
    """From here on a resume does not take over the item."""
    restore, load, resume = WorldModelAlgorithm.restore, Replay.load, Run.resume

    def forgets(self, arrays, state, **kwargs):
        new_arrays, new_state = self.content()
        arrays, state = {file: dict(found) for file, found in arrays.items()}, dict(state)
        OMISSIONS[item](arrays, state, new_arrays, new_state)
        restore(self, arrays, state, **kwargs)

    def forgets_progress(self, *args, **kwargs):
        return {**resume(self, *args, **kwargs), **({"evaluations": []} if item == "evaluations" else {"evaluated": 0})}

    if item == "replay":
        patch.setattr(Replay, "load", lambda *args, **kwargs: Replay._from_identity(load(*args, **kwargs)._identity(), None, True))
        patch.setattr(
            Run, "resume", lambda self, *args, **kwargs: [resume(self, *args, **kwargs), setattr(self, "_snapshot", None)][0]
        )
    elif OMISSIONS[item] is None:
        patch.setattr(Run, "resume", forgets_progress)
    else:
        patch.setattr(WorldModelAlgorithm, "restore", forgets)


def test_each_item_of_the_saved_state_is_missed_when_a_resume_forgets_it(short, tmp_path, figure):
    """Teeth of the equality above."""
    noticed, (unbroken, half) = [], short
    for item in OMISSIONS:
        folder = tmp_path / item.replace(" ", "-").replace("'", "")
        shutil.copytree(half, folder)
        shutil.copy(half.with_suffix(".losses"), folder.with_suffix(".losses"))
        with pytest.MonkeyPatch.context() as patch:
            forgetful(patch, item)
            trained(folder, steps=SHORT, resume=True)
        if differences(unbroken, folder) != ([], 0):
            noticed.append(item)
    assert noticed == list(OMISSIONS)
    figure("R1", f"{len(noticed)} of {len(OMISSIONS)} omissions of saved state noticed")


# R2 -----------------------------------------------------------------------------------------------------------------------


def counted(fault: str, place: Path, count: int, kind: str) -> dict[str, int]:
    """What a process of its own counts, so that its forks are of no process that pytest shares."""
    words = [sys.executable, forked_runs.__file__, fault, str(place), str(count), kind]
    done = subprocess.run(words, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def wrong(counts: dict[str, int]) -> dict[str, int]:
    return {name: n for name, n in counts.items() if n and name not in ("runs", "struck", "twice")}


@pytest.mark.parametrize(("kind", "quick", "all_of_them"), [("fence", 6, 150), ("disk", 4, 100), ("none", 3, 50)])
def test_a_run_that_is_killed_at_any_moment_goes_on_from_what_it_had_committed(tmp_path, figure, kind, quick, all_of_them):
    """Teeth: a commit that is reported before it is written loses steps; written in place, it does not open or starts over."""
    counts = counted("kills", tmp_path, times(quick, all_of_them), kind)
    assert not wrong(counts), counts
    same = f", {counts['losses differ']} losses and {counts['differ']} final states that differ" if kind != "none" else ""
    text = f"{counts['struck']} kills in {counts['runs']} runs: {counts['do not open']} that do not open"
    figure("R2", f"{kind}: {text}, {counts['steps lost']} committed steps lost{same}")
