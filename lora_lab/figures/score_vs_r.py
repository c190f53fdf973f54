"""Test score against the configured r."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lora_lab.figures import (
    RULE_COLOURS,
    RULE_MARKERS,
    WIDTH,
    Tables,
    canvas,
    comparable,
    end_labels,
    figure,
    finish,
    score_bands,
)
from lora_lab.stats import t_interval

TITLE = "How much r does the task need? Test score against r"
PANELS = 9


def _line(ax: Axes, runs: pd.DataFrame, colour: str, marker: str, shift: float) -> float:
    """Every seed as a dot, and the mean at each r with its interval; returns the last mean."""
    points = [(r, *t_interval(group["score"])) for r, group in runs.groupby("r")]
    r, mean, low, high = np.array(points, dtype=float).T
    # A little aside, so that the intervals of two rules at one r do not hide each other.
    x = r * 2**shift
    ax.plot(runs["r"] * 2**shift, runs["score"], ".", color=colour, alpha=0.45, markersize=5)
    ax.plot(x, mean, color=colour, linewidth=1.8, marker=marker, markersize=6)
    several = np.isfinite(low)
    error = np.vstack([mean - low, high - mean])[:, several]
    ax.errorbar(x[several], mean[several], error, fmt="none", ecolor=colour, capsize=3)
    return float(mean[-1])


def _limits(runs: pd.DataFrame) -> tuple[float, float]:
    """Limits that hold every seed and what of the intervals stays in proportion.

    With two seeds an interval is twelve standard errors wide and would flatten everything else.
    """
    scores = runs["score"]
    span = max(scores.max() - scores.min(), 0.02)
    groups = runs.groupby(["adapter", "rule", "r"], dropna=False)["score"]
    low, high = np.array([t_interval(scores)[1:] for _, scores in groups]).T
    lowest = max(np.nanmin([*low, scores.min()]), scores.min() - 0.4 * span)
    highest = min(np.nanmax([*high, scores.max()]), scores.max() + 0.4 * span)
    return lowest - 0.04 * span, highest + 0.04 * span


def _named(rule: str, runs: pd.DataFrame) -> str:
    """The rule with its number of seeds, which may differ between r."""
    seeds = runs.groupby("r")["seed"].nunique()
    low, high = int(seeds.min()), int(seeds.max())
    count = f"{high}" if low == high else f"{low}–{high}"
    return f"{rule} ({count} seed{'s' * (high > 1)})"


@figure(
    title=TITLE,
    look_for="Look for the smallest r whose interval reaches the band of full fine-tuning: what "
    "lies to its right costs parameters and gains nothing that these seeds can show.",
    alt="Line plot. Across: the configured r on a logarithmic axis. Up: test score. One line with "
    "95 % intervals for each rule of alpha; horizontal bands for the head alone and for full "
    "fine-tuning.",
    place=1,
)
def score_vs_r(tables: Tables) -> Figure | None:
    """Mean test score with t intervals over seeds against r, one line for each α rule."""
    runs, note = comparable(tables.runs)
    ranked = runs[runs["rule"] != ""]
    if ranked.empty:
        return None
    rules = list(ranked["rule"].value_counts().index)
    # More lines than colours would hide each other: then each rule has a panel of its own.
    together = len(rules) <= len(RULE_COLOURS)
    panels = [rules] if together else [[rule] for rule in rules[:PANELS]]
    columns = 1 if together else 3
    rows = -(-len(panels) // columns)
    height = 4.8 if together else 1.2 + 2.7 * rows
    drawn, axes = canvas(WIDTH, height, rows, columns, sharex=True, sharey=True)
    ticks = sorted(ranked["r"].unique())
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    for number, (ax, shown) in enumerate(zip(axes.flat, panels, strict=False)):
        ax.set_xscale("log", base=2)
        ax.set_ylim(*_limits(runs))
        labels = score_bands(ax, runs)
        for i, rule in enumerate(shown):
            own = ranked[ranked["rule"] == rule]
            shift = 0.07 * (i - (len(shown) - 1) / 2)
            last = _line(ax, own, RULE_COLOURS[i], RULE_MARKERS[i], shift)
            labels.append((last, _named(rule, own), RULE_COLOURS[i]))
        if together:
            end_labels(ax, labels)
        else:
            ax.set_title(labels[-1][1], fontsize=9, color=labels[-1][2], loc="left")
        ax.set_xticks(ticks, [f"{r:g}" for r in ticks])
        ax.minorticks_off()
        lowest = number + columns >= len(panels)
        ax.tick_params(labelbottom=lowest)
        ax.set_xlabel("configured r of the adapter" if lowest else "", fontsize=10)
    drawn.supylabel("test score (higher is better)", fontsize=10)
    said = "Dots: seeds. Bars and bands: 95 % t intervals over seeds."
    if not together:
        said += " Dashed: full fine-tuning (orange) and head only (grey)."
        more = len(rules) - len(panels)
        said += f" {more} more rules of α with fewer runs are not drawn." if more else ""
    return finish(drawn, TITLE, f"{said} {note}".strip())
