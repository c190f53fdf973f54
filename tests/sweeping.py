"""Sweeps of the planted problem as processes of their own, quick to start and free to be killed.

A process starts from a fork server that has the lab imported, and its own fork server is a fork of
it instead of a new interpreter: what happens is the same, without the seconds of imports. Patches
that a test applies in such a process hold in its workers too.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from multiprocessing import forkserver, resource_tracker, util
from pathlib import Path
from typing import Any

import pandas as pd
import pandas.testing as pdt
import psutil

from lora_lab import engine, orphans
from lora_lab.hydra_bridge import plan
from lora_lab.store import load

SMALL = (
    "model=planted",
    "data=planted",
    "size=smoke",
    "data.width=64",
    "train.batch_size=16",
    "host.threads=1",
    "host.tracker=disabled",
)
"""A run of four steps, a tenth of a second."""

GRACE = 2.0
"""Seconds within which what a sweep started must be gone after its process is."""

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        *(f"lora_lab.{name}" for name in ("cli", "engine", "display", "execution", "report")),
        *(f"lora_lab.adapters.{name}" for name in ("full", "head", "lora")),
        *("lora_lab.models.planted", "lora_lab.data.planted", "torch._dynamo"),
    ]
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
        with contextlib.suppress(ProcessLookupError):  # it was faster
            (os.killpg if group else os.kill)(self.pid, number)

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

    W&B's service makes a session of its own; it is found by its environment.
    """
    until, looks = time.monotonic() + seconds, 0
    while True:
        found = [describe(p) for p in psutil.process_iter() if _belongs(p, session)]
        looks += 1
        # Looks are counted too: on a machine that starves us it starves the others.
        if not found or (time.monotonic() > until and looks > 20 * seconds):
            return found
        time.sleep(0.02)


def _belongs(process: psutil.Process, session: int) -> bool:
    try:
        # One that has ended but for a thread still holds its locks.
        if process.status() == psutil.STATUS_ZOMBIE and process.num_threads() <= 1:
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
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _start_servers_by_fork()
    os.fsync = lambda fd: None  # type: ignore[assignment]  # no power cut here
    if patch is not None:
        patch()
    answer.send(function(*args))


def _start_servers_by_fork() -> None:
    """From here on the fork server and the resource tracker of this process are forks of it."""
    forkserver._forkserver.__init__()  # type: ignore[misc]
    tracker = resource_tracker._resource_tracker
    tracker._fd = tracker._pid = None
    util.spawnv_passfds = _fork_instead
    engine.PRELOAD.clear()  # what a planted run needs is imported already


def _fork_instead(path: bytes, args: Sequence[str], keep: Sequence[int]) -> int:
    """`util.spawnv_passfds` for `python -c code`: the code runs in a fork, files closed alike."""
    # The real one runs no Python code, in which an interruption could get lost.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return pid
    status = 1
    try:
        start = 3
        for fd in [*sorted(set(keep) - {0, 1, 2}), os.sysconf("SC_OPEN_MAX")]:
            os.closerange(start, fd)
            start = fd + 1
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        forkserver._forkserver.__init__()  # type: ignore[misc]
        if "forkserver" in args[-1]:
            orphans._guard()  # its first import, in a fresh interpreter
        if "resource_tracker" in args[-1]:
            os.setsid()  # outlives a kill of the group, to take its semaphores away
        exec(args[-1], {})
        status = 0
    except SystemExit:
        status = 0
    finally:
        os._exit(status)


# ---- what runs apart ---------------------------------------------------------------------------


def lab(*argv: str) -> None:
    """`lora-lab ARGV` in this process."""
    from lora_lab.cli import main

    status = main(argv)
    sys.stdout.flush()
    sys.exit(status)


def swept(lines: Sequence[str], *words: str) -> engine.Summary:
    """A sweep over the union of some lines of overrides; `words` hold for all."""
    planned, host = plan([line.split() for line in lines], [*SMALL, *words])
    return engine.sweep("test", planned, host, engine.Watcher())


# ---- what is left of it ------------------------------------------------------------------------

CHANCE = [
    *("seconds", "train_seconds", "samples_per_second", "peak_memory"),
    *("started", "git_commit", "git_dirty"),
]
"""Columns of `runs` that differ between two equal sweeps."""


def tables(results: Path) -> dict[str, pd.DataFrame]:
    """The four tables without what is chance; a corrupt file in them fails the test."""
    with warnings.catch_warnings(action="error"):
        loaded = load(results)
        traces = loaded.traces[loaded.traces["trace"] != "samples_per_second"]
        return {
            "runs": loaded.runs.drop(columns=CHANCE),
            "measures": loaded.measures,
            "traces": traces.reset_index(drop=True),
            "spectra": loaded.spectra,
        }


def assert_same(ours: dict[str, pd.DataFrame], theirs: dict[str, pd.DataFrame]) -> None:
    """Equal to the last bit."""
    for name in ours:
        assert len(theirs[name]), f"{name} is empty: nothing is compared"
        pdt.assert_frame_equal(ours[name], theirs[name], check_exact=True)


def stamps(results: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every DONE: a run that was done again has another."""
    found = {p.parent.name: p.stat() for p in (results / "runs").glob(12 * "?" + "/DONE")}
    return {run_id: (done.st_ino, done.st_mtime_ns) for run_id, done in found.items()}


if __name__ == "__main__":  # a fresh interpreter, for what is decided at its start
    _start_servers_by_fork()
    lab(*sys.argv[1:])
