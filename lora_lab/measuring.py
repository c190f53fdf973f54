"""Measures of finished runs: from what the store keeps of them, without training."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from lora_lab.analysis import met, rows
from lora_lab.checkpoints import read_updates
from lora_lab.linalg import Dense, Spectrum, Update, decompose, updates_of
from lora_lab.linalg.factored import Array
from lora_lab.measures import MEASURES
from lora_lab.store import Busy, Corrupt, RunDir, Store

OF_A_RUN = {"values", "vectors", "r", "W0", "base", "update"}
"""Needs of measures that one run can meet; the others need a second update, or inputs."""

SOON = ("every", "end")
"""When measures are taken that the training process and the end of a sweep take."""

LARGE = 2**20
"""Entries of W0 from which its decomposition is kept: reading a smaller one saves nothing."""


@dataclass(frozen=True)
class Final:
    """The final update of one layer: its spectrum, and what measures need beside it."""

    spectrum: Spectrum
    given: dict[str, Any] = field(default_factory=dict)

    @property
    def needs(self) -> set[str]:
        """The needs that it meets."""
        return met(self.spectrum, self.given)


def base_key(model_hash: str, start: str, layers: Iterable[str], quantize: str = "none") -> str:
    """Name under which the store keeps W0 of these layers for all runs that share it."""
    storage = [] if quantize == "none" else [f"quantize={quantize}"]
    text = "\n".join([model_hash, start, *storage, *sorted(layers)])
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def storage_of(run: RunDir) -> str:
    """How a run's frozen base was stored; runs of before there was a choice do not say."""
    return str(run.read_json("config")["config"]["model"].get("quantize", "none"))


def base_spectra(store: Store, key: str, base: Mapping[str, Array]) -> dict[str, Spectrum]:
    """W0 of every layer decomposed, with all vectors; large ones once for all runs.

    Parameters
    ----------
    store : Store
        Its cache keeps them.
    key : str
        `base_key` of the layers.
    base : mapping of str to ndarray (m, n)
        W0 by layer.
    """
    if sum(W0.size for W0 in base.values()) < LARGE:
        return {layer: decompose(Dense(W0), vectors=True) for layer, W0 in base.items()}
    stored = store.read_base(f"{key}-svd")
    if stored is None:
        found = {layer: decompose(Dense(W0), vectors=True) for layer, W0 in base.items()}
        parts = ("values", "U", "Vh")
        stored = {f"{n}.{part}": getattr(s, part) for n, s in found.items() for part in parts}
        store.write_base(f"{key}-svd", stored)
    return {
        layer: Spectrum(
            stored[f"{layer}.values"], W0.shape, stored[f"{layer}.U"], stored[f"{layer}.Vh"]
        )
        for layer, W0 in base.items()
    }


def measure_run(
    run: RunDir, finals: Mapping[str, Final], at: Iterable[str], missing: Iterable[str] = MEASURES
) -> list[str]:
    """Take measures of a finished run and write them beside it.

    Parameters
    ----------
    run : RunDir
        Finished.
    finals : mapping of str to Final
        Its final updates by layer; earlier steps are measured from their stored singular values.
    at : iterable of str
        Which measures: `every`, `end`, `later` (see `measures.Measure`).
    missing : iterable of str
        Names to choose from.

    Returns
    -------
    list of str
        The measures whose needs are met; they count as taken.
    """
    if not finals:
        return []
    have = set.intersection(*(final.needs for final in finals.values()))
    # A factored layer among dense ones: measures of its r stand in its rows alone.
    have |= {"r"} if any("r" in final.needs for final in finals.values()) else set()
    wanted = set(at)
    names = [n for n in missing if MEASURES[n].at in wanted and set(MEASURES[n].needs) <= have]
    if not names:
        return []
    before = [n for n in names if MEASURES[n].at == "every" and not MEASURES[n].given]
    about = run.read_json("layers")
    sigma = run.read_table("spectra")
    last = sigma["step"].max()
    out = []
    for (step, name), group in sigma.groupby(["step", "layer"], sort=False):
        layer = str(name)
        if step == last:
            final = finals[layer]
            found = rows(layer, final.spectrum, names, **final.given)
        else:
            found = rows(layer, _stored(group["sigma"], about[layer]), before)
        out += [{"step": step, **row} for row in found]
    run.write_measures(pd.DataFrame(out).drop(columns="flag", errors="ignore"), names)
    return names


def _stored(sigma: Iterable[float], about: Mapping[str, Any]) -> Spectrum:
    """A spectrum of a run from its table and what `layers.json` says of the layer."""
    return Spectrum.of_values(sigma, tuple(about["shape"]), about["made_in"], about["r"])


def kept(run: RunDir) -> tuple[dict[str, Update], bool]:
    """Final updates that a finished run has kept, and whether they are whole.

    Of a full fine-tuning under `host.keep=top` only leading directions are kept, as factors.
    """
    if run.has_tensors("adapter_model"):
        with warnings.catch_warnings(action="ignore"):  # of embeddings, which `head` holds
            return {layer: update for layer, _, update in read_updates(adapter=run.path)}, True
    if not run.has_tensors("update"):
        return {}, True
    updates = updates_of(run.read_tensors("update"))
    return updates, all(isinstance(update, Dense) for update in updates.values())


def finals_of(store: Store, run: RunDir) -> dict[str, Final]:
    """Final updates of a finished run, from what the store keeps of it and of its base."""
    about, sigma = run.read_json("layers"), run.read_table("spectra")
    sigma = sigma[sigma["step"] == sigma["step"].max()]
    exact = {str(name): _stored(group["sigma"], about[str(name)]) for name, group in
             sigma.groupby("layer", sort=False)}  # fmt: skip
    updates, whole = kept(run)
    start = run.read_json("config")["config"]["model"]["start"]
    model_hash = run.read_json("provenance")["model_hash"]
    key = base_key(model_hash, start, about, storage_of(run))
    base = store.read_base(key) or {}
    bases = base_spectra(store, key, base)
    out = {}
    for layer, spectrum in exact.items():
        given: dict[str, Any] = {}
        if layer in updates:
            spectrum = _with_vectors(spectrum, updates[layer])
            given |= {"update": updates[layer]} if whole else {}
        if layer in base:
            given |= {"W0": base[layer].astype(np.float64), "base": bases[layer]}
        out[layer] = Final(spectrum, given)
    return out


def _with_vectors(exact: Spectrum, update: Update) -> Spectrum:
    """Exact singular values with the vectors of what was kept of the update."""
    found = decompose(update, vectors=True)
    return exact if found.zero else replace(exact, U=found.U, Vh=found.Vh)


def measure_missing(
    store: Store, at: Iterable[str] = ("every", "end", "later")
) -> dict[str, list[str]]:
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
            taken = _measure_missing(store, store.run(run_id), set(at))
        except Busy:
            continue
        except Corrupt as error:
            warnings.warn(f"{error}; not measured", stacklevel=2)
            continue
        if taken:
            done[run_id] = taken
    return done


def _measure_missing(store: Store, run: RunDir, at: set[str]) -> list[str]:
    if run.status() != "done" or not run.has_json("layers"):
        return []
    taken = run.measured()
    # Of dense updates no measure of r is missing: for it alone their weights need not be read.
    ranked = any(layer["r"] is not None for layer in run.read_json("layers").values())
    possible = OF_A_RUN if ranked else OF_A_RUN - {"r"}
    missing = [
        name
        for name in MEASURES
        if name not in taken and MEASURES[name].at in at and set(MEASURES[name].needs) <= possible
    ]
    return measure_run(run, finals_of(store, run), at, missing) if missing else []
