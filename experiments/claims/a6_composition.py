"""A6: several adapters on one base.

Claim: W0 + Σ_{k∈S} s_k B_k A_k: any subset S of K adapters can be used on one base, and K adapters
take Kr(m + n) numbers of storage instead of Kmn.

Decided by: a transformer (the lab's, random weights, float64) with four adapters of different r
and layers. Every one of the 16 subsets, each with weights of its own, against a copy of the network
whose weights are that sum; batches whose rows have adapters of their own against one run for each
row; the numbers that the adapters hold against both formulas, over r.

Test: exact. Three parts: subsets and rows agree to 1e-10 of the largest output; the counts are
equal. From which r on Kr(m + n) is no longer less than Kmn is reported, and decides nothing.

Power: none is needed.

Cost: seconds, no runs.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch

import lora_lab as lab
from lora_lab.claims import Verdict, together
from lora_lab.figures import canvas, finish
from lora_lab.linalg import Factored, decompose
from lora_lab.measures import measure
from lora_lab.models.digits_vit import DigitsNet

WIDTH, DEPTH = 32, 2
LAYERS = {
    # layers of the network, and r, of each adapter
    "a": (("query", "value"), 2),
    "b": (("query", "up_proj", "down_proj"), 4),
    "c": (("down_proj",), 1),
    "d": (("query", "key", "value", "up_proj"), 8),
}
BATCHES = {"smoke": 2, "paper": 20}
RANKS = (1, 2, 4, 8, 16, 24, 32)

Adapters = dict[str, dict[str, Factored]]


def compute(size: str, seed: int) -> pd.DataFrame:
    """Subsets, mixed batches, and counts."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    network = DigitsNet(WIDTH, DEPTH, 0.0).double().eval()
    adapters = {name: _adapter(network, ends, r, rng) for name, (ends, r) in LAYERS.items()}
    x = torch.from_numpy(rng.random((8, 64)))
    rows = _subsets(network, adapters, x, rng)
    rows += [_mixed(network, adapters, x, rng) for _ in range(BATCHES[size])]
    return pd.DataFrame(rows + [_stored(network, r, rng) for r in RANKS])


def _adapter(
    network: torch.nn.Module, ends: tuple[str, ...], r: int, rng: np.random.Generator
) -> dict[str, Factored]:
    """Random factors for the layers whose names end so."""
    out = {}
    for name, module in network.named_modules():
        if name.endswith(ends):
            m, n = module.weight.shape
            B, A = rng.standard_normal((m, r)), rng.standard_normal((r, n))
            out[name] = Factored(B, A, scale=float(rng.uniform(0.1, 0.5)) / (m * r) ** 0.5)
    return out


@torch.no_grad()
def _subsets(
    network: torch.nn.Module, adapters: Adapters, x: torch.Tensor, rng: np.random.Generator
) -> list[dict[str, Any]]:
    composed = lab.compose(network, adapters)
    rows = []
    for count in range(len(adapters) + 1):
        for names in itertools.combinations(adapters, count):
            weights = {name: float(rng.uniform(-2, 2)) for name in names}
            composed.use(weights)
            wanted = _summed(network, adapters, weights)(x)
            ranks = [measure("numerical_rank", decompose(u)) for u in composed.updates().values()]
            row = {
                "kind": "subset",
                "what": "+".join(names) or "none",
                "rank_of_sum": max(ranks, default=0),
            }
            rows.append(row | {"error": _error(network(x), wanted)})
    composed.remove()
    return rows


def _summed(
    network: torch.nn.Module, adapters: Adapters, weights: Mapping[str, float]
) -> torch.nn.Module:
    """A copy without hooks whose weights are W0 + Σ c s B A, by plain products."""
    sum_ = copy.deepcopy(network)
    for module in sum_.modules():
        module._forward_hooks.clear()
    for name, weight in weights.items():
        for layer, update in adapters[name].items():
            added = weight * update.scale * (np.asarray(update.B) @ np.asarray(update.A))
            sum_.get_submodule(layer).weight.data += torch.from_numpy(added)
    return sum_


@torch.no_grad()
def _mixed(
    network: torch.nn.Module, adapters: Adapters, x: torch.Tensor, rng: np.random.Generator
) -> dict[str, Any]:
    """A batch whose rows have adapters of their own against a run for each row."""
    names = [[None, *adapters][i] for i in rng.integers(0, len(adapters) + 1, len(x))]
    apart = [
        _summed(network, adapters, {name: 1.0} if name else {})(x[i : i + 1])
        for i, name in enumerate(names)
    ]
    composed = lab.compose(network, adapters)
    composed.route(names)
    error = _error(network(x), torch.cat(apart))
    composed.remove()
    return {"kind": "rows", "what": " ".join(str(n) for n in names), "error": error}


