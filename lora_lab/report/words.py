"""The report in words: what the tables say of each model on each data set, with drawn figures."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import pandas as pd

from lora_lab.figures import FIGURES, Drawing, Tables
from lora_lab.report import page
from lora_lab.report.rows import (
    TextTable,
    error_table,
    method_table,
    provenance,
    run_table,
)
from lora_lab.report.summary import counts, sentences

DOTS = 200
"""Dots per inch of the pictures: twice what a page shows."""
PICTURED = 6
"""Pairs of model and data whose figures are drawn; of the others only the numbers are shown."""


@dataclass(frozen=True)
class Pair:
    """The tables of one model on one data set."""

    runs: pd.DataFrame
    measures: pd.DataFrame
    traces: pd.DataFrame
    spectra: pd.DataFrame
    examples: pd.DataFrame


@dataclass(frozen=True)
class Picture:
    """A drawn figure and the words that go with it."""

    name: str
    title: str
    look_for: str
    alt: str
    png: bytes
    pdf: bytes
    width: int
    height: int

    @property
    def uri(self) -> str:
        return "data:image/png;base64," + base64.b64encode(self.png).decode("ascii")


@dataclass(frozen=True)
class Section:
    """What the report says of one model on one data set."""

    name: str
    sentences: list[str]
    pictures: list[Picture]
    empty: list[str]
    methods: TextTable


def pairs(tables: Tables) -> Iterator[tuple[str, Pair]]:
    """Each (model, data) of the tables with its part of them, most runs first."""
    runs = tables.runs
    groups = runs.groupby(["model", "data"], sort=True, dropna=False)
    for key, own in sorted(groups, key=lambda group: -len(group[1])):
        parts = [tables.measures, tables.traces, tables.spectra, tables.examples]
        if len(own) < len(runs):
            parts = [part[part["run_id"].isin(own["run_id"])] for part in parts]
        yield " on ".join(map(str, key)), Pair(own, *parts)


def picture(name: str, drawing: Drawing, tables: Tables) -> Picture | None:
    """A figure drawn; None where it has nothing to show."""
    drawn = drawing(tables)
    if drawn is None:
        return None
    data: dict[str, bytes] = {}
    # Without a date equal tables give equal files.
    for kind, metadata in (("png", None), ("pdf", {"CreationDate": None})):
        buffer = BytesIO()
        drawn.savefig(buffer, format=kind, dpi=DOTS, metadata=metadata)
        data[kind] = buffer.getvalue()
    inches = drawn.get_size_inches()
    width, height = (round(DOTS / 2 * side) for side in inches)
    words = (drawing.title, drawing.look_for, drawing.alt)
    return Picture(name, *words, data["png"], data["pdf"], width, height)


def _pictures(tables: Tables) -> tuple[list[Picture], list[str]]:
    """The figures that have something to show, and the titles of the others."""
    pictures, empty = [], []
    for name in sorted(FIGURES, key=lambda name: FIGURES[name].place):
        drawn = picture(name, FIGURES[name], tables)
        if drawn is None:
            empty.append(FIGURES[name].title)
        else:
            pictures.append(drawn)
    return pictures, empty


def sections(tables: Tables, pictured: int) -> list[Section]:
    """Each pair of model and data; figures are drawn for the first `pictured` of them."""
    out = []
    for number, (name, pair) in enumerate(pairs(tables)):
        pictures, empty = _pictures(pair) if number < pictured else ([], [])
        out.append(Section(name, sentences(pair), pictures, empty, method_table(pair.runs)))
    return out


def values(tables: Tables, told: list[Section]) -> dict[str, Any]:
    """What the templates of the words name."""
    runs = tables.runs
    return {
        "counts": counts(runs),
        "sections": told,
        "pictured": PICTURED,
        "errors": error_table(runs),
        # Files that the store could not read are known once all tables have been read.
        "problems": list(getattr(tables, "problems", [])),
        "runs": run_table(runs),
        "trained": True,
        "provenance": provenance(runs),
    }


def words_part(tables: Tables) -> dict[str, Any]:
    """The words as the served pages ask for them; their figures are drawn by the pages."""
    given = values(tables, sections(tables, 0))
    return {name: str(page.fragment(name, given)) for name in ("findings", "words")}
