"""G1: Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models.

Claim: r = 4 to 8 scores within a point of r = 64 (table 6); q and v at r beat q alone at 2r (table
5); the top direction of r = 8 is that of r = 64, the others are not (figure 3); two seeds overlap
above random (figure 4); W0 is amplified more at a low r than at a high one, and has more in ΔW's
directions than in random ones (table 7).

Decided by: LoRA (α = 2r, all layers, best rates) on MiniLM and on digits, where the high r is 16
instead of 64 for directions (64 are all there are) and the low one 4; means over layers and both
sides. Score at r = 4 and 8 less that at 64. q and v at r = 4 less q at r = 8, on digits. φ(1, 1)
between the low and the high r, of different seeds, and that less φ of directions 2 to `low`. φ
between two seeds' leading directions at the high r above random. ln of amplification at r = k = 4
over r = k = high. ‖U₄ᵀ W0 V₄‖ in ΔW's directions over that in random ones.

Test: over seeds. Scores: above −.01, one side of an equivalence test (90 %). φ(1, 1) above .5, and
above the rest by .2; the others above 0, the last above 1 (95 %).

Power: at a spread of .005 to .01 of paired scores 5 seeds show that nothing is lost beyond a point
with a chance of .6 to .9.

Cost: 30 runs of its own on digits, 1 second each, half of them shared with D2; the rest from the
shared grids. The paper's layers are q and v alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from experiments.grids import CELL, DIGITS, MINILM, SEEDS, SMOKE, lora
from experiments.parts import GROUNDS, Part, edge_note, invented, judged, table_of
from experiments.updates import chosen, measured, others, overlap, spectra_of
from lora_lab.claims import Found, Verdict
from lora_lab.figures import canvas, finish
from lora_lab.linalg import Spectrum
from lora_lab.stats import t_interval

PAIRS = {"minilm": (8, 64), "digits_vit": (4, 16), "planted": (1, 4)}
_RATES = "train.lr=3e-3,1e-2,3e-2"
SWEEP = {
    "smoke": SMOKE[1:],
    "paper": [
        lora(MINILM),
        lora(DIGITS),
        f"{DIGITS} adapter=lora adapter.r=4 adapter.targets=qv {_RATES} {SEEDS}",
        f"{DIGITS} adapter=lora adapter.r=8 adapter.targets=query {_RATES} {SEEDS}",
    ],
}
WEIGHTS = True
NEAR, K = (4, 8), 4
PARTS = {
    f"r = {r}": Part(
        f"r = {r} scores {{}} above r = 64", low=-0.01, level=0.9, unit=0.005, main=True
    )
    for r in NEAR
} | {
    "qv": Part("q and v at r = 4 score {} above q at r = 8", low=0.0, unit=0.01),
    "top": Part("the top directions of two r overlap by {}", low=0.5, main=True),
    "rest": Part("they overlap by {} more than the other directions", low=0.2),
    "seeds": Part("seeds overlap by {} above random", low=0.0, unit=0.05),
    "amplification": Part("ln of low r's amplification over high r's is {}", low=0.0),
    "W0": Part("W0 in ΔW's directions is {} of that in random ones", low=1.0, unit=0.2),
}


def rows(found: Found) -> pd.DataFrame:
    """The inequalities of each seed."""
    runs = chosen(found, (*CELL, "adapter.targets")).rename(columns={"adapter.targets": "targets"})
    runs = runs[runs["alpha"] == 2 * runs["r"]]
    out: list[dict[str, Any]] = []
    for model, every in runs.groupby("model"):
        own = every[every["targets"] == "all"]
        low, high = PAIRS[str(model)]
        few, many = own[own["r"] == low], own[own["r"] == high]
        spectra = {i: spectra_of(found, i) for i in {*few["run_id"], *many["run_id"]}}
        after = others(many)
        for seed, at in every.groupby("seed"):
            runs_at = _by_name(at)
            about = {"model": model, "seed": seed, "adapter": "lora"}
            pairs = {f"r = {r}": (f"all {r}", "all 64") for r in NEAR} | {"qv": ("qv 4", "query 8")}
            for part, (first, second) in pairs.items():
                if first in runs_at and second in runs_at:
                    a, b = runs_at[first], runs_at[second]
                    row = {"part": part, "value": a["score"] - b["score"], "edge": a["edge"]}
                    out.append(
                        about | row | {"run_id": f"{a['run_id']}+{b['run_id']}", "r": a["r"]}
                    )
            one, two = runs_at.get(f"all {low}"), runs_at.get(f"all {high}")
            other = after.get(int(str(seed)))
            if one is not None and other is not None:
                ids = {"run_id": f"{one['run_id']}+{other}", "r": low}
                values = _overlaps(spectra[one["run_id"]], spectra[other], low)
                out += [about | ids | {"part": p, "value": v} for p, v in values.items()]
            if two is not None and other is not None:
                phi, null = overlap(spectra[two["run_id"]], spectra[other], low, low)
                ids = {"run_id": f"{two['run_id']}+{other}", "r": high}
                out.append(about | ids | {"part": "seeds", "value": phi - null})
            base = runs_at.get(f"all {K}")
            if base is not None:
                values = _base(measured(found, own[own["seed"] == seed], "amplification"), high)
                ids = {"run_id": base["run_id"], "r": K}
                out += [about | ids | {"part": p, "value": v} for p, v in values.items()]
    return table_of(out)


def _by_name(at: pd.DataFrame) -> dict[str, Mapping[Any, Any]]:
    """Runs of one seed by targets and r."""
    return {f"{run['targets']} {run['r']:g}": run for run in at.to_dict("records")}


def _overlaps(
    one: Mapping[str, Spectrum], other: Mapping[str, Spectrum], low: int
) -> dict[str, float]:
    top = overlap(one, other, 1, 1)[0]
    rest = overlap(one, other, low, low, skip=1)[0] if low > 1 else np.nan
    return {"top": top, "rest": top - rest}


def _base(of: pd.DataFrame, high: int) -> dict[str, float]:
    """Amplification at low against high r, and W0 in ΔW's directions over random ones."""
    by = of[of["k"] == of["r"]].pivot_table(index=["layer", "r"], columns="side", values="value")
    by = by.reindex(columns=["update", "random"])
    rank = by.index.get_level_values("r")
    at, far = (by[rank == r].droplevel("r") for r in (K, high))
    return {
        "amplification": float(np.log(at["update"] / far["update"]).mean()),
        "W0": float((at["random"] / at["update"]).mean()),
    }


