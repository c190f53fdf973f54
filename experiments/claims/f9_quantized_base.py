"""F9: adapters on a quantised base.

Claim: adapters on a quantised frozen base lose little.

Decided by: digits, LoRA of r = 8 (α = 2r) on a base stored in int8, nf4 and int4, each at the best
of three rates, against the same on the base as it comes; MiniLM on Rotten Tomatoes in nf4 at the
rate 1e-3, which the unquantised base gets too. Weights are quantised and dequantised before
training, ΔW is against the dequantised base. What merging back costs is measured beside it: the
error of storing W0 + ΔW in the base's own storage, over ‖ΔW‖, mean over layers (digits).

Test: over seeds, a part for each storage and model: little is lost where the 90 % t interval of the
score less that on the unquantised base lies above −.02 (one side of an equivalence test), refuted
where it lies below. The error of merging back is reported, and decides nothing.

Power: at a spread of .012 between paired seeds, 5 seeds place a difference that is .02 from the
margin with a chance of .8.

Cost: 45 runs on digits, a second each, and 5 on MiniLM; the unquantised ones are of the shared
grids.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from experiments.curves import seeds_to_tell, spread
from experiments.grids import DIGITS, MINILM, SEEDS, best, lora
from lora_lab.claims import Found, Verdict, against, together
from lora_lab.figures import canvas, finish
from lora_lab.measures import measure
from lora_lab.stats import t_interval

WEIGHTS = True
MARGIN, R = 0.02, 8
STORAGES = ("int8", "nf4", "int4")
_TEXT = f"{MINILM} adapter=lora adapter.r={R} train.lr=1e-3 {SEEDS}"
_TINY = "model=planted data=planted size=smoke adapter=lora adapter.r=4"
SWEEP = {
    "smoke": [_TINY, f"{_TINY} model.quantize=nf4"],
    "paper": [
        lora(DIGITS, ranks=f"{R}"),
        f"{DIGITS} model.quantize={','.join(STORAGES)} adapter=lora adapter.r={R} "
        f"train.lr=3e-3,1e-2,3e-2 {SEEDS}",
        _TEXT,
        f"{_TEXT} model.quantize=nf4",
    ],
}


def rows(found: Found) -> pd.DataFrame:
    """Scores by storage at the best rates, and the errors of merging back."""
    own = best(found.runs, ("model", "model.quantize"))
    names = {"model.quantize": "storage", "train.lr": "lr"}
    own = own.rename(columns=names)
    merged = (own["storage"] != "none") & (own["model"] != "minilm")
    own["merging"] = [
        _merging(found, run_id, storage) if wanted else np.nan
        for run_id, storage, wanted in zip(own["run_id"], own["storage"], merged, strict=True)
    ]
    return own[["run_id", "model", "storage", "seed", "score", "merging", "lr", "edge"]]


def _merging(found: Found, run_id: str, storage: str) -> float:
    """Error of storing W0 + ΔW again over ‖ΔW‖, mean over layers."""
    errors = [
        measure("requantization_error", one.spectrum, side=storage, **_needed(one.given))
        for one in found.finals(run_id).values()
    ]
    return float(np.nanmean(errors))


def _needed(given: dict[str, Any]) -> dict[str, Any]:
    return {name: given[name] for name in ("W0", "update")}


def _losses(table: pd.DataFrame) -> dict[tuple[str, str], pd.Series]:
    """Score less that on the unquantised base, by seed, for each model and storage."""
    out = {}
    for (model, storage), own in table[table["storage"] != "none"].groupby(["model", "storage"]):
        whole = table[(table["model"] == model) & (table["storage"] == "none")]
        scores = (one.set_index("seed")["score"] for one in (own, whole))
        out[str(model), str(storage)] = next(scores).sub(next(scores)).dropna()
    return out


def verdict(table: pd.DataFrame) -> Verdict:
    """Each storage against the base as it comes."""
    losses = _losses(table)
    spans = {key: t_interval(loss, level=0.9) for key, loss in losses.items()}
    outcome = together(against(span, -MARGIN) for span in spans.values())
    words = [
        f"{100 * span.value:+.1f} [{100 * span.low:.1f}, {100 * span.high:.1f}] in {storage} on "
        f"{model}"
        for (model, storage), span in spans.items()
    ]
    merging = table[table["merging"].notna()].groupby("storage")["merging"].mean()
    errors = ", ".join(f"{error:.2g} ({storage})" for storage, error in merging.items())
    said = (
        f"Points against the unquantised base, with 90 % intervals: {', '.join(words)}; storing W0 "
        f"+ ΔW in the same storage again is off by {errors} of ‖ΔW‖"
    )
    edges = table.loc[table["edge"].astype(bool), ["model", "storage"]].drop_duplicates()
    said += f"; {len(edges)} best rates lie at the edge of their grid" * bool(len(edges))
    worst = min(losses.values(), key=lambda one: one.mean())
    if outcome == "unresolved":
        said += f"; {seeds_to_tell(worst, -MARGIN)}"
    main, seeds = spread(worst), table["seed"].nunique()
    return Verdict(outcome, said + ".", main.value, main[1:], n_seeds=seeds, effect=main.value)


def made(outcome: str, rng: np.random.Generator) -> pd.DataFrame:
    """Nothing lost; much lost; much in 4 bits alone; or scatter about the margin."""
    small, large = {
        "supported": (0.0, 0.0),
        "refuted": (0.1, 0.2),
        "mixed": (0.0, 0.2),
        "unresolved": (MARGIN, MARGIN),
    }[outcome]
    # Symmetric, so that no draw of few seeds can decide what is undecided.
    wide = np.array([-1.0, 1.0, 0.5, -0.5, 0.0]) * (0.05 if outcome == "unresolved" else 0.002)
    rows = []
    for seed in range(5):
        whole = 0.9 + 0.01 * rng.standard_normal()
        for storage in ("none", *STORAGES):
            lost = {"none": 0.0, "int8": small}.get(storage, large)
            score = whole - lost + wide[seed] * (storage != "none")
            merging = np.nan if storage == "none" else 0.5
            rows.append({"storage": storage, "seed": seed, "score": score, "merging": merging})
    return pd.DataFrame(rows).assign(model="digits_vit", lr=1e-2, edge=False)


def figure(table: pd.DataFrame) -> Any:
    """Score against the unquantised base, and the error of merging back."""
    picture, [[left, right]] = canvas(9.5, 4, 1, 2)
    losses = _losses(table)
    for i, loss in enumerate(losses.values()):
        left.plot(i + np.linspace(-0.1, 0.1, len(loss)), loss, "o", color="#0072b2", alpha=0.6)
        span = t_interval(loss, level=0.9)
        if np.isfinite(span.low):
            left.errorbar(i + 0.2, span.value, span.value - span.low, color="#222222", marker="o")
    left.axhline(0, color="grey", lw=1)
    left.axhline(-MARGIN, color="grey", lw=1, ls="--")
    left.set_xticks(range(len(losses)), [f"{storage}\n{model}" for model, storage in losses])
    left.set_ylabel("score − that on the unquantised base")
    merged = table[table["merging"].notna()]
    storages = [storage for storage in STORAGES if (merged["storage"] == storage).any()]
    for i, storage in enumerate(storages):
        own = merged.loc[merged["storage"] == storage, "merging"]
        right.plot(i + np.linspace(-0.1, 0.1, len(own)), own, "o", color="#d55e00")
    right.axhline(1, color="grey", lw=1)
    right.set_ylim(bottom=0)
    right.set_xticks(range(len(storages)), storages)
    right.set_ylabel("error of storing W0 + ΔW, over ‖ΔW‖")
    note = (
        "Left: little is lost where the 90 % interval lies above the dashed line. Right: at 1 the "
        "error is as large as the whole update. Points: seeds."
    )
    return finish(picture, "Adapters on a quantised base", note)
