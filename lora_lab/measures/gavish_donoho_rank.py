"""Singular values worth keeping: above the optimal hard threshold."""

from __future__ import annotations

import numpy as np

from lora_lab.linalg import Spectrum
from lora_lab.linalg.noise import aspect, no_bulk, unknown_noise_coefficient
from lora_lab.measures import SLACK, Refused, define


@define()
def gavish_donoho_rank(s: Spectrum) -> int:
    """#{i: sigma_i > omega(beta) median(sigma)}, beta = min(m, n) / max(m, n).

    omega is the threshold for white noise of unknown level at which keeping or dropping a
    direction costs the same: 2.858 for a square, 2.171 at beta = 1/2, 1.837 at 1/4. It lies above
    the edge of noise (2.475 medians for a square), so it drops directions that are seen but
    are no gain in mean squared error. (`linalg.noise.optimal_threshold`: where the level is known.)

    In [0, q]; 0 at dW = 0, and where nothing is worth keeping. Meant for a spectrum of which less
    than half is signal. Unchanged by scaling, transposition and rotation of dW.

    Raises
    ------
    Refused
        For a product of factors, a median of 0 (to rounding), and min(m, n) < 32: no bulk.

    References
    ----------
    Gavish & Donoho 2014, The optimal hard threshold for singular values is 4/sqrt(3).

    Examples
    --------
    >>> s = Spectrum.of_values([2.9, 2.8, *[1.0] * 78])
    >>> gavish_donoho_rank(s)
    1
    >>> gavish_donoho_rank(Spectrum.of_values(s.values, shape=(160, 80)))
    2
    """
    if s.zero:
        return 0
    if reason := no_bulk(s):
        raise Refused(reason)
    threshold = unknown_noise_coefficient(aspect(s.shape)) * np.median(s.relative)
    return int(np.count_nonzero(s.relative > threshold * (1 + SLACK)))
