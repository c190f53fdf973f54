"""One self-contained HTML file from tidy tables: it opens from disk and loads nothing."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from lora_lab.figures import FIGURES, Drawing, Tables
from lora_lab.report.rows import (
    TextTable,
    error_table,
    method_table,
    provenance,
    run_table,
)
from lora_lab.report.summary import counts, sentences
from lora_lab.store.files import make_folder, write_bytes

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


def sections(tables: Tables) -> list[Section]:
    """What the report says of each pair of model and data, with its figures drawn."""
    found = []
    for number, (name, pair) in enumerate(pairs(tables)):
        pictures, empty = _pictures(pair) if number < PICTURED else ([], [])
        found.append(Section(name, sentences(pair), pictures, empty, method_table(pair.runs)))
    return found


def page(tables: Tables, drawn: list[Section]) -> str:
    """The report as `build` gives it, from the tables and their `sections`."""
    runs = tables.runs
    values = {
        "counts": counts(runs),
        "sections": drawn,
        "pictured": PICTURED,
        "errors": error_table(runs),
        # Files that the store could not read are known once all tables have been read.
        "problems": list(getattr(tables, "problems", [])),
        "runs": run_table(runs),
        "trained": True,
        "provenance": provenance(runs),
    }
    return render(values)


def render(values: dict[str, Any]) -> str:
    """The page with its style inside; `values` are what the template names."""
    folder = files("lora_lab.report")
    style = folder.joinpath("page.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode("ascii")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = environment.from_string(folder.joinpath("page.html.j2").read_text(encoding="utf-8"))
    return template.render(style=Markup(style), style_hash=digest, **values)


def build(tables: Tables) -> str:
    """The report as one HTML document.

    Parameters
    ----------
    tables : Tables
        `.runs`, `.measures`, `.traces`, `.spectra`, `.examples` as `lora_lab.load` gives them.
        Empty tables give a page that says so.

    Returns
    -------
    str
        HTML with its style and pictures inside, no script, and a Content-Security-Policy that
        lets it load nothing. Text of the tables appears as it stands, never as markup. Equal
        tables give equal text.
    """
    return page(tables, sections(tables))


def _folder_name(name: str) -> str:
    """A name of a user as the name of a folder that stays inside its parent."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name)[:80]


def write(tables: Tables, path: str | Path) -> Path:
    """Write the report to `path`, and every figure as PNG and PDF to `figures/` beside it.

    With several pairs of model and data each has its folder in `figures/`.

    Returns
    -------
    Path
        The report's absolute path.

    Raises
    ------
    StoreError
        When the disk is full or the permission is missing; an old report stays whole.
    """
    path = Path(path).resolve()
    drawn = sections(tables)
    make_folder(path.parent)
    for number, section in enumerate(drawn[:PICTURED]):
        folder = path.parent / "figures"
        if len(drawn) > 1:
            # The number keeps two names apart that differ in a replaced letter only.
            folder /= f"{number + 1}_{_folder_name(section.name)}"
        make_folder(folder)
        for picture in section.pictures:
            write_bytes(folder / f"{picture.name}.png", picture.png)
            write_bytes(folder / f"{picture.name}.pdf", picture.pdf)
    write_bytes(path, page(tables, drawn).encode())
    return path
