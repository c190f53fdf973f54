"""Intervals for a mean, a statistic of many units, and a rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats as scipy_stats
from scipy.stats import t as student

from lora_lab.registry import WrongInput

FEWEST = 20
"""Units from which on resampling is allowed."""


class Interval(NamedTuple):
    """An estimate and the bounds of its interval."""

    value: float
    low: float
    high: float


def t_interval(values: Iterable[float], level: float = 0.95) -> Interval:
    """Mean of independent values and its Student t interval.

    Parameters
    ----------
    values : iterable of float
        One value per seed, finite.
    level : float
        Coverage in (0, 1) for normally distributed values.

    Returns
    -------
    Interval
        ``mean ± t(level, n - 1) · std / sqrt(n)``, std with n - 1. The bounds of a single value
        are NaN: one seed says nothing about the spread. All three are NaN for no value.

    Raises
    ------
    AssertionError
        If a value is NaN or infinite: a diverged run must be left out by the caller, who then
        says how many were.

    References
    ----------
    Student, "The probable error of a mean", Biometrika 6 (1908).

    Examples
    --------
    >>> mean, low, high = t_interval([1.0, 2.0, 3.0])
    >>> round(mean, 6), round(low, 6), round(high, 6)
    (2.0, -0.484138, 4.484138)
    >>> tuple(t_interval([0.8]))
    (0.8, nan, nan)
    """
    x = np.asarray(list(values), dtype=np.float64)
    assert np.isfinite(x).all(), "leave runs without a finite value out before averaging"
    assert 0 < level < 1
    if x.size == 0:
        return Interval(math.nan, math.nan, math.nan)
    mean = float(x.mean())
    if x.size == 1:
        return Interval(mean, math.nan, math.nan)
    half = float(t_factor(x.size - 1, level) * x.std(ddof=1) / math.sqrt(x.size))
    return Interval(mean, mean - half, mean + half)


def t_factor(df: int, level: float = 0.95) -> float:
    """Standard errors on either side of a mean that its Student t interval spans.

    Parameters
    ----------
    df : int
        Degrees of freedom, at least 1: one less than there are values.

    >>> round(t_factor(2), 6)
    4.302653
    """
    return float(student.ppf((1 + level) / 2, df))


def bootstrap(
    values: ArrayLike,
    statistic: Callable[..., float] = np.mean,
    level: float = 0.95,
    seed: int = 0,
    resamples: int = 4999,
) -> Interval:
    """Bias-corrected and accelerated bootstrap interval of a statistic of independent units.

    Parameters
    ----------
    values : array_like, (n,)
        Finite, one for each unit (a test example, a layer), n >= 20.
    statistic : callable
        Of an array along `axis`.
    level : float
        Coverage in (0, 1), reached for large n.
    seed : int
        Of the resamples.

    Raises
    ------
    WrongInput
        For fewer than 20 units: the interval would be too short.

    References
    ----------
    Efron, "Better bootstrap confidence intervals", JASA 82 (1987).

    Examples
    --------
    >>> found = bootstrap(np.arange(40.0))
    >>> found.value, round(found.low), round(found.high)
    (19.5, 16, 23)
    """
    x = np.asarray(values, dtype=np.float64)
    need_units("a bootstrap interval", len(x))
    value = float(statistic(x))
    if np.ptp(x) == 0:
        return Interval(value, value, value)
    found = scipy_stats.bootstrap(
        (x,),
        statistic,
        confidence_level=level,
        n_resamples=resamples,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(value, float(found.low), float(found.high))


def need_units(what: str, units: int) -> None:
    """Refuse resampling of fewer than `FEWEST` units."""
    if units < FEWEST:
        raise WrongInput(
            f"{what} needs at least {FEWEST} units; got {units}. Use t intervals over seeds."
        )


def rate_interval(hits: int, trials: int, level: float = 0.95) -> Interval:
    """A rate and its Wilson interval.

    Parameters
    ----------
    hits, trials : int
        0 <= hits <= trials, trials >= 1.

    References
    ----------
    Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927).

    >>> [round(x, 3) for x in rate_interval(38, 40)]
    [0.95, 0.835, 0.986]
    """
    assert 0 <= hits <= trials
    assert trials >= 1
    found = scipy_stats.binomtest(hits, trials).proportion_ci(level, method="wilson")
    return Interval(hits / trials, float(found.low), float(found.high))
