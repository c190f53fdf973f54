"""D4: r and the distance between source and target.

Claim: r = 1 to 4 is enough when source and target are close, r ≥ 32 is needed when they are far.

Decided by: a network pre-trained on the digits 0 to 4, fine-tuned on 5 to 9 as they are (near) and
with their pixels in another fixed order, another one a seed (far); test score of LoRA (α = 2r) less
that of full fine-tuning, each at the best of its learning rates.

Test: over seeds. Near, r = 4 is enough: the 90 % t interval of LoRA − full lies above −.02 (one
side of an equivalence test; being better does not count against it). Far, r = 4 is not enough: the
same interval lies below −.02; far, r = 32 is enough: above −.02.

Power: at a spread of .012 between paired seeds, 5 seeds place a difference that is .02 from the
margin with a chance of .8; tasks differ more than seeds. Five left all three parts open (the far
ones within ±1.4 and ±2.7 points) and asked for 7; there are 8.

Cost: 104 runs on digits far, and 48 near beyond those of the shared grid, a second or two each.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from experiments.grids import CELL, DIGITS, RATES, SEEDS, best, full, lora, seeds
from lora_lab.claims import Found, Verdict, against, together
from lora_lab.figures import canvas, finish
from lora_lab.registry import WrongInput
from lora_lab.stats import paired, t_interval, units_needed

MARGIN, LOW, HIGH = 0.02, 4, 32
TASKS = 8
# A task of its own for each seed, so that the intervals cover tasks.
FAR = [f"{DIGITS} data.task={seed + 1} seed={seed}" for seed in range(TASKS)]
FAR_FULL = [f"{line} adapter=full train.lr={RATES[DIGITS]['full']}" for line in FAR]
_FAR_LORA = [
    f"{line} adapter=lora adapter.r=1,{LOW},{HIGH} train.lr=3e-3,1e-2,3e-2" for line in FAR
]
_NEAR = [full(DIGITS), lora(DIGITS, f"1,{LOW},{HIGH}")]
_TINY = "model=digits_vit model.start= data=digits size=smoke train.epochs=1 data.task=0,1"
SWEEP = {
    "smoke": [f"{_TINY} adapter=full", f"{_TINY} adapter=lora adapter.r=4"],
    "paper": [
        *(line.replace(SEEDS, seeds(TASKS)) for line in _NEAR),
        *FAR_FULL,
        *_FAR_LORA,
    ],
}


def rows(found: Found) -> pd.DataFrame:
    """Scores at the best rates, near and far."""
    runs = found.runs
    far = runs["data.task"].astype(float) > 0
    runs = runs.assign(shift=np.where(far, "far", "near"))
    own = best(runs, (*CELL, "shift"))
    own = own[(own["adapter"] == "full") | (own["adapter.alpha"] == 2 * own["adapter.r"])]
    own = own.rename(columns={"adapter.r": "r", "train.lr": "lr", "data.task": "task"})
    return own[["run_id", "shift", "task", "adapter", "r", "seed", "score", "lr", "edge"]]


def _lags(table: pd.DataFrame, shift: str) -> pd.DataFrame:
    """LoRA − full: a row for each seed, a column for each r."""
    own = table[table["shift"] == shift]
    low = own[own["adapter"] == "lora"].pivot_table(index="seed", columns="r", values="score")
    whole = own[own["adapter"] == "full"].set_index("seed")["score"]
    return low.sub(whole, axis=0).dropna(how="all")


def verdict(table: pd.DataFrame) -> Verdict:
    """Near, low r is enough; far, low r is not, and high r is."""
    wanted = [("near", LOW, True), ("far", LOW, False), ("far", HIGH, True)]
    parts, words, lags = [], [], []
    for shift, r, enough in wanted:
        found = _lags(table, shift)
        lag = found[r].dropna() if r in found else pd.Series(dtype=float)
        span = t_interval(lag, level=0.9)
        lags.append(lag)
        parts.append(against(span, -MARGIN, more=enough))
        words.append(
            f"{shift} at r = {r} {100 * span.value:+.1f} [{100 * span.low:.1f}, "
            f"{100 * span.high:.1f}] (claimed {'' if enough else 'not '}enough: {parts[-1]})"
        )
    said = f"LoRA − full in points with 90 % intervals: {', '.join(words)}"
    edges = table.loc[table["edge"].astype(bool), ["shift", "adapter", "r"]].drop_duplicates()
    said += f"; {len(edges)} best rates lie at the edge of their grid" * bool(len(edges))
    outcome, far = together(parts), lags[1]
    if outcome == "unresolved":
        said += f"; {_needed(far)}"
    span, n = t_interval(far), table["seed"].nunique()
    p = paired(far, null=-MARGIN).p if len(far) else np.nan
    return Verdict(outcome, said + ".", span.value, span[1:], p, n_seeds=n, effect=span.value)


def _needed(lag: pd.Series) -> str:
    spread = float(lag.std()) if len(lag) > 1 else 0.0
    if not spread > 0:
        return "a spread needs at least 2 seeds"
    try:
        return (
            f"{units_needed(MARGIN, spread)} tasks would place one that is {MARGIN} off the margin"
        )
    except WrongInput as error:
        return str(error).rstrip(".")


def made(outcome: str, rng: np.random.Generator) -> pd.DataFrame | None:
    """Lags of full fine-tuning as claimed, the other way round, of the near part only, or noise."""
    near, far, high = {
        "supported": (0.0, 0.1, 0.0),
        "refuted": (0.1, 0.0, 0.1),
        "mixed": (0.0, 0.0, 0.0),
        "unresolved": (0.02, 0.02, 0.02),
    }[outcome]
    scatter = 0.03 if outcome == "unresolved" else 0.002
    cells = [("near", "full", np.nan, 0.0), ("far", "full", np.nan, 0.0)]
    cells += [("near", "lora", LOW, near), ("near", "lora", HIGH, 0.0)]
    cells += [("far", "lora", LOW, far), ("far", "lora", HIGH, high)]
    return pd.DataFrame(
        [
            {
                "shift": shift,
                "adapter": adapter,
                "r": r,
                "seed": seed,
                "task": float(shift == "far"),
            }
            | {"score": 0.9 - lag + scatter * rng.standard_normal()}
            for shift, adapter, r, lag in cells
            for seed in range(5)
        ]
    ).assign(lr=1e-2, edge=False)


def figure(table: pd.DataFrame) -> Any:
    """LoRA less full fine-tuning over r, near and far."""
    picture, [[ax]] = canvas(6.5, 4)
    for shift, colour, aside in (("near", "#0072b2", 0.97), ("far", "#d55e00", 1.03)):
        lags = _lags(table, shift)
        spans = [t_interval(lags[r].dropna(), level=0.9) for r in lags]
        spread = np.nan_to_num([[s.value - s.low, s.high - s.value] for s in spans])
        x, y = aside * lags.columns.to_numpy(float), [s.value for s in spans]
        ax.errorbar(x, y, spread.reshape(-1, 2).T, marker="o", color=colour, label=shift)
    ax.axhline(0, color="grey", lw=1)
    ax.axhline(-MARGIN, color="grey", lw=1, ls="--")
    ax.set_xscale("log")
    ranks = sorted(table["r"].dropna().unique())
    ax.set_xticks(ranks, [f"{r:g}" for r in ranks])
    ax.set_xlabel("r")
    ax.set_ylabel("test score, LoRA − full")
    ax.legend(fontsize=8, loc="lower right")
    note = (
        f"Enough is what lies above the dashed line ({MARGIN} below full) with its whole 90 % "
        "interval over seeds. Far: pixels in another order, another one a seed."
    )
    return finish(picture, "What r a near and a far task need", note)
