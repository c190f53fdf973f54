"""Entropy rank of the energies sigma^2."""

from __future__ import annotations

from lora_lab.linalg import Spectrum
from lora_lab.measures import define, entropy_rank


@define()
def energy_effective_rank(s: Spectrum) -> float:
    """exp(-sum p ln p), p = sigma^2 / sum(sigma^2).

    In [1, effective_rank]; 0 at dW = 0. It is the Renyi rank of order 1. Unchanged by scaling,
    transposition and rotation of dW.

    References
    ----------
    The entropy rank of Roy & Vetterli 2007 on energies (the "effective rank" of many tools).

    Examples
    --------
    >>> round(energy_effective_rank(Spectrum.of_values([4.0, 3.0])), 6)
    1.9221
    >>> round(energy_effective_rank(Spectrum.of_values([1, 1 / 2, 1 / 3, 1 / 4])), 6)
    2.434783
    >>> round(energy_effective_rank(Spectrum.of_values([10 * 0.8**i for i in range(32)])), 6)
    6.141328
    """
    return entropy_rank(s.relative**2)
