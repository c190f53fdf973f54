"""What a run's folder holds: names, columns, checksums."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from lora_lab import schema
from lora_lab.store import files
from lora_lab.store.files import Corrupt, StoreError

DONE, LOCK, LOG, WORK, SUMS = "DONE", "lock", "log.txt", "work", "checksums.json"
CONFIG, PROVENANCE, METRICS, ERROR = "config.json", "provenance.json", "metrics.json", "error.json"
ADAPTER = "adapter_config.json"
MEASURES, MANIFEST = "measures.parquet", "measures.json"
NOT_TRAINING = {DONE, LOCK, LOG, SUMS, ERROR, MEASURES, MANIFEST}
"""Files without an entry in the checksums: made around the training or after it."""

DERIVED = ("run_id", "module", "depth")
"""Columns that stand in no file: they follow from the folder's and the layer's name."""


def _stored(columns: Mapping[str, tuple[str, str]]) -> pa.Schema:
    return pa.schema(
        [(name, files.ARROW[kind]) for name, (kind, _) in columns.items() if name not in DERIVED]
    )


TABLES = {
    "traces": _stored(schema.TRACES),
    "spectra": _stored(schema.SPECTRA),
    "oracle": _stored(schema.MEASURES),
    "examples": _stored(schema.EXAMPLES),
    "measures": _stored(schema.MEASURES),
}
"""Columns on disk of each table of a run."""


def as_table(rows: pd.DataFrame, columns: pa.Schema) -> pa.Table:
    """Rows in the stored columns and types, in one canonical order.

    Columns that follow from names (`DERIVED`) may be present and are left out; any other unknown
    or missing column is a programming error.
    """
    if rows.empty:
        return columns.empty_table()
    added = set(schema.ADDED) & set(columns.names) - set(rows.columns)
    rows = rows.assign(**dict.fromkeys(added, np.nan))
    given = set(rows.columns) - set(DERIVED)
    assert given == set(columns.names), f"columns must be {columns.names}; got {sorted(given)}"
    rows = rows.sort_values([name for name in columns.names if name not in files.MEASURED])
    arrays = []
    for column in columns:
        values: pd.Series = rows[column.name]
        if column.type == pa.string():
            assert not values.isna().any(), f"{column.name} has gaps"
            arrays.append(pa.array(values.to_list(), column.type))
        else:
            # Through numpy: pyarrow would turn NaN, which is a value here, into null.
            arrays.append(pa.array(values.to_numpy(column.type.to_pandas_dtype())))
    return pa.Table.from_arrays(arrays, schema=columns)


def _entry(data: bytes, names: Iterable[str]) -> dict[str, list[str]]:
    """One content of measures.parquet in its manifest: a digest of data and names, the names."""
    ordered = sorted(names)
    return {files.digest(data + files.encode_json(ordered)): ordered}


class Contents:
    """The files of one run, read with a check and written whole.

    Attributes
    ----------
    path : Path
        The folder; it need not exist yet.
    run_id : str
        Its name, 12 hexadecimal digits.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.run_id = path, path.name
        self._sums: dict[str, str] | None = None

    @property
    def done(self) -> bool:
        """Whether the run is finished (a diverged one is); look again after taking the lock."""
        return os.path.lexists(self.path / DONE)

    def _refuse_finished(self) -> None:
        if self.done:
            raise StoreError(f"run {self.run_id} is finished and is never written again")

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write `name`.json (config, provenance, metrics, adapter_config).

        `metrics` has columns of `schema.RUNS` as keys; a run that diverged says
        ``{"status": "diverged", "error": "..."}`` there.
        """
        self._refuse_finished()
        files.write_bytes(self.path / f"{name}.json", files.encode_json(value))

    def read_json(self, name: str) -> dict[str, Any]:
        """Content of `name`.json, checked.

        Raises
        ------
        Corrupt
            When it is missing, unreadable or differs from its checksum.
        """
        path = self.path / f"{name}.json"
        return files.decode_json(self._checked(path), path)

    def write_table(self, name: str, rows: pd.DataFrame) -> None:
        """Write one of the training's tables: traces, spectra, oracle or examples.

        Parameters
        ----------
        rows : DataFrame
            The columns of `schema.py`, without those that follow from names (`run_id`,
            `module`, `depth`), which may be present and are ignored.
        """
        assert name in ("traces", "spectra", "oracle", "examples"), name
        self._refuse_finished()
        data = files.encode_table(as_table(rows, TABLES[name]))
        files.write_bytes(self.path / f"{name}.parquet", data)

    def has_json(self, name: str) -> bool:
        """Whether the run has `name`.json, or had it when it was sealed (reading tells)."""
        return self._has(f"{name}.json")

    def has_tensors(self, name: str) -> bool:
        """Whether the run has `name`.safetensors, or had it when it was sealed."""
        return self._has(f"{name}.safetensors")

    def _has(self, name: str) -> bool:
        return (self.path / name).exists() or (self.done and name in self._checksums())

    def find_table(self, name: str) -> pa.Table | None:
        """One of the tables as stored (columns `TABLES[name]`), checked; None if there is none.

        Raises
        ------
        Corrupt
            When it is lost, unreadable or differs from its checksum.
        """
        path = self.path / f"{name}.parquet"
        if not self._has(path.name) and not (name == "measures" and self._has(MANIFEST)):
            return None
        data = self._measures()[0] if name == "measures" else self._checked(path)
        return files.decode_table(data, TABLES[name], path)

    def read_table(self, name: str) -> pd.DataFrame:
        """One of the tables with the dtypes of `schema.py`, without the columns `DERIVED`.

        Raises
        ------
        Corrupt
            When it is missing, unreadable or differs from its checksum.
        """
        table = self.find_table(name)
        if table is None:
            raise Corrupt(f"{self.path / name}.parquet is missing")
        return table.to_pandas(types_mapper=files.PANDAS.get)

    def write_tensors(
        self,
        name: str,
        tensors: Mapping[str, np.ndarray],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Write `name`.safetensors: update, head or adapter_model (numpy arrays)."""
        self._refuse_finished()
        data = files.encode_tensors(tensors, metadata)
        files.write_bytes(self.path / f"{name}.safetensors", data)

    def read_tensors(self, name: str) -> dict[str, np.ndarray]:
        """Arrays of `name`.safetensors, checked.

        Raises
        ------
        Corrupt
            When it is missing, unreadable or differs from its checksum.
        """
        path = self.path / f"{name}.safetensors"
        return files.decode_tensors(self._checked(path), path)

    def weights(self) -> list[Path]:
        """Files of what was trained, as far as there are any: the update and the head."""
        names = (ADAPTER, *(f"{name}.safetensors" for name in ("adapter_model", "update", "head")))
        return [self.path / name for name in names if (self.path / name).exists()]

    def _add_measures(self, rows: pd.DataFrame, names: list[str]) -> None:
        try:
            old, known = self._measures()
            kept = self.read_measures()
            kept = kept[~kept["measure"].isin(names)]
        except Corrupt:
            old, known, kept = None, set(), pd.DataFrame()
        parts = [part for part in (kept, rows) if len(part)]
        whole = pd.concat(parts) if parts else pd.DataFrame()
        data = files.encode_table(as_table(whole, TABLES["measures"]))
        # The manifest goes first and names both contents: whichever a crash or a reader in
        # between finds beside it is known and whole.
        manifest = _entry(data, known | set(names))
        if old is not None:
            manifest |= _entry(old, known)
        files.write_bytes(self.path / MANIFEST, files.encode_json(manifest))
        files.write_bytes(self.path / MEASURES, data)

    def measured(self) -> set[str]:
        """Names of the measures that stand whole on disk; empty when the file is corrupt."""
        try:
            return self._measures()[1]
        except Corrupt:
            return set()

    def read_measures(self) -> pd.DataFrame:
        """Rows of the measures (without those that training made, the oracle's), checked."""
        return self.read_table("measures")

    def _measures(self) -> tuple[bytes, set[str]]:
        path = self.path / MANIFEST
        manifest = files.decode_json(files.read_bytes(path), path)
        data = files.read_bytes(self.path / MEASURES)
        for digest, names in manifest.items():
            if isinstance(names, list) and digest in _entry(data, map(str, names)):
                return data, set(names)
        raise Corrupt(f"{self.path / MEASURES} differs from its checksum in {MANIFEST}")

    def _checksums(self) -> dict[str, str]:
        """Digests of a finished run's files, themselves checked against DONE."""
        if self._sums is None:
            allowed = [files.read_bytes(self.path / DONE).decode("ascii", "replace")]
            data = files.read_bytes(self.path / SUMS, allowed)
            self._sums = files.decode_json(data, self.path / SUMS)
        return self._sums

    def _checked(self, path: Path) -> bytes:
        """A file of the training; before the run is sealed there is nothing to check against."""
        if not self.done:
            return files.read_bytes(path)
        if path.name not in self._checksums():
            raise Corrupt(f"{path} is not among the run's files")
        return files.read_bytes(path, [self._checksums()[path.name]])

    def verify(self) -> list[str]:
        """Names of the files of a finished run that miss or differ; empty: sound.

        Measures are not among them: they are made again without training (see `measured`).
        """
        self._sums = None
        try:
            sums = self._checksums()
        except Corrupt:
            return [SUMS]
        bad = []
        for name, value in sums.items():
            try:
                if files.file_digest(self.path / name) != value:
                    bad.append(name)
            except OSError:
                bad.append(name)
        return bad
