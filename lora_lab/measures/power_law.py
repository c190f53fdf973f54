"""Power law in the tail of the squared singular values."""

from __future__ import annotations

import math
import warnings
from functools import lru_cache

import numpy as np

from lora_lab.linalg import Spectrum
from lora_lab.linalg.factored import Array
from lora_lab.linalg.noise import resolved
from lora_lab.measures import SLACK, Refused, define
from lora_lab.registry import unknown

SIDES = ("alpha", "D", "n_tail", "lognormal_R", "lognormal_p")
TAIL = 50
"""Fewest tail values to which a power law is fitted."""


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
    import powerlaw

    x = np.frombuffer(buffer)
    start = _x_min(x)
    # In units of x_min no power overflows.
    tail = x[start:] / x[start]
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        # By default the package holds alpha below 3.
        fit = powerlaw.Fit(tail, xmin=1.0, parameter_ranges={"alpha": [1, None]}, verbose=0)
        law = fit.power_law
        R, p = fit.distribution_compare("power_law", "lognormal", normalized_ratio=True)
        return float(law.alpha), float(law.D), float(len(tail)), float(R), float(p)


def _x_min(x: Array) -> int:
    """Index of the x_min of smallest Kolmogorov-Smirnov distance that leaves at least `TAIL`.

    Clauset's search with his closed form of alpha. The package's own runs a numerical fit at each
    candidate where alpha exceeds 3, which takes a hundred times as long for the same answer.
    """
    log, n = np.log(x), len(x)
    best, start = math.inf, 0
    for i in range(n - TAIL + 1):
        excess = log[i:] - log[i]
        if (i and x[i] == x[i - 1]) or excess[-1] <= SLACK:
            continue
        slope = (n - i) / np.sum(excess)
        D = np.abs(1 - np.exp(-slope * excess) - np.arange(n - i) / (n - i)).max()
        if best > D:
            best, start = D, i
    return start
