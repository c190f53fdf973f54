"""B8: inits that know the task or the weights against a zero factor.

Claim: inits from a reference's SVD, from the first gradient, from the activations, from W0's
principal components, or symmetric ones start better or converge faster than a zero factor; B = 0
slows convergence.

Decided by: digits, r = 8, four rates, validation loss at 20 points of training. Steps until it is
at 1.25 times the lowest that B = 0 (kaiming) reaches in the mean over seeds at its best rate; and
the loss after a tenth of the steps. For each init and seed at the rate at which the other seeds are
fastest. The reference is full fine-tuning for two epochs; its steps are counted as the init's own.

Test: intervals over seeds of the log ratio of steps to B = 0's, 99 % each for five inits together.
Faster: it lies below ln 0.9, a tenth fewer steps; refuted where it lies above. Five parts. The
early losses and A = 0 are reported.

Power: log steps differ by about 0.1 between seeds of one cell, five seeds give ±0.2 at 99 %.

Cost: 141 runs of digits, 20 of which G5 and F6 read too.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

from experiments import grids
from experiments.claims.f6_lora_plus import CURVES
from experiments.curves import by_others, inside, reached, seeds_to_tell, spread
from lora_lab.claims import Verdict, together
from lora_lab.figures import canvas, finish

ZERO_B, ZERO_A = "kaiming", "zero_a"
INFORMED = {
    "reference": "a reference's SVD",
    "lora_ga": "the first gradient",
    "eva": "the activations",
    "pissa": "principal components",
    "symmetric": "both random",
}
REFERENCE = (
    f"{grids.DIGITS.replace('train.epochs=10', 'train.epochs=2')} adapter=full train.lr=2e-3 "
    "seed=100"
)
DRAWN = ",".join(name for name in (ZERO_B, ZERO_A, *INFORMED) if name != "reference")
RATES = "1e-3,3e-3,1e-2,3e-2"

_LORA = f"{CURVES} adapter=lora adapter.r=8 train.lr={RATES} {grids.SEEDS}"
SWEEP = {
    "smoke": [f"{grids.SMOKE[1]} adapter.init=kaiming,zero_a,symmetric"],
    "paper": [
        f"{_LORA} adapter.init={DRAWN}",
        f'{_LORA} adapter.init=reference adapter.reference="{REFERENCE}"',
    ],
}
TARGET, EARLY, FEWER = 1.25, 0.1, math.log(0.9)
OWN_STEPS = 2 / 10
"""Steps of the reference's training, as a share of the run's."""


def rows(found: Any) -> pd.DataFrame:
    """For every run its steps to the target, with those of the reference, and early losses."""
    names = {"adapter.init": "init", "adapter.r": "r", "train.lr": "lr"}
    kept = ["run_id", *names.values(), "seed", "status", "steps", "validation_score", "score"]
    runs = found.runs.rename(columns=names)[kept]
    runs = runs[runs["r"] == runs["r"].max()]
    curves = found.traces[found.traces["trace"] == "validation_loss"].sort_values("step")
    curves = curves[curves["run_id"].isin(runs.loc[runs["status"] == "done", "run_id"])]
    usual = runs[runs["init"] == ZERO_B].rename(columns={"lr": "train.lr"})
    best = grids.best(usual, ("init",))["run_id"]
    target = TARGET * curves[curves["run_id"].isin(best)].groupby("step")["value"].mean().min()
    every = dict(list(curves.groupby("run_id")))
    out = []
    for run in runs.itertuples():
        row = {"taken": math.nan, "early": math.nan, "last": math.nan}
        if run.run_id in every:
            one = every[run.run_id]
            own = OWN_STEPS * run.steps if run.init == "reference" else 0.0
            # A start that moves the network has a loss at step 0, which might be there already.
            row["taken"] = max(own + reached(one["step"], one["value"], target), 1.0)
            row["early"] = float(np.interp(EARLY * run.steps, one["step"], one["value"]))
            row["last"] = float(one["value"].iloc[-1])
        out.append(row)
    return runs.reset_index(drop=True).join(pd.DataFrame(out)).assign(target=target)


def _ratios(table: pd.DataFrame, init: str, column: str) -> pd.Series:
    """ln of an init's value over that of B = 0, by seed, at rates that the other seeds favour."""
    own, usual = (
        by_others(table[table["init"] == name], column, "lr", least=True) for name in (init, ZERO_B)
    )
    return (own.map(math.log) - usual.map(math.log)).dropna()


