"""Intervals over seeds, and fitted slopes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import linregress
from scipy.stats import t as student

from lora_lab.registry import WrongInput


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


@dataclass(frozen=True)
class Slope:
    """A fitted straight line, see `slope`.

    Attributes
    ----------
    slope, low, high : float
        Slope and the bounds of its interval; equal for points that lie on a line.
    intercept : float
        Value of the line at x = 0.
    n : int
        Number of points.
    """

    slope: float
    low: float
    high: float
    intercept: float
    n: int


def slope(x: ArrayLike, y: ArrayLike, level: float = 0.95) -> Slope:
    """Slope of y on x by ordinary least squares, with its Student t interval.

    Of ln‖∇‖ on ln r at one step it is the exponent with which a norm grows with r.

    Parameters
    ----------
    x, y : array_like, (n,)
        Finite, n >= 3, x not constant.
    level : float
        Coverage in (0, 1) for independent normal errors of equal variance.

    Returns
    -------
    Slope
        ``slope ± t(level, n - 2) · standard error``. Unchanged by y → y + c and x → x + c; the
        slope goes with the unit of y over that of x, for logarithms it has none.

    Raises
    ------
    WrongInput
        For fewer than 3 points (two fit any line exactly), values that are not finite, x and y of
        different lengths, or a constant x.

    References
    ----------
    Draper & Smith, "Applied Regression Analysis", 3rd ed. (1998), section 1.4.

    Examples
    --------
    >>> fit = slope([0.0, 1.0, 2.0, 3.0], [0.0, 1.0, 1.0, 2.0])
    >>> round(fit.slope, 6), round(fit.low, 6), round(fit.high, 6), round(fit.intercept, 6)
    (0.6, -0.008487, 1.208487, 0.1)
    >>> slope([1.0, 2.0], [1.0, 2.0])
    Traceback (most recent call last):
        ...
    lora_lab.registry.WrongInput: a slope needs at least 3 points; got 2. Give more values of x.
    """
    assert 0 < level < 1
    a, b = (np.asarray(v, dtype=np.float64).ravel() for v in (x, y))
    if len(a) != len(b):
        raise WrongInput(f"x and y must have one length; got {len(a)} and {len(b)}.")
    if len(a) < 3:
        raise WrongInput(f"a slope needs at least 3 points; got {len(a)}. Give more values of x.")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise WrongInput(
            "x and y must be finite to fit a slope; leave out points that are NaN or Inf"
            " (the logarithm of 0 is)."
        )
    if np.ptp(a) == 0:
        raise WrongInput(f"x must vary to fit a slope; got {len(a)} times {a[0]:g}.")
    fit = linregress(a, b)
    half = float(student.ppf((1 + level) / 2, len(a) - 2) * fit.stderr)
    value = float(fit.slope)
    return Slope(value, value - half, value + half, float(fit.intercept), len(a))
