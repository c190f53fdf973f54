"""G5: LoRA+ (Hayou et al. 2024) in small.

Claim: with some ratio η_B/η_A above 1 LoRA scores at least as well as with ratio 1, and reaches a
target loss in fewer steps.

Decided by: the ratios 1, 4 and 16 of F6 on digits and on planted problems, four rates each,
validation loss at 20 points of training. Score: the best ratio above 1 and its rate by validation
score, against ratio 1 at its best rate. Steps: until the validation loss is at 1.25 times the
lowest that ratio 1 reaches in the mean over seeds at its best rate; for each seed, rates (and the
ratio above 1) are those in which the other seeds are fastest.

Test: 95 % t intervals over seeds. At least as well: the test score's difference lies above -1
point, refuted below. Faster: the log ratio of steps lies below 0, refuted where it lies above
ln 0.95: not one twentieth faster. Two parts on each ground.

Power: scores as in F6; log steps differ by about 0.1 between seeds, twelve seeds give ±0.06.

Cost: the runs of F6.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

from experiments import grids
from experiments.claims.f6_lora_plus import DIGITS, PLANTED
from experiments.curves import by_others, inside, reached, seeds_to_tell, spread
from lora_lab.claims import Verdict, together
from lora_lab.figures import canvas, finish

SWEEP = {
    "smoke": [f"{grids.SMOKE[1]} adapter.lr_ratio=1,4"],
    "paper": [*DIGITS[1:], *PLANTED[1:]],
}
WORSE, FASTER = 0.01, math.log(0.95)
TARGET = 1.25


def rows(found: Any) -> pd.DataFrame:
    """Every run with its ratio, and the steps that it takes to its ground's target."""
    names = {"model": "ground", "adapter.lr_ratio": "ratio", "train.lr": "lr"}
    kept = ["run_id", *names.values(), "seed", "status", "validation_score", "score"]
    runs = found.runs[found.runs["adapter.r"] == found.runs["adapter.r"].max()]
    runs = runs.rename(columns=names)[kept]
    losses = found.traces[found.traces["trace"] == "validation_loss"].sort_values("step")
    curves = losses.merge(runs[runs["status"] == "done"], on="run_id")
    parts = []
    for ground, own in runs.groupby("ground"):
        one = grids.best(own[own["ratio"] == 1].rename(columns={"lr": "train.lr"}), ("ground",))
        usual = curves[curves["run_id"].isin(one["run_id"])]
        target = TARGET * usual.groupby("step")["value"].mean().min()
        taken = {
            run_id: reached(curve["step"], curve["value"], target)
            for run_id, curve in curves[curves["ground"] == ground].groupby("run_id")
        }
        parts.append(own.assign(target=target, taken=own["run_id"].map(taken)))
    return pd.concat(parts, ignore_index=True)


def _gaps(own: pd.DataFrame) -> tuple[float, list[float], list[float]]:
    """On one ground the best ratio above 1, its gain in score, and its log ratio of steps."""
    chosen = grids.best(own.rename(columns={"lr": "train.lr"}), ("ratio",))
    above = chosen[chosen["ratio"] > 1]
    best: Any = above.groupby("ratio")["validation_score"].mean().idxmax()
    scores = chosen.pivot_table(index="seed", columns="ratio", values="score")
    gain = (scores[best] - scores[1.0]).dropna()
    named = own.assign(setting=own["ratio"].astype(str) + " at " + own["lr"].astype(str))
    more, one = (
        by_others(named[chosen], "taken", "setting", least=True)
        for chosen in (own["ratio"] > 1, own["ratio"] == 1)
    )
    return float(best), list(gain), list((more.map(math.log) - one.map(math.log)).dropna())


def verdict(table: pd.DataFrame) -> Verdict:
    """Score and steps on each ground."""
    parts: list[tuple[str, list[float], tuple[float, ...]]] = []
    words, first = [], spread([])
    for ground, own in table.groupby("ground"):
        ratio, gain, faster = _gaps(own)
        score, steps = spread(gain), spread(faster)
        parts.append((inside(score, -WORSE, np.inf), gain, (-WORSE,)))
        quick = inside(steps, -np.inf, 0.0)
        slow = quick != "supported" and steps.low > FASTER
        parts.append(("refuted" if slow else quick, faster, (0.0, FASTER)))
        first = steps if len(parts) == 2 else first
        times = [float(np.exp(x)) for x in (steps.value, steps.low, steps.high)]
        words.append(
            f"on {ground} ratio {ratio:g} scores {100 * score.value:+.2f} points "
            f"[{100 * score.low:+.2f}, {100 * score.high:+.2f}] against ratio 1, and a ratio above "
            f"1 takes {times[0]:.2f} [{times[1]:.2f}, {times[2]:.2f}] times the steps to the target"
        )
    outcome = together(part for part, _, _ in parts)
    said = "; ".join(words)
    if outcome == "unresolved":
        _, values, edges = next(part for part in parts if part[0] == "unresolved")
        said += f"; {seeds_to_tell(values, *edges, either=True)}"
    effect = float(np.exp(first.value))
    interval = (float(np.exp(first.low)), float(np.exp(first.high)))
    seeds = table["seed"].nunique()
    said = said[0].upper() + said[1:] + "."
    return Verdict(outcome, said, effect, interval, n_seeds=seeds, effect=effect)


def made(outcome: str, rng: np.random.Generator) -> pd.DataFrame | None:
    """Ratios above 1 that are as good in half the steps, worse and slow, as good but slow, or that
    scatter."""
    gain = -0.1 if outcome == "refuted" else 0.0
    times = 0.5 if outcome == "supported" else 1.5
    wide = outcome == "unresolved"
    out = []
    for ground in ("digits_vit", "planted"):
        swings = rng.permutation([-2.0, -1.0, 0.0, 1.0, 2.0])
        for seed, swing in enumerate(swings * (1.0 if wide else 0.01)):
            for ratio in (1.0, 4.0, 16.0):
                for lr in (1e-3, 3e-3):
                    row = {"ground": ground, "ratio": ratio, "lr": lr, "seed": seed}
                    score = 0.9 - (lr < 3e-3) * 0.01 + (ratio > 1) * (gain + 0.05 * swing)
                    taken = 100 * (1.0 if wide else times) ** (ratio > 1)
                    taken *= np.exp(swing * (ratio > 1)) * (1 + (lr < 3e-3))
                    out.append(row | {"score": score, "validation_score": score, "taken": taken})
    return pd.DataFrame(out).assign(run_id="", status="done", target=0.1)


def figure(table: pd.DataFrame) -> Any:
    """Steps to the target over the rate of B, for each ratio."""
    grounds = sorted(table["ground"].unique())
    picture, [axes] = canvas(4.5 * len(grounds), 4, 1, len(grounds))
    for ax, (ground, own) in zip(axes, table.groupby("ground"), strict=True):
        for ratio, one in own.groupby("ratio"):
            middle = one.groupby("lr")["taken"].mean()
            [line] = ax.plot(middle.index, middle, label=f"ratio {ratio:g}")
            ax.plot(one["lr"], one["taken"], "o", ms=3, alpha=0.5, color=line.get_color())
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xlabel("rate of A")
        ax.set_ylabel("steps to the target loss")
        ax.set_title(str(ground), fontsize=10, loc="left")
        ax.legend(fontsize=8)
    note = (
        "Dots: seeds; lines: means. What counts is the lowest point of each ratio. A run that does "
        "not reach the target stands at its last step."
    )
    return finish(picture, "Steps to a target loss by the ratio of the rates", note)
