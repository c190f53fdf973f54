"""Share of the configured rank that the spectrum uses, by energy."""

from __future__ import annotations

import math

import numpy as np

from lora_lab.linalg import Spectrum
from lora_lab.measures import define


@define(kind="ratio", needs=("values", "r"))
def stable_utilization(s: Spectrum) -> float:
    """stable_rank / r, for a factored update of configured rank r.

    In (0, 1]; NaN at dW = 0. Unchanged by scaling, transposition and rotation of dW. Compare
    with a random product B A of the same shape, not with 1: at 768 x 768 that has .88 .79 .72
    .63 .50 .28 for r = 4, 8, 16, 32, 64, 256.

    References
    ----------
    stable_rank of Rudelson & Vershynin 2007 over the r of Hu et al. 2021.

    Examples
    --------
    >>> stable_utilization(Spectrum.of_values([4.0, 3.0], shape=(5, 7), r=4))
    0.390625
    """
    assert s.r is not None
    return math.nan if s.zero else float(np.sum(s.relative**2)) / s.r
