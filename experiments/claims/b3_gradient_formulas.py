"""B3: the gradients of the factors.

Claim: ∇_B = s·G·Aᵀ and ∇_A = s·BᵀG with G = ∂L/∂(W0 + dW); given G they do not depend on W0; they
cost O(r(d + k)) a token.

Decided by: the lab's LoRA layer in float64 inside a network with a nonlinear loss, against both
formulas with the G that autograd gives for a dense weight W0 + sBA; two layers of different W0
under the same output gradient; the operations of the factors' backward pass by torch's counter,
over r, and of the formulas taken at their word (G first, then its products).

Test: exact. Formulas: relative error below 1e-12. Independence: the same gradients to 1e-12. Cost:
the counted multiply-adds are r(2d + k) a token, which lies between r(d + k) and 2r(d + k). Three
parts. Measured time is reported, and decides nothing.

Power: none is needed.

Cost: seconds, no runs.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lora_lab.adapters import Place
from lora_lab.adapters.lora import LoRA, LoRALayer
from lora_lab.claims import Verdict, together
from lora_lab.figures import canvas, finish

SHAPES = {"smoke": ((24, 40),), "paper": ((24, 40), (64, 64), (256, 512))}
RANKS = (1, 2, 4, 8, 16)
TOKENS = 512


def compute(size: str, seed: int) -> pd.DataFrame:
    """Errors, operations and times for shapes and ranks."""
    generator = torch.Generator().manual_seed(seed)
    return pd.DataFrame([_row(d, k, r, generator) for d, k in SHAPES[size] for r in RANKS])


def _normal(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _layer(W0: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> LoRALayer:
    d, k = W0.shape
    frozen = nn.Linear(k, d, bias=False).double().requires_grad_(False)
    frozen.weight.data = W0
    place = Place("layer", frozen, torch.Generator())
    return LoRALayer(place, A.clone(), B.clone(), LoRA(r=len(A), alpha=3.0))


def _row(d: int, k: int, r: int, generator: torch.Generator) -> dict[str, float]:
    A, B = _normal(generator, r, k), _normal(generator, d, r)
    W0, other = _normal(generator, d, k), _normal(generator, d, k)
    x, D = _normal(generator, TOKENS, k), _normal(generator, TOKENS, d)
    head = _normal(generator, d, 5)
    layer, twin = _layer(W0, A, B), _layer(other, A, B)
    s = layer.scaled()[2]
    # A loss that sees the weight through a nonlinear network: G depends on W0 and on BA.
    torch.tanh(layer(x) / k).matmul(head).logsumexp(-1).mean().backward()
    dense = (W0 + s * B @ A).requires_grad_()
    torch.tanh(x @ dense.T / k).matmul(head).logsumexp(-1).mean().backward()
    G = dense.grad
    assert G is not None
    errors = {
        "error_B": _error(layer.B.grad, s * G @ A.T),
        "error_A": _error(layer.A.grad, s * B.T @ G),
    }
    layer.zero_grad()
    backward, seconds = _backward(layer, x, D)
    twin(x).backward(D)
    same = max(_error(twin.B.grad, layer.B.grad), _error(twin.A.grad, layer.A.grad))
    return {
        "d": d,
        "k": k,
        "r": r,
        **errors,
        "other_W0": same,
        "multiply_adds": backward / (2 * TOKENS),
        "formula": r * (2 * d + k),
        "through_G": d * k + r * (d * k + d * k) / TOKENS,
        "seconds": seconds,
    }


def _error(found: torch.Tensor | None, right: torch.Tensor | None) -> float:
    assert found is not None
    assert right is not None
    return float((found - right).norm() / right.norm())


def _backward(layer: LoRALayer, x: torch.Tensor, D: torch.Tensor) -> tuple[int, float]:
    """Operations and least time of the backward pass to A and B; their gradients are left."""
    best = float("inf")
    for _ in range(5):
        layer.zero_grad()
        y = layer(x)
        with FlopCounterMode(display=False) as counter:
            y.backward(D)
        layer.zero_grad()
        y = layer(x)
        begin = time.perf_counter()
        y.backward(D)
        best = min(best, time.perf_counter() - begin)
    return int(counter.get_total_flops()), best


def verdict(table: pd.DataFrame) -> Verdict:
    """Formulas, independence of W0, cost."""
    worst = float(table[["error_A", "error_B"]].to_numpy().max())
    same = float(table["other_W0"].max())
    counted = bool((table["multiply_adds"] == table["formula"]).all())
    outcome = together(
        "supported" if ok else "refuted" for ok in (worst < 1e-12, same < 1e-12, counted)
    )
    top = table[table["d"] * table["k"] == (table["d"] * table["k"]).max()]
    low, high = (
        top.loc[top["r"] == r, "seconds"].median() for r in (top["r"].min(), top["r"].max())
    )
    said = (
        f"In {len(table)} layers autograd gives the formulas to {worst:.1g}, and layers of another "
        f"W0 under the same output gradient differ by {same:.1g}; the backward pass to the factors "
        f"costs {'exactly' if counted else 'not'} r(2d + k) multiply-adds a token, a share of "
        f"{(table['formula'] / table['through_G']).min():.2g} to "
        f"{(table['formula'] / table['through_G']).max():.2g} of what forming G first would cost; "
        f"measured, r = {top['r'].max():.0f} takes {high / low:.2g} times as long as "
        f"r = {top['r'].min():.0f} on the largest layer."
    )
    return Verdict(outcome, said, worst, n_seeds=table["seed"].nunique(), effect=worst)


def made(outcome: str, rng: np.random.Generator) -> pd.DataFrame | None:
    """Gradients that agree or not, at a cost that is counted right or not."""
    if outcome == "unresolved":
        return None
    wrong = outcome == "refuted"
    table = pd.DataFrame({"d": 8, "k": 16, "r": [1, 2, 4, 8], "through_G": 128, "seed": 0})
    for name in ("error_A", "error_B", "other_W0"):
        table[name] = rng.uniform(1e-16, 1e-14, 4) * (1e13 if wrong else 1)
    table["formula"] = 32 * table["r"]
    table["multiply_adds"] = table["formula"] + (outcome != "supported")
    return table.assign(seconds=1e-4)


def figure(table: pd.DataFrame) -> Any:
    """Counted and measured cost over r."""
    picture, [[left, right]] = canvas(9.5, 4, 1, 2)
    for (d, k), own in table.groupby(["d", "k"]):
        mean = own.groupby("r")[["multiply_adds", "through_G", "seconds"]].median()
        [line] = left.plot(mean.index, mean["multiply_adds"], marker="o", label=f"{d} × {k}")
        left.plot(mean.index, mean["through_G"], color=line.get_color(), ls="--", lw=1)
        right.plot(mean.index, 1e3 * mean["seconds"], marker="o", label=f"{d} × {k}")
    left.set_ylabel("multiply-adds a token")
    right.set_ylabel(f"milliseconds for {TOKENS} tokens")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("r")
        axes.legend(fontsize=8)
    note = (
        "Left: dots are counted, backward to A and B; dashed: the formulas at their word, which "
        "form G first. Right: measured time; a narrow layer spends it on calls, not on products."
    )
    return finish(picture, "What the gradients of the factors cost", note)
