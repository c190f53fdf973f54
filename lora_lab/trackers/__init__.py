"""Trackers: a mirror of the ledger elsewhere. Nothing ever reads one back."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_lab.config import RunConfig, Tracker


class Mirror:
    """Told what a run records; this one forgets it."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Values of one step."""

    def finish(self, summary: Mapping[str, Any], failed: bool) -> None:
        """The run's metrics, once, at its end."""


def resolved(mode: Tracker) -> Tracker:
    """What `auto` stands for: W&B online when an API key is set in the environment, else none.

    The ledger has everything anyway.
    """
    if mode is not Tracker.auto:
        return mode
    return Tracker.online if os.environ.get("WANDB_API_KEY") else Tracker.disabled


def open_mirror(mode: Tracker, config: RunConfig, run_id: str, sweep: str, results: Path) -> Mirror:
    """The mirror of a run: W&B, or none.

    Whatever goes wrong with a tracker, the run goes on without it.
    """
    mode = resolved(mode)
    if mode is Tracker.disabled:
        return Mirror()
    try:
        from lora_lab.trackers.wandb import WandbMirror
    except Exception as error:  # not installed, or not in a state to be imported
        print(f"wandb: {error}; the run goes on without it", file=sys.stderr)
        return Mirror()
    online = mode is Tracker.online
    return WandbMirror("online" if online else "offline", config, run_id, sweep, results)