def _error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def _stored(network: torch.nn.Module, r: int, rng: np.random.Generator) -> dict[str, Any]:
    """Numbers that K adapters of all linear layers of the blocks hold, and both formulas."""
    ends, k = ("query", "key", "value", "_proj"), len(LAYERS)
    adapters = [_adapter(network, ends, r, rng) for _ in range(k)]
    shapes = [update.shape for update in adapters[0].values()]
    return {
        "kind": "storage",
        "what": f"r = {r}",
        "r": r,
        "held": sum(u.B.size + u.A.size for own in adapters for u in own.values()),
        "formula": k * r * sum(m + n for m, n in shapes),
        "copies": k * sum(m * n for m, n in shapes),
    }


def verdict(table: pd.DataFrame) -> Verdict:
    """Subsets, rows and counts."""
    worst = {
        kind: float(table.loc[table["kind"] == kind, "error"].max()) for kind in ("subset", "rows")
    }
    stored = table[table["kind"] == "storage"].drop_duplicates("r")
    counted = bool((stored["held"] == stored["formula"]).all())
    saves = stored["held"] < stored["copies"]
    holds = [worst["subset"] < 1e-10, worst["rows"] < 1e-10, counted]
    outcome = together("supported" if ok else "refuted" for ok in holds)
    subsets = table.loc[table["kind"] == "subset", "what"].nunique()
    least = stored.loc[~saves, "r"].min()
    said = (
        f"All {subsets} subsets agree with a network of summed weights to {worst['subset']:.1g}, "
        f"and rows with adapters of their own with separate runs to {worst['rows']:.1g}; the sum "
        f"of a subset has a rank of up to {table['rank_of_sum'].max():.0f}, all its r together. "
        f"Storage is {'exactly' if counted else 'not'} Kr(m + n): {stored['held'].min():,.0f} to "
        f"{stored['held'].max():,.0f} numbers where K copies take {stored['copies'].max():,.0f}"
        + ("." if saves.all() else f", so no saving from r = {least:.0f} on.")
    )
    seeds = table["seed"].nunique()
    return Verdict(outcome, said, max(worst.values()), n_seeds=seeds, effect=max(worst.values()))


def made(outcome: str, rng: np.random.Generator) -> pd.DataFrame | None:
    """Sums that agree or not; storage that is counted and saves, or not."""
    if outcome == "unresolved":
        return None
    right = outcome == "supported"
    table = pd.DataFrame({"kind": ["subset", "rows"] * 10, "what": [f"{i}" for i in range(20)]})
    table["error"] = rng.uniform(1e-16, 1e-14, 20) + (0.1 if outcome == "refuted" else 0)
    r = np.array([1, 2, 4, 8])
    stored = pd.DataFrame({"kind": "storage", "what": "", "r": r, "formula": 20 * r, "copies": 99})
    stored["held"] = stored["formula"] + (not right)
    return pd.concat([table, stored], ignore_index=True).assign(seed=0, rank_of_sum=3.0)


def figure(table: pd.DataFrame) -> Any:
    """Errors, and storage over r."""
    picture, [[left, right]] = canvas(9.5, 4, 1, 2)
    floor = 1e-18
    for i, kind in enumerate(("subset", "rows")):
        own = table.loc[table["kind"] == kind, "error"].clip(lower=floor)
        left.plot(i + np.linspace(-0.2, 0.2, len(own)), own, "o", ms=3, alpha=0.6)
    left.axhline(1e-10, color="grey", lw=1)
    left.set_xticks([0, 1], ["subsets", "rows of a batch"])
    left.set_yscale("log")
    left.set_ylabel("largest error over largest output")
    stored = table[table["kind"] == "storage"].drop_duplicates("r")
    right.plot(stored["r"], stored["held"], marker="o", label="K adapters: Kr(m + n)")
    right.plot(stored["r"], stored["copies"], color="grey", label="K copies: Kmn")
    right.set_xscale("log", base=2)
    right.set_yscale("log")
    right.set_xlabel("r")
    right.set_ylabel("numbers stored")
    right.legend()
    note = (
        "Left: below the line is rounding (an error of 0 is drawn at 1e-18). Right: K = 4, all "
        "linear layers of the blocks of width 32; adapters stop saving where the lines cross."
    )
    return finish(picture, "Adapters that share one base", note)
