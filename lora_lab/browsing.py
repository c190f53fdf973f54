"""Commands that look: `status`, `runs`, `dashboard`, `diff`, `rm`, `doctor`; without torch."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_lab import schema
from lora_lab.config import Host, flat, literal_path
from lora_lab.registry import WrongInput

if TYPE_CHECKING:
    from lora_lab.store import Store, Tables
    from lora_lab.weights import Add

OK, FAILED = 0, 1
EVERY = 2.0
"""Seconds between two looks of `status --watch`."""

PORT = 8417
"""Where the dashboard is served by default."""

RESULTS = tuple(name for name in schema.RUNS if name not in ("run_id", "sweep"))
"""Columns that `diff` compares beside the configs."""


def enter(add: Add) -> None:
    """Enter the commands of this file and their options."""
    one = add(
        "status", "how many runs are done, running, waiting, failed, and what is left", status, True
    )
    one.add_argument("name", metavar="SWEEP", nargs="?", help="only the runs of this sweep")
    about = f"look again every {EVERY:g} seconds until nothing runs"
    one.add_argument("--watch", action="store_true", help=about)
    one = add("runs", "the table of runs", runs, True)
    about = 'such as "adapter.r >= 8 and score > 0.8"'
    one.add_argument("--where", metavar="CONDITION", help=about)
    one.add_argument("--sort", metavar="FIELD", help="lowest first; -FIELD: highest first")
    how = one.add_mutually_exclusive_group()
    how.add_argument("--csv", action="store_true", help="every column, as CSV")
    how.add_argument("--json", action="store_true", help="every column, as a JSON list of rows")
    one = add("dashboard", "the pages of the results in a browser, live", dashboard, True)
    about = f"on 127.0.0.1 (default: {PORT}; 0: any free one)"
    one.add_argument("--port", metavar="N", type=int, default=PORT, help=about)
    one = add("diff", "what two runs differ in: config and results", diff, True)
    one.add_argument("ids", metavar="RUN", nargs=2)
    one = add("rm", "move runs to results/trash", remove, True)
    one.add_argument("ids", metavar="RUN", nargs="+")
    one.add_argument("--yes", action="store_true", help="do not ask")
    add("doctor", "whether this machine is ready, and what to do where it is not", doctor, True)


def folder_of(given: argparse.Namespace) -> Path:
    """The results folder of a command that takes no overrides."""
    return literal_path(Host().results if given.results is None else Host(given.results).results)


# ---- status ------------------------------------------------------------------------------------


def status(given: argparse.Namespace) -> int:
    """Counts by status, what runs, and what went wrong."""
    from lora_lab.store import Store

    store = Store(folder_of(given))
    if given.name is not None and given.name not in store.sweeps():
        names = ", ".join(store.sweeps()) or "none yet"
        raise WrongInput(f"no sweep {given.name!r} in {store.root}; there are: {names}.")
    while True:
        lines, busy = look(store, given.name or "")
        if given.watch and sys.stdout.isatty():
            print("\x1b[2J\x1b[H", end="")
        print("\n".join(lines), flush=True)
        if not (given.watch and busy):
            return OK
        time.sleep(EVERY)


def look(store: Store, sweep: str) -> tuple[list[str], bool]:
    """Lines on where the folder stands, and whether anything runs."""
    from lora_lab.display import duration
    from lora_lab.standing import ORDER, seconds_left, standing
    from lora_lab.store import Tables

    table = standing(Tables(store), sweep)
    counts = table["status"].value_counts()
    first = ", ".join(f"{counts[name]} {name}" for name in reversed(ORDER) if name in counts)
    left = seconds_left(table)
    lines = [(first or "no runs yet") + (f"; about {duration(left)} left" if left == left else "")]
    for row in table.to_dict("records"):
        if row["status"] == "running":
            at = (
                "starting"
                if row["step"] != row["step"]
                else f"step {row['step']:.0f} of {row['steps']:.0f}"
            )
            at += f", loss {row['loss']:.4g}" if row["loss"] == row["loss"] else ""
            at += f", about {duration(row['left'])} left" if row["left"] == row["left"] else ""
            lines.append(f"running {row['run_id']}: {at}")
        elif row["status"] in ("failed", "diverged", "interrupted"):
            error = row["error"] if isinstance(row["error"], str) else ""
            lines.append(f"{row['status']} {row['run_id']}: {error}".rstrip(": "))
    return lines, bool(counts.get("running", 0))


# ---- runs --------------------------------------------------------------------------------------


def runs(given: argparse.Namespace) -> int:
    """The table of runs, chosen and sorted."""
    from lora_lab.display import console, runs_table
    from lora_lab.registry import unknown
    from lora_lab.store import load
    from lora_lab.where import where

    found = load(folder_of(given)).runs
    if given.where is not None:
        found = where(found, given.where)
    if given.sort is not None:
        field, down = given.sort.removeprefix("-"), given.sort.startswith("-")
        if field not in found:
            raise unknown("field", field, map(str, found))
        found = found.sort_values(field, ascending=not down, kind="stable")
    if given.csv:
        print(found.to_csv(index=False, lineterminator="\n"), end="")
    elif given.json:
        print(
            json.dumps(json.loads(found.to_json(orient="records", double_precision=15)), indent=1)
        )
    elif len(found):
        screen = console()
        screen.print(runs_table(found, screen.width, as_they_come=given.sort is not None))
    else:
        print("no runs yet" if given.where is None else "no run is so")
    return OK


# ---- dashboard ---------------------------------------------------------------------------------


def dashboard(given: argparse.Namespace) -> int:
    """Serve the pages until the user stops it."""
    from threadpoolctl import threadpool_limits

    from lora_lab.dashboard import HOST, server

    # A sweep may run beside it: threads of one would spin against those of the other.
    with threadpool_limits(1), server(Store(folder_of(given)), given.port) as serving:
        print(f"dashboard: http://{HOST}:{serving.port} (Ctrl-C ends it)", flush=True)
        try:
            serving.serve_forever()
        except KeyboardInterrupt:
            print()
    return OK


# ---- diff --------------------------------------------------------------------------------------


def diff(given: argparse.Namespace) -> int:
    """Fields of two runs that differ."""
    from lora_lab.display import console, difference_table
    from lora_lab.store import Store, Tables

    store = Store(folder_of(given))
    tables = Tables(store, given.ids)
    for run_id in given.ids:
        if store.run(run_id).run_id not in tables.records:
            raise WrongInput(f"no run {run_id} in {store.root}; `lora-lab runs` lists them.")
    rows = list(differences(tables, *given.ids))
    console().print(difference_table(given.ids, rows) if rows else "the two runs do not differ")
    return OK


def differences(tables: Tables, one: str, other: str) -> Iterator[tuple[str, str, str]]:
    """(field, value, value) of the configs and the results where two runs differ."""
    table = tables.runs.set_index("run_id")
    sides = [flat(tables.records[i].config.get("config", {})) for i in (one, other)]
    for name in (*RESULTS, "git_commit"):
        for side, run_id in zip(sides, (one, other), strict=True):
            side[name] = table.at[run_id, name]
    for name in dict.fromkeys(name for side in sides for name in side):
        first, second = (_text(side.get(name)) for side in sides)
        if first != second:
            yield name, first, second


def _text(value: Any) -> str:
    import pandas as pd

    if pd.isna(value):
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# ---- rm ----------------------------------------------------------------------------------------


def remove(given: argparse.Namespace) -> int:
    """Move runs to the trash, once the user agrees."""
    from lora_lab.display import amount, counted, folder_size
    from lora_lab.store import Busy, Store

    store = Store(folder_of(given))
    ids = list(dict.fromkeys(given.ids))
    for run_id in ids:
        run = store.run(run_id)
        if not run.path.is_dir():
            raise WrongInput(
                f"no folder of a run {run_id} in {store.root / 'runs'}; what is only in the packed "
                "ledger stays there."
            )
        if run.status() == "running":
            raise WrongInput(f"run {run_id} is running; stop it first.")
    needed = dependents(store, ids)
    if needed:
        name, by = next(iter(needed.items()))
        raise WrongInput(
            f"run {name} is what {counted(len(by), 'other run')} started from (such as {by[0]}); "
            "name those too."
        )
    size = sum(folder_size(store.run(run_id).path) for run_id in ids)
    if not given.yes:
        print(
            f"move {counted(len(ids), 'run')} ({amount(size)}) to the trash? [y/N] ",
            end="",
            flush=True,
        )
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            print("nothing moved")
            return OK
    try:
        trash = store.trash(ids)
    except Busy as error:
        raise WrongInput(f"{error}; what stands before it was moved.") from error
    print(f"moved to {trash}; delete that folder to free {amount(size)}")
    return OK


def dependents(store: Store, ids: list[str]) -> dict[str, list[str]]:
    """Which of these runs others, that are not among them, started from."""
    out: dict[str, list[str]] = {}
    for run_id, content in store.stored_configs().items():
        config = content.get("config", {})
        named = (config.get("model", {}).get("start"), config.get("adapter", {}).get("reference"))
        for name in named:
            if name in ids and run_id not in ids:
                out.setdefault(name, []).append(run_id)
    return out


# ---- doctor ------------------------------------------------------------------------------------


def doctor(given: argparse.Namespace) -> int:
    """One line for each check; exit status 1 when one fails."""
    from lora_lab.doctor import findings

    found = []
    for one in findings(folder_of(given)):
        found.append(one.ok)
        print(
            f"{'ok  ' if one.ok else 'FAIL'}  {one.what}" + (f" -> {one.fix}" if one.fix else ""),
            flush=True,
        )
    return OK if all(found) else FAILED
