"""The report on weights from outside: the same page, a section for each source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd

from lora_lab import schema
from lora_lab.figures import FIGURES, Drawing
from lora_lab.figures.truncation import errors
from lora_lab.outside import Outside, left_out
from lora_lab.outside.layer import ZERO
from lora_lab.report.page import inert
from lora_lab.report.rows import NONE, SHOWN_RUNS, TextTable
from lora_lab.report.words import Picture, Section, picture
from lora_lab.store import write_bytes

SHOWN = {
    "effective_rank": (np.nan, ""),
    "stable_rank": (np.nan, ""),
    "energy_rank": (0.95, ""),
    "update_ratio": (np.nan, "frobenius"),
    "norm": (np.nan, "frobenius"),
}
"""Measures of the table of layers: (k, side) of each."""


@dataclass(frozen=True)
class OneRun:
    """A source as the figures see a run: it has no score, no trace and no step but the last."""

    runs: pd.DataFrame
    measures: pd.DataFrame
    traces: pd.DataFrame
    spectra: pd.DataFrame
    examples: pd.DataFrame


def as_run(found: Outside, source: str) -> OneRun:
    """The tables of one source; an adapter whose layers differ in r counts by its largest."""
    measures, spectra, layers = (
        table[table["source"] == source].rename(columns={"source": "run_id"}).assign(step=0)
        for table in (found.measures, found.spectra, found.layers)
    )
    r = layers["r"].max()
    ranked = bool(layers["r"].notna().mean() > 0.5)
    scale = layers.loc[layers["r"] == r, "scale"].median()
    run = {
        "run_id": source,
        "status": "done",
        "adapter": "lora" if ranked else "dense updates",
        "adapter.r": r if ranked else np.nan,
        "adapter.alpha": r * scale if ranked else np.nan,
        "adapter.scaling": "alpha_over_r" if ranked else None,
    }
    traces, examples = (pd.DataFrame(columns=list(c)) for c in (schema.TRACES, schema.EXAMPLES))
    return OneRun(pd.DataFrame([run]), measures, traces, spectra, examples)


def _pictures(tables: OneRun) -> list[Picture]:
    drawings: dict[str, Drawing] = {n: FIGURES[n] for n in ("spectra", "effective_rank", "nulls")}
    drawn = [picture(name, d, tables) for name, d in {**drawings, "errors": errors}.items()]
    return [one for one in drawn if one is not None]


def _sentences(found: Outside, source: str) -> list[str]:
    """What the rows of one source say; every number is of the table."""
    rows = found.measures[found.measures["source"] == source]
    layers = found.layers[found.layers["source"] == source]
    zero = rows.loc[rows["flag"] == ZERO, "layer"].nunique()
    said = [f"{len(layers)} layers, of which training changed {len(layers) - zero}."]
    rank = rows[(rows["measure"] == "effective_rank") & (rows["flag"] == "")]
    if len(rank):
        value, null = rank["value"].mean(), rank["null"].mean()
        beside = f", of random updates of the same kind {null:.1f}" if np.isfinite(null) else ""
        said.append(f"The effective rank of an update is {value:.1f} (mean over layers){beside}.")
    ratio = rows[(rows["measure"] == "update_ratio") & (rows["side"] == "frobenius")].dropna(
        subset="value"
    )
    if len(ratio):
        top = ratio.sort_values("value").iloc[-1]
        said.append(
            f"The update is {100 * ratio['value'].median():.2g} % of its weight in the median "
            f"layer, and at most {100 * top['value']:.2g} % ({top['layer']})."
        )
    return said + [f"{sentence}." for sentence in left_out(rows)]


def _number(value: float) -> str:
    return NONE if pd.isna(value) else f"{value:.4g}"


def _layer_table(found: Outside, source: str) -> TextTable:
    """One row for each layer: what it is, and its main measures beside their nulls."""
    rows = found.measures[found.measures["source"] == source]
    layers = found.layers[found.layers["source"] == source]
    columns = [("layer", False), ("m × n", True)]
    cells = [
        layers["layer"].tolist(),
        [f"{m} × {n}" for m, n in zip(layers["m"], layers["n"], strict=True)],
    ]
    flags = rows[rows["flag"] == ZERO].groupby("layer")["flag"].first()
    if len(flags):
        columns.insert(1, ("note", False))
        cells.insert(1, [flags.get(layer, "") for layer in layers["layer"]])
    if layers["r"].notna().any():
        columns.append(("r", True))
        cells.append([_number(r) for r in layers["r"]])
    for name, (k, side) in SHOWN.items():
        own = rows[(rows["measure"] == name) & (rows["side"] == side)]
        own = (own[own["k"] == k] if np.isfinite(k) else own).set_index("layer")
        if own.empty:
            continue
        own = own.reindex(layers["layer"])
        which = " ".join([name.replace("_", " "), *([f"{k:g}"] if np.isfinite(k) else [])])
        columns.append((which, True))
        cells.append([_number(value) for value in own["value"]])
        if own["null"].notna().any():
            columns.append(("null", True))
            ends = zip(own["null_low"], own["null_high"], strict=True)
            cells.append([NONE if pd.isna(a) else f"{a:.3g} – {b:.3g}" for a, b in ends])
    text = [list(row) for row in zip(*cells, strict=True)]
    note = "Nulls: the central 95 % of random updates of the same kind and shape."
    if len(text) > SHOWN_RUNS:
        note = f"The first {SHOWN_RUNS} of {len(text)} layers; --out FILE holds them all. {note}"
    return TextTable("By layer", columns, text[:SHOWN_RUNS], note)


def _pair_section(pairs: pd.DataFrame) -> Section:
    """Each measure of each pair, as the mean over layers, beside the mean of its null."""
    keys = ["one", "other", "measure", "k", "side"]
    groups = pairs[pairs["layer"] != ""].groupby(keys, dropna=False, sort=False)
    means = groups.agg(value=("value", "mean"), null=("null", "mean"), layers=("layer", "nunique"))
    text = [
        [row["one"], row["other"], row["measure"].replace("_", " "), _number(row["k"]),
         row["side"] or NONE, _number(row["value"]), _number(row["null"]), str(row["layers"])]
        for row in means.reset_index().to_dict("records")
    ]  # fmt: skip
    words = [("one", False), ("other", False), ("measure", False), ("k", True), ("side", False)]
    columns = [*words, ("mean over layers", True), ("null", True), ("layers", True)]
    whole = pairs[(pairs["layer"] == "") & (pairs["measure"] == "cosine")].dropna(subset="value")
    said = [
        f"{row['one']} and {row['other']}: cosine {row['value']:.3f} over the whole model, at "
        f"random between {row['null_low']:.3f} and {row['null_high']:.3f}."
        for row in whole.to_dict("records")
    ]
    table = TextTable("Pair by pair", columns, text[:SHOWN_RUNS])
    return Section("Side by side", said, [], [], table)


def build(found: Outside, given: Mapping[str, str]) -> str:
    """The report on weights from outside as one HTML document.

    Parameters
    ----------
    found : Outside
    given : mapping of str to str
        What was analysed, in the words of the footer, for example the folders.

    Returns
    -------
    str
        As `report.build`: inert, with its pictures inside.
    """
    sources = list(dict.fromkeys(found.layers["source"]))
    sections = [
        Section(
            source,
            _sentences(found, source),
            _pictures(as_run(found, source)),
            [],
            _layer_table(found, source),
        )
        for source in sources
    ]
    if len(found.pairs):
        sections.append(_pair_section(found.pairs))
    none = TextTable("", [], [])
    values = {
        "counts": f"Weights from outside: {', '.join(sources)}.",
        "sections": sections,
        "pictured": len(sections),
        "errors": none,
        "problems": [],
        "runs": none,
        "trained": False,
        "provenance": [*given.items(), ("lora_lab", version("lora-lab"))],
    }
    return inert(values)


def write(found: Outside, path: str | Path, given: Mapping[str, str]) -> Path:
    """Write the report to a file in an existing folder; returns its absolute path.

    Raises
    ------
    StoreError
        When the disk is full or the permission is missing; an old report stays whole.
    """
    path = Path(path).resolve()
    write_bytes(path, build(found, given).encode())
    return path
