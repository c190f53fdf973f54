"""The results folder: its runs, sweeps, cache and the packed ledger."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lora_lab import schema
from lora_lab.config import ID_LENGTH
from lora_lab.registry import WrongInput
from lora_lab.store import files
from lora_lab.store.contents import DONE, TABLES
from lora_lab.store.files import Corrupt
from lora_lab.store.rundir import Record, RunDir

RUN_ID = re.compile(rf"[0-9a-f]{{{ID_LENGTH}}}")
CLAIMS = "claims"
"""Folder of the verdicts, in the results folder."""

SWEEP_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,79}")

SCORES = tuple(name for name in schema.RUNS if name not in ("run_id", "status", "sweep", "error"))
"""Columns of `runs` that come from metrics.json."""

LEDGER = {
    "runs": pa.schema(
        [(name, files.ARROW[kind]) for name, (kind, _) in schema.RUNS.items()]
        + [("config", pa.string()), ("provenance", pa.string())]
    ),
    **{
        name: pa.schema([("run_id", pa.string()), *TABLES[name]])
        for name in ("measures", "traces", "spectra", "examples")
    },
}
"""Columns of the packed tables; `config` and `provenance` are the JSON files as text."""

ABSENT = ""
"""Stands for a digest while the ledger's first tables are being written."""


