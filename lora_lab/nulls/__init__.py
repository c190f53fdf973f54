"""Nulls: what a measure gives where there is nothing to find. One file is one null.

A null draws singular values of an update that holds no signal. The measure itself, applied to the
draws, gives the level that its value is compared with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from lora_lab.linalg import Spectrum
from lora_lab.linalg.factored import Array
from lora_lab.measures import MEASURES, Level
from lora_lab.registry import Registry

DRAWS = 20
"""Draws of one null. The ends of its central 95 % are then about the smallest and largest draw."""

SEED = 20_210_617
"""Every null starts from it: the same spectrum has the same null everywhere."""


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
    """
    null = NULLS[name]
    if not set(null.needs) - {"r"}:
        return _by_shape(name, s.shape, s.r, s.made_in)
    return _drawn(null, s, {need: given[need] for need in null.needs if need != "r"})


@lru_cache(maxsize=64)
def _by_shape(
    name: str, shape: tuple[int, int], r: int | None, made_in: str
) -> tuple[Spectrum, ...]:
    return _drawn(NULLS[name], Spectrum.of_values([1.0], shape, made_in, r), {})


def _drawn(null: Null, s: Spectrum, given: dict[str, Any]) -> tuple[Spectrum, ...]:
    rng = np.random.default_rng([SEED, *s.shape, s.r or 0])
    return tuple(
        Spectrum.of_values(null.draw(s, rng, **given), s.shape, s.made_in, s.r)
        for _ in range(DRAWS)
    )


def interval(values: Array) -> Level:
    """Mean and central 95 % of draws; NaN if there are none that are finite.

    >>> interval(np.array([1.0, 2.0, 3.0]))
    (2.0, 1.05, 2.95)
    """
    finite = values[np.isfinite(values)]
    if not finite.size:
        return (np.nan, np.nan, np.nan)
    low, high = np.quantile(finite, [0.025, 0.975])
    return float(finite.mean()), float(low), float(high)


def level(
    null: str, measure: str, s: Spectrum, k: float | None, side: str | None, **given: Any
) -> Level:
    """What a measure of values gives on draws of a null: mean and central 95 %."""
    if not set(NULLS[null].needs) - {"r"}:
        return _level_by_shape(null, measure, s.shape, s.r, s.made_in, k, side)
    return _level(draws(null, s, **given), measure, k, side)


@lru_cache(maxsize=100_000)
def _level_by_shape(
    null: str,
    measure: str,
    shape: tuple[int, int],
    r: int | None,
    made_in: str,
    k: float | None,
    side: str | None,
) -> Level:
    return _level(_by_shape(null, shape, r, made_in), measure, k, side)


def _level(spectra: tuple[Spectrum, ...], measure: str, k: float | None, side: str | None) -> Level:
    m = MEASURES[measure]
    return interval(np.array([m(one, k, side) for one in spectra]))
