"""C6: the rank of the update over training and over the distance of the target.

Claim: the rank of the update grows with the length of training and with the shift of the domain.

Decided by: full fine-tuning on digits at one rate (2e-3), mean effective_rank and energy_rank(.9)
over layers: at log-spaced steps inside runs of 30 epochs, from the end of the warm-up on (Adam's
first steps are of high rank because they equalise the entries of the gradient); at the end of runs
of 1, 3, 10 and 30 epochs; and at the end of ten epochs on five far tasks (pixels in another order,
one a seed) against the near task. Planted problems (update of rank 16, σ ∝ .8^i) are trained beside
them for 1 to 27 epochs, where the true rank says whether what is added is signal.

Test: 95 % intervals, for effective_rank and for energy_rank apart. Inside runs and over run
lengths, on digits and on planted: mean over seeds of the slope of the logarithm on ln step and
ln epochs, above 0. Shift: t interval of the difference of logarithms, far − near, above 0. Below 0
refutes.

Power: ranks vary by 1 to 2 % between seeds, so 5 seeds show a change of 4 % with a chance of .8.

Cost: 20 runs on digits and 20 on planted, a second each; the far ones are shared with D4.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from experiments.claims.d4_task_shift import FAR
from experiments.curves import slopes, spread
from experiments.grids import DIGITS, PLANTED, SEEDS
from lora_lab.claims import Found, Verdict, against, together
from lora_lab.figures import canvas, finish
from lora_lab.registry import WrongInput
from lora_lab.stats import Interval, t_interval, units_needed

_DIGITS, _PLANTED = (g.replace("train.spectra=0", "train.spectra=8") for g in (DIGITS, PLANTED))
_DIGITS = _DIGITS.replace("train.epochs=10", "train.epochs=1,3,10,30")
SWEEP = {
    "smoke": [
        "model=digits_vit model.start= data=digits size=smoke data.task=0,1 adapter=full",
    ],
    "paper": [
        f"{_DIGITS} adapter=full train.lr=2e-3 {SEEDS}",
        *(f"{line} adapter=full train.lr=2e-3" for line in FAR[:5]),
        f"{_PLANTED} data.width=64 data.true_r=16 data.decay=0.8 data.noise=0.5 "
        f"data.seed=${{seed}} train.epochs=1,3,9,27 adapter=full train.lr=3e-3 {SEEDS}",
    ],
}
WARM = 0.1
"""Share of a run's steps over which the rate rises, `train.warmup`."""
RANKS = ("effective_rank", "energy_rank")
GROUNDS = ("digits_vit", "planted")


def rows(found: Found) -> pd.DataFrame:
    """Mean ranks over layers at every stored step."""
    measured = found.measures
    own = measured[
        measured["measure"].isin(RANKS) & (measured["k"].isna() | (measured["k"] == 0.9))
    ]
    means = own.groupby(["run_id", "step", "measure"])["value"].mean().unstack("measure")
    names = {"train.epochs": "epochs"}
    runs = found.runs[found.runs["status"] == "done"].rename(columns=names)
    task = runs["data.task"] if "data.task" in runs else pd.Series(0.0, runs.index)
    runs = runs.assign(shift=np.where(task.fillna(0).astype(float) > 0, "far", "near"))
    columns = ["run_id", "model", "shift", "epochs", "seed", "score"]
    table = means.reset_index().merge(runs[columns], on="run_id")
    return table.assign(last=table["step"] == table.groupby("run_id")["step"].transform("max"))


def _slope(own: pd.DataFrame, x: str, measure: str) -> Interval:
    own = own[(own[measure] > 0) & (own[x] > 0)]
    logs = own.assign(x=np.log(own[x]), y=np.log(own[measure]))
    return spread(slopes(logs, "x", "y"))


def _shift(table: pd.DataFrame, measure: str) -> pd.Series:
    """ln rank on the far task − on the near one, after equal training, by seed."""
    own = table[(table["model"] == "digits_vit") & table["last"].astype(bool)]
    far = own[own["shift"] == "far"]
    own = own[own["epochs"].isin(far["epochs"])]
    by = own.pivot_table(index="seed", columns="shift", values=measure)
    if not {"far", "near"} <= set(by):
        return pd.Series(dtype=float)
    return pd.Series(np.log(by["far"] / by["near"])).dropna()


