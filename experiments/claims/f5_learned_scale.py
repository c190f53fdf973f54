"""F5: a learned factor for each layer instead of a fixed α/r.

Claim: learning the scale s of every layer ("LoRA++") is better than the fixed α/r; layers differ in
the value that they learn.

Decided by: digits, r = 2, 8 and 64 with α = 2r, four rates each, s fixed or learned from the same
start: test score at the best rate by validation score, learned minus fixed, mean over r by seed.
And the values: a run keeps s·B, and the trace `balancedness` is ‖BᵀB - AAᵀ‖ of the bare
factors, which together give s.

Test: 95 % t intervals over seeds. Better: the gain lies above 0; refuted where it lies below one
point. Layers differ: the mean over seeds of s over its start has, for some two of the kinds of
layer (query, key, value, …), a paired difference of logarithms whose interval, corrected for the
number of pairs, leaves ±0.05 out; refuted where all lie inside.

Power: paired scores, mean of three r, differ by about 0.009 between seeds; five seeds gave ±0.011
and left it open, 12 give ±0.006. Logarithms of s differ by about 0.02.

Cost: 230 runs of digits beyond the shared grid.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pandas as pd

from experiments import grids
from experiments.curves import inside, seeds_to_tell, spread
from lora_lab.claims import Verdict, together
from lora_lab.figures import canvas, finish
from lora_lab.layers import module_of

WEIGHTS = True
FIXED = grids.lora(grids.DIGITS, "2,8,64").replace(grids.SEEDS, grids.seeds(12))
SWEEP = {
    "smoke": [grids.SMOKE[1], f"{grids.SMOKE[1]} adapter.scaling=learned"],
    "paper": [FIXED, f"{FIXED} adapter.scaling=learned"],
}
LEAST, SAME = 0.01, 0.05
START = 2.0
"""α/r of all these runs."""


def rows(found: Any) -> pd.DataFrame:
    """Scores at the best rates, and s by kind of layer in the runs that learn it."""
    runs = grids.best(found.runs, ("adapter.r", "adapter.scaling"))
    names = {"adapter.r": "r", "adapter.scaling": "scaling", "train.lr": "lr"}
    kept = ["run_id", *names.values(), "seed", "score", "edge"]
    scores = runs.rename(columns=names)[kept].assign(kind="")
    traces = found.traces[found.traces["trace"] == "balancedness"]
    last = traces[traces["step"] == traces.groupby("run_id")["step"].transform("max")]
    balance = last.set_index(["run_id", "layer"])["value"]
    out = []
    for run in scores[scores["scaling"] == "learned"].itertuples():
        for layer, update in found.updates(run.run_id).items():
            s = learned(update.scale * update.B, update.A, balance[run.run_id, layer])
            row = {"run_id": run.run_id, "r": run.r, "lr": run.lr, "seed": run.seed}
            out.append(row | {"scaling": "learned", "kind": module_of(layer), "s": s})
    return pd.concat([scores, pd.DataFrame(out)], ignore_index=True)


def learned(sB: np.ndarray, A: np.ndarray, balance: float) -> float:
    """s from s·B, A and ‖BᵀB - AAᵀ‖: with x = s⁻², ‖x·(sB)ᵀ(sB) - AAᵀ‖ is that number.

    Of the two roots the one nearer to the start; NaN where rounding leaves none.

    >>> B, A = np.array([[1.0], [0.5]]), np.array([[3.0, 4.0]])
    >>> round(learned(2.5 * B, A, abs(1.25 - 25.0)), 6)
    2.5
    """
    M, N = sB.T @ sB, A @ A.T
    square, cross = float((M * M).sum()), float((M * N).sum())
    inner = cross**2 - square * (float((N * N).sum()) - balance**2)
    if square == 0 or inner < 0:
        return math.nan
    roots = [(cross + sign * math.sqrt(inner)) / square for sign in (-1, 1)]
    found = [x**-0.5 for x in roots if x > 0]
    return min(found, key=lambda s: abs(math.log(s / START)), default=math.nan)


def _values(table: pd.DataFrame) -> pd.DataFrame:
    """ln(s/start) by seed and kind of layer, mean over layers and r."""
    own = table[table["kind"].notna() & table["s"].notna()]
    return np.log(own["s"] / START).groupby([own["seed"], own["kind"]]).mean().unstack()


def _differ(values: pd.DataFrame) -> tuple[str, str, list[float]]:
    """Outcome of "layers differ", the pair farthest apart in words, and its differences."""
    pairs = list(itertools.combinations(values.columns, 2))
    if not pairs:
        return "unresolved", "one kind of layer alone", []
    gaps = {pair: (values[pair[0]] - values[pair[1]]).dropna() for pair in pairs}
    bars = {pair: spread(gap, 1 - 0.05 / len(pairs)) for pair, gap in gaps.items()}
    parts = [inside(bar, -SAME, SAME) for bar in bars.values()]
    far = max(pairs, key=lambda pair: abs(gaps[pair].mean()))
    outcome = "unresolved"
    if "refuted" in parts:  # one pair that is surely apart
        outcome = "supported"
    elif set(parts) == {"supported"}:
        outcome = "refuted"
    ratio, low, high = (math.exp(x) for x in (bars[far].value, bars[far].low, bars[far].high))
    told = f"{far[0]} over {far[1]} {ratio:.2f} [{low:.2f}, {high:.2f}]"
    return outcome, told, [abs(gap) for gap in gaps[far]]


def verdict(table: pd.DataFrame) -> Verdict:
    """The gain, and whether layers differ."""
    scores = table[table["score"].notna()].pivot_table(
        index=["r", "seed"], columns="scaling", values="score"
    )
    gain = (scores["learned"] - scores["alpha_over_r"]).dropna().groupby("seed").mean()
    found = spread(gain)
    better = inside(found, 0.0, np.inf)
    better = "refuted" if better != "supported" and found.high < LEAST else better
    values = _values(table)
    apart, told, gaps = _differ(values)
    outcome = together([better, apart])
    low, mid, high = (100 * x for x in (found.low, found.value, found.high))
    said = (
        f"A learned scale changes the test score by {mid:+.2f} points [{low:+.2f}, {high:+.2f}]; "
        f"it ends between {np.exp(values.mean().min()):.2f} and {np.exp(values.mean().max()):.2f} "
        f"times its start by kind of layer, farthest apart {told}"
    )
    if outcome == "unresolved":
        open_ = better == "unresolved"
        told = seeds_to_tell(gain, 0.0, LEAST, either=True) if open_ else seeds_to_tell(gaps, SAME)
        said += f"; {told}"
    edges = int(table.drop_duplicates(["r", "scaling"])["edge"].eq(True).sum())
    said += f" ({edges} best rates at the edge of their grid)." if edges else "."
    interval = (found.low, found.high)
    seeds = len(gain)
    return Verdict(outcome, said, found.value, interval, n_seeds=seeds, effect=found.value)


def made(outcome: str, rng: np.random.Generator) -> pd.DataFrame | None:
    """A gain of three points or none, layers apart or alike, or now this, now that."""
    gain, apart = {"supported": (0.03, 0.5), "mixed": (0.0, 0.5)}.get(outcome, (0.0, 0.0))
    wide = outcome == "unresolved"
    out = []
    for seed, swing in enumerate(rng.permutation([-2, -1, 0, 1, 2])):
        for r in (2, 8):
            row = {"r": r, "seed": seed, "kind": "", "edge": False}
            score = 0.9 + swing * (0.02 if wide else 0.001)
            out.append(row | {"scaling": "alpha_over_r", "score": 0.9})
            out.append(row | {"scaling": "learned", "score": score + gain})
            for i, kind in enumerate(("key", "query", "value")):
                own = apart + 0.1 * swing * wide
                s = START * math.exp(own * i + 0.005 * rng.normal())
                out.append(row | {"scaling": "learned", "kind": kind, "s": s, "edge": None})
    return pd.DataFrame(out).assign(run_id="", lr=1e-2)


def figure(table: pd.DataFrame) -> Any:
    """Scores over r, and the learned values by kind of layer."""
    picture, [[left, right]] = canvas(9, 4, 1, 2)
    scored = table[table["score"].notna()]
    for scaling, own in scored.groupby("scaling"):
        cells = own.groupby("r")["score"]
        bars = [spread(score) for _, score in cells]
        low = np.nan_to_num([bar.value - bar.low for bar in bars])
        label = "learned" if scaling == "learned" else "fixed, α = 2r"
        middle = [bar.value for bar in bars]
        left.errorbar(list(cells.groups), middle, yerr=low, marker="o", capsize=3, label=label)
    left.set_xscale("log", base=2)
    left.set_xlabel("r")
    left.set_ylabel("test score")
    left.legend(fontsize=8)
    learnt = table[table["kind"].notna() & table["s"].notna()]
    for i, (r, own) in enumerate(learnt.groupby("r")):
        kinds = sorted(learnt["kind"].unique())
        place = own["kind"].map(kinds.index) + 0.2 * (i - 1)
        right.plot(place, own["s"] / START, "o", ms=3, alpha=0.6, label=f"r = {r:g}")
        right.set_xticks(range(len(kinds)), kinds, rotation=30)
    right.axhline(1, color="grey", lw=1)
    right.set_yscale("log")
    right.set_ylabel("learned s over its start")
    if right.get_legend_handles_labels()[0]:
        right.legend(fontsize=8)
    note = (
        "Left: means and 95 % intervals over seeds, each at its best rate. Right: every layer and "
        "seed; grey: the start, where a fixed scale stays."
    )
    return finish(picture, "A learned scale for each layer", note)
