"""D3: r and the amount of data.

Claim: with little data low ranks generalise better; with more data high ranks pay. Another text
says the opposite: r ≥ 32 in low-data settings.

Decided by: test score of r = 2 and r = 32 (α = 2r, best rate each) over training examples, at about
equal steps: digits with 32 and 508 images, another split a seed, and planted problems whose update
has rank 16 and whose noise is three times the signal, with 128 and 4,096 examples, another problem
a seed.

Test: for each ground, 95 % t intervals over seeds of score(r = 32) − score(r = 2): below 0 with the
least data, above 0 with the most, and of the change between them (interaction) above 0. The
opposite text is right where the first is above 0.

Power: at a spread of .012 between paired seeds, 5 seeds show a difference of .02 with a chance of
.8.

Cost: 60 runs on digits and 60 on planted, a second each.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from experiments.grids import CELL, DIGITS, PLANTED, SEEDS, best
from lora_lab.claims import Found, Verdict, against, together
from lora_lab.figures import canvas, finish
from lora_lab.registry import WrongInput
from lora_lab.stats import paired, t_interval, units_needed

LOW, HIGH = 2, 32
_TEN = "train.epochs=10"
DIGITS_STEPS = {32: 160, 508: 10}
"""Images, and the epochs in which they are 160 steps."""
PLANTED_STEPS = {128: 64, 4096: 2}
"""Planted examples, and the epochs in which they are 256 steps."""
_RATES = {128: "3e-4,1e-3,3e-3", 4096: "1e-3,3e-3,1e-2"}

_DIGITS = [
    f"{DIGITS.replace(_TEN, f'train.epochs={epochs}')} data.train_examples={n} "
    f"data.seed=${{seed}} adapter=lora adapter.r={LOW},{HIGH} train.lr=1e-3,3e-3,1e-2 {SEEDS}"
    for n, epochs in DIGITS_STEPS.items()
]
_PLANTED = [
    f"{PLANTED} data.width=64 data.true_r=16 data.noise=3 data.train_examples={n} "
    f"data.seed=${{seed}} train.epochs={epochs} adapter=lora adapter.r={LOW},{HIGH} "
    f"train.lr={_RATES[n]} {SEEDS}"
    for n, epochs in PLANTED_STEPS.items()
]
SWEEP = {
    "smoke": [
        "model=planted data=planted size=smoke adapter=lora adapter.r=2,32 "
        "data.train_examples=32,64"
    ],
    "paper": [*_DIGITS, *_PLANTED],
}


def rows(found: Found) -> pd.DataFrame:
    """Scores at the best rates, by size of the training set."""
    own = best(found.runs, (*CELL, "data.train_examples"))
    names = {"data.train_examples": "n", "adapter.r": "r", "train.lr": "lr"}
    own = own.rename(columns=names)
    return own[["run_id", "model", "n", "r", "seed", "score", "lr", "edge"]]


def _gain(own: pd.DataFrame) -> pd.DataFrame:
    """score(r = 32) − score(r = 2): a row for each seed, a column for each size."""
    by = own.pivot_table(index="seed", columns=["n", "r"], values="score")
    sizes = [n for n in by.columns.unique("n") if {LOW, HIGH} <= set(by[n])]
    return pd.DataFrame({n: by[n][HIGH] - by[n][LOW] for n in sizes})


def verdict(table: pd.DataFrame) -> Verdict:
    """Three statements on each ground."""
    parts, clauses, changes = [], [], []
    for model, own in table.groupby("model"):
        gain = _gain(own)
        if gain.shape[1] < 2:
            parts.append("unresolved")
            continue
        few, many = gain.columns.min(), gain.columns.max()
        change = (gain[many] - gain[few]).dropna()
        changes.append(change)
        low, high, more = (t_interval(one.dropna()) for one in (gain[few], gain[many], change))
        parts += [against(low, 0.0, more=False), against(high, 0.0), against(more, 0.0)]
        words = [
            f"{100 * found.value:+.1f} [{100 * found.low:.1f}, {100 * found.high:.1f}]"
            for found in (low, high, more)
        ]
        clauses.append(
            f"on {model} r = {HIGH} over r = {LOW} gains {words[0]} points with {few:g} examples "
            f"and {words[1]} with {many:g}, a change of {words[2]}"
        )
    outcome = together(parts)
    said = "; ".join(clauses) or "No ground has two sizes of training set with both r"
    said = said[0].upper() + said[1:]
    edges = table.loc[table["edge"].astype(bool), ["model", "n", "r"]].drop_duplicates()
    said += f"; {len(edges)} best rates lie at the edge of their grid" * bool(len(edges))
    change = min(changes, key=lambda one: abs(one.mean()), default=pd.Series(dtype=float))
    if outcome == "unresolved":
        said += f"; {_needed(changes)}"
    found, seeds = t_interval(change), table["seed"].nunique()
    p = paired(change).p if len(change) else np.nan
    return Verdict(outcome, said + ".", found.value, found[1:], p, seeds, found.value)


def _needed(changes: list[pd.Series]) -> str:
    spread = max((float(one.std()) for one in changes if len(one) > 1), default=0.0)
    if not spread > 0:
        return "a spread needs at least 2 seeds"
    try:
        return f"{units_needed(0.02, spread)} seeds would show a change of .02"
    except WrongInput as error:
        return str(error).rstrip(".")


def made(outcome: str, rng: np.random.Generator) -> pd.DataFrame | None:
    """High r helps the more the more data there are, the less, only ever, or nobody can tell."""
    gains = {
        "supported": (-0.05, 0.05),
        "refuted": (0.05, -0.05),
        "mixed": (0.05, 0.1),
        "unresolved": (0.0, 0.0),
    }[outcome]
    scatter = 0.05 if outcome == "unresolved" else 0.003
    sizes = {"digits_vit": tuple(DIGITS_STEPS), "planted": tuple(PLANTED_STEPS)}
    return pd.DataFrame(
        [
            {"model": model, "n": n, "r": r, "seed": seed}
            | {"score": 0.7 + gain * (r == HIGH) + scatter * rng.standard_normal()}
            for model, ns in sizes.items()
            for n, gain in zip(ns, gains, strict=True)
            for r in (LOW, HIGH)
            for seed in range(5)
        ]
    ).assign(lr=1e-2, edge=False)


def figure(table: pd.DataFrame) -> Any:
    """What r = 32 gains over r = 2, over the size of the training set."""
    grounds = list(table.groupby("model"))
    picture, axes = canvas(5 * len(grounds), 4, 1, len(grounds))
    for ax, (model, own) in zip(axes[0], grounds, strict=True):
        gain = _gain(own)
        found = [t_interval(gain[n].dropna()) for n in gain]
        spread = np.nan_to_num([[f.value - f.low, f.high - f.value] for f in found])
        spread = spread.reshape(-1, 2).T
        ax.errorbar(gain.columns, [f.value for f in found], spread, marker="o", color="#0072b2")
        for n in gain:
            ax.scatter([1.06 * float(str(n))] * len(gain), gain[n], s=8, color="#999999")
        ax.axhline(0, color="grey", lw=1)
        ax.set_xscale("log")
        ax.set_xticks(list(gain.columns), [f"{n:,.0f}" for n in gain])
        ax.set_xlabel("training examples")
        ax.set_ylabel(f"score at r = {HIGH} − at r = {LOW}")
        ax.set_title(model, fontsize=10, loc="left")
    note = (
        "Below 0 on the left and above it on the right is what the claim says. Bars: 95 % t "
        "intervals over seeds; grey points: seeds."
    )
    return finish(picture, "Whether more data ask for a higher r", note)
