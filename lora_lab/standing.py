"""Where a results folder stands: every run, those that wait too, and how long is left."""

from __future__ import annotations

import math
import time

import numpy as np
import pandas as pd

from lora_lab.store import Store, Tables

ORDER = ("running", "waiting", "failed", "diverged", "interrupted", "done")
"""Statuses as they are listed: `waiting` is a run that a sweep names and nobody has begun."""


def standing(tables: Tables, sweep: str = "") -> pd.DataFrame:
    """One row for each run of the folder, or of a sweep.

    Parameters
    ----------
    tables : Tables
        Of all runs of the folder.
    sweep : str
        A name in results/sweeps; '' for all runs.

    Returns
    -------
    DataFrame
        Columns run_id, sweep (names joined by ','), status (see `ORDER`), step, steps, loss (of
        running ones), seconds (of finished ones), left (seconds until a running one ends) and
        error; in the order of `ORDER`, then by id. Numbers that are not known are NaN.
    """
    store, runs = tables.store, tables.runs
    begun = set(runs["run_id"])
    ahead: dict[str, list[str]] = {}
    for name, ids in store.sweeps().items():
        for run_id in ids:
            if run_id not in begun:
                ahead.setdefault(run_id, []).append(name)
    waiting = pd.DataFrame(
        [{"run_id": i, "sweep": ",".join(names), "status": "waiting"} for i, names in ahead.items()]
    )
    own = runs[["run_id", "sweep", "status", "seconds", "error"]]
    table = pd.concat([own, waiting], ignore_index=True)
    if sweep:
        named = table["sweep"].str.split(",").map(lambda names: sweep in names)
        table = table[named.astype(bool)]
    told = [
        progress_of(store, run_id) if status == "running" else {}
        for run_id, status in table[["run_id", "status"]].itertuples(index=False)
    ]
    for column in ("step", "steps", "loss", "left"):
        table[column] = [float(state.get(column, math.nan)) for state in told]
    rank = table["status"].map({status: i for i, status in enumerate(ORDER)})
    return table.iloc[np.lexsort([table["run_id"], rank])].reset_index(drop=True)


def progress_of(store: Store, run_id: str) -> dict[str, float]:
    """Step, steps, loss and seconds left of a running run, as far as they are known."""
    state = store.run(run_id).read_progress()
    step, steps = state.get("step", 0), state.get("steps", 0)
    out: dict[str, float] = {
        name: float(state[name]) for name in ("step", "steps", "loss") if name in state
    }
    if step and "began" in state:
        passed = time.time() - state["began"]
        out["left"] = max(passed / step * steps - passed, 0.0)
    return out


def seconds_left(table: pd.DataFrame) -> float:
    """Time until all of a `standing` table has run, from the mean time of its finished runs.

    NaN while nothing runs, or nothing has finished.
    """
    count = table["status"].value_counts()
    running = int(count.get("running", 0))
    if not running:
        return math.nan
    each = table.loc[table["status"] == "done", "seconds"].mean()
    ahead = table.loc[table["status"] == "running", "left"].fillna(each).sum()
    waiting = int(count.get("waiting", 0))
    return float((ahead + (each * waiting if waiting else 0.0)) / running)