def verdict(table: pd.DataFrame) -> Verdict:
    """Steps of each informed init against B = 0."""
    tried = [name for name in INFORMED if (table["init"] == name).any()]
    parts, words, first = {}, [], spread([])
    level = 1 - 0.05 / len(INFORMED)
    for name in tried:
        ratios = _ratios(table, name, "taken")
        found = spread(ratios, level)
        parts[name] = (inside(found, -np.inf, FEWER), ratios)
        first = found if len(parts) == 1 else first
        early = math.exp(_ratios(table, name, "early").mean())
        low, mid, high = (math.exp(x) for x in (found.low, found.value, found.high))
        words.append(
            f"{name} ({INFORMED[name]}) {mid:.2f} [{low:.2f}, {high:.2f}], early loss {early:.2f}"
        )
    outcome = together(part for part, _ in parts.values()) if parts else "unresolved"
    said = "Steps to the target as a multiple of those of B = 0: " + "; ".join(words)
    if (table["init"] == ZERO_A).any():
        zero = spread(_ratios(table, ZERO_A, "taken"))
        low, mid, high = (math.exp(x) for x in (zero.low, zero.value, zero.high))
        said += f"; A = 0 {mid:.2f} [{low:.2f}, {high:.2f}]"
    if outcome == "unresolved" and parts:
        values = next(values for part, values in parts.values() if part == "unresolved")
        said += f"; {seeds_to_tell(values, FEWER)}"
    effect = math.exp(first.value)
    interval = (math.exp(first.low), math.exp(first.high))
    seeds = table["seed"].nunique()
    return Verdict(outcome, said + ".", effect, interval, n_seeds=seeds, effect=effect)


def made(outcome: str, rng: np.random.Generator) -> pd.DataFrame | None:
    """Informed inits that need half the steps, as many, half in one case only, or now this, now
    that."""
    out = []
    for place, init in enumerate((ZERO_B, ZERO_A, *INFORMED)):
        times = 0.5 if outcome == "supported" or (outcome == "mixed" and place == 2) else 1.0
        for seed, swing in enumerate(rng.permutation([-2, -1, 0, 1, 2])):
            wide = outcome == "unresolved" and init != ZERO_B
            taken = 50 * (times if place > 1 else 1.0) * np.exp(swing * (0.4 if wide else 0.01))
            for lr, slower in ((1e-3, 2.0), (1e-2, 1.0)):
                row = {"init": init, "seed": seed, "lr": lr, "taken": slower * taken}
                out.append(row | {"early": slower, "last": 0.1, "score": 0.9})
    return pd.DataFrame(out).assign(run_id="", status="done", target=0.2)


def figure(table: pd.DataFrame) -> Any:
    """Steps over the rate by init, and each init's ratio to B = 0 with its interval."""
    picture, [[left, right]] = canvas(10, 4.2, 1, 2)
    names = [name for name in (ZERO_B, ZERO_A, *INFORMED) if (table["init"] == name).any()]
    for i, name in enumerate(names):
        means = table[table["init"] == name].groupby("lr")["taken"].mean()
        left.plot(means.index, means, marker="o", label=name, color=f"C{i}")
        ratios = _ratios(table, name, "taken")
        bar = spread(ratios, 1 - 0.05 / len(INFORMED))
        right.plot(np.exp(ratios), [i] * len(ratios), "o", ms=3, color=f"C{i}", alpha=0.5)
        if np.isfinite(bar.low):
            right.plot(np.exp([bar.low, bar.high]), [i, i], color=f"C{i}", lw=2)
    right.set_yticks(range(len(names)), names)
    right.axvline(1, color="grey", lw=1)
    right.axvline(math.exp(FEWER), color="grey", lw=1, ls=":")
    right.set_xscale("log")
    right.set_xlabel("steps to the target over those of B = 0")
    left.set_xscale("log")
    left.set_yscale("log")
    left.set_xlabel("learning rate")
    left.set_ylabel("steps to the target loss, mean over seeds")
    left.legend(fontsize=8)
    note = (
        "Kaiming is B = 0. Dots: seeds, at the rate the other seeds favour; bars: 99 % intervals. "
        "Left of the dotted line an init is a tenth faster. The reference pays for its own steps."
    )
    return finish(picture, "Which init reaches the target loss in fewer steps", note)
