"""Two runs side by side, from their updates: how much they share, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_lab.analysis import rows
from lora_lab.comparison import whole_rows
from lora_lab.linalg import Spectrum, Update, decompose
from lora_lab.linalg.subspace import overlap_grid
from lora_lab.measures import DIRECTIONS
from lora_lab.measures.subspace_overlap import SIDES, directions
from lora_lab.measuring import kept
from lora_lab.registry import WrongInput
from lora_lab.report.parts import numbers
from lora_lab.store import Store

DIRECTED = ("subspace_overlap", "principal_angle")
SHOWN = 16
"""Directions of the grids of φ(i, j)."""
LEVELS = ("value", "null", "null_low", "null_high")


def pair_part(store: Store, one: str, other: str, layer: int | None = None) -> dict[str, Any]:
    """Two runs' final updates: the cosine of every layer, or all that one layer shares.

    Parameters
    ----------
    layer : int, optional
        Place of a layer among those that both have. Its directions are decomposed; those of all
        layers of a full fine-tuning would take a minute.

    Raises
    ------
    WrongInput
        Where the weights of a run are gone, or no layer is in both, or `layer` is not there.
    """
    updates = {run_id: kept(store.run(run_id))[0] for run_id in (one, other)}
    for run_id, own in updates.items():
        if not own:
            raise WrongInput(
                f"run {run_id} has no weights on disk to compare: it changed no layer, or only its "
                "tables were kept."
            )
    both = [name for name in updates[one] if name in updates[other]]
    if not both:
        raise WrongInput(f"runs {one} and {other} share no layer: their models differ.")
    head = {"one": one, "other": other, "layers": both}
    if layer is None:
        return head | _cosines(updates, both)
    if layer >= len(both):
        raise WrongInput(f"the runs share {len(both)} layers; got number {layer}.")
    name = both[layer]
    return head | _directions(name, updates[one][name], updates[other][name])


def _cosines(updates: Mapping[str, Mapping[str, Update]], layers: list[str]) -> dict[str, Any]:
    """The cosine of the whole updates and of every layer, with their nulls; nothing decomposed."""
    one, other = updates
    norms = {run_id: {n: u.norm() for n, u in own.items()} for run_id, own in updates.items()}
    found = []
    for name in layers:
        update, pair = updates[one][name], updates[other][name]
        # Of its spectrum the cosine asks for the shape, and whether it is zero.
        s = Spectrum.of_values([norms[one][name]], shape=update.shape)
        [row] = rows(name, s, ["cosine"], update=update, pair_update=pair)
        found.append(row | {"one": one, "other": other})
    sizes = {name: math.prod(updates[one][name].shape) for name in layers}
    [whole] = whole_rows(found, norms, sizes)
    return {
        "whole": {name: numbers([whole[name]])[0] for name in LEVELS},
        **{name: numbers([row[name] for row in found], 4) for name in LEVELS},
    }


def _directions(layer: str, one: Update, other: Update) -> dict[str, Any]:
    """What the leading directions of two updates share: by k with nulls, and φ(i, j), by side."""
    s, pair = (decompose(u, vectors=DIRECTIONS, layer=layer) for u in (one, other))
    measured = rows(layer, s, DIRECTED, pair=pair)
    grids = {}
    for side, d in zip(SIDES, one.shape, strict=True):
        U, V = (directions(x, side)[:, :SHOWN] for x in (s, pair))
        grid = overlap_grid(U, V) if U.shape[1] and V.shape[1] else np.empty((0, 0))
        grids[side] = {"d": d, "grid": [numbers(row, 4) for row in grid]}
    return {"phi": grids, "by_k": [_short(row) for row in measured]}


def _short(row: Mapping[str, Any]) -> dict[str, Any]:
    values = {name: numbers([row[name]], 4)[0] for name in LEVELS}
    return {"measure": row["measure"], "k": row["k"], "side": row["side"], **values}
