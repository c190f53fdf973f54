"""Inverse participation of the energies."""

from __future__ import annotations

import numpy as np

from lora_lab.linalg import Spectrum
from lora_lab.measures import define


@define()
def participation_ratio(s: Spectrum) -> float:
    """sum(sigma^2)^2 / sum(sigma^4), the Renyi rank of order 2.

    In [1, number of nonzero sigma], between stable_rank and energy_effective_rank; 0 at dW = 0.
    Unchanged by scaling, transposition and rotation of dW.

    References
    ----------
    Gao et al. 2017, "A theory of multineuronal dimensionality, dynamics and measurement".

    Examples
    --------
    >>> round(participation_ratio(Spectrum.of_values([4.0, 3.0])), 6)
    1.854599
    >>> round(participation_ratio(Spectrum.of_values([1, 1 / 2, 1 / 3, 1 / 4])), 6)
    1.878716
    >>> round(participation_ratio(Spectrum.of_values([10 * 0.8**i for i in range(32)])), 6)
    4.55555
    """
    if s.zero:
        return 0.0
    energy = s.relative**2
    return float(np.sum(energy) ** 2 / np.sum(energy**2))
