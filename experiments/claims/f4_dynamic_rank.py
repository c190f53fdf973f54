"""F4: a rank for each layer, chosen in training.

Claim: ranks that are chosen per layer in training, by dropping small singular values from a high
start or by importance under a budget (AdaLoRA), do better than one fixed r of the same parameter
count.

Decided by: digits. Singular-value thresholds of 0.1 and 0.3 of the largest from r = 16 down, and
AdaLoRA with a budget of 4 a layer, each at the best of three rates; the parameters that are in use
at the end, and the score of fixed-r LoRA (α = 2r, best of four rates) at that count, linear in ln
parameters between r = 1, 2, 4 … 64, of the same seed.

Test: over seeds, for each way a part: supported where the 95 % t interval of its score less that of
fixed r lies above 0, refuted where the 90 % interval lies below +.02 (no gain that matters).

Power: at a spread of .012 between paired seeds, 5 seeds see a gain of .02 with a chance of .8, and
exclude it where there is none with the same.

Cost: 45 runs on digits, seconds each; fixed r is of the shared grid.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from experiments.curves import seeds_to_tell, spread
from experiments.grids import DIGITS, SEEDS, best, lora
from lora_lab.claims import Found, Verdict, together
from lora_lab.data import DATA
from lora_lab.figures import canvas, finish
from lora_lab.models import MODELS
from lora_lab.stats import t_interval

MARGIN = 0.02
WAYS = ("threshold 0.1", "threshold 0.3", "AdaLoRA")
_HIGH = "adapter=dynamic adapter.r=16 adapter.start_r=16 adapter.grow=0"
_TINY = "model=digits_vit model.start= data=digits size=smoke train.epochs=2"
SWEEP = {
    "smoke": [
        f"{_TINY} adapter=lora adapter.r=1,16",
        f"{_TINY} {_HIGH} adapter.threshold=0.3 adapter.every=1",
    ],
    "paper": [
        lora(DIGITS),
        f"{DIGITS} {_HIGH} adapter.threshold=0.1,0.3 train.lr=3e-3,1e-2,3e-2 {SEEDS}",
        f"{DIGITS} adapter=adaptive adapter.r=4 train.lr=3e-3,1e-2,3e-2 {SEEDS}",
    ],
}


def rows(found: Found) -> pd.DataFrame:
    """Score and parameters in use, of every way and of fixed r."""
    runs = found.runs
    threshold = runs["adapter.threshold"].map("threshold {:g}".format)
    way = threshold.where(runs["adapter"] == "dynamic", "AdaLoRA")
    runs = runs.assign(way=way.where(runs["adapter"] != "lora", "fixed"))
    own = best(runs, ("way", "adapter.r")).rename(columns={"adapter.r": "r", "train.lr": "lr"})
    traces = found.traces
    live = traces[(traces["trace"] == "live_r") & traces["run_id"].isin(own["run_id"])]
    live = live[live["step"] == live.groupby("run_id")["step"].transform("max")]
    shapes = MODELS["digits_vit"]().shapes(DATA["digits"]())
    sides = {layer: sum(shape) for layer, shape in shapes.items()}
    used = (live["value"] * live["layer"].map(sides)).groupby(live["run_id"]).sum()
    fixed = own["way"] == "fixed"
    own["parameters"] = own["adapter_parameters"].where(fixed, own["run_id"].map(used))
    spans = live.groupby("run_id")["value"].agg(["min", "max"])
    own["least_r"] = own["run_id"].map(spans["min"]).fillna(own["r"])
    own["most_r"] = own["run_id"].map(spans["max"]).fillna(own["r"])
    names = ["run_id", "way", "r", "seed", "score", "parameters", "least_r", "most_r", "lr", "edge"]
    return own[names]


def _gain(table: pd.DataFrame, way: str) -> pd.Series:
    """Score less that of fixed r at as many parameters, by seed."""
    fixed = table[table["way"] == "fixed"]
    out = {}
    for one in table[table["way"] == way].to_dict("records"):
        line = fixed[fixed["seed"] == one["seed"]].sort_values("parameters")
        if len(line):
            level = np.interp(np.log(one["parameters"]), np.log(line["parameters"]), line["score"])
            out[one["seed"]] = one["score"] - float(level)
    return pd.Series(out, dtype="float64")


def verdict(table: pd.DataFrame) -> Verdict:
    """Each way against fixed r at the same count."""
    parts, clauses, gains = [], [], {}
    for way in WAYS:
        own, gain = table[table["way"] == way], _gain(table, way)
        wide, narrow = t_interval(gain), t_interval(gain, level=0.9)
        above, none = wide.low > 0, narrow.high < MARGIN
        parts.append("supported" if above else "refuted" if none else "unresolved")
        gains[way] = gain
        if own.empty:
            continue
        clauses.append(
            f"{way} {100 * wide.value:+.1f} [{100 * wide.low:.1f}, {100 * wide.high:.1f}] at "
            f"{own['parameters'].mean():,.0f} parameters (r from {own['least_r'].min():.0f} to "
            f"{own['most_r'].max():.0f})"
        )
    outcome = together(parts)
    said = f"Points over fixed r at as many parameters: {', '.join(clauses)}"
    edges = table.loc[table["edge"].astype(bool), ["way", "r"]].drop_duplicates()
    said += f"; {len(edges)} best rates lie at the edge of their grid" * bool(len(edges))
    worst = max(gains.values(), key=lambda one: one.std() if len(one) > 1 else 0.0)
    if outcome == "unresolved":
        said += f"; {seeds_to_tell(worst, MARGIN)}"
    main, seeds = spread(gains[WAYS[0]]), table["seed"].nunique()
    return Verdict(outcome, said + ".", main.value, main[1:], n_seeds=seeds, effect=main.value)


def made(outcome: str, rng: np.random.Generator) -> pd.DataFrame:
    """Gains over fixed r; losses; a gain of one way alone; or scatter."""
    gains = {
        "supported": (0.05, 0.05, 0.05),
        "refuted": (-0.05, -0.05, 0.0),
        "mixed": (0.05, -0.05, 0.0),
        "unresolved": (0.01, 0.01, 0.01),
    }[outcome]
    # Symmetric, so that no draw of few seeds can decide what is undecided.
    wide = np.array([-1.0, 1.0, 0.5, -0.5, 0.0]) * (0.1 if outcome == "unresolved" else 0.002)
    rows = []
    for seed in range(5):
        shared = {"seed": seed, "lr": 1e-2, "edge": False}
        start = 0.8 + 0.005 * rng.standard_normal()
        for i, r in enumerate((1, 4, 16)):
            fixed = {"way": "fixed", "r": r, "parameters": 4000 * r, "least_r": r, "most_r": r}
            rows.append(shared | fixed | {"score": start + 0.02 * i})
        for way, gain in zip(WAYS, gains, strict=True):
            own = {"way": way, "r": 16, "parameters": 16000, "least_r": 1, "most_r": 9}
            rows.append(shared | own | {"score": start + 0.02 + gain + wide[seed]})
    return pd.DataFrame(rows)


def figure(table: pd.DataFrame) -> Any:
    """Score over the parameters in use."""
    picture, [[ax]] = canvas(7, 4.2)
    fixed = table[table["way"] == "fixed"]
    mean = fixed.groupby("parameters")["score"].mean()
    ax.plot(mean.index, mean, color="grey", label="fixed r")
    ax.plot(fixed["parameters"], fixed["score"], "o", ms=3, color="grey", alpha=0.5)
    for way, colour in zip(WAYS, ("#0072b2", "#009e73", "#d55e00"), strict=True):
        own = table[table["way"] == way]
        ax.plot(own["parameters"], own["score"], "D", ms=5, color=colour, label=way, alpha=0.8)
    ax.set_xscale("log")
    ax.set_xlabel("parameters in use at the end")
    ax.set_ylabel("test score")
    ax.legend(fontsize=8)
    note = (
        "A rank for each layer pays where the diamonds lie above the grey line. Points: seeds; "
        "thresholds are shares of the layer's largest singular value."
    )
    return finish(picture, "Ranks chosen per layer against one fixed r", note)
