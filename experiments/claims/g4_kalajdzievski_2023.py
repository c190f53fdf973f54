"""G4: rsLoRA.

Claim: Kalajdzievski 2023: with s = α/r the gradient collapses as r grows, with s = α/√r it is
stable.

Decided by: the gradient norm of all factors (before clipping) at the first step and over training
(mean of ln over all traced steps), at one fixed learning rate and α = 16, over r = 1 to 64 on the
digits transformer and r = 1, 8, 64 (α/r: also between) on MiniLM. The quantity is the slope of
ln‖∇‖ on ln r of each seed.

Test: 95 % t intervals of the seeds' slopes, on each ground and for each moment. Collapse: the
interval for α/r lies below −0.1; refuted above it. Stable: the interval for α/√r lies within ±0.1;
refuted where it lies wholly outside. Beside them, deciding nothing: the slope over training of
‖∇‖/‖G‖, G the gradient of W0 + dW, which leaves out how far each r has fitted the data by then.

Power: with A's entries independent of r, ‖∇‖ goes as s√r at the first step: slopes of −0.5 and 0,
which spread by about 0.03 over seeds; intervals of five have 0.04 to each side. Over training the
spread is perhaps 0.06, and an interval has 0.08.

Cost: 65 runs of a second on digits, 35 of them the shared grid's, and 45 on MiniLM, 35 shared.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pandas as pd

from experiments.curves import inside, slopes
from experiments.grids import DIGITS, MINILM, RANKS, SEEDS
from lora_lab.claims import Found, Verdict, together
from lora_lab.figures import canvas, finish
from lora_lab.registry import WrongInput
from lora_lab.stats import Interval, t_interval, units_needed

RATE = {DIGITS: "3e-3", MINILM: "1e-3"}
ROOT = "adapter.alpha=16 adapter.scaling=rslora"
TINY = "model=planted data=planted size=smoke adapter=lora"


def _line(ground: str, ranks: str, more: str) -> str:
    return f"{ground} adapter=lora adapter.r={ranks} train.lr={RATE[ground]} {SEEDS} {more}"


SWEEP = {
    "smoke": [f"{TINY} adapter.r=1,2,4 adapter.alpha=16"],
    "paper": [
        _line(DIGITS, RANKS, "adapter.alpha=16"),
        # At r = 1 both rules are the same run.
        _line(DIGITS, RANKS.removeprefix("1,"), ROOT),
        _line(MINILM, RANKS, "adapter.alpha=16"),
        _line(MINILM, "8,64", ROOT),
    ],
}
RULES = {"alpha_over_r": "α/r", "rslora": "α/√r"}
MOMENTS = {"first": "at the first step", "training": "over training"}
MARGIN = 0.1


def rows(found: Found) -> pd.DataFrame:
    """One row a run and rule: ln of the gradient norm at the first step and over training."""
    traces = found.traces.assign(square=found.traces["value"] ** 2)
    factors = _ln(traces[traces["trace"].isin(("grad_norm_A", "grad_norm_B"))])
    ratio = factors - _ln(traces[traces["trace"] == "grad_norm"])
    kinds = {
        "first": factors.groupby("run_id").first(),
        "training": factors.groupby("run_id").mean(),
        "ratio": ratio.groupby("run_id").mean(),
    }
    table = pd.DataFrame(kinds).reset_index()
    names = {"model": "ground", "adapter.r": "r", "adapter.scaling": "scaling"}
    names |= {"train.lr": "lr", "seed": "seed", "score": "score"}
    runs = found.runs.set_index("run_id")[list(names)].rename(columns=names)
    table = table.join(runs, on="run_id")
    table["rule"] = table["scaling"].map(RULES)
    shared = table[(table["r"] == 1) & (table["rule"] == "α/r")].assign(rule="α/√r")
    return pd.concat([table, shared], ignore_index=True)


def _ln(traces: pd.DataFrame) -> pd.Series:
    """ln of the norm over all layers, by run and step; steps at which it is 0 are left out."""
    squares = traces.groupby(["run_id", "step"])["square"].sum().sort_index()
    return 0.5 * np.log(squares[squares > 0])


def _exponent(own: pd.DataFrame, moment: str) -> tuple[Interval, float, int]:
    """Mean slope over seeds with its interval, their spread, and how many there are."""
    found = slopes(own.assign(x=np.log(own["r"])), "x", moment)
    return t_interval(found), float(found.std()), len(found)


def verdict(table: pd.DataFrame) -> Verdict:
    """Collapse of α/r and stability of α/√r, on each ground."""
    parts, words, needed, seeds = [], [], 0, 0
    first: dict[str, Interval] = {}
    for ground in sorted(table["ground"].unique()):
        for rule, moment in itertools.product(RULES.values(), MOMENTS):
            own = table[(table["ground"] == ground) & (table["rule"] == rule)]
            found, spread, n = _exponent(own, moment)
            if n < 2:
                continue
            falls = rule == "α/r"
            outcome = inside(found, *((-math.inf, -MARGIN) if falls else (-MARGIN, MARGIN)))
            parts.append(outcome)
            seeds = max(seeds, n)
            first.setdefault(rule, found)
            words.append(
                f"r^{found.value:.2f} [{found.low:.2f}, {found.high:.2f}] under {rule} "
                f"{MOMENTS[moment]} on {ground}"
            )
            if outcome == "unresolved":
                needed = max(needed, _needed(found.value, spread))
    if not parts:
        said = "Exponents need three values of r and two seeds for each rule."
        return Verdict("unresolved", said, n_seeds=int(table["seed"].nunique()))
    outcome = together(parts)
    said = (
        f"{parts.count('supported')} of {len(parts)} inequalities hold; ‖∇‖ goes as "
        + ", ".join(words)
    )
    said += f"; to decide the rest takes about {needed} seeds" if outcome == "unresolved" else ""
    said += _relative(table)
    shown = first.get("α/r", next(iter(first.values())))
    ends = (shown.low, shown.high)
    return Verdict(outcome, said, shown.value, ends, n_seeds=seeds, effect=shown.value)


def _relative(table: pd.DataFrame) -> str:
    """Exponents of ‖∇‖/‖G‖, in words."""
    words = [
        f"r^{_exponent(own, 'ratio')[0].value:.2f} under {rule} on {ground}"
        for (ground, rule), own in table.groupby(["ground", "rule"])
    ]
    return f"; ‖∇‖/‖G‖ over training goes as {', '.join(words)}."


def _needed(exponent: float, spread: float, most: int = 10_000) -> int:
    """Seeds that would tell an exponent from the margin."""
    gap = max(abs(abs(exponent) - MARGIN), MARGIN / 4)
    try:
        return units_needed(gap, max(spread, 1e-9), most=most)
    except WrongInput:
        return most


def made(outcome: str, rng: np.random.Generator) -> pd.DataFrame | None:
    """Gradients that go with powers of r as the paper says, or not."""
    cells = itertools.product(RULES.values(), (1, 4, 16, 64), range(5))
    table = pd.DataFrame(cells, columns=["rule", "r", "seed"]).assign(ground="digits_vit")
    right = outcome in ("supported", "unresolved")
    powers = {
        "α/r": -0.5 if right or outcome == "mixed" else 0.3,
        "α/√r": 0.0 if right else 0.5,
    }
    exponent = table["rule"].map(powers)
    if outcome == "unresolved":
        exponent = exponent + 0.5 * (table["seed"] - 2)
    for moment in MOMENTS:
        noise = 0.01 * rng.standard_normal(len(table))
        table[moment] = exponent * np.log(table["r"]) + noise
    return table.assign(score=0.8, lr=3e-3, ratio=table["first"])


def figure(table: pd.DataFrame) -> Any:
    """Gradient norm over r under both rules."""
    grounds = sorted(table["ground"].unique())
    picture, axes = canvas(9.5, 3.6 * len(grounds), len(grounds), 2, sharex=True)
    for line, ground in zip(axes, grounds, strict=True):
        for ax, moment in zip(line, MOMENTS, strict=True):
            for i, rule in enumerate(RULES.values()):
                own = table[(table["ground"] == ground) & (table["rule"] == rule)]
                own = own.dropna(subset=[moment])
                over = np.exp(own.groupby("r")[moment].mean())
                ax.plot(over.index, over, color=f"C{i}", label=rule)
                ax.plot(own["r"], np.exp(own[moment]), "o", ms=4, alpha=0.5, color=f"C{i}")
            ax.set_xscale("log", base=2)
            ax.set_yscale("log")
            ax.set_title(f"{MOMENTS[moment]}, {ground}", fontsize=10, loc="left")
            ax.set_xlabel("r")
            ax.set_ylabel("‖∇‖ of all factors")
            ax.legend(fontsize=8)
    note = (
        "Dots: seeds, at one learning rate and α = 16. A level line is stable; a falling one "
        "collapses."
    )
    return finish(picture, "rsLoRA: gradient over r under two scaling rules", note)
