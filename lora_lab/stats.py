"""Intervals over seeds."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from scipy.stats import t as student


def t_interval(values: Iterable[float], level: float = 0.95) -> tuple[float, float, float]:
    """Mean of independent values and its Student t interval.

    Parameters
    ----------
    values : iterable of float
        One value per seed, finite.
    level : float
        Coverage in (0, 1) for normally distributed values.

    Returns
    -------
    (mean, low, high) : tuple of float
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
    >>> t_interval([0.8])
    (0.8, nan, nan)
    """
    x = np.asarray(list(values), dtype=np.float64)
    assert np.isfinite(x).all(), "leave runs without a finite value out before averaging"
    assert 0 < level < 1
    if x.size == 0:
        return math.nan, math.nan, math.nan
    mean = float(x.mean())
    if x.size == 1:
        return mean, math.nan, math.nan
    half = float(student.ppf((1 + level) / 2, x.size - 1) * x.std(ddof=1) / math.sqrt(x.size))
    return mean, mean - half, mean + half
