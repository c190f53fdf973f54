"""Power law in the tail of the squared singular values."""

from __future__ import annotations

import math
import warnings
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import erfcx, log_ndtr

from lora_lab.linalg import Spectrum
from lora_lab.linalg.factored import Array
from lora_lab.linalg.noise import resolved
from lora_lab.measures import SLACK, Refused, define
from lora_lab.registry import unknown

SIDES = ("alpha", "D", "n_tail", "lognormal_R", "lognormal_p")
TAIL = 50
"""Fewest tail values to which a power law is fitted."""
FARTHEST = -1e3
"""mu / sigma of a lognormal that no tail of a million values could tell from a power law."""
STRIDE = 16
"""Every so many values are looked at first."""
BLOCK = 2**13
"""Entries of the block of candidates that is looked at at once: it stays in the cache."""
HALF_LOG = 0.5 * math.log(2 * math.pi)


@define(kind="ratio", sides=SIDES, at="later")
def power_law(s: Spectrum, side: str = "alpha") -> float:
    """Fit p(x) ~ x^-alpha to the values x = sigma^2 >= x_min, chosen by `side`.

    `alpha`, the exponent by maximum likelihood, above 1; `D`, the Kolmogorov-Smirnov distance of
    tail and fit, in [0, 1], at the x_min that makes it smallest among those that leave at least
    50 values; `n_tail`, the number of values in the tail; and the comparison with a lognormal of
    the same tail: `lognormal_R`, the log-likelihood ratio in standard deviations (above 0 speaks
    for the power law), and `lognormal_p`, the chance of an |R| as large if both fit equally well.
    An alpha means nothing where D is large, or R is below 0 with a small p: noise too gives one.

    NaN at dW = 0. Unchanged by scaling, transposition and rotation of dW. Values at the rounding
    error of the decomposition are left out.

    Raises
    ------
    Refused
        For fewer than 50 values, or a tail without spread.
    WrongInput
        Unknown side.

    References
    ----------
    Clauset, Shalizi & Newman 2009, Power-law distributions in empirical data; Vuong 1989; the
    package powerlaw (Alstott, Bullmore & Plenz 2014).

    Examples
    --------
    Quantiles of the density x^-2.5 above 1, as 500 values of sigma^2:

    >>> x = (1 - (np.arange(500) + 0.5) / 500) ** (-1 / 1.5)
    >>> s = Spectrum.of_values(np.sqrt(x))
    >>> round(power_law(s), 1), power_law(s, "D") < 0.01, power_law(s, "lognormal_R") > -0.5
    (2.5, True, True)
    """
    if side not in SIDES:
        raise unknown("side", side, SIDES)
    if s.zero:
        return math.nan
    x = resolved(s)[::-1] ** 2
    if len(x) < TAIL:
        raise Refused(f"a power law needs {TAIL} tail values; this spectrum has {len(x)} in all")
    if x[-1] <= x[-TAIL] * (1 + SLACK):
        raise Refused(f"the {TAIL} leading singular values are equal: no tail to fit")
    return _fit(x.tobytes())[SIDES.index(side)]


@lru_cache(maxsize=64)
def _fit(buffer: bytes) -> tuple[float, ...]:
    """The values of all `SIDES` for ascending x; remembered, for each side asks anew."""
    # Loads matplotlib: only who fits a power law waits for it.
    from powerlaw import Power_Law
    from powerlaw.statistics import loglikelihood_ratio

    x = np.frombuffer(buffer)
    start = _x_min(x)
    # In units of x_min no power overflows.
    tail = x[start:] / x[start]
    log = np.log(tail)
    alpha = 1 + len(tail) / float(np.sum(log))
    # By default the package holds alpha below 3.
    ranges = {"alpha": [1, None]}
    # Not for a while: filters are the process's, and other threads warn too.
    warnings.filterwarnings("ignore", module="powerlaw")
    with np.errstate(all="ignore"):
        law = Power_Law(xmin=1.0, parameters=[alpha], parameter_ranges=ranges, verbose=0)
        law.compute_distance_metrics(tail)
        lognormal = _lognormal(log)
        if lognormal is None:
            R, p = 0.0, 1.0
        else:
            R, p = loglikelihood_ratio(law.loglikelihoods(tail), lognormal, normalized_ratio=True)
    return alpha, float(law.D), float(len(tail)), float(R), float(p)


def _lognormal(log: Array) -> Array | None:
    """Log-likelihoods of values above 1 under the lognormal cut off there that fits them best.

    Their logarithms are then a normal cut off at 0, mean mu and standard deviation sigma before
    the cut: the likelihood is largest where it has their mean and mean square, whose quotient
    depends on z = mu / sigma alone and falls with it. None where it is that of z to minus infinity,
    or nearly: there the lognormal is the power law itself. (The package searches numerically, and
    stops anywhere on the way to that limit.)

    References
    ----------
    Cohen 1950, Estimating the mean and variance of normal populations from singly truncated
    samples; Castillo 1994, The singly truncated normal distribution: a non-steep exponential
    family (the limit).
    """
    mean = float(log.mean())
    quotient = float(log @ log) / len(log) / mean**2

    def mills(z: float) -> float:
        return math.sqrt(2 / math.pi) / float(erfcx(-z / math.sqrt(2)))

    def excess(z: float) -> float:
        return (1 + z * (z + mills(z))) / (z + mills(z)) ** 2 - quotient

    if excess(FARTHEST) <= 0:
        return None
    z = brentq(excess, FARTHEST, 2 / math.sqrt(quotient - 1))
    sigma = mean / (z + mills(z))
    return -log - 0.5 * (log / sigma - z) ** 2 - math.log(sigma) - HALF_LOG - float(log_ndtr(z))


def _x_min(x: Array) -> int:
    """Index of the x_min of smallest Kolmogorov-Smirnov distance that leaves at least `TAIL`.

    Clauset's search with his closed form of alpha. Some of the values bound each candidate's
    distance from below: few candidates are left to be looked at in full. (The package's own search
    runs a numerical fit at each where alpha exceeds 3.)
    """
    log, n = np.log(x), len(x)
    i = np.arange(n - TAIL + 1)
    i = i[(log[-1] - log[i] > SLACK) & (np.diff(x, prepend=0.0)[i] > 0)]
    below = _distances(log, i, np.arange(STRIDE - 1, n, STRIDE))
    order = np.argsort(below, kind="stable")
    best, step = (math.inf, 0), max(1, BLOCK // n)
    for some in (order[at : at + step] for at in range(0, len(order), step)):
        if below[some[0]] > best[0]:
            break
        best = min(best, *zip(_distances(log, i[some], np.arange(n)), i[some], strict=True))
    return int(best[1])


def _distances(log: Array, i: NDArray[np.int_], at: NDArray[np.int_]) -> Array:
    """Distances of tail and fit from each candidate i, looked at in the values `at` alone."""
    n = len(log)
    slope = (n - i) / (np.cumsum(log[::-1])[::-1][i] - (n - i) * log[i])
    # Values below a candidate are brought to its own: they stand at no step.
    above = np.maximum(log[at] - log[i, None], 0.0)
    steps = np.maximum(at - i[:, None], 0) / (n - i)[:, None]
    distances: Array = np.abs(1 - np.exp(-slope[:, None] * above) - steps).max(axis=1)
    return distances
