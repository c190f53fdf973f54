"""F1: stacked adapters.

Claim: W0 + B₁A₁ + B₂A₂ reaches what one adapter of rank r₁ + r₂ reaches, the same set of updates,
by other dynamics.

Decided by: digits, two blocks of r = 4 (α = 2r each), trained together and one after another,
against one adapter of r = 8 (α = 2r), each at the best of four rates.

Test: over seeds. The same score, for each order a part: two one-sided t tests place the difference
within ±.02; refuted where the 95 % interval lies outside. Other dynamics, for each order a part:
the 95 % t interval of ln(training loss, averaged over the traced steps of the first half, all at
the rate of the single adapter) less that of the single adapter lies outside ±.05 (supported) or the
90 % interval inside (refuted).

Power: at a spread of .01 between paired seeds, 5 seeds place two equal scores within .02 with a
chance of .9; losses of the same batches differ by about .03 between starts.

Cost: 40 runs on digits, a second each; the single adapter is of the shared grid.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from experiments.curves import inside, seeds_to_tell, spread
from experiments.grids import DIGITS, RATES, SEEDS, best, lora
from lora_lab.claims import Found, Verdict, together
from lora_lab.figures import canvas, finish
from lora_lab.stats import equivalence, t_interval

MARGIN, SAME = 0.02, 0.05
ORDERS = ("together", "one_after_another")
_TINY = "model=planted data=planted size=smoke"
SWEEP = {
    "smoke": [
        f"{_TINY} adapter=lora adapter.r=4",
        f"{_TINY} adapter=stacked adapter.r=2 adapter.order={','.join(ORDERS)}",
    ],
    "paper": [
        lora(DIGITS, ranks="8"),
        f"{DIGITS} adapter=stacked adapter.r=4 adapter.order={','.join(ORDERS)} "
        f"train.lr={RATES[DIGITS]['lora']} {SEEDS}",
    ],
}


def rows(found: Found) -> pd.DataFrame:
    """Scores at each method's best rate, and early losses at the single adapter's."""
    runs = found.runs
    how = runs["adapter.order"].astype(object).where(runs["adapter"] == "stacked", "one")
    runs = runs.assign(how=how.astype(str))
    traces = found.traces[found.traces["trace"] == "loss"]
    last = traces.groupby("run_id")["step"].transform("max")
    early = traces[traces["step"] <= last / 2].groupby("run_id")["value"].mean()
    own = best(runs, ("how",))
    rates = own.loc[own["how"] == "one", "train.lr"].unique()
    same = runs[runs["train.lr"].isin(rates) & (runs["status"] == "done")]
    losses = same.assign(loss=same["run_id"].map(early)).set_index(["how", "seed"])["loss"]
    keys = pd.MultiIndex.from_frame(own[["how", "seed"]])
    own = own.assign(early=losses.reindex(keys).to_numpy()).rename(columns={"train.lr": "lr"})
    return own[["run_id", "how", "seed", "score", "early", "lr", "edge"]]


def _pairs(table: pd.DataFrame, column: str, order: str) -> pd.DataFrame:
    """Values of an order and of the single adapter by seed."""
    wide = table.pivot_table(index="seed", columns="how", values=column)
    return wide.reindex(columns=[order, "one"]).dropna()


def verdict(table: pd.DataFrame) -> Verdict:
    """The same score, by other dynamics, in both orders."""
    parts, clauses, gaps = [], [], {}
    for order in ORDERS:
        both = _pairs(table, "score", order)
        gap = gaps[order] = both[order] - both["one"]
        span = t_interval(gap)
        near = len(both) > 1 and equivalence(both[order], both["one"], MARGIN) < 0.05
        parts.append("supported" if near else inside(span, -MARGIN, MARGIN))
        losses = np.log(_pairs(table, "early", order))
        change = losses[order] - losses["one"]
        wide, narrow = t_interval(change), t_interval(change, level=0.9)
        same = inside(narrow, -SAME, SAME) == "supported"
        other = inside(wide, -SAME, SAME) == "refuted"
        parts.append("refuted" if same else "supported" if other else "unresolved")
        clauses.append(
            f"trained {order.replace('_', ' ')} they score {100 * span.value:+.1f} points "
            f"[{100 * span.low:.1f}, {100 * span.high:.1f}] against one adapter of both ranks, at "
            f"{np.exp(wide.value):.3g} [{np.exp(wide.low):.3g}, {np.exp(wide.high):.3g}] times its "
            f"early training loss"
        )
    outcome = together(parts)
    said = "Two blocks: " + "; ".join(clauses)
    edges = table.loc[table["edge"].astype(bool), "how"].nunique()
    said += f"; {edges} best rates lie at the edge of their grid" * bool(edges)
    if outcome == "unresolved":
        said += f"; {seeds_to_tell(gaps['one_after_another'].abs(), MARGIN)}"
    main, seeds = spread(gaps["together"]), table["seed"].nunique()
    return Verdict(outcome, said + ".", main.value, main[1:], n_seeds=seeds, effect=main.value)


def made(outcome: str, rng: np.random.Generator) -> pd.DataFrame:
    """Equal scores by other losses; other scores by equal losses; all equal; or scatter."""
    gap, change = {
        "supported": (0.0, 0.5),
        "refuted": (-0.1, 0.0),
        "mixed": (0.0, 0.0),
        "unresolved": (0.0, 0.0),
    }[outcome]
    # Symmetric, so that no draw of few seeds can decide what is undecided.
    wide = np.array([-1.0, 1.0, 0.5, -0.5, 0.0]) * (0.1 if outcome == "unresolved" else 0.002)
    return pd.DataFrame(
        [
            {"how": how, "seed": seed, "lr": 1e-2, "edge": False}
            | {"score": 0.9 + (how != "one") * (gap + wide[seed])}
            | {"early": np.exp((how != "one") * (change + wide[seed])) * rng.uniform(0.99, 1.01)}
            for how in ("one", *ORDERS)
            for seed in range(5)
        ]
    )


def figure(table: pd.DataFrame) -> Any:
    """Score and early loss of both orders against the single adapter."""
    picture, [axes] = canvas(9.5, 4, 1, 2)
    margins = {"score": MARGIN, "early": SAME}
    for ax, column in zip(axes, margins, strict=True):
        for i, order in enumerate(ORDERS):
            both = _pairs(table, column, order)
            both = both.transform(np.log) if column == "early" else both
            gap = both[order] - both["one"]
            ax.plot(i + np.linspace(-0.1, 0.1, len(gap)), gap, "o", color="#0072b2", alpha=0.6)
            span = t_interval(gap)
            if np.isfinite(span.low):
                ax.errorbar(i + 0.2, span.value, span.value - span.low, color="#222222", marker="o")
        for edge in (-1, 0, 1):
            ax.axhline(edge * margins[column], color="grey", lw=1, ls="--" if edge else "-")
        ax.set_xticks(range(len(ORDERS)), [order.replace("_", " ") for order in ORDERS])
        ax.set_xlim(-0.5, len(ORDERS) - 0.5)
    axes[0].set_ylabel("score − that of one adapter")
    axes[1].set_ylabel("ln early loss − that of one adapter")
    note = (
        "Left: as good as one adapter between the dashed lines. Right: the same dynamics between "
        "them. Points: seeds; bars: 95 % t intervals."
    )
    return finish(picture, "Two stacked adapters against one of both ranks", note)
