"""D2: which layers to adapt.

Claim: adapting Q and V reaches 95 % of the quality of full fine-tuning, Q, K, V and O 98 %, all
attention and MLP layers 100 %.

Decided by: digits, test score by target set (q,v; q,k; q,k,v,o; all) at r = 4, and at the parameter
count of all layers at r = 4 (q,v and q,k at 18, q,k,v,o at 9), each at the best of three rates. The
text does not say what quality is: the raw score, and the gap between head alone and full
fine-tuning, are both read.

Test: at equal r, per reading and set: the 95 % t interval over seeds of score − floor − share ×
(full − floor), with floor = 0 (raw) or the head's score (gap), above 0: at least that share;
refuted below 0. For all layers (100 %) an equivalence margin of .02 is allowed. At equal parameters
the same is shown and does not decide.

Power: at a spread of .012 between paired seeds, 5 seeds show a distance of .02 from a threshold
with a chance of .8.

Cost: 90 runs on digits, a second each; full fine-tuning, head and all layers are of the shared
grid.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from experiments.grids import CELL, DIGITS, SEEDS, best, full, head
from lora_lab.claims import Found, Verdict, against, together
from lora_lab.figures import canvas, finish
from lora_lab.registry import WrongInput
from lora_lab.stats import Interval, paired, t_interval, units_needed

RATES = "3e-3,1e-2,3e-2"
EQUAL_R = {"qv": 4, "qk": 4, "qkvo": 4, "all": 4}
EQUAL_PARAMETERS = {"qv": 18, "qk": 18, "qkvo": 9, "all": 4}
SHARES = {"qv": 0.95, "qkvo": 0.98, "all": 1.0}
MARGIN = 0.02
"""Allowed where 100 % is claimed: nothing can be shown to be exactly as good."""


def _line(targets: str, r: int) -> str:
    own = "" if targets == "all" else f" adapter.targets={targets}"
    return f"{DIGITS} adapter=lora adapter.r={r}{own} train.lr={RATES} {SEEDS}"


_SETS = dict.fromkeys([*EQUAL_R.items(), *EQUAL_PARAMETERS.items()])
SWEEP = {
    "smoke": [
        "model=planted data=planted size=smoke adapter=full",
        "model=planted data=planted size=smoke adapter=lora adapter.r=4 adapter.targets=all,qv",
    ],
    "paper": [head(DIGITS), full(DIGITS), *(_line(*one) for one in _SETS)],
}


def rows(found: Found) -> pd.DataFrame:
    """Scores at the best rates, by target set and r."""
    runs = best(found.runs, (*CELL, "adapter.targets"))
    names = {"adapter.targets": "targets", "adapter.r": "r", "train.lr": "lr"}
    own = runs.rename(columns=names)
    own.loc[own["adapter"] != "lora", "targets"] = ""
    columns = ["run_id", "adapter", "targets", "r", "seed", "score", "adapter_parameters"]
    return own[[*columns, "lr", "edge"]]


def _of(table: pd.DataFrame, adapter: str) -> pd.Series:
    return table[table["adapter"] == adapter].set_index("seed")["score"]


def _set(table: pd.DataFrame, targets: str, r: int) -> pd.Series:
    own = table[(table["adapter"] == "lora") & (table["targets"] == targets) & (table["r"] == r)]
    return own.set_index("seed")["score"]


def _floor(table: pd.DataFrame, reading: str) -> pd.Series:
    if reading == "gap":
        return _of(table, "head")
    return 0 * _of(table, "full")


def _beyond(table: pd.DataFrame, targets: str, r: int, reading: str) -> pd.Series:
    """Score above the claimed share of what full fine-tuning reaches, by seed."""
    whole, floor = _of(table, "full"), _floor(table, reading)
    share = SHARES[targets]
    left = _set(table, targets, r) - floor - share * (whole - floor)
    return (left + MARGIN * (share == 1)).dropna()


def _share(table: pd.DataFrame, targets: str, r: int, reading: str) -> float:
    """Share of full fine-tuning's quality that a set reaches, of means over seeds."""
    floor = float(_floor(table, reading).mean())
    gap = float(_of(table, "full").mean()) - floor
    return (float(_set(table, targets, r).mean()) - floor) / gap if gap else np.nan


