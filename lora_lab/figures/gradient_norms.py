"""Gradient norms of the factors and of the weight that they stand for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lora_lab.figures import (
    WIDTH,
    Tables,
    canvas,
    comparable,
    end_labels,
    figure,
    finish,
    main_rule,
    method_lines,
)

TITLE = "Who gets the gradient: norms over training"
PANELS = {
    "grad_norm_A": "gradient of A (r × inputs)",
    "grad_norm_B": "gradient of B (outputs × r)",
    "grad_norm": "gradient of the whole weight",
}


def _over_layers(traces: pd.DataFrame) -> pd.DataFrame:
    """Root mean square over layers for each run, step and trace."""
    square = traces.assign(value=traces["value"] ** 2)
    mean = square.groupby(["run_id", "trace", "step"], as_index=False)["value"].mean()
    return mean.assign(value=np.sqrt(mean["value"]))


@figure(
    title=TITLE,
    look_for="Look for A, which gets no gradient until B has left zero, and for lines of "
    "different r that lie apart: there the scaling rule gives each r a signal of another size.",
    alt="Line plots on a logarithmic axis. Across: optimizer step. Up: gradient norm, one panel "
    "for the factor A, one for the factor B and one for the weight that both stand for. One line "
    "for each r and one for full fine-tuning.",
    place=6,
)
def gradient_norms(tables: Tables) -> Figure | None:
    """RMS over layers of the gradient norms of A, B and W against the step, by r."""
    runs, note = comparable(tables.runs)
    runs = main_rule(runs)
    traces = tables.traces
    rows = traces[traces["trace"].isin(PANELS) & traces["run_id"].isin(runs["run_id"])]
    rows = _over_layers(rows[(rows["layer"] != "") & np.isfinite(rows["value"])])
    # A logarithmic axis has no zero: the gradient of A before B has moved is left out.
    rows = rows[rows["value"] > 0]
    shown = [trace for trace in PANELS if (rows["trace"] == trace).any()]
    if not shown:
        return None
    drawn, axes = canvas(WIDTH, 4.2, 1, len(shown), sharex=True, sharey=True)
    ends = []
    for ax, trace in zip(axes[0], shown, strict=True):
        labels: list[tuple[float, str, Any]] = []
        for name, colour, group in method_lines(runs):
            own = rows[(rows["trace"] == trace) & rows["run_id"].isin(group["run_id"])]
            if own.empty:
                continue
            over = own.groupby("step")["value"].agg(["median", "min", "max"])
            ax.fill_between(over.index, over["min"], over["max"], color=colour, alpha=0.15, lw=0)
            ax.plot(over.index, over["median"], color=colour, linewidth=1.8)
            labels.append((float(over["median"].iloc[-1]), name, colour))
        ax.set_title(PANELS[trace], fontsize=10, loc="left")
        ax.set_xlabel("optimizer step", fontsize=10)
        ends.append(labels)
    axes[0][0].set_yscale("log")
    for ax, labels in zip(axes[0], ends, strict=True):
        end_labels(ax, labels)
    axes[0][0].set_ylabel("gradient norm, RMS over layers", fontsize=10)
    rule = "".join(runs.loc[runs["rule"] != "", "rule"].unique()[:1])
    said = "Lines: median over seeds; bands: all seeds. Before clipping."
    said += f" Adapters: {rule}." if rule else ""
    return finish(drawn, TITLE, f"{said} {note}".strip())
