"""What a person sees while a run trains: a progress bar where there is a terminal, plain lines elsewhere, and TensorBoard."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.logger import TensorBoardOutputFormat
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from torch.utils.tensorboard.writer import FileWriter, SummaryWriter

from worldmodel.tensorboard import EventFile

SHOWN = {"world/loss/observation": "obs", "world/loss/reward": "reward"}
"""Logged losses that the bar shows, under short names."""


class Lines:
    """One line for each evaluation, given to `log`."""

    def __init__(self, log: Callable[[str], object], total: int):
        self.say, self.total = log, total
        self._since, self._from = time.perf_counter(), 0
        self._rate = 0.0

    def start(self, model: BaseAlgorithm) -> None:
        self._since, self._from = time.perf_counter(), model.num_timesteps

    def step(self, model: BaseAlgorithm) -> None:
        """After every round of real steps."""

    def evaluated(self, model: BaseAlgorithm, row: Mapping[str, Any], note: str = "") -> None:
        seconds = max(time.perf_counter() - self._since, 1e-9)
        rate = (model.num_timesteps - self._from) / seconds
        self.say(
            f"step {row['real_steps']}/{self.total}  return {row['mean_return']:.1f} +- {row['std_return']:.1f} "
            f"({row['episodes']} episodes)  {rate:.0f} steps/s{note}"
        )

    def close(self) -> None:
        """The run ends, in whatever way."""


class Bar(Lines):
    """A rich progress bar on stderr, with steps per second, the last return and losses; lines appear above it."""

    def __init__(self, log: Callable[[str], object], total: int):
        super().__init__(log, total)
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        self._bar = Progress(
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]} steps/s"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[info]}"),
            console=console,
        )
        self.say = lambda text: console.print(text, markup=False, highlight=False)
        self._task = self._bar.add_task("train", total=total, rate="-", info="")
        self._losses: dict[str, float] = {}
        self._drawn = 0.0

    def start(self, model: BaseAlgorithm) -> None:
        super().start(model)
        self._bar.start()
        self._bar.update(self._task, completed=model.num_timesteps)

    def step(self, model: BaseAlgorithm) -> None:
        now = time.perf_counter()
        if now - self._drawn < 0.2 and model.num_timesteps < self.total:  # drawing costs more than a small step
            return
        self._drawn = now
        logged = model.logger.name_to_value
        self._losses |= {short: float(logged[name]) for name, short in SHOWN.items() if name in logged}
        recent = model.ep_info_buffer[-1]["r"] if model.ep_info_buffer else None
        words = ([] if recent is None else [f"return {recent:.1f}"]) + [f"{k} {v:.3g}" for k, v in self._losses.items()]
        rate = (model.num_timesteps - self._from) / max(now - self._since, 1e-9)
        self._bar.update(self._task, completed=model.num_timesteps, rate=f"{rate:.0f}", info="  ".join(words))

    def evaluated(self, model: BaseAlgorithm, row: Mapping[str, Any], note: str = "") -> None:
        super().evaluated(model, row, note)
        self._bar.update(self._task, completed=model.num_timesteps)

    def close(self) -> None:
        self._bar.stop()


class Scalars(TensorBoardOutputFormat):
    """SB3's TensorBoard format in a folder that may hold an earlier part of the run: points behind `step` are hidden.

    A disk that is full or gone does not end the run: it is told to `warn`.
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
    def __init__(self, file: EventFile):  # not the base's, which would open a file of its own
        self.event_writer = file
