"""A4: the update need not be formed to be used.

Claim: (W0 + sBA)x = W0x + sB(Ax), and the path through the factors costs (d + k)r multiply-adds a
token instead of dk.

Decided by: both sides in float64 for random layers of the lab's own LoRA; the operations that
torch's counter counts in the two thin products; and measured times of
both paths at one size.

Test: exact for the equality (relative error below 1e-12) and the count. The time is reported, and
decides nothing: on a narrow layer thin products do not reach the speed of a wide one.

Power: none is needed.

Cost: seconds, no runs.
"""

from __future__ import annotations

import timeit
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lora_lab.adapters import Place
from lora_lab.adapters.lora import LoRA, LoRALayer
from lora_lab.claims import Verdict
from lora_lab.figures import canvas, finish

WIDTHS = {"smoke": (48,), "paper": (64, 256, 768)}
RANKS = (1, 4, 16, 32)
TOKENS = 512


def compute(size: str, seed: int) -> pd.DataFrame:
    """Error, operations and times for widths and ranks."""
    generator = torch.Generator().manual_seed(seed)
    return pd.DataFrame([_row(d, r, generator) for d in WIDTHS[size] for r in RANKS])


def _row(d: int, r: int, generator: torch.Generator) -> dict[str, float]:
    k = 2 * d
    frozen = nn.Linear(k, d, bias=False).double()
    A = torch.randn(r, k, generator=generator, dtype=torch.float64)
    B = torch.randn(d, r, generator=generator, dtype=torch.float64)
    x = torch.randn(TOKENS, k, generator=generator, dtype=torch.float64)
    layer = LoRALayer(Place("layer", frozen, generator), A, B, LoRA(r=r, alpha=3.0))
    merged = frozen.weight.detach() + layer.scaled()[2] * (B @ A)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        (x @ A.T) @ B.T
    with torch.no_grad():
        ours = layer(x)
        wanted = x @ merged.T
        error = float((ours - wanted).norm() / wanted.norm())
        apart, formed = (
            min(timeit.repeat(call, number=1))
            for call in (lambda: (x @ A.T) @ B.T, lambda: x @ (B @ A).T)
        )
    return {
        "d": d,
        "k": k,
        "r": r,
        "error": error,
        "multiply_adds": counter.get_total_flops() / (2 * TOKENS),
        "formula": (d + k) * r,
        "dense": d * k,
        "time_over_dense": apart / formed,
    }


def verdict(table: pd.DataFrame) -> Verdict:
    """Equality and count."""
    equal = bool((table["error"] < 1e-12).all())
    counted = bool((table["multiply_adds"] == table["formula"]).all())
    fewer = table["formula"] < table["dense"]
    said = (
        f"In {len(table)} layers both sides agree to {table['error'].max():.1g} and the factors "
        f"cost {'exactly' if counted else 'not'} (d + k)r multiply-adds a token; that is less than "
        f"dk in {int(fewer.sum())} of them, and measured {table['time_over_dense'].median():.2g} "
        "times the time of forming BA first."
    )
    outcome = "supported" if equal and counted else "refuted"
    seeds, worst = table["seed"].nunique(), float(table["error"].max())
    return Verdict(outcome, said, worst, n_seeds=seeds, effect=worst)


def made(outcome: str, rng: np.random.Generator) -> pd.DataFrame | None:
    """Sides that differ refute."""
    error = rng.uniform(1e-16, 1e-15, 4) * (1 if outcome == "supported" else 1e9)
    table = pd.DataFrame({"d": 8, "k": 16, "r": [1, 2, 4, 8], "error": error, "seed": 0})
    table = table.assign(multiply_adds=24 * table["r"], formula=24 * table["r"], dense=128)
    return table.assign(time_over_dense=1.0) if outcome in ("supported", "refuted") else None


def figure(table: pd.DataFrame) -> Any:
    """Operations and time of the factors over those of the dense product."""
    picture, [[axes]] = canvas(5.5, 4)
    for d, own in table.groupby("d"):
        width = int(str(d))
        mean = own.groupby("r")[["formula", "dense", "time_over_dense"]].mean()
        [line] = axes.plot(
            mean.index, mean["formula"] / mean["dense"], label=f"{width} × {2 * width}"
        )
        axes.plot(mean.index, mean["time_over_dense"], "o", color=line.get_color())
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("r")
    axes.set_ylabel("factors over dense")
    axes.legend()
    note = (
        "Lines: multiply-adds a token. Dots: measured time, forming BA included in the dense one."
    )
    return finish(picture, "What the path through the factors costs", note)