class Store:
    """A results folder.

    Parameters
    ----------
    root : str or Path
        The folder; links and ``..`` in it are resolved once, and nothing is written outside of
        where it leads.
    create : bool
        Writers make the folder, readers refuse a missing one.

    Raises
    ------
    WrongInput
        When the folder is missing (`create` False), is a file, or one of its own folders is a
        link.
    StoreError
        When it cannot be made.
    """

    def __init__(self, root: str | Path, create: bool = False) -> None:
        try:
            self.root = Path(root).resolve()
            there, folder = self.root.exists(), self.root.is_dir()
        except (OSError, ValueError, RuntimeError):  # too long, a NUL, a loop of links
            raise WrongInput(f"{str(root)!r} is no usable name of a results folder.") from None
        if there and not folder:
            raise WrongInput(f"{str(root)!r} is a file; --results takes a folder.")
        if not folder and not create:
            raise WrongInput(
                f"no results folder {str(root)!r}; `lora-lab sweep demo` makes one, "
                "--results DIR chooses another."
            )
        files.make_folder(self.root)
        for name in ("runs", "sweeps", "ledger", "cache", "trash", "wandb"):
            self._inside(self.root / name)

    def _inside(self, path: Path) -> Path:
        """A folder of ours must not be a link: it could lead out of the results folder."""
        if path.is_symlink():
            raise WrongInput(f"{path} is a link; replace it by a folder.")
        return path

    @property
    def cache(self) -> Path:
        """Folder for what can be made again (tokenized data), made on demand."""
        files.make_folder(self.root / "cache")
        return self.root / "cache"

    @property
    def claims(self) -> Path:
        """Folder of the claims ledger; need not exist."""
        return self.root / CLAIMS

    def write_base(self, key: str, tensors: Mapping[str, np.ndarray]) -> None:
        """Keep base weights that several runs share, once."""
        path = self.cache / f"base-{key}.safetensors"
        if not path.exists():
            files.write_sealed(path, files.encode_tensors(tensors))

    def read_base(self, key: str) -> dict[str, np.ndarray] | None:
        """Base weights by layer; None when the cache does not hold them whole (any more)."""
        path = self.cache / f"base-{key}.safetensors"
        try:
            return files.decode_tensors(files.read_sealed(path), path)
        except Corrupt:
            return None

    # ---- runs ------------------------------------------------------------------------------

    def run(self, run_id: str) -> RunDir:
        """The folder of a run, which need not exist yet.

        Raises
        ------
        WrongInput
            When `run_id` is not 12 hexadecimal digits or the folder is a link.
        """
        if not RUN_ID.fullmatch(run_id):
            raise WrongInput(f"a run_id is {ID_LENGTH} hexadecimal digits; got {run_id!r}.")
        return RunDir(self._inside(self.root / "runs" / run_id))

    def run_ids(self) -> list[str]:
        """Ids of all runs with a folder, finished or not, sorted."""
        try:
            entries = list(os.scandir(self.root / "runs"))
        except FileNotFoundError:
            return []
        return sorted(
            e.name for e in entries if RUN_ID.fullmatch(e.name) and e.is_dir(follow_symlinks=False)
        )

    def stamps(self) -> dict[str, int]:
        """When each run's folder, `sweeps` and `ledger` last changed (ns).

        Whoever keeps what it has read asks here. What a running run tells of its progress does
        not count, every other write does.
        """
        folders = [*(self.root / "runs" / run_id for run_id in self.run_ids())]
        folders += [self.root / name for name in ("sweeps", "ledger")]
        out = {}
        for folder in folders:
            with contextlib.suppress(FileNotFoundError):
                out[folder.name] = os.stat(folder).st_mtime_ns
        return out

    def finished(self) -> set[str]:
        """Ids of runs that need no training: DONE on disk (diverged ones too) or packed."""
        runs = self.root / "runs"
        return {i for i in self.run_ids() if os.path.lexists(runs / i / DONE)} | self.packed_ids()

    def stored_configs(self) -> dict[str, dict[str, Any]]:
        """run_id to the content of config.json, for every readable finished run."""
        out = {record.run_id: record.config for record in self.packed()}
        for run_id in self.run_ids():
            run = self.run(run_id)
            if run.done:
                try:
                    out[run_id] = run.read_json("config")
                except Corrupt:
                    continue  # `verify` finds it, and the run is queued again
        return out

    def trash(self, ids: Iterable[str]) -> Path:
        """Move the folders of runs to ``trash``; nothing of them is deleted.

        Returns
        -------
        Path
            The folder ``trash``.

        Raises
        ------
        Busy
            When another process holds one of them; those before it are moved.
        """
        folder = self.root / "trash"
        files.make_folder(folder)
        for run_id in ids:
            run = self.run(run_id)
            with run.lock(), files.explained(run.path):
                places = (folder / f"{run_id}-{n}" for n in itertools.count(1))
                os.replace(run.path, next(p for p in places if not os.path.lexists(p)))
                files.sync_folder(folder)
        return folder

    # ---- sweeps ----------------------------------------------------------------------------

    def write_sweep(self, name: str, ids: Iterable[str]) -> None:
        """Note which runs a sweep holds; the last call with a name counts.

        Raises
        ------
        WrongInput
            When `name` is not 1 to 80 letters, digits, ``_``, ``.`` or ``-``, or starts with
            ``.``; or an id is none.
        """
        if not SWEEP_NAME.fullmatch(name):
            raise WrongInput(
                "a sweep's name is 1 to 80 letters, digits, '_', '.' or '-' and does not start "
                f"with '.'; got {name!r}."
            )
        runs = [self.run(run_id).run_id for run_id in ids]
        folder = self.root / "sweeps"
        files.make_folder(folder)
        files.write_bytes(folder / f"{name}.json", files.encode_json({"runs": runs}))

    def sweeps(self) -> dict[str, list[str]]:
        """Name of each sweep to the ids of its runs; packed runs have theirs in the ledger.

        Raises
        ------
        Corrupt
            When a file is unreadable.
        """
        out = {}
        for path in sorted((self.root / "sweeps").glob("*.json")):
            if not path.name.startswith("."):
                value = files.decode_json(files.read_bytes(path), path)
                out[path.stem] = [str(run_id) for run_id in value.get("runs", [])]
        return out

    # ---- marks of what a tracker has ---------------------------------------------------------

    @property
    def _marks(self) -> Path:
        return self.root / "wandb" / "mirrored"

    @contextmanager
    def mirroring(self) -> Iterator[None]:
        """Hold the marks; waits for who holds them."""
        files.make_folder(self._marks)
        with files.explained(self._marks):
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            fd = os.open(self._marks / "lock", flags, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def undisturbed(self, run_id: str) -> AbstractContextManager[object]:
        """Hold a run, if it has a folder.

        Raises
        ------
        Busy
            When another process holds it.
        """
        run = self.run(run_id)
        return run.lock() if run.path.exists() else nullcontext()

    def read_mark(self, name: str) -> dict[str, Any]:
        """What `write_mark` kept last; empty when there is nothing, or it is unreadable."""
        path = self._marks / f"{name}.json"
        try:
            return files.decode_json(files.read_bytes(path), path)
        except Corrupt:
            return {}

    def write_mark(self, name: str, mark: Mapping[str, Any]) -> None:
        """Note what a tracker has whole of a run (or page)."""
        files.write_bytes(self._marks / f"{name}.json", files.encode_json(mark))

    # ---- the packed ledger -----------------------------------------------------------------

    def read_ledger(self, name: str) -> pa.Table:
        """One of the packed tables (columns `LEDGER[name]`), checked; empty when none is there.

        Raises
        ------
        Corrupt
            When it is unreadable or differs from the ledger's checksums.
        """
        path = self.root / "ledger" / f"{name}.parquet"
        sums = path.with_name("checksums.json")
        if not sums.exists() and not path.exists():
            return LEDGER[name].empty_table()
        allowed = files.decode_json(files.read_bytes(sums), sums).get(path.name, [ABSENT])
        # A table that the checksums do not name is newer than this ledger.
        if ABSENT in allowed and not path.exists():
            return LEDGER[name].empty_table()
        data = files.read_bytes(path, allowed)
        return files.decode_table(data, LEDGER[name], path)

    def write_ledger(self, tables: dict[str, pa.Table]) -> list[Path]:
        """Replace the packed tables, so that a crash leaves a ledger that can be read.

        The checksums first name the old and the new contents, then the tables are replaced
        (`runs` last: rows of runs that it does not name yet are not read), then the checksums
        name the new contents only. What is the same already is not written.
        """
        folder = self.root / "ledger"
        files.make_folder(folder)
        order = [name for name in LEDGER if name != "runs"] + ["runs"]
        content = {f"{name}.parquet": files.encode_table(tables[name]) for name in order}
        sums = folder / "checksums.json"
        new = files.encode_json({name: [files.digest(data)] for name, data in content.items()})
        old = {name: self._digest(folder / name) for name in content}
        if any(old[name] != [files.digest(data)] for name, data in content.items()):
            both = {name: [*old[name], files.digest(data)] for name, data in content.items()}
            files.write_bytes(sums, files.encode_json(both))
            for name, data in content.items():
                files.write_bytes(folder / name, data)
        if not sums.exists() or sums.read_bytes() != new:
            files.write_bytes(sums, new)
        return [*(folder / name for name in content), sums]

    def _digest(self, path: Path) -> list[str]:
        return [files.file_digest(path) if path.exists() else ABSENT]

    def packed_ids(self) -> set[str]:
        """Ids of the runs in the ledger."""
        return set(self.read_ledger("runs")["run_id"].to_pylist())

    def packed(self) -> list[Record]:
        """What the ledger says of its runs, sorted by id.

        Raises
        ------
        Corrupt
            When the ledger is unreadable.
        """
        path = self.root / "ledger" / "runs.parquet"
        return [
            Record(
                row["run_id"],
                row["status"],
                files.decode_json(row["config"].encode(), path),
                {name: row[name] for name in SCORES},
                files.decode_json(row["provenance"].encode(), path),
                row["error"],
                row["sweep"],
                packed=True,
            )
            for row in self.read_ledger("runs").to_pylist()
        ]
