"""The command `sync`: what W&B does not have whole yet, from the ledger."""

from __future__ import annotations

import argparse
import hashlib
import shlex
from typing import TYPE_CHECKING

from lora_lab.browsing import FAILED, OK, folder_of
from lora_lab.config import Tracker
from lora_lab.registry import WrongInput
from lora_lab.trackers import resolved

if TYPE_CHECKING:
    from lora_lab.mirroring import Mirrored
    from lora_lab.store import Store, Tables
    from lora_lab.weights import Add


def enter(add: Add) -> None:
    """Enter the command and its options."""
    about = "W&B: write every finished run (and each sweep's report) that is not there whole"
    one = add("sync", about, sync, True)
    one.add_argument("ids", metavar="RUN", nargs="*", help="these runs alone, without reports")
    one.add_argument("--update", action="store_true", help="attach the trained weights")


def sync(given: argparse.Namespace) -> int:
    """Mirror what is missing: online with WANDB_API_KEY, else as offline files."""
    from lora_lab.display import counted
    from lora_lab.mirroring import Mirrored, mirror_missing
    from lora_lab.store import Store, Tables

    store = Store(folder_of(given))
    tables = Tables(store)
    for run_id in given.ids:
        if store.run(run_id).run_id not in tables.records:
            raise WrongInput(f"no run {run_id} in {store.root}; `lora-lab runs` lists them.")
    online = resolved(Tracker.auto) is Tracker.online
    mode = Tracker.online if online else Tracker.offline
    runs = mirror_missing(store, mode, given.ids or None, given.update)
    reports = Mirrored() if given.ids or runs.left else _reports(store, tables, mode)
    done = [*runs.done, *reports.done]
    what = counted(len(runs.done), "run")
    if reports.done:
        what += f" and {counted(len(reports.done), 'report')}"
    if done and online:
        print(f"{what} mirrored to W&B")
    elif done:
        folder = store.root / "wandb"
        every = f"{shlex.quote(str(folder))}/offline-run-*"
        print(f"{what} written to {folder}; upload with: wandb sync {every}")
    left = len(runs.left) + len(reports.left)
    if left:
        print(f"{left} left: `lora-lab sync` does them later")
    elif not done:
        print("nothing to do: every finished run is mirrored")
    return FAILED if left else OK


def _reports(store: Store, tables: Tables, mode: Tracker) -> Mirrored:
    """Mirror the report of each sweep whose runs have changed since."""
    from lora_lab.mirroring import Mirrored

    done = Mirrored()
    members: dict[str, list[str]] = {}
    for run_id, names in tables.sweeps.items():
        for name in filter(None, names.split(",")):
            members.setdefault(name, []).append(run_id)
    for sweep, ids in sorted(members.items()):
        with store.mirroring():
            _report(store, sweep, ids, mode, done)
    return done


def _report(store: Store, sweep: str, ids: list[str], mode: Tracker, done: Mirrored) -> None:
    from lora_lab.mirroring import stands

    name = f"report-{sweep}"
    # A run's mark changes with its tables; one that failed or is in work has none.
    states = [str(store.read_mark(run_id).get("digest")) for run_id in ids]
    digest = hashlib.sha256("\n".join([*ids, *states]).encode()).hexdigest()
    mark = {"digest": digest, "mode": mode.name}
    if stands(store.read_mark(name), mark):
        return

    def act() -> None:
        from lora_lab.report import page, words
        from lora_lab.store import Tables
        from lora_lab.trackers.wandb import Page, write_page

        tables = Tables(store, ids)
        drawn = words.sections(tables, words.PICTURED)
        figures = {f"{s.name}/{p.name}": p.png for s in drawn for p in s.pictures}
        # W&B shows a page in a frame that runs no script of ours.
        html = page.inert(words.values(tables, drawn))
        write_page(name, Page(sweep, html, figures, tables.runs), mode, store.root)
        store.write_mark(name, mark)

    done.attempt(name, act)
