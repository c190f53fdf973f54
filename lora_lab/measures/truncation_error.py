"""What is lost when only the leading directions are kept."""

from __future__ import annotations

import math

import numpy as np

from lora_lab.linalg import Spectrum
from lora_lab.measures import define, doubling, tails
from lora_lab.registry import WrongInput, unknown

SIDES = ("frobenius", "spectral", "nuclear")


def grid(s: Spectrum) -> tuple[float, ...]:
    """0, 1, 2, 4, 8, ... below q, and q.

    >>> grid(Spectrum.of_values([1.0], shape=(6, 7)))
    (0.0, 1.0, 2.0, 4.0, 6.0)
    """
    return (0.0, *doubling(s.q - 1), float(s.q))


@define(kind="ratio", grid=grid, sides=SIDES)
def truncation_error(s: Spectrum, k: float = 1, side: str = "frobenius") -> float:
    """||dW - dW_k|| / ||dW|| of the best approximation of rank k.

    Frobenius sqrt(sum(sigma_i^2, i > k)), spectral sigma_(k+1), nuclear sum(sigma_i, i > k), each
    over the same norm of dW. In [0, 1]: 1 at k = 0, 0 for k >= q, non-increasing in k; NaN at
    dW = 0. Unchanged by scaling, transposition and rotation of dW.

    Raises
    ------
    WrongInput
        If k is not a whole number of at least 0, or the side is unknown.

    References
    ----------
    Eckart & Young 1936; Mirsky 1960 (all unitarily invariant norms).

    Examples
    --------
    >>> s = Spectrum.of_values([4.0, 3.0])
    >>> [round(truncation_error(s, 1, side), 6) for side in ("frobenius", "spectral", "nuclear")]
    [0.6, 0.75, 0.428571]
    """
    if side not in SIDES:
        raise unknown("side", side, SIDES)
    if not (k >= 0 and float(k).is_integer()):
        raise WrongInput(f"k, the kept directions, must be a whole number >= 0; got {k}.")
    if s.zero:
        return math.nan
    kept = min(int(k), s.q)
    if side == "spectral":
        return float(s.relative[kept]) if kept < s.q else 0.0
    tail = tails(s.relative**2 if side == "frobenius" else s.relative)
    share = float(tail[kept] / tail[0])
    return float(np.sqrt(share)) if side == "frobenius" else share
