"""Measured ranks beside what random updates of the same kind and shape would have."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from lora_lab.figures import (
    INK,
    SOFT,
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

TITLE = "Is a count more than geometry? Ranks beside their nulls"
PANELS = {
    "effective_rank": "effective rank (entropy of σ)",
    "energy_effective_rank": "energy effective rank (entropy of σ²)",
    "stable_rank": "stable rank (Σσ² / σ₁²)",
}


def _panel(ax: Axes, rows: pd.DataFrame, methods: list[tuple[str, object, pd.DataFrame]]) -> None:
    """One measure: a line for each method from its null to its value, means over layers."""
    for y, (_, colour, group) in enumerate(reversed(methods)):
        own = rows[rows["run_id"].isin(group["run_id"])]
        if own.empty:
            continue
        of_run = own.groupby("run_id")[["value", "null"]].mean()
        value, null = of_run["value"].mean(), of_run["null"].mean()
        ax.plot([null, value], [y, y], color=colour, linewidth=1.6, alpha=0.5)
        ax.plot(of_run["value"], np.full(len(of_run), y), "o", color=colour, markersize=6)
        ax.plot([null], [y], "D", color="white", markeredgecolor=INK, markersize=6, zorder=3)
        text = f"{100 * value / null:.0f} %" if null else ""
        ax.annotate(text, ((value * null) ** 0.5, y), (0, 5), textcoords="offset points",
                    fontsize=8, color=SOFT, ha="center")  # fmt: skip
    ax.set_xscale("log")
    ax.margins(x=0.12)
    low, high = ax.get_xlim()
    narrow = high / low < 20
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if narrow else (1, 3)))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_ylim(-0.6, len(methods) - 0.4)
    ax.set_yticks(range(len(methods)), [name for name, _, _ in reversed(methods)])


@figure(
    title=TITLE,
    look_for="Look for the distance between dot and diamond: where they meet, the count says how "
    "many directions a random update of that shape has, and nothing about training.",
    alt="One panel for each of three rank measures. Down: full fine-tuning and each r. Across, "
    "logarithmic: the measured rank as dots, one for each seed, and as a diamond the rank that "
    "random updates of the same shape have.",
    place=4,
)
def nulls(tables: Tables) -> Figure | None:
    """Mean over layers of each measure and of its null, for full and each r."""
    runs, note = comparable(tables.runs)
    runs = main_rule(runs)
    measures = tables.measures
    if "null" not in measures:
        return None
    rows = measures[measures["measure"].isin(PANELS) & (measures["layer"] != "")]
    rows = final(rows, runs["run_id"]).dropna(subset=["value", "null"])
    rows = rows[(rows["value"] > 0) & (rows["null"] > 0)]
    shown = [name for name in PANELS if (rows["measure"] == name).any()]
    if not shown:
        return None
    methods = list(method_lines(runs))
    drawn, axes = canvas(WIDTH, 1.5 + 0.42 * len(methods), 1, len(shown), sharey=True)
    for ax, name in zip(axes[0], shown, strict=True):
        _panel(ax, rows[rows["measure"] == name], methods)
        ax.set_title(PANELS[name], fontsize=10, loc="left")
        ax.set_xlabel("mean over layers", fontsize=10)
    said = "Dots: one for each seed. Diamonds: random updates of the same shape and r. Numbers: "
    return finish(drawn, TITLE, f"{said}value over null. {note}".strip())
