"""E1: what gradient descent on factors prefers.

Claim: gradient descent on BA from a small start finds a solution of low nuclear norm in matrix
sensing, without any penalty.

Decided by: 20 × 20 matrices of rank 2 seen through random Gaussian measurements, 240 of them (more
than three times the 76 degrees of freedom) or 60 (fewer: many matrices fit). B and A are square, so
that no rank is imposed, and start at entries N(0, s²/20) with s from 0.001 to 1. The nuclear norm
of what plain gradient descent converges to, over that of the convex solution (least nuclear norm
among the matrices that fit, by Douglas-Rachford splitting), and the effective ranks of both.

Test: 95 % t intervals over seeds. With many and with few measurements (a part each): ln of the
ratio of the nuclear norms at the smallest start lies within ±0.05. A small start is what does it:
the slope of that logarithm on ln s (seeds as blocks, few measurements) lies above 0.

Power: differences between seeds of .03 leave an interval of ±.04 with 5 seeds; where many
measurements fix the matrix, both solutions are the planted one and seeds hardly differ.

Cost: about two minutes, no runs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from experiments.curves import inside, seeds_to_tell, spread
from lora_lab.claims import Verdict, against, together
from lora_lab.figures import canvas, finish
from lora_lab.linalg import Dense, decompose
from lora_lab.linalg.factored import Array
from lora_lab.measures import measure
from lora_lab.registry import WrongInput
from lora_lab.stats import Interval, blocked_slope

N, TRUE_R, MARGIN = 20, 2, 0.05
MEASUREMENTS = {"many": 240, "few": 60}
STARTS = {"smoke": (1e-1, 1.0), "paper": (1e-3, 1e-2, 1e-1, 1.0)}
STEPS = {"smoke": 300, "paper": 60_000}


def compute(size: str, seed: int) -> pd.DataFrame:
    """Nuclear norms and effective ranks of both solutions, over measurements and starts."""
    rng = np.random.default_rng(seed)
    truth = rng.standard_normal((N, TRUE_R)) @ rng.standard_normal((TRUE_R, N))
    truth /= np.linalg.norm(truth, 2)
    rows = []
    for regime, count in MEASUREMENTS.items():
        sensing = rng.standard_normal((count, N * N)) / np.sqrt(count)
        seen = sensing @ truth.ravel()
        convex = _convex(sensing, seen, STEPS[size] // 10)
        start = rng.standard_normal((2, N, N)) / np.sqrt(N)
        for s in STARTS[size]:
            found = _descended(sensing, seen, s * start, STEPS[size])
            rows.append(
                {
                    "regime": regime,
                    "start": s,
                    "residual": float(np.linalg.norm(sensing @ found.ravel() - seen))
                    / float(np.linalg.norm(seen)),
                    "nuclear": float(np.linalg.norm(found, "nuc")),
                    "convex_nuclear": float(np.linalg.norm(convex, "nuc")),
                    "effective_rank": _effective(found),
                    "convex_effective_rank": _effective(convex),
                    "error": float(np.linalg.norm(found - truth) / np.linalg.norm(truth)),
                    "convex_error": float(np.linalg.norm(convex - truth) / np.linalg.norm(truth)),
                }
            )
    return pd.DataFrame(rows)


def _effective(matrix: Array) -> float:
    return float(measure("effective_rank", decompose(Dense(matrix))))


def _convex(sensing: Array, seen: Array, steps: int) -> Array:
    """The matrix of least nuclear norm that fits; what is returned fits exactly."""
    back = np.linalg.pinv(sensing)
    Z = np.zeros(N * N)
    for _ in range(steps):
        X = Z - back @ (sensing @ Z - seen)
        U, sigma, Vh = np.linalg.svd((2 * X - Z).reshape(N, N))
        Z += ((U * np.maximum(sigma - 0.1, 0)) @ Vh).ravel() - X
    return (Z - back @ (sensing @ Z - seen)).reshape(N, N)


def _descended(sensing: Array, seen: Array, start: Array, steps: int) -> Array:
    """BA after plain gradient descent on half the squared residual, to a residual of 1e-6."""
    B, A = start[0].copy(), start[1].copy()
    rate = 0.2 / np.linalg.norm(sensing, 2) ** 2
    least = 1e-6 * np.linalg.norm(seen)
    for _ in range(steps):
        residual = sensing @ (B @ A).ravel() - seen
        if np.linalg.norm(residual) < least:
            break
        G = (residual @ sensing).reshape(N, N)
        B, A = B - rate * G @ A.T, A - rate * B.T @ G
    return B @ A


def _excess(table: pd.DataFrame, regime: str) -> pd.DataFrame:
    """ln of the ratio of the nuclear norms of one regime, with seed and start."""
    own = table[table["regime"] == regime]
    return own.assign(excess=np.log(own["nuclear"] / own["convex_nuclear"]))


def verdict(table: pd.DataFrame) -> Verdict:
    """As low as the convex solution with many and with few measurements; by a small start."""
    least = table["start"].min()
    ends = {}
    for regime in MEASUREMENTS:
        own = _excess(table, regime)
        ends[regime] = own[own["start"] == least]
    found = {regime: spread(own["excess"]) for regime, own in ends.items()}
    few = _excess(table, "few")
    try:
        line = blocked_slope(np.log(few["start"]), few["excess"], list(few["seed"]))
        slope = Interval(line.slope, line.low, line.high)
    except WrongInput:  # one seed at two starts leaves no degree of freedom
        slope = Interval(np.nan, np.nan, np.nan)
    parts = [inside(found[regime], -MARGIN, MARGIN) for regime in MEASUREMENTS]
    outcome = together([*parts, against(slope, 0.0)])
    clauses = []
    for regime, end in ends.items():
        ratio = np.exp(found[regime])
        clauses.append(
            f"with {MEASUREMENTS[regime]} measurements gradient descent from a start of {least:g} "
            f"ends at {ratio[0]:.3f} [{ratio[1]:.3f}, {ratio[2]:.3f}] times the least nuclear "
            f"norm, at an effective rank of {end['effective_rank'].mean():.2g} (convex: "
            f"{end['convex_effective_rank'].mean():.2g})"
        )
    said, fits = "; ".join(clauses), int((table["residual"] < 1e-3).sum())
    said = (
        said[0].upper()
        + said[1:]
        + (
            f"; with few measurements the ratio grows as start^{slope.value:.2f} [{slope.low:.2f}, "
            f"{slope.high:.2f}]; {fits} of {len(table)} descents fit"
        )
    )
    if outcome == "unresolved":
        said += f"; {seeds_to_tell(ends['few']['excess'], MARGIN)}"
    end = found["few"]
    seeds = table["seed"].nunique()
    return Verdict(outcome, said + ".", end.value, end[1:], n_seeds=seeds, effect=end.value)


def made(outcome: str, rng: np.random.Generator) -> pd.DataFrame:
    """Nuclear norms at the least and growing with the start; far above it; or scattered."""
    table = pd.DataFrame(
        [
            {"regime": regime, "start": s, "seed": seed}
            for regime in MEASUREMENTS
            for s in STARTS["paper"]
            for seed in range(5)
        ]
    )
    size = np.log10(table["start"]) + 3
    excess = {
        "supported": 0.2 * size,
        "refuted": 0.5 - 0.05 * size,
        "mixed": 0.2 * size + 0.3 * (table["regime"] == "few"),
        "unresolved": 0.0 * size,
    }[outcome]
    scatter = 0.4 if outcome == "unresolved" else 0.005
    table["nuclear"] = 2 * np.exp(excess + scatter * rng.standard_normal(len(table)))
    return table.assign(
        convex_nuclear=2.0, effective_rank=2.0, convex_effective_rank=2.0, residual=1e-6
    )


def figure(table: pd.DataFrame) -> Any:
    """Nuclear norm over the least one, and effective rank, over the start."""
    picture, [[left, right]] = canvas(9.5, 4, 1, 2)
    for regime, colour in (("many", "#0072b2"), ("few", "#d55e00")):
        own = _excess(table, regime)
        label = f"{MEASUREMENTS[regime]} measurements"
        left.plot(own["start"], np.exp(own["excess"]), "o", ms=3, color=colour, alpha=0.6)
        mean = own.groupby("start")[["excess", "effective_rank", "convex_effective_rank"]].mean()
        left.plot(mean.index, np.exp(mean["excess"]), color=colour, label=label)
        right.plot(own["start"], own["effective_rank"], "o", ms=3, color=colour, alpha=0.6)
        right.plot(mean.index, mean["effective_rank"], color=colour, label=label)
        right.plot(mean.index, mean["convex_effective_rank"], color=colour, ls="--")
    left.axhline(1, color="grey", lw=1)
    left.set_ylabel("nuclear norm over the least that fits")
    right.set_ylabel("effective rank (dashed: convex solution)")
    for ax in (left, right):
        ax.set_xscale("log")
        ax.set_xlabel("size s of the start of B and A")
        ax.legend(fontsize=8)
    note = (
        "Left: on the grey line gradient descent finds the least nuclear norm. Right: below its "
        "dashed line it finds a lower rank than the convex solution. Points: seeds."
    )
    return finish(picture, "What gradient descent on BA prefers", note)
