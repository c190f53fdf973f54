"""D5: generalisation bounds of LoRA and of full fine-tuning.

Claim: by Rademacher complexity the generalisation gap of LoRA goes as α√(2r log(2mn))/n and that of
full fine-tuning as √(mn/n), so that LoRA generalises better.

Decided by: digits with n = 32, 128 and 508 images at about equal steps, LoRA of r = 2, 8 and 32 (α
= 2r, so that the quoted form goes as r^1.5) and full fine-tuning, each at the best of three rates;
the gap is the test loss less the training loss at the end (mean of the last three traced steps). As
quoted the forms cannot be compared: n is a side of the weight in log(2mn) and mn and the number of
examples below; there is no weight norm, so that a rescaled network has another gap and the same
bound; and one falls as 1/n, the other as 1/√n. A bound that lies above the gap is not refuted by
its size: what is tested is its shape.

Test: 95 % intervals of slopes of ln gap, a part each: on ln n for LoRA (r and seeds as blocks)
within −1 ± .2, on ln n for full (seeds as blocks) within −.5 ± .2, on ln r (n and seeds as blocks)
within 1.5 ± .2; refuted where they lie outside. And the 95 % t interval over seeds of ln gap of
LoRA (mean over r) less that of full (mean over n) below 0 (refuted: above).

Power: ln gap scatters by about .2 between seeds: 45 points place a slope on ln n to ± .06, 15
points to ± .1, one on ln r to ± .06.

Cost: 120 runs on digits, a second or two each, half of them D3's too, beside the shared grid.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from experiments.curves import inside, seeds_to_tell, spread
from experiments.grids import CELL, DIGITS, RATES, SEEDS, best, full, lora
from lora_lab.claims import Found, Verdict, against, together
from lora_lab.figures import canvas, finish
from lora_lab.registry import WrongInput
from lora_lab.stats import Interval, blocked_slope

RANKS, WHOLE, TOLERANCE, SIDE = "2,8,32", 508, 0.2, 64
EPOCHS = {32: 160, 128: 40}
"""Passes at which a size takes the 160 steps of 508 images in ten."""
SHAPES = {"LoRA over n": -1.0, "full over n": -0.5, "LoRA over r": 1.5}
"""Exponents of the quoted forms; α = 2r makes α√r go as r^1.5."""


def _few(n: int) -> str:
    return DIGITS.replace("train.epochs=10", f"train.epochs={EPOCHS[n]}") + (
        f" data.train_examples={n}"
    )


_TINY = "model=digits_vit model.start= data=digits size=smoke data.train_examples=32,64"
SWEEP = {
    "smoke": [f"{_TINY} adapter=full", f"{_TINY} adapter=lora adapter.r=2,8"],
    "paper": [
        *(f"{_few(n)} adapter=full train.lr={RATES[DIGITS]['full']} {SEEDS}" for n in EPOCHS),
        *(
            f"{_few(n)} adapter=lora adapter.r={RANKS} train.lr=1e-3,3e-3,1e-2 {SEEDS}"
            for n in EPOCHS
        ),
        full(DIGITS),
        lora(DIGITS, ranks=RANKS),
    ],
}


def rows(found: Found) -> pd.DataFrame:
    """Test loss, training loss and their difference by method, r and n."""
    runs = found.runs
    asked = pd.to_numeric(runs["data.train_examples"], errors="coerce")
    runs = runs.assign(n=asked.fillna(WHOLE).astype(int))
    own = best(runs, (*CELL, "n")).rename(columns={"adapter.r": "r", "train.lr": "lr"})
    losses = found.traces[found.traces["trace"] == "loss"].sort_values("step")
    ends = losses.groupby("run_id")["value"].apply(lambda values: values.tail(3).mean())
    own["train_loss"] = own["run_id"].map(ends)
    own["gap"] = own["loss"] - own["train_loss"]
    columns = ["run_id", "adapter", "r", "n", "seed", "loss", "train_loss", "gap", "score"]
    return own[[*columns, "lr", "edge"]]


def _logs(table: pd.DataFrame, adapter: str) -> pd.DataFrame:
    """ln gap where there is one."""
    own = table[(table["adapter"] == adapter) & (table["gap"] > 0)]
    return own.assign(y=np.log(own["gap"]))


def _slopes(table: pd.DataFrame) -> dict[str, Interval]:
    """Exponents of the gap, by the names of `SHAPES`."""
    low, whole = _logs(table, "lora"), _logs(table, "full")
    cases = {
        "LoRA over n": (low, "n", ["r", "seed"]),
        "full over n": (whole, "n", ["seed"]),
        "LoRA over r": (low, "r", ["n", "seed"]),
    }
    out = {}
    for name, (own, over, blocks) in cases.items():
        try:
            names = own[blocks].astype(str).agg("/".join, axis=1)
            found = blocked_slope(np.log(own[over].astype(float)), own["y"], list(names))
            out[name] = Interval(found.slope, found.low, found.high)
        except (WrongInput, ValueError):  # no point, or none to spare
            out[name] = Interval(np.nan, np.nan, np.nan)
    return out


def _less(table: pd.DataFrame) -> pd.Series:
    """ln gap of LoRA less that of full fine-tuning, mean over r and n, by seed."""
    by = [_logs(table, name).groupby(["n", "seed"])["y"].mean() for name in ("lora", "full")]
    return by[0].sub(by[1]).dropna().groupby("seed").mean()


def verdict(table: pd.DataFrame) -> Verdict:
    """Three exponents, and whose gap is smaller."""
    slopes, less = _slopes(table), _less(table)
    smaller = spread(less)
    parts = [
        inside(slopes[name], exponent - TOLERANCE, exponent + TOLERANCE)
        for name, exponent in SHAPES.items()
    ]
    outcome = together([*parts, against(smaller, 0.0, more=False)])
    words = [
        f"{name} {found.value:.2f} [{found.low:.2f}, {found.high:.2f}] (quoted {SHAPES[name]:g})"
        for name, found in slopes.items()
    ]
    ratio = np.exp(smaller)
    r, n = 2, table["n"].max()
    quoted = 2 * r * np.sqrt(2 * r * np.log(2 * SIDE**2)) / n, np.sqrt(SIDE**2 / n)
    said = (
        f"The gap goes by exponents {', '.join(words)}; LoRA's is {ratio[0]:.2f} [{ratio[1]:.2f}, "
        f"{ratio[2]:.2f}] times that of full fine-tuning (the quoted forms would make it "
        f"{quoted[0] / quoted[1]:.2g} at r = {r} and {n} examples of a {SIDE} × {SIDE} weight, but "
        f"use n in two meanings, have no weight norm and fall at two rates, so that they are not "
        f"comparable as written)"
    )
    none = int((table["gap"] <= 0).sum())
    said += f"; {none} of {len(table)} runs had no gap" * bool(none)
    edges = table.loc[table["edge"].astype(bool), ["adapter", "r", "n"]].drop_duplicates()
    said += f"; {len(edges)} best rates lie at the edge of their grid" * bool(len(edges))
    if outcome == "unresolved":
        said += f"; {seeds_to_tell(less, 0.0)}"
    seeds, effect = table["seed"].nunique(), slopes["LoRA over r"]
    return Verdict(outcome, said + ".", effect.value, effect[1:], n_seeds=seeds, effect=effect[0])


def made(outcome: str, rng: np.random.Generator) -> pd.DataFrame:
    """Gaps of the quoted shapes; of others and larger; of others and smaller; or scatter."""
    over_n, whole_n, over_r, start = {
        "supported": (-1.0, -0.5, 1.5, -3.0),
        "refuted": (-0.2, 0.0, 0.0, 1.0),
        "mixed": (-0.2, 0.0, 0.0, -1.0),
        "unresolved": (-0.8, -0.3, 1.3, 0.0),
    }[outcome]
    wide = np.array([-1.0, 1.0, 0.5, -0.5, 0.0])
    rows = []
    for i, n in enumerate((32, 128, WHOLE)):
        for seed in range(5):
            cells = [("full", np.nan), *(("lora", r) for r in (2, 8, 32))]
            for k, (adapter, r) in enumerate(cells):
                # Scatter that turns with n and r, so that it widens slopes and moves none.
                turn = (-1) ** (i + k) * wide[seed] * (3.0 if outcome == "unresolved" else 0.0)
                y = turn + 0.01 * rng.standard_normal()
                if adapter == "full":
                    y += whole_n * np.log(n / 128)
                else:
                    y += over_n * np.log(n / 128) + over_r * np.log(r / 8) + start
                row = {"adapter": adapter, "r": r, "n": n, "seed": seed, "gap": float(np.exp(y))}
                rows.append(row | {"lr": 1e-2, "edge": False})
    return pd.DataFrame(rows)


def figure(table: pd.DataFrame) -> Any:
    """The gap over n and over r, beside the quoted shapes."""
    picture, [[left, right]] = canvas(9.5, 4, 1, 2)
    whole, low = _logs(table, "full"), _logs(table, "lora")
    shades = {2: "#8cc5e3", 8: "#0072b2", 32: "#003a5d"}
    series = [("full", "#d55e00", whole, -0.5)]
    series += [
        (f"LoRA, r = {r:g}", shades.get(int(str(r).split(".")[0]), "#0072b2"), own, -1.0)
        for r, own in low.groupby("r")
    ]
    for label, colour, own, exponent in series:
        if own.empty:
            continue
        left.plot(own["n"], own["gap"], "o", ms=3, color=colour, alpha=0.4)
        mean = np.exp(own.groupby("n")["y"].mean())
        left.plot(mean.index, mean, color=colour, label=label)
        line = mean.iloc[0] * (mean.index / mean.index[0]) ** exponent
        left.plot(mean.index, line, color=colour, lw=0.8, ls=":")
    for n, own in low.groupby("n"):
        mean = np.exp(own.groupby("r")["y"].mean())
        [drawn] = right.plot(mean.index, mean, marker="o", label=f"{n} examples")
        line = mean.iloc[0] * (mean.index / mean.index[0]) ** SHAPES["LoRA over r"]
        right.plot(mean.index, line, color=drawn.get_color(), lw=0.8, ls=":")
    for ax, what in ((left, "training examples n"), (right, "r (α = 2r)")):
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xlabel(what)
        ax.set_ylabel("test loss − training loss")
        ax.legend(fontsize=8)
    note = (
        "Dotted: the slopes of the quoted bounds, from the first point of each curve. A bound of "
        "the right shape runs along its curve. Points: seeds; lines: geometric means."
    )
    return finish(picture, "The generalisation gap and the shape of the quoted bounds", note)