def verdict(table: pd.DataFrame) -> Verdict:
    """Three shares in two readings."""
    parts, clauses = [], []
    for reading in ("raw", "gap"):
        words = []
        for targets, claimed in SHARES.items():
            left = t_interval(_beyond(table, targets, EQUAL_R[targets], reading))
            parts.append(against(left, 0.0))
            share = _share(table, targets, EQUAL_R[targets], reading)
            words.append(f"{targets} {share:.1%} (claimed {claimed:.0%}, {parts[-1]})")
        clauses.append(f"of the {reading} score " + ", ".join(words))
    better = [
        _set(table, "all", ranks["all"]) - _set(table, "qv", ranks["qv"])
        for ranks in (EQUAL_R, EQUAL_PARAMETERS)
    ]
    ahead = [t_interval(one.dropna()) for one in better]
    said = f"At r = 4: {'; '.join(clauses)}; all layers beat q,v by " + " and by ".join(
        f"{100 * gain.value:.1f} [{100 * gain.low:.1f}, {100 * gain.high:.1f}] points at equal {by}"
        for gain, by in zip(ahead, ("r", "parameters"), strict=True)
    )
    edges = table.loc[table["edge"].astype(bool), ["adapter", "targets", "r"]].drop_duplicates()
    said += f"; {len(edges)} best rates lie at the edge of their grid" * bool(len(edges))
    outcome = together(parts)
    deciding = _beyond(table, "qv", EQUAL_R["qv"], "gap")
    if outcome == "unresolved":
        said += f"; {_needed(deciding)}"
    found: Interval = t_interval(deciding)
    p = paired(deciding).p if len(deciding) else np.nan
    seeds = table["seed"].nunique()
    return Verdict(outcome, said + ".", found.value, found[1:], p, seeds, effect=found.value)


def _needed(left: pd.Series) -> str:
    spread = float(left.std()) if len(left) > 1 else 0.0
    if not spread > 0:
        return "a spread needs at least 2 seeds"
    try:
        return f"{units_needed(MARGIN, spread)} seeds would show a distance of {MARGIN}"
    except WrongInput as error:
        return str(error).rstrip(".")


def made(outcome: str, rng: np.random.Generator) -> pd.DataFrame | None:
    """All sets near full, all far below, near in the raw score alone, or noise."""
    scatter = {"unresolved": 0.1}.get(outcome, 0.002)
    floor = 0.8 if outcome == "mixed" else 0.1
    share = {"supported": 1.0, "refuted": 0.5, "mixed": 0.7, "unresolved": 0.96}[outcome]
    frames = [("head", "", np.nan, floor), ("full", "", np.nan, 0.9)]
    sets = [*EQUAL_R.items(), *EQUAL_PARAMETERS.items()]
    frames += [("lora", name, r, floor + share * (0.9 - floor)) for name, r in dict.fromkeys(sets)]
    rows_ = [
        {"adapter": adapter, "targets": targets, "r": r, "seed": seed}
        | {"score": level + scatter * rng.standard_normal()}
        for adapter, targets, r, level in frames
        for seed in range(5)
    ]
    return pd.DataFrame(rows_).assign(adapter_parameters=4608, lr=1e-2, edge=False)


def figure(table: pd.DataFrame) -> Any:
    """Scores by target set at equal r and at equal parameters, and what is claimed."""
    picture, axes = canvas(10, 4, 1, 2, sharey=True)
    whole, floor = _of(table, "full").mean(), _of(table, "head").mean()
    named = (("r = 4", EQUAL_R), ("the parameters of all at r = 4", EQUAL_PARAMETERS))
    for ax, (title, ranks) in zip(axes[0], named, strict=True):
        for x, (targets, r) in enumerate(ranks.items()):
            scores = _set(table, targets, r).dropna()
            mean, low, high = t_interval(scores)
            spread = np.nan_to_num([[mean - low], [high - mean]])
            ax.errorbar([x], [mean], spread, marker="o", color="#0072b2")
            ax.scatter(np.full(len(scores), x + 0.15), scores, s=8, color="#999999")
            if targets in SHARES:
                raw, gap = SHARES[targets] * whole, floor + SHARES[targets] * (whole - floor)
                ax.plot([x - 0.3, x + 0.3], [raw] * 2, color="#d55e00", lw=1.5)
                ax.plot([x - 0.3, x + 0.3], [gap] * 2, color="#d55e00", lw=1.5, ls=":")
        ax.axhline(whole, color="grey", lw=1)
        ax.set_xticks(range(len(ranks)), [f"{t}\nr = {r}" for t, r in ranks.items()], fontsize=8)
        ax.set_title(title, fontsize=10, loc="left")
    axes[0][0].set_ylabel("test score")
    note = (
        "Grey line: full fine-tuning. Orange: the claimed share of its raw score (whole) and of "
        "its gap to the head alone (dotted). Bars: 95 % t intervals; grey points: seeds."
    )
    return finish(picture, "Which layers to adapt", note)
