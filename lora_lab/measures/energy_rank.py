"""Directions that hold a share of the energy."""

from __future__ import annotations

from lora_lab.linalg import Spectrum
from lora_lab.measures import define, share_rank


@define(grid=(0.9, 0.95, 0.99))
def energy_rank(s: Spectrum, k: float = 0.9) -> float:
    """Fewest leading directions with sum(sigma_i^2, i <= j) >= tau sum(sigma^2), tau = `k`.

    In [1, number of nonzero sigma], at most nuclear_rank at the same tau; 0 at dW = 0. The
    "explained variance >= 95 %" of PCA. Unchanged by scaling, transposition and rotation of dW.

    Raises
    ------
    WrongInput
        If tau is not in (0, 1].

    References
    ----------
    Jolliffe 2002, Principal Component Analysis, 6.1.1.

    Examples
    --------
    >>> energy_rank(Spectrum.of_values([4.0, 3.0]), 0.9)
    2
    >>> energy_rank(Spectrum.of_values([1, 1 / 2, 1 / 3, 1 / 4]), 0.9)
    3
    >>> energy_rank(Spectrum.of_values([10 * 0.8**i for i in range(32)]), 0.9)
    6
    """
    return share_rank(s.relative**2, k)
