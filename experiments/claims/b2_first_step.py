"""B2: who gets a gradient first.

Claim: at B = 0, ∇_A = 0 and ∇_B ≠ 0; after one step both move; ∇_A grows from 0.

Decided by: norms of both gradients in every layer at every one of the first 32 steps on the digits
transformer at r = 2, 8 and 32, and at the traced steps (1, 10, 20 …) of MiniLM at r = 8.

Test: three parts. First: at step 1 ∇_A is exactly 0 and ∇_B is not, in every layer of every run.
Then: at the next traced step neither is 0 in any layer. Grows: ln of ‖∇_A‖ at step 16 over step 2
(digits), the mean over r, has a 95 % t interval over seeds above 0; refuted below 0.

Power: first and then are exact. ‖∇_A‖ = s‖BᵀG‖ with ‖B‖ growing nearly linearly over 16 steps: a
ln ratio of about 2 at a spread over seeds of about 0.2 needs two seeds.

Cost: 15 runs of a second, and 5 of the shared grid on MiniLM.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from experiments.grids import MINILM, SEEDS
from lora_lab.claims import Found, Verdict, against, together
from lora_lab.figures import canvas, finish
from lora_lab.registry import WrongInput
from lora_lab.stats import Comparison, paired, t_interval, units_needed

EARLY = (
    "model=digits_vit data=digits train.epochs=2 train.evaluations=1 train.spectra=0 "
    "train.trace_every=1 adapter=lora train.lr=3e-3"
)
SWEEP = {
    "smoke": ["model=planted data=planted size=smoke adapter=lora adapter.r=1,4"],
    "paper": [
        f"{EARLY} adapter.r=2,8,32 {SEEDS}",
        f"{MINILM} adapter=lora adapter.r=8 train.lr=1e-3 {SEEDS}",
    ],
}
FROM, TO = 2, 16
FACTORS = {"grad_norm_A": "A", "grad_norm_B": "B"}


def rows(found: Found) -> pd.DataFrame:
    """One row a traced step: both norms over layers, and in how many layers each is 0."""
    traces = found.traces[found.traces["trace"].isin(FACTORS)]
    traces = traces.assign(factor=traces["trace"].map(FACTORS), square=traces["value"] ** 2)
    cells = traces.groupby(["run_id", "step", "factor"])
    wide = pd.DataFrame(
        {
            "norm": np.sqrt(cells["square"].sum()),
            "zero": cells["value"].agg(lambda v: int((v == 0).sum())),
            "layers": cells["value"].size(),
        }
    ).unstack("factor")
    table = pd.DataFrame(
        {
            "norm_A": wide["norm", "A"],
            "norm_B": wide["norm", "B"],
            "zero_A": wide["zero", "A"],
            "zero_B": wide["zero", "B"],
            "layers": wide["layers", "A"],
        }
    ).reset_index()
    names = {"model": "ground", "adapter.r": "r", "seed": "seed"}
    runs = found.runs.set_index("run_id")[list(names)].rename(columns=names)
    return table.join(runs, on="run_id").query("step <= 32").reset_index(drop=True)


def _growth(table: pd.DataFrame) -> pd.Series:
    """ln of ‖∇_A‖ at step TO over step FROM: the mean over r, by seed."""
    fine = table[table["step"].isin((FROM, TO)) & (table["norm_A"] > 0)]
    wide = fine.pivot_table(index=["seed", "ground", "r"], columns="step", values="norm_A")
    wide = wide.reindex(columns=[FROM, TO]).dropna()
    return (wide[TO] / wide[FROM]).apply(np.log).groupby("seed").mean()


def _needed(found: Comparison) -> str:
    """Seeds that would show a mean of the size that was found."""
    try:
        return f"{units_needed(found.mean, found.sd)} seeds"
    except WrongInput:
        return "more seeds than can be run"


def verdict(table: pd.DataFrame) -> Verdict:
    """The first step, the next, and growth."""
    first = table[table["step"] == 1]
    after = table[table["step"] > 1].sort_values("step").drop_duplicates("run_id")
    begins = bool(((first["zero_A"] == first["layers"]) & (first["zero_B"] == 0)).all())
    follows = bool(((after["zero_A"] == 0) & (after["zero_B"] == 0)).all()) and len(after) > 0
    parts = ["supported" if ok else "refuted" for ok in (begins, follows)]
    growth = _growth(table)
    if len(growth) < 2:
        said = "Growth needs two seeds whose steps are traced one by one."
        return Verdict("unresolved", said, n_seeds=len(growth))
    found = paired(growth)
    parts.append(against(t_interval(growth), 0.0))
    ratio = table.assign(ratio=table["norm_A"] / table["norm_B"]).groupby("step")["ratio"].mean()
    layers = int(first["layers"].sum())
    said = (
        f"At step 1 ∇_A is 0 in {int(first['zero_A'].sum())} and ∇_B in "
        f"{int(first['zero_B'].sum())} of {layers} layers of all runs, at the next traced step in "
        f"{int(after['zero_A'].sum())} and {int(after['zero_B'].sum())}; from step {FROM} to {TO} "
        f"‖∇_A‖ grows {np.exp(found.mean):.2g} times [{np.exp(found.low):.2g}, "
        f"{np.exp(found.high):.2g}], from {ratio.get(FROM, np.nan):.2g} to "
        f"{ratio.get(TO, np.nan):.2g} of ‖∇_B‖"
        + (f"; to tell growth takes {_needed(found)}." if parts[2] == "unresolved" else ".")
    )
    return Verdict(
        together(parts), said, found.mean, (found.low, found.high), found.p, found.n, found.mean
    )


def made(outcome: str, rng: np.random.Generator) -> pd.DataFrame | None:
    """Gradients that start and grow as claimed, that do not, or that are too noisy to tell."""
    cells = [(f"{r}{k}", step, r, k) for r in (2, 8) for k in range(5) for step in (1, 2, 10, 16)]
    table = pd.DataFrame(cells, columns=["run_id", "step", "r", "seed"])
    grows = 1.0 if outcome in ("supported", "unresolved") else -1.0
    if outcome == "unresolved":
        # As much up as down over the seeds, far beyond the mean.
        noise = 4.0 * (table["seed"] - 2) + 0.1
        grows = 0.0
    else:
        noise = pd.Series(0.05 * rng.standard_normal(len(table)))
    table["norm_A"] = np.exp((grows + noise) * np.log(table["step"]))
    table["norm_B"] = 10.0
    wrong, begin = outcome == "refuted", table["step"] == 1
    table["zero_A"] = np.where(begin, 0 if wrong else 6, 6 if wrong else 0)
    table["zero_B"] = 1 if wrong else 0
    table.loc[begin & (not wrong), "norm_A"] = 0.0
    return table.assign(layers=6, ground="digits_vit")


def figure(table: pd.DataFrame) -> Any:
    """Both norms over the first steps."""
    grounds = list(table["ground"].unique())
    picture, [row] = canvas(4.8 * max(len(grounds), 2), 4, 1, len(grounds))
    for axes, ground in zip(row, grounds, strict=True):
        shown = table[table["ground"] == ground]
        for i, (r, own) in enumerate(shown.groupby("r")):
            for factor, style in (("A", "-"), ("B", "--")):
                cells = own[own[f"norm_{factor}"] > 0].groupby("step")[f"norm_{factor}"]
                over = cells.agg(["mean", "min", "max"])
                label = f"∇_{factor}, r = {r:g}"
                axes.plot(over.index, over["mean"], style, color=f"C{i}", label=label)
                axes.fill_between(over.index, over["min"], over["max"], color=f"C{i}", alpha=0.12)
        axes.set_yscale("log")
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("gradient norm over all layers")
        axes.set_title(ground, fontsize=10, loc="left")
        axes.legend(fontsize=8)
    note = (
        "Solid: A, which has no point at step 1, where it is 0. Dashed: B. Bands: all seeds. A "
        "logarithmic axis has no 0."
    )
    return finish(picture, "Gradients of the factors over the first steps", note)
