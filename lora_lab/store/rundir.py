"""The life of a run: who may write, when it counts, what its status is."""

from __future__ import annotations

import fcntl
import itertools
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from lora_lab.store import files
from lora_lab.store.contents import (
    CONFIG,
    DONE,
    ERROR,
    LOCK,
    LOG,
    METRICS,
    NOT_TRAINING,
    PROVENANCE,
    SUMS,
    WORK,
    Contents,
)
from lora_lab.store.files import Busy, Corrupt
from lora_lab.store.work import Work, read_progress


@dataclass(frozen=True)
class Record:
    """What the small files of one run say.

    Attributes
    ----------
    status : str
        done, running, failed, interrupted or diverged.
    config, metrics, provenance : dict
        Contents of the JSON files (`config` with its `run_id` and `version`); empty if there
        are none.
    error : str or None
        Why it failed, where it diverged, or which file is corrupt.
    sweep : str
        Names of sweeps that the ledger notes for a packed run, joined by ','.
    packed : bool
        Whether this comes from the ledger.
    """

    run_id: str
    status: str
    config: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    sweep: str = ""
    packed: bool = False


class RunDir(Contents):
    """The folder of one run; made by `Store.run`."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._locked = False

    # ---- who may write -------------------------------------------------------------------

    @contextmanager
    def lock(self) -> Iterator[RunDir]:
        """Hold the run; the operating system lets go when the process dies.

        Raises
        ------
        Busy
            When another process (or another `RunDir` of this one) holds it.
        """
        fd = self._acquire()
        self._locked = True
        try:
            yield self
        finally:
            self._locked = False
            # Explicitly: a child forked meanwhile shares the lock and would keep it.
            fcntl.flock(fd, fcntl.LOCK_UN)
            os.close(fd)

    def _acquire(self) -> int:
        # A few tries, because a reader that asks for the status holds a shared lock for
        # microseconds, and because the folder may be renamed between open and flock.
        for _ in range(10):
            files.make_folder(self.path)
            with files.explained(self.path):
                flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
                fd = os.open(self.path / LOCK, flags, 0o644)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(fd), os.stat(self.path / LOCK)):
                    return fd
            except (BlockingIOError, FileNotFoundError):
                pass
            os.close(fd)
            time.sleep(0.01)
        raise Busy(f"run {self.run_id} is held by another process")

    def _held(self) -> bool:
        """Whether any process holds the lock; asking changes nothing in the folder."""
        try:
            fd = os.open(self.path / LOCK, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
        return False

    # ---- the way of a run: begin, write, seal or fail --------------------------------------

    def begin(self, config: dict[str, Any], provenance: dict[str, Any]) -> None:
        """Start an attempt: clear what an unfinished one left and write who we are.

        `work` (the checkpoint) stays when the unfinished attempt had an equal config; the log
        stays always, so that attempts follow each other in it. Needs the lock.

        Parameters
        ----------
        config : dict
            Content of config.json: `run_id`, `config` (see `config.as_dict`), `version`.
        provenance : dict
            Flat JSON types, see `schema.RUNS`.

        Raises
        ------
        StoreError
            When the run is finished.
        """
        assert self._locked, "begin needs the lock"
        assert config["run_id"] == self.run_id, "config of another run"
        self._refuse_finished()
        try:
            same = self.read_json("config")["config"] == config["config"]
        except (Corrupt, KeyError):
            same = False
        work = self.path / WORK
        if work.exists() and not same:
            files.remove_folder(work)
        with files.explained(self.path):
            # config.json goes last, by being replaced: without it the checkpoint would be lost.
            for entry in os.scandir(self.path):
                if entry.name in (LOCK, LOG, CONFIG, WORK):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path)
                else:
                    os.unlink(entry.path)
        self.write_json("config", config)
        self.write_json("provenance", provenance)

    @property
    def work(self) -> Path:
        """Folder for checkpoints of the run in work, made on demand, gone when it is done."""
        self._refuse_finished()
        files.make_folder(self.path / WORK)
        return self.path / WORK

    def write_progress(self, state: dict[str, Any]) -> None:
        """Tell whoever looks how far the run is."""
        Work(self.work).write_progress(state)

    def read_progress(self) -> dict[str, Any]:
        """What `write_progress` told last; empty when there is nothing."""
        return read_progress(self.path / WORK)

    @property
    def log(self) -> Path:
        """The log file; need not exist."""
        return self.path / LOG

    def fail(self, error: str, trace: str = "") -> None:
        """Record why an attempt ended; the next `begin` clears it.

        Parameters
        ----------
        error : str
            One line for the table and the summary.
        trace : str
            Traceback.
        """
        self._refuse_finished()
        data = files.encode_json({"error": error, "trace": trace})
        files.write_bytes(self.path / ERROR, data)

    def seal(self) -> None:
        """Finish: checksums of every file of the training, `work` removed, DONE last.

        Needs the lock, and config, provenance and metrics written. DONE holds the digest of the
        checksums, so a swapped or edited list of checksums is noticed too.
        """
        assert self._locked, "seal needs the lock"
        self._refuse_finished()
        sums = {}
        with files.explained(self.path):
            for entry in sorted(os.scandir(self.path), key=lambda e: e.name):
                known = entry.name in NOT_TRAINING or entry.name.startswith(files.TEMPORARY)
                if entry.is_file(follow_symlinks=False) and not known:
                    sums[entry.name] = files.file_digest(Path(entry.path))
        missing = {CONFIG, PROVENANCE, METRICS} - set(sums)
        assert not missing, f"sealed before {sorted(missing)} was written"
        data = files.encode_json(sums)
        files.write_bytes(self.path / SUMS, data)
        if (self.path / WORK).exists():
            files.remove_folder(self.path / WORK)
        files.write_bytes(self.path / DONE, files.digest(data).encode())

    def write_measures(self, rows: pd.DataFrame, names: list[str]) -> None:
        """Add measures, also to a finished run; takes the lock unless it is held already.

        Parameters
        ----------
        rows : DataFrame
            Columns of `schema.MEASURES`, as in `write_table`. Older rows of `names` go.
        names : list of str
            The measures that were computed, also those that gave no row.

        Raises
        ------
        Busy
            When another process holds the run.
        """
        with nullcontext() if self._locked else self.lock():
            self._add_measures(rows, names)

    def quarantine(self, reason: str) -> Path | None:
        """Set a corrupt finished run aside as ``<id>.corrupt-N``, so that it counts as not done.

        Takes the lock itself and looks again: when another process has set it aside meanwhile,
        nothing happens.

        Returns
        -------
        Path or None
            Where it is now; nothing of it is deleted.
        """
        with self.lock():
            if not self.done or not self.verify():
                return None
            names = (f"{self.run_id}.corrupt-{n}" for n in itertools.count(1))
            aside = next(p for p in map(self.path.with_name, names) if not os.path.lexists(p))
            with files.explained(self.path):
                os.replace(self.path, aside)
                files.sync_folder(aside.parent)
            self._sums = None
            files.write_bytes(aside / "quarantine.json", files.encode_json({"reason": reason}))
            return aside

    def status(self) -> str:
        """done, diverged, failed, running or interrupted (also: finished but unreadable)."""
        return self.record().status

    def record(self) -> Record:
        """What the run's small files say; never raises for a corrupt one."""
        if self.done:
            try:
                return self._finished_record()
            except Corrupt as error:
                return Record(self.run_id, "interrupted", error=str(error))
        config: dict[str, Any] = {}
        reason: str | None = None
        try:
            if (self.path / CONFIG).exists():
                config = self._config()
            if (self.path / ERROR).exists():
                reason = str(self.read_json("error")["error"])
            status = "interrupted" if reason is None else "failed"
        except (Corrupt, KeyError) as error:
            status, reason = "interrupted", str(error)
        if self._held():
            status, reason = "running", None
        elif self.done:  # finished while we looked
            return self.record()
        return Record(self.run_id, status, config=config, error=reason)

    def _finished_record(self) -> Record:
        metrics = self.read_json("metrics")
        diverged = metrics.get("status") == "diverged"
        return Record(
            self.run_id,
            "diverged" if diverged else "done",
            self._config(),
            metrics,
            self.read_json("provenance"),
            metrics.get("error"),
        )

    def _config(self) -> dict[str, Any]:
        config = self.read_json("config")
        if config.get("run_id") != self.run_id or not isinstance(config.get("config"), dict):
            raise Corrupt(f"{self.path / CONFIG} is the config of another run")
        return config
