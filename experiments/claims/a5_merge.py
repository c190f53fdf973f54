"""A5: merging an update into the weight, and taking it out again.

Claim: merging is exact to rounding, adds no inference cost and can be undone; adapters can be
swapped in a merged weight.

Decided by: layers in float64, float32 and bfloat16 with updates of 0.1, 1 and 10 % of the base
weight. Merged as the lab does (summed in float64, rounded once, W0 kept) and by hand, as copied
code does (W += sBA, later W −= sBA, in the weight's dtype); undone after 1, 10 and 100 rounds, each
with another adapter than the one before. Operations by torch's counter, times beside them.

Test: exact. Rounding: no merged entry is further from W0 + sBA than half a step of its dtype (to
1e-4 of it: torch rounds float64 to bfloat16 by way of float32, which decides near-ties). Loss: the
rounding takes less than 1 % of the update, a part for each dtype. Cost: the merged layer counts
as many operations as the base layer. Undone and swapped: no bit of the base differs, and after
rounds that take turns the weight is bit for bit the one that the last adapter alone would give, a
part for each way of merging; the others are of the lab's way. Measured time decides nothing.

Power: none is needed; five seeds of each cell show that the machinery computes it.

Cost: seconds, no runs.
"""

from __future__ import annotations

import timeit
from collections.abc import Callable
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

WIDTH = {"smoke": 48, "paper": 256}
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
SIZES = (1e-3, 1e-2, 1e-1)
ROUNDS = (1, 10, 100)
TOKENS, R = 256, 8


def compute(size: str, seed: int) -> pd.DataFrame:
    """Errors of both ways of merging for each dtype, size of the update and number of rounds."""
    generator = torch.Generator().manual_seed(seed)
    width = WIDTH[size]
    return pd.DataFrame(
        row for dtype in DTYPES for ratio in SIZES for row in _cell(width, dtype, ratio, generator)
    )


def _layer(width: int, dtype: torch.dtype, ratio: float, generator: torch.Generator) -> LoRALayer:
    """A layer whose update has `ratio` times the norm of its base weight."""
    linear = nn.Linear(2 * width, width, bias=False)
    linear.weight.data = torch.randn(width, 2 * width, generator=generator) / width**0.5
    linear = linear.to(dtype)
    A, B = (
        torch.randn(R, 2 * width, generator=generator),
        torch.randn(width, R, generator=generator),
    )
    W0 = linear.weight.detach().double()
    B *= ratio * W0.norm() / (2 * (B.double() @ A.double()).norm())
    return LoRALayer(Place("layer", linear, generator), A, B, LoRA(r=R))


def _dense(layer: LoRALayer) -> torch.Tensor:
    """sBA in float64."""
    A, B, scale = layer.scaled()
    return scale * (B.detach().double() @ A.detach().double())


def _cell(width: int, name: str, ratio: float, generator: torch.Generator) -> list[dict[str, Any]]:
    dtype = DTYPES[name]
    layers = [_layer(width, dtype, ratio, generator) for _ in range(2)]
    layers[1].W0 = layers[0].W0
    W0, update = layers[0].W0.clone(), _dense(layers[0])
    x = torch.randn(TOKENS, 2 * width, generator=generator).to(dtype)
    layers[0].merge()
    merged = layers[0].merged
    assert merged is not None
    kept = {
        "way": "lab",
        **_errors(merged, W0, update),
        "operations": _counted(lambda: layers[0](x)) / _counted(lambda: x @ W0.T),
        "time": min(timeit.repeat(lambda: layers[0](x), number=1, repeat=9))
        / min(timeit.repeat(lambda: x @ W0.T, number=1, repeat=9)),
    }
    layers[0].unmerge()
    kept["operations_apart"] = _counted(lambda: layers[0](x)) / _counted(lambda: x @ W0.T)
    rows: list[dict[str, Any]] = []
    for rounds in ROUNDS:
        for i in range(rounds):
            layers[i % 2].merge()
            last = layers[i % 2].merged
            layers[i % 2].unmerge()
        fresh = layers[(rounds - 1) % 2]
        fresh.merge()
        rows.append(kept | _undone(rounds, layers[0].W0, W0, last, fresh.merged))
        fresh.unmerge()
        rows.append({"way": "by hand", **_by_hand(W0, update, rounds)})
    for row in rows:
        row |= {"dtype": name, "ratio": ratio}
    return rows


def _by_hand(W0: torch.Tensor, update: torch.Tensor, rounds: int) -> dict[str, float]:
    """W += sBA and W −= sBA in the dtype of W; a roll of its rows makes each adapter another."""
    own = update.to(W0.dtype)
    W = W0.clone()
    for i in range(rounds):
        now = own.roll(i, 0)
        W += now
        last = W.clone()
        W -= now
    return _errors(W0 + own, W0, update) | _undone(rounds, W, W0, last, W0 + now)


def _errors(merged: torch.Tensor, W0: torch.Tensor, dW: torch.Tensor) -> dict[str, float]:
    """Largest error in half steps of the dtype, and the share of the update that rounding takes."""
    exact = W0.double() + dW
    error = (merged.double() - exact).abs()
    _, exponent = torch.frexp(exact)
    half = torch.ldexp(torch.full_like(exact, torch.finfo(W0.dtype).eps / 4), exponent)
    return {"half_steps": float((error / half).max()), "lost": float(error.norm() / dW.norm())}


