"""C10: the knee of the error over r.

Claim: the approximation error falls sharply until the true rank and slowly after it.

Decided by: planted problems whose update has rank 8, another one a seed: the share of dW*'s energy
that is missed, ‖dW − dW*‖²/‖dW*‖², over r = 1 … 16 for trained LoRA (α = 2r) and for the truncation
of the full update (oracle); with equal singular values without noise and with noise three times the
signal, and with σ ∝ .7^i. The bound Σ_{i>r} σ*_i² shows how far training is from the best.

Test: for each of the six curves the knee is the corner k of the least-squares line with one bend,
among half-integer k in [1.5, 15]. It is at the true rank if the 95 % t interval over seeds lies
within 8 ± 1, and elsewhere if it lies outside; a knee that is the same in all seeds has an interval
of no length.

Power: problems differ little (six layers each), so the knee varies by less than one r between
seeds; 5 seeds tell one at 8 from one at 6.

Cost: 120 runs on planted of width 64, a second each. One learning rate for all r: whether LoRA
comes near the least possible error at each r is seen in the table, a check that no comparison of
scores has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from experiments.grids import PLANTED, SEEDS
from lora_lab.claims import Found, Verdict, together
from lora_lab.data.planted import PlantedData
from lora_lab.figures import canvas, finish
from lora_lab.linalg import Factored, Update, decompose
from lora_lab.stats import Interval, t_interval

TRUE, RANKS = 8, (1, 3, 5, 7, 8, 10, 16)
KNEES = np.arange(1.5, 15.1, 0.5)
CONDITIONS = {
    "flat": "data.noise=0",
    "flat, noise": "data.noise=3",
    "decaying": "data.noise=0 data.decay=0.7",
}
_ALL = f"{PLANTED} data.width=64 data.true_r={TRUE} data.seed=${{seed}} train.epochs=8 {SEEDS}"
_TINY = f"model=planted data=planted size=smoke data.width=64 data.true_r={TRUE}"
SWEEP = {
    "smoke": [f"{_TINY} adapter=full", f"{_TINY} adapter=lora adapter.r=4,8"],
    "paper": [
        line
        for own in CONDITIONS.values()
        for line in (
            f"{_ALL} {own} adapter=full train.lr=3e-3",
            f"{_ALL} {own} adapter=lora adapter.r={','.join(map(str, RANKS))} train.lr=1e-2",
        )
    ],
}
WEIGHTS = True


def rows(found: Found) -> pd.DataFrame:
    """Missed energy of trained LoRA and of the truncated full update, and the least possible."""
    out = []
    for run in found.runs[found.runs["status"] == "done"].to_dict("records"):
        data = PlantedData(
            seed=int(run["data.seed"]),
            true_r=int(run["data.true_r"]),
            decay=run["data.decay"],
            strength=run["data.strength"],
            noise=run["data.noise"],
            width=int(run["data.width"]),
        )
        condition = "decaying" if data.decay < 1 else "flat, noise" if data.noise > 0 else "flat"
        about = {"run_id": run["run_id"], "seed": run["seed"], "condition": condition}
        updates = found.updates(run["run_id"])
        teachers = {layer: data.teacher(layer) for layer in updates}
        truth = {n: Factored(t.U * t.s, t.Vh).dense() for n, t in teachers.items()}
        total = sum(float((t.s**2).sum()) for t in teachers.values())
        if run["adapter"] == "full":
            spectra = {n: decompose(u, vectors=True) for n, u in updates.items()}
            tried: dict[int, Mapping[str, Update]]
            tried = {r: {n: s.truncate(r) for n, s in spectra.items()} for r in RANKS}
        else:
            tried = {int(run["adapter.r"]): updates}
        for r, own in tried.items():
            missed = sum(float(((u.dense() - truth[n]) ** 2).sum()) for n, u in own.items())
            least = sum(float((t.s[r:] ** 2).sum()) for t in teachers.values())
            curve = "oracle" if run["adapter"] == "full" else "lora"
            out.append(about | {"curve": curve, "r": r, "missed": missed / total})
            out[-1]["least"] = least / total
    return pd.DataFrame(out)


def _knee(own: pd.DataFrame) -> float:
    """Where the best line with one bend through missed over r has its corner."""
    r, y = own["r"].to_numpy(float), own["missed"].to_numpy(float)
    if len(r) < 5:
        return np.nan
    left = [_bent(r, y, k)[1] for k in KNEES]
    return float(KNEES[int(np.argmin(left))])


def _bent(r: np.ndarray, y: np.ndarray, k: float) -> tuple[np.ndarray, float]:
    """Least squares y = a + b min(r, k) + c max(r − k, 0): coefficients and residual."""
    columns = np.stack([np.ones_like(r), np.minimum(r, k), np.maximum(r - k, 0)], axis=1)
    found = np.linalg.lstsq(columns, y, rcond=None)[0]
    return found, float(((columns @ found - y) ** 2).sum())


def _knees(table: pd.DataFrame) -> dict[tuple[str, str], list[float]]:
    """Knees of each curve by seed."""
    out: dict[tuple[str, str], list[float]] = {}
    for (condition, curve, _), own in table.groupby(["condition", "curve", "seed"]):
        out.setdefault((str(condition), str(curve)), []).append(_knee(own))
    return {name: [k for k in knees if np.isfinite(k)] for name, knees in out.items()}


def _outcome(found: Interval) -> str:
    """Whether a knee's interval lies within ±1 of the true rank or outside."""
    if found.low >= TRUE - 1 and found.high <= TRUE + 1:
        return "supported"
    return "refuted" if found.high < TRUE - 1 or found.low > TRUE + 1 else "unresolved"


