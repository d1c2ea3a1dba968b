"""Children that are forked for a limit that cannot be lifted again, or to be killed."""

from __future__ import annotations

import os
from collections.abc import Callable


def forked(act: Callable[[], bool]) -> None:
    """Runs `act` in a child, which must return True; its limits die with it."""
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(0 if act() else 1)
        except BaseException:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def killed_at(n: int, calls: tuple[str, ...], act: Callable[[], object]) -> int:
    """Exit status of a child in which `act` is killed at the n-th of these calls of the system; 0 where it made fewer."""
    pid = os.fork()
    if pid == 0:
        left = [n]

        def counted(real):
            def call(*args, **kwargs):
                left[0] -= 1
                if left[0] < 0:
                    os._exit(9)
                return real(*args, **kwargs)

            return call

        for name in calls:
            setattr(os, name, counted(getattr(os, name)))
        act()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
