"""C3: whether LoRA learns the truncated SVD of the full update.

Claim: LoRA at rank r learns an approximation of U_r Σ_r V_rᵀ of the full fine-tuning's update.

Decided by: LoRA (α = 2r) and full fine-tuning of the same data and seed, each at its best rate, at
r = 2 and 8, on MiniLM, on digits and on planted problems. Over all layers together the excess
(‖ΔW − ΔW_LoRA‖² − Σ_{i>r} σᵢ²) / Σ_{i≤r} σᵢ²: 0 for the oracle itself, 1 for no update; the overlap
of the r leading directions, between random (0) and the same (1); the score of LoRA less that of
W0 + ΔW_r with its trained head. Two full fine-tunings of other seeds show how far the oracle itself
repeats: the same excess, between the one's ΔW and the other's ΔW_r.

Test: over seeds. Excess below .5: more of the oracle's energy is found than missed (95 %).
Overlap above .5 (95 %). Score within ± .02 of the oracle's (90 %, an equivalence test).

Power: excess and overlap vary by less than .05 between seeds; at a spread of .01 of paired scores
5 seeds show equality to .02 with a chance of .9.

Cost: 15 runs of its own on planted, 2 seconds each; the rest from the shared grids.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from experiments.grids import DIGITS, MINILM, PLANTED, SEEDS, SMOKE, full, lora
from experiments.parts import GROUNDS, Part, edge_note, invented, judged, table_of
from experiments.updates import above, chosen, doubled, others, overlap
from lora_lab.claims import Found, Verdict
from lora_lab.figures import canvas, finish
from lora_lab.linalg import Spectrum, Update, decompose
from lora_lab.stats import t_interval

R = (2, 8)
_ALL = f"{PLANTED} data.true_r=16 data.decay=0.8 data.seed=${{seed}} train.epochs=4 {SEEDS}"
SWEEP = {
    "smoke": [SMOKE[0], SMOKE[1].replace("adapter.r=1,4", "adapter.r=2,8")],
    "paper": [
        *(line(ground) for ground in (MINILM, DIGITS) for line in (full, lora)),
        f"{_ALL} adapter=full train.lr=3e-3",
        f"{_ALL} adapter=lora adapter.r=2,8 train.lr=1e-2",
    ],
}
WEIGHTS = True
PARTS = {
    name: part
    for r in R
    for name, part in {
        f"excess, r = {r}": Part(
            f"LoRA's excess over the SVD of full's update at r = {r} is {{}} (0: that SVD, 1: no "
            "update)",
            high=0.5,
            main=r == R[-1],
        ),
        f"overlap, r = {r}": Part(
            f"its directions at r = {r} overlap with that SVD's by {{}}", low=0.5, main=r == R[-1]
        ),
        f"score, r = {r}": Part(
            f"it scores {{}} above that SVD at r = {r}",
            low=-0.02,
            high=0.02,
            level=0.9,
            unit=0.01,
            main=r == R[-1],
        ),
    }.items()
}
KINDS = ("excess", "overlap", "score")


def rows(found: Found) -> pd.DataFrame:
    """Excess, overlap and score of each LoRA run against the full one of its seed."""
    runs = chosen(found)
    scores = found.measures[
        (found.measures["measure"] == "oracle_score") & (found.measures["side"] == "trained_head")
    ].set_index(["run_id", "k"])["value"]
    out: list[dict[str, Any]] = []
    for model, own in runs.groupby("model"):
        whole = own[own["adapter"] == "full"].drop_duplicates("seed").set_index("seed")
        updates = {i: found.updates(i) for i in whole["run_id"]}
        spectra = {
            i: {layer: decompose(u, vectors=max(R), layer=layer) for layer, u in of.items()}
            for i, of in updates.items()
        }
        pairs = doubled(own)
        for run in pairs[pairs["r"].isin(R) & pairs["seed"].isin(whole.index)].to_dict("records"):
            target, r = str(whole.at[run["seed"], "run_id"]), int(run["r"])
            about = {c: run[c] for c in ("model", "seed", "adapter", "r", "alpha", "edge")}
            about["run_id"] = f"{run['run_id']}+{target}"
            learned = found.updates(run["run_id"])
            vectors = {n: decompose(u, vectors=r, layer=n) for n, u in learned.items()}
            gap = run["score"] - scores.get((target, float(r)), np.nan)
            phi = above(*overlap(vectors, spectra[target], r, r))
            excess = _excess(updates[target], spectra[target], learned, r)
            values = dict(zip(KINDS, (excess, phi, gap), strict=True))
            out += [about | {"part": f"{k}, r = {r}", "value": v} for k, v in values.items()]
        for seed, other in others(whole.reset_index()).items():
            first = str(whole.at[seed, "run_id"])
            about = {"model": model, "seed": seed, "adapter": "full", "run_id": f"{first}+{other}"}
            for r in R:
                again = {n: s.truncate(r) for n, s in spectra[other].items()}
                excess = _excess(updates[first], spectra[first], again, r)
                phi = above(*overlap(spectra[other], spectra[first], r, r))
                out += [about | {"part": f"again: excess, r = {r}", "value": excess}]
                out += [about | {"part": f"again: overlap, r = {r}", "value": phi}]
    return table_of(out)


def _excess(
    whole: Mapping[str, Update],
    spectra: Mapping[str, Spectrum],
    learned: Mapping[str, Update],
    r: int,
) -> float:
    """How much farther an update is than the truncation, over the truncation's energy."""
    missed, held = 0.0, 0.0
    for layer, s in spectra.items():
        one, other = whole[layer], learned[layer]
        product = float((one.dense() * other.dense()).sum())
        missed += one.norm() ** 2 + other.norm() ** 2 - 2 * product
        missed -= float((s.values[r:] ** 2).sum())
        held += float((s.values[:r] ** 2).sum())
    return missed / held if held else np.nan


