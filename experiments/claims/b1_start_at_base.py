"""B1: the two starts that leave the base alone.

Claim: with B = 0 and A random, or with A = 0 and B random, dW = 0 and the output is the base
model's; texts use one or the other as if they were the same.

Decided by: the loss of the first batch, before any step, under either start against the untouched
base's (the head alone, same seed and batch) on the digits transformer; then both starts trained to
the end at r = 8 and 64, each at the best of four rates by validation score. Beside the score: the
best rate, and how far the first step moves the weight.

Test: two parts. Start: every first loss equals the base's to 1e-5 of it (float32). Same: the mean
over r of the score of B = 0 minus that of A = 0, paired by seed, lies within 2 points by two
one-sided t tests at 5 %; refuted where its 95 % interval lies wholly outside 2 points.

Power: a paired difference of two means of 299 test images has a spread of about 0.012; with five
seeds the 90 % interval is then 0.011 to each side, and two starts that are equal are found
equivalent in about 9 of 10 cases.

Cost: 90 runs of a second; 50 of them are the shared grid's.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

from experiments.grids import CELL, DIGITS, best, head, lora
from lora_lab.claims import Found, Verdict, together
from lora_lab.figures import canvas, finish
from lora_lab.registry import WrongInput
from lora_lab.stats import equivalence, paired, t_interval, units_needed

SWEEP = {
    "smoke": [
        "model=planted data=planted size=smoke adapter=head",
        "model=planted data=planted size=smoke adapter=lora adapter.r=4",
        "model=planted data=planted size=smoke adapter=lora adapter.r=4 adapter.init=zero_a",
    ],
    "paper": [
        head(DIGITS),
        lora(DIGITS, "8,64"),
        lora(DIGITS, "8,64", "adapter.init=zero_a"),
    ],
}
STARTS = {"kaiming": "B = 0", "zero_a": "A = 0"}
MARGIN = 0.02


def rows(found: Found) -> pd.DataFrame:
    """One row a run: first loss beside the base's, first step, score, whether its rate is best."""
    runs = found.runs
    traces = found.traces
    first = traces[traces["step"] == 1]
    loss = first[first["trace"] == "loss"].set_index("run_id")["value"]
    square = first[first["trace"] == "update_norm"].groupby("run_id")["value"]
    moved = square.agg(lambda v: float(np.sqrt((v**2).sum())))
    base = runs[runs["adapter"] == "head"].drop_duplicates("seed").set_index("seed")["run_id"]
    own = runs[runs["adapter"] == "lora"]
    chosen = best(own, (*CELL, "adapter.init"))
    table = pd.DataFrame(
        {
            "run_id": own["run_id"] + "+" + own["seed"].map(base),
            "start": own["adapter.init"].map(STARTS),
            "r": own["adapter.r"],
            "lr": own["train.lr"],
            "seed": own["seed"],
            "score": own["score"],
            "chosen": own["run_id"].isin(chosen["run_id"]),
            "edge": own["run_id"].isin(chosen.loc[chosen["edge"], "run_id"]),
            "loss": own["run_id"].map(loss),
            "base_loss": own["seed"].map(base).map(loss),
            "first_step": own["run_id"].map(moved),
        }
    )
    return table.sort_values(["start", "r", "lr", "seed"], ignore_index=True)


def _differences(table: pd.DataFrame) -> pd.Series:
    """Score of B = 0 minus that of A = 0 at their best rates: the mean over r, by seed."""
    chosen = table[table["chosen"] & table["score"].notna()]
    wide = chosen.pivot_table(index=["seed", "r"], columns="start", values="score")
    wide = wide.reindex(columns=list(STARTS.values())).dropna()
    return (wide["B = 0"] - wide["A = 0"]).groupby("seed").mean()


def _needed(sd: float) -> str:
    """Seeds that would show a difference of the margin."""
    try:
        count = units_needed(MARGIN, sd) if sd > 0 else 2
    except WrongInput:
        return "more seeds than can be run"
    return f"about {count} seeds"


