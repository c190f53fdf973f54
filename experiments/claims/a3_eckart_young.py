"""A3: the truncated SVD is the best approximation of a rank.

Claim: the truncated SVD is the best rank-r approximation, with Frobenius error √Σ_{i>r} σᵢ²; one
text gives Σ_{i>r} σᵢ as that error.

Decided by: generated matrices of different spectra, each truncated at several r; its error against
both formulas, and against competitors of the same rank: random subspaces, a column sample, and
factors trained by alternating least squares from a random start.

Test: exact. The first part is refuted by one competitor that is better beyond rounding or one error
off its formula; the erratum is refuted where the sum of singular values differs from the error.

Power: none is needed; 1,000 matrices at the size paper (200 a seed).

Cost: half a minute, no runs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from lora_lab.claims import Verdict
from lora_lab.figures import canvas, finish
from lora_lab.linalg import Dense, decompose

MATRICES = {"smoke": 10, "paper": 200}


def compute(size: str, seed: int) -> pd.DataFrame:
    """Errors of the truncated SVD and of its competitors."""
    rng = np.random.default_rng(seed)
    return pd.DataFrame([_row(rng) for _ in range(MATRICES[size])])


def _row(rng: np.random.Generator) -> dict[str, float]:
    m, n = rng.integers(12, 48, 2)
    q = min(m, n)
    r = int(rng.integers(1, q))
    U, V = (np.linalg.qr(rng.standard_normal((d, q)))[0] for d in (m, n))
    W = (U * np.arange(1, q + 1) ** -rng.uniform(0, 2)) @ V.T
    s = decompose(Dense(W), vectors=True)
    error = np.linalg.norm(W - s.truncate(r).dense())
    return {
        "r": r,
        "q": q,
        "error": error,
        "root_of_squares": float(np.sqrt((s.values[r:] ** 2).sum())),
        "sum": float(s.values[r:].sum()),
        "random": _projected(W, rng.standard_normal((m, r))),
        "columns": _projected(W, W[:, rng.choice(n, r, replace=False)]),
        "trained": _alternating(W, rng.standard_normal((m, r))),
    }


def _projected(W: np.ndarray, basis: np.ndarray) -> float:
    Q = np.linalg.qr(basis)[0]
    return float(np.linalg.norm(W - Q @ (Q.T @ W)))


def _alternating(W: np.ndarray, B: np.ndarray) -> float:
    for _ in range(300):
        A = np.linalg.lstsq(B, W, rcond=None)[0]
        B = np.linalg.lstsq(A.T, W.T, rcond=None)[0].T
    return float(np.linalg.norm(W - B @ A))


def verdict(table: pd.DataFrame) -> Verdict:
    """Two exact statements."""
    slack = 1e-9 * table["error"]
    formula = (table["error"] - table["root_of_squares"]).abs() <= slack + 1e-12
    rivals = table[["random", "columns", "trained"]].min(axis=1)
    better = rivals < table["error"] - slack
    over = table["sum"] / table["error"]
    off = over > 1 + 1e-9
    holds = bool(formula.all() and not better.any())
    outcome = "mixed" if holds and off.any() else "supported" if holds else "refuted"
    said = (
        f"In {len(table)} matrices the truncated SVD's error is the root of the sum of squares "
        f"({int(formula.sum())} times) and {int(better.sum())} competitors were better; the plain "
        f"sum of singular values is the nuclear error, {over.median():.2g} times the Frobenius "
        f"error in the median, and equals it in {int((~off).sum())} cases."
    )
    best = float((rivals / table["error"]).min())
    seeds = table["seed"].nunique()
    return Verdict(outcome, said, best, n_seeds=seeds, effect=float(over.median()))


def made(outcome: str, rng: np.random.Generator) -> pd.DataFrame | None:
    """The truncated SVD is never beaten; whether Σσ is the Frobenius error is the other part."""
    error = rng.uniform(1, 2, 20)
    table = pd.DataFrame({"error": error, "root_of_squares": error, "seed": 0})
    for name in ("random", "columns", "trained"):
        table[name] = error * (0.9 if outcome == "refuted" else 1.1)
    table["sum"] = error * (1 if outcome == "supported" else 3)
    return None if outcome == "unresolved" else table


def figure(table: pd.DataFrame) -> Any:
    """Competitors' errors over the truncated SVD's."""
    picture, [[axes]] = canvas(5.5, 4)
    names = ["trained", "columns", "random", "sum"]
    axes.boxplot([table[n] / table["error"] for n in names], tick_labels=names, showfliers=False)
    axes.axhline(1, color="grey", lw=1)
    axes.set_yscale("log")
    axes.set_ylabel("over the error of the truncated SVD")
    note = (
        "trained: alternating least squares; columns, random: projections on subspaces of that "
        "dimension; sum: the formula Σσ that one text gives for the Frobenius error."
    )
    return finish(picture, "Nothing of the same rank comes closer", note)
