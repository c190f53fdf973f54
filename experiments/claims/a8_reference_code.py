"""A8: what a widely copied LoRA layer does.

Claim: the LoRA layer that is copied from text to text (freeze the weight, Kaiming A, zero B, merge
and unmerge by hand, attach to every name that holds a word) does what it says.

Decided by: that layer, written out here, in a transformer block of width 512 with r = 8 on query
and value, and the lab's own layer beside it, under seven laws: the start is the base; factors get
the right gradients; only the adapters train; BA counts once in a forward pass after merging, and
after merging twice; after unmerging the weight is bit for bit the base; a target is a name and no
part of one.

Test: exact. Each law is a part, kept or broken; the lab's layer decides nothing.

Power: none is needed.

Cost: seconds, no runs.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F

from lora_lab.adapters import Adapted, attach
from lora_lab.adapters.lora import LoRA
from lora_lab.claims import Verdict, together
from lora_lab.figures import canvas, finish

WIDTH, R, ALPHA = {"smoke": 64, "paper": 512}, 8, 16.0
TARGETS = ("query", "value")
BLOCK = {
    # name: (outputs, inputs) in units of the width
    "query": (1, 1),
    "key": (1, 1),
    "value": (1, 1),
    "output": (1, 1),
    "up": (4, 1),
    "down": (1, 4),
}
LAWS = {
    "start": "the start is the base",
    "gradients": "the factors get the right gradients",
    "freeze": "only the adapters train",
    "merged": "a forward pass after merging counts BA once",
    "twice": "merging twice counts BA once",
    "unmerged": "unmerging gives every bit of the base back",
    "targets": "a target is a name and no part of one",
}


class Copied(nn.Module):
    """The layer as it is copied: nothing remembers that it is merged."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        linear.weight.requires_grad = False
        self.A = nn.Parameter(torch.empty(R, linear.in_features))
        self.B = nn.Parameter(torch.zeros(linear.out_features, R))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.scale = ALPHA / R

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x) + (x @ self.A.T @ self.B.T) * self.scale
        return y

    def merge(self) -> None:
        self.linear.weight.data += (self.B @ self.A) * self.scale

    def unmerge(self) -> None:
        self.linear.weight.data -= (self.B @ self.A) * self.scale


def attach_by_substring(network: nn.Module) -> None:
    """Replace every linear layer whose name holds a target."""
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Linear) and any(target in name for target in TARGETS):
            parent, _, leaf = name.rpartition(".")
            setattr(network.get_submodule(parent), leaf, Copied(module))


class Block(nn.Module):
    """One transformer block's layers and norms, of which only the parameters matter here."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        for name, (out, inner) in BLOCK.items():
            self.add_module(name, nn.Linear(inner * width, out * width))


class Alike(nn.Module):
    """Layers whose names hold each other's."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.value, self.query_key, self.value_head, self.subquery = (
            nn.Linear(R, R) for _ in range(5)
        )


def compute(size: str, seed: int) -> pd.DataFrame:
    """Each law's number for both layers, and the number that it should be."""
    torch.manual_seed(seed)
    rows = []
    for who in ("copied", "lab"):
        found = _layer_laws(who, WIDTH[size], seed) | {"freeze": _extra(who, WIDTH[size], seed)}
        found["targets"] = (_changed(who, Alike(), seed) - len(TARGETS), 0.0)
        rows += [{"who": who, "law": law, "value": v, "wanted": w} for law, (v, w) in found.items()]
    block = _attached("copied", Block(WIDTH[size]), seed)
    trains, total = _counts(block)
    return pd.DataFrame(rows).assign(demo_trains=trains / total)


def _attached(who: str, network: nn.Module, seed: int) -> nn.Module:
    network = copy.deepcopy(network)
    if who == "copied":
        attach_by_substring(network)
        return network
    linear = {n: m for n, m in network.named_modules() if isinstance(m, nn.Linear)}
    shapes = {name: (m.out_features, m.in_features) for name, m in linear.items()}
    attach(network, LoRA(r=R, alpha=ALPHA, targets="+".join(TARGETS)), shapes, seed)
    return network


def _counts(network: nn.Module) -> tuple[int, int]:
    """Parameters that train, and all with the lab's frozen weights."""
    kept = sum(m.W0.numel() for m in network.modules() if isinstance(m, Adapted))
    sizes = [(p.numel(), p.requires_grad) for p in network.parameters()]
    return sum(n for n, trains in sizes if trains), kept + sum(n for n, _ in sizes)


def _extra(who: str, width: int, seed: int) -> tuple[float, float]:
    """Parameters that train over those of the adapters: r(d + k) of each target."""
    trains, _ = _counts(_attached(who, Block(width), seed))
    return trains / (len(TARGETS) * R * 2 * width), 1.0


def _changed(who: str, network: nn.Module, seed: int) -> float:
    """How many layers of a network are replaced."""
    found = _attached(who, network, seed).modules()
    return float(sum(isinstance(module, (Copied, Adapted)) for module in found))


