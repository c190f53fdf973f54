"""Nuclear norm in units of the leading direction."""

from __future__ import annotations

import numpy as np

from lora_lab.linalg import Spectrum
from lora_lab.measures import define


@define()
def nuclear_dimension(s: Spectrum) -> float:
    """sum(sigma) / sigma_1 = ||dW||_* / ||dW||_2.

    In [stable_rank, q]; 0 at dW = 0. Unchanged by scaling, transposition and rotation of dW.

    References
    ----------
    The intrinsic dimension tr(P) / ||P|| of Tropp 2015, "An introduction to matrix concentration
    inequalities", 7.1, for P = (dW^T dW)^(1/2).

    Examples
    --------
    >>> nuclear_dimension(Spectrum.of_values([4.0, 3.0]))
    1.75
    >>> round(nuclear_dimension(Spectrum.of_values([1, 1 / 2, 1 / 3, 1 / 4])), 6)
    2.083333
    >>> round(nuclear_dimension(Spectrum.of_values([10 * 0.8**i for i in range(32)])), 6)
    4.996039
    """
    return float(np.sum(s.relative))