def verdict(table: pd.DataFrame) -> Verdict:
    """The start, and the score."""
    seen = table.dropna(subset=["loss", "base_loss"])
    error = float(((seen["loss"] - seen["base_loss"]).abs() / seen["base_loss"]).max())
    parts = ["unresolved" if seen.empty else "supported" if error < 1e-5 else "refuted"]
    differences = _differences(table)
    if len(differences) < 2:
        said = f"The first loss differs from the base's by {error:.1g}; two seeds are needed."
        return Verdict("unresolved", said, n_seeds=len(differences))
    found = paired(differences)
    p = equivalence(differences, 0.0, MARGIN)
    outside = found.low > MARGIN or found.high < -MARGIN
    parts.append("supported" if p < 0.05 else "refuted" if outside else "unresolved")
    words = {"supported": "equivalent within", "refuted": "apart by more than"}
    known = words.get(parts[1], "not decided against")
    rate = table[table["chosen"]].groupby(["start", "r"])["lr"].first()
    rates = {
        start: " and ".join(f"{lr:g} (r = {r:g})" for r, lr in rate[start].items())
        for start in STARTS.values()
    }
    step = table.groupby(["start", "r", "lr"])["first_step"].mean().unstack("start")
    ratio = math.exp(np.log(step["B = 0"] / step["A = 0"]).mean())
    said = (
        f"Either start gives the base's first loss to {error:.1g}; trained to the end, B = 0 "
        f"scores {100 * found.mean:+.1f} points against A = 0 [{100 * found.low:.1f}, "
        f"{100 * found.high:.1f}], {known} {100 * MARGIN:g} points"
        + (f" (it would take {_needed(found.sd)})" if parts[1] == "unresolved" else "")
        + f"; they are not one method: the best rates are {rates['B = 0']} for B = 0 and "
        f"{rates['A = 0']} for A = 0"
        + (", some at the edge of the rates tried" if table["edge"].any() else "")
        + f", and at one rate the first step of B = 0 moves the weight {ratio:.2g} times as far."
    )
    return Verdict(
        together(parts), said, found.mean, (found.low, found.high), p, found.n, found.mean
    )


def made(outcome: str, rng: np.random.Generator) -> pd.DataFrame | None:
    """First losses that agree or not, scores that are equal, apart, or too noisy to tell."""
    apart = {"refuted": 0.1, "mixed": 0.1}.get(outcome, 0.0)
    noise = 0.2 if outcome == "unresolved" else 0.004
    cells = [(s, r, lr, k) for s in STARTS.values() for r in (8, 64) for lr in (1e-3, 3e-3)
             for k in range(5)]  # fmt: skip
    table = pd.DataFrame(cells, columns=["start", "r", "lr", "seed"])
    # Spread of the differences themselves, in turns, so that no draw is quiet by chance.
    spread = noise * (table["seed"] - 2 + 0.1 * rng.standard_normal(len(table)))
    second = table["start"] == "A = 0"
    table["score"] = 0.8 - apart * second + spread * second
    table["base_loss"] = rng.uniform(1, 2, len(table))
    table["loss"] = table["base_loss"] * (1.5 if outcome == "refuted" else 1.0)
    table["first_step"] = table["lr"] * rng.uniform(1, 2, len(table))
    return table.assign(chosen=table["lr"] == 3e-3, edge=False)


def figure(table: pd.DataFrame) -> Any:
    """Score over the rate and first step over the rate, for both starts."""
    picture, [[left, right]] = canvas(9.5, 4, 1, 2)
    for i, ((start, r), own) in enumerate(table.groupby(["start", "r"])):
        style = {"color": f"C{i % 2}", "ls": "-" if start == "B = 0" else "--", "marker": "o"}
        for axes, column in ((left, "score"), (right, "first_step")):
            cells = own.dropna(subset=[column]).groupby("lr")[column]
            found = [(float(str(lr)), *t_interval(values)) for lr, values in cells]
            if not found:
                continue
            x, mean, low, high = np.array(found).T
            axes.plot(x, mean, label=f"{start}, r = {r:g}", **style)
            axes.fill_between(x, low, high, color=style["color"], alpha=0.12, lw=0)
    left.set_ylabel("test score")
    right.set_ylabel("‖dW‖ after the first step")
    right.set_yscale("log")
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xlabel("learning rate")
    left.legend(fontsize=8)
    note = "Bands: 95 % t intervals over seeds. Both starts are the base; what follows differs."
    return finish(picture, "B = 0 against A = 0", note)
