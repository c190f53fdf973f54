"""Directions that hold a share of the nuclear norm."""

from __future__ import annotations

from lora_lab.linalg import Spectrum
from lora_lab.measures import define, share_rank


@define(grid=(0.9, 0.95, 0.99))
def nuclear_rank(s: Spectrum, k: float = 0.9) -> float:
    """Fewest leading directions with sum(sigma_i, i <= j) >= tau sum(sigma), tau = `k`.

    In [energy_rank, number of nonzero sigma]; 0 at dW = 0. Unchanged by scaling, transposition
    and rotation of dW.

    Raises
    ------
    WrongInput
        If tau is not in (0, 1].

    References
    ----------
    The `sv_cumulative` option of kohya-ss resize_lora.py.

    Examples
    --------
    >>> nuclear_rank(Spectrum.of_values([4.0, 3.0]), 0.9)
    2
    >>> nuclear_rank(Spectrum.of_values([1, 1 / 2, 1 / 3, 1 / 4]), 0.9)
    4
    >>> nuclear_rank(Spectrum.of_values([10 * 0.8**i for i in range(32)]), 0.9)
    11
    """
    return share_rank(s.relative, k)
