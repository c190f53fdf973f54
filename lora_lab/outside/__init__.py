"""Weights from outside: every measure of every layer of models and adapters on disk, streamed.

Layers are loaded, measured and forgotten one by one, so that memory is that of the largest layer
for each worker, whatever the model's size.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd

from lora_lab import comparison, schema
from lora_lab.checkpoints import Job, updates
from lora_lab.layers import depth_of, module_of
from lora_lab.linalg.factored import Array, frobenius
from lora_lab.measures import MEASURES
from lora_lab.nulls import NULLS
from lora_lab.outside.layer import LEFT_OUT, WORK, work
from lora_lab.registry import WrongInput
from lora_lab.tasks import Kept, Result, Tasks, Tell, run

Paths: TypeAlias = str | Path | Sequence[str | Path]

MISSING = {
    "W0": "the base model: give base",
    "base": "the base model: give base",
    "pair": "two updates: give several adapters",
    "pair_update": "two updates: give several adapters",
}
"""What to do for a need that is not met."""

COLUMNS = tuple(name for name in schema.MEASURES if name not in ("run_id", "step"))
"""Columns of `analyze`, beside `flag` and, of several adapters, `source`."""

PER_WORKER = 2.5
"""Largest tensors in float64 that a worker holds at most."""


@dataclass(frozen=True)
class Outside:
    """What is known of weights from outside.

    Attributes
    ----------
    measures : DataFrame
        As `analyze` gives it, always with `source`.
    spectra : DataFrame
        source, layer, i (1 = largest), sigma; of a factored update the r first.
    layers : DataFrame
        source, layer, m, n, r and scale (NaN if not factored), made_in, route and bound of the
        spectrum.
    pairs : DataFrame
        Of several adapters, as `comparison.compare`; empty for one.
    """

    measures: pd.DataFrame
    spectra: pd.DataFrame
    layers: pd.DataFrame
    pairs: pd.DataFrame


def analyze(
    base: str | Path | None = None,
    tuned: str | Path | None = None,
    adapter: Paths | None = None,
    names: Iterable[str] | None = None,
    null: str | None = "usual",
) -> pd.DataFrame:
    """Every measure of every layer of a tuned model or of adapters on disk; no training.

    Layers are streamed, over all cores where that pays. What an interruption leaves unfinished
    goes on with the next call of the same question.

    Parameters
    ----------
    base, tuned : path
        As in `checkpoints.updates`.
    adapter : path or sequence of path
        One PEFT adapter or several.
    names : iterable of str, optional
        Measures to take; None: all whose needs are met.
    null : str or None
        As in `analysis.rows`.

    Returns
    -------
    DataFrame
        The columns of `schema.MEASURES` without run_id and step, and flag (`zero update` for a
        layer that training did not change; the reason where a measure refuses or where the layer
        is too large for it; else ''), in the order of the model's layers. Several adapters have
        their names in the first column, `source`.

    Raises
    ------
    WrongInput
        As `checkpoints.updates` and `analysis.rows`; for a measure whose needs no layer meets.
    StoreError
        When a worker process was killed, for example for want of memory.
    """
    found = study(base, tuned, adapter, names, null).measures
    several = not isinstance(adapter, (str, Path)) and adapter is not None and len(adapter) > 1
    return found if several else found.drop(columns="source")


def study(
    base: str | Path | None = None,
    tuned: str | Path | None = None,
    adapter: Paths | None = None,
    names: Iterable[str] | None = None,
    null: str | None = "usual",
    tell: Tell = lambda done, total, share: None,
) -> Outside:
    """As `analyze`, with all tables; `tell` hears how far it is (see `tasks.Tell`)."""
    adapters = [adapter] if isinstance(adapter, (str, Path)) else list(adapter or ())
    if null not in (None, "usual"):
        NULLS.require(null)
    chosen = None if names is None else list(dict.fromkeys(names))
    known = set(MEASURES)
    for name in chosen or ():
        if name not in known:
            MEASURES.require(name)
    sources = _sources(base, tuned, adapters)
    layers = [(source, job) for source, jobs in sources.items() for job in jobs]
    wanted = _possible(chosen, [job for _, job in layers], len(sources) > 1)
    of_pairs = set(comparison.pairwise())
    alone, paired = (
        [name for name in wanted if (name in of_pairs) == both] for both in (False, True)
    )
    shared = _shared(sources) if paired else []
    tasks = Tasks(
        work,
        [("layer", job, alone, null) for _, job in layers]
        + [("pair", jobs, paired, null) for jobs in shared],
        [_cost(job) for _, job in layers] + [_cost(*own.values()) / 10 for own in shared],
        PER_WORKER * max(job.nbytes for _, job in layers) + 2 * WORK,
    )
    folders = [folder for folder in (base, tuned, *adapters) if folder is not None]
    results = run(tasks, Kept(_key(folders, wanted, null)), tell)
    return _tables([(s, job.layer) for s, job in layers], results)


def _sources(
    base: str | Path | None, tuned: str | Path | None, adapters: Sequence[str | Path]
) -> dict[str, list[Job]]:
    """The layers of each source, which goes by its folder's name where that tells it apart."""
    if len(adapters) < 2:
        folder = tuned if tuned is not None else next(iter(adapters), None)
        jobs = updates(base=base, tuned=tuned, adapter=next(iter(adapters), None))
        assert folder is not None
        return {Path(folder).resolve().name: jobs}
    if tuned is not None:
        raise WrongInput("give exactly one of tuned (a model folder) and adapter (PEFT folders).")
    short = [Path(folder).resolve().name for folder in adapters]
    names = short if len(set(short)) == len(short) else [str(folder) for folder in adapters]
    if len(set(names)) < len(names):
        raise WrongInput("adapter: the same folder is given twice. Give each one once.")
    return {
        name: updates(base=base, adapter=folder)
        for name, folder in zip(names, adapters, strict=True)
    }


