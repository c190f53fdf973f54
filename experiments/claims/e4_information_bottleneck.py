"""E4: the low-rank path as a bottleneck.

Claim: the low-rank path keeps the information of the input that the task needs and drops what it
does not need.

Decided by: a planted classification whose four classes depend on 4 of 32 directions of a white
input (through a random two-layer network), and on nothing else. One layer relu((W0 + BA)x) with
frozen W0 and a trained head; B = 0 and A random at the start, AdamW, r from 1 to 16. What a linear
reader of Ax can tell of the 4 relevant and of the 28 other directions (for white inputs: the mean
squared cosine between these directions and A's row space; a random A gives r/32 for both); and the
share of ‖BA‖² in the relevant directions (4/32 by chance). Two runs differ in W0 alone, two in the
start of A alone: the cosines of their updates tell how far BA depends on W0.

Test: 95 % t intervals over seeds. Keeps: at r = 4 and 16 the readable share of the relevant
directions lies above 0.5. Drops: at r = 4 the share of ‖BA‖² in the other directions lies below
half of chance; and at r = 16 what Ax tells of the other directions lies below half of what a random
A tells (that part is about A itself: what A still reads, B may ignore). The cosines are reported,
and decide nothing.

Power: at a spread of .1 between seeds, 5 seeds place a share that is .15 from its threshold with a
chance of .8.

Cost: about a minute, no runs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F

from experiments.curves import seeds_to_tell, spread
from lora_lab.claims import Verdict, against, together
from lora_lab.figures import canvas, finish
from lora_lab.inits import INITS

WIDTH, HIDDEN, RELEVANT, CLASSES = 32, 64, 4, 4
EXAMPLES, BATCH, RATE = 2048, 128, 1e-2
STEPS = {"smoke": 10, "paper": 1000}
RANKS = (1, 2, 4, 8, 16)
CHANCE = RELEVANT / WIDTH
LOW, HIGH = 4, 16


def compute(size: str, seed: int) -> pd.DataFrame:
    """What A reads and what BA uses, over r; cosines of updates."""
    generator = torch.Generator().manual_seed(seed)
    V = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator)).Q[:, :RELEVANT]
    x = torch.randn(EXAMPLES, WIDTH, generator=generator)
    first = torch.randn(RELEVANT, 32, generator=generator)
    logits = torch.tanh(x @ V @ first) @ torch.randn(32, CLASSES, generator=generator)
    labels = (logits - logits.mean(0)).argmax(1)
    bases = torch.randn(2, HIDDEN, WIDTH, generator=generator) / WIDTH**0.5
    rows = []
    for r in RANKS:
        A, B, score = _trained(x, labels, bases[0], r, seed, STEPS[size])
        _, other, _ = dW = _trained(x, labels, bases[1], r, seed, STEPS[size])
        again = _trained(x, labels, bases[0], r, seed + 100, STEPS[size])
        rows.append(
            {"r": r, "accuracy": score}
            | _read(A, V)
            | {"used": _share(B @ A, V), "other_W0": _cosine(B @ A, other @ dW[0])}
            | {"other_A": _cosine(B @ A, again[1] @ again[0])}
        )
    return pd.DataFrame(rows)


def _trained(
    x: torch.Tensor, labels: torch.Tensor, W0: torch.Tensor, r: int, seed: int, steps: int
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """A and B after training, and the accuracy on the training examples."""
    generator = torch.Generator().manual_seed(seed)
    factors = INITS["kaiming"](HIDDEN, WIDTH, r, generator)
    A, B = (nn.Parameter(factor.float().clone()) for factor in factors)
    head = nn.Parameter(torch.randn(CLASSES, HIDDEN, generator=generator) / HIDDEN**0.5)
    optimizer = torch.optim.AdamW([A, B, head], lr=RATE, weight_decay=0.0)
    for _ in range(steps):
        rows = torch.randint(len(x), (BATCH,), generator=generator)
        optimizer.zero_grad()
        loss = F.cross_entropy(F.relu(x[rows] @ (W0 + 2 * B @ A).T) @ head.T, labels[rows])
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        found = F.relu(x @ (W0 + 2 * B @ A).T) @ head.T
    score = float((found.argmax(1) == labels).double().mean())
    return A.detach().double(), B.detach().double(), score


def _read(A: torch.Tensor, V: torch.Tensor) -> dict[str, float]:
    """Mean squared cosine of relevant and of other directions with A's row space."""
    Q = torch.linalg.qr(A.T).Q
    inside, r = float((Q.T @ V.double()).square().sum()), Q.shape[1]
    return {"relevant": inside / RELEVANT, "others": (r - inside) / (WIDTH - RELEVANT)}


