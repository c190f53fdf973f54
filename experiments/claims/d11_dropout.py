"""D11: dropout in the adapter.

Claim: dropout of 0.05 to 0.1 regularises adapters: it improves what they score on new examples, the
more so with little data and a high r.

Decided by: digits with 64 and with 508 training images at equal steps, LoRA at r = 4 and 64,
dropout of A's input of 0, 0.05 and 0.1, each cell at the better of two rates by validation score;
test score with dropout minus without, mean over both values of dropout and both r, by seed.

Test: 95 % t interval of that gain over seeds, for each amount of data. Supported where it lies
above 0, refuted where it lies below one point. The differences between amounts of data and between
r are reported with their intervals.

Power: a score's standard deviation between seeds is about 0.01, of a mean of four differences about
0.007; five seeds give an interval of ±0.009.

Cost: 100 runs of digits beyond the shared grid.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from experiments import grids
from experiments.curves import inside, seeds_to_tell, spread
from lora_lab.claims import Verdict, together
from lora_lab.figures import canvas, finish

CELLS = "adapter=lora adapter.r=4,64 adapter.dropout=0,0.05,0.1 train.lr=3e-3,1e-2"
FEW = grids.DIGITS.replace("train.epochs=10", "data.train_examples=64 train.epochs=80")
SWEEP = {
    "smoke": [f"{grids.SMOKE[1]} adapter.dropout=0,0.1"],
    "paper": [f"{ground} {CELLS} {grids.SEEDS}" for ground in (grids.DIGITS, FEW)],
}
ALL = 508
LEAST = 0.01
"""A gain below one point is none."""


def rows(found: Any) -> pd.DataFrame:
    """The runs at the best rate of each cell."""
    cell = (*grids.CELL, "adapter.dropout", "data.train_examples")
    runs = grids.best(found.runs, cell)
    table = pd.DataFrame(
        {
            "run_id": runs["run_id"],
            "examples": runs["data.train_examples"].astype("float64").fillna(ALL),
            "r": runs["adapter.r"],
            "dropout": runs["adapter.dropout"],
            "lr": runs["train.lr"],
        }
    )
    return table.join(runs[["seed", "score", "loss"]])


def _gains(table: pd.DataFrame, value: str = "score") -> pd.DataFrame:
    """With dropout minus without, for each amount of data, r, dropout and seed."""
    keys = ["examples", "r", "seed"]
    without = table[table["dropout"] == 0].set_index(keys)[value].rename("without")
    with_ = table[table["dropout"] > 0].join(without, on=keys)
    return with_.assign(gain=with_[value] - with_["without"]).dropna(subset="gain")


def verdict(table: pd.DataFrame) -> Verdict:
    """The gain for each amount of data."""
    gains, losses = _gains(table), _gains(table, "loss")
    parts, words, values = [], [], {}
    for examples, own in gains.groupby("examples"):
        values[float(str(examples))] = own.groupby("seed")["gain"].mean()
        found = spread(values[float(str(examples))])
        # A gain that is surely there but small is one; nothing above a point is none.
        part = inside(found, 0.0, np.inf)
        parts.append("refuted" if part != "supported" and found.high < LEAST else part)
        loss = losses[losses["examples"] == examples].groupby("seed")["gain"].mean()
        words.append(
            f"with {examples:.0f} images {100 * found.value:+.1f} points of the test score "
            f"[{100 * found.low:+.1f}, {100 * found.high:+.1f}] and {loss.mean():+.3f} of the loss"
        )
    more = ""
    if len(values) > 1:
        few = spread(values[min(values)] - values[max(values)])
        more += f"; few images minus many {_points(few)}"
    by_r = gains.groupby(["seed", "r"])["gain"].mean().unstack()
    if by_r.shape[1] > 1:
        more += f"; high r minus low {_points(spread(by_r[by_r.columns.max()] - by_r.iloc[:, 0]))}"
    outcome = together(parts) if parts else "unresolved"
    if outcome == "unresolved" and values:
        gap = list(values.values())[parts.index("unresolved")]
        more += f"; {seeds_to_tell(gap, 0.0, LEAST, either=True)}"
    said = f"Dropout of 0.05 to 0.1 changes {'; '.join(words) or 'nothing that ran'}{more}."
    every = spread(gains.groupby("seed")["gain"].mean())
    seeds = gains["seed"].nunique()
    interval = (every.low, every.high)
    return Verdict(outcome, said, every.value, interval, n_seeds=seeds, effect=every.value)


def _points(found: Any) -> str:
    return f"{100 * found.value:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"


def made(outcome: str, rng: np.random.Generator) -> pd.DataFrame | None:
    """Dropout that gains three points, none, three of few images only, or now this, now that."""
    gain = {"supported": (0.03, 0.03), "mixed": (0.03, 0.0)}.get(outcome, (0.0, 0.0))
    out = []
    for examples, own in zip((64, ALL), gain, strict=True):
        for seed, swing in enumerate(rng.permutation([-2, -1, 0, 1, 2])):
            wide = 0.02 * swing if outcome == "unresolved" else 0.001 * swing
            for r in (4, 64):
                for dropout in (0.0, 0.05, 0.1):
                    score = 0.9 + (own + wide) * (dropout > 0)
                    cell = {"examples": examples, "r": r, "dropout": dropout, "seed": seed}
                    out.append(cell | {"score": score, "loss": 1 - score})
    return pd.DataFrame(out).assign(run_id="", lr=3e-3)


def figure(table: pd.DataFrame) -> Any:
    """Scores over dropout, by amount of data and r."""
    amounts = sorted(table["examples"].unique())
    picture, [axes] = canvas(4 * len(amounts) + 1, 4, 1, len(amounts))
    for ax, examples in zip(axes, amounts, strict=True):
        own = table[table["examples"] == examples]
        for r, one in own.groupby("r"):
            cells = one.groupby("dropout")["score"]
            bars = [spread(score) for _, score in cells]
            middle = [b.value for b in bars]
            low = np.nan_to_num([b.value - b.low for b in bars])
            ax.errorbar(
                list(cells.groups), middle, yerr=low, marker="o", capsize=3, label=f"r = {r}"
            )
        ax.set_xlabel("dropout of the adapter's input")
        ax.set_ylabel("test score")
        ax.set_title(f"{examples:.0f} training images", fontsize=10, loc="left")
        ax.legend(fontsize=8)
    note = "Means and 95 % intervals over seeds, each cell at its best rate. A rise is a gain."
    return finish(picture, "What dropout in the adapter does to the test score", note)
