"""Tests of paired differences, of equivalence, and of many hypotheses at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats as scipy_stats
from scipy.stats import t as student

from lora_lab.registry import WrongInput
from lora_lab.stats.intervals import need_units, t_interval


@dataclass(frozen=True)
class Comparison:
    """The mean of paired differences and what is known of it.

    Attributes
    ----------
    mean, low, high : float
        Mean difference and its t interval; the bounds are NaN for one pair.
    p : float
        Two-sided p of "the mean is `null`".
    sd : float
        Standard deviation of the differences (n - 1), NaN for one pair.
    n : int
        Pairs.
    """

    mean: float
    low: float
    high: float
    p: float
    sd: float
    n: int


def paired(
    one: ArrayLike, other: ArrayLike | float = 0.0, null: float = 0.0, level: float = 0.95
) -> Comparison:
    """Student's t test and interval of the mean of ``one - other``, pair by pair.

    Parameters
    ----------
    one, other : array_like, (n,)
        Finite; values of the same seed (and cell) stand at the same place. A number for `other` is
        taken from each.
    null : float
        The mean that is tested.

    Returns
    -------
    Comparison
        Differences that are all equal have an interval of no length and p = 0 or 1.

    References
    ----------
    Student, "The probable error of a mean", Biometrika 6 (1908).

    Examples
    --------
    >>> found = paired([0.81, 0.80, 0.83], [0.78, 0.79, 0.79])
    >>> round(found.mean, 4), round(found.low, 3), round(found.high, 3), round(found.p, 3)
    (0.0267, -0.011, 0.065, 0.094)
    """
    x, y = np.asarray(one, dtype=np.float64), np.asarray(other, dtype=np.float64)
    if y.ndim and x.shape != y.shape:
        raise WrongInput(f"pairs need two lists of one length; got {x.shape} and {y.shape}.")
    d = x - y
    assert np.isfinite(d).all(), "leave runs without a finite value out before comparing"
    n = len(d)
    if n == 0:
        raise WrongInput("a comparison needs at least one pair; got none.")
    mean, low, high = t_interval(d, level)
    if n == 1:
        return Comparison(mean, low, high, math.nan, math.nan, 1)
    sd = float(d.std(ddof=1))
    if sd == 0:
        return Comparison(mean, low, high, float(mean == null), 0.0, n)
    error = sd / math.sqrt(n)
    p = float(2 * student.sf(abs(mean - null) / error, n - 1))
    return Comparison(mean, low, high, p, sd, n)


def equivalence(one: ArrayLike, other: ArrayLike | float, margin: float) -> float:
    """p of two one-sided t tests: below 0.05, the mean difference lies within ±margin.

    Parameters
    ----------
    one, other : array_like, (n,)
        As for `paired`, n >= 2.
    margin : float
        Above 0, in the unit of the values, fixed before looking.

    Returns
    -------
    float
        The larger of the two p. Equivalence at level α is the same as a 1 - 2α interval inside
        ±margin.

    References
    ----------
    Schuirmann, "A comparison of the two one-sided tests procedure and the power approach",
    J. Pharmacokinet. Biopharm. 15 (1987).

    Examples
    --------
    >>> round(equivalence([0.80, 0.81, 0.82], [0.80, 0.81, 0.81], margin=0.02), 3)
    0.019
    >>> equivalence([0.90, 0.91, 0.92], [0.80, 0.81, 0.81], margin=0.02) > 0.5
    True
    """
    assert margin > 0
    low, high = (paired(one, other, null=edge) for edge in (-margin, margin))
    above = low.p / 2 if low.mean > -margin else 1 - low.p / 2
    below = high.p / 2 if high.mean < margin else 1 - high.p / 2
    return float(max(above, below))


def permutation(one: ArrayLike, other: ArrayLike | float = 0.0, seed: int = 0) -> float:
    """Two-sided p of a sign-flip test on paired differences of at least 20 units.

    Parameters
    ----------
    one, other : array_like, (n,)
        Values of the same unit (test example, layer) at the same place.
    seed : int
        Of the 9,999 random flips.

    Raises
    ------
    WrongInput
        For fewer than 20 units: of 5 pairs no p below 1/16 is possible.

    References
    ----------
    Phipson & Smyth, "Permutation p-values should never be zero", SAGMB 9 (2010).
    """
    d = np.asarray(one, dtype=np.float64) - np.asarray(other, dtype=np.float64)
    need_units("a permutation test", len(d))
    if not d.any():
        return 1.0
    return float(
        scipy_stats.permutation_test(
            (d, np.zeros_like(d)),
            lambda x, y, axis=-1: np.mean(x - y, axis=axis),
            permutation_type="samples",
            vectorized=True,
            n_resamples=9999,
            rng=np.random.default_rng(seed),
        ).pvalue
    )


def holm(p: Sequence[float]) -> np.ndarray:
    """Holm's adjusted p: those below α hold together with a chance of error of at most α.

    References
    ----------
    Holm, "A simple sequentially rejective multiple test procedure", Scand. J. Statist. 6 (1979).

    >>> holm([0.01, 0.04, 0.03]).tolist()
    [0.03, 0.06, 0.06]
    """
    values = np.asarray(p, dtype=np.float64)
    order = np.argsort(values)
    steps = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
    out = np.empty_like(values)
    out[order] = np.minimum(steps, 1.0)
    return out


def benjamini_hochberg(p: Sequence[float]) -> np.ndarray:
    """Adjusted p whose rejections are false for a share of at most α on average.

    References
    ----------
    Benjamini & Hochberg, "Controlling the false discovery rate", J. R. Statist. Soc. B 57 (1995).

    >>> benjamini_hochberg([0.01, 0.04, 0.03]).round(3).tolist()
    [0.03, 0.04, 0.04]
    """
    return np.asarray(scipy_stats.false_discovery_control(np.asarray(p, dtype=np.float64)))
