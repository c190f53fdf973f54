"""Two runs side by side, from their updates: how much they share, layer by layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from lora_lab.comparison import compare
from lora_lab.linalg import Update
from lora_lab.linalg.randomized import leading
from lora_lab.linalg.subspace import overlap_grid
from lora_lab.measures.subspace_overlap import SIDES, directions
from lora_lab.measuring import kept
from lora_lab.registry import WrongInput
from lora_lab.report.parts import numbers
from lora_lab.store import Store

COMPARED = ("cosine", "subspace_overlap", "principal_angle", "sign_conflict")
SHOWN = 16
"""Directions of the grids of φ(i, j)."""


def pair_part(store: Store, one: str, other: str) -> dict[str, Any]:
    """Measures of two runs' final updates with their nulls, and φ(i, j) of every layer.

    Raises
    ------
    WrongInput
        Where the weights of a run are gone, or no layer is in both.
    """
    updates = {run_id: kept(store.run(run_id))[0] for run_id in (one, other)}
    for run_id, own in updates.items():
        if not own:
            raise WrongInput(f"run {run_id} has no weights on disk to compare: it has no update, or "
                             "only its tables were kept. Its tables are compared above.")  # fmt: skip
    rows = compare(updates, COMPARED)
    both = [layer for layer in updates[one] if layer in updates[other]]
    grids = {layer: phi(updates[one][layer], updates[other][layer], layer) for layer in both}
    return {"one": one, "other": other, "layers": both, "rows": _rows(rows, both), "phi": grids}


def phi(one: Update, other: Update, layer: str = "") -> dict[str, Any]:
    """φ(i, j) = ‖U_iᵀU'_j‖²/min(i, j) of the leading directions of two updates, by side.

    `expected` is its mean for random subspaces at i = j = 1, which is 1/d: at (i, j) it is
    max(i, j)/d.
    """
    out: dict[str, Any] = {}
    spectra = [leading(update, SHOWN, layer=layer) for update in (one, other)]
    for side, d in zip(SIDES, one.shape, strict=True):
        U1, U2 = (directions(s, side)[:, :SHOWN] for s in spectra)
        grid = overlap_grid(U1, U2) if U1.shape[1] and U2.shape[1] else np.empty((0, 0))
        out[side] = {"d": d, "grid": [numbers(row, 4) for row in grid]}
    return out


def _rows(rows: pd.DataFrame, layers: list[str]) -> list[dict[str, Any]]:
    """Each measure by k and side: of the whole model, or of each layer with its null."""
    out = []
    for (name, k, side), own in rows.groupby(["measure", "k", "side"], dropna=False, sort=True):
        entry = {"measure": name, "k": numbers([k])[0], "side": side}
        whole = own[own["layer"] == ""]
        by_layer = own[own["layer"] != ""].set_index("layer").reindex(layers)
        for column in ("value", "null", "null_low", "null_high"):
            entry[column] = numbers(by_layer[column], 4)
            if len(whole):
                entry[f"whole_{column}"] = numbers(whole[column][:1])[0]
        out.append(entry)
    return out
