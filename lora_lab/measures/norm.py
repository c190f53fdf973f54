"""Norms of the update."""

from __future__ import annotations

import numpy as np

from lora_lab.linalg import Spectrum
from lora_lab.measures import define
from lora_lab.registry import unknown

SIDES = ("frobenius", "spectral", "nuclear")


@define(kind="size", sides=SIDES)
def norm(s: Spectrum, side: str = "frobenius") -> float:
    """Frobenius sqrt(sum(sigma^2)), spectral sigma_1 or nuclear sum(sigma), chosen by `side`.

    In units of the weight, at least 0; 0 at dW = 0. Grows with |c| in c dW; unchanged by
    transposition and rotation. spectral <= frobenius <= nuclear <= sqrt(rank) frobenius.

    Raises
    ------
    WrongInput
        Unknown side; a sum over a spectrum that holds only its leading values.

    References
    ----------
    Horn & Johnson, Matrix Analysis, 7.4 (Schatten norms of order 2, infinity and 1).

    Examples
    --------
    >>> s = Spectrum.of_values([4.0, 3.0])
    >>> norm(s), norm(s, "spectral"), norm(s, "nuclear")
    (5.0, 4.0, 7.0)
    """
    if side not in SIDES:
        raise unknown("side", side, SIDES)
    if side == "spectral":
        return float(s.values[0])
    if side == "nuclear":
        return float(s.values[0] * np.sum(s.relative))
    return float(s.values[0] * np.sqrt(np.sum(s.relative**2)))
