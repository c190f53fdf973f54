"""Finished runs to the tracker: each run's tables once, whole, from the tables alone.

A mark in the results folder says which content of a run the tracker has whole, and where: the
digest of the run's tables, written after the tracker has closed the run. What has no such mark was
never mirrored, or was cut off, or has new rows since, and is written from its tables: offline in
place of what is there, online behind the rows that W&B has. So every record is there exactly once
whatever was killed when, packed runs can be mirrored too, and nothing needs to be read back. Marks
lie beside what the client writes: deleting `results/wandb` makes everything new.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lora_lab.config import Tracker
from lora_lab.store import Busy, Store, Tables
from lora_lab.trackers import resolved
from lora_lab.trackers.content import Contents

if TYPE_CHECKING:
    from pathlib import Path

BATCH = 400
"""Runs whose tables are in memory at once."""

IN_A_ROW = 3
"""Failures of the client after which the others are left: without a network each takes a while."""


@dataclass
class Mirrored:
    """What a call has done.

    Attributes
    ----------
    done : list of str
        What was mirrored now.
    left : list of str
        What should have been: the client had trouble, or the run is in work.
    """

    done: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    _failures: int = 0

    def attempt(self, name: str, action: Callable[[], None]) -> None:
        """Mirror one thing; trouble is a line on stderr, and after some the rest is left."""
        if self._failures < IN_A_ROW:
            try:
                action()
            except Busy:
                pass
            except Exception as error:  # whatever the client raises
                print(f"wandb: {name}: {' '.join(str(error).split())}", file=sys.stderr)
                self._failures += 1
            else:
                self.done.append(name)
                self._failures = 0
                return
        self.left.append(name)


def mirror_missing(
    store: Store, mode: Tracker, only: Collection[str] | None = None, update: bool = False
) -> Mirrored:
    """Mirror the finished runs that are not mirrored whole; two such calls take turns.

    Parameters
    ----------
    store : Store
    mode : Tracker
        `online` or `offline`. What is online needs no offline mirror.
    only : collection of run_id, optional
        These runs alone; None: all.
    update : bool
        Attach the trained weights as an artifact, of runs that have them on disk.
    """
    done = Mirrored()
    with store.mirroring():
        ids = [
            i for i, r in Tables(store, only).records.items() if r.status in ("done", "diverged")
        ]
        for start in range(0, len(ids), BATCH):
            contents = Contents(Tables(store, ids[start : start + BATCH]))
            for run_id in contents.records:
                _mirror(store, contents, run_id, mode, update, done)
    return done


def _mirror(
    store: Store, contents: Contents, run_id: str, mode: Tracker, update: bool, done: Mirrored
) -> None:
    old = store.read_mark(run_id)
    files: Sequence[Path] = ()
    if update or old.get("update"):
        files = store.run(run_id).weights()
    mark = {"digest": contents.digest(run_id), "mode": mode.name, "update": bool(files)}
    if stands(old, mark):
        return

    def act() -> None:
        from lora_lab.trackers.wandb import write

        with store.undisturbed(run_id):
            write(contents[run_id], mode, store.root, files)
            store.write_mark(run_id, mark)

    done.attempt(run_id, act)


def stands(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether a mark says that there is nothing to do."""
    there = old.get("mode") in (new["mode"], Tracker.online.name)
    return there and all(old.get(key) == new[key] for key in new if key != "mode")


def mirror_after(store: Store, mode: Tracker, ids: Collection[str]) -> None:
    """Mirror what has just run, as `host.tracker` says; trouble is a line and nothing more."""
    mode = resolved(mode)
    if mode is Tracker.disabled:
        return
    try:
        left = mirror_missing(store, mode, ids).left
    except Exception as error:  # a mirror never fails a sweep
        print(f"wandb: {' '.join(str(error).split())}", file=sys.stderr)
    else:
        if left:
            print(f"wandb: {len(left)} left to `lora-lab sync`", file=sys.stderr)
