"""Eckart–Young: what is left of the function, and of the energy, when k directions are kept."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lora_lab.figures import (
    COLOURS,
    INK,
    SOFT,
    WIDTH,
    Drawing,
    Tables,
    canvas,
    comparable,
    end_labels,
    figure,
    final,
    finish,
    method_lines,
    score_bands,
)

TITLE = "How many directions the function needs, and how many the energy needs"
HEADS = {
    "trained_head": ("with the trained head", COLOURS["full"], "o"),
    "refitted_head": ("head refitted on the features", "#7b3294", "s"),
}
POINT = 0.01


def enough(score: pd.DataFrame, runs: pd.DataFrame) -> float:
    """Smallest k whose mean `oracle_score` with the trained head is within a point of full.

    Over the runs that have such rows; NaN where no k on the grid is.
    """
    rows = score[score["side"] == "trained_head"]
    full = runs.loc[runs["run_id"].isin(rows["run_id"]), "score"].mean()
    mean = rows.groupby("k")["value"].mean()
    return float(mean.index[mean >= full - POINT].min())


def _per_k(rows: pd.DataFrame, x: dict[float, int]) -> tuple[np.ndarray, np.ndarray]:
    """Positions on the axis and mean over seeds for each k."""
    mean = rows.groupby("k")["value"].mean()
    return np.array([x[k] for k in mean.index]), mean.to_numpy()


def _scores(ax: Axes, rows: pd.DataFrame, runs: pd.DataFrame, x: dict[float, int]) -> None:
    labels = score_bands(ax, runs)
    for side, (name, colour, marker) in HEADS.items():
        own = rows[rows["side"] == side]
        if own.empty:
            continue
        for _, seed in own.groupby("run_id"):
            ax.plot(*_per_k(seed, x), color=colour, linewidth=0.8, alpha=0.45)
        at, mean = _per_k(own, x)
        ax.plot(at, mean, color=colour, linewidth=2, marker=marker, markersize=5, label=name)
    ax.set_ylim(*_room(ax))
    end_labels(ax, labels)
    ax.legend(loc="lower right", fontsize=9, frameon=True, framealpha=0.9, edgecolor="none")
    ax.set_ylabel("test score", fontsize=10)


def _room(ax: Axes) -> tuple[float, float]:
    """Limits by what the lines hold; a wide interval of few seeds may run out of the picture."""
    y = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in ax.lines])
    span = max(float(np.ptp(y)), 0.02)
    return float(y.min()) - 0.12 * span, float(y.max()) + 0.12 * span


def _energies(ax: Axes, energy: pd.DataFrame, error: pd.DataFrame, x: dict[float, int]) -> None:
    labels = []
    for rows, name, style, marker in (
        (energy, "energy kept", "-", "o"),
        (error, "relative error", (0, (2, 1.5)), "s"),
    ):
        if rows.empty:
            continue
        at, mean = _per_k(rows, x)
        ax.plot(at, mean, color=INK, linestyle=style, marker=marker, markersize=4, linewidth=1.8)
        labels.append((float(mean[-1]), name, INK))
    ax.set_ylim(-0.04, 1.04)
    ax.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    ax.set_ylabel("share of the update", fontsize=10)
    end_labels(ax, labels)


@figure(
    title=TITLE,
    look_for="Look for the k at which the upper curve meets the line of full fine-tuning, and then "
    "straight below it for how little of the energy is kept there.",
    alt="Two line plots above each other with a common axis: k, the number of directions kept in "
    "each layer. Above: test score of the model with the truncated update, with the trained and "
    "with a refitted head. Below: share of the update's energy kept and relative error.",
    place=5,
)
def truncation(tables: Tables) -> Figure | None:
    """Oracle score of W0 + dW_k above, energy kept and relative Frobenius error below."""
    runs, note = comparable(tables.runs)
    full = runs[runs["adapter"] == "full"]
    names = ("oracle_score", "oracle_energy", "truncation_error")
    rows = tables.measures[tables.measures["measure"].isin(names)]
    rows = final(rows, full["run_id"]).dropna(subset=["value", "k"])
    score = rows[rows["measure"] == "oracle_score"]
    energy = rows[rows["measure"] == "oracle_energy"]
    error = rows[(rows["measure"] == "truncation_error") & (rows["side"] == "frobenius")]
    if score.empty:
        return None
    ks = sorted(score["k"].unique())
    x = {k: i for i, k in enumerate(ks)}
    energy, error = energy[energy["k"].isin(x)], error[error["k"].isin(x)]
    drawn, axes = canvas(WIDTH, 6.6, 2, 1, sharex=True, height_ratios=[3, 2])
    upper, lower = axes[:, 0]
    _scores(upper, score, runs, x)
    _energies(lower, energy, error, x)
    k = enough(score, runs)
    if np.isfinite(k):
        for ax in (upper, lower):
            ax.axvline(x[k], color=SOFT, linewidth=1, linestyle=":")
        kept = energy.loc[energy["k"] == k, "value"].mean()
        said = f"k = {k:g}: within a point of full"
        said += f"\nwith {100 * kept:.0f} % of the energy" if np.isfinite(kept) else ""
        upper.annotate(said, (x[k], 1), xycoords=("data", "axes fraction"), xytext=(0, 3),
                       textcoords="offset points", fontsize=9, color=INK,
                       ha="left" if x[k] < len(ks) / 2 else "right")  # fmt: skip
    lower.set_xticks(range(len(ks)), [f"{k:g}" for k in ks])
    lower.set_xlabel("k: directions of the full update that are kept in each layer", fontsize=10)
    seeds = score["run_id"].nunique()
    said = f"Thick: mean over {seeds} seed{'s' * (seeds > 1)}; thin: each seed. "
    said += "Bands: 95 % t intervals. Relative error: Frobenius, mean over layers."
    return finish(drawn, TITLE, f"{said} {note}".strip())


ERROR_TITLE = "What is lost when k directions are kept (Eckart–Young)"


def _errors(tables: Tables) -> Figure | None:
    """Relative Frobenius error of dW_k against k: median over layers, quartiles, and the null."""
    runs, note = comparable(tables.runs)
    rows = tables.measures
    rows = rows[(rows["measure"] == "truncation_error") & (rows["side"] == "frobenius")]
    rows = final(rows, runs["run_id"].unique()).dropna(subset=["value", "k"])
    if rows.empty:
        return None
    # Every layer adds its own q to the grid; a k that few layers have would make the line jump.
    layers = rows.groupby("k")["layer"].nunique()
    ks = [float(k) for k in layers.index[layers > layers.max() / 2]]
    x = {k: i for i, k in enumerate(ks)}
    rows = rows[rows["k"].isin(x)]
    drawn, axes = canvas(WIDTH, 3.8)
    ax = axes[0, 0]
    labels = []
    for name, colour, group in method_lines(runs):
        own = rows[rows["run_id"].isin(group["run_id"])]
        if own.empty:
            continue
        q = own.groupby("k")["value"].quantile(np.array([0.25, 0.5, 0.75])).unstack()
        at = np.array([x[k] for k in q.index])
        ax.fill_between(at, q[0.25], q[0.75], color=colour, alpha=0.15, linewidth=0)
        ax.plot(at, q[0.5], color=colour, linewidth=2, marker="o", markersize=4)
        labels.append((float(q[0.5].iloc[-1]), name, colour))
        null = own.groupby("k")["null"].median()
        if null.notna().any():
            ax.plot(at, null, color=SOFT, linewidth=1.4, linestyle=(0, (2, 1.5)))
    ax.set_ylim(-0.04, 1.04)
    ax.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    ax.set_xticks(range(len(ks)), [f"{k:g}" for k in ks])
    ax.set_ylabel("‖ΔW − ΔW_k‖ / ‖ΔW‖", fontsize=10)
    ax.set_xlabel("k: directions that are kept in each layer", fontsize=10)
    end_labels(ax, labels)
    said = "Line: median over layers. Band: the middle half of them. Dashed: random updates of the "
    return finish(drawn, ERROR_TITLE, f"{said}same shape and r. {note}".strip())


errors = Drawing(
    _errors,
    title=ERROR_TITLE,
    look_for="Look for how early the line falls below the dashed one: as far as they part, the "
    "update is closer to low rank than chance makes it.",
    alt="Line plot. Across: k, the number of directions kept in each layer. Up: relative error in "
    "the Frobenius norm. A dashed line for random updates of the same shape.",
    place=5,
)
"""For weights without a score, of which `truncation` has nothing to draw."""
