"""Nulls: what a measure gives where there is nothing to find. One file is one null.

A null draws singular values of an update that holds no signal. The measure itself, applied to the
draws, gives the level that its value is compared with.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from threading import RLock
from typing import Any

import numpy as np

from lora_lab.linalg import Spectrum
from lora_lab.linalg.factored import Array, Update
from lora_lab.linalg.remember import remembered
from lora_lab.measures import MEASURES, Level, Refused
from lora_lab.registry import Registry

DRAWS = 39
"""Draws of one null. The ends of its central 95 % are then the smallest and the largest draw: a
value without signal, which is one more draw, lies outside with a chance of exactly 2 in 40."""

ENTRIES = 2**24
"""Nulls of single entries go over dense matrices, of at most this many entries."""

SEED = 20_210_617
"""Every null starts from it: the same spectrum has the same null everywhere."""

_ONE = RLock()
"""Held by the thread that draws for a shape: the others wait for it and do not draw the same."""


@dataclass(frozen=True)
class Null:
    """One null: how singular values of an update without signal are drawn.

    Attributes
    ----------
    draw : callable
        ``draw(spectrum, generator[, **needs]) -> ndarray`` of singular values, in any order; only
        shape, r and made_in of the spectrum may be read unless `update` or `W0` is needed.
    needs : tuple of str
        `r` (of a factored update), `update` itself, `W0`.
    """

    draw: Callable[..., Array]
    needs: tuple[str, ...]

    def __post_init__(self) -> None:
        # The registry names a member after the file that defines it.
        object.__setattr__(self, "__module__", self.draw.__module__)
        # Every row of a layer asks for the same draws.
        object.__setattr__(self, "spectra", remembered(self.spectra))

    @property
    def given(self) -> tuple[str, ...]:
        """The needs that are passed as keywords; empty: shape and r alone decide."""
        return tuple(need for need in self.needs if need != "r")

    def spectra(self, s: Spectrum, *given: Any) -> tuple[Spectrum, ...]:
        """Spectra of `DRAWS` updates without signal; `given` in the order of `Null.given`."""
        rng = np.random.default_rng([SEED, *s.shape, s.r or 0])
        material = dict(zip(self.given, given, strict=True))
        return tuple(
            Spectrum.of_values(self.draw(s, rng, **material), s.shape, s.made_in, s.r)
            for _ in range(DRAWS)
        )


NULLS: Registry[Null] = Registry(__name__, "null")


def define(needs: tuple[str, ...] = ()) -> Callable[[Callable[..., Array]], Callable[..., Array]]:
    """Decorator: enter a function as the null of its file (see `Null` for the arguments)."""

    def enter(draw: Callable[..., Array]) -> Callable[..., Array]:
        NULLS.register(Null(draw, needs))
        return draw

    return enter


def usual(s: Spectrum) -> str:
    """The null of an update of which no more is known: random factors or a random matrix."""
    return "gaussian" if s.r is None or s.r > s.q else "random_ba"


def draws(name: str, s: Spectrum, **given: Any) -> tuple[Spectrum, ...]:
    """Spectra of `DRAWS` updates without signal, of the shape (and r) of an update.

    Parameters
    ----------
    name : str
        A file of `lora_lab/nulls`.
    s : Spectrum
        Of the update.
    **given
        What the null needs: ``update=``, ``W0=``.

    Raises
    ------
    Refused
        If there is no such null of this update, with the reason.
    """
    null = NULLS[name]
    if "r" in null.needs and (s.r is None or s.r > s.q):
        raise Refused(f"the null {name!r} is of factors with r at most min(m, n) = {s.q}.")
    if null.given:
        return null.spectra(s, *(given[need] for need in null.given))
    # Noise has no inputs and outputs: a layer and its transpose have one null.
    with _ONE:
        return _by_shape(name, max(s.shape), min(s.shape), s.r, s.made_in)


@lru_cache(maxsize=64)
def _by_shape(name: str, m: int, n: int, r: int | None, made_in: str) -> tuple[Spectrum, ...]:
    return NULLS[name].spectra(Spectrum.of_values([1.0], (m, n), made_in, r))


def matrix(update: Update) -> Array:
    """dW as a matrix for a null of single entries.

    Raises
    ------
    Refused
        If it has more than `ENTRIES` entries.
    """
    m, n = update.shape
    if m * n > ENTRIES:
        raise Refused(
            f"a null of single entries is drawn up to {ENTRIES} of them; this update is {m} x {n}."
        )
    return update.dense()


def interval(values: Array) -> Level:
    """Mean and central 95 % of draws; NaN if there are none that are finite.

    The quantiles that one more draw falls below with these chances (type 6 of Hyndman & Fan 1996);
    of fewer than 39 draws, the smallest and the largest.

    >>> interval(np.arange(1.0, 40.0))
    (20.0, 1.0, 39.0)
    """
    finite = values[np.isfinite(values)]
    if not finite.size:
        return (np.nan, np.nan, np.nan)
    low, high = np.quantile(finite, [0.025, 0.975], method="weibull")
    return float(finite.mean()), float(low), float(high)


def level(
    null: str, measure: str, s: Spectrum, k: float | None, side: str | None, **given: Any
) -> Level:
    """What a measure of values gives on draws of a null: mean and central 95 %.

    NaN where there is no such null of this update, or the measure refuses its draws.
    """
    if not NULLS[null].given:
        long, short = max(s.shape), min(s.shape)
        with _ONE:
            return _level_by_shape(null, measure, long, short, s.r, s.made_in, k, side)
    return _level(null, measure, s, k, side, given)


@lru_cache(maxsize=100_000)
def _level_by_shape(
    null: str,
    measure: str,
    m: int,
    n: int,
    r: int | None,
    made_in: str,
    k: float | None,
    side: str | None,
) -> Level:
    return _level(null, measure, Spectrum.of_values([1.0], (m, n), made_in, r), k, side, {})


def _level(
    null: str,
    measure: str,
    s: Spectrum,
    k: float | None,
    side: str | None,
    given: dict[str, Any],
) -> Level:
    try:
        spectra = draws(null, s, **given)
    except Refused:
        return interval(np.array([]))
    return interval(np.array([_value(measure, one, k, side) for one in spectra]))


def _value(measure: str, s: Spectrum, k: float | None, side: str | None) -> float:
    try:
        return MEASURES[measure](s, k, side)
    except Refused:
        return math.nan
