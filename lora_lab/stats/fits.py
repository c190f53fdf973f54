"""Fitted lines and curves, with intervals and Akaike's criterion."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import OptimizeWarning, curve_fit
from scipy.stats import t as student

from lora_lab.registry import WrongInput
from lora_lab.stats.intervals import Interval


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
    return blocked_slope(a, b, [0] * len(a), level)


def blocked_slope(
    x: ArrayLike, y: ArrayLike, block: Sequence[object], level: float = 0.95
) -> Slope:
    """Slope of y on x with a level of its own for each block: what seeds share cancels.

    Parameters
    ----------
    x, y : array_like, (n,)
        Finite.
    block : sequence, (n,)
        What each point belongs to, such as its seed; x must vary inside a block.
    level : float
        Coverage for independent normal errors of equal variance around the blocks' lines.

    Returns
    -------
    Slope
        With n - blocks - 1 degrees of freedom; the intercept is the mean of the blocks'.

    Raises
    ------
    WrongInput
        If no degree of freedom is left, or x varies in no block.

    Examples
    --------
    >>> fit = blocked_slope([0, 1, 2, 0, 1, 2], [0.0, 1.0, 2.1, 5.0, 6.1, 7.0], "aaabbb")
    >>> round(fit.slope, 3), fit.low < 1.0 < fit.high
    (1.025, True)
    """
    a, b = (np.asarray(v, dtype=np.float64).ravel() for v in (x, y))
    names, which = np.unique([str(name) for name in block], return_inverse=True)
    assert np.isfinite(a).all()
    assert np.isfinite(b).all()
    free = len(a) - len(names) - 1
    if free < 1:
        raise WrongInput(
            f"a slope within {len(names)} blocks needs at least {len(names) + 2} points; got "
            f"{len(a)}."
        )
    counts = np.bincount(which)
    mean_a, mean_b = (np.bincount(which, v) / counts for v in (a, b))
    da, db = a - mean_a[which], b - mean_b[which]
    spread = float(da @ da)
    if spread == 0:
        raise WrongInput("x must vary inside a block to fit a slope.")
    value = float(da @ db) / spread
    residual = db - value * da
    error = math.sqrt(float(residual @ residual) / free / spread)
    half = float(student.ppf((1 + level) / 2, free)) * error
    intercept = float((mean_b - value * mean_a).mean())
    return Slope(value, value - half, value + half, intercept, len(a))


@dataclass(frozen=True)
class Fit:
    """A fitted curve.

    Attributes
    ----------
    parameters : dict of str to Interval
        Estimates with t intervals from the linearised fit; NaN bounds where it has no unique
        solution.
    aic : float
        Akaike's criterion with the correction for few points, for normal errors; lower is better,
        and only differences between fits of the same points mean something.
    residual : float
        Root of the mean squared residual.
    n : int
        Points.
    """

    parameters: Mapping[str, Interval]
    aic: float
    residual: float
    n: int


def fit_curve(
    curve: Callable[..., np.ndarray],
    x: ArrayLike,
    y: ArrayLike,
    start: Mapping[str, float],
    level: float = 0.95,
) -> Fit:
    """Least-squares fit of ``y = curve(x, **parameters)``.

    Parameters
    ----------
    curve : callable
        ``curve(x, *parameters)``, in the order of `start`.
    x, y : array_like, (n,)
        Finite, at least two more points than parameters.
    start : mapping of str to float
        Where the search starts.

    Raises
    ------
    WrongInput
        For too few points, or where the search finds no end.

    References
    ----------
    Hurvich & Tsai, "Regression and time series model selection in small samples", Biometrika 76
    (1989): AICc = n ln(RSS/n) + 2p + 2p(p+1)/(n-p-1) with p counting the error's variance.

    Examples
    --------
    >>> x = np.array([1.0, 2.0, 4.0, 8.0, 16.0])
    >>> fit = fit_curve(lambda x, a, b: a - b / x, x, 3 - 2 / x, {"a": 1.0, "b": 1.0})
    >>> {name: round(found.value, 6) for name, found in fit.parameters.items()}
    {'a': 3.0, 'b': 2.0}
    """
    a, b = (np.asarray(v, dtype=np.float64).ravel() for v in (x, y))
    p = len(start)
    if len(a) < p + 3:
        raise WrongInput(f"a curve of {p} parameters needs at least {p + 3} points; got {len(a)}.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OptimizeWarning)
        try:
            best, covariance = curve_fit(curve, a, b, p0=list(start.values()), maxfev=20_000)
        except RuntimeError as error:
            raise WrongInput(f"the fit finds no end: {error}") from error
    rss = float(((b - curve(a, *best)) ** 2).sum())
    errors = np.sqrt(np.diag(covariance))
    half = student.ppf((1 + level) / 2, len(a) - p) * errors
    half = np.where(np.isfinite(half), half, np.nan)
    n, q = len(a), p + 1
    with np.errstate(divide="ignore"):
        aic = n * np.log(rss / n) + 2 * q + 2 * q * (q + 1) / (n - q - 1)
    parameters = {
        name: Interval(float(v), float(v - h), float(v + h))
        for name, v, h in zip(start, best, half, strict=True)
    }
    return Fit(parameters, float(aic), math.sqrt(rss / n), n)