def _share(dW: torch.Tensor, V: torch.Tensor) -> float:
    """Share of ‖dW‖² in the relevant input directions."""
    return float((dW @ V.double()).square().sum() / dW.square().sum())


def _cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one * other).sum() / (one.norm() * other.norm()))


def verdict(table: pd.DataFrame) -> Verdict:
    """Keeps the relevant; drops the rest from BA, and from A."""
    low, high = (table[table["r"] == r] for r in (LOW, HIGH))
    kept = [spread(own["relevant"]) for own in (low, high)]
    unused = spread((1 - low["used"]) / (1 - CHANCE))
    unread = spread(high["others"] / (HIGH / WIDTH))
    parts = [against(one, 0.5) for one in kept]
    parts += [against(one, 0.5, more=False) for one in (unused, unread)]
    outcome = together(parts)
    said = (
        f"Of the relevant directions A reads {kept[0].value:.2f} [{kept[0].low:.2f}, "
        f"{kept[0].high:.2f}] at r = {LOW} and {kept[1].value:.2f} [{kept[1].low:.2f}, "
        f"{kept[1].high:.2f}] at r = {HIGH}; BA at r = {LOW} puts {unused.value:.2f} "
        f"[{unused.low:.2f}, {unused.high:.2f}] times the share of chance into the others, and A "
        f"at r = {HIGH} still reads {unread.value:.2f} [{unread.low:.2f}, {unread.high:.2f}] times "
        f"as much of them as a random A; updates of two W0 have a cosine of "
        f"{high['other_W0'].mean():.2f} at r = {HIGH}, of two starts of A "
        f"{high['other_A'].mean():.2f}"
    )
    if outcome == "unresolved":
        close = min(kept, key=lambda one: abs(one.value - 0.5))
        values = low["relevant"] if close is kept[0] else high["relevant"]
        said += f"; {seeds_to_tell(values, 0.5)}"
    seeds, main = table["seed"].nunique(), kept[0]
    return Verdict(outcome, said + ".", main.value, main[1:], n_seeds=seeds, effect=main.value)


def made(outcome: str, rng: np.random.Generator) -> pd.DataFrame:
    """A and BA that read the relevant alone; the others alone; all; or scatter."""
    relevant, used, others = {
        "supported": (0.9, 0.9, 0.1),
        "refuted": (0.1, 0.1, 0.5),
        "mixed": (0.9, 0.9, 0.5),
        "unresolved": (0.5, 0.56, 0.25),
    }[outcome]
    table = pd.DataFrame([{"r": r, "seed": seed} for r in RANKS for seed in range(5)])
    scatter = 0.1 if outcome == "unresolved" else 0.005
    # Symmetric about the value, so that no draw of few seeds can decide what is undecided.
    noise = scatter * np.tile([-1.0, 1.0, -0.5, 0.5, 0.0], len(RANKS)) * rng.uniform(0.8, 1.2)
    table = table.assign(relevant=relevant + noise, used=used + noise, others=others + noise)
    return table.assign(other_W0=0.2, other_A=0.3, accuracy=0.9)


def figure(table: pd.DataFrame) -> Any:
    """What A reads and BA uses over r, beside chance."""
    picture, [[left, right]] = canvas(9.5, 4, 1, 2)
    ranks = np.array(sorted(table["r"].unique()))
    for column, label, colour in (
        ("relevant", "the 4 relevant directions", "#0072b2"),
        ("others", "the 28 others", "#d55e00"),
    ):
        left.plot(ranks, table.groupby("r")[column].mean(), color=colour, label=label)
        left.plot(table["r"], table[column], "o", ms=3, color=colour, alpha=0.6)
    left.plot(ranks, ranks / WIDTH, color="grey", lw=1, label="random A")
    left.set_ylabel("share of them that A reads")
    right.plot(ranks, table.groupby("r")["used"].mean(), color="#009e73", label="in BA")
    right.plot(table["r"], table["used"], "o", ms=3, color="#009e73", alpha=0.6)
    right.axhline(CHANCE, color="grey", lw=1, label="chance")
    right.set_ylim(0, 1.02)
    right.set_ylabel("share of ‖BA‖² in the relevant directions")
    for ax in (left, right):
        ax.set_xscale("log", base=2)
        ax.set_xlabel("r")
        ax.legend(fontsize=8)
    note = (
        "A bottleneck that keeps what the task needs and drops the rest reads the blue directions "
        "and not the orange ones. Points: seeds."
    )
    return finish(picture, "What passes through the low-rank path", note)
