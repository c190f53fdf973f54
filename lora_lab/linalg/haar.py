"""Energy of a matrix inside random subspaces: exact mean and variance, and an interval.

M is any fixed matrix of Frobenius norm 1 (m, n) with `purity` sum(sigma^4), which lies between
1 / min(m, n) for a flat spectrum and 1 for rank one. U (m, k) and V (n, k) are uniform (Haar)
frames. That M turns and the frames are fixed is the same.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.special import betaincinv

from lora_lab.linalg.factored import Array

TAILS = (0.025, 0.975)


def purity(values: Array) -> float:
    """sum(sigma^4) / sum(sigma^2)^2 of singular values that are not all 0: 1 / participation ratio.

    >>> purity(np.array([3e-200, 3e-200])), purity(np.array([5.0, 0.0]))
    (0.5, 1.0)
    """
    p = (values / np.max(values)) ** 2
    return float(np.sum((p / np.sum(p)) ** 2))


def one_sided(k: int, d: int, purity: float) -> tuple[float, float]:
    """Mean k/d and variance of ||U^T M||_F^2, U (d, k) a random frame.

    With P = U U^T, E[P_ij P_kl] is a combination of the three pairings of its indices, fixed by
    tr(P) = tr(P^2) = k.

    References
    ----------
    Collins & Sniady 2006, Integration with respect to the Haar measure.

    Examples
    --------
    A line in the plane: cos^2 of a uniform angle.

    >>> one_sided(1, 2, 1.0)
    (0.5, 0.125)
    """
    _, paired = _pairings(k, d)
    return k / d, 2 * paired * (purity - 1 / d)


def two_sided(k: int, shape: tuple[int, int], purity: float) -> tuple[float, float]:
    """Mean k^2/(mn) and variance of ||U^T M V||_F^2, U (m, k) and V (n, k) independent.

    References
    ----------
    Collins & Sniady 2006, Integration with respect to the Haar measure.

    Examples
    --------
    >>> two_sided(1, (2, 2), 1.0)
    (0.25, 0.078125)
    """
    m, n = shape
    (a, b), (c, d) = _pairings(k, m), _pairings(k, n)
    # tr(Q G) and tr(Q G Q G) for G = M^T M, Q = V V^T, each averaged over V.
    square, trace = c + 2 * d * purity, (c + d) * purity + d
    mean = k * k / (m * n)
    return mean, max(a * square + 2 * b * trace - mean**2, 0.0)


def interval(mean: float, variance: float) -> tuple[float, float]:
    """Central 95 % of the Beta distribution of this mean and variance.

    Exact for a subspace against one direction, where the share is Beta; else an approximation
    that is right in its first two moments.

    >>> [round(x, 6) for x in interval(0.5, 0.125)]  # cos^2 of a uniform angle
    [0.001541, 0.998459]
    """
    # A variance of rounding errors alone: the share is the same in all subspaces.
    if variance <= 1e-14 * mean**2 or mean >= 1:
        return mean, mean
    total = mean * (1 - mean) / variance - 1
    low, high = (float(betaincinv(mean * total, (1 - mean) * total, tail)) for tail in TAILS)
    return (low, high) if math.isfinite(low + high) else (math.nan, math.nan)


def _pairings(k: int, d: int) -> tuple[float, float]:
    """a and b in E[P_ij P_kl] = a 1_ij 1_kl + b (1_ik 1_jl + 1_il 1_jk), P of rank k in d."""
    if k == d:
        return 1.0, 0.0
    b = k * (d - k) / (d * (d - 1) * (d + 2))
    return (k * k / d - 2 * b) / d, b
