"""Reports of a run in training: a progress bar where there is a terminal, plain lines elsewhere, and TensorBoard."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field
from stable_baselines3.common.logger import TensorBoardOutputFormat
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from torch.utils.tensorboard.writer import FileWriter, SummaryWriter

from worldmodel.agents.exploration import ENOUGH
from worldmodel.agents.loop import WorldModelAlgorithm
from worldmodel.config import Frozen
from worldmodel.registry import register
from worldmodel.view.tensorboard import EventFile

SHOWN_LOSSES = {"world/loss/observation": "obs", "world/loss/reward": "reward"}
"""Logged losses -> their names in progress reports."""
LINE_INTERVAL = 30.0
"""Seconds without a line after which a progress line is due."""
WINDOW = 30.0
"""Seconds over which "recent" is measured."""


@register("group", "log")
class LogConfig(Frozen):
    """Logging during training."""

    every: int = Field(4, ge=1, description="episodes between log entries")
    tensorboard: bool = Field(True, description="event files in the run folder")
    pictures: int = Field(
        500, ge=0, description="real steps between evaluations of the model on held-out episodes; also at the end; 0: none"
    )
    held_out: int = Field(8, ge=1, description="held-out episodes of each such evaluation")


class Throughput:
    """Real steps and updates per second over the last WINDOW seconds of training, evaluations excluded."""

    def __init__(self) -> None:
        self.steps = self.updates = 0.0
        self._marks: deque[tuple[float, int, int]] = deque()

    def note(self, model: WorldModelAlgorithm) -> None:
        now = time.perf_counter()
        marks, mark = self._marks, (now, model.num_timesteps, model.learner.updates)
        if not marks or now - marks[-1][0] >= WINDOW / 300:
            marks.append(mark)
        while len(marks) > 1 and now - marks[1][0] >= WINDOW:
            marks.popleft()
        span = now - marks[0][0]
        if span >= 0.5 or (span > 0 and not self.updates):  # after a pause the last figures stay
            self.steps, self.updates = (mark[1] - marks[0][1]) / span, (mark[2] - marks[0][2]) / span

    def pause(self) -> None:
        """The time until the next `note` is not counted."""
        self._marks.clear()


class LineReport:
    """A line to `log` for each evaluation, and a progress line after each LINE_INTERVAL without one."""

    def __init__(self, log: Callable[[str], object], total: int):
        self._log, self.total, self.pace = log, total, Throughput()
        self._last_line_at = time.perf_counter()

    def say(self, text: str) -> None:
        self._last_line_at = time.perf_counter()
        self._log(text)

    def start(self, model: WorldModelAlgorithm) -> None:
        self.pace.note(model)

    def alive(self, model: WorldModelAlgorithm, doing: str | None = None) -> None:
        """Called after every round of real steps and between updates; `doing` names what is not training."""
        if doing is None:
            self.pace.note(model)
        else:
            self.pace.pause()
        if time.perf_counter() - self._last_line_at >= LINE_INTERVAL:
            self.say(self.sign(model, doing))

    def sign(self, model: WorldModelAlgorithm, doing: str | None = None) -> str:
        """`pretraining 340/1500  step 500/4000  3.1 updates/s  0.0 steps/s  about 22 min left`."""
        words = [doing or phase(model), f"step {model.num_timesteps}/{self.total}"]
        words += [f"{self.pace.updates:.1f} updates/s", f"{self.pace.steps:.1f} steps/s"] if doing is None else []
        left = seconds_left(model, self.pace, self.total)
        return "  ".join(words if left is None else [*words, f"about {duration(left)} left"])

    def evaluated(self, model: WorldModelAlgorithm, entry: Mapping[str, Any], note: str = "") -> None:
        self.say(
            f"step {entry['real_steps']}/{self.total}  return {entry['mean_return']:.1f} +- {entry['std_return']:.1f} "
            f"({entry['episodes']} episodes)  {self.pace.steps:.0f} steps/s{note}"
        )

    def close(self) -> None:
        """Called when the run ends, also by an exception."""


def phase(model: WorldModelAlgorithm) -> str:
    """`collecting`: before the first update; `pretraining`: of the world model alone; `learning`, or `exploring` meanwhile."""
    made, first = model.learner.updates, model.config.train.pretrain
    if made == 0 and not model.has_pending_updates:
        return "collecting"
    if made < first:
        return f"pretraining {made}/{first}"
    return f"exploring, {model.exploration.found} of {ENOUGH} found" if model.exploration.is_on else "learning"


def seconds_left(model: WorldModelAlgorithm, pace: Throughput, total: int) -> float | None:
    """Until the last step, at the recent pace and without evaluations; None where it is unknown, as before the first updates."""
    train, steps, made = model.config.train, max(0, total - model.num_timesteps), model.learner.updates
    if made < train.pretrain:  # steps take the time of their updates
        updates = train.pretrain - made + model.ratio * steps + train.early_updates(total - steps, total)
        return updates / pace.updates if pace.updates else None
    return steps / pace.steps if pace.steps and made else None


def duration(seconds: float) -> str:
    """`40 s`, `8 min`, `2 h 5 min`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


