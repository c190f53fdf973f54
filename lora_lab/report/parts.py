"""What the pages draw, as JSON: tables by column, numbers short, text once."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from lora_lab.figures import Tables, comparable, final
from lora_lab.layers import depth_of, place_of
from lora_lab.standing import ORDER, seconds_left

FREE = ("seed", "data.seed")
"""Config columns that repeat a setting and do not make another one."""
LISTED = 200
"""Runs of each status that `standing` lists one by one."""

LAYER_MEASURES: dict[str, tuple[str, float, str]] = {
    "effective rank": ("effective_rank", np.nan, ""),
    "stable rank": ("stable_rank", np.nan, ""),
    "directions for 95 % of the energy": ("energy_rank", 0.95, ""),
    "size of the update, ‖ΔW‖/‖W0‖": ("update_ratio", np.nan, "frobenius"),
    "size of the update, ‖ΔW‖": ("norm", np.nan, "frobenius"),
}
"""Measures of the page Layers by their words: name, k, side."""


def encoded(part: Mapping[str, Any]) -> bytes:
    """A part as JSON; NaN must be null by now."""
    return json.dumps(part, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def numbers(values: Any, digits: int = 5) -> list[Any]:
    """Numbers with so many significant digits; null where they are not finite.

    >>> numbers([1.0, 0.123456789, np.nan, -120000.0])
    [1, 0.12346, None, -120000]
    """
    x = np.asarray(values, dtype=np.float64)
    known = np.isfinite(x) & (x != 0)
    places = digits - 1 - np.floor(np.log10(np.abs(x, where=known, out=np.ones_like(x))))
    # A power of ten above 1e22 is not exact: such numbers keep all their digits.
    short = [
        round(float(v), int(p)) if ok else (0 if v == 0 else None)
        for v, p, ok in zip(x.ravel(), places.ravel(), known.ravel(), strict=True)
    ]
    return [int(v) if v is not None and abs(v) < 1e15 and v == int(v) else v for v in short]


def column(values: pd.Series) -> dict[str, Any]:
    """One column: `one` value, `values`, or `words` with their places `at` (-1: missing)."""
    if pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values):
        numeric = values.to_numpy(dtype=np.float64, na_value=np.nan)
        plain: list[Any] = numbers(numeric, 9)
        if len(plain) and all(v == plain[0] for v in plain):
            return {"number": True, "one": plain[0]}
        return {"number": True, "values": plain}
    text = values.map(str, na_action="ignore")
    at, words = pd.factorize(text)
    if len(words) <= 1 and (at == at[0] if len(at) else at).all():
        return {"number": False, "one": words[0] if len(words) else None}
    return {"number": False, "words": [str(w) for w in words], "at": at.tolist()}


def runs_part(runs: pd.DataFrame) -> dict[str, Any]:
    """The table of runs, and how its runs belong together.

    Beside the columns of `runs`: `rules` (how α goes with r, joined by '|'), `drawn` (whether a
    mean over seeds may hold it, see `figures.comparable`), `setting` (number of what it shares
    with the runs that differ in the seed alone). `notes` tells of each model and data what is not
    drawn.
    """
    rules = pd.Series("", index=runs["run_id"], dtype=object)
    drawn = pd.Series(False, index=runs["run_id"])
    notes = {}
    for (model, data), own in runs.groupby(["model", "data"], dropna=False):
        kept, note = comparable(own)
        named = kept.groupby("run_id")["rule"].agg("|".join)
        rules.loc[named.index] = named
        drawn.loc[named.index] = True
        notes[f"{model} on {data}"] = note
    config = [str(c) for c in runs]
    config = [
        c for c in config if (c in ("model", "data", "adapter") or "." in c) and c not in FREE
    ]
    varies = [c for c in config if runs[c].nunique(dropna=False) > 1]
    setting = runs.groupby(varies, dropna=False).ngroup() if varies else 0
    table = runs.assign(rules=rules.to_numpy(), drawn=drawn.to_numpy(), setting=setting)
    ground = table["model"].astype(str) + " on " + table["data"].astype(str)
    table = table.assign(ground=ground, drawn=table["drawn"].map({True: "yes", False: "no"}))
    return {
        "count": len(runs),
        "columns": {name: column(table[name]) for name in table},
        "config": [*config, *(c for c in FREE if c in runs)],
        "notes": notes,
    }


def standing_part(table: pd.DataFrame, version: str) -> dict[str, Any]:
    """Where the folder stands, from `standing.standing`: counts, and each run that is not done."""
    count = table["status"].value_counts()
    open_ = table[table["status"] != "done"]
    shown = open_.groupby("status", sort=False).head(LISTED)
    texts = shown[["run_id", "sweep", "status", "error"]].astype(object)
    columns = {name: texts[name].where(texts[name].notna(), None).tolist() for name in texts}
    columns |= {name: numbers(shown[name]) for name in ("step", "steps", "loss", "left")}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return {
        "version": version,
        "counts": {name: int(count[name]) for name in ORDER if name in count},
        "left": numbers([seconds_left(table)])[0],
        "rows": rows,
        "omitted": len(open_) - len(shown),
    }


def layer_values(measures: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Of each run the final `LAYER_MEASURES` of its layers: `layers` and `values` by measure."""
    rows = measures[(measures["layer"] != "")]
    rows = rows[rows["measure"].isin([name for name, _, _ in LAYER_MEASURES.values()])]
    rows = final(rows, rows["run_id"].unique())
    out: dict[str, dict[str, Any]] = {}
    for words, (name, k, side) in LAYER_MEASURES.items():
        own = rows[(rows["measure"] == name) & (rows["side"] == side)]
        own = own[own["k"].isna() if np.isnan(k) else own["k"] == k]
        for run_id, group in own.groupby("run_id", sort=False):
            layers, found = group["layer"].tolist(), numbers(group["value"], 4)
            entry = out.setdefault(str(run_id), {"layers": layers, "values": {}})
            by_layer = dict(zip(layers, found, strict=True))
            entry["values"][words] = [by_layer.get(layer) for layer in entry["layers"]]
    return out


def layers_part(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """`layer_values` of many runs, by run_id, with each list of layers once."""
    sets: dict[tuple[str, ...], int] = {}
    runs = {
        run_id: [sets.setdefault(tuple(own["layers"]), len(sets)), own["values"]]
        for run_id, own in found.items()
    }
    return {"measures": list(LAYER_MEASURES), "layers": [about(n) for n in sets], "runs": runs}


def about(layers: Iterable[str]) -> dict[str, list[Any]]:
    """Layers with their place in a block (`module`) and the block (`depth`; null outside)."""
    names = list(layers)
    return {
        "layer": names,
        "module": [place_of(layer) for layer in names],
        "depth": numbers([depth_of(layer) for layer in names]),
    }


def frames_by_run(tables: Tables, ids: Iterable[str]) -> dict[str, dict[str, pd.DataFrame]]:
    """The tables of each run apart: measures, traces, spectra, examples."""
    wanted = list(ids)
    out: dict[str, dict[str, pd.DataFrame]] = {run_id: {} for run_id in wanted}
    for name in ("measures", "traces", "spectra", "examples"):
        frame: pd.DataFrame = getattr(tables, name)
        if len(wanted) < frame["run_id"].nunique():
            frame = frame[frame["run_id"].isin(wanted)]
        apart = {str(run_id): own for run_id, own in frame.groupby("run_id", sort=False)}
        for run_id in wanted:
            out[run_id][name] = apart.get(run_id, frame[:0])
    return out
