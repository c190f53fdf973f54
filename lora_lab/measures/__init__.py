"""Measures: spectrum to number. One file is one measure, named like the file.

To add one, write `measures/NAME.py` with a function `NAME(s, ...)` under `@define(...)`; its
docstring's example is the golden number. Rows, law tests and documentation come by themselves.

Conventions of all: the zero update has rank 0 and every ratio NaN; nothing depends on the size
of dW; counts at a threshold have the relative slack `SLACK`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from lora_lab.linalg import Dense, Spectrum, decompose
from lora_lab.linalg.factored import Array
from lora_lab.registry import Registry, WrongInput, unknown

SLACK = 1e-12
"""Relative slack of thresholds, so that a spectrum that sits on one does not flip by rounding."""

OF_SPECTRUM = ("values", "vectors", "r")
"""Needs that the Spectrum itself carries; every other need is passed as a keyword of its name."""

DIRECTIONS = 64
"""Leading directions that measures of vectors look at, at most; what sweeps keep of an update."""

Grid = tuple[float, ...]
Level = tuple[float, float, float]
"""A null: its mean and the ends of its central 95 %."""


class Refused(WrongInput):
    """A measure has no answer for this update; the message is the reason. A row holds NaN."""


@dataclass(frozen=True)
class Measure:
    """One measure: the function of its file, and what analysis must know to call it.

    Attributes
    ----------
    function : callable
        ``function(spectrum[, k][, side][, **needs]) -> float``.
    kind : str
        `rank` (0 for the zero update), `ratio` (NaN for it) or `size` (0; in units of dW).
    needs : tuple of str
        `values`, `vectors` (at most `DIRECTIONS` leading ones are there), `r` (a factored update's
        configured rank), or keywords: `W0` (m, n); `base`, the Spectrum of W0 with all vectors;
        `update` itself; `activations`, E[x xᵀ] (n, n); `pair`, another Spectrum with vectors of
        the same layer; `pair_update`, that update itself; `seeds`, such Spectra of runs that
        differ in nothing but the seed.
    grid : callable or None
        Spectrum to the k of the measure's rows; None: the measure has no k.
    sides : tuple of str
        Variants, the first is the default; empty: the measure has none.
    null : str, callable or None
        What the value is compared with: `random`, the same measure of random updates of the same
        kind and shape (`lora_lab.nulls`); a function of the measure's own arguments that gives a
        `Level`; None where there is nothing to compare with.
    at : str
        When a run's rows are taken: at `every` stored step, at the `end` only, or `later` (by
        `lora-lab measure` and `analyze`, not by the training process).
    """

    function: Callable[..., float]
    kind: str
    needs: tuple[str, ...]
    grid: Callable[[Spectrum], Grid] | None
    sides: tuple[str, ...]
    null: str | Callable[..., Level] | None
    at: str

    def __post_init__(self) -> None:
        # The registry names a member after the file that defines it.
        object.__setattr__(self, "__module__", self.function.__module__)

    @property
    def given(self) -> tuple[str, ...]:
        """The needs that are passed as keywords."""
        return tuple(need for need in self.needs if need not in OF_SPECTRUM)

    def arguments(self, k: float | None, side: str | None, given: dict[str, Any]) -> dict[str, Any]:
        """Keywords of the function (and of its null) for one row."""
        arguments = {name: given[name] for name in self.given}
        if self.grid is not None and k is not None:
            arguments["k"] = k
        if side is not None:
            if side not in self.sides:
                raise unknown("side", side, self.sides)
            arguments["side"] = side
        return arguments

    def __call__(
        self, s: Spectrum, k: float | None = None, side: str | None = None, **given: Any
    ) -> float:
        """The measure's value of a spectrum; see the function's own documentation."""
        return float(self.function(s, **self.arguments(k, side, given)))


MEASURES: Registry[Measure] = Registry(__name__, "measure")


def define(
    kind: str = "rank",
    needs: tuple[str, ...] = ("values",),
    grid: Grid | Callable[[Spectrum], Grid] | None = None,
    sides: tuple[str, ...] = (),
    null: str | Callable[..., Level] | None = None,
    at: str = "every",
) -> Callable[[Callable[..., float]], Callable[..., float]]:
    """Decorator: enter a function as the measure of its file (see `Measure` for the arguments).

    A rank or ratio of singular values alone is compared with `random` updates by itself.
    """
    shapely = kind != "size" and set(needs) <= {"values", "r"}
    against = "random" if shapely and null is None else null

    def enter(function: Callable[..., float]) -> Callable[..., float]:
        points = grid if grid is None or callable(grid) else lambda _: grid
        MEASURES.register(Measure(function, kind, needs, points, sides, against, at))
        return function

    return enter


def measure(
    name: str, spectrum: Spectrum, k: float | None = None, side: str | None = None, **given: Any
) -> float:
    """One measure of one spectrum.

    Parameters
    ----------
    name : str
        A file of `lora_lab/measures`.
    spectrum : Spectrum
    k : float, optional
        Parameter of the measure (threshold, kept directions); None: its default.
    side : str, optional
        Variant of the measure; None: its first.
    **given
        What the measure needs beside the spectrum, for example ``W0=`` (``base=`` follows from
        it).

    Raises
    ------
    WrongInput
        Unknown measure or side, k out of range or for a measure without k, a missing need.

    Examples
    --------
    >>> s = Spectrum.of_values([4.0, 3.0], shape=(5, 7))
    >>> measure("stable_rank", s), measure("energy_rank", s, k=0.5)
    (1.5625, 1.0)
    >>> measure("stabel_rank", s)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    lora_lab.registry.WrongInput: unknown measure 'stabel_rank'; ... Did you mean 'stable_rank'?
    """
    m = MEASURES[name]
    if "base" in m.needs and given.get("base") is None and given.get("W0") is not None:
        given["base"] = decompose(Dense(given["W0"]), vectors=True)
    if k is not None and m.grid is None:
        raise WrongInput(f"measure {name!r} has no parameter k; got k = {k}. Leave it out.")
    if side is not None and not m.sides:
        raise WrongInput(f"measure {name!r} has no sides; got side = {side!r}. Leave it out.")
    # W0 stands for both: its Spectrum follows from it.
    absent = [need for need in m.given if given.get(need) is None]
    missing = list(dict.fromkeys("W0" if need == "base" else need for need in absent))
    missing += ["the configured rank r of a factored update"] * (
        "r" in m.needs and spectrum.r is None
    )
    missing += ["a spectrum with vectors"] * ("vectors" in m.needs and spectrum.U is None)
    if missing:
        need = ", ".join(missing)
        raise WrongInput(f"measure {name!r} needs {need}, which this call does not give.")
    return m(spectrum, k, side, **given)


def doubling(limit: int) -> Grid:
    """1, 2, 4, 8, ... up to a limit: the grid of measures of leading directions.

    >>> doubling(6), doubling(0)
    ((1.0, 2.0, 4.0), ())
    """
    return tuple(float(2**i) for i in range(limit.bit_length()))


def tails(weights: Array) -> Array:
    """Tail sums t_k = sum of weights beyond the k-th, k = 0..q, added from the small end."""
    return np.concatenate([np.cumsum(weights[::-1])[::-1], [0.0]])


def share_rank(weights: Array, share: float) -> int:
    """Fewest leading weights that hold a share of their sum; 0 if all are 0.

    >>> share_rank(np.array([16.0, 9.0]), 0.64), share_rank(np.array([16.0, 9.0]), 0.65)
    (1, 2)
    """
    if not 0 < share <= 1:
        raise WrongInput(f"the threshold k must be in (0, 1]; got {share}.")
    tail = tails(weights)
    return int(np.argmax(tail <= tail[0] * (1 - share * (1 - SLACK))))


def entropy_rank(weights: Array) -> float:
    """exp of the Shannon entropy of weights / sum; 0 if all are 0."""
    p = weights[weights > 0]
    if not p.size:
        return 0.0
    p = p / p.sum()
    return float(np.exp(-np.sum(p * np.log(p))))


class _Names(ModuleType):
    # `lora_lab.measures` is this package and, in the public surface, `lora_lab.measures()`.
    def __call__(self) -> list[str]:
        """Names of all measures."""
        return list(MEASURES)


sys.modules[__name__].__class__ = _Names
