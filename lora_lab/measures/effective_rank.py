"""Entropy rank of the singular values."""

from __future__ import annotations

from lora_lab.linalg import Spectrum
from lora_lab.measures import define, entropy_rank


@define()
def effective_rank(s: Spectrum) -> float:
    """exp(-sum p ln p), p = sigma / sum(sigma).

    In [1, number of nonzero sigma] (it can exceed numerical_rank); 0 at dW = 0. Unchanged by
    scaling, transposition and rotation of dW.

    References
    ----------
    Roy & Vetterli 2007, "The effective rank: a measure of effective dimensionality", EUSIPCO.

    Examples
    --------
    >>> round(effective_rank(Spectrum.of_values([4.0, 3.0])), 6)
    1.979626
    >>> round(effective_rank(Spectrum.of_values([1, 1 / 2, 1 / 3, 1 / 4])), 6)
    3.464117
    >>> round(effective_rank(Spectrum.of_values([10 * 0.8**i for i in range(32)])), 6)
    12.128495
    """
    return entropy_rank(s.relative)
