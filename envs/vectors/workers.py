"""Environments in processes of their own, whose errors are reported here, also where a process hangs or is gone."""

from __future__ import annotations

import ast
import contextlib
import signal
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import gymnasium as gym
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv, VecEnvWrapper

from worldmodel.envs.vectors.restarts import FAULT, RestartingVecEnv, Restarts, zero_observation
from worldmodel.errors import EnvError

SHUTDOWN_SECONDS = 5.0
"""Seconds that processes have to end by themselves."""


class WorkerConnection:
    """The pipe to one worker, with the interface that SB3 uses.

    Where no answer comes within `timeout` seconds, or the process is gone, `recv` gives a report (see ReportFaults), and raises
    an EnvError for commands other than step and reset. A process that hangs is killed, so that no late answer is taken for that to
    a later command. Steps count actions, and the reset that follows an episode's last step belongs to it.
    """

    def __init__(self, index: int, remote: Connection, process: BaseProcess, space: gym.Space, timeout: float | None):
        self.index, self.remote, self.process, self.space, self.timeout = index, remote, process, space, timeout
        self.episode = self.steps = 0
        self.command, self.sent_at = "", 0.0
        self.hung = False

    def send(self, message: tuple[str, Any]) -> None:
        self.command, self.sent_at = message[0], time.monotonic()
        if self.command == "reset":
            self.episode, self.steps = self.episode + 1, 0
        self.steps += self.command == "step"
        with contextlib.suppress(OSError):  # `recv` reports a process that is gone
            self.remote.send(message)

    def recv(self) -> Any:
        left = None if self.timeout is None else max(0.0, self.sent_at + self.timeout - time.monotonic())
        try:
            # A sibling that was forked may hold a copy of the pipe's other end: the process is watched as well.
            if not self.hung and not wait([self.remote, self.process.sentinel], left):
                self.hung = True
                self.process.kill()
            if not self.hung and self.remote.poll():
                answer = self.remote.recv()
                if self.command == "step" and answer[2]:
                    self.episode, self.steps = self.episode + 1, 0
                return answer
        except (EOFError, OSError):
            pass
        message = f"environment {self.index}, episode {self.episode}, step {self.steps}: {self._cause()}"
        report = {FAULT: ("EnvError", message)}
        if self.command == "step":
            return zero_observation(self.space), 0.0, True, report, {}
        if self.command == "reset":
            return zero_observation(self.space), report
        raise EnvError(message)

    def _cause(self) -> str:
        if self.hung:
            return (
                f"no answer to '{self.command}' within {self.timeout:g} s, and its process was killed. Expected one: correct the "
                "environment, or raise env.timeout where it is only slow."
            )
        return f"its process is gone ({exit_reason(self.process)}); expected an answer. env.vectorize=dummy shows what it printed."

    def close(self) -> None:
        self.remote.close()