def verdict(table: pd.DataFrame) -> Verdict:
    """Eight inequalities; that of q and v on digits alone."""
    return judged(table, PARTS, edge_note(table))


def made(outcome: str, rng: np.random.Generator) -> pd.DataFrame | None:
    """What the paper found, its opposite, or its findings on one ground only."""
    return invented(outcome, rng, PARTS)


def figure(table: pd.DataFrame) -> Any:
    """Every inequality with its bound: means, intervals and seeds."""
    models = [name for name in GROUNDS if name in set(table["model"])]
    picture, axes = canvas(12, 6, 2, 4)
    for ax, (name, part) in zip(axes.flat, PARTS.items(), strict=True):
        for x, model in enumerate(models):
            own = table[(table["part"] == name) & (table["model"] == model)]
            values = own["value"].dropna()
            ax.scatter([x] * len(values), values, s=12, color="#0072b2", alpha=0.4)
            mean, low, high = t_interval(values, part.level)
            if np.isfinite(low):
                ax.errorbar([x], [mean], [[mean - low], [high - mean]], fmt="o", color="#0072b2")
        ax.axhline(part.low, color="grey", lw=1, ls="--")
        ax.set_xlim(-0.5, len(models) - 0.5)
        ax.set_xticks(range(len(models)), [m.partition("_")[0] for m in models], fontsize=8)
        ax.set_title(name, fontsize=10, loc="left")
    for line, label in zip(axes, ("difference of scores, or φ", "φ, or a ratio"), strict=True):
        line[0].set_ylabel(label)
    note = "Dashed: the bound that the paper's inequality has to be above. Points: seeds; bars: "
    note += "intervals over seeds. Panels: r = 4 and r = 8 against 64, q and v against q, φ of the "
    note += "top direction, its lead over the rest, φ of seeds, amplification, W0 in ΔW's."
    return finish(picture, "The paper's inequalities", note)
