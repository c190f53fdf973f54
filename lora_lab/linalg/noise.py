"""What noise does to singular values: edges, thresholds and the spacing of stored numbers.

Noise is a matrix (m, n) of independent entries of standard deviation sd; beta = q / max(m, n) with
q = min(m, n). In units of sd sqrt(max(m, n)) its singular values fill [1 - sqrt(beta),
1 + sqrt(beta)] as the matrix grows (Marchenko & Pastur 1967).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike
from scipy.integrate import quad
from scipy.optimize import brentq

from lora_lab.linalg.factored import ROUNDOFF, Array
from lora_lab.linalg.rounding import FORMATS
from lora_lab.linalg.spectrum import Spectrum
from lora_lab.registry import unknown

TRACY_WIDOM = 3.2724
"""99.9 % quantile of the Tracy-Widom distribution of order 1 (Johnstone 2001)."""

BULK = 32
"""Fewest singular values from which the level of noise is told: the median of fewer varies so
much that more than 2 % of noise matrices would show a spike (from 64 on, less than 1 %)."""


def aspect(shape: tuple[int, int]) -> float:
    """beta = min(m, n) / max(m, n), in (0, 1]."""
    return min(shape) / max(shape)


def known_noise_coefficient(beta: float) -> float:
    """lambda(beta): keep sigma > lambda(beta) sqrt(max(m, n)) sd, sd the noise's own.

    Hard thresholding there has the least asymptotic mean squared error.

    References
    ----------
    Gavish & Donoho 2014, The optimal hard threshold for singular values is 4/sqrt(3), eq. 11.

    Examples
    --------
    >>> [round(known_noise_coefficient(beta), 4) for beta in (1.0, 0.5, 0.25)]
    [2.3094, 1.9786, 1.758]
    """
    return float(np.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + np.sqrt(beta**2 + 14 * beta + 1))))


@lru_cache(maxsize=1024)
def noise_median(beta: float) -> float:
    """Median singular value of noise in units of sd sqrt(max(m, n)), as the matrix grows.

    With sigma^2 = 1 + beta + 2 sqrt(beta) cos(t), the Marchenko-Pastur density is smooth in t.

    >>> round(noise_median(1.0), 5)  # median of the quarter circle on [0, 2]
    0.80795
    """

    def square(t: float) -> float:
        return float(1 + beta + 2 * np.sqrt(beta) * np.cos(t))

    def below(t: float) -> float:
        return float(quad(lambda x: 2 * np.sin(x) ** 2 / (np.pi * square(x)), t, np.pi)[0])

    return float(np.sqrt(square(brentq(lambda t: below(t) - 0.5, 0.0, np.pi))))


def unknown_noise_coefficient(beta: float) -> float:
    """omega(beta): keep sigma > omega(beta) median(sigma), where the noise's sd is not known.

    References
    ----------
    Gavish & Donoho 2014, section III.D: omega = lambda / sqrt(median of Marchenko-Pastur).

    Examples
    --------
    >>> [round(unknown_noise_coefficient(beta), 3) for beta in (1.0, 0.5, 0.25)]
    [2.858, 2.171, 1.837]
    """
    return known_noise_coefficient(beta) / noise_median(beta)


def optimal_threshold(shape: tuple[int, int], sd: float) -> float:
    """Singular values above it are kept where the noise's sd is known (Gavish & Donoho 2014).

    >>> round(optimal_threshold((300, 300), sd=1.0), 6)  # 4 / sqrt(3) sqrt(300)
    40.0
    """
    return float(known_noise_coefficient(aspect(shape)) * np.sqrt(max(shape)) * sd)


def noise_edge(shape: tuple[int, int], sd: float = 1.0) -> float:
    """Level that the largest singular value of noise exceeds once in a thousand matrices.

    sd (sqrt(m) + sqrt(n)) as the matrix grows; the finite size is in the Tracy-Widom law of
    sigma_1^2, with the centre and scale that are right to second order.

    References
    ----------
    Johnstone 2001, On the distribution of the largest eigenvalue; Ma 2012, Accuracy of the
    Tracy-Widom limits (the halves).

    Examples
    --------
    >>> round(noise_edge((1000, 1000)) / (2 * 1000**0.5), 3)
    1.01
    """
    a, b = (np.sqrt(size - 0.5) for size in shape)
    return float(sd * np.sqrt((a + b) ** 2 + TRACY_WIDOM * (a + b) * (1 / a + 1 / b) ** (1 / 3)))


def seen_spike(x: float, beta: float) -> float:
    """Singular value at which a planted one of size x shows in noise, as the matrix grows.

    Both in units of sd sqrt(max(m, n)). A spike of at most beta^(1/4) drowns at the edge.

    References
    ----------
    Benaych-Georges & Nadakuditi 2012, The singular values and vectors of low rank perturbations.

    Examples
    --------
    >>> seen_spike(1.0, 1.0), seen_spike(2.0, 1.0), seen_spike(0.5, 0.25)
    (2.0, 2.5, 1.5)
    """
    if x**4 <= beta:
        return float(1 + np.sqrt(beta))
    return float(np.sqrt(x**2 + 1 + beta + beta / x**2))


def resolved(s: Spectrum) -> Array:
    """sigma / sigma_1 of those above the rounding error of their own computation, descending.

    >>> resolved(Spectrum.of_values([4.0, 3.0, 1e-17, 0.0])).tolist()
    [1.0, 0.75]
    """
    floor = max(s.bound, max(s.shape) * ROUNDOFF["float64"])
    return s.relative[s.relative > floor]


def no_bulk(s: Spectrum) -> str:
    """Why the level of noise cannot be told from a spectrum's bulk; '' where it can be.

    >>> no_bulk(Spectrum.of_values([4.0, 3.0], shape=(90, 80)))
    'the median singular value is 0: there is no bulk of noise'
    """
    if s.r is not None:
        return f"a product of factors of r = {s.r} has no bulk of noise; use its random_ba null"
    if s.q < BULK:
        return f"min(m, n) = {s.q} singular values are too few to tell noise; at least {BULK}"
    if len(resolved(s)) <= s.q // 2:
        return "the median singular value is 0: there is no bulk of noise"
    return ""


def ulp(x: ArrayLike, dtype: str) -> Array:
    """Spacing of the numbers that a format stores, around each x.

    Parameters
    ----------
    x : array_like
        Of any shape, finite.
    dtype : str
        `float64`, `float32`, `float16` or `bfloat16`.

    Raises
    ------
    WrongInput
        Unknown dtype.

    Examples
    --------
    >>> [float(ulp(1.5, dtype)) for dtype in ("bfloat16", "float16")]
    [0.0078125, 0.0009765625]
    >>> ulp([0.9, 0.0], "float16").tolist() == [2.0**-11, 2.0**-24]
    True
    """
    formats = {"float64": (53, 1023), **FORMATS}
    if dtype not in formats:
        raise unknown("dtype", dtype, formats)
    bits, largest = formats[dtype]
    x = np.asarray(x, dtype=np.float64)
    exponent = np.where(x == 0, -largest, np.frexp(x)[1] - 1)
    return np.ldexp(1.0, np.maximum(exponent, 1 - largest) - (bits - 1))
