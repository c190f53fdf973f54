"""Bytes on disk: every write is whole or absent, every read is checked before it is used.

Only JSON, Parquet and safetensors are written and read; none of them can execute anything.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.numpy

from lora_lab.registry import StoreError
from lora_lab.schema import ADDED

TEMPORARY = ".tmp-"
"""Start of the name of a file or folder that is being written or removed; readers skip it."""

ARROW = {"string": pa.string(), "int64": pa.int64(), "float64": pa.float64()}
"""Arrow type of each dtype of `schema.py`."""

PANDAS = {pa.string(): pd.StringDtype()}
"""pandas dtype of Arrow types for which pandas' own choice is not the one of `schema.py`."""


MEASURED = ("value", "sigma", "null", "null_low", "null_high")
"""Columns of measured numbers, nearly all different; the others have few distinct values."""

KEPT_BITS = 13
"""Of a measured number's 53 in a packed table: four digits, a fifth of the size."""


class Corrupt(StoreError):
    """A file is missing, unreadable or differs from its checksum."""


class Busy(RuntimeError):
    """Another process holds the run's lock."""


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn an OSError (disk full, no permission) into one line with path and free space."""
    try:
        yield
    except OSError as error:
        there = next(p for p in (path, *path.parents) if os.path.exists(p))
        raise StoreError(
            f"cannot write {path}: {error.strerror or error}; "
            f"{shutil.disk_usage(there).free / 1e9:.1f} GB free there. Make room or give "
            "permission and run the same command again; --results DIR chooses another folder."
        ) from error


def sync_folder(folder: Path) -> None:
    """Make renames and new names in a folder survive a power cut."""
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_folder(folder: Path) -> None:
    """Make a folder, durably, if it is not there.

    Raises
    ------
    StoreError
        When the disk or the permissions do not allow it.
    """
    if not folder.is_dir():
        with explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
            sync_folder(folder.parent)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file so that a crash at any moment leaves the old content or the new, never a part.

    Parameters
    ----------
    path : Path
        In an existing folder.
    data : bytes
        The whole content.

    Raises
    ------
    StoreError
        When the disk is full or the permission is missing; the old content stays.
    """
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}-{path.name}")
    with explained(path):
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
            with open(os.open(temporary, flags, 0o644), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def remove_folder(folder: Path) -> None:
    """Remove a folder in one step: a crash never leaves a part of it under its name."""
    with explained(folder):
        doomed = folder.with_name(f"{TEMPORARY}{secrets.token_hex(4)}-{folder.name}")
        os.replace(folder, doomed)
        shutil.rmtree(doomed)


def digest(data: bytes) -> str:
    """SHA-256 of bytes, 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file of any size, which is also forced to the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    with open(fd, "rb") as file:
        os.fsync(fd)
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_bytes(path: Path, allowed: Collection[str] | None = None) -> bytes:
    """Content of a file (links are not followed), checked against SHA-256 digests if given.

    Raises
    ------
    Corrupt
        When the file is missing, unreadable, or its digest is not among `allowed`.
    """
    try:
        # The plain calls: half the time of open(), and a report reads 20,000 small files.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            data = os.read(fd, os.fstat(fd).st_size)
            while more := os.read(fd, 1 << 24):  # one read returns at most 2 GB
                data += more
        finally:
            os.close(fd)
    except FileNotFoundError:
        raise Corrupt(f"{path} is missing") from None
    except OSError as error:
        raise Corrupt(f"{path} cannot be read: {error.strerror or error}") from None
    if allowed is not None and digest(data) not in allowed:
        raise Corrupt(f"{path} differs from its checksum")
    return data


def sealed(data: bytes) -> bytes:
    """Data after its own digest, for a file whose digest no manifest keeps."""
    return bytes.fromhex(digest(data)) + data


def write_sealed(path: Path, data: bytes) -> None:
    """Write a file that starts with the digest of the rest."""
    write_bytes(path, sealed(data))


def read_sealed(path: Path) -> bytes:
    """What was `sealed`, checked.

    Raises
    ------
    Corrupt
        When it is missing, unreadable or differs from its digest.
    """
    whole = read_bytes(path)
    if bytes.fromhex(digest(whole[32:])) != whole[:32]:
        raise Corrupt(f"{path} differs from its checksum")
    return whole[32:]


def encode_json(value: Any, indent: int | None = 2) -> bytes:
    """JSON as bytes; numpy scalars become numbers, NaN and infinities null (missing)."""
    return (json.dumps(_strict(value), ensure_ascii=False, indent=indent) + "\n").encode()


def _strict(value: Any) -> Any:
    """Strict JSON has no NaN, and readers in other languages refuse Python's."""
    if isinstance(value, Mapping):
        return {key: _strict(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def decode_json(data: bytes, path: Path) -> dict[str, Any]:
    """The object in a JSON file; `path` is for the message.

    Raises
    ------
    Corrupt
        When it is no JSON object.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        raise Corrupt(f"{path} is not readable JSON") from None
    if not isinstance(value, dict):
        raise Corrupt(f"{path} does not hold a JSON object")
    return value


def encode_table(table: pa.Table) -> bytes:
    """A table as Parquet bytes; equal tables give equal bytes.

    Columns of few distinct values are dictionary-encoded; measured doubles are split by byte,
    which zstd packs better.
    """
    split = dict.fromkeys(set(MEASURED) & set(table.column_names), "BYTE_STREAM_SPLIT")
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        compression="zstd",
        compression_level=9,
        use_dictionary=[name for name in table.column_names if name not in split],
        column_encoding=split or None,
        write_statistics=False,
        store_schema=False,
    )
    return sink.getvalue().to_pybytes()


def rounded(table: pa.Table) -> pa.Table:
    """The table with its measured numbers `short`."""
    for name in MEASURED:
        if name in table.column_names:
            kept = pa.array(short(table[name].to_numpy()))
            table = table.set_column(table.column_names.index(name), name, kept)
    return table


def short(values: np.ndarray) -> np.ndarray:
    """Float64 numbers rounded to `KEPT_BITS`; whole ones to 8,192 stay."""
    mantissa, exponent = np.frexp(values)
    out: np.ndarray = np.ldexp(np.rint(np.ldexp(mantissa, KEPT_BITS)), exponent - KEPT_BITS)
    return out


def decode_table(data: bytes, schema: pa.Schema, path: Path) -> pa.Table:
    """The columns of `schema` of a Parquet file (NaN for those it is too old to have).

    `path` is for the message.

    Raises
    ------
    Corrupt
        When it is no Parquet file or lacks a column.
    """
    try:
        table = pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)
        for name in set(ADDED) & set(schema.names) - set(table.column_names):
            table = table.append_column(name, pa.array(np.full(len(table), np.nan)))
        return table.select(schema.names).cast(schema)
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise Corrupt(f"{path} is not a readable table: {reason}") from None


def encode_tensors(
    tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Named arrays as safetensors bytes."""
    arrays = {name: np.asarray(array, order="C") for name, array in tensors.items()}
    return safetensors.numpy.save(arrays, dict(metadata) if metadata else None)


def decode_tensors(data: bytes, path: Path) -> dict[str, np.ndarray]:
    """Named arrays of a safetensors file; `path` is for the message.

    Raises
    ------
    Corrupt
        When it is no safetensors file.
    """
    try:
        return safetensors.numpy.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise Corrupt(f"{path} is not a readable tensor file: {error}") from None
