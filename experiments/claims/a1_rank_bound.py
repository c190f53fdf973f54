"""A1: the rank of a LoRA update is bounded by its factors.

Claim: rank(BA) ≤ min(rank B, rank A) ≤ r, so that a LoRA update never has a rank above r.

Decided by: numerical rank of random factors (full rank, rank-deficient, of sizes from 1e-8 to 1e8,
in three dtypes) and of factors trained by gradient descent, against the ranks of the factors.

Test: exact. One violation refutes.

Power: none is needed for a theorem; 60 products per seed show that the machinery computes it.

Cost: seconds, no runs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch

from lora_lab.claims import Verdict
from lora_lab.figures import canvas, finish
from lora_lab.linalg import Dense, Factored, decompose
from lora_lab.measures import measure

PRODUCTS = {"smoke": 6, "paper": 60}
DTYPES = ("float64", "float32", "bfloat16")


def rank(matrix: Any) -> int:
    """Numerical rank of a matrix."""
    return int(measure("numerical_rank", decompose(Dense(matrix))))


def compute(size: str, seed: int) -> pd.DataFrame:
    """Ranks of products and of their factors."""
    rng = np.random.default_rng(seed)
    found = [_random(rng, DTYPES[i % 3]) for i in range(PRODUCTS[size])]
    found += [_trained(seed, r) for r in (1, 3, 8)]
    return pd.DataFrame(found)


def _random(rng: np.random.Generator, dtype: str) -> dict[str, Any]:
    m, n = rng.integers(8, 64, 2)
    r = int(rng.integers(1, min(m, n) + 1))
    B, A = rng.standard_normal((m, r)), rng.standard_normal((r, n))
    lost = int(rng.integers(0, r))  # make B rank-deficient by so many directions
    B[:, :lost] = B[:, [r - 1]]
    factors = (torch.from_numpy(x * 10.0 ** rng.integers(-8, 9)) for x in (B, A))
    return _row("random", *(x.to(getattr(torch, dtype)) for x in factors))


def _trained(seed: int, r: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    goal = torch.randn(24, 32, generator=generator)
    A = torch.randn(r, 32, generator=generator, requires_grad=True)
    B = torch.zeros(24, r, requires_grad=True)
    steps = torch.optim.AdamW([A, B], lr=0.05)
    for _ in range(100):
        steps.zero_grad()
        ((B @ A - goal) ** 2).mean().backward()
        steps.step()
    return _row("trained", B.detach(), A.detach())


def _row(kind: str, B: torch.Tensor, A: torch.Tensor) -> dict[str, Any]:
    product = int(measure("numerical_rank", decompose(Factored(B, A))))
    return {"kind": kind, "r": len(A), "rank_B": rank(B), "rank_A": rank(A), "rank_BA": product}


def verdict(table: pd.DataFrame) -> Verdict:
    """Count violations."""
    least = table[["rank_B", "rank_A"]].min(axis=1)
    wrong = int(((table["rank_BA"] > least) | (least > table["r"])).sum())
    said = (
        f"Of {len(table)} products {wrong} broke the bound; "
        f"{int((table['rank_BA'] < table['r']).sum())} had a rank below r because a factor had."
    )
    seeds = table["seed"].nunique()
    return Verdict("refuted" if wrong else "supported", said, wrong, n_seeds=seeds, effect=wrong)


def made(outcome: str, rng: np.random.Generator) -> pd.DataFrame | None:
    """One product above the bound refutes."""
    ranks = rng.integers(1, 9, 20)
    above = np.arange(20) == (3 if outcome == "refuted" else -1)
    columns = {"rank_B": ranks, "rank_A": 8, "rank_BA": ranks + above, "seed": 0}
    table = pd.DataFrame({"r": 8, **columns})
    return table if outcome in ("supported", "refuted") else None


def figure(table: pd.DataFrame) -> Any:
    """Rank of the product against the smaller rank of a factor."""
    picture, [[axes]] = canvas(5, 4)
    least = table[["rank_B", "rank_A"]].min(axis=1)
    axes.scatter(least, table["rank_BA"], s=14, alpha=0.6)
    axes.axline((0, 0), slope=1, color="grey", lw=1)
    axes.set_xlabel("smaller rank of the two factors")
    axes.set_ylabel("rank of BA")
    return finish(
        picture, "rank(BA) against the smaller rank of a factor", "No point may lie above."
    )
