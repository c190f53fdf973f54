"""The tidy tables of a results folder, and packing them small enough to commit."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from lora_lab import schema
from lora_lab.config import flat
from lora_lab.layers import depth_of, module_of
from lora_lab.store.files import PANDAS, Corrupt, StoreError, rounded
from lora_lab.store.folder import LEDGER, SCORES, Store
from lora_lab.store.rundir import Record
from lora_lab.where import where as rows_where

PLAIN = {"model": "string", "data": "string", "adapter": "string", "seed": "int64"}
"""Undotted config columns of `runs`."""

PROVENANCE = {
    "git_commit": "string",
    "git_dirty": "boolean",
    "started": "string",
    "threads": "int64",
    "device": "string",
    "cpu": "string",
    "torch": "string",
    "lora_lab": "string",
    "model_hash": "string",
    "data_hash": "string",
}
"""Columns of `runs` that come from provenance.json."""

COLUMNS = {
    "measures": schema.MEASURES,
    "traces": schema.TRACES,
    "spectra": schema.SPECTRA,
    "examples": schema.EXAMPLES,
}
PARTS = {name: (name,) for name in COLUMNS} | {"measures": ("measures", "oracle")}
"""The files of a run whose rows make a table."""


T = TypeVar("T")


def load(root: str | Path = "results", where: str | None = None) -> Tables:
    """The tables of a results folder.

    Parameters
    ----------
    root : str or Path
        Results folder.
    where : str, optional
        Condition on the columns of `runs`, such as ``"adapter = lora and adapter.r >= 8"``; see
        `lora_lab.where`. None: all runs.

    Returns
    -------
    Tables
        `.runs`, `.measures`, `.traces`, `.spectra`, `.examples`, each read when first asked for.

    Raises
    ------
    WrongInput
        When there is no such folder, or the condition is none.
    """
    tables = Tables(Store(root))
    return tables if where is None else Tables(tables.store, rows_where(tables.runs, where).run_id)


class Tables:
    """Tidy tables of the runs on disk and of packed ones; a run on disk wins.

    Columns and dtypes are those of `schema.py`. An integer column of `runs` that a run lacks is
    float64 with NaN there. A corrupt file costs only what it holds: a run whose small files are
    corrupt is `interrupted` with the reason in `error`, rows of a corrupt table are left out with
    a warning and a line in `problems`.

    Parameters
    ----------
    store : Store
    only : collection of run_id, optional
        These runs alone; None: all.
    known : mapping of run_id to Record, optional
        Runs whose small files need not be read again.

    Attributes
    ----------
    problems : list of str
        One line for each corrupt file met so far.
    """

    def __init__(
        self,
        store: Store,
        only: Collection[str] | None = None,
        known: Mapping[str, Record] | None = None,
    ) -> None:
        self.store = store
        self.known = known or {}
        self.only = None if only is None else set(only)
        self.problems: list[str] = []

    @cached_property
    def records(self) -> dict[str, Record]:
        """What is known of every run, by id, sorted."""
        out = {r.run_id: r for r in self._tried(self.store.packed) or [] if self._asked(r.run_id)}
        for run_id in filter(self._asked, self.store.run_ids()):
            run = self.store.run(run_id)
            record = self.known.get(run_id) or run.record()
            if run.done and record.status == "interrupted":
                self._note(str(record.error))
            # A folder that is being made again does not hide the finished run in the ledger.
            if record.status in ("done", "diverged") or run_id not in out:
                out[run_id] = record
        return dict(sorted(out.items()))

    def _asked(self, run_id: str) -> bool:
        return self.only is None or run_id in self.only

    @cached_property
    def sweeps(self) -> dict[str, str]:
        """run_id to the names of its sweeps, joined by ','."""
        names = {i: set(filter(None, r.sweep.split(","))) for i, r in self.records.items()}
        for sweep, ids in (self._tried(self.store.sweeps) or {}).items():
            for run_id in names.keys() & set(ids):
                names[run_id].add(sweep)
        return {run_id: ",".join(sorted(of_run)) for run_id, of_run in names.items()}

    @cached_property
    def runs(self) -> pd.DataFrame:
        """One row per run: `schema.RUNS`, config columns, provenance columns; sorted by run_id."""
        rows = [self._row(record) for record in self.records.values()]
        dotted = sorted({name for row in rows for name in row if "." in name})
        ours = {name: kind for name, (kind, _) in schema.RUNS.items()}
        first = ("run_id", "status", "sweep")
        names = [*first, *PLAIN, *dotted, *(n for n in ours if n not in first), *PROVENANCE]
        kinds = ours | PLAIN | PROVENANCE
        return pd.DataFrame(
            {name: _column([row.get(name) for row in rows], kinds.get(name)) for name in names}
        )

    def _row(self, record: Record) -> dict[str, Any]:
        row = flat(record.config.get("config", {}))
        row |= {name: record.metrics.get(name) for name in SCORES}
        row |= {name: record.provenance.get(name) for name in PROVENANCE}
        if record.status != "done":
            row |= {"score": None, "validation_score": None, "loss": None}
        return row | {
            "run_id": record.run_id,
            "status": record.status,
            "sweep": self.sweeps[record.run_id],
            "error": record.error.strip().rpartition("\n")[2] if record.error else None,
        }

    @cached_property
    def measures(self) -> pd.DataFrame:
        """Rows of `schema.MEASURES` of finished runs."""
        return self._frame("measures")

    @cached_property
    def traces(self) -> pd.DataFrame:
        """Rows of `schema.TRACES` of finished and diverged runs."""
        return self._frame("traces")

    @cached_property
    def spectra(self) -> pd.DataFrame:
        """Rows of `schema.SPECTRA` of finished runs."""
        return self._frame("spectra")

    @cached_property
    def examples(self) -> pd.DataFrame:
        """Rows of `schema.EXAMPLES` of finished runs."""
        return self._frame("examples")

    # ---- reading ---------------------------------------------------------------------------

    def _note(self, problem: str) -> None:
        self.problems.append(problem)
        warnings.warn(f"{problem}; left out", stacklevel=2)

    def _tried(self, read: Callable[[], T]) -> T | None:
        try:
            return read()
        except Corrupt as error:
            self._note(str(error))
            return None

    def arrow(self, name: str) -> pa.Table:
        """A table other than runs, of finished runs, as stored: columns `LEDGER[name]`."""
        wanted = ("done", "diverged") if name == "traces" else ("done",)
        records = [r for r in self.records.values() if r.status in wanted]
        ids = pa.array([r.run_id for r in records], pa.string())
        empty = LEDGER[name].empty_table()
        parts, codes = [empty.drop_columns("run_id")], [np.zeros(0, np.int64)]
        if any(r.packed for r in records):
            packed = self._tried(lambda: self.store.read_ledger(name)) or empty
            code = pc.index_in(packed["run_id"], ids).fill_null(-1).to_numpy()
            keep = (code >= 0) & np.array([r.packed for r in records])[code]
            parts.append(packed.drop_columns("run_id").filter(pa.array(keep)))
            codes.append(code[keep])
        for code_of_run, record in enumerate(records):
            if record.packed:
                continue
            run = self.store.run(record.run_id)
            for file in PARTS[name]:
                part = self._tried(partial(run.find_table, file))
                if part is not None:
                    parts.append(part)
                    codes.append(np.full(len(part), code_of_run))
        table, order = pa.concat_tables(parts), np.concatenate(codes)
        if (np.diff(order) < 0).any():
            sort = np.argsort(order, kind="stable")
            table, order = table.take(pa.array(sort)), order[sort]
        return table.add_column(0, "run_id", ids.take(pa.array(order)))

    def _frame(self, name: str) -> pd.DataFrame:
        table = self.arrow(name)
        if name == "measures":
            layer = table["layer"].combine_chunks().dictionary_encode()
            names = layer.dictionary.to_pylist()
            for column, of, kind in (
                ("module", module_of, pa.string()),
                ("depth", depth_of, pa.float64()),
            ):
                values = pa.array([of(n) for n in names], kind).take(layer.indices)
                table = table.append_column(column, values)
        return table.select(list(COLUMNS[name])).to_pandas(types_mapper=PANDAS.get)


def pack(store: Store) -> list[Path]:
    """Write the tables of all finished runs, those packed before too, to `results/ledger`.

    The files are small enough to commit (no weights, measured numbers to four digits) and stand
    for the runs in tables and as done. Packing again changes no byte.

    Returns
    -------
    list of Path
        The tables and their checksums.

    Raises
    ------
    StoreError
        When a finished run, a sweep or the ledger is corrupt; then nothing is written.
    """
    tables = Tables(store)
    with warnings.catch_warnings(action="ignore"):
        packed = {name: rounded(tables.arrow(name)) for name in COLUMNS}
        rows = [
            _ledger_row(record, tables.sweeps[record.run_id])
            for record in tables.records.values()
            if record.status in ("done", "diverged")
        ]
    if tables.problems:
        more = f" (and {len(tables.problems) - 1} more)" if len(tables.problems) > 1 else ""
        raise StoreError(
            f"nothing packed: {tables.problems[0]}{more}. Run the sweep again (a corrupt run is "
            "trained again), `lora-lab measure` for measures, or restore results/ledger from git."
        )
    packed["runs"] = pa.Table.from_pylist(rows, schema=LEDGER["runs"])
    return store.write_ledger(packed)


def _ledger_row(record: Record, sweep: str) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for name in SCORES:
        value, kind = record.metrics.get(name), schema.RUNS[name][0]
        row[name] = value if value is None else int(value) if kind == "int64" else float(value)
    return row | {
        "run_id": record.run_id,
        "status": record.status,
        "sweep": sweep,
        "error": record.error,
        "config": json.dumps(record.config),
        "provenance": json.dumps(record.provenance),
    }


def _column(values: Sequence[Any], kind: str | None) -> Any:
    """Values with None for missing as an array of `kind`, or of the kind they have."""
    present = [type(value) for value in values if value is not None]
    if kind is None:
        kinds = set(present)
        if kinds == {bool}:
            kind = "boolean"
        elif kinds == {int}:
            kind = "int64"
        elif kinds <= {int, float}:
            kind = "float64"
        else:
            kind = "string"
    if kind == "string":
        text = [v if v is None or isinstance(v, str) else json.dumps(v) for v in values]
        return pd.array(text, dtype="string")
    if kind == "boolean":
        return pd.array(values, dtype="boolean")
    if kind == "float64" or len(present) < len(values):
        return np.array([np.nan if v is None else v for v in values], dtype="float64")
    return np.array(values, dtype="int64")
