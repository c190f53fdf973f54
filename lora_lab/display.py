"""Tables for the terminal: runs, layers, plans. Reads the store only, and imports no torch."""

from __future__ import annotations

import dataclasses
import math
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import pandas as pd
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from lora_lab.config import Host, as_dict, choice, flat
from lora_lab.policies import overall
from lora_lab.store import Store, load

if TYPE_CHECKING:
    from lora_lab.fields import Field
    from lora_lab.hydra_bridge import Planned
    from lora_lab.suggesting import Advice

SHOWN = {
    "run_id": "run",
    "adapter": "method",
    "adapter.r": "r",
    "adapter.alpha": "α",
    "train.lr": "lr",
    "seed": "seed",
    "status": "status",
    "score": "score",
    "trainable_percent": "train %",
    "samples_per_second": "ex/s",
    "seconds": "s",
}
"""Columns of the runs table, and their headings; others that differ between runs are added."""

FIRST_TO_GO = ("samples_per_second", "seconds", "trainable_percent", "train.lr")
"""Columns that a narrow window leaves out first, after those that were added."""

DIGITS = {
    "score": "{:.3f}",
    "trainable_percent": "{:.2f}",
    "samples_per_second": "{:.0f}",
    "seconds": "{:.0f}",
}


EVERY = 10.0
"""Seconds between two lines on the progress of an analysis, where there is no terminal."""


def console() -> Console:
    """Where people read: tables go here."""
    screen = Console(highlight=False)
    if not screen.is_terminal and "COLUMNS" not in os.environ:
        screen.width = 1000  # a file or a pipe has no width to keep to
    return screen


def counted(number: int, noun: str) -> str:
    """A number and its noun.

    >>> counted(1, "run"), counted(2, "run")
    ('1 run', '2 runs')
    """
    return f"{number} {noun}" + ("" if number == 1 else "s")