class ProgressBar(LineReport):
    """A rich progress bar on stderr, with recent steps per second, the last return and losses; lines appear above it."""

    def __init__(self, log: Callable[[str], object], total: int):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        super().__init__(lambda text: console.print(text, markup=False, highlight=False), total)
        self._bar = Progress(
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]} steps/s"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[info]}"),
            console=console,
        )
        self._task = self._bar.add_task("train", total=total, rate="-", info="")
        self._losses: dict[str, float] = {}
        self._drawn = 0.0

    def start(self, model: WorldModelAlgorithm) -> None:
        super().start(model)
        self._bar.start()
        self._bar.update(self._task, completed=model.num_timesteps)

    def alive(self, model: WorldModelAlgorithm, doing: str | None = None) -> None:
        self._last_line_at = now = time.perf_counter()
        super().alive(model, doing)
        if now - self._drawn < 0.2 and model.num_timesteps < self.total:  # drawing costs more than a small step
            return
        self._drawn = now
        logged = model.logger.name_to_value
        self._losses |= {short: float(logged[name]) for name, short in SHOWN_LOSSES.items() if name in logged}
        recent = model.ep_info_buffer[-1]["r"] if model.ep_info_buffer else None
        words = [] if (doing or phase(model)) == "learning" else [doing or phase(model)]
        words += ([] if recent is None else [f"return {recent:.1f}"]) + [f"{k} {v:.3g}" for k, v in self._losses.items()]
        self._bar.update(self._task, completed=model.num_timesteps, rate=f"{self.pace.steps:.0f}", info="  ".join(words))

    def evaluated(self, model: WorldModelAlgorithm, entry: Mapping[str, Any], note: str = "") -> None:
        super().evaluated(model, entry, note)
        self._bar.update(self._task, completed=model.num_timesteps)

    def close(self) -> None:
        self._bar.stop()


class Scalars(TensorBoardOutputFormat):
    """SB3's TensorBoard format in a folder that may hold an earlier part of the run, whose points after `step` are hidden.

    A disk that is full or gone does not end the run: `warn` gets the message.
    """

    def __init__(self, folder: Path, step: int, warn: Callable[[str], object]):
        self.writer = _Writer(EventFile(folder, warn), step + 1)
        self._is_closed = False


class _Writer(SummaryWriter):
    """torch's writer over a given event file."""

    def __init__(self, file: EventFile, purge_step: int):
        self._file = file
        super().__init__(log_dir=file.get_logdir(), purge_step=purge_step)

    def _get_file_writer(self) -> FileWriter:
        if self.file_writer is None:
            self.file_writer = _FileWriter(self._file)
            self.all_writers = {self.log_dir: self.file_writer}
            self.file_writer.add_event(Event(session_log=SessionLog(status=SessionLog.START)), self.purge_step)
        return self.file_writer


class _FileWriter(FileWriter):
    def __init__(self, file: EventFile):  # the base's would open another file
        self.event_writer = file