def verdict(table: pd.DataFrame) -> Verdict:
    """A knee for each curve."""
    knees = {name: t_interval(values) for name, values in _knees(table).items()}
    parts = {name: _outcome(found) for name, found in knees.items()}
    words = [
        f"{curve}, {condition}: {found.value:.1f} [{found.low:.1f}, {found.high:.1f}]"
        for (condition, curve), found in knees.items()
    ]
    trained = table[(table["curve"] == "lora") & (table["r"] == TRUE)]
    excess = (trained["missed"] - trained["least"]).groupby(trained["condition"]).mean()
    said = f"The error's knee, where the true rank is {TRUE}, is at {'; '.join(words)}"
    if len(excess):
        said += "; LoRA of the true rank misses " + ", ".join(
            f"{share:.1%} of the energy ({condition})" for condition, share in excess.items()
        )
    low = table[table["curve"] == "lora"]
    by = low.pivot_table(index="condition", columns="r", values="missed")
    if {TRUE, RANKS[-1]} <= set(by):
        after = (by[RANKS[-1]] - by[TRUE]).dropna()
        said += f"; from there to r = {RANKS[-1]} this changes by " + ", ".join(
            f"{100 * change:+.1f} points ({condition})" for condition, change in after.items()
        )
    outcome = together(parts.values())
    if outcome == "unresolved":
        wide = max((found.high - found.low for found in knees.values()), default=np.nan)
        n = max((len(values) for values in _knees(table).values()), default=0)
        more = f"about {int(np.ceil(n * wide**2))} seeds" if wide > 0 else "at least 2 seeds"
        said += f"; an interval of length 1 takes {more}"
    found = knees.get(("flat", "lora"), t_interval([]))
    seeds = table["seed"].nunique()
    return Verdict(outcome, said + ".", found.value, found[1:], n_seeds=seeds, effect=found.value)


def made(outcome: str, rng: np.random.Generator) -> pd.DataFrame | None:
    """Errors that bend at 8, at 4, at 4 where the spectrum decays, or at another r each seed."""
    out = []
    for condition in CONDITIONS:
        for curve in ("oracle", "lora"):
            for seed in range(5):
                knee = 4.0 if outcome == "refuted" else float(TRUE)
                knee = 4.0 if outcome == "mixed" and condition == "decaying" else knee
                knee = float((4, 6, 8, 10, 12)[seed]) if outcome == "unresolved" else knee
                for r in RANKS:
                    missed = max(1 - r / knee, 0.0) + 0.003 * abs(rng.standard_normal())
                    row = {"condition": condition, "curve": curve, "seed": seed, "r": r}
                    out.append(row | {"missed": missed, "least": max(1 - r / TRUE, 0.0)})
    return pd.DataFrame(out)


def figure(table: pd.DataFrame) -> Any:
    """Missed energy over r, with the knees."""
    conditions = [name for name in CONDITIONS if name in set(table["condition"])]
    picture, axes = canvas(4 * len(conditions), 4, 1, len(conditions), sharey=True)
    knees = _knees(table)
    for ax, condition in zip(axes[0], conditions, strict=True):
        own = table[table["condition"] == condition]
        least = own.groupby("r")["least"].mean()
        ax.plot(least.index, least, color="grey", ls=":", label="least possible")
        for curve, cell in own.groupby("curve"):
            colour = {"oracle": "#d55e00", "lora": "#0072b2"}[str(curve)]
            mean = cell.groupby("r")["missed"].mean()
            at = knees.get((condition, str(curve)), [])
            label = f"{curve}, knee {np.mean(at):.1f}" if at else str(curve)
            ax.plot(mean.index, mean, marker="o", ms=4, color=colour, label=label)
            ax.scatter(cell["r"], cell["missed"], s=6, color=colour, alpha=0.4)
        ax.axvline(TRUE, color="grey", lw=1, ls="--")
        ax.set_xlabel("r")
        ax.set_title(condition, fontsize=10, loc="left")
        ax.legend(fontsize=8)
    axes[0][0].set_ylabel("share of the true update's energy missed")
    note = (
        "Dashed: the true rank. Oracle: the full update truncated. Lines: means over problems; "
        "points: problems, one a seed."
    )
    return finish(picture, "Where the error bends", note)
