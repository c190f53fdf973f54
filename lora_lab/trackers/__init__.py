"""Trackers: a mirror of the ledger elsewhere. Nothing ever reads one back.

While a run trains, an online mirror is told its traces, for watching. What stands in the end is
written from the run's tables once it is finished (see `lora_lab.mirroring`), so an offline mirror
costs a training nothing and a kill can leave no half of one behind.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_lab.config import RunConfig, Tracker


class Mirror:
    """Told what a run in work records; this one forgets it."""

    def follow(self, traces: Sequence[tuple[int, str, str, float]]) -> None:
        """All trace rows so far: step, layer, trace, value, sorted by step."""

    def finish(self, metrics: Mapping[str, Any], failed: bool) -> None:
        """The run's metrics (columns of `schema.RUNS`), once, at its end."""


def resolved(mode: Tracker) -> Tracker:
    """What `auto` stands for: W&B's own WANDB_MODE, else online with an API key, else disabled.

    The ledger has everything anyway. Only the environment is asked.
    """
    if mode is not Tracker.auto:
        return mode
    chosen = os.environ.get("WANDB_MODE", "")
    if chosen in ("online", "offline", "disabled"):
        return Tracker[chosen]
    return Tracker.online if os.environ.get("WANDB_API_KEY") else Tracker.disabled


def open_mirror(mode: Tracker, config: RunConfig, run_id: str, sweep: str, results: Path) -> Mirror:
    """The mirror of a run in work: W&B while it trains, or none (offline nobody watches).

    Whatever goes wrong with a tracker, the run goes on without it.
    """
    if resolved(mode) is not Tracker.online:
        return Mirror()
    try:
        from lora_lab.trackers.wandb import WandbMirror
    except Exception as error:  # not installed, or not in a state to be imported
        print(f"wandb: {error}; the run goes on without it", file=sys.stderr)
        return Mirror()
    return WandbMirror(config, run_id, sweep, results)
