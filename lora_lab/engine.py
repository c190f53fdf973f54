"""Many runs: what is left to do, each in its own process, resumable by running it again.

Pebble runs each task in a fresh process from a fork server that has the imports loaded and nothing
computed, so that one which dies takes no other with it.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import TimeoutError as FutureTimeout
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any

import psutil
from pebble import ProcessExpired, ProcessPool
from threadpoolctl import threadpool_limits

from lora_lab.config import Host, Keep, RunConfig, changed_default
from lora_lab.hydra_bridge import Planned
from lora_lab.measuring import SOON, measure_missing
from lora_lab.mirroring import mirror_after
from lora_lab.orphans import POLL, leave_with
from lora_lab.registry import WrongInput
from lora_lab.store import Busy, RunDir, Store, StoreError
from lora_lab.trackers import open_mirror

PRELOAD = [
    "lora_lab.orphans",
    "lora_lab.execution",
    "lora_lab.models.minilm",
    "lora_lab.models.planted",
    "lora_lab.adapters.lora",
    "lora_lab.adapters.full",
    "lora_lab.adapters.head",
    "lora_lab.data.rotten_tomatoes",
    "transformers.models.bert.modeling_bert",
    "torch._dynamo",  # every optimizer imports it when it is made
]
"""What the fork server imports once; nothing of it computes at import."""

STOP = threading.Event()
"""A sweep was asked to stop. Python drops an exception that a signal raises inside a finalizer."""

MANY = 200
"""Runs above which a sweep wants `host.yes=true`."""


@dataclass(frozen=True)
class Task:
    """What a worker process needs; it is pickled."""

    config: RunConfig
    run_id: str
    host: Host
    results: str
    sweep: str
    threads: int
    source: Mapping[str, Any]
    parent: tuple[int, float]


@dataclass
class Summary:
    """How a sweep went.

    Attributes
    ----------
    status : dict of str to str
        run_id to done, diverged, failed or interrupted.
    errors : dict of str to str
        run_id to the one line that says why.
    skipped : set of str
        Runs that were finished before.
    """

    status: dict[str, str] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    skipped: set[str] = field(default_factory=set)

    @property
    def failed(self) -> list[str]:
        """Ids of runs without a result."""
        return [i for i, status in self.status.items() if status in ("failed", "interrupted")]


class Watcher:
    """Told about a sweep as it goes; the command line overrides what it shows."""

    def started(self, todo: Sequence[Planned], skipped: int, workers: int) -> None:
        """Before the first run."""

    def tick(self, running: Sequence[RunDir]) -> None:
        """Several times a second."""

    def ended(self, one: Planned, status: str, error: str) -> None:
        """After each run."""


# ---- in a worker process ----------------------------------------------------------------------


def work(task: Task) -> str:
    """Do one run in this process; returns its status. Never raises for what the run did."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    # At once, even inside a long product: a run can be cut off anywhere.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    leave_with(*task.parent)
    import torch

    torch.set_num_threads(task.threads)
    # numpy's BLAS too: two workers with two spinning threads each decompose 20 times slower.
    threadpool_limits(task.threads)
    store = Store(task.results, create=True)
    run = store.run(task.run_id)
    with _held(run):
        if run.done:
            return run.status()
        with _logged(run):
            return attempt(task.config, task.host, store, run, task.source, task.sweep)


def attempt(
    config: RunConfig,
    host: Host,
    store: Store,
    run: RunDir,
    source: Mapping[str, Any],
    sweep: str,
) -> str:
    """Execute a locked run and record a failure in its folder; returns its status."""
    from lora_lab.execution import execute

    mirror = open_mirror(host.tracker, config, run.run_id, sweep, store.root)
    began = time.time()

    def on_step(
        step: int, steps: int, values: dict[str, float], traces: list[tuple[int, str, str, float]]
    ) -> None:
        mirror.follow(traces)
        state = {"step": step, "steps": steps, "began": began, "now": time.time(), **values}
        run.write_progress(state)

    try:
        execute(config, host, store, run, source, on_step)
    except Exception as error:  # whatever it was, it is this run's and no other's
        traceback.print_exc()
        if run.done:  # only its measures are missing, and those can be taken later
            mirror.finish(run.read_json("metrics"), failed=False)
            return run.status()
        run.fail(one_line(error), traceback.format_exc())
        mirror.finish({}, failed=True)
        return "failed"
    mirror.finish(run.read_json("metrics"), failed=False)
    return run.status()


