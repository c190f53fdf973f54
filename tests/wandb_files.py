"""Read back what the W&B client wrote offline. Only tests do that: the ledger is the record.

A .wandb file is a log in LevelDB's format (blocks of 32 KB; a record is cut into first, middle and
last parts where it meets the end of a block) of protocol buffers after a header of 7 bytes.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from wandb.proto import wandb_internal_pb2 as pb

BLOCK, HEAD = 32768, 7
WHOLE, LAST = 1, 4


def entries(data: bytes) -> Iterator[bytes]:
    """The records of a log, up to where it is cut off."""
    place, parts = HEAD, b""
    while place + HEAD <= len(data):
        if BLOCK - place % BLOCK < HEAD:
            place += BLOCK - place % BLOCK
            continue
        _, size, kind = struct.unpack("<IHB", data[place : place + HEAD])
        place += HEAD
        parts += data[place : place + size]
        place += size
        if kind in (WHOLE, LAST):
            yield parts
            parts = b""


@dataclass
class Kept:
    """What one offline folder holds of a run."""

    folder: Path
    run: Any = None
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    steps: dict[str, str] = field(default_factory=dict)
    artifacts: dict[str, list[str]] = field(default_factory=dict)
    exit: int | None = None

    def table(self, name: str) -> pd.DataFrame:
        """A table of the last history row that has it, from its media file."""
        [entry] = [row[f"tables/{name}"] for row in self.history if f"tables/{name}" in row]
        assert self.summary[f"tables/{name}"] == entry
        text = (self.folder / "files" / entry["path"]).read_text()
        content = json.loads(text)
        assert len(content["data"]) == entry["nrows"]
        return pd.DataFrame(content["data"], columns=content["columns"])


def _items(items: Any) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for item in items:
        *outer, last = list(item.nested_key) or [item.key]
        inner = out
        for key in outer:
            inner = inner.setdefault(key, {})
        inner[last] = json.loads(item.value_json)
    return out


def read(folder: Path) -> Kept:
    """What a folder `offline-run-TIME-ID` holds."""
    kept = Kept(folder)
    [file] = folder.glob("*.wandb")
    data = file.read_bytes()
    assert data[:4] == b":W&B"
    for entry in entries(data):
        record = pb.Record.FromString(entry)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            kept.run = record.run
            kept.config |= _items(record.run.config.update)
        elif kind == "history":
            kept.history.append(_items(record.history.item))
        elif kind == "summary":
            kept.summary |= _items(record.summary.update)
        elif kind == "metric":
            metric = record.metric
            kept.steps[metric.name or metric.glob_name] = metric.step_metric
        elif kind == "artifact":
            paths = [entry.path for entry in record.artifact.manifest.contents]
            kept.artifacts[f"{record.artifact.type}/{record.artifact.name}"] = paths
        elif kind == "exit":
            kept.exit = record.exit.exit_code
    return kept


def offline(results: Path) -> dict[str, Kept]:
    """Everything that lies offline in a results folder by W&B run id; each is there once."""
    found = [read(folder) for folder in sorted((results / "wandb").glob("offline-run-*"))]
    named = {kept.run.run_id: kept for kept in found}
    assert len(named) == len(found)
    return named
