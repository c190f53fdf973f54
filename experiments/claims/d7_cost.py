"""D7: what LoRA saves in training.

Claim: LoRA trains with less memory and less compute than full fine-tuning; a model of 7 billion
parameters fits a card of 16 to 24 GB.

Decided by: training steps of the lab's own layers in a transformer of MiniLM's size (width 384, 6
blocks, 512 tokens a step, float32 weights made at random), full and LoRA at r = 1 to 64: bytes of
the optimizer's state, bytes alive when the backward pass begins (weights, gradients, state and what
autograd has saved), operations of forward and backward by torch's counter, seconds of a step. The
card by arithmetic: shapes of a 7 B decoder, bfloat16 weights, float32 factors with gradient and two
moments at r = 16 on all linear layers, one sequence of 2,048 tokens with activations recomputed
block by block, logits in float32.

Test: counts are exact and must be lower at every r; a time is lower when the 95 % t interval of its
log ratio to full fine-tuning's at r = 8 lies below 0, refuted above. Six parts: state, memory,
operations, time, each card.

Power: the least of several interleaved steps scatters by a few per cent; five repetitions show a
difference of 5 %.

Cost: two minutes, no runs.
"""

from __future__ import annotations

import timeit
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.utils.flop_counter import FlopCounterMode

from experiments.curves import inside, seeds_to_tell, spread
from lora_lab.adapters import ADAPTERS, attach
from lora_lab.claims import Verdict, together
from lora_lab.data.digits import PIXELS
from lora_lab.figures import canvas, finish
from lora_lab.models.digits_vit import DigitsClassifier, DigitsNet

SIZES = {"smoke": (32, 1, 2), "paper": (384, 6, 8)}
"""Width, blocks, timed rounds."""
RANKS = (1, 2, 4, 8, 16, 32, 64)
BATCH, CLASSES = 32, 5
USUAL = 8

BILLIONS = {"blocks": 32, "width": 4096, "inner": 11008, "words": 32000, "tokens": 2048, "r": 16}
CARDS = (16, 24)
"""GiB."""
COUNTS = ("state", "memory", "operations")


def compute(size: str, seed: int) -> pd.DataFrame:
    """Counts and times of full and of each r; the arithmetic of the cards."""
    width, depth, rounds = SIZES[size]
    ranks = [r for r in RANKS if r <= width]
    steps = {0: _Step(width, depth, 0, seed)} | {r: _Step(width, depth, r, seed) for r in ranks}
    best = dict.fromkeys(steps, float("inf"))
    # Interleaved, so that what else the machine does falls on all of them alike.
    for _ in range(rounds):
        for r, step in steps.items():
            best[r] = min(best[r], timeit.timeit(step, number=1))
    out = [{"what": "step", "r": r, "seconds": best[r], **s.counts()} for r, s in steps.items()]
    out += [{"what": how, "memory": needed} for how, needed in _billions().items()]
    return pd.DataFrame(out)


class _Step:
    """One training step of a method; r = 0 is full fine-tuning."""

    def __init__(self, width: int, depth: int, r: int, seed: int) -> None:
        torch.manual_seed(seed)
        net = DigitsNet(width, depth, 0.0)
        names = net.named_modules()
        shapes = {n: tuple(m.weight.shape) for n, m in names if isinstance(m, torch.nn.Linear)}
        method = ADAPTERS["lora"](r=r) if r else ADAPTERS["full"]()
        attach(net, method, shapes, seed)
        self.model = DigitsClassifier(net, width, CLASSES)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, 1e-4, fused=True)
        self.batch = {"inputs": torch.rand(BATCH, PIXELS)}
        self.targets = torch.randint(CLASSES, (BATCH,))
        self()

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        self.model.loss(self.model(self.batch), self.targets).backward()
        self.optimizer.step()

    def counts(self) -> dict[str, float]:
        """Bytes of the optimizer's state and of all that is alive, and operations of a step."""
        moments = (t for state in self.optimizer.state.values() for t in state.values())
        state = sum(_size(t) for t in moments if torch.is_tensor(t) and t.dim())
        held = {t.data_ptr(): _size(t) for t in (*self.model.parameters(), *self.model.buffers())}
        saved: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            store = tensor.untyped_storage()
            if store.data_ptr() not in held:
                saved[store.data_ptr()] = store.nbytes()
            return tensor

        # An in-place sum with a product is a product too, which the counter does not know.
        counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm})
        with counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            loss = self.model.loss(self.model(self.batch), self.targets)
            loss.backward()
        gradients = sum(_size(p) for p in self.trained)
        alive = sum(held.values()) + gradients + state + sum(saved.values())
        flops = float(counter.get_total_flops())
        return {"state": state, "memory": alive, "operations": flops}