def one_line(error: BaseException) -> str:
    """An error as one line for the table."""
    text = " ".join(str(error).split()) or "no message"
    known = isinstance(error, (WrongInput, StoreError))
    return text if known else f"{type(error).__name__}: {text}"


@contextlib.contextmanager
def _held(run: RunDir) -> Iterator[None]:
    """The run's lock; while another sweep trains it, wait for that one."""
    while True:
        try:
            with run.lock():
                yield
            return
        except Busy:
            time.sleep(POLL)


@contextlib.contextmanager
def _logged(run: RunDir) -> Iterator[None]:
    """Send everything that this process prints to the run's log.

    The streams too: in a notebook they are not the file descriptors.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    with run.log.open("a", encoding="utf-8", errors="backslashreplace") as log:
        saved = os.dup(1), os.dup(2)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(saved[0], 1)
            os.dup2(saved[1], 2)
            os.close(saved[0])
            os.close(saved[1])


def run_here(one: Planned, host: Host) -> str:
    """Do one run (and what it starts from) in this very process; returns its status.

    For launchers that isolate by themselves, and for `accelerate launch`.
    """
    from lora_lab.execution import follow, source_state

    store = Store(host.results, create=True)
    status = {}
    for each in left([each for wave in in_order([one]) for each in wave], store):
        own, run = whole(host, each is not one), store.run(each.run_id)
        if int(os.environ.get("RANK", "0")) > 0:
            follow(each.config, own, store, run)
            status[each.run_id] = "done"
            continue
        with _held(run):
            if not run.done:
                with _logged(run):
                    status[each.run_id] = attempt(each.config, own, store, run, source_state(), "")
    if int(os.environ.get("RANK", "0")) == 0:
        mirror_after(store, host.tracker, [one.run_id, *status])
    return status.get(one.run_id) or finished_status(store, one.run_id)


# ---- in the sweep's process -------------------------------------------------------------------


def in_order(planned: Iterable[Planned]) -> list[list[Planned]]:
    """Waves of runs without doubles: what others start from is in an earlier wave."""
    depth: dict[str, int] = {}
    known: dict[str, Planned] = {}

    def visit(one: Planned) -> int:
        if one.run_id not in depth:
            known[one.run_id] = one
            depth[one.run_id] = 1 + max((visit(n) for n in one.needs), default=-1)
        return depth[one.run_id]

    for one in planned:
        visit(one)
    waves: list[list[Planned]] = [[] for _ in range(1 + max(depth.values(), default=-1))]
    for run_id, one in known.items():
        waves[depth[run_id]].append(one)
    return waves


def left(planned: Iterable[Planned], store: Store, weighed: Collection[str] = ()) -> list[Planned]:
    """The runs that still have to be trained.

    A finished run on disk is checked against its checksums first; a corrupt one is set aside and
    counts as not done. So does a packed run, of which there are no weights, that one of these runs
    starts from.

    Parameters
    ----------
    planned : iterable of Planned
        Runs that others start from come first, as `in_order` gives them.
    weighed : collection of run_id
        Runs whose weights are asked for: a packed one counts as not done.

    Raises
    ------
    WrongInput
        When a default has changed in the code since a finished run of the same id.
    """
    stored, packed = store.stored_configs(), store.packed_ids()
    planned = list(planned)
    finished, todo = store.finished(), set()
    for one in planned:
        if one.run_id in finished:
            name = changed_default(one.config, stored.get(one.run_id, {}))
            if name is not None:
                raise WrongInput(
                    f"the default of {name} has changed since run {one.run_id} was made; give "
                    f"{name}=… explicitly, or use a new results folder (--results DIR)."
                )
            run = store.run(one.run_id)
            bad = run.verify() if run.done else []
            if bad:
                _quarantine(run, f"checksum of {', '.join(bad)} differs")
            stands = one.run_id in packed and one.run_id not in weighed
            if stands or (run.done and not bad):
                continue
        todo.add(one.run_id)
    for one in reversed(planned):
        if one.run_id in todo:
            todo |= {need.run_id for need in one.needs if not store.run(need.run_id).done}
    return [one for one in planned if one.run_id in todo]


def _quarantine(run: RunDir, reason: str) -> None:
    """Set a corrupt run aside; while another sweep does that or measures it, wait."""
    while True:
        try:
            run.quarantine(reason)
            return
        except Busy:
            time.sleep(POLL)


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """Let SIGTERM interrupt as Ctrl-C does. Only a main thread can be told of signals."""

    def stop(*_: object) -> None:
        STOP.set()
        raise KeyboardInterrupt

    STOP.clear()
    with _handled_by(stop):
        yield


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Ignore a second Ctrl-C for the moment that it takes to stop the workers."""
    with _handled_by(signal.SIG_IGN):
        yield


