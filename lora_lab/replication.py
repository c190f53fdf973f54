"""What seeds share: finished runs that differ in nothing but the seed, layer by layer."""

from __future__ import annotations

import contextlib
import hashlib
import json
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from lora_lab import schema
from lora_lab.analysis import rows
from lora_lab.layers import depth_of, module_of
from lora_lab.linalg import Spectrum
from lora_lab.linalg.randomized import leading
from lora_lab.measures import DIRECTIONS, MEASURES
from lora_lab.measuring import kept
from lora_lab.registry import WrongInput
from lora_lab.store import Busy, Corrupt, RunDir, Store


def seed_groups(store: Store) -> list[list[str]]:
    """run_ids of the finished runs on disk that differ in nothing but `seed`; two or more each."""
    groups: dict[str, list[str]] = {}
    for run_id in store.run_ids():
        record = store.run(run_id).record()
        if record.status == "done":
            config = {k: v for k, v in record.config["config"].items() if k != "seed"}
            groups.setdefault(json.dumps(config, sort_keys=True), []).append(run_id)
    return [ids for ids in groups.values() if len(ids) > 1]


def replication(results: Store | str | Path) -> pd.DataFrame:
    """Measures of every finished run's final updates against those of the other seeds.

    Parameters
    ----------
    results : Store, str or Path
        A results folder; it is only read.

    Returns
    -------
    DataFrame
        Columns of `schema.MEASURES`. A run without another seed has no rows, nor has one that
        changed no layer. Of what is kept of a full fine-tuning the `DIRECTIONS` leading directions
        are compared.

    Raises
    ------
    WrongInput
        When the folder is missing.

    Warns
    -----
    UserWarning
        For a run with a corrupt file, which is left out.
    """
    store = results if isinstance(results, Store) else Store(results)
    return replicated(store, seed_groups(store))


def replicated(store: Store, groups: Iterable[Sequence[str]]) -> pd.DataFrame:
    """`replication` of these groups of run_ids alone, whose runs differ in nothing but the seed."""
    out = [row for ids in groups for row in _group([store.run(i) for i in ids])]
    kinds = {name: kind for name, (kind, _) in schema.MEASURES.items() if kind != "string"}
    return pd.DataFrame(out, columns=list(schema.MEASURES)).astype(kinds)


def replicate_missing(store: Store) -> list[str]:
    """Take `replication` of every group of seeds that has grown or changed, and keep the rows.

    Returns
    -------
    list of str
        run_ids that have new rows.
    """
    done = []
    names = seed_measures()
    for ids in seed_groups(store):
        # Rows hold for these seeds only: another seed makes them anew.
        digest = hashlib.sha256(",".join(sorted(ids)).encode()).hexdigest()[:12]
        runs = [store.run(run_id) for run_id in ids]
        marks = [f"{name}@{digest}" for name in names]
        if all(set(marks) <= run.measured() for run in runs):
            continue
        found = pd.DataFrame(_group(runs), columns=[*schema.MEASURES, "flag"])
        for run in runs:
            own = found[found["run_id"] == run.run_id].drop(columns="flag")
            with contextlib.suppress(Busy):
                run.write_measures(own, [*names, *marks])
                done += [run.run_id] if len(own) else []
    return done


def seed_measures() -> list[str]:
    """The measures that compare a run with its other seeds."""
    return [name for name in MEASURES if "seeds" in MEASURES[name].needs]


def _group(runs: list[RunDir]) -> list[dict[str, Any]]:
    """Rows of runs that differ in nothing but the seed."""
    found = {run.run_id: final for run in runs if (final := _final(run)) is not None}
    names = seed_measures()
    out = []
    for run_id, (step, own) in found.items():
        others = [spectra for other, (_, spectra) in found.items() if other != run_id]
        for layer, s in own.items() if others else ():
            about = {"run_id": run_id, "step": step}
            about |= {"module": module_of(layer), "depth": depth_of(layer)}
            seeds = [spectra[layer] for spectra in others]
            out += [row | about for row in rows(layer, s, names, seeds=seeds)]
    return out


def _final(run: RunDir) -> tuple[int, dict[str, Spectrum]] | None:
    """The last step and the leading directions of every layer; None where a file is corrupt."""
    try:
        step = int(run.read_json("metrics")["steps"])
        return step, {n: leading(u, DIRECTIONS, layer=n) for n, u in kept(run)[0].items()}
    except (Corrupt, WrongInput) as error:
        warnings.warn(f"{error}; not compared with other seeds", stacklevel=2)
        return None