def _undone(
    rounds: int, W: torch.Tensor, W0: torch.Tensor, last: Any, alone: Any
) -> dict[str, float]:
    """What is left of the base and of the last adapter's weight after some rounds."""
    return {
        "rounds": rounds,
        "base_changed": float((W != W0).double().mean()),
        "base_error": float((W.double() - W0.double()).norm() / W0.double().norm()),
        "swap_changed": float((last != alone).double().mean()),
    }


def _counted(call: Callable[[], Any]) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


@torch.no_grad()
def verdict(table: pd.DataFrame) -> Verdict:
    """Rounding, loss, cost, undoing and swapping, for both ways."""
    lab, hand = (table[table["way"] == way] for way in ("lab", "by hand"))
    lost = {str(name): float(own.max()) for name, own in lab.groupby("dtype")["lost"]}
    holds = {
        "rounding": bool((lab["half_steps"] <= 1 + 1e-4).all()),
        "cost": bool((lab["operations"] == 1).all()),
        "lab": bool((lab[["base_changed", "swap_changed"]] == 0).all(axis=None)),
        "by hand": bool((hand[["base_changed", "swap_changed"]] == 0).all(axis=None)),
    }
    parts = [holds[name] for name in ("rounding", "cost", "lab", "by hand")]
    parts += [share < 0.01 for share in lost.values()]
    outcome = together("supported" if ok else "refuted" for ok in parts)
    most = int(table["rounds"].max())
    worst = hand[hand["rounds"] == most].groupby("dtype")["base_error"].max()
    narrow = max(lost, key=lambda name: lost[name])
    said = (
        f"Merged weights {'are' if holds['rounding'] else 'are not'} exact to one rounding and "
        f"cost {lab['operations'].max():.3g} times the operations of the base layer "
        f"({lab['operations_apart'].max():.3g} apart; measured time {lab['time'].median():.2g}); "
        f"rounding takes up to {100 * lost[narrow]:.2g} % of an update in {narrow}; with a "
        f"copy of W0 kept, merging is undone {'bit for bit' if holds['lab'] else 'only nearly'}, "
        f"by subtraction {'too' if holds['by hand'] else 'it is not'}: after {most} adapters in "
        "turn the base is off by "
        + ", ".join(f"{value:.1g} ({name})" for name, value in worst.items())
        + " of its norm."
    )
    seeds = table["seed"].nunique()
    return Verdict(outcome, said, float(worst.max()), n_seeds=seeds, effect=lost[narrow])


def made(outcome: str, rng: np.random.Generator) -> pd.DataFrame | None:
    """Weights that come back or not, with roundings that are small or not."""
    if outcome == "unresolved":
        return None
    cells = [(way, name) for way in ("lab", "by hand") for name in DTYPES]
    table = pd.DataFrame(cells, columns=["way", "dtype"]).assign(ratio=0.01, rounds=10, seed=0)
    wrong, good = outcome == "refuted", outcome == "supported"
    drift = rng.uniform(1e-8, 1e-2, len(table)) * (not good)
    kept = (table["way"] == "lab") & (not wrong)
    for name in ("base_changed", "base_error", "swap_changed"):
        table[name] = np.where(kept, 0.0, drift)
    table["lost"] = 0.5 if wrong else 1e-4
    table["half_steps"] = 5.0 if wrong else 0.9
    table["operations"] = 1.1 if wrong else 1.0
    return table.assign(operations_apart=1.1, time=1.0)


def figure(table: pd.DataFrame) -> Any:
    """What rounding takes of the update, and how far the base drifts."""
    picture, [[left, right]] = canvas(9.5, 4, 1, 2)
    lab, hand = (table[table["way"] == way] for way in ("lab", "by hand"))
    for name, own in lab.groupby("dtype"):
        mean = own.groupby("ratio")["lost"].mean()
        left.plot(mean.index, mean, marker="o", label=str(name))
    for name, own in hand.groupby("dtype"):
        for ratio, cell in own.groupby("ratio"):
            mean = cell.groupby("rounds")["base_error"].mean()
            shade = 0.4 + 0.6 * (float(str(ratio)) == own["ratio"].max())
            colour = {"bfloat16": "C0", "float32": "C1", "float64": "C2"}[str(name)]
            right.plot(mean.index, mean, marker="o", color=colour, alpha=shade)
    left.axhline(0.01, color="grey", lw=1)
    left.set_xlabel("‖dW‖ / ‖W0‖")
    left.set_ylabel("share of dW lost to rounding")
    right.set_xlabel("rounds of W += dW, W −= dW, each with another dW")
    right.set_ylabel("‖W − W0‖ / ‖W0‖ afterwards")
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_yscale("log")
    left.legend()
    note = (
        "Left: grey marks 1 %; a small update is largely lost in bfloat16. Right: the same "
        "colours, pale for smaller updates; with W0 kept aside the error is 0, and so not drawn."
    )
    return finish(picture, "What merging loses, and what undoing it by hand leaves", note)
