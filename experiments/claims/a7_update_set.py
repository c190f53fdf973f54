"""A7: what set of updates LoRA searches.

Claim: LoRA searches "a restricted linear subspace" of the weights; another text: a manifold M_r,
with r(m + n) parameters.

Decided by: sums of two updates of rank r (a linear space would hold them), the rank of the Jacobian
of (B, A) → BA at random factors (the dimension of the set), and pairs (BM, M⁻¹A) for random
invertible M (whether parameters and updates correspond one to one).

Test: exact. The linear subspace is refuted by one sum that leaves the set; the manifold's dimension
is decided against r(m + n) and r(m + n − r).

Power: none is needed.

Cost: seconds, no runs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from lora_lab.claims import Verdict
from lora_lab.figures import canvas, finish
from lora_lab.linalg import Dense, Factored, decompose
from lora_lab.measures import measure

TRIALS = {"smoke": 4, "paper": 20}


def compute(size: str, seed: int) -> pd.DataFrame:
    """Ranks of sums, dimensions and reparametrisations for random shapes."""
    rng = np.random.default_rng(seed)
    return pd.DataFrame([_row(rng) for _ in range(TRIALS[size])])


def _row(rng: np.random.Generator) -> dict[str, float]:
    m, n = (int(x) for x in rng.integers(6, 14, 2))
    r = int(rng.integers(1, min(m, n) // 2 + 1))
    B, A, C, D = (rng.standard_normal(s) for s in ((m, r), (r, n), (m, r), (r, n)))
    both = Factored(np.hstack([B, C]), np.vstack([A, D]))
    # d(BA) = dB·A + B·dA, column by column of vec(B) and vec(A).
    jacobian = np.hstack([np.kron(np.eye(m), A.T), np.kron(B, np.eye(n))])
    M = rng.standard_normal((r, r))
    same = float(np.linalg.norm(B @ M @ np.linalg.solve(M, A) - B @ A) / np.linalg.norm(B @ A))
    return {
        "m": m,
        "n": n,
        "r": r,
        "rank_of_sum": measure("numerical_rank", decompose(both)),
        "dimension": measure("numerical_rank", decompose(Dense(jacobian))),
        "parameters": r * (m + n),
        "manifold": r * (m + n - r),
        "same_update": same,
    }


def verdict(table: pd.DataFrame) -> Verdict:
    """Linear space, dimension, uniqueness."""
    leaves = table["rank_of_sum"] > table["r"]
    manifold = (table["dimension"] == table["manifold"]).all()
    overcount = (table["parameters"] - table["dimension"]).mean()
    outcome = "mixed" if leaves.any() and manifold else "refuted" if leaves.any() else "supported"
    said = (
        f"No linear subspace: {int(leaves.sum())} of {len(table)} sums of two updates have a rank "
        f"above r (the median is {(table['rank_of_sum'] / table['r']).median():.2g} r). A manifold "
        f"of dimension r(m + n − r): {'yes' if manifold else 'no'}, so r(m + n) counts "
        f"{overcount:.3g} too many on average; (BM, M⁻¹A) gives the same update to "
        f"{table['same_update'].max():.0e}."
    )
    share = float(leaves.mean())
    return Verdict(outcome, said, share, n_seeds=table["seed"].nunique(), effect=float(overcount))


def made(outcome: str, rng: np.random.Generator) -> pd.DataFrame | None:
    """A linear space is closed under sums; a set that is neither space nor manifold refutes."""
    if outcome == "unresolved":
        return None
    r = rng.integers(1, 4, 20)
    table = pd.DataFrame({"m": 9, "n": 8, "r": r, "parameters": 17 * r, "manifold": 17 * r - r**2})
    table["rank_of_sum"] = table["r"] * (1 if outcome == "supported" else 2)
    dimension = table["parameters" if outcome == "refuted" else "manifold"]
    return table.assign(dimension=dimension, same_update=1e-15, seed=0)


def figure(table: pd.DataFrame) -> Any:
    """Dimension of the set against both formulas."""
    picture, [[axes]] = canvas(5, 4)
    axes.plot(table["manifold"], table["dimension"], "o", label="r(m + n − r)", alpha=0.6)
    axes.plot(table["parameters"], table["dimension"], "x", label="r(m + n)", alpha=0.6)
    axes.axline((0, 0), slope=1, color="grey", lw=1)
    axes.set_xlabel("formula")
    axes.set_ylabel("rank of the Jacobian of (B, A) → BA")
    axes.legend()
    return finish(
        picture, "Dimension of the updates of rank r", "On the line: the formula is right."
    )