def verdict(table: pd.DataFrame) -> Verdict:
    """Excess, overlap and score at two ranks on each ground."""
    notes = [edge_note(table)]
    again = table[table["part"] == f"again: overlap, r = {R[-1]}"].groupby("model")["value"].mean()
    if len(again):
        notes.append(
            f"two full fine-tunings of other seeds overlap at r = {R[-1]} by "
            + ", ".join(f"{value:.2f} {GROUNDS[str(m)]}" for m, value in again.items())
        )
    return judged(table, PARTS, "; ".join(filter(None, notes)))


def made(outcome: str, rng: np.random.Generator) -> pd.DataFrame | None:
    """LoRA that finds the oracle, that finds something else, that does so on one ground only."""
    return invented(outcome, rng, PARTS, ("minilm", "planted"))


def figure(table: pd.DataFrame) -> Any:
    """Excess, overlap and score by ground and r."""
    models = [name for name in GROUNDS if name in set(table["model"])]
    picture, [axes] = canvas(12, 4, 1, 3)
    bounds = {"excess": (0.5, 1.0), "overlap": (0.5,), "score": (-0.02, 0.02)}
    labels = {
        "excess": "excess over the oracle's energy",
        "overlap": "overlap above random",
        "score": "score of LoRA − oracle",
    }
    for ax, kind in zip(axes, KINDS, strict=True):
        for x, (model, r) in enumerate((m, r) for m in models for r in R):
            for start, colour, shift in (("", "#0072b2", -0.1), ("again: ", "#d55e00", 0.1)):
                part = table["part"] == f"{start}{kind}, r = {r}"
                values = table.loc[part & (table["model"] == model), "value"].dropna()
                ax.scatter([x + shift] * len(values), values, s=12, color=colour, alpha=0.5)
                mean, low, high = t_interval(values)
                if np.isfinite(low):
                    ax.plot([x + shift] * 2, [low, high], color=colour)
                    ax.plot(x + shift, mean, "_", ms=14, color=colour)
        for bound in bounds[kind]:
            ax.axhline(bound, color="grey", lw=1, ls="--")
        ax.set_xticks(range(len(models) * len(R)))
        names = [f"{m.partition('_')[0]}\nr = {r}" for m in models for r in R]
        ax.set_xticklabels(names, fontsize=8)
        ax.set_ylabel(labels[kind])
    note = (
        "Blue: LoRA against the full update of its seed, truncated. Orange: the truncated update "
    )
    note += "of another seed in LoRA's place. Points: seeds; lines: 95 % t intervals."
    return finish(picture, "How near LoRA comes to the truncated full update", note)
