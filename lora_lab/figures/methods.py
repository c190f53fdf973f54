"""All methods side by side: score, effective rank of the update, parameters."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lora_lab.figures import COLOURS, WIDTH, Tables, canvas, figure, final, finish, score_bands
from lora_lab.stats import t_interval

TITLE = "Methods side by side"
FEWEST = 4
"""Settings from which on the comparison is worth a picture."""
MOST = 60


def labelled(runs: pd.DataFrame) -> pd.DataFrame:
    """Finished runs of the most frequent model and data, with the column `setting`.

    A setting is the adapter and those of its fields that differ from what most of its runs have.

    Examples
    --------
    >>> runs = pd.DataFrame({"run_id": list("abc"), "status": "done", "score": 1.0,
    ...     "model": "m", "data": "d", "adapter": ["full", "lora", "lora"],
    ...     "adapter.init": [None, "pissa", "kaiming"], "adapter.r": [None, 8, 8]})
    >>> labelled(runs)["setting"].to_list()
    ['full', 'lora, init=pissa', 'lora']
    """
    done = runs[(runs["status"] == "done") & np.isfinite(runs["score"].astype("float64"))]
    if done.empty:
        return done.assign(setting="")
    grounds = done["model"].astype(str) + " on " + done["data"].astype(str)
    done = done[grounds == grounds.value_counts().idxmax()]
    fields = [c for c in done.columns if c.startswith(("adapter.", "model.quantize"))]
    parts = []
    for adapter, own in done.groupby("adapter", sort=False):
        differ = [c for c in fields if own[c].nunique(dropna=False) > 1]
        words = pd.Series("", index=own.index)
        for name in differ:
            other = own[name].notna() & (own[name] != own[name].mode(dropna=False)[0])
            said = f", {name.partition('.')[2]}=" + own[name].map(_short)
            words = words.where(~other, words + said)
        parts.append(own.assign(setting=str(adapter) + words))
    return pd.concat(parts).loc[done.index]


def _short(value: object) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 40 else text[:39] + "…"


@figure(
    title=TITLE,
    look_for="Look for methods whose interval lies apart from the dashed lines, and for how "
    "different an effective rank equal scores can have.",
    alt="Three panels that share a list of methods downwards: test score with 95 % intervals and "
    "lines for the head alone and for full fine-tuning; mean effective rank of the update over "
    "layers; parameters that train, logarithmic.",
    place=7,
)
def methods(tables: Tables) -> Figure | None:
    """Score, effective rank and size for every setting of every method."""
    runs = labelled(tables.runs)
    order = runs.groupby("setting")["score"].mean().sort_values().index[-MOST:]
    if len(order) < FEWEST or runs["adapter"].nunique() < FEWEST:
        return None
    rows = tables.measures
    rows = rows[(rows["measure"] == "effective_rank") & (rows["layer"] != "")]
    ranks = final(rows, runs["run_id"]).groupby("run_id")["value"].mean()
    runs = runs.assign(rank=runs["run_id"].map(ranks.to_dict()))
    drawn, [axes] = canvas(WIDTH, 1.4 + 0.24 * len(order), 1, 3, sharey=True)
    score_bands(axes[0], runs, across=True)
    for y, setting in enumerate(order):
        own = runs[runs["setting"] == setting]
        colour = COLOURS.get(own["adapter"].iloc[0], COLOURS["lora"])
        for ax, column in zip(axes, ("score", "rank", "adapter_parameters"), strict=True):
            _row(ax, y, own[column].astype("float64").dropna(), colour)
    titles = ("test score", "effective rank, mean over layers", "parameters of the update")
    for ax, words in zip(axes, titles, strict=True):
        ax.set_title(words, fontsize=10, loc="left")
    axes[2].set_xscale("symlog", linthresh=100)
    axes[0].set_yticks(range(len(order)), order, fontsize=8)
    axes[0].set_ylim(-0.7, len(order) - 0.3)
    seeds = runs.groupby("setting")["seed"].nunique().loc[order]
    count = f"{seeds.min()}" if seeds.min() == seeds.max() else f"{seeds.min()}–{seeds.max()}"
    note = f"Dots: seeds ({count} each). Bars and bands: 95 % t intervals over seeds."
    return finish(drawn, TITLE, note)


def _row(ax: Axes, y: int, values: pd.Series, colour: str) -> None:
    """Every seed as a dot, the mean with its interval."""
    if values.empty:
        return
    mean, low, high = t_interval(values)
    ax.plot(values, np.full(len(values), y), ".", color=colour, alpha=0.45, markersize=5)
    ax.plot([mean], [y], "o", color=colour, markersize=5)
    if np.isfinite(low):
        ax.plot([low, high], [y, y], color=colour, linewidth=1.4)
