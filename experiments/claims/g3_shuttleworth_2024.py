"""G3: Shuttleworth et al. 2024, LoRA vs Full Fine-tuning: An Illusion of Equivalence.

Claim: at r ≤ 16 LoRA has more intruder dimensions than full fine-tuning; fewer with α = 2r than
with a fixed α; the effective rank of LoRA's update is below that of full fine-tuning's.

Decided by: intruders among the 10 leading vectors at ε = .5 on the output side, as in the paper
(mean over layers), at r = 1, 4, 16 (α = 2r) less those of full fine-tuning; at r = 64 those with
α = 16 less those with α = 2r; and the effective rank at r = 64 (α = 2r) over full's. Each at its
best rate, on MiniLM and on digits.

Test: 95 % t intervals over seeds: the differences are above 0 (an excess of less than .05 vectors
is none), the ratio is below 1.

Power: counts vary by about .1 between seeds, so that 5 seeds place a difference to ± .12 of 10
vectors; effective ranks vary by 2 %.

Cost: none of its own; the shared grids.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from experiments.grids import DIGITS, MINILM, SMOKE, grid
from experiments.parts import CURVE, GROUNDS, Part, edge_note, invented, judged, table_of
from experiments.updates import chosen, measured
from lora_lab.claims import Found, Verdict
from lora_lab.figures import canvas, finish
from lora_lab.stats import t_interval

LOW, HIGH, FIXED = (1, 4, 16), 64, 16
TOP = 10
SWEEP = {"smoke": SMOKE, "paper": [line for g in (MINILM, DIGITS) for line in grid(g)[1:]]}
PARTS = {
    f"r = {r}": Part(
        f"LoRA at r = {r} has {{}} intruders of {TOP} more than full",
        low=0.0,
        near=0.05,
        unit=0.2,
        main=r == LOW[0],
    )
    for r in LOW
} | {
    "fixed alpha": Part(
        f"α = {FIXED} has {{}} more than α = 2r at r = {HIGH}", low=0.0, near=0.05, unit=0.2
    ),
    "effective rank": Part(
        f"the effective rank at r = {HIGH} is {{}} of full's", high=1.0, main=True
    ),
}


def rows(found: Found) -> pd.DataFrame:
    """Counts and effective ranks by run, and what the parts compare."""
    runs = chosen(found)
    of = measured(found, runs, "intruder_dimensions", "effective_rank")
    counted = (of["measure"] == "intruder_dimensions") & (of["k"] == TOP) & (of["side"] == "left")
    of = of[counted | (of["measure"] == "effective_rank")]
    keys = ["run_id", "model", "adapter", "r", "alpha", "seed", "edge", "measure"]
    means = of.groupby(keys, as_index=False, dropna=False)[["value"]].mean()
    out: list[dict[Any, Any]] = [*means.assign(part=CURVE).to_dict("records")]
    for (model, seed), own in means.groupby(["model", "seed"]):
        about = {"model": model, "seed": seed}
        out += [about | row for row in _parts(own)]
    return table_of(out)


def _parts(own: pd.DataFrame) -> list[dict[str, Any]]:
    """The comparisons of one seed, as far as their runs are there."""

    def of(measure: str, r: float | None, alpha: float | None) -> tuple[str, float] | None:
        rows = own[own["measure"] == measure]
        if r is None:
            rows = rows[rows["adapter"] == "full"]
        else:
            rows = rows[(rows["adapter"] == "lora") & (rows["r"] == r) & (rows["alpha"] == alpha)]
        return (str(rows["run_id"].iloc[0]), float(rows["value"].iloc[0])) if len(rows) else None

    count, wide = "intruder_dimensions", "effective_rank"
    pairs = {f"r = {r}": (of(count, r, 2 * r), of(count, None, None)) for r in LOW}
    pairs["fixed alpha"] = of(count, HIGH, FIXED), of(count, HIGH, 2 * HIGH)
    pairs["effective rank"] = of(wide, HIGH, 2 * HIGH), of(wide, None, None)
    out = []
    for name, (one, other) in pairs.items():
        if one is not None and other is not None:
            value = one[1] / other[1] if name == "effective rank" else one[1] - other[1]
            out.append({"part": name, "value": value, "run_id": f"{one[0]}+{other[0]}"})
    return out


def verdict(table: pd.DataFrame) -> Verdict:
    """Five inequalities on each ground."""
    return judged(table, PARTS, edge_note(table[table["part"] == CURVE]))


def made(outcome: str, rng: np.random.Generator) -> pd.DataFrame | None:
    """What the paper found, its opposite, or its findings on one ground only."""
    curve = [
        {"model": model, "part": CURVE, "seed": seed, "adapter": "lora", "r": r, "alpha": alpha,
         "measure": measure, "value": 1.0 + r / 64}
        for model in ("minilm", "digits_vit")
        for seed in range(5)
        for measure in ("intruder_dimensions", "effective_rank")
        for r in (1, 16, 64)
        for alpha in {2 * r, FIXED}
    ]  # fmt: skip
    return pd.concat([invented(outcome, rng, PARTS), pd.DataFrame(curve)], ignore_index=True)


def figure(table: pd.DataFrame) -> Any:
    """Intruders and effective rank over r, for both rules of α, beside full fine-tuning."""
    curve = table[table["part"] == CURVE]
    models = [name for name in GROUNDS if name in set(curve["model"])]
    picture, axes = canvas(4.5 * max(len(models), 1), 6.5, 2, max(len(models), 1), sharex="col")
    labels = {"intruder_dimensions": f"intruders of {TOP}, output side",
              "effective_rank": "effective_rank of ΔW"}  # fmt: skip
    for column, model in enumerate(models):
        for ax, (measure, label) in zip(axes[:, column], labels.items(), strict=True):
            own = curve[(curve["model"] == model) & (curve["measure"] == measure)]
            fit = own[own["adapter"] == "lora"]
            rules = {"α = 2r": fit["alpha"] == 2 * fit["r"], f"α = {FIXED}": fit["alpha"] == FIXED}
            for (name, which), colour in zip(rules.items(), ("#0072b2", "#009e73"), strict=True):
                by = [(float(str(r)), t_interval(c["value"])) for r, c in fit[which].groupby("r")]
                spread = np.nan_to_num([[f.value - f.low, f.high - f.value] for _, f in by]).T
                if by:
                    x, y = [r for r, _ in by], [f.value for _, f in by]
                    ax.errorbar(x, y, spread, fmt="o-", color=colour, label=name)
            level, low, high = t_interval(own.loc[own["adapter"] == "full", "value"])
            if np.isfinite(level):
                ax.axhline(level, color="#d55e00", label="full")
            if np.isfinite(low):
                ax.axhspan(low, high, color="#d55e00", alpha=0.15, lw=0)
            ax.set_xscale("log", base=2)
            ax.set_ylabel(label)
        axes[0][column].set_title(GROUNDS[model], fontsize=10, loc="left")
        axes[0][column].legend(fontsize=8)
        axes[1][column].set_xlabel("r")
    note = "Means over layers; bars and bands: 95 % t intervals over seeds."
    return finish(picture, "Intruders and effective rank of LoRA beside full fine-tuning", note)
