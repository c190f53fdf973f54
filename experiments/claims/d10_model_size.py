"""D10: r and the size of the model.

Claim: small models need lower ranks (they are "already overparameterized"). Another text says the
opposite: larger models need less.

Decided by: digits transformers of three sizes (width 32, depth 2; 64, 4; 128, 6), each pre-trained
on the digits 0 to 4; how far LoRA at r = 1 and r = 4 (α = 2r) lags behind full fine-tuning of the
same model on 5 to 9, each method and r at the best of three or four rates. A model that needs a
higher r lags more at a low one. (A planted problem cannot decide: the rank of its update is given.)

Test: slope of the lag, mean of both r, on log2 of the number of weights in the blocks, one level a
seed, 95 % t interval. Above 0, small models need lower ranks; below 0, the other text is right.
Neither: unresolved, unless the interval lies within ±.002 a doubling (about 1 point over the range
of sizes): then size does not matter and the claim is refuted.

Power: at a spread of .01 of a seed's lags the standard error of the slope is about .001 a doubling,
so 15 points show .003 with a chance of .8.

Cost: 90 runs on digits and two pre-trainings, one to six seconds each; the middle size is of the
shared grid.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from experiments.grids import CELL, DIGITS, RATES, SEEDS, best, full, lora
from lora_lab.claims import Found, Verdict
from lora_lab.data.digits import DigitsData
from lora_lab.figures import canvas, finish
from lora_lab.models.digits_vit import DigitsViT
from lora_lab.registry import WrongInput
from lora_lab.stats import Slope, blocked_slope, t_interval, units_needed
from lora_lab.targets import select

LOW = (1, 4)
FLAT = 0.002
_SIZES = [f"{DIGITS} model.width={w} model.depth={d}" for w, d in ((32, 2), (128, 6))]
_LORA = f"adapter=lora adapter.r={','.join(map(str, LOW))} train.lr=3e-3,1e-2,3e-2 {SEEDS}"
_TINY = "model=digits_vit model.start= data=digits size=smoke train.epochs=1 model.depth=1,2"
SWEEP = {
    "smoke": [f"{_TINY} adapter=full", f"{_TINY} adapter=lora adapter.r=1"],
    "paper": [
        full(DIGITS),
        lora(DIGITS, ranks=",".join(map(str, LOW))),
        *(f"{size} adapter=full train.lr={RATES[DIGITS]['full']} {SEEDS}" for size in _SIZES),
        *(f"{size} {_LORA}" for size in _SIZES),
    ],
}


def rows(found: Found) -> pd.DataFrame:
    """Scores at the best rates, with the size of the model."""
    runs = best(found.runs, (*CELL, "model.width", "model.depth"))
    names = {"model.width": "width", "model.depth": "depth", "adapter.r": "r", "train.lr": "lr"}
    own = runs.rename(columns=names)
    sizes = own[["width", "depth"]].astype(int)
    own["weights"] = [_weights(*size) for size in sizes.itertuples(index=False)]
    columns = ["run_id", "width", "depth", "weights", "adapter", "r", "seed", "score", "lr", "edge"]
    return own[columns]


def _weights(width: int, depth: int) -> int:
    """Weights of the linear layers in the blocks: those that are adapted."""
    shapes = DigitsViT(width=width, depth=depth).shapes(DigitsData())
    return sum(shapes[layer][0] * shapes[layer][1] for layer in select("all", shapes))


def _lags(table: pd.DataFrame) -> pd.DataFrame:
    """full − LoRA, mean over the low r: a row for each size and seed."""
    low = table[(table["adapter"] == "lora") & table["r"].isin(LOW)]
    mean = low.groupby(["weights", "seed"])["score"].mean()
    whole = table[table["adapter"] == "full"].set_index(["weights", "seed"])["score"]
    return pd.DataFrame({"lag": whole - mean}).dropna().reset_index()


def _line(lags: pd.DataFrame) -> Slope:
    try:
        return blocked_slope(np.log2(lags["weights"]), lags["lag"], list(lags["seed"]))
    except WrongInput:
        return Slope(np.nan, np.nan, np.nan, np.nan, len(lags))


def _outcome(line: Slope) -> str:
    if line.low > 0:
        return "supported"
    if line.high < 0 or (line.low > -FLAT and line.high < FLAT):
        return "refuted"
    return "unresolved"


def verdict(table: pd.DataFrame) -> Verdict:
    """The sign of the slope."""
    lags = _lags(table)
    line = _line(lags)
    outcome = _outcome(line)
    each = [
        f"{100 * mean:+.1f} [{100 * low:.1f}, {100 * high:.1f}] at {weights:,.0f} weights"
        for weights, own in lags.groupby("weights")
        for mean, low, high in [t_interval(own["lag"])]
    ]
    said = (
        f"At r = {' and '.join(map(str, LOW))} LoRA lags full fine-tuning by {', '.join(each)} "
        f"(points), which changes by {100 * line.slope:+.2f} [{100 * line.low:.2f}, "
        f"{100 * line.high:.2f}] points a doubling of the model"
    )
    if outcome == "refuted":
        small = "larger models need less" if line.high < 0 else "size does not matter"
        said += f": {small}"
    edges = table.loc[table["edge"].astype(bool), ["weights", "adapter", "r"]].drop_duplicates()
    said += f"; {len(edges)} best rates lie at the edge of their grid" * bool(len(edges))
    if outcome == "unresolved":
        said += f"; {_needed(lags, line)}"
    seeds = table["seed"].nunique()
    interval = (line.low, line.high)
    return Verdict(outcome, said + ".", line.slope, interval, n_seeds=seeds, effect=line.slope)


def _needed(lags: pd.DataFrame, line: Slope) -> str:
    """Seeds for a slope of 1 point a doubling, by the slopes of single seeds."""
    slopes = [
        np.polyfit(np.log2(own["weights"]), own["lag"], 1)[0]
        for _, own in lags.groupby("seed")
        if own["weights"].nunique() > 1
    ]
    spread = float(np.std(slopes, ddof=1)) if len(slopes) > 1 else 0.0
    if not spread > 0:
        return "a spread needs at least 2 seeds"
    try:
        effect = max(abs(line.slope), FLAT)
        return f"{units_needed(effect, spread)} seeds would show {100 * effect:.2f} a doubling"
    except WrongInput as error:
        return str(error).rstrip(".")


def made(outcome: str, rng: np.random.Generator) -> pd.DataFrame | None:
    """Lags that grow with the model, that shrink, or that scatter; one question has no part."""
    if outcome == "mixed":
        return None
    change = {"supported": 0.01, "refuted": -0.01, "unresolved": 0.0}[outcome]
    scatter = 0.05 if outcome == "unresolved" else 0.004
    sizes = [(32, 2), (64, 4), (128, 6)]
    out = []
    for width, depth in sizes:
        size = {"width": width, "depth": depth, "weights": _weights(width, depth)}
        lag = 0.05 + change * np.log2(size["weights"] / 196_608)
        for adapter, r in (("full", np.nan), *(("lora", r) for r in LOW)):
            # Seeds whose noise sums to 0: nothing to find is not found by chance.
            for seed, noise in enumerate(scatter * rng.permutation(np.linspace(-1.5, 1.5, 5))):
                score = 0.9 - lag * (adapter == "lora") + noise
                out.append(size | {"seed": seed, "adapter": adapter, "r": r, "score": score})
    return pd.DataFrame(out).assign(lr=1e-2, edge=False)


def figure(table: pd.DataFrame) -> Any:
    """Lag over model size for each r."""
    picture, [[ax]] = canvas(6.5, 4)
    whole = table[table["adapter"] == "full"].set_index(["weights", "seed"])["score"]
    for r, own in table[table["adapter"] == "lora"].groupby("r"):
        lag = (whole - own.set_index(["weights", "seed"])["score"]).dropna()
        spans = {w: t_interval(cell) for w, cell in lag.groupby(level="weights")}
        ends = [[s.value - s.low, s.high - s.value] for s in spans.values()]
        spread = np.nan_to_num(ends).reshape(-1, 2).T
        y = [s.value for s in spans.values()]
        ax.errorbar(list(spans), y, spread, marker="o", label=f"r = {r:g}")
    ax.axhline(0, color="grey", lw=1)
    ax.set_xscale("log")
    ax.set_xlabel("weights in the blocks of the model")
    ax.set_ylabel("test score, full − LoRA")
    ax.legend(fontsize=8)
    note = "Rising: small models need lower ranks. Falling: larger ones do. Bars: 95 % t intervals."
    return finish(picture, "What a low r costs models of three sizes", note)
