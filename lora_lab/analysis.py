"""Rows of measures from updates: each update is decomposed once and every measure applied to it.

Knows updates, spectra and measures; never models, data, adapters or training.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lora_lab.checkpoints import read_updates
from lora_lab.layers import depth_of, module_of
from lora_lab.linalg import Spectrum, Update, decompose
from lora_lab.linalg.factored import Array
from lora_lab.linalg.spectrum import need_finite
from lora_lab.measures import MEASURES, Measure
from lora_lab.store import Busy, Corrupt, RunDir, Store

COLUMNS = ("layer", "module", "depth", "measure", "k", "side", "value")
"""Columns of `analyze`, beside `flag`."""


def rows(
    layer: str,
    update: Update | Spectrum,
    W0: Array | None = None,
    names: Iterable[str] | None = None,
) -> list[dict[str, Any]]:
    """Every measure of one layer's update that the given material allows.

    Parameters
    ----------
    layer : str
        The layer's name.
    update : Factored, Dense or Spectrum
        An update is decomposed here, with vectors only if a measure needs them.
    W0 : ndarray (m, n), optional
        The base weight; without it measures that need it have no row.
    names : iterable of str, optional
        Measures to take; None: all.

    Returns
    -------
    list of dict
        Keys layer, measure, k (NaN if the measure has none), side ('' if none), value. A measure
        whose needs are not met (W0, r of a factored update, vectors of a given spectrum) has no
        row: missing is no row, never a number.

    Raises
    ------
    WrongInput
        For NaN or Inf in the update or in W0, naming the layer, and for an unknown measure.

    Examples
    --------
    >>> s = Spectrum.of_values([4.0, 3.0], shape=(5, 7))
    >>> rows("encoder.0.query", s, names=["stable_rank"])
    [{'layer': 'encoder.0.query', 'measure': 'stable_rank', 'k': nan, 'side': '', 'value': 1.5625}]
    """
    if W0 is not None:
        need_finite(W0, what="base weight", layer=layer)
    chosen = {name: MEASURES[name] for name in (MEASURES if names is None else names)}
    if isinstance(update, Spectrum):
        spectrum = update
    else:
        vectors = any("vectors" in m.needs for m in chosen.values())
        spectrum = decompose(update, vectors=vectors, layer=layer)
    out = []
    for name, m in chosen.items():
        if not _met(m, spectrum, W0):
            continue
        given = {"W0": W0} if "W0" in m.needs else {}
        for k in m.grid(spectrum) if m.grid else (np.nan,):
            for side in m.sides or ("",):
                value = m(spectrum, k if m.grid else None, side or None, **given)
                out.append({"layer": layer, "measure": name, "k": k, "side": side, "value": value})
    return out


def _met(m: Measure, spectrum: Spectrum, W0: Array | None) -> bool:
    have = {
        "values": True,
        "vectors": spectrum.U is not None,
        "r": spectrum.r is not None,
        "W0": W0 is not None,
    }
    return all(have.get(need, False) for need in m.needs)


def analyze(
    base: str | Path | None = None,
    tuned: str | Path | None = None,
    adapter: str | Path | None = None,
    names: Iterable[str] | None = None,
) -> pd.DataFrame:
    """Every measure of every layer of a tuned model or an adapter on disk; no training.

    Parameters
    ----------
    base, tuned, adapter : path
        As in `checkpoints.read_updates`.
    names : iterable of str, optional
        Measures to take; None: all.

    Returns
    -------
    DataFrame
        Columns layer, module, depth, measure, k, side, value and flag (`zero update` for a layer
        that training did not change, else ''), in the order of the model's layers.

    Raises
    ------
    WrongInput
        As `read_updates` and `rows`.
    """
    chosen = None if names is None else list(names)
    out = []
    for layer, W0, update in read_updates(base=base, tuned=tuned, adapter=adapter):
        found = rows(layer, update, W0, chosen)
        about = {
            "module": module_of(layer),
            "depth": depth_of(layer),
            "flag": "" if update.norm() else "zero update",
        }
        out += [row | about for row in found]
    table = pd.DataFrame(out, columns=[*COLUMNS, "flag"])
    return table.astype({"depth": "float64", "k": "float64", "value": "float64"})


def base_key(model_hash: str, start: str, layers: Iterable[str]) -> str:
    """Name under which the store keeps W0 of these layers for all runs that share it."""
    text = "\n".join([model_hash, start, *sorted(layers)])
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def measure_run(
    run: RunDir, base: Mapping[str, Array] | None, names: Iterable[str] | None = None
) -> None:
    """Take measures of a finished run from its stored spectra and write them beside it.

    Parameters
    ----------
    run : RunDir
        Finished.
    base : mapping of str to ndarray, optional
        W0 by layer; without it measures that need it are not taken.
    names : iterable of str, optional
        Measures to take; None: all.
    """
    chosen = list(MEASURES) if names is None else list(names)
    if base is None:
        chosen = [name for name in chosen if "W0" not in MEASURES[name].needs]
    about = run.read_json("layers")
    sigma = run.read_table("spectra")
    last = sigma["step"].max()
    out = []
    for (step, name), group in sigma.groupby(["step", "layer"], sort=False):
        layer = str(name)
        known = about[layer]
        spectrum = Spectrum.of_values(
            group["sigma"], tuple(known["shape"]), known["made_in"], known["r"]
        )
        # Against the base only at the end: a norm of W0 costs more than all other measures.
        W0 = None if base is None or step < last else base[layer].astype(np.float64)
        out += [{"step": step, **row} for row in rows(layer, spectrum, W0, chosen)]
    run.write_measures(pd.DataFrame(out), chosen)


def measure_missing(store: Store) -> dict[str, list[str]]:
    """Take what is missing of every finished run on disk, without training.

    A run that another process holds is measured there. One with a corrupt file is left out with a
    warning: its sweep trains it again.

    Returns
    -------
    dict of str to list of str
        run_id to the measures that were taken.
    """
    done = {}
    for run_id in store.run_ids():
        try:
            taken = _measure_missing(store, store.run(run_id))
        except Busy:
            continue
        except Corrupt as error:
            warnings.warn(f"{error}; not measured", stacklevel=2)
            continue
        if taken:
            done[run_id] = taken
    return done


def _measure_missing(store: Store, run: RunDir) -> list[str]:
    if run.status() != "done" or not run.has_json("layers"):
        return []
    missing = sorted(set(MEASURES) - run.measured())
    if missing:
        model = run.read_json("config")["config"]["model"]
        key = base_key(
            run.read_json("provenance")["model_hash"], model["start"], run.read_json("layers")
        )
        base = store.read_base(key)
        if base is None:
            missing = [name for name in missing if "W0" not in MEASURES[name].needs]
        if missing:
            measure_run(run, base, missing)
    return missing
