"""E5: environments whose process dies, is stopped or hangs are named within the timeout, and no process is left behind."""

from __future__ import annotations

import faulthandler
import os
import signal
import time
from collections.abc import Iterator
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
from catalogue import FULL

from worldmodel.envs.make import EnvConfig, make_vec
from worldmodel.envs.vectors.restarts import RESTARTED, ReportFaults, Restarts
from worldmodel.envs.vectors.workers import WorkerVecEnv
from worldmodel.envs.wrappers import CheckedEnv
from worldmodel.errors import ConfigError, EnvError

TIMEOUT = 2.0 if FULL else 1.0
HANG, EXIT, ABORT = 100, 101, 102
"""Deeds besides the numbers of signals."""


def do(deed: int) -> None:
    faulthandler.disable()  # else a process that aborts would print where
    if deed == HANG:
        while True:
            time.sleep(60)
    elif deed == EXIT:
        os._exit(9)
    elif deed == ABORT:
        os.abort()
    elif deed:
        os.kill(os.getpid(), deed)


class Mortal(gym.Env):
    """Does to its own process what its action, or an option of its reset, says; 0 is nothing. Observes its seed and steps."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gym.spaces.Discrete(128)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.first, self.steps = (-1 if seed is None else seed), 0
        do((options or {}).get("deed", 0))
        return np.array([self.first, 0.0]), {}

    def step(self, action):
        do(int(action))
        self.steps += 1
        return np.array([self.first, self.steps], np.float64), 1.0, False, self.steps == 9, {}


def make(index: int) -> gym.Env:
    return ReportFaults(CheckedEnv(Mortal(), index))


MADE: list[WorkerVecEnv] = []


@pytest.fixture(autouse=True)
def kill_what_a_failed_test_leaves():
    yield
    for process in [process for venv in MADE for process in venv.processes]:
        if process.is_alive():
            process.kill()
    MADE.clear()


def workers(start_method: str = "fork", timeout: float = TIMEOUT, restarts: Restarts | None = None) -> WorkerVecEnv:
    made = WorkerVecEnv([partial(make, i) for i in range(3)], start_method, timeout=timeout, restarts=restarts)
    made.seed(5)
    MADE.append(made)
    return made


def there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def orphans(pids: list[int]) -> list[int]:
    """Those still there; a forkserver takes a moment to reap."""
    deadline = time.monotonic() + 5
    while (left := [pid for pid in pids if there(pid)]) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


def failing(venv: WorkerVecEnv, who: int, deed: int, where: str) -> None:
    """Two good steps, then the deed; in a step, or in the reset that the test asks for."""
    venv.reset()
    for _ in range(2):
        venv.step(np.zeros(3, int))
    if where == "step":
        venv.step(np.where(np.arange(3) == who, deed, 0))
    else:
        venv.set_options([{"deed": deed} if i == who else {} for i in range(3)])
        venv.reset()


def cases() -> Iterator[tuple[str, int, int, str]]:
    """All deaths with fork; what waits for a timeout, or for another start method, takes seconds: all when all is asked for."""
    quick = {"forkserver": (signal.SIGKILL, 1, "step")}
    for start_method in ("fork", "forkserver", "spawn"):
        for deed in (signal.SIGKILL, signal.SIGSTOP):
            for who in range(3):
                for where in ("step", "reset"):
                    in_turn = start_method == "fork" and (deed == signal.SIGKILL or who == 1)
                    if in_turn or FULL or quick.get(start_method) == (deed, who, where):
                        yield start_method, deed, who, where
    yield from (
        ("fork", deed, 1, where) for deed in (HANG, EXIT, ABORT, signal.SIGTERM, signal.SIGSEGV) for where in ("step", "reset")
    )


SAID = {HANG: "no answer", signal.SIGSTOP: "no answer", EXIT: "exit code 9", ABORT: "SIGABRT"}


def test_a_worker_that_dies_or_hangs_is_named_in_time_and_none_is_left(figure):
    """Teeth: without the watch on the process a forked sibling keeps the dead one's pipe open, and "no answer" is said of it; with
    a plain `recv` a stopped worker blocks for ever."""
    tried = late = unnamed = 0
    left: list[int] = []
    for start_method, deed, who, where in cases():
        venv = workers(start_method)
        pids = [process.pid for process in venv.processes]
        begun = time.monotonic()
        with pytest.raises(EnvError) as caught:
            failing(venv, who, deed, where)
        late += time.monotonic() - begun > 3 * TIMEOUT
        place = f"environment {who}, episode 1, step 3: " if where == "step" else f"environment {who}, episode 2, step 0: "
        said = SAID[deed] if deed in SAID else signal.Signals(deed).name
        unnamed += not (str(caught.value).startswith(place) and said in str(caught.value))
        if said == "no answer":
            assert f"'{where}' within {TIMEOUT:g} s" in str(caught.value)
        venv.close()
        left += orphans(pids)
        tried += 1
    figure("E5", f"{tried} workers killed, stopped or hung: {unnamed} unnamed, {late} late, {len(left)} processes left")
    assert (late, unnamed, left) == (0, 0, [])


def test_close_ends_stopped_and_hanging_processes_that_nobody_noticed(monkeypatch):
    """Teeth: SIGTERM alone does not end a stopped process, nor one that ignores it."""
    monkeypatch.setattr("worldmodel.envs.vectors.workers.SHUTDOWN_SECONDS", 0.2)
    venv = workers(timeout=60.0)
    venv.reset()
    pids = [process.pid for process in venv.processes]
    os.kill(pids[0], signal.SIGSTOP)
    venv.step_async(np.array([0, HANG, 0]))
    begun = time.monotonic()
    venv.close()
    venv.close()
    assert orphans(pids) == [] and time.monotonic() - begun < 30


def test_after_a_worker_hung_no_late_answer_is_taken_for_another():
    """Teeth: a stopped process that is not killed goes on later, and its old answer would be the next step's."""
    venv = workers(timeout=0.5)
    with pytest.raises(EnvError, match="no answer"):
        failing(venv, 1, signal.SIGSTOP, "step")
    with pytest.raises(EnvError, match="environment 1"):
        venv.step(np.zeros(3, int))
    with pytest.raises(EnvError, match="environment 1"):
        venv.env_method("step", 0)
    venv.close()


