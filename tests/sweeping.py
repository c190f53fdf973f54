"""Sweeps of the planted problem as processes of their own, quick to start and free to be killed.

A process starts from a fork server that has the lab imported, and its own fork server is a fork of
it instead of a new interpreter: what happens is the same, without the seconds of imports. Patches
that a test applies in such a process hold in its workers too.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing import forkserver, resource_tracker, util
from pathlib import Path
from typing import Any

import psutil

from lora_lab import engine

SMALL = (
    "model=planted",
    "data=planted",
    "size=smoke",
    "data.width=64",
    "host.threads=1",
    "host.tracker=disabled",
)
"""A run of a fraction of a second."""

GRACE = 2.0
"""Seconds within which what a sweep started must be gone after its process is."""

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["lora_lab.cli", "lora_lab.engine", "lora_lab.display", "lora_lab.execution"]
    + [f"lora_lab.adapters.{name}" for name in ("full", "head", "lora")]
    + ["lora_lab.models.planted", "lora_lab.data.planted", "torch._dynamo"]
)


class Apart:
    """A function that runs in a process and a session of its own.

    Parameters
    ----------
    function : callable
        Importable; its value is the answer. An exception ends the process with status 70.
    output : Path
        Where the output of the process and of all that it starts goes.
    patch : callable, optional
        Called in the new process first.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *args: Any,
        output: Path,
        patch: Callable[[], None] | None = None,
    ) -> None:
        self.output = output
        self._answer, theirs = CONTEXT.Pipe(duplex=False)
        self.process = CONTEXT.Process(target=_apart, args=(function, args, theirs, output, patch))
        self.process.start()
        theirs.close()
        assert self.process.pid is not None
        self.pid: int = self.process.pid

    def kill(self, group: bool, number: int = signal.SIGKILL) -> None:
        """Send a signal to the process alone, or to its whole group."""
        try:
            (os.killpg if group else os.kill)(self.pid, number)
        except ProcessLookupError:
            pass  # it was faster

    def wait(self, seconds: float = 120) -> int:
        """Its exit status (negative: the signal that ended it)."""
        self.process.join(seconds)
        status = self.process.exitcode
        assert status is not None, f"no end within {seconds} s:\n{self.output.read_text()}"
        return status

    def answer(self, seconds: float = 120) -> Any:
        """What the function returned."""
        assert self._answer.poll(seconds), self.output.read_text()
        try:
            value = self._answer.recv()
        except EOFError:
            raise AssertionError(self.output.read_text()) from None
        assert self.wait() == 0, self.output.read_text()
        return value

    def gone(self, seconds: float = GRACE) -> list[str]:
        """What is still there of all that it started, after that time at most."""
        return lingering(self.pid, seconds)


def lingering(session: int, seconds: float = GRACE) -> list[str]:
    """Processes of a session that are still there after some seconds, as text; [] at once if none.

    W&B's service makes a session of its own; its command line names its parent's process.
    """
    until = time.monotonic() + seconds
    while True:
        found = [describe(p) for p in psutil.process_iter() if _belongs(p, session)]
        if not found or time.monotonic() > until:
            return found
        time.sleep(0.02)


def _belongs(process: psutil.Process, session: int) -> bool:
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return os.getsid(process.pid) == session or process.environ().get(MARK) == str(session)
    except (psutil.Error, OSError):
        return False


def describe(process: psutil.Process) -> str:
    try:
        return f"{process.pid}: {' '.join(process.cmdline())[:200]}"
    except psutil.Error:
        return str(process.pid)


MARK = "LORA_LAB_TEST_SESSION"
"""Environment variable by which a process that left the session is still found."""


def _apart(
    function: Callable[..., Any],
    args: Sequence[Any],
    answer: Any,
    output: Path,
    patch: Callable[[], None] | None,
) -> None:
    os.setsid()
    os.environ[MARK] = str(os.getpid())
    with output.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # Fork server and resource tracker of its own, as a fresh interpreter would have.
    forkserver._forkserver.__init__()  # type: ignore[misc]
    resource_tracker._resource_tracker._fd = resource_tracker._resource_tracker._pid = None
    util.spawnv_passfds = _fork_instead
    engine.PRELOAD.clear()  # what a planted run needs is imported already
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if patch is not None:
        patch()
    try:
        answer.send(function(*args))
    except SystemExit as end:
        sys.stdout.flush()
        sys.exit(end.code)


def _fork_instead(path: bytes, args: Sequence[str], keep: Sequence[int]) -> int:
    """`util.spawnv_passfds` for `python -c code`: the code runs in a fork, files closed alike."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        start = 3
        for fd in [*sorted(set(keep) - {0, 1, 2}), os.sysconf("SC_OPEN_MAX")]:
            os.closerange(start, fd)
            start = fd + 1
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        forkserver._forkserver.__init__()  # type: ignore[misc]
        exec(args[-1], {})
        status = 0
    except SystemExit:
        status = 0
    finally:
        os._exit(status)


def lab(*argv: str) -> None:
    """`lora-lab ARGV` in this process."""
    from lora_lab.cli import main

    sys.exit(main(argv))