@contextlib.contextmanager
def _handled_by(handler: Any) -> Iterator[None]:
    """SIGINT and SIGTERM go to a handler."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {n: signal.signal(n, handler) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@_stoppable()
def sweep(
    name: str,
    planned: Sequence[Planned],
    host: Host,
    watcher: Watcher,
    weighed: Collection[str] = (),
) -> Summary:
    """Do every run that is not done yet.

    Parameters
    ----------
    name : str
        Under which the results folder notes which runs belong together.
    planned : sequence of Planned
    host : Host
        `workers` processes at once, `threads` each.
    watcher : Watcher
    weighed : collection of run_id
        Runs whose weights are asked for, see `left`.

    Raises
    ------
    WrongInput
        Before anything is made.
    KeyboardInterrupt
        After the workers were stopped; what was done stays.
    """
    from lora_lab.execution import source_state

    waves = in_order(planned)
    every = [one for wave in waves for one in wave]
    if len(every) > MANY and not host.yes:
        raise WrongInput(
            f"{name} has {len(every)} runs, more than {MANY}; narrow it, or add host.yes=true if "
            "that many are meant."
        )
    store = Store(host.results, create=True)
    todo = {one.run_id for one in left(every, store, weighed)}
    store.write_sweep(name, [one.run_id for one in planned])
    summary = Summary(skipped={one.run_id for one in every} - todo)
    cores = os.cpu_count() or 1
    workers = min(host.workers or cores, max(len(todo), 1))
    threads = host.threads or max(1, cores // (host.workers or cores))
    watcher.started([one for one in every if one.run_id in todo], len(summary.skipped), workers)
    if todo:
        source, me = source_state(), (os.getpid(), psutil.Process().create_time())
        needed = {need.run_id for one in every for need in one.needs}

        def task(one: Planned) -> Task:
            own = whole(host, one.run_id in needed)
            root = str(store.root)
            return Task(one.config, one.run_id, own, root, name, threads, source, me)

        for wave in waves:
            ready = [one for one in wave if one.run_id in todo and _can_start(one, summary)]
            _wave([(one, task(one)) for one in ready], workers, store, watcher, summary)
    for one in every:
        if one.run_id in summary.skipped:
            summary.status[one.run_id] = finished_status(store, one.run_id)
        elif one.run_id not in summary.status:
            _end(summary, watcher, one, "interrupted", "a run that it starts from has no result")
    measure_missing(store, SOON)
    mirror_after(store, host.tracker, summary.status)
    return summary


def _can_start(one: Planned, summary: Summary) -> bool:
    """Whether the runs that one starts from have a result."""
    return all(
        need.run_id in summary.skipped or summary.status.get(need.run_id) == "done"
        for need in one.needs
    )


def finished_status(store: Store, run_id: str) -> str:
    """Status of a run that is done on disk or packed in the ledger."""
    run = store.run(run_id)
    return run.status() if run.done else "done"


def whole(host: Host, needed: bool) -> Host:
    """A run that others start from keeps its update whole."""
    return dataclasses.replace(host, keep=Keep.all) if needed else host


@contextlib.contextmanager
def _pool(workers: int) -> Iterator[ProcessPool]:
    """Worker processes of one task each; they are gone when this returns, whatever happened."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    # The fork server's imports take seconds, in which one may want to stop. So it is waited for
    # with a process that needs nothing of this one, and the pool is started without a break.
    first = context.Process(target=os.getpid)
    with contextlib.suppress(EOFError, OSError):
        first.start()
        first.join()
    pool = ProcessPool(max_workers=workers, max_tasks=1, context=context)
    try:
        with _handled_by(lambda *_: STOP.set()), contextlib.suppress(RuntimeError):
            assert pool.active, "asking starts its workers"
        if STOP.is_set():
            raise KeyboardInterrupt
        yield pool
        pool.close()
        pool.join()
    except BaseException:
        with _undisturbed():
            pool.stop()
            pool.join()
        raise