@pytest.mark.parametrize("where", ["step", "reset"])
@pytest.mark.parametrize("deed", [signal.SIGKILL, signal.SIGSTOP])
def test_a_dead_worker_is_replaced_where_restarts_allow(where, deed):
    """Teeth: its siblings' steps would be lost, or an old answer read, if more than its own line were made anew."""
    restarts = Restarts(2, 300.0)
    venv = workers(timeout=0.5, restarts=restarts)
    pids = [process.pid for process in venv.processes]
    failing(venv, 1, deed, where)
    pids += [process.pid for process in venv.processes]
    steps = 3 if where == "step" else 0
    obs, _, dones, infos = venv.step(np.zeros(3, int))
    assert restarts.count == 1 and obs[:, 1].tolist() == [steps + 1, 1, steps + 1] and not dones.any()
    assert not any(RESTARTED in info for info in infos)
    seed = obs[1, 0]
    obs, rewards, dones, infos = venv.step(np.array([0, EXIT, 0]))
    assert restarts.count == 2 and obs[1, 1] == 0 and rewards.tolist() == [1, 0, 1] and dones.tolist() == [False, True, False]
    assert "exit code 9" in infos[1][RESTARTED] and infos[1]["TimeLimit.truncated"]
    assert infos[1]["terminal_observation"].tolist() == [seed, 1] and obs[1, 0] not in (seed, 5, 6, 7)
    with pytest.raises(EnvError, match=r"environment 1, episode \d, step 1: .*anew 2 times within 300 s, as env.restarts"):
        venv.step(np.array([0, EXIT, 0]))
    pids += [process.pid for process in venv.processes]
    venv.close()
    assert orphans(pids) == []


def test_the_timeout_is_an_option():
    venv = make_vec(EnvConfig(id="worldmodel.envs:Chain-v0", vectorize="subproc", timeout=7.0), 1, seed=0)
    assert venv.timeout == 7.0
    venv.close()
    for wrong in ({"timeout": 0.0}, {"timeout": -1.0}, {"restarts": -1}, {"restart_window": 0.0}):
        with pytest.raises(ConfigError):
            EnvConfig(id="worldmodel.envs:Chain-v0", **wrong)