def duration(seconds: float) -> str:
    """A time as people say it.

    >>> duration(40), duration(600), duration(9000)
    ('40 s', '10 min', '2.5 hours')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} hours"


def amount(megabytes: float) -> str:
    """Bytes as people say them.

    >>> amount(3.94), amount(1240)
    ('3.9 MB', '1.2 GB')
    """
    return f"{megabytes:.1f} MB" if megabytes < 1000 else f"{megabytes / 1000:.1f} GB"


def cell(column: str, value: Any) -> Text:
    """One value as text; missing is empty. Never markup: names come from users."""
    if value is None or (not isinstance(value, str) and pd.isna(value)):
        return Text("")
    if isinstance(value, float):
        return Text((DIGITS.get(column, "{:g}") if abs(value) < 1e6 else "{:.3g}").format(value))
    return Text(str(value))


def fits(table: Table, width: int) -> bool:
    """Whether a table is shown whole in so many columns."""
    wide = Console(width=10_000)
    return Measurement.get(wide, wide.options, table).maximum <= width


def runs_table(runs: pd.DataFrame, width: int, as_they_come: bool = False) -> Table:
    """The table of runs, whole columns only.

    Parameters
    ----------
    runs : DataFrame
        As `Tables.runs`.
    width : int
        Characters in a line. Where they do not suffice, the less important columns are left out.
    as_they_come : bool
        In the order of `runs`; else by method, r, α and seed.
    """
    order = [c for c in ("adapter", "adapter.r", "adapter.alpha", "seed") if c in runs]
    runs = runs if as_they_come else runs.sort_values(order)
    known = [c for c in SHOWN if c in runs and runs[c].notna().any()]
    own = [c for c in map(str, runs) if c in ("model", "data") or ("." in c and c not in SHOWN)]
    added = [c for c in own if runs[c].nunique() > 1]
    at = known.index("seed") if "seed" in known else len(known)
    columns = [*known[:at], *added, *known[at:]]
    for gone in ["", *reversed(added), *FIRST_TO_GO]:
        columns = [c for c in columns if c != gone]
        table = _table(runs, columns)
        if fits(table, width):
            break
    return table


def _table(runs: pd.DataFrame, columns: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for column in columns:
        numeric = pd.api.types.is_numeric_dtype(runs[column])
        heading = SHOWN.get(column, column.rpartition(".")[2])
        table.add_column(Text(heading), justify="right" if numeric else "left")
    for _, row in runs.iterrows():
        table.add_row(*(cell(column, row[column]) for column in columns))
    return table


LAYER_COLUMNS = (
    ("effective_rank", math.nan, ""),
    ("stable_rank", math.nan, ""),
    ("energy_rank", 0.95, ""),
    ("update_ratio", math.nan, "frobenius"),
    ("norm", math.nan, "frobenius"),
)
"""(measure, k, side) that the table of layers shows, the least important last."""

PAIR_COLUMNS = (
    ("cosine", math.nan, ""),
    ("sign_conflict", math.nan, "entries"),
    ("subspace_overlap", 8.0, "left"),
    ("subspace_overlap", 8.0, "right"),
)
"""The same of the table of pairs."""


def layer_table(table: pd.DataFrame, width: int) -> Table:
    """The main measures of each layer, with their nulls; `--json` and `--out` give all rows.

    Parameters
    ----------
    table : DataFrame
        Rows of one source, as `outside.analyze` gives them. Without any of the main measures
        those that are there are shown.
    width : int
        Characters in a line; measures that do not fit whole are left out.
    """
    columns = _columns(table.set_index("layer"), LAYER_COLUMNS)
    names = list(table["layer"].drop_duplicates())
    return _widest("layer", names, columns, width, ALL)


def pair_table(pairs: pd.DataFrame, width: int) -> Table:
    """Each measure of each pair of adapters, as the mean over their layers.

    Parameters
    ----------
    pairs : DataFrame
        As `Outside.pairs`.
    width : int
        As for `layer_table`.
    """
    pairs = pairs[pairs["layer"] != ""]
    name = pairs["one"] + " × " + pairs["other"]
    keys = ["pair", "measure", "k", "side"]
    numbers = ["value", "null"] if "null" in pairs else ["value"]
    means = pairs.assign(pair=name).groupby(keys, dropna=False, sort=False)[numbers].mean()
    table = means.reset_index().set_index("pair")
    columns = _columns(table, PAIR_COLUMNS)
    return _widest("mean over layers", list(name.unique()), columns, width, ALL)


CONVERTED = {
    "r": "r",
    "energy": "energy",
    "error": "error",
    "spectral": "spectral\nerror",
    "adapters": "adapters",
    "rounding": "rounding",
    "lost": "entries\nlost",
    "lost_energy": "energy\nlost",
}
"""Columns of the tables of `lora_lab.convert`, and their headings, the least important last."""


def converted_table(rows: pd.DataFrame, width: int) -> Table:
    """What a conversion did to each layer, from the table that it returns."""
    table = rows.set_index("layer")
    columns = {head: table[name] for name, head in CONVERTED.items() if name in table}
    return _widest("layer", list(table.index), columns, width, "all columns: --json")


Key: TypeAlias = tuple[str, float, str]


def _columns(table: pd.DataFrame, main: Sequence[Key]) -> dict[str, pd.Series]:
    """Values and nulls by row, each under its heading: the main ones, or all if none is there."""
    keys = pd.Series(zip(table["measure"], table["k"].fillna(-1), table["side"], strict=True))
    wanted = [(name, -1 if math.isnan(k) else k, side) for name, k, side in main]
    shown = [key for key in wanted if key in set(keys)] or list(dict.fromkeys(keys))
    columns: dict[str, pd.Series] = {}
    for name, k, side in shown:
        own = table[(keys == (name, k, side)).to_numpy()]
        # Two lines of heading: the measure, then which one of its kind, or its last word.
        which = " ".join(word for word in ("" if k < 0 else f"{k:g}", side) if word)
        words = name.replace("_", " ")
        label = f"{words}\n{which}" if which else "\n".join(words.rsplit(" ", 1))
        columns[label] = own["value"]
        if "null" in own and own["null"].notna().any():
            columns[f"{label}\0null"] = own["null"]
    return columns


ALL = "all measures: --json or --out FILE"


def _widest(
    what: str, names: Sequence[str], columns: dict[str, pd.Series], width: int, caption: str
) -> Table:
    """As many columns of numbers as fit beside the names."""
    for kept in range(len(columns), -1, -1):
        shown = Table(box=box.SIMPLE_HEAD, caption=caption)
        shown.add_column(what, overflow="fold")
        for label in list(columns)[:kept]:
            _, null, _ = label.partition("\0")
            shown.add_column(Text("\nnull" if null else label), justify="right")
        for name in names:
            values = (column.get(name, math.nan) for column in list(columns.values())[:kept])
            numbers = (Text("" if math.isnan(v) else f"{v:.4g}") for v in map(float, values))
            shown.add_row(Text(name), *numbers)
        if fits(shown, width):
            break
    return shown


def difference_table(ids: Sequence[str], rows: Sequence[tuple[str, str, str]]) -> Table:
    """(field, value, value) of two runs."""
    shown = Table(box=box.SIMPLE_HEAD)
    for heading in ("field", *ids):
        shown.add_column(heading)
    for row in rows:
        shown.add_row(*map(Text, row))
    return shown


def policy_table(advice: Advice) -> Table:
    """What each policy says: one r for all layers, and the range over them."""
    shown = Table(box=box.SIMPLE_HEAD)
    for heading in ("policy", "r", "least", "most"):
        shown.add_column(heading, justify="left" if heading == "policy" else "right")
    for name, ranks in advice.ranks.items():
        mark = " (recommended)" if name == advice.chosen else ""
        numbers = (overall(ranks), ranks.min(), ranks.max())
        shown.add_row(Text(name + mark), *(str(n) for n in numbers))
    return shown


def bar(screen: Console) -> Progress:
    """One live line with a note, on a terminal only."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        console=screen,
        disable=not screen.is_terminal,
        transient=True,
    )