Tasks = Sequence[tuple[Planned, Task]]


def _wave(tasks: Tasks, workers: int, store: Store, watcher: Watcher, summary: Summary) -> None:
    """Run tasks that do not wait for each other.

    Pebble gives a whole pool up when an idle worker dies (or the fork server does); what that cut
    off goes to a new pool, as long as the last one has brought something to its end.
    """
    while tasks:
        with _pool(workers) as pool:
            lost = _through(pool, tasks, store, watcher, summary)
        if len(lost) == len(tasks):
            for one, _ in lost:
                _end(summary, watcher, one, "interrupted", "no worker process could be kept alive")
            return
        tasks = lost


def _through(
    pool: ProcessPool, tasks: Tasks, store: Store, watcher: Watcher, summary: Summary
) -> Tasks:
    """Run tasks in a pool; returns those that were lost with it."""
    lost: list[tuple[Planned, Task]] = []
    waiting: dict[concurrent.futures.Future[Any], tuple[Planned, Task]] = {}
    for one, task in tasks:
        try:
            hours = task.host.timeout
            waiting[pool.schedule(work, args=[task], timeout=hours * 3600)] = (one, task)
        except RuntimeError:  # the pool is broken already
            lost.append((one, task))
    while waiting:
        ended, _ = concurrent.futures.wait(waiting, timeout=0.25, return_when="FIRST_COMPLETED")
        if STOP.is_set():
            raise KeyboardInterrupt
        for future in ended:
            one, task = waiting.pop(future)
            if isinstance(future.exception(), BrokenProcessPool):
                lost.append((one, task))
                continue
            _end(summary, watcher, one, *_outcome(future, store.run(task.run_id), task.host))
        watcher.tick([store.run(task.run_id) for _, task in waiting.values()])
    return lost


def _outcome(future: concurrent.futures.Future[Any], run: RunDir, host: Host) -> tuple[str, str]:
    """Status of a run whose process has ended, and the line that says why."""
    try:
        return future.result(), run.record().error or ""
    except FutureTimeout:
        status, reason = "failed", f"no end after host.timeout={host.timeout:g} hours"
    except ProcessExpired as error:
        status, reason = "interrupted", f"its process died (exit code {error.exitcode})"
    except Exception as error:
        # An error outside of the run itself: its folder could not be made, for example.
        return "failed", one_line(error)
    if run.done:  # only its measures are missing, and those can be taken later
        return run.status(), ""
    # Another sweep may have taken the run up meanwhile, or the disk be full.
    with contextlib.suppress(Busy, StoreError, OSError), run.lock():
        with run.log.open("a") as log:
            print(reason, file=log)
        if status == "failed":
            run.fail(reason)
    return status, reason


def _end(summary: Summary, watcher: Watcher, one: Planned, status: str, error: str) -> None:
    summary.status[one.run_id] = status
    if error:
        summary.errors[one.run_id] = error
    watcher.ended(one, status, error)
