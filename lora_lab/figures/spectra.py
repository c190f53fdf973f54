"""Singular values of the final update."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lora_lab.figures import (
    WIDTH,
    Tables,
    canvas,
    comparable,
    figure,
    final,
    finish,
    main_rule,
    method_lines,
)

TITLE = "Where the update is: its singular values"


def _curve(ax: Axes, rows: pd.DataFrame, column: str, colour: object) -> float:
    """Median over layers and seeds at each index with the quartiles as a band; last median."""
    q = rows.groupby("i")[column].quantile(np.array([0.25, 0.5, 0.75])).unstack()
    ax.fill_between(q.index, q[0.25], q[0.75], color=colour, alpha=0.15, linewidth=0)
    ax.plot(q.index, q[0.5], color=colour, linewidth=1.8)
    ax.plot(q.index[-1:], q[0.5].iloc[-1:], "o", color=colour, markersize=5)
    return float(q[0.5].iloc[-1])


@figure(
    title=TITLE,
    look_for="Look for how fast a line falls: a steep one is an update that lives in few "
    "directions, a long flat tail one that is spread thinly over many.",
    alt="Two line plots on logarithmic axes. Across: index of the singular value, 1 is the "
    "largest. Up: the singular value, left as it is and right divided by the largest. One line "
    "for full fine-tuning and one for each r, which ends at index r.",
    place=2,
)
def spectra(tables: Tables) -> Figure | None:
    """Singular values of the final dW by index: absolute, and relative to the largest."""
    runs, note = comparable(tables.runs)
    runs = main_rule(runs)
    rows = final(tables.spectra, runs["run_id"].unique())
    # Exact zeros are the padding of a factored update beyond r; a zero update has no shape.
    rows = rows[rows["sigma"] > 0]
    if rows.empty:
        return None
    top = rows.groupby(["run_id", "layer"])["sigma"].transform("max")
    rows = rows.assign(relative=rows["sigma"] / top)
    drawn, axes = canvas(WIDTH, 4.8, 1, 2, sharex=True)
    columns = {"sigma": "singular value σᵢ of ΔW", "relative": "σᵢ / σ₁, share of the largest"}
    for ax, (column, label) in zip(axes[0], columns.items(), strict=True):
        ax.set_xscale("log", base=2)
        for name, colour, group in method_lines(runs):
            own = rows[rows["run_id"].isin(group["run_id"])]
            if own.empty:
                continue
            y = _curve(ax, own, column, colour)
            end = own["i"].max()
            # Right of its end a line of length 1 would be written over by all the others.
            at, place = ((6, 0), ("left", "center")) if end > 1 else ((0, 7), ("center", "bottom"))
            ax.annotate(name, (end, y), xytext=at, textcoords="offset points", color=colour,
                        fontsize=9, ha=place[0], va=place[1])  # fmt: skip
        # What lies six decades down is rounding and would flatten the rest.
        ax.set_yscale("log")
        ax.set_ylim(bottom=max(ax.get_ylim()[0], ax.dataLim.y1 * 1e-6), top=ax.dataLim.y1 * 1.6)
        ax.set_xlabel("index i (1 = largest)", fontsize=10)
        ax.set_title(label, fontsize=10, loc="left")
        ax.xaxis.set_major_formatter("{x:g}")
    rule = "".join(runs.loc[runs["rule"] != "", "rule"].unique()[:1])
    said = "Lines: median over layers and seeds. Bands: the middle half of them."
    said += f" Adapters: {rule}." if rule else ""
    return finish(drawn, TITLE, f"{said} {note}".strip())
