"""Independent tasks over the cores, each finished one kept on disk until all are done.

What is asked again after an interruption goes on where it was. Little work is done by threads of
this process and leaves nothing on the disk.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    as_completed,
    wait,
)
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

import psutil
from threadpoolctl import threadpool_limits

from lora_lab.embedded import cache_folder
from lora_lab.orphans import leave_with
from lora_lab.store import Corrupt, StoreError
from lora_lab.store.files import make_folder, read_sealed, write_sealed

ALONE = 1.0
"""Seconds of work that are done here before it is asked whether processes pay."""

APART = 10.0
"""Seconds that the rest must be about to take here for processes to pay: they lose a few to start,
to load libraries and to draw nulls anew, and then are a fifth to a third faster than threads."""

FORGOTTEN = 30 * 86400
"""Seconds after which results of work that nobody took up again are removed."""

Result: TypeAlias = dict[str, Any]
"""What a task gives: JSON types, with NaN."""

Tell: TypeAlias = Callable[[int, int, float], None]
"""Told how many tasks are done, of how many, and the share of the cost that this is."""


class Kept:
    """Results of finished tasks, in the user's cache folder under the name of the question.

    Parameters
    ----------
    key : str
        Hash of all that the results depend on.
    """

    def __init__(self, key: str) -> None:
        self.folder = cache_folder() / "analyze" / key
        self._works = True

    def _path(self, number: int) -> Path:
        return self.folder / f"{number}.json"

    def read(self, number: int) -> Result | None:
        """A task's result; None if it is not there or not whole."""
        try:
            result: Result = json.loads(read_sealed(self._path(number)))
        except (Corrupt, ValueError):
            return None
        return result

    def write(self, number: int, result: Result) -> None:
        """Keep a result; where the disk does not allow it, warn once and go on without."""
        if not self._works:
            return
        try:
            make_folder(self.folder)
            write_sealed(self._path(number), json.dumps(result).encode())
        except StoreError as error:
            self._works = False
            warnings.warn(f"finished layers are not kept: {error}", stacklevel=2)

    def remove(self) -> None:
        """Forget them, and what other questions left long ago."""
        shutil.rmtree(self.folder, ignore_errors=True)
        for other in self.folder.parent.glob("*"):
            try:
                old = time.time() - other.stat().st_mtime > FORGOTTEN
            except OSError:
                continue  # another process removed it
            if old:
                shutil.rmtree(other, ignore_errors=True)


@dataclass(frozen=True)
class Tasks:
    """Calls of one function that do not wait for each other.

    Attributes
    ----------
    function : callable
        Importable: ``function(*arguments) -> Result``, a dictionary of JSON types.
    arguments : sequence of tuple
        One for each task; they are pickled.
    costs : sequence of float
        About how long each takes, in any unit.
    memory : float
        Bytes that a worker needs: fewer work at once where there is not enough for all cores.
    """

    function: Callable[..., Result]
    arguments: Sequence[tuple[Any, ...]]
    costs: Sequence[float]
    memory: float


def run(tasks: Tasks, kept: Kept, tell: Tell) -> list[Result]:
    """The results in the tasks' order.

    The first second of work is done by threads of this process, the smallest tasks first, and the
    rest too where it will not take long. What is left then goes to one process for each core, the
    longest first. Each works with one BLAS thread, so that a result does not depend on where it
    was made.

    Raises
    ------
    StoreError
        When a worker was killed, for example for want of memory.
    KeyboardInterrupt
        After the workers are gone. What was finished is kept.
    """
    found = {n: r for n in range(len(tasks.arguments)) if (r := kept.read(n)) is not None}
    left = deque(sorted((n for n in range(len(tasks.costs)) if n not in found), key=_cost(tasks)))
    began, resumed = time.monotonic(), bool(found)
    workers = _workers(tasks)
    total, before = sum(tasks.costs) or 1.0, sum(tasks.costs[n] for n in found)
    made, early = before, list[int]()

    def done(number: int, result: Result, keep: bool) -> None:
        nonlocal made
        found[number] = result
        made += tasks.costs[number]
        if keep:
            kept.write(number, result)
        if time.monotonic() - began > ALONE:
            tell(len(found), len(tasks.costs), made / total)

    def expected() -> float:
        """Seconds that the rest will take here, as far as costs and the time so far tell."""
        here = made - before
        return (time.monotonic() - began) * (total - made) / here if here else math.inf

    with threadpool_limits(1), closing(_here(tasks, left, workers, expected)) as results:
        for number, result in results:
            late = time.monotonic() - began > ALONE
            done(number, result, keep=late or resumed)
            if not (late or resumed):
                early.append(number)
    if left:
        for number in early:
            kept.write(number, found[number])
        with closing(_apart(tasks, list(left)[::-1], workers)) as results:
            for number, result in results:
                done(number, result, keep=True)
    kept.remove()
    return [found[n] for n in range(len(tasks.arguments))]


def _cost(tasks: Tasks) -> Callable[[int], float]:
    return lambda number: tasks.costs[number]


def _workers(tasks: Tasks) -> int:
    room = int(psutil.virtual_memory().available // max(tasks.memory, 1.0))
    return max(1, min(os.cpu_count() or 1, room))


Results: TypeAlias = Generator[tuple[int, Result], None, None]


def _here(tasks: Tasks, left: deque[int], workers: int, expected: Callable[[], float]) -> Results:
    """Results of tasks from this process, as they come; those for processes stay in `left`.

    Decompositions let go of Python's lock: threads work on several layers at once.
    """
    threads, began = min(workers, len(left)), time.monotonic()
    if threads < 2:
        while left:
            only = left.popleft()
            yield only, tasks.function(*tasks.arguments[only])
        return

    def take() -> int | None:
        rest = expected()
        if not left or (rest > APART and time.monotonic() - began >= ALONE and len(left) > 1):
            return None
        # The longest first where all will be done here soon: then no thread waits for a long last.
        return left.pop() if rest < ALONE else left.popleft()

    # Who silences a library does so for the whole process: afterwards all is as it was.
    with warnings.catch_warnings(), ThreadPoolExecutor(threads) as pool:
        running: dict[Future[Result], int] = {}
        while True:
            # One more than there are threads, so that none waits for the next to be sent.
            while len(running) <= threads and (number := take()) is not None:
                running[pool.submit(tasks.function, *tasks.arguments[number])] = number
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()


def _apart(tasks: Tasks, numbers: Sequence[int], workers: int) -> Results:
    """Results of some tasks from worker processes, as they come. None outlives this."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lora_lab.orphans", tasks.function.__module__])
    before = set(multiprocessing.active_children())
    me = os.getpid(), psutil.Process().create_time()
    pool = ProcessPoolExecutor(min(workers, len(numbers)), context, _begin, (tasks.function, *me))
    try:
        with _no_main():
            waiting = {pool.submit(tasks.function, *tasks.arguments[n]): n for n in numbers}
        for future in as_completed(waiting):
            yield waiting.pop(future), future.result()
    except BaseException as error:
        for process in set(multiprocessing.active_children()) - before:
            process.kill()
        if isinstance(error, BrokenProcessPool):
            raise StoreError(
                "a worker process was killed, perhaps for want of memory. What was done stays: "
                "run the same again."
            ) from None
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(function: Callable[..., Result], pid: int, created: float) -> None:
    """Ready a worker: the function came along so that its libraries are there to be limited."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    leave_with(pid, created)
    threadpool_limits(1)


@contextmanager
def _no_main() -> Iterator[None]:
    """Hide the program's main file, which every worker would run again: they need nothing of it."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