def _addmm(_: Any, one: Any, other: Any, **_kw: Any) -> int:
    """Operations of a product by the shapes of its factors."""
    return int(2 * one[0] * one[1] * other[1])


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _billions() -> dict[str, float]:
    """Bytes to train a 7 B decoder by each method, see the docstring."""
    b = BILLIONS
    block = [(b["width"], b["width"])] * 4 + [(b["inner"], b["width"])] * 3
    linear = b["blocks"] * sum(m * n for m, n in block)
    total = linear + 2 * b["words"] * b["width"]
    factors = b["blocks"] * sum(b["r"] * (m + n) for m, n in block)
    # A block keeps its input; one block at a time has all of its own; logits and their gradient.
    inner = 8 * b["width"] + 3 * b["inner"]
    activations = 2 * b["tokens"] * (b["blocks"] * b["width"] + inner)
    activations += 2 * 4 * b["tokens"] * b["words"]
    return {
        "7B, full": 16.0 * total + activations,
        "7B, LoRA": 2.0 * total + 16.0 * factors + activations,
    }


def _over_full(table: pd.DataFrame) -> pd.DataFrame:
    """Every count and time of LoRA over full fine-tuning's of the same repetition."""
    steps = table[table["what"] == "step"]
    full = steps[steps["r"] == 0].set_index("seed")
    lora = steps[steps["r"] > 0].copy()
    for name in (*COUNTS, "seconds"):
        lora[name] /= lora["seed"].map(full[name])
    return lora


def verdict(table: pd.DataFrame) -> Verdict:
    """Three counts, a time, two cards."""
    over = _over_full(table)
    parts = ["supported" if (over[name] < 1).all() else "refuted" for name in COUNTS]
    usual = over[over["r"] == USUAL]
    ratios = np.log(usual["seconds"])
    found = spread(ratios)
    parts.append(inside(found, -np.inf, 0.0))
    needed = table[table["what"] != "step"].groupby("what")["memory"].first() / 2**30
    parts += ["supported" if needed["7B, LoRA"] < card else "refuted" for card in CARDS]
    low, mid, high = (float(np.exp(x)) for x in (found.low, found.value, found.high))
    told = ", ".join(
        f"{word} {usual[name].mean():.3g} ({over[name].min():.2g} to {over[name].max():.2g} over r)"
        for name, word in zip(COUNTS, ("optimizer state", "memory", "operations"), strict=True)
    )
    outcome = together(parts)
    said = (
        f"At r = {USUAL} LoRA's share of full fine-tuning's is: {told}, time of a step {mid:.2f} "
        f"[{low:.2f}, {high:.2f}]; a 7 B model needs {needed['7B, LoRA']:.1f} GiB with LoRA and "
        f"{needed['7B, full']:.0f} GiB without, by arithmetic"
    )
    said += f"; {seeds_to_tell(ratios, 0.0)}." if outcome == "unresolved" else "."
    seeds = int(usual["seed"].nunique())
    return Verdict(outcome, said, mid, (low, high), n_seeds=seeds, effect=mid)


def made(outcome: str, rng: np.random.Generator) -> pd.DataFrame | None:
    """Counts and times that are lower, or not, or times of which nothing can be said."""
    share = 2.0 if outcome == "refuted" else 0.5
    slow = {"refuted": 2.0, "mixed": 2.0, "unresolved": 1.0}.get(outcome, 0.7)
    out = []
    for seed in range(5):
        # Far slower in one repetition, far faster in the next.
        swing = 2.0 * (-1) ** seed if outcome == "unresolved" else 0.01 * rng.normal()
        for r in (0, 1, 8, 64):
            count, seconds = (share, slow * float(np.exp(swing))) if r else (1.0, 1.0)
            row = {"what": "step", "r": r, "seed": seed, "seconds": seconds}
            out.append(row | dict.fromkeys(COUNTS, count))
        card = 30.0 if outcome == "refuted" else 14.0
        out += [
            {"what": what, "memory": size * 2**30, "seed": seed}
            for what, size in (("7B, LoRA", card), ("7B, full", 100.0))
        ]
    return pd.DataFrame(out)


def figure(table: pd.DataFrame) -> Any:
    """LoRA over full fine-tuning, by r."""
    over = _over_full(table)
    picture, [[axes]] = canvas(6, 4)
    labels = ("optimizer state", "memory in all", "operations", "time of a step")
    for name, label in zip((*COUNTS, "seconds"), labels, strict=True):
        middle = over.groupby("r")[name].mean()
        [line] = axes.plot(middle.index, middle, label=label)
        axes.plot(over["r"], over[name], "o", ms=3, alpha=0.5, color=line.get_color())
    axes.axhline(1, color="grey", lw=1)
    axes.set_xscale("log", base=2)
    axes.set_ylim(0)
    axes.set_xlabel("r")
    axes.set_ylabel("LoRA over full fine-tuning")
    axes.legend(fontsize=8)
    note = (
        "Dots: repetitions. Below 1 LoRA saves. Memory in all holds the weights and what autograd "
        "keeps, which both methods need; of a layer's three products only one can go."
    )
    return finish(picture, "What LoRA saves in training", note)
