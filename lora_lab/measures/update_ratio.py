"""Size of the update against the base weight."""

from __future__ import annotations

import math

import numpy as np

from lora_lab.linalg import Dense, Spectrum, decompose
from lora_lab.linalg.factored import Array, frobenius
from lora_lab.measures import define
from lora_lab.measures.norm import norm
from lora_lab.registry import WrongInput, unknown

SIDES = ("frobenius", "spectral")


@define(kind="ratio", needs=("values", "W0"), sides=SIDES)
def update_ratio(s: Spectrum, W0: Array, side: str = "frobenius") -> float:
    """||dW|| / ||W0||, of Frobenius or of spectral norms.

    At least 0, no upper limit; NaN at dW = 0 (as every ratio) and at W0 = 0. Unchanged when dW
    and W0 are scaled, transposed or rotated together.

    Parameters
    ----------
    s : Spectrum
        Of dW (m, n).
    W0 : ndarray, (m, n)
        The base weight.
    side : str
        `frobenius` or `spectral`.

    Raises
    ------
    WrongInput
        If the shapes differ, the side is unknown, or W0 holds NaN or Inf.

    References
    ----------
    Golub & Van Loan, Matrix Computations, 2.3 (relative perturbation in a norm).

    Examples
    --------
    >>> import numpy as np
    >>> s, W0 = Spectrum.of_values([4.0, 3.0]), np.diag([8.0, 6.0])
    >>> update_ratio(s, W0), update_ratio(s, 2 * W0, "spectral")
    (0.5, 0.25)
    """
    if side not in SIDES:
        raise unknown("side", side, SIDES)
    if np.shape(W0) != s.shape:
        raise WrongInput(f"W0 must have the update's shape {s.shape}; got {np.shape(W0)}.")
    if s.zero or not np.any(W0):
        return math.nan
    if side == "spectral":
        return float(s.values[0] / decompose(Dense(W0)).values[0])
    return norm(s) / frobenius(W0)
