"""B4: what the start of the factors does to the first product.

Claim: with both factors random, E[(BA)²ᵢⱼ] = rσ⁴ grows with r; A ~ N(0, 1/r) keeps ‖Ax‖ independent
of r; Kaiming's convention is an alternative; a zero factor avoids any perturbation.

Decided by: the lab's own inits. For both random (σ = 1/√width): the slope of ln E[(BA)²ᵢⱼ] on ln r.
For each init of A: the slope of ln E‖Ax‖² on ln r for a fixed x. For every init: ‖BA‖ at the start.

Test: 95 % intervals of the slopes over seeds' means. rσ⁴: the slope's interval lies within
1 ± 0.1. Independent of r: it lies within ±0.1. No perturbation: exactly 0.

Power: 200 draws a cell make the standard error of a mean square below 0.02 of it.

Cost: seconds, no runs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch

from experiments.curves import inside
from lora_lab.claims import Verdict, together
from lora_lab.figures import canvas, finish
from lora_lab.inits import INITS
from lora_lab.stats import Interval, Slope, slope

NAMES = ("kaiming", "normal", "peft_gaussian", "orthogonal", "zero_a", "symmetric")
RANKS = (1, 2, 4, 8, 16, 32, 64)
DRAWS = {"smoke": 8, "paper": 200}
WIDTH = 128


def compute(size: str, seed: int) -> pd.DataFrame:
    """Mean squares for each init and r."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(WIDTH, generator=generator)
    x /= x.norm()
    rows = []
    for name in NAMES:
        for r in RANKS:
            squares = np.zeros(2)
            for _ in range(DRAWS[size]):
                A, B = INITS[name](WIDTH, WIDTH, r, generator)
                product = (B.double() @ A.double()).square().mean()
                squares += [float(product), float((A.to(x) @ x).square().sum())]
            entry, inner = squares / DRAWS[size]
            rows.append({"init": name, "r": r, "entry": entry, "inner": inner})
    return pd.DataFrame(rows)


def _slope(table: pd.DataFrame, init: str, column: str) -> Slope:
    own = table[table["init"] == init]
    return slope(np.log(own["r"]), np.log(own[column]))


def _near(found: Slope, exponent: float, margin: float = 0.1) -> str:
    """Whether an exponent lies within a margin of one that is claimed."""
    interval = Interval(found.slope, found.low, found.high)
    return inside(interval, exponent - margin, exponent + margin)


def verdict(table: pd.DataFrame) -> Verdict:
    """Four parts: growth, independence, the alternative, no perturbation."""
    grows = _slope(table, "symmetric", "entry")
    flat, kaiming = (_slope(table, name, "inner") for name in ("normal", "kaiming"))
    peft = _slope(table, "peft_gaussian", "inner")
    still = table.groupby("init")["entry"].max()
    zeros = [name for name in NAMES if name != "symmetric" and still[name] == 0]
    alone = "supported" if len(zeros) == len(NAMES) - 1 else "refuted"
    parts = [_near(grows, 1.0), _near(flat, 0.0), alone]
    said = (
        f"E[(BA)²] grows as r^{grows.slope:.2f} when both are random; ‖Ax‖² goes as "
        f"r^{flat.slope:.2f} for N(0, 1/r), r^{kaiming.slope:.2f} for Kaiming and "
        f"r^{peft.slope:.2f} for PEFT's gaussian: three conventions, not one; only a zero factor "
        f"({len(zeros)} of {len(NAMES)} inits) leaves the start alone."
    )
    outcome = together(parts)
    seeds = table["seed"].nunique()
    interval = (grows.low, grows.high)
    return Verdict(outcome, said, grows.slope, interval, n_seeds=seeds, effect=grows.slope)


def made(outcome: str, rng: np.random.Generator) -> pd.DataFrame | None:
    """Variances that go with r as the claim says, or do not, or scatter too widely to tell."""
    table = pd.DataFrame([{"init": name, "r": r} for name in NAMES for r in RANKS])
    noise = np.exp(rng.normal(0, 2.0 if outcome == "unresolved" else 0.005, len(table)))
    wrong, both = outcome == "refuted", table["init"] == "symmetric"
    entry = pd.Series(noise) if wrong else table["r"] * noise
    table["entry"] = entry.where(both | wrong, 0.0)
    flat = (table["init"] == "normal") & (outcome in ("supported", "unresolved"))
    table["inner"] = noise * table["r"].where(~flat, 1)
    return table.assign(seed=0)


def figure(table: pd.DataFrame) -> Any:
    """‖Ax‖² and the product's entries over r."""
    picture, [axes] = canvas(9, 4, 1, 2)
    for name in NAMES:
        own = table[table["init"] == name].groupby("r")[["inner", "entry"]].mean()
        for ax, column in zip(axes, own.columns, strict=True):
            if (own[column] > 0).all():
                ax.plot(own.index, own[column], marker="o", label=name)
    for ax, words in zip(axes, ("E‖Ax‖² for ‖x‖ = 1", "E[(BA)²ᵢⱼ]"), strict=True):
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xlabel("r")
        ax.set_title(words, fontsize=10, loc="left")
        ax.legend(fontsize=8)
    note = "Inits that are missing on the right are 0 there: they start at the base."
    return finish(picture, "Three conventions for A", note)