def _numbers(table: pd.DataFrame, measure: str) -> dict[str, Interval]:
    """Slopes inside runs and over run lengths on each ground, and the shift."""
    found = {}
    for model in GROUNDS:
        own = table[(table["shift"] == "near") & (table["model"] == model)]
        longest = own[own["epochs"] == own["epochs"].max()]
        longest = longest[longest["step"] >= WARM * longest["step"].max()]
        found[f"inside {model}"] = _slope(longest, "step", measure)
        found[f"over {model}"] = _slope(own[own["last"].astype(bool)], "epochs", measure)
    found["shift"] = t_interval(_shift(table, measure))
    return found


def verdict(table: pd.DataFrame) -> Verdict:
    """Five statements by each of two ranks."""
    parts, clauses = [], []
    for measure in RANKS:
        found = _numbers(table, measure)
        parts += [against(one, 0.0) for one in found.values()]
        inside, over = (
            " and ".join(
                f"{one.value:+.2f} [{one.low:.2f}, {one.high:.2f}] on {model}"
                for model in GROUNDS
                for one in [found[f"{where} {model}"]]
            )
            for where in ("inside", "over")
        )
        far = 100 * np.expm1(np.array(found["shift"]))
        clauses.append(
            f"{measure} goes with the steps of a run to the power {inside}, with the number of "
            f"epochs to the power {over}, and is {far[0]:+.0f} % [{far[1]:.0f}, {far[2]:.0f}] on a "
            "far task"
        )
    outcome, shift = together(parts), _shift(table, RANKS[0])
    said = f"{parts.count('supported')} of {len(parts)} parts hold: {'; '.join(clauses)}"
    if outcome == "unresolved":
        said += f"; {_needed(shift)}"
    main = _numbers(table, RANKS[0])["over digits_vit"]
    seeds = table["seed"].nunique()
    return Verdict(outcome, said + ".", main.value, main[1:], n_seeds=seeds, effect=main.value)


def _needed(shift: pd.Series) -> str:
    spread = float(shift.std()) if len(shift) > 1 else 0.0
    if not spread > 0:
        return "a spread needs at least 2 seeds"
    try:
        return f"{units_needed(0.05, spread)} seeds would show a shift of 5 %"
    except WrongInput as error:
        return str(error).rstrip(".")


def made(outcome: str, rng: np.random.Generator) -> pd.DataFrame | None:
    """Ranks that grow, that shrink, that grow on one ground alone, or that scatter too widely."""
    power = {"supported": 0.3, "refuted": -0.3, "mixed": 0.3, "unresolved": 0.0}[outcome]
    scatter = 0.5 if outcome == "unresolved" else 0.02
    cells = [(m, "near", e) for m in GROUNDS for e in (1, 3, 10, 30)] + [("digits_vit", "far", 10)]
    out = []
    for model, shift, epochs in cells:
        sign = -1 if outcome == "mixed" and model == "planted" else 1
        more = power * (shift == "far")
        for part in (0.1, 0.4, 1.0):
            # Seeds whose noise sums to 0: nothing to find is not found by chance.
            for seed, noise in enumerate(scatter * rng.permutation(np.linspace(-1.5, 1.5, 5))):
                step = max(1, round(16 * epochs * part))
                rank = 10 * step ** (sign * power) * np.exp(more + noise)
                row = {"model": model, "shift": shift, "epochs": epochs, "seed": seed, "step": step}
                out.append(row | {"effective_rank": rank, "energy_rank": rank, "last": part == 1})
    return pd.DataFrame(out).assign(score=0.9)


def figure(table: pd.DataFrame) -> Any:
    """Ranks over steps, near and far."""
    picture, axes = canvas(10, 4, 1, 2)
    for ax, model in zip(axes[0], GROUNDS, strict=True):
        own = table[table["model"] == model]
        cells = own.groupby(["shift", "epochs"], sort=False)
        for (shift, epochs), cell in cells:
            far = {"color": "#d55e00", "marker": "s"} if shift == "far" else {"marker": "o"}
            mean = cell.groupby("step")[RANKS[0]].mean()
            label = f"{shift}, {epochs:g} epochs"
            line = ax.plot(mean.index, mean, ms=4, label=label, **far)[0]
            ax.scatter(cell["step"], cell[RANKS[0]], s=6, color=line.get_color(), alpha=0.4)
        ax.set_xscale("log")
        ax.set_xlabel("optimizer step")
        ax.set_ylabel("effective_rank of dW, mean over layers")
        ax.set_title(model, fontsize=10, loc="left")
        if len(own):
            ax.legend(fontsize=7)
    note = (
        "Lines: means over seeds of runs of one length; points: seeds. The planted update has rank "
        "16; all but its leading directions are hidden in noise at first."
    )
    return finish(picture, "The rank of a full update over training", note)
