"""Files of a run in work: checkpoint, snapshots of the update, progress. Gone when it is done."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_lab.store import files
from lora_lab.store.files import Corrupt

CHECKPOINT, PROGRESS = "checkpoint.safetensors", "progress.json"
STATE = "state"

HELD = 512 * 2**20
"""Bytes of snapshots that may wait in memory for the next checkpoint."""

Tensors = Mapping[str, np.ndarray]


class Work:
    """The `work` folder of a run.

    Parameters
    ----------
    folder : Path
        An existing folder, held by the run's lock.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._held: dict[int, Tensors] = {}

    def write_checkpoint(self, tensors: Tensors, state: Mapping[str, Any]) -> None:
        """Replace the checkpoint: tensors, and a state of JSON types, in one file."""
        self._write_held()
        body = files.encode_tensors(tensors, {STATE: json.dumps(state)})
        files.write_sealed(self.folder / CHECKPOINT, body)

    def read_checkpoint(self) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        """The checkpoint; None when there is none, or it or a snapshot of it is not sound.

        Then training starts again.
        """
        path = self.folder / CHECKPOINT
        try:
            body = files.read_sealed(path)
            length = int.from_bytes(body[:8], "little")
            state = json.loads(json.loads(body[8 : 8 + length])["__metadata__"][STATE])
            tensors = files.decode_tensors(body, path)
            for step in state["snapshots"]:  # torn, they would only be found after the training
                files.read_sealed(self._snapshot(step))
        except (Corrupt, KeyError, ValueError):
            return None
        return tensors, state

    def _snapshot(self, step: int) -> Path:
        return self.folder / f"snapshot-{step}.safetensors"

    def keep_snapshot(self, step: int, tensors: Tensors) -> None:
        """Keep the update at a step until the run is analysed.

        In memory while that is small: only a checkpoint needs it on disk, and writing it costs
        more than the training step.
        """
        self._held[step] = tensors
        if sum(t.nbytes for held in self._held.values() for t in held.values()) > HELD:
            self._write_held()

    def _write_held(self) -> None:
        """Write the snapshots that are in memory.

        Without fsync: after a power cut a torn one is found by its digest and the run starts
        again.
        """
        for step, tensors in self._held.items():
            path = self._snapshot(step)
            part = path.with_name(files.TEMPORARY + path.name)
            with files.explained(path):
                part.write_bytes(files.sealed(files.encode_tensors(tensors)))
                os.replace(part, path)
        self._held = {}

    def read_snapshot(self, step: int) -> Tensors:
        """The update at a step.

        Raises
        ------
        Corrupt
            When the file is missing or torn.
        """
        if step in self._held:
            return self._held[step]
        path = self._snapshot(step)
        return files.decode_tensors(files.read_sealed(path), path)

    def write_progress(self, state: Mapping[str, Any]) -> None:
        """Tell whoever looks how far the run is; not durable, replaced at once."""
        path = self.folder / PROGRESS
        part = path.with_name(files.TEMPORARY + path.name)
        with files.explained(path):
            part.write_text(json.dumps(state))
            os.replace(part, path)


def read_progress(folder: Path) -> dict[str, Any]:
    """Progress of a run in work, as `write_progress` left it; empty when there is none."""
    try:
        found = json.loads((folder / PROGRESS).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
