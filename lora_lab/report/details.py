"""One run as the page shows it: its layers, traces, spectra over training, measures with nulls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from lora_lab.report.parts import about, numbers

STEPS, VALUES = 6, 48
"""Of a thinned run: steps whose spectra are kept, singular values of each."""
POINTS = 200
"""Steps of a trace that are kept."""
THINNED = (
    f"To keep this file small, spectra hold at most {STEPS} steps and {VALUES} singular values of "
    f"each layer; `lora-lab dashboard` shows all."
)


def spread(count: int, most: int, even: bool) -> np.ndarray:
    """At most so many places of a list, with its first and its last; denser at the start or even.

    >>> spread(10, 4, True).tolist(), spread(100, 5, False).tolist()
    ([0, 3, 6, 9], [0, 2, 9, 31, 99])
    """
    if count <= most:
        return np.arange(count)
    ends = np.linspace(0, count - 1, most) if even else np.geomspace(1, count, most) - 1
    return np.unique(np.round(ends).astype(int))


def run_part(run_id: str, own: Mapping[str, pd.DataFrame], thin: bool) -> dict[str, Any]:
    """All that the tables hold of one run.

    Parameters
    ----------
    own : mapping of str to DataFrame
        measures, traces, spectra, examples of this run alone.
    thin : bool
        Keep fewer singular values and steps; `thinned` then says so.
    """
    measures, traces, spectra = own["measures"], own["traces"], own["spectra"]
    found = [frame["layer"] for frame in (spectra, measures, traces)]
    layers = [str(n) for n in pd.concat(found).astype(object).unique() if n != ""]
    examples = own["examples"].sort_values("i")
    drawn, cut = _spectra(spectra, layers, thin)
    return {
        "run_id": run_id,
        "layers": about(layers),
        "traces": _traces(traces, layers),
        "spectra": drawn,
        "measures": _measures(measures, layers),
        "over": _over_training(measures),
        "examples": numbers(examples["value"], 3),
        "thinned": THINNED if cut else "",
    }


def _grid(frame: pd.DataFrame, index: str, columns: str, at: list[Any], layers: list[str]) -> Any:
    """Values as [layer][place]."""
    table = frame.pivot_table(index=index, columns=columns, values="value", sort=False)
    table = table.reindex(index=layers, columns=at)
    return [numbers(row) for row in table.to_numpy()]


def _traces(traces: pd.DataFrame, layers: list[str]) -> list[dict[str, Any]]:
    """Each trace: steps, and values of the whole model ('') or of each layer."""
    out = []
    for name, rows in traces.groupby("trace", sort=True):
        every = np.sort(rows["step"].unique())
        at = every[spread(len(every), POINTS, even=True)].tolist()
        rows = rows[rows["step"].isin(at)]
        whole = bool((rows["layer"] == "").all())
        values = _grid(rows, "layer", "step", at, [""] if whole else layers)
        out.append({"trace": name, "whole": whole, "steps": at, "values": values})
    return out


def _spectra(spectra: pd.DataFrame, layers: list[str], thin: bool) -> tuple[dict[str, Any], bool]:
    """Singular values as [step][layer][i], and whether some were left out."""
    every = np.sort(spectra["step"].unique())
    most = int(spectra["i"].max()) if len(spectra) else 0
    steps = every[spread(len(every), STEPS, even=True)] if thin else every
    i = 1 + (spread(most, VALUES, even=False) if thin else np.arange(most))
    rows = spectra[spectra["step"].isin(steps) & spectra["i"].isin(i)]
    rows = rows.rename(columns={"sigma": "value"})
    by_step = dict(list(rows.groupby("step")))
    values = [_grid(by_step[step], "layer", "i", i.tolist(), layers) for step in steps]
    cut = len(steps) < len(every) or len(i) < most
    return {"steps": steps.tolist(), "i": i.tolist(), "sigma": values}, cut


def _measures(measures: pd.DataFrame, layers: list[str]) -> list[dict[str, Any]]:
    """Each measure at the last step, by k and side: `whole`, or values and nulls by layer."""
    rows = measures[measures["step"] == measures["step"].max()]
    out = []
    for (name, k, side), own in rows.groupby(["measure", "k", "side"], dropna=False, sort=True):
        entry = {"measure": name, "k": numbers([k])[0], "side": side}
        whole = own[own["layer"] == ""]
        if len(whole):
            entry["whole"] = numbers(whole["value"][:1])[0]
        by_layer = own[own["layer"] != ""].drop_duplicates("layer").set_index("layer")
        if len(by_layer):
            by_layer = by_layer.reindex(layers)
            entry["value"] = numbers(by_layer["value"])
            if by_layer["null"].notna().any():
                for column in ("null", "null_low", "null_high"):
                    entry[column] = numbers(by_layer[column], 4)
        out.append(entry)
    return out


def _over_training(measures: pd.DataFrame) -> list[dict[str, Any]]:
    """Measures without k and side over the steps, as means over layers."""
    rows = measures[measures["k"].isna() & (measures["side"] == "") & (measures["layer"] != "")]
    means = rows.groupby(["measure", "step"])["value"].mean()
    return [
        {"measure": name, "steps": own.index.get_level_values("step").tolist(),
         "values": numbers(own)}
        for name, own in means.groupby(level="measure")
        if len(own) > 1
    ]  # fmt: skip
