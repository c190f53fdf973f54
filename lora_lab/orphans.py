"""What a sweep starts does not outlive it: workers and their fork server look for its process."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time

import psutil

POLL = 0.5
"""Seconds between two looks."""


def leave_with(pid: int, created: float) -> None:
    """End this process when another one, or its own parent, is gone: an orphan must not train on.

    Parameters
    ----------
    pid, created : int, float
        The other process and when it was created (ids are used again).
    """
    parent = os.getppid()

    def look() -> None:
        while os.getppid() == parent and _lives(pid, created):
            time.sleep(POLL)
        os._exit(1)

    threading.Thread(target=look, daemon=True).start()


def _lives(pid: int, created: float) -> bool:
    try:
        process = psutil.Process(pid)
        return bool(process.create_time() == created and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _guard() -> None:
    """Let the fork server leave with its parent while it still imports, which takes seconds.

    By a timer, because it must have no thread when it forks; what it forks inherits no timer.
    """
    parent = os.getppid()

    def look(*_: object) -> None:
        if os.getppid() != parent:
            os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, POLL, POLL)


# The engine has the fork server import this first.
if "multiprocessing.forkserver" in sys.orig_argv[-1] and multiprocessing.parent_process() is None:
    _guard()
