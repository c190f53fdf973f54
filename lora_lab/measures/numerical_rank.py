"""Singular values above rounding error."""

from __future__ import annotations

import math

import numpy as np

from lora_lab.linalg import Spectrum
from lora_lab.measures import SLACK, define


@define()
def numerical_rank(s: Spectrum) -> float:
    """#{i: sigma_i > sigma_1 max(m, n) u}, u = unit roundoff of the dtype the weights were made in.

    In [1, q]; 0 at dW = 0. NaN = undecidable where max(m, n) u >= 1, which is so for bfloat16
    from size 256 and for float16 from size 2048 on: there the rule would call everything rank 0.
    Unchanged by scaling, transposition and rotation of dW.

    References
    ----------
    Golub & Van Loan, Matrix Computations, 5.4; the threshold of numpy.linalg.matrix_rank with
    the unit roundoff u in place of eps = 2 u.

    Examples
    --------
    >>> numerical_rank(Spectrum.of_values([4.0, 3.0, 1e-9], shape=(5, 7)))
    3
    >>> numerical_rank(Spectrum.of_values([4.0, 3.0, 1e-9], shape=(5, 7), made_in="float32"))
    2
    >>> numerical_rank(Spectrum.of_values([4.0, 3.0], shape=(256, 8), made_in="bfloat16"))
    nan
    """
    threshold = max(s.shape) * s.roundoff
    if s.zero:
        return 0
    if threshold >= 1:
        return math.nan
    return int(np.count_nonzero(s.relative > threshold * (1 + SLACK)))