class WorkerVecEnv(RestartingVecEnv, SubprocVecEnv):
    """SB3's SubprocVecEnv that raises its workers' errors in this process, or replaces those environments and their processes.

    env_fns   make environments in ReportFaults
    timeout   seconds that a step or a reset may take; None: for ever

    A process that is gone or hangs is an error like any other. `close` never hangs, and leaves no process behind.
    """

    def __init__(
        self,
        env_fns: Sequence[Callable[[], gym.Env]],
        start_method: str | None = None,
        *,
        timeout: float | None = 60.0,
        restarts: Restarts | None = None,
    ):
        self._env_fns, self._start_method, self.timeout = list(env_fns), start_method, timeout
        self.restarts, self._failures = restarts or Restarts(), [0] * len(self._env_fns)
        self.processes: list[BaseProcess] = []
        try:
            super().__init__(self._env_fns, start_method=start_method)
        except (EOFError, OSError) as error:
            stop_processes(self.processes)
            causes = [f"environment {i} ({exit_reason(p)})" for i, p in enumerate(self.processes) if p.exitcode is not None]
            raise EnvError(
                f"The environments could not be made in processes of their own: {', '.join(causes)}.{main_guard_hint(start_method)}"
            ) from error
        self.remotes = [self._connect(i, remote, process) for i, (remote, process) in enumerate(zip(self.remotes, self.processes))]

    def _connect(self, index: int, remote: Connection, process: BaseProcess) -> WorkerConnection:
        return WorkerConnection(index, remote, process, self.observation_space, self.timeout)

    def _recreate(self, index: int, seed: int | None) -> tuple[Any, dict[str, Any]]:
        old = self.remotes[index]
        old.send(("close", None))
        stop_processes([old.process])
        old.close()
        try:
            fresh = SubprocVecEnv([self._env_fns[index]], self._start_method)
        except (EOFError, OSError) as error:
            raise EnvError(f"environment {index}: it could not be made anew in a process of its own.") from error
        worker = self._connect(index, fresh.remotes[0], fresh.processes[0])
        worker.episode = old.episode
        self.remotes[index], self.processes[index] = worker, worker.process
        worker.send(("reset", (seed, None)))
        return worker.recv()

    def close(self) -> None:
        if self.closed:
            return
        deadline = time.monotonic() + SHUTDOWN_SECONDS
        for worker in self.remotes:
            with contextlib.suppress(EOFError, OSError):
                if self.waiting and worker.remote.poll(max(0.0, deadline - time.monotonic())):
                    worker.remote.recv()
            worker.send(("close", None))
        stop_processes(self.processes)
        for worker in self.remotes:
            worker.close()
        self.closed = True


def drain(venv: VecEnv) -> None:
    """Reads the answers of a SubprocVecEnv to a call that was interrupted, which would be taken for those to the next.

    Does nothing for other VecEnvs. Raises EnvError where the processes are gone.
    """
    while isinstance(venv, VecEnvWrapper):
        venv = venv.venv
    if not isinstance(venv, SubprocVecEnv) or venv.closed:
        return
    try:
        for remote in venv.remotes:  # answers before that to this are old
            remote.send(("get_spaces", None))
        for remote in venv.remotes:
            answer = None
            while not (isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[0], gym.Space)):
                answer = remote.recv()
    except (EOFError, OSError) as error:
        raise EnvError(
            "The environments' processes are gone: what interrupted the last call reached them too, as Ctrl-C does. Make the "
            "VecEnv anew, and give it to set_env."
        ) from error
    venv.waiting = False


def main_guard_hint(start_method: str | None) -> str:
    """Advice where processes die because each runs the unguarded script that started them; "" where it is guarded or forked."""
    if start_method == "fork":
        return ""
    script = getattr(sys.modules["__main__"], "__file__", None)
    try:
        tree = ast.parse(Path(script or "").read_text())
    except (OSError, SyntaxError, ValueError):
        return ""
    tests = [node.test for node in tree.body if isinstance(node, ast.If)]
    if any(isinstance(name, ast.Name) and name.id == "__name__" for test in tests for name in ast.walk(test)):
        return ""
    return (
        f" Each of them runs {Path(script).name} from its top, and so would start processes again. Put what the script does under "
        '`if __name__ == "__main__":`, or use env.vectorize=dummy.'
    )


def stop_processes(processes: Sequence[BaseProcess]) -> None:
    """Waits for processes to end, and kills those that do not, also a stopped one, which takes no SIGTERM."""
    deadline = time.monotonic() + SHUTDOWN_SECONDS
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    for method in ("terminate", "kill"):
        for process in processes:
            if process.is_alive():
                getattr(process, method)()
                process.join(1)


def exit_reason(process: BaseProcess) -> str:
    """How a process ended: `exit code 9`, `SIGKILL`."""
    process.join(1)  # its pipe breaks a moment before it is reaped
    code = process.exitcode
    if code is None or code >= 0:
        return f"exit code {code}"
    names = {number.value: number.name for number in signal.Signals}
    return names.get(-code, f"signal {-code}")