class LayerProgress:
    """How far an analysis is: a bar on a terminal, a line now and then elsewhere.

    Nothing is shown of work that is done at once.

    Parameters
    ----------
    screen : Console
    what : str
        The word beside the bar.
    """

    def __init__(self, screen: Console, what: str) -> None:
        self.screen, self.what = screen, what
        self.began = self.said = time.monotonic()
        self.first: float | None = None
        self.progress = bar(screen)

    def __enter__(self) -> LayerProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def __call__(self, done: int, total: int, share: float) -> None:
        """Hear of a finished part: a layer, or a pair of it (see `tasks.Tell`)."""
        now = time.monotonic()
        if self.first is None:
            # What an earlier call finished took no time of this one.
            self.first = share
            self.progress.start()
            self.bar = self.progress.add_task(self.what, total=total, note="")
        passed = share - self.first
        rest = (now - self.began) * (1 - share) / passed if passed > 0.1 else math.nan
        note = "" if math.isnan(rest) else f"about {duration(rest)} left"
        self.progress.update(self.bar, completed=done, note=note)
        last = done == total and self.said > self.began
        if not self.screen.is_terminal and (now - self.said > EVERY or last):
            self.said = now
            self.screen.print(f"{done} of {total} parts" + (f", {note}" if done < total else ""))


def notes() -> Console:
    """Where notes and progress go that are no result."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


@contextmanager
def heard(screen: Console, what: str) -> Iterator[LayerProgress]:
    """The progress of some work; its warnings become lines on the screen."""
    with warnings.catch_warnings(), LayerProgress(screen, what) as progress:
        warnings.showwarning = lambda message, *_: screen.print(f"warning: {message}", markup=False)
        yield progress


def plan_table(name: str, planned: Sequence[Planned], host: Host) -> Table:
    """What a sweep would do, from the rates of finished runs of the same kind on this machine."""
    root = Path(host.results)
    done = load(root).runs if root.exists() else None
    finished = Store(root).finished() if root.exists() else set()
    todo = [one for one in planned if one.run_id not in finished]
    already = len(planned) - len(todo)
    title = f"{name}: {counted(len(planned), 'run')}, {already} done, {len(todo)} to do"
    table = Table(box=box.SIMPLE_HEAD, title=title)
    for heading in ("method", "to do", "s each", "MB disk each", "MB memory each", "measured on"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    seconds = disk = memory = 0.0
    for method in sorted({choice(one.config.adapter) for one in todo}):
        mine = [one for one in todo if choice(one.config.adapter) == method]
        like = alike(done, mine[0])
        sizes = pd.Series([folder_size(root / "runs" / i) for i in like["run_id"]], dtype=float)
        each = [like["seconds"].mean(), sizes.mean(), like["peak_memory"].max()]
        seconds, disk = seconds + each[0] * len(mine), disk + each[1] * len(mine)
        memory = max(memory, each[2])
        numbers = (Text("" if pd.isna(v) else f"{v:.1f}") for v in each)
        known = counted(len(like), "run") if len(like) else "nothing yet"
        table.add_row(method, str(len(mine)), *numbers, known)
    workers = min(host.workers or os.cpu_count() or 1, len(todo))
    if not todo:
        table.caption = "nothing to do"
    elif math.isnan(seconds):
        table.caption = "time, disk and memory are known once one run of each method is done"
    else:
        table.caption = (
            f"about {duration(seconds / workers)}, {amount(disk)} of disk and "
            f"{amount(memory * workers)} of memory with {workers} at once"
        )
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


def fields_table(fields: Sequence[Field]) -> Table:
    """Config fields: key, type and range, default, meaning; what several choices share, once."""
    owners: dict[Field, list[str]] = {}
    for field in fields:
        owner = field.owner.partition("=")[2]
        owners.setdefault(dataclasses.replace(field, owner=""), []).append(owner)
    several = len({field.owner for field in fields}) > 1
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("key", "value", "default", "meaning", *["of"] * several):
        table.add_column(name, no_wrap=name == "key")
    for field, names in owners.items():
        words = (field.key, field.value, field.default, field.meaning, ", ".join(names))
        table.add_row(*map(Text, words[: len(table.columns)]))
    return table
