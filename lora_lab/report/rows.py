"""The report's tables, as text: columns with their alignment, and rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd

from lora_lab.figures import METHODS
from lora_lab.report.summary import plus_minus

SHOWN_RUNS = 500
SHOWN_GROUPS = 200
SHOWN_ERRORS = 100
NONE = "–"
SCALES = {"alpha_over_r": "α/r", "rslora": "α/√r"}


@dataclass(frozen=True)
class TextTable:
    """Rows of text under `columns` of (heading, whether it is a number); a note may follow."""

    caption: str
    columns: list[tuple[str, bool]]
    rows: list[list[str]]
    note: str = ""


def _number(form: str, factor: float = 1.0) -> Callable[[Any], str]:
    def show(value: Any) -> str:
        return NONE if pd.isna(value) else format(factor * float(value), form)

    return show


def _text(value: Any) -> str:
    return NONE if pd.isna(value) or value == "" else str(value)


def _method(value: Any) -> str:
    return METHODS.get(value, _text(value))


def _commit(value: Any) -> str:
    return _text(value)[:10]


def _yes(value: Any) -> str:
    return NONE if pd.isna(value) else "yes" if value else "no"


RUN_COLUMNS: list[tuple[str, str, bool, Callable[[Any], str]]] = [
    ("run_id", "run", False, _text),
    ("model", "model", False, _text),
    ("data", "data", False, _text),
    ("adapter", "method", False, _method),
    ("adapter.r", "r", True, _number("g")),
    ("adapter.alpha", "α", True, _number("g")),
    ("train.lr", "learning rate", True, _number(".3g")),
    ("seed", "seed", True, _number("g")),
    ("status", "status", False, _text),
    ("score", "test score", True, _number(".4f")),
    ("trainable_percent", "trainable %", True, _number(".3g")),
    ("seconds", "seconds", True, _number(".1f")),
    ("samples_per_second", "samples/s", True, _number(".0f")),
    ("git_commit", "commit", False, _commit),
    ("git_dirty", "dirty", False, _yes),
]
"""Column of the runs table, heading, whether a number, and how a cell is written."""
ERROR_COLUMNS = {
    *("run_id", "model", "data", "adapter"),
    *("adapter.r", "adapter.alpha", "train.lr", "seed", "status"),
}


def _columns(frame: pd.DataFrame, names: list[str], caption: str, note: str = "") -> TextTable:
    chosen = [c for c in RUN_COLUMNS if c[0] in names and c[0] in frame]
    cells = [[show(value) for value in frame[name]] for name, _, _, show in chosen]
    rows = [list(row) for row in zip(*cells, strict=True)]
    return TextTable(caption, [(heading, number) for _, heading, number, _ in chosen], rows, note)


def _newest(runs: pd.DataFrame) -> pd.DataFrame:
    return runs.sort_values("started", ascending=False, kind="stable", na_position="last")


def _told_apart(runs: pd.DataFrame) -> list[str]:
    """Columns to show: model and data only where there are several."""
    several = runs[["model", "data"]].drop_duplicates().shape[0] > 1
    return [name for name, *_ in RUN_COLUMNS if several or name not in ("model", "data")]


def run_table(runs: pd.DataFrame) -> TextTable:
    """One row per run, the newest first; the first 500 of them."""
    shown = _newest(runs)[:SHOWN_RUNS]
    note = ""
    if len(shown) < len(runs):
        note = (
            f"These are the newest {len(shown)} of {len(runs)} runs; `lora-lab runs` and "
            "lab.load(…).runs hold them all."
        )
    return _columns(shown, _told_apart(runs), "Newest first", note)


def error_table(runs: pd.DataFrame) -> TextTable:
    """Runs that ended without a result, with the last line of their error."""
    bad = _newest(runs[runs["status"].isin(["failed", "diverged", "interrupted"])])
    names = [name for name in _told_apart(runs) if name in ERROR_COLUMNS]
    shown = bad[:SHOWN_ERRORS]
    note = f"{len(bad) - len(shown)} more are not listed." if len(shown) < len(bad) else ""
    table = _columns(shown, names, "Newest first, each with the last line of its error", note)
    for row, error in zip(table.rows, shown["error"], strict=True):
        row.append(_text(error))
    table.columns.append(("error", False))
    return table


def method_table(runs: pd.DataFrame) -> TextTable:
    """Mean over seeds of every setting that was run, the finished runs of it."""
    own = ("adapter", "adapter.r", "adapter.alpha", "adapter.scaling", "train.lr")
    setting = [c for c in runs.columns if (c in own or "." in c) and c != "seed"]
    # What is constant within each method says nothing and costs a pass over all rows each.
    varies = runs.groupby("adapter")[setting].nunique(dropna=False).max() > 1
    setting = ["adapter"] + [c for c in setting if c in own[1:] or varies.get(c, False)]
    setting = list(dict.fromkeys(setting))
    rest = [c for c in setting if c not in own]
    rows = []
    for key, group in runs.groupby(setting, dropna=False, sort=False):
        at = dict(zip(setting, key, strict=True))
        rows.append((_order(at, group), _method_row(at, group, rest)))
    rows.sort(key=lambda row: row[0])
    columns = [("method", False), ("r", True), ("α", True), ("scaling", False)]
    columns += [("learning rate", True), *([("other settings", False)] if rest else [])]
    columns += [("seeds done", True), ("test score, 95 % t interval", True)]
    columns += [("trainable %", True), ("seconds", True), ("samples/s", True)]
    note = ""
    if len(rows) > SHOWN_GROUPS:
        note = f"The first {SHOWN_GROUPS} of {len(rows)} settings."
    return TextTable(
        "By method: mean over seeds", columns, [row for _, row in rows[:SHOWN_GROUPS]], note
    )


def _order(at: dict[str, Any], group: pd.DataFrame) -> tuple[Any, ...]:
    """Head, full, LoRA, then the others; by r, then α; the setting with most runs first."""
    adapter = str(at["adapter"])
    methods = list(METHODS)
    r, alpha = (
        math.inf if pd.isna(at.get(c, math.nan)) else float(at[c])
        for c in ("adapter.r", "adapter.alpha")
    )
    place = methods.index(adapter) if adapter in methods else len(methods)
    return place, adapter, r, alpha, -len(group)


def _method_row(at: dict[str, Any], group: pd.DataFrame, rest: list[str]) -> list[str]:
    done = group[(group["status"] == "done") & group["score"].notna()]
    part = f"{len(done)}" if len(done) == len(group) else f"{len(done)} of {len(group)}"
    scaling = _text(at.get("adapter.scaling"))
    row = [
        _method(at["adapter"]),
        _number("g")(at.get("adapter.r")),
        _number("g")(at.get("adapter.alpha")),
        SCALES.get(scaling, scaling),
        _number(".3g")(at.get("train.lr")),
    ]
    if rest:
        row.append(", ".join(f"{c} = {_text(at[c])}" for c in rest if not pd.isna(at[c])) or NONE)
    return [
        *row,
        part,
        plus_minus(done["score"]) if len(done) else NONE,
        _number(".3g")(done["trainable_percent"].mean()),
        _number(".1f")(done["seconds"].mean()),
        _number(".0f")(done["samples_per_second"].mean()),
    ]


PROVENANCE = {
    "lora_lab": "lora_lab",
    "torch": "torch",
    "git_commit": "commit",
    "git_dirty": "uncommitted changes",
    "cpu": "processor",
    "device": "device",
    "threads": "threads per run",
    "model_hash": "model (hash)",
    "data_hash": "data (hash)",
}


def provenance(runs: pd.DataFrame) -> list[tuple[str, str]]:
    """What made the runs: each column's values with the number of runs where they differ."""
    lines = []
    for name, heading in PROVENANCE.items():
        if name not in runs or runs[name].isna().all():
            continue
        tally = runs[name].dropna().value_counts()
        show = _yes if name == "git_dirty" else _number("g") if name == "threads" else _text
        cut = 12 if name in ("git_commit", "model_hash", "data_hash") else 80
        words = [f"{show(value)[:cut]} ({n} runs)" for value, n in tally[:5].items()]
        if len(tally) == 1:
            words = [show(tally.index[0])[:cut]]
        more = [f"{len(tally) - 5} more"] if len(tally) > 5 else []
        lines.append((heading, ", ".join(words + more)))
    if "started" in runs and runs["started"].notna().any():
        started = runs["started"].dropna().astype(str)
        lines.append(("runs started", f"{started.min()[:19]} to {started.max()[:19]}"))
    return lines