def _possible(names: Sequence[str] | None, jobs: Sequence[Job], several: bool) -> list[str]:
    """The measures to take: those asked for, or all whose needs some layer may meet."""
    have = {"values", "vectors", "update", "r"}
    have |= {"pair", "pair_update"} if several else set()
    have |= {"W0", "base"} if any(job.base is not None for job in jobs) else set()
    lacking = {name: set(MEASURES[name].needs) - have for name in names or MEASURES}
    for name, lacks in lacking.items():
        if names is not None and lacks:
            known = [word for need, word in MISSING.items() if need in lacks]
            what = known[0] if known else f"{', '.join(sorted(lacks))}, which analyze has not"
            raise WrongInput(f"measure {name!r} needs {what}.")
    return [name for name, lacks in lacking.items() if not lacks]


def _shared(sources: Mapping[str, Sequence[Job]]) -> list[dict[str, Job]]:
    """The layers that two sources or more have, in the order of the first."""
    by_layer: dict[str, dict[str, Job]] = {}
    for source, jobs in sources.items():
        for job in jobs:
            own = by_layer.setdefault(job.layer, {})
            other = next(iter(own.values()), job)
            if other.shape != job.shape:
                raise WrongInput(
                    f"layer {job.layer!r} has shape {job.shape} in {source!r} and {other.shape} in "
                    f"{next(iter(own))!r}. Give adapters of one model."
                )
            own[source] = job
    return [own for own in by_layer.values() if len(own) > 1]


def _cost(*jobs: Job) -> float:
    """About proportional to the time that decompositions take."""
    return float(sum(job.nbytes * min(job.shape) for job in jobs))


def _key(folders: Sequence[str | Path], names: Sequence[str], null: str | None) -> str:
    """Hash of all that the rows depend on: files given, measures, null, and the code itself."""
    given = [p for folder in folders for p in sorted(Path(folder).expanduser().resolve().iterdir())]
    text = json.dumps([_stamps(given), names, null, _code()])
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _stamps(paths: Iterable[Path]) -> list[tuple[str, int, int]]:
    return [(str(p), (s := p.stat()).st_size, s.st_mtime_ns) for p in paths]


@lru_cache(maxsize=1)
def _code() -> list[object]:
    """What tells the code apart, which a process does not read again."""
    ours = _stamps(sorted(Path(__file__).parents[1].rglob("*.py")))
    return [ours, *(version(name) for name in ("numpy", "scipy"))]


# ---- tables ------------------------------------------------------------------------------------


def _tables(layers: Sequence[tuple[str, str]], results: Sequence[Result]) -> Outside:
    """The tables of all layers, and of the pairs that follow them."""
    measured, about = [], []
    for (source, layer), result in zip(layers, results, strict=False):
        place = {"module": module_of(layer), "depth": depth_of(layer)}
        measured += [{"source": source, **row, **place} for row in result["rows"]]
        at = {"source": source, "layer": layer}
        about.append(at | result["about"])
    pairs = [row for result in results[len(layers) :] for row in result["rows"]]
    norms: dict[str, dict[str, float]] = {}
    for (source, layer), result in zip(layers, results, strict=False):
        norms.setdefault(source, {})[layer] = frobenius([result["sigma"]])
    sizes = {one["layer"]: one["m"] * one["n"] for one in about}
    return Outside(
        pd.DataFrame({name: _column(name, measured) for name in ("source", *COLUMNS, "flag")}),
        _spectra(layers, [result["sigma"] for result in results[: len(layers)]]),
        pd.DataFrame(about).astype({"r": "float64", "scale": "float64"}),
        comparison.table([*pairs, *comparison.whole_rows(pairs, norms, sizes)]),
    )


def _column(name: str, found: Sequence[Mapping[str, Any]]) -> list[Any] | Array:
    """A column of the table of measures, at once of its own type."""
    column = [row[name] for row in found]
    if name in COLUMNS and schema.MEASURES[name][0] == "float64":
        return np.array(column, dtype=np.float64)
    return column


def _spectra(layers: Sequence[tuple[str, str]], sigmas: Sequence[Sequence[float]]) -> pd.DataFrame:
    """The table of all singular values, made at once: a table for each layer takes longer."""
    lengths = [len(sigma) for sigma in sigmas]
    names = {
        what: np.repeat(np.array([one[place] for one in layers], dtype=object), lengths)
        for place, what in enumerate(("source", "layer"))
    }
    i = np.concatenate([np.arange(1, length + 1) for length in lengths])
    return pd.DataFrame({**names, "i": i, "sigma": np.concatenate(sigmas)})


def whole(found: Outside) -> pd.DataFrame:
    """All rows in one table: of several adapters those of the layers, then those of the pairs.

    Rows of pairs have the columns `one` and `other`, rows of layers `source`.
    """
    if found.measures["source"].nunique() < 2:
        return found.measures.drop(columns="source")
    return pd.concat([found.measures, found.pairs], ignore_index=True)


def left_out(measures: pd.DataFrame) -> list[str]:
    """One sentence for each measure that large layers were too large for."""
    rows = measures[measures["flag"].str.startswith(LEFT_OUT)]
    return [
        f"{name} {LEFT_OUT} of {len(own)} large layers ({own['layer'].iloc[0]}, ...)"
        for name, own in rows.groupby("measure")
    ]
