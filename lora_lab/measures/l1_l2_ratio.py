"""Nuclear against Frobenius norm, squared."""

from __future__ import annotations

import numpy as np

from lora_lab.linalg import Spectrum
from lora_lab.measures import define


@define()
def l1_l2_ratio(s: Spectrum) -> float:
    """sum(sigma)^2 / sum(sigma^2), the Renyi rank of order 2 of sigma / sum(sigma).

    In [1, effective_rank] (so a rank, in spite of the name); 0 at dW = 0. Unchanged by scaling,
    transposition and rotation of dW.

    References
    ----------
    Lopes 2013, "Estimating unknown sparsity in compressed sensing", ICML (as numerical sparsity).

    Examples
    --------
    >>> l1_l2_ratio(Spectrum.of_values([4.0, 3.0]))
    1.96
    >>> round(l1_l2_ratio(Spectrum.of_values([1, 1 / 2, 1 / 3, 1 / 4])), 6)
    3.04878
    >>> round(l1_l2_ratio(Spectrum.of_values([10 * 0.8**i for i in range(32)])), 6)
    8.98575
    """
    return 0.0 if s.zero else float(np.sum(s.relative) ** 2 / np.sum(s.relative**2))
