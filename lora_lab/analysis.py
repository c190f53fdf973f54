"""Rows of measures from updates: each update is decomposed once and every measure applied to it.

Knows updates, spectra and measures; never models, data, adapters or training.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lora_lab import schema
from lora_lab.checkpoints import read_updates
from lora_lab.layers import depth_of, module_of
from lora_lab.linalg import Dense, Spectrum, Update, decompose
from lora_lab.linalg.factored import Array
from lora_lab.linalg.spectrum import need_finite
from lora_lab.measures import MEASURES, Level, Measure, Refused
from lora_lab.nulls import NULLS, level, usual
from lora_lab.store import Busy, Corrupt, RunDir, Store

COLUMNS = tuple(name for name in schema.MEASURES if name not in ("run_id", "step"))
"""Columns of `analyze`, beside `flag`."""


def rows(
    layer: str,
    update: Update | Spectrum,
    names: Iterable[str] | None = None,
    null: str | None = "usual",
    **given: Any,
) -> list[dict[str, Any]]:
    """Every measure of one layer's update that the given material allows.

    Parameters
    ----------
    layer : str
        The layer's name.
    update : Factored, Dense or Spectrum
        An update is decomposed here, with vectors only if a measure needs them.
    names : iterable of str, optional
        Measures to take; None: all.
    null : str or None
        What values are compared with: a file of `lora_lab/nulls`, `usual` (random factors for a
        factored update, a random matrix for a dense one), or None: no nulls are drawn.
    **given
        What measures need beside the spectrum (see `measures.Measure`): ``W0=`` (from which
        ``base=`` follows), ``update=`` when a Spectrum is given, ``activations=``, ``pair=`` …
        Measures whose needs are not met have no row: missing is no row, never a number.

    Returns
    -------
    list of dict
        Keys layer, measure, k (NaN if the measure has none), side ('' if none), value, null,
        null_low, null_high (NaN if it has no null), and flag: the reason where a measure refuses
        (then the value is NaN), else ''.

    Raises
    ------
    WrongInput
        For NaN or Inf in the update or in W0, naming the layer, and for an unknown measure.

    Examples
    --------
    >>> s = Spectrum.of_values([4.0, 3.0], shape=(5, 7))
    >>> [row] = rows("encoder.0.query", s, ["stable_rank"])
    >>> row["value"], round(row["null"], 1), row["null_low"] < row["null"] < row["null_high"]
    (1.5625, 2.0, True)
    """
    given = {name: value for name, value in given.items() if value is not None}
    if "W0" in given:
        need_finite(given["W0"], what="base weight", layer=layer)
    chosen = {name: MEASURES[name] for name in (MEASURES if names is None else names)}
    if isinstance(update, Spectrum):
        spectrum = update
    else:
        vectors = any("vectors" in m.needs for m in chosen.values())
        spectrum = decompose(update, vectors=vectors, layer=layer)
        given["update"] = update
    material = _Material(spectrum, given)
    against = usual(spectrum) if null == "usual" else null
    return [
        {"layer": layer, **row}
        for name, m in chosen.items()
        if material.meets(m)
        for row in _of_measure(name, m, material, against)
    ]


class _Material:
    """A spectrum and what else is known of its layer; what follows from it is made once."""

    def __init__(self, spectrum: Spectrum, given: dict[str, Any]) -> None:
        self.spectrum, self.given = spectrum, given

    def meets(self, m: Measure) -> bool:
        """Whether the measure's needs are met."""
        have = {"values", *self.given}
        have |= {"vectors"} if self.spectrum.U is not None else set()
        have |= {"r"} if self.spectrum.r is not None else set()
        have |= {"base"} if "W0" in self.given else set()
        return set(m.needs) <= have

    def of(self, needs: Iterable[str]) -> dict[str, Any]:
        """The keywords that a measure or a null needs."""
        if "base" in needs and "base" not in self.given:
            self.given["base"] = decompose(Dense(self.given["W0"]), vectors=True)
        return {need: self.given[need] for need in needs}


def _of_measure(
    name: str, m: Measure, material: _Material, against: str | None
) -> list[dict[str, Any]]:
    s, given, out = material.spectrum, material.of(m.given), []
    for k in m.grid(s) if m.grid else (None,):
        for side in m.sides or (None,):
            value, flag = math.nan, ""
            try:
                value = m(s, k, side, **given)
            except Refused as reason:
                flag = str(reason)
            mean, low, high = _level(name, m, material, against, k, side)
            out.append(
                {
                    "measure": name,
                    "k": math.nan if k is None else k,
                    "side": side or "",
                    "value": value,
                    "null": mean,
                    "null_low": low,
                    "null_high": high,
                    "flag": flag,
                }
            )
    return out


def _level(
    name: str,
    m: Measure,
    material: _Material,
    against: str | None,
    k: float | None,
    side: str | None,
) -> Level:
    """The null of one row; NaN where there is none or the update is zero."""
    missing = (math.nan, math.nan, math.nan)
    s = material.spectrum
    if against is None or m.null is None or s.zero:
        return missing
    if callable(m.null):
        return m.null(s, **m.arguments(k, side, material.of(m.given)))
    needs = [need for need in NULLS[against].needs if need != "r"]
    if not set(needs) <= material.given.keys():
        return missing
    return level(against, name, s, k, side, **material.of(needs))


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
        The columns of `schema.MEASURES` without run_id and step, and flag (`zero update` for a
        layer that training did not change, the reason where a measure refuses, else ''), in the
        order of the model's layers.

    Raises
    ------
    WrongInput
        As `read_updates` and `rows`.
    """
    chosen = None if names is None else list(names)
    out = []
    for layer, W0, update in read_updates(base=base, tuned=tuned, adapter=adapter):
        found = rows(layer, update, chosen, W0=W0)
        about = {
            "module": module_of(layer),
            "depth": depth_of(layer),
        }
        zero = {} if update.norm() else {"flag": "zero update"}
        out += [row | about | zero for row in found]
    table = pd.DataFrame(out, columns=[*COLUMNS, "flag"])
    floats = [name for name in COLUMNS if schema.MEASURES[name][0] == "float64"]
    return table.astype(dict.fromkeys(floats, "float64"))


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
        out += [{"step": step, **row} for row in rows(layer, spectrum, chosen, W0=W0)]
    run.write_measures(pd.DataFrame(out).drop(columns="flag", errors="ignore"), chosen)


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
