"""Rows of measures from updates: each update is decomposed once and every measure applied to it.

Knows updates, spectra and measures; never models, data, adapters or training.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from lora_lab.linalg import Dense, Spectrum, Update, decompose
from lora_lab.linalg.spectrum import need_finite
from lora_lab.measures import MEASURES, Level, Measure, Refused
from lora_lab.nulls import NULLS, level, usual


def rows(
    layer: str,
    update: Update | Spectrum,
    /,
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
    (1.5625, 2.1, True)
    """
    given = {name: value for name, value in given.items() if value is not None}
    if "W0" in given:
        need_finite(given["W0"], what="base weight", layer=layer)
    chosen = {name: MEASURES[name] for name in (MEASURES if names is None else names)}
    if isinstance(update, Spectrum):
        spectrum = update
    else:
        given["update"] = update
        vectors = any(
            "vectors" in m.needs and set(m.given) <= _derived(given) for m in chosen.values()
        )
        spectrum = decompose(update, vectors=vectors, layer=layer)
    material = _Material(spectrum, given)
    against = usual(spectrum) if null == "usual" else null
    return [
        {"layer": layer, **row}
        for name, m in chosen.items()
        if material.meets(m)
        for row in _of_measure(name, m, material, against)
    ]


def _derived(given: Iterable[str]) -> set[str]:
    """What is given, and what follows from it."""
    return {*given, "base"} if "W0" in given else set(given)


def met(spectrum: Spectrum, given: Iterable[str]) -> set[str]:
    """The needs (see `measures.Measure`) that a spectrum and what is given beside it meet."""
    have = {"values"} | _derived(given)
    have |= {"vectors"} if spectrum.U is not None else set()
    return have | ({"r"} if spectrum.r is not None else set())


class _Material:
    """A spectrum and what else is known of its layer; what follows from it is made once."""

    def __init__(self, spectrum: Spectrum, given: dict[str, Any]) -> None:
        self.spectrum, self.given = spectrum, given

    def meets(self, m: Measure) -> bool:
        """Whether the measure's needs are met."""
        return set(m.needs) <= met(self.spectrum, self.given)

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
    needs = NULLS[against].given
    if not set(needs) <= material.given.keys():
        return missing
    return level(against, name, s, k, side, **material.of(needs))
