"""C2: how much of its r a trained adapter uses.

Claim: the effective rank of a trained adapter is well below r, also at large r.

Decided by: effective_rank / r of trained LoRA (α = 2r, best rate), mean over layers, at r = 8 and
r = 64 on MiniLM, on digits, and on planted problems of true rank 2; and the same over that of a
random product BA of the same shape, since geometry alone keeps it below 1.

Test: 95 % t intervals over seeds. "Well below" is below half, fixed for both: of r, and of the
random product's. Four parts a ground.

Power: the utilization of an r varies by about .02 between seeds; 5 seeds place it to ± .025.

Cost: 20 runs of its own on planted, 2 seconds each; the rest from the shared grids.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from experiments.grids import DIGITS, MINILM, PLANTED, SEEDS, SMOKE, lora
from experiments.parts import CURVE, GROUNDS, Part, edge_note, invented, judged, table_of
from experiments.updates import chosen, doubled, measured
from lora_lab.claims import Found, Verdict
from lora_lab.figures import canvas, finish
from lora_lab.stats import t_interval

TRUE, R = 2, (8, 64)
_PLANTED = (
    f"{PLANTED} data.true_r={TRUE} data.seed=${{seed}} train.epochs=4 adapter=lora "
    f"adapter.r=2,4,8,64 train.lr=1e-2 {SEEDS}"
)
SWEEP = {"smoke": SMOKE[1:], "paper": [lora(MINILM), lora(DIGITS), _PLANTED]}
WELL = 0.5
PARTS = {
    f"r = {r}": Part(f"the effective rank at r = {r} is {{}} of r", high=WELL, unit=0.05, main=True)
    for r in R
} | {
    f"null, r = {r}": Part(
        f"the effective rank at r = {r} is {{}} of a random product's", high=WELL, unit=0.05
    )
    for r in R
}


def rows(found: Found) -> pd.DataFrame:
    """Utilization and its null for each run; those of the parts once more under their names."""
    runs = doubled(chosen(found))
    of = measured(found, runs, "utilization")
    keys = ["run_id", "model", "adapter", "r", "alpha", "seed", "edge"]
    means = of.groupby(keys, as_index=False)[["value", "null"]].mean()
    curve = means[means["r"] > 1].assign(part=CURVE)
    raw = means[means["r"].isin(R)]
    names = [f"r = {r:g}" for r in raw["r"]]
    over = raw.assign(part=[f"null, {name}" for name in names], value=raw["value"] / raw["null"])
    return table_of(pd.concat([curve, raw.assign(part=names), over]).to_dict("records"))


def verdict(table: pd.DataFrame) -> Verdict:
    """Two ranks, raw and against the null, on each ground."""
    curve = table[(table["part"] == CURVE) & (table["model"] == "planted") & table["r"].isin(R)]
    used = (curve["value"] * curve["r"]).groupby(curve["r"]).mean()
    at = " and ".join(f"{value:.1f} at r = {r:g}" for r, value in used.items())
    known = f"where the true rank is {TRUE}, the effective rank is {at}" if at else ""
    notes = [known, edge_note(table[table["part"] == CURVE])]
    return judged(table, PARTS, "; ".join(filter(None, notes)))


def made(outcome: str, rng: np.random.Generator) -> pd.DataFrame | None:
    """Adapters that use little, that use most of r, or little on one ground only."""
    table = invented(outcome, rng, PARTS)
    curve = [
        {"model": model, "part": CURVE, "r": r, "seed": seed, "value": 0.5, "null": 0.9}
        for model in ("minilm", "digits_vit")
        for r in (2, 8, 64)
        for seed in range(5)
    ]
    return pd.concat([table, pd.DataFrame(curve)], ignore_index=True)


def figure(table: pd.DataFrame) -> Any:
    """Utilization over r beside the random product's."""
    curve = table[table["part"] == CURVE]
    models = [name for name in GROUNDS if name in set(curve["model"])]
    picture, axes = canvas(4 * max(len(models), 1), 4, 1, max(len(models), 1), sharey=True)
    for ax, model in zip(axes[0], models, strict=False):
        own = curve[curve["model"] == model]
        by = [(r, t_interval(cell["value"])) for r, cell in own.groupby("r")]
        spread = np.nan_to_num([[f.value - f.low, f.high - f.value] for _, f in by]).T
        r = [float(str(r)) for r, _ in by]
        ax.errorbar(r, [f.value for _, f in by], spread, fmt="o-", color="#0072b2", label="trained")
        null = own.groupby("r")["null"].mean()
        ax.plot(null.index, null, color="grey", ls=":", label="random BA")
        ax.axhline(WELL, color="grey", lw=1, ls="--")
        ax.set_xscale("log", base=2)
        ax.set_ylim(0, 1.02)
        ax.set_xlabel("r")
        ax.set_title(GROUNDS[model], fontsize=10, loc="left")
        ax.legend(fontsize=8)
    axes[0][0].set_ylabel("effective_rank / r, mean over layers")
    note = "Bars: 95 % t intervals over seeds. What lies between the curves is training, what lies "
    note += "above the dotted one is geometry. Dashed: the bound of 'well below'."
    return finish(picture, "How much of its r an adapter uses", note)
