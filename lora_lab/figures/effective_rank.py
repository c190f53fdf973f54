"""Effective rank of the final update, layer by layer."""

from __future__ import annotations

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lora_lab.figures import (
    INK,
    METHODS,
    SOFT,
    WIDTH,
    Tables,
    canvas,
    comparable,
    figure,
    final,
    finish,
    literal,
    main_rule,
    unranked,
)
from lora_lab.layers import place_of

TITLE = "How many directions each layer's update uses: effective rank"
ANNOTATED = 12


def _grid(rows: pd.DataFrame) -> pd.DataFrame:
    """Place in the block × depth; mean over seeds (and over experts and the like, if several)."""
    cells = rows.assign(place=rows["layer"].map(place_of), block=rows["depth"].fillna(-1))
    grid = cells.pivot_table(index="place", columns="block", values="value", sort=False)
    grid = grid.sort_index(axis=1)
    return grid.set_axis([f"{d:g}" if d >= 0 else "–" for d in grid.columns.astype(float)], axis=1)


def _ceiling(tables: Tables, runs: pd.DataFrame) -> tuple[float, str]:
    """The largest effective rank that the updates of some runs can have, and its name."""
    r = float(runs["r"].max())
    if np.isfinite(r):
        return r, f"r = {r:g}"
    rows = tables.spectra[tables.spectra["run_id"].isin(runs["run_id"])]
    q = rows.groupby("layer")["i"].max()
    if q.empty:
        return np.nan, ""
    low, high = q.min(), q.max()
    return float(high), f"q = {high}" if low == high else f"q = {low} to {high}"


def _panel(ax: Axes, grid: pd.DataFrame, top: float, name: str, under: str, numbers: bool) -> None:
    """One heat map from 0 to its ceiling, with a title and a line below it."""
    fine = float(np.nanmax(grid.to_numpy())) < 10
    sns.heatmap(
        grid, ax=ax, vmin=0, vmax=top, cmap="crest", linewidths=1, linecolor="white",
        annot=numbers, fmt=".1f" if fine else ".0f", annot_kws={"fontsize": 9},
        cbar_kws={"aspect": 14, "pad": 0.03},
    )  # fmt: skip
    ax.grid(False)
    ax.set_yticks(np.arange(len(grid)) + 0.5, [literal(place) for place in grid.index])
    ax.tick_params(length=0, rotation=0, labelsize=9, colors=INK)
    ax.set_xlabel("depth (block)", fontsize=10)
    ax.set_ylabel("")
    bar = ax.collections[0].colorbar
    assert bar is not None
    bar.set_ticks([0, top / 2, top], labels=["0", f"{top / 2:.3g}", f"{top:.3g}"])
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, length=0)
    ax.set_title(f"{literal(name)}\n", fontsize=10, loc="left", pad=-6)
    ax.text(0, 1.012, under, transform=ax.transAxes, fontsize=8.5, color=SOFT, va="bottom")


@figure(
    title=TITLE,
    look_for="Look for the numbers beside their ceiling: a dark cell uses nearly all the "
    "directions that it is allowed, a pale one lets most of them lie idle.",
    alt="Heat maps, one for full fine-tuning and one for the adapter with the largest r. Across: "
    "depth of the block. Down: the weight inside the block. Each cell: the effective rank of that "
    "weight's update.",
    place=3,
)
def effective_rank(tables: Tables) -> Figure | None:
    """Mean over seeds by module and depth: full, and the adapter at its largest r."""
    runs, note = comparable(tables.runs)
    runs = main_rule(runs)
    measures = tables.measures
    rows = measures[(measures["measure"] == "effective_rank") & (measures["layer"] != "")]
    panels = []
    for group in (unranked(runs), runs[runs["r"] == runs["r"].max()]):
        own = final(rows, group["run_id"]).dropna(subset="value")
        if len(own):
            panels.append((group, _grid(own), own["run_id"].nunique()))
    if not panels:
        return None
    places, depths = panels[0][1].shape
    beside = depths <= ANNOTATED
    if beside:
        across, down = 2.6 + len(panels) * (1.1 + 0.5 * depths), 1.7 + 0.42 * places
    else:
        across, down = WIDTH, len(panels) * (1.5 + 0.3 * places)
    shape = (1, len(panels)) if beside else (len(panels), 1)
    drawn, axes = canvas(max(across, WIDTH), max(down, 3.4), *shape, sharey=beside)
    for ax, (group, grid, seeds) in zip(axes.flat, panels, strict=True):
        top, ceiling = _ceiling(tables, group)
        mean, largest = float(np.nanmean(grid.to_numpy())), float(np.nanmax(grid.to_numpy()))
        adapter = str(group["adapter"].iloc[0])
        name = group["rule"].iloc[0] or METHODS.get(adapter, adapter)
        name += f", ceiling {ceiling}" if ceiling else ""
        under = f"mean {mean:.3g} over all layers" + f", {seeds} seeds" * (seeds > 1)
        _panel(ax, grid, top if ceiling else max(largest, 1.0), name, under, numbers=beside)
    return finish(drawn, TITLE, note)
