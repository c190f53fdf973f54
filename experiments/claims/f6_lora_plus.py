"""F6: a higher learning rate for B than for A.

Claim: training B at a higher rate than A beats one rate for both.

Decided by: a sweep of the ratio of the rates, 1/4, 1, 4 and 16, on digits at r = 8, each ratio at
four rates of A, the best by validation score (the head trains at A's rate); and on planted problems
of width 128 and true rank 4 with noise, one problem a seed. Test score of the best ratio above 1
minus that of ratio 1, by seed; the ratio is chosen by validation score, too.

Test: 95 % t interval of that gain over seeds. Supported where it lies above 0, refuted where it
lies below one point, on each of the two grounds.

Power: paired scores differ by about 0.02 between seeds on digits, and by less than 0.001 on planted
problems. Five seeds left it open (−0.7 points, ±2.3) and asked for 12.

Cost: 192 runs of digits and 192 of planted problems, most of which G5 reads too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from experiments import grids
from experiments.curves import inside, seeds_to_tell, spread
from lora_lab.claims import Verdict, together
from lora_lab.figures import canvas, finish

CURVES = grids.DIGITS.replace("train.evaluations=1", "train.evaluations=20")
RATES = {"0.25": "3e-3,1e-2,3e-2,1e-1", "1": "1e-3,3e-3,1e-2,3e-2", "4": "3e-4,1e-3,3e-3,1e-2"}
RATES["16"] = RATES["4"]
SEEDS = grids.seeds(12)
DIGITS = [
    f"{CURVES} adapter=lora adapter.r=8 adapter.lr_ratio={ratio} train.lr={rates} {SEEDS}"
    for ratio, rates in RATES.items()
]
# Few and noisy examples: with more, every ratio reaches the ceiling of the score.
PROBLEMS = grids.PLANTED.replace(
    "train.evaluations=1",
    "data.train_examples=1024 data.noise=0.3 train.epochs=8 train.evaluations=20",
)
PLANTED = [
    f"{PROBLEMS} adapter=lora adapter.r=8 adapter.lr_ratio={ratio} train.lr={rates} "
    f"data.seed=${{seed}} {SEEDS}"
    for ratio, rates in RATES.items()
]
SWEEP = {
    "smoke": [f"{grids.SMOKE[1]} adapter.lr_ratio=1,4"],
    "paper": [*DIGITS, *PLANTED],
}
LEAST = 0.01
CELL = ("ground", "ratio")


def rows(found: Any) -> pd.DataFrame:
    """Every run with its ratio."""
    names = {"model": "ground", "adapter.lr_ratio": "ratio", "train.lr": "lr"}
    kept = ["run_id", *names.values(), "seed", "status", "validation_score", "score"]
    runs = found.runs
    # One r: at smoke size there are others.
    return runs[runs["adapter.r"] == runs["adapter.r"].max()].rename(columns=names)[kept]


def _best(own: pd.DataFrame) -> pd.DataFrame:
    """The runs at the best rate of each ground and ratio."""
    return grids.best(own.rename(columns={"lr": "train.lr"}), CELL)


def verdict(table: pd.DataFrame) -> Verdict:
    """The gain of the best higher ratio on each ground."""
    chosen = _best(table)
    parts, words, gains, edges = [], [], {}, []
    for ground, own in chosen.groupby("ground"):
        one = own[own["ratio"] == 1].set_index("seed")["score"]
        above = own[own["ratio"] > 1]
        if above.empty or one.empty:
            continue
        ratio = above.groupby("ratio")["validation_score"].mean().idxmax()
        gain = (above[above["ratio"] == ratio].set_index("seed")["score"] - one).dropna()
        found = spread(gain)
        part = inside(found, 0.0, np.inf)
        parts.append("refuted" if part != "supported" and found.high < LEAST else part)
        gains[ground] = gain
        edges += [f"{r:g} on {ground}" for r in own.loc[own["edge"], "ratio"].unique()]
        low, mid, high = (100 * x for x in (found.low, found.value, found.high))
        words.append(
            f"on {ground} the best ratio above 1 is {ratio:g} and gains {mid:+.2f} points "
            f"[{low:+.2f}, {high:+.2f}] on ratio 1"
        )
    outcome = together(parts) if parts else "unresolved"
    said = "; ".join(words) or "no two ratios were compared"
    if edges:
        said += f" (best rate at the edge of its grid at ratio {', '.join(edges)})"
    if "unresolved" in parts and outcome == "unresolved":
        gap = list(gains.values())[parts.index("unresolved")]
        said += f"; {seeds_to_tell(gap, 0.0, LEAST, either=True)}"
    first = spread(next(iter(gains.values()), []))
    interval = (first.low, first.high)
    seeds = table["seed"].nunique()
    said = said[0].upper() + said[1:] + "."
    return Verdict(outcome, said, first.value, interval, n_seeds=seeds, effect=first.value)


def made(outcome: str, rng: np.random.Generator) -> pd.DataFrame | None:
    """Ratios above 1 that gain four points on both grounds, on none, on one, or now and then."""
    gains = {"supported": (0.04, 0.04), "mixed": (0.04, 0.0)}.get(outcome, (0.0, 0.0))
    out = []
    for ground, gain in zip(("digits_vit", "planted"), gains, strict=True):
        for seed, swing in enumerate(rng.permutation([-2, -1, 0, 1, 2])):
            odd = 0.02 * swing if outcome == "unresolved" else 0.001 * swing
            for ratio in (0.25, 1.0, 4.0):
                score = 0.9 + (gain + odd if ratio > 1 else 0.0)
                for lr, lost in ((1e-3, 0.05), (3e-3, 0.0), (1e-2, 0.05)):
                    row = {"ground": ground, "ratio": ratio, "seed": seed, "lr": lr}
                    scores = dict.fromkeys(("validation_score", "score"), score - lost)
                    out.append(row | scores)
    return pd.DataFrame(out).assign(run_id="", status="done")


def figure(table: pd.DataFrame) -> Any:
    """Score over the ratio at each ratio's best rate, and over the rate for each ratio."""
    chosen = _best(table)
    grounds = sorted(table["ground"].unique())
    picture, axes = canvas(8.5, 3.6 * len(grounds), len(grounds), 2, sharey="row")
    for (left, right), ground in zip(axes, grounds, strict=True):
        own = chosen[chosen["ground"] == ground]
        bars = own.groupby("ratio")["score"].apply(lambda s: spread(s))
        low = np.nan_to_num([b.value - b.low for b in bars])
        left.errorbar(bars.index, [b.value for b in bars], yerr=low, marker="o", capsize=3)
        left.set_xlabel("rate of B over rate of A")
        left.set_ylabel("test score")
        left.set_title(f"{ground}, each ratio at its best rate", fontsize=10, loc="left")
        for ratio, one in table[table["ground"] == ground].groupby("ratio"):
            middle = one.groupby("lr")["score"].mean()
            right.plot(middle.index, middle, marker="o", label=f"ratio {ratio:g}")
        right.set_xlabel("rate of A")
        right.set_title(f"{ground}, over the rate", fontsize=10, loc="left")
        right.legend(fontsize=8)
        left.set_xscale("log", base=4)
        right.set_xscale("log")
    note = "Means and 95 % intervals over seeds. LoRA+ holds that the left curve rises from 1 on."
    return finish(picture, "A higher learning rate for B than for A", note)
