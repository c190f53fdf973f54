"""Energy in units of the leading direction."""

from __future__ import annotations

import numpy as np

from lora_lab.linalg import Spectrum
from lora_lab.measures import define


@define()
def stable_rank(s: Spectrum) -> float:
    """sum(sigma^2) / sigma_1^2 = ||dW||_F^2 / ||dW||_2^2.

    In [1, q], at most nuclear_dimension and participation_ratio; 0 at dW = 0. Unchanged by
    scaling, transposition and rotation of dW.

    References
    ----------
    Rudelson & Vershynin 2007, "Sampling from large matrices", J. ACM 54 (numerical rank there).

    Examples
    --------
    >>> stable_rank(Spectrum.of_values([4.0, 3.0]))
    1.5625
    >>> round(stable_rank(Spectrum.of_values([1, 1 / 2, 1 / 3, 1 / 4])), 6)
    1.423611
    >>> round(stable_rank(Spectrum.of_values([10 * 0.8**i for i in range(32)])), 6)
    2.777776
    """
    return float(np.sum(s.relative**2))