def _layer_laws(who: str, width: int, seed: int) -> dict[str, tuple[float, float]]:
    """One layer in float32: its start, gradients, and how often BA counts after each act."""
    base = nn.ModuleDict({name: nn.Linear(width, width, bias=False) for name in TARGETS})
    W0 = base["query"].weight.detach().clone()
    layer: Any = _attached(who, base, seed).get_submodule("query")
    x = torch.randn(32, width)
    with torch.no_grad():
        start = float((layer(x) - F.linear(x, W0)).norm())
    layer.B.data = 0.1 * torch.randn_like(layer.B)
    D = torch.randn(32, width)
    layer(x).backward(D)
    G, s = D.T @ x, ALPHA / R
    wrong = [
        float((found - right.detach()).norm() / right.detach().norm())
        for found, right in ((layer.B.grad, s * G @ layer.A.T), (layer.A.grad, s * layer.B.T @ G))
    ]
    BA = s * F.linear(x, layer.B.detach() @ layer.A.detach())

    @torch.no_grad()
    def times() -> float:
        """How often BA is in the output, to three digits: rounding is not the question."""
        added = layer(x) - F.linear(x, W0)
        return round(float((added * BA).sum() / BA.square().sum()), 3)

    with torch.no_grad():
        layer.merge()
        merged = times()
        layer.merge()
        twice = times()
        layer.unmerge()
        if who == "copied":
            layer.unmerge()
    weight = layer.W0 if isinstance(layer, Adapted) else layer.linear.weight
    return {
        "start": (start, 0.0),
        "gradients": (round(max(wrong), 4), 0.0),
        "merged": (merged, 1.0),
        "twice": (twice, 1.0),
        "unmerged": (float((weight != W0).double().mean()), 0.0),
    }


def verdict(table: pd.DataFrame) -> Verdict:
    """Which laws the copied layer keeps."""
    judged = table.assign(kept=table["value"] == table["wanted"])
    ours, theirs = (
        judged[judged["who"] == who].groupby("law")["kept"].all() for who in ("lab", "copied")
    )
    broken = [LAWS[law] for law in LAWS if not theirs[law]]
    worst = table[table["who"] == "copied"].groupby("law")["value"].max()
    outcome = together("supported" if ok else "refuted" for ok in theirs)
    said = (
        f"The copied layer keeps {int(theirs.sum())} of {len(theirs)} laws"
        + (f" and breaks: {'; '.join(broken)}" if broken else "")
        + f". Frozen as copied, {100 * table['demo_trains'].mean():.1f} % of a transformer block "
        f"trains ({worst['freeze']:.3g} times the adapters' own), BA counts {worst['merged']:g} "
        f"times after merging and {worst['twice']:g} times after merging twice, unmerging leaves "
        f"{100 * worst['unmerged']:.2g} % of the entries changed, and {worst['targets']:g} layers "
        f"are hit that no target names; the lab's layer keeps {int(ours.sum())}."
    )
    seeds, share = table["seed"].nunique(), float(table["demo_trains"].mean())
    return Verdict(outcome, said, float(theirs.mean()), n_seeds=seeds, effect=share)


def made(outcome: str, rng: np.random.Generator) -> pd.DataFrame | None:
    """A layer that keeps all laws, none, or some."""
    if outcome == "unresolved":
        return None
    broken = {"supported": [], "refuted": list(LAWS), "mixed": list(rng.permutation([*LAWS])[:3])}
    rows = [
        {"who": who, "law": law, "wanted": 1.0, "value": 1.0 + (law in broken[outcome])}
        for who in ("copied", "lab")
        for law in LAWS
    ]
    return pd.DataFrame(rows).assign(demo_trains=rng.uniform(0.01, 0.9), seed=0)


def figure(table: pd.DataFrame) -> Any:
    """Deviation from each law, both layers."""
    picture, [[axes]] = canvas(8.5, 4)
    laws = [*LAWS]
    for i, who in enumerate(("copied", "lab")):
        own = table[table["who"] == who]
        off = (own["value"] - own["wanted"]).abs().groupby(own["law"]).max().reindex(laws)
        places = np.arange(len(laws)) + 0.35 * i
        bars = axes.barh(places, off, height=0.33, label=f"{who} layer")
        axes.bar_label(bars, [f"{v:.3g}" for v in off], padding=3, fontsize=8)
    axes.set_yticks(np.arange(len(laws)) + 0.175, [LAWS[law] for law in laws])
    axes.set_xscale("symlog", linthresh=0.01)
    axes.set_xlim(0, None)
    axes.invert_yaxis()
    axes.set_xlabel("distance from what the law asks for")
    axes.legend(loc="upper right")
    note = (
        "0 keeps the law. Training: parameters that train over the adapters' own, minus 1; "
        "merging: times that BA counts, minus 1; unmerging: share of entries that changed; "
        "targets: layers."
    )
    return finish(picture, "A widely copied LoRA layer under seven laws", note)
