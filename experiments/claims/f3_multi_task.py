"""F3: one sum of adapters for several tasks.

Claim: adapters that were trained one for each task serve all of these tasks when they are composed,
W0 + Σ_{k∈S} s_k B_k A_k.

Decided by: four tasks on digits (the classes 5 to 9 as scanned and in two other pixel orders, and 0
to 4 in one of these), an adapter of r = 8 (α = 2r) and a head for each, at the better of two rates;
every subset S of the adapters, summed, scored on each of its tasks with that task's head. The mean
in place of the sum is shown beside it. For pairs: cosine, sign conflicts and input-subspace overlap
of the two updates (means over layers) against the loss.

Test: 95 % t intervals over seeds of the score that a task loses against its adapter alone, averaged
over subsets and tasks: for pairs, and for all four (a part each), below .02 supports, above
refutes. A measure of interference tells the loss apart where the slope of the loss on it (seeds as
blocks) has an interval without 0; that is reported, and decides nothing.

Power: losses are averages of 12 (pairs) or 4 scores; at a spread of .02 between seeds, 5 seeds
place a loss that is .035 from the margin with a chance of .8.

Cost: 40 runs on digits, a second each, 10 of them of the shared grid.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from experiments.curves import seeds_to_tell, spread
from experiments.grids import DIGITS, SEEDS, best
from experiments.swapped import Swapped
from lora_lab.claims import Found, Verdict, against, together
from lora_lab.figures import canvas, finish
from lora_lab.linalg import Update, decompose
from lora_lab.measures import measure
from lora_lab.registry import WrongInput
from lora_lab.stats import blocked_slope

WEIGHTS = True
MARGIN, R = 0.02, 8
MEASURES = ("cosine", "sign_conflict", "overlap")
_LORA = f"adapter=lora adapter.r={R} train.lr=3e-3,1e-2 {SEEDS}"
_TINY = "model=digits_vit model.start= data=digits size=smoke train.epochs=1 data.task=0,1"
SWEEP = {
    "smoke": [f"{_TINY} adapter=lora adapter.r=4"],
    "paper": [
        f"{DIGITS} {_LORA}",
        f"{DIGITS} data.task=1,2 {_LORA}",
        f"{DIGITS} data.classes=lower data.task=1 {_LORA}",
    ],
}


def rows(found: Found) -> pd.DataFrame:
    """Scores of every subset on each of its tasks; for pairs also how their updates interfere."""
    runs = found.runs
    runs = runs.assign(about=runs["data.classes"] + " " + runs["data.task"].astype(int).astype(str))
    own = best(runs, ("about",))
    out = []
    for seed, group in own.groupby("seed"):
        ids = dict(zip(group["about"], group["run_id"], strict=True))
        alone = dict(zip(group["about"], group["score"], strict=True))
        networks = {task: Swapped(found, i) for task, i in ids.items()}
        updates = {task: found.updates(i) for task, i in ids.items()}
        for count in range(1, len(ids) + 1):
            for subset in itertools.combinations(sorted(ids), count):
                shared = {"run_id": "+".join(ids[t] for t in subset), "seed": seed, "count": count}
                shared["subset"] = ", ".join(subset)
                if count == 2:
                    shared |= _interference(*(updates[task] for task in subset))
                for task in subset:
                    parts = [updates[one] for one in subset]
                    row = shared | {"task": task, "alone": alone[task]}
                    row["sum"] = networks[task].score(*parts)
                    out.append(row | {"mean": networks[task].score(*parts, weight=1 / count)})
    columns = ["run_id", "seed", "count", "subset", "task", "alone", "sum", "mean", *MEASURES]
    return pd.DataFrame(out).reindex(columns=columns)


def _interference(one: Mapping[str, Update], other: Mapping[str, Update]) -> dict[str, float]:
    """Means over layers of the measures of two updates."""
    found: dict[str, list[float]] = {name: [] for name in MEASURES}
    for layer in one:
        s, pair = (decompose(own[layer], vectors=True) for own in (one, other))
        both: dict[str, Any] = {"update": one[layer], "pair_update": other[layer]}
        found["cosine"].append(abs(measure("cosine", s, **both)))
        found["sign_conflict"].append(measure("sign_conflict", s, side="weighted", **both))
        k = min(R, np.count_nonzero(s.values), np.count_nonzero(pair.values))
        assert s.Vh is not None
        assert pair.Vh is not None
        found["overlap"].append(float(((s.Vh[:k] @ pair.Vh[:k].T) ** 2).sum() / max(k, 1)))
    return {name: float(np.mean(values)) for name, values in found.items()}


def _lost(table: pd.DataFrame, count: int, way: str = "sum") -> pd.Series:
    """Mean loss of the subsets of a size, by seed."""
    own = table[table["count"] == count]
    return (own["alone"] - own[way]).groupby(own["seed"]).mean()


def _tells(table: pd.DataFrame) -> str:
    """Which measures tell how much a pair loses, in words."""
    told: dict[str, list[str]] = {"more": [], "less": [], "": []}
    for name in MEASURES:
        pairs = table[(table["count"] == 2) & table[name].notna()]
        try:
            found = blocked_slope(pairs[name], pairs["alone"] - pairs["sum"], list(pairs["seed"]))
        except WrongInput:
            continue
        told["more" if found.low > 0 else "less" if found.high < 0 else ""].append(
            name.replace("_", " ")
        )
    said = [f"pairs with more {w} lose {how}" for how, of in told.items() if how for w in of]
    if told[""]:
        said.append(f"how much a pair loses is not told by its {' or its '.join(told[''])}")
    return "; ".join(said)


def verdict(table: pd.DataFrame) -> Verdict:
    """What a task loses in pairs, and among all."""
    most = int(table["count"].max())
    found = {count: spread(_lost(table, count)) for count in (2, most)}
    outcome = together(against(one, MARGIN, more=False) for one in found.values())
    pair, every = found[2], found[most]
    own = table[table["count"] == most]
    said = (
        f"A task loses {100 * pair.value:.1f} points [{100 * pair.low:.1f}, {100 * pair.high:.1f}] "
        f"of {100 * table['alone'].mean():.0f} when its adapter is summed with one other, and "
        f"{100 * every.value:.1f} [{100 * every.low:.1f}, {100 * every.high:.1f}] with "
        f"{most - 1} others (down to {own['sum'].mean():.2f}; averaged in place of summed "
        f"{100 * _lost(table, 2, 'mean').mean():.1f} and "
        f"{100 * _lost(table, most, 'mean').mean():.1f}); {_tells(table)}"
    )
    if outcome == "unresolved":
        said += f"; {seeds_to_tell(_lost(table, 2), MARGIN)}"
    seeds = table["seed"].nunique()
    return Verdict(outcome, said + ".", pair.value, pair[1:], n_seeds=seeds, effect=pair.value)


def made(outcome: str, rng: np.random.Generator) -> pd.DataFrame:
    """Nothing lost; much lost; nothing in pairs alone; or scatter about the margin."""
    pair, every = {
        "supported": (0.0, 0.0),
        "refuted": (0.3, 0.6),
        "mixed": (0.0, 0.5),
        "unresolved": (MARGIN, MARGIN),
    }[outcome]
    # Symmetric, so that no draw of few seeds can decide what is undecided.
    wide = np.array([-1.0, 1.0, 0.5, -0.5, 0.0]) * (0.05 if outcome == "unresolved" else 0.002)
    rows = []
    for seed, subset in itertools.product(range(5), ("ab", "ac", "bc", "abc")):
        for task in subset:
            lost = (pair if len(subset) == 2 else every) + wide[seed]
            row = {"seed": seed, "count": len(subset), "subset": subset, "task": task}
            row |= {"alone": 0.9, "sum": 0.9 - lost, "mean": 0.9 - lost / 2}
            rows.append(row | dict(zip(MEASURES, rng.uniform(0, 1, 3), strict=True)))
    return pd.DataFrame(rows)


def figure(table: pd.DataFrame) -> Any:
    """Loss over the number of adapters in the sum, and of pairs over the overlap."""
    picture, [[left, right]] = canvas(9.5, 4, 1, 2)
    counts = sorted(table["count"].unique())
    for way, colour in (("sum", "#0072b2"), ("mean", "#d55e00")):
        lost = [_lost(table, count, way) for count in counts]
        for count, values in zip(counts, lost, strict=True):
            left.plot([count] * len(values), values, "o", ms=3, color=colour, alpha=0.6)
        left.plot(counts, [values.mean() for values in lost], color=colour, label=way)
    left.axhline(MARGIN, color="grey", lw=1, ls="--")
    left.set_xticks(counts)
    left.set_xlabel("adapters on the base")
    left.set_ylabel("score that a task loses")
    left.legend(fontsize=8)
    pairs = table[table["count"] == 2]
    for subset, own in pairs.groupby("subset"):
        right.plot(own["overlap"], own["alone"] - own["sum"], "o", ms=4, label=str(subset))
    right.axhline(MARGIN, color="grey", lw=1, ls="--")
    right.set_xlabel("overlap of the two updates' input subspaces")
    right.set_ylabel("score that a task of a pair loses")
    right.legend(fontsize=7)
    note = (
        "Left: composed adapters serve their tasks if the lines stay under the dashed one. Right: "
        "a rise means that overlap tells which pairs interfere. Points: seeds (left), tasks of a "
        "seed."
    )
    return finish(picture, "What composing adapters costs their tasks", note)
