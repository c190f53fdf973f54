"""One layer of weights from outside: loaded, measured, forgotten."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

from lora_lab import comparison
from lora_lab.analysis import rows
from lora_lab.checkpoints import Job
from lora_lab.linalg import Factored, Spectrum, Update, decompose
from lora_lab.measures import DIRECTIONS, MEASURES
from lora_lab.tasks import Result

WORK = 2**28
"""Bytes that the exact decomposition of one layer may take beside the layer itself."""

LEFT_OUT = "left out"
"""Start of the flag of a measure that a layer is too large for."""

ZERO = "zero update"
"""Flag of all rows of a layer that training did not change."""


def work(kind: str, job: Any, names: list[str], null: str | None) -> Result:
    """One task: a layer, or what several adapters have of it side by side."""
    return measured(job, names, null) if kind == "layer" else compared(job, names)


def measured(job: Job, names: list[str], null: str | None) -> Result:
    """Rows of one layer, its spectrum, and what else is to be known of it."""
    against = [name for name in names if {"W0", "base"} & set(MEASURES[name].needs)]
    vectors = DIRECTIONS if any("vectors" in MEASURES[name].needs for name in names) else False
    large = _large(job)
    if large:
        # W0 is let go, and read again when dW is gone: never both beside a decomposition.
        W0, update, now = None, job.load()[2], [name for name in names if name not in against]
    else:
        (_, W0, update), now = job.load(), names
    spectrum = decompose(update, vectors=vectors, layer=job.layer)
    found = rows(job.layer, spectrum, now, null, W0=W0, update=update)
    result = _about(update, spectrum)
    if large and job.base is not None:
        factors = update if isinstance(update, Factored) else None
        del update
        found += _against(job, spectrum, factors, against, null)
        found.sort(key=lambda row: names.index(row["measure"]))
    for row in found:
        if spectrum.zero and not row["flag"].startswith(LEFT_OUT):
            row["flag"] = ZERO
    return result | {"rows": found}


def _large(job: Job) -> bool:
    """Whether the exact decomposition of a layer would exceed the memory that a worker has."""
    m, n = job.shape
    return 8 * (3 * m * n + 4 * min(m, n) ** 2) > WORK


def _against(
    job: Job, spectrum: Spectrum, factors: Factored | None, names: list[str], null: str | None
) -> list[dict[str, Any]]:
    """Rows of a large layer against its base, of those measures that there is memory for."""
    too_much = {"base"} if factors is not None else {"base", "update"}
    left = [name for name in names if too_much & set(MEASURES[name].needs)]
    taken = [name for name in names if name not in left]
    found = [_left_out(job, name) for name in left]
    if taken:
        assert job.base is not None
        found += rows(job.layer, spectrum, taken, null, W0=job.base.load(), update=factors)
    return found


def _left_out(job: Job, name: str) -> dict[str, Any]:
    m, n = job.shape
    reason = f"{LEFT_OUT}: a layer of {m} x {n} is too large for it (memory)"
    numbers = dict.fromkeys(("k", "value", "null", "null_low", "null_high"), math.nan)
    return {"layer": job.layer, "measure": name, **numbers, "side": "", "flag": reason}


def _about(update: Update, spectrum: Spectrum) -> Result:
    """Singular values of an update, of factors their r, and what `Outside.layers` says of it."""
    r, scale = (update.r, update.scale) if isinstance(update, Factored) else (None, None)
    made = {name: getattr(spectrum, name) for name in ("made_in", "route", "bound")}
    m, n = update.shape
    about = {"m": m, "n": n, "r": r, "scale": scale, **made}
    return {"sigma": spectrum.values[:r].tolist(), "about": about}


def compared(jobs: dict[str, Job], names: list[str]) -> Result:
    """What several adapters do to one layer, pair by pair; two large ones at once at most."""
    layer = next(iter(jobs.values())).layer
    at_once = combinations(jobs, 2) if any(map(_large, jobs.values())) else [tuple(jobs)]
    found = []
    for sources in at_once:
        loaded = {source: jobs[source].load()[2] for source in sources}
        found += comparison.layer_rows(layer, loaded, names)
    return {"rows": found}
