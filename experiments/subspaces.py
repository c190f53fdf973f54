"""Intrinsic dimension on digits: the runs that D6 and G7 share, and d90 from them.

z is trained in d random directions of all weights together (Fastfood), its rate falling as 1/√d, so
that a step is about as long in every d.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from experiments.curves import reached
from experiments.grids import DIGITS, SEEDS, best, full, head

DIMENSIONS = (8, 32, 128, 512, 2048)
STEPS = (2.0, 5.0)
"""Rates tried, times √d."""

NETWORKS = {
    "pretrained": DIGITS,
    "random": f"{DIGITS} model.start=",
    "narrow": f"{DIGITS} model.width=32",
    "wide": f"{DIGITS} model.width=128",
}
"""A network of width 64 from its pre-training and from random weights; pre-trained ones of other
widths."""

READINGS = ("accuracy", "gap")
"""90 % of the full score; 90 % of the way from the head alone to it."""


def lines(network: str) -> list[str]:
    """Full fine-tuning and every d of one network; at width 64 also the head alone."""
    ground = NETWORKS[network]
    if network == "pretrained":
        whole = [head(ground), full(ground)]
    else:
        whole = [f"{ground} adapter=full train.lr=2e-3,5e-3 {SEEDS}"]
    if network == "random":
        whole.append(f"{ground} adapter=head train.lr=1e-2,3e-2 {SEEDS}")
    subspaces = [
        f"{ground} adapter=intrinsic adapter.d={d} "
        f"train.lr={','.join(f'{step / math.sqrt(d):.3g}' for step in STEPS)} {SEEDS}"
        for d in DIMENSIONS
    ]
    return whole + subspaces


def scored(runs: pd.DataFrame) -> pd.DataFrame:
    """Score of each network, method, d and seed at the best rate.

    Returns
    -------
    DataFrame
        Columns run_id, network, adapter, d (NaN where there is none), seed, score, parameters (of
        the target layers), lr, edge.
    """
    width = _column(runs, "model.width", 64.0)
    start = _column(runs, "model.start", "").fillna("").astype(str)
    names = np.select(
        [width < 64, width > 64, start == ""], ["narrow", "wide", "random"], "pretrained"
    )
    runs = runs.assign(network=names, d=_column(runs, "adapter.d", np.nan))
    whole = runs[runs["adapter"] == "full"].groupby("network")["adapter_parameters"].max()
    own = best(runs, ("network", "adapter", "d"))
    own = own.assign(parameters=own["network"].map(whole)).rename(columns={"train.lr": "lr"})
    columns = ["run_id", "network", "adapter", "d", "seed", "score", "parameters", "lr", "edge"]
    return own[columns]


def _column(runs: pd.DataFrame, name: str, missing: float | str) -> pd.Series:
    """A config column, which a table of other models lacks."""
    return runs[name] if name in runs else pd.Series(missing, index=runs.index)


def d90(table: pd.DataFrame, network: str, reading: str = "accuracy") -> pd.Series:
    """By seed, the d at which the score first reaches 90 %, linear in ln d between the d tried.

    Where the smallest d is enough it is the smallest; where none is, the largest: a bound that
    makes differences between networks smaller than they are.
    """
    own = table[table["network"] == network]
    whole, floor = (
        own[own["adapter"] == name].set_index("seed")["score"] for name in ("full", "head")
    )
    curves = own[own["adapter"] == "intrinsic"].pivot_table(
        index="seed", columns="d", values="score"
    )
    out = {}
    if reading == "accuracy":
        floor = 0.0 * whole
    for seed in curves.index.intersection(whole.index).intersection(floor.index):
        curve = curves.loc[seed].dropna()
        if len(curve):
            target = floor[seed] + 0.9 * (whole[seed] - floor[seed])
            logs = np.log(curve.index.to_numpy(dtype=np.float64))
            out[seed] = math.exp(reached(logs, -curve, -target))
    return pd.Series(out, dtype="float64")


def drawn(table: pd.DataFrame, needs: dict[str, float], rng: np.random.Generator) -> pd.DataFrame:
    """A made-up table in which each network needs a given d, to within the scatter of `table`.

    Parameters
    ----------
    table : DataFrame
        Columns network and seed, one row each, with `factor`, by which a seed's d90 is off.
    needs : mapping of str to float
        d90 by network.
    """
    rows = []
    for one in table.itertuples():
        need = needs[str(one.network)] * float(str(one.factor))
        shared = {"network": one.network, "seed": one.seed, "lr": 1e-2, "edge": False}
        shared["parameters"] = 196_608
        rows.append(shared | {"adapter": "full", "score": 0.9})
        rows.append(shared | {"adapter": "head", "score": 0.5})
        for d in DIMENSIONS:
            # 0.81 (90 % of full) at the needed d, 0.06 more for each factor of 4.
            score = 0.81 + 0.06 * math.log(d / need, 4) + 1e-4 * rng.standard_normal()
            rows.append(shared | {"adapter": "intrinsic", "d": d, "score": min(score, 0.9)})
    return pd.DataFrame(rows)
