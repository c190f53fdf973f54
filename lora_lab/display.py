"""What the terminal shows: the live progress of a sweep, and tables of runs and layers."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from lora_lab.config import Host, as_dict, choice, flat
from lora_lab.engine import Summary, Watcher
from lora_lab.hydra_bridge import Planned
from lora_lab.store import RunDir, Store, Tables, load


def described(one: Planned) -> str:
    """A run in a few words: method, rank, scale rule, seed."""
    adapter = one.config.adapter
    parts = [choice(adapter)]
    for name in ("r", "alpha"):
        if hasattr(adapter, name):
            parts.append(f"{name}={getattr(adapter, name):g}")
    return " ".join([*parts, f"seed={one.config.seed}"])


class Display(Watcher):
    """Progress of a sweep: one live line on a terminal, a line for each run elsewhere."""

    def __init__(self, screen: Console) -> None:
        self.screen = screen
        self.total = self.done = 0
        self.began = time.monotonic()
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=screen,
            disable=not screen.is_terminal,
            transient=True,
        )
        self.bar = self.progress.add_task("runs", total=None, note="")

    def __enter__(self) -> Display:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def started(self, todo: Sequence[Planned], skipped: int, workers: int) -> None:
        self.total, self.began = len(todo), time.monotonic()
        self.progress.update(self.bar, total=len(todo))
        self.screen.print(f"{len(todo)} runs to do, {skipped} already done, {workers} at once")

    def tick(self, running: Sequence[RunDir]) -> None:
        if not self.screen.is_terminal:
            return
        shares = [p["step"] / p["steps"] for run in running if (p := run.read_progress())]
        passed, ahead = self.done + sum(shares), self.total - self.done - sum(shares)
        spent = time.monotonic() - self.began
        note = f"about {spent / passed * ahead / 60:.1f} min left" if passed > 0.2 else ""
        self.progress.update(self.bar, completed=self.done, note=note)

    def ended(self, one: Planned, status: str, error: str) -> None:
        self.done += 1
        self.progress.update(self.bar, completed=self.done)
        took = f"{time.monotonic() - self.began:.0f} s"
        text = f"[{self.done}/{self.total}] {took} {one.run_id} {described(one)}: {status} {error}"
        self.screen.print(Text(text.rstrip()))


SHOWN = {
    "run_id": "run",
    "adapter": "method",
    "adapter.r": "r",
    "adapter.alpha": "α",
    "adapter.scaling": "scaling",
    "train.lr": "lr",
    "seed": "seed",
    "status": "status",
    "score": "score",
    "trainable_percent": "train %",
    "samples_per_second": "ex/s",
    "seconds": "s",
}
"""Columns of the runs table, and their headings."""

DIGITS = {
    "score": "{:.3f}",
    "trainable_percent": "{:.2f}",
    "samples_per_second": "{:.0f}",
    "seconds": "{:.0f}",
}


def cell(column: str, value: Any) -> Text:
    """One value as text; missing is empty. Never markup: names come from users."""
    if value is None or (not isinstance(value, str) and pd.isna(value)):
        return Text("")
    if isinstance(value, float):
        return Text(DIGITS.get(column, "{:g}").format(value))
    return Text(str(value))


def runs_table(runs: pd.DataFrame) -> Table:
    """The table of runs, best known columns first."""
    table = Table(box=box.SIMPLE_HEAD)
    columns = [c for c in SHOWN if c in runs.columns and runs[c].notna().any()]
    for column in columns:
        numeric = pd.api.types.is_numeric_dtype(runs[column]) or column == "adapter.r"
        table.add_column(SHOWN[column], justify="right" if numeric else "left")
    order = [c for c in ("adapter", "adapter.r", "adapter.alpha", "seed") if c in runs.columns]
    for _, row in runs.sort_values(order).iterrows():
        table.add_row(*(cell(column, row[column]) for column in columns))
    return table


def summary_table(tables: Tables, planned: Iterable[Planned], summary: Summary) -> Table:
    """The runs of one sweep after it."""
    ids = {one.run_id for one in planned}
    return runs_table(tables.runs[tables.runs["run_id"].isin(ids)])


def status_lines(store: Store, tables: Tables) -> list[str]:
    """Counts by status, and what is in work or went wrong, each in a line."""
    counts = tables.runs["status"].value_counts()
    lines = [", ".join(f"{n} {status}" for status, n in counts.items()) or "no runs yet"]
    for _, row in tables.runs.iterrows():
        if row["status"] == "running":
            at = store.run(row["run_id"]).read_progress()
            lines.append(
                f"running {row['run_id']}: step {at.get('step', 0)} of {at.get('steps', '?')}"
            )
        elif row["status"] in ("failed", "diverged", "interrupted"):
            error = "" if pd.isna(row["error"]) else row["error"]
            lines.append(f"{row['status']} {row['run_id']}: {error}".rstrip(": "))
    return lines


LAYER_MEASURES = ("effective_rank", "stable_rank", "energy_rank", "norm", "update_ratio")


def layer_table(table: pd.DataFrame) -> Table:
    """The main measures of each layer; `--json` and `--out` give all rows."""
    shown = Table(box=box.SIMPLE_HEAD, caption="all measures: --json or --out FILE")
    shown.add_column("layer")
    columns: dict[str, pd.Series] = {}
    for name in LAYER_MEASURES:
        part = table[table["measure"] == name]
        for _, group in part.groupby(["k", "side"], dropna=False, sort=False):
            k, side = float(group["k"].iloc[0]), str(group["side"].iloc[0])
            label = name + ("" if math.isnan(k) else f" {k:g}") + (f" {side}" if side else "")
            columns[label] = group.set_index("layer")["value"]
    for label in columns:
        shown.add_column(label.replace("_", " "), justify="right")
    for layer in table["layer"].drop_duplicates():
        values = (column.get(layer, float("nan")) for column in columns.values())
        shown.add_row(Text(layer), *(cell("", float(value)) for value in values))
    return shown


def plan_table(name: str, planned: Sequence[Planned], host: Host) -> Table:
    """What a sweep would do, from the rates of finished runs of the same kind on this machine."""
    root = Path(host.results)
    done = load(root).runs if root.is_dir() else None
    finished = Store(root).finished() if root.is_dir() else set()
    todo = [one for one in planned if one.run_id not in finished]
    table = Table(box=box.SIMPLE_HEAD, title=f"{name}: {len(planned)} runs, {len(todo)} to do")
    for heading in ("method", "to do", "s each", "MB disk each", "MB memory each", "measured on"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    total = 0.0
    for method in sorted({choice(one.config.adapter) for one in todo}):
        mine = [one for one in todo if choice(one.config.adapter) == method]
        like = alike(done, mine[0])
        count = len(like)
        seconds = float(like["seconds"].mean()) if count else float("nan")
        total += seconds * len(mine)
        disk = [folder_size(root / "runs" / run_id) for run_id in like["run_id"]] if count else []
        memory = float(like["peak_memory"].max()) if count else float("nan")
        table.add_row(
            method,
            str(len(mine)),
            *(
                cell("", round(value, 1))
                for value in (seconds, sum(disk) / count if count else float("nan"), memory)
            ),
            f"{count} runs" if count else "nothing yet",
        )
    workers = host.workers or os.cpu_count() or 1
    known = (
        "unknown until one run of each method is done"
        if math.isnan(total)
        else (f"about {total / workers / 3600:.2f} hours with {workers} at once")
    )
    table.caption = known if todo else "nothing to do"
    return table


def alike(runs: pd.DataFrame | None, one: Planned) -> pd.DataFrame:
    """Finished runs with the model, data size and method of a planned one."""
    if runs is None or runs.empty:
        return pd.DataFrame(columns=["run_id", "seconds", "peak_memory"])
    wanted = {**flat(as_dict(one.config)), "status": "done"}
    same = pd.Series(True, index=runs.index)
    for name in ("status", "model", "data", "adapter", "data.train_examples", "train.epochs"):
        if name in runs:
            value = wanted[name]
            same &= runs[name].isna() if value is None else runs[name] == value
    return runs[same]


def folder_size(folder: Path) -> float:
    """Size of a folder's files, MB."""
    return sum(p.stat().st_size for p in folder.glob("*") if p.is_file()) / 1e6
