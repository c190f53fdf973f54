"""What several claims read off the updates of finished runs: directions, and cut-down scores."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch

from experiments.grids import best
from lora_lab.adapters.full import FullLayer
from lora_lab.adapters.lora import LoRALayer
from lora_lab.claims import Found
from lora_lab.config import Host
from lora_lab.evaluation import evaluate
from lora_lab.execution import reopened
from lora_lab.figures import final
from lora_lab.hydra_bridge import config_of
from lora_lab.linalg import Spectrum, Update
from lora_lab.linalg.randomized import leading
from lora_lab.linalg.subspace import overlap_grid, random_overlap
from lora_lab.measures import DIRECTIONS
from lora_lab.measures.subspace_overlap import SIDES, directions
from lora_lab.preparation import put_back

Spectra = Mapping[str, Spectrum]


def chosen(found: Found, cell: tuple[str, ...] = ()) -> pd.DataFrame:
    """Runs at the best rate of their cell (`grids.best`), with `r`, `alpha` and `lr`."""
    names = {"adapter.r": "r", "adapter.alpha": "alpha", "train.lr": "lr"}
    runs = best(found.runs, cell) if cell else best(found.runs)
    runs = runs.rename(columns=names)
    return runs.reindex(columns=[*runs, *(c for c in names.values() if c not in runs)])


def doubled(runs: pd.DataFrame) -> pd.DataFrame:
    """Of `chosen` runs: LoRA with α = 2r."""
    return runs[(runs["adapter"] == "lora") & (runs["alpha"] == 2 * runs["r"])]


def measured(found: Found, runs: pd.DataFrame, *names: str) -> pd.DataFrame:
    """Final rows of these measures of single layers, beside what `runs` says of their run."""
    rows = final(found.measures, runs["run_id"])
    rows = rows[rows["measure"].isin(names) & (rows["layer"] != "")]
    about = [c for c in ("run_id", "model", "adapter", "r", "alpha", "seed", "edge") if c in runs]
    return rows.merge(runs[about], on="run_id")


def widths(found: Found) -> pd.Series:
    """q, the number of singular values, by (run_id, layer); of full updates."""
    return found.spectra.groupby(["run_id", "layer"])["i"].max().rename("q")


def spectra_of(found: Found, run_id: str) -> dict[str, Spectrum]:
    """The leading directions of every layer's final update."""
    updates = found.updates(run_id)
    return {layer: leading(u, DIRECTIONS, layer=layer) for layer, u in updates.items()}


def overlap(one: Spectra, other: Spectra, i: int, j: int, skip: int = 0) -> tuple[float, float]:
    """φ(i, j) without the first `skip` directions of both, and its mean for random subspaces.

    Means over layers and both sides; NaN where a layer has too few directions.
    """
    found, null = [], []
    for layer, s in one.items():
        for side in SIDES:
            U, V = directions(s, side)[:, skip:i], directions(other[layer], side)[:, skip:j]
            if U.shape[1] < i - skip or V.shape[1] < j - skip:
                return np.nan, np.nan
            found.append(overlap_grid(U, V)[-1, -1])
            null.append(random_overlap(i - skip, j - skip, len(U)))
    return float(np.mean(found)), float(np.mean(null))


def above(value: float, null: float) -> float:
    """An overlap between random (0) and complete (1)."""
    return (value - null) / (1 - null) if null < 1 else np.nan


def others(runs: pd.DataFrame) -> dict[int, str]:
    """For each seed the run_id of the next seed; none where there is but one.

    Runs of one seed start from the same draws: their overlap would say little.
    """
    by = runs.drop_duplicates("seed").sort_values("seed")
    ids, seeds = by["run_id"].tolist(), by["seed"].astype(int).tolist()
    return dict(zip(seeds, [*ids[1:], *ids[:1]], strict=True)) if len(ids) > 1 else {}


class Rebuilt:
    """A finished run's network, to be scored with other updates in the place of its own.

    Parameters
    ----------
    found : Found
    run_id : str
        Of full fine-tuning or LoRA, whose weights are kept.
    """

    def __init__(self, found: Found, run_id: str) -> None:
        config = config_of(found.store, run_id)
        self._setup = reopened(found.store, run_id, config, Host(device="cpu"))

    def score(self, updates: Mapping[str, Update]) -> float:
        """Test score with these updates and the run's own head."""
        adapted = self._setup.adapted
        put_back(
            {n: layer for n, layer in adapted.items() if isinstance(layer, FullLayer)}, updates
        )
        for name, layer in adapted.items():
            if isinstance(layer, LoRALayer):
                _put(layer, updates[name])
        return evaluate(self._setup.model, self._setup.splits["test"]).score


@torch.no_grad()
def _put(layer: LoRALayer, update: Update) -> None:
    """Write an update into a LoRA layer's own factors, without forming W0 + dW."""
    scale = layer.scaled()[2]
    s = leading(update, len(layer.A))
    assert s.U is not None
    assert s.Vh is not None
    k = len(s.Vh)
    layer.A.zero_()
    layer.B.zero_()
    layer.A[:k] = torch.from_numpy(s.Vh)
    layer.B[:, :k] = torch.from_numpy(s.U * s.values[:k] / scale)
