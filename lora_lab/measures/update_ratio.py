"""Size of the update against the base weight."""

from __future__ import annotations

import math

from lora_lab.linalg import Spectrum
from lora_lab.measures import define
from lora_lab.measures.norm import norm
from lora_lab.registry import WrongInput, unknown

SIDES = ("frobenius", "spectral")


@define(kind="ratio", needs=("values", "base"), sides=SIDES, at="end")
def update_ratio(s: Spectrum, base: Spectrum, side: str = "frobenius") -> float:
    """||dW|| / ||W0||, of Frobenius or of spectral norms.

    At least 0, no upper limit; NaN at dW = 0 (as every ratio) and at W0 = 0. Unchanged when dW
    and W0 are scaled, transposed or rotated together.

    Parameters
    ----------
    s : Spectrum
        Of dW (m, n).
    base : Spectrum
        Of the base weight W0 (m, n).
    side : str
        `frobenius` or `spectral`.

    Raises
    ------
    WrongInput
        If the shapes differ, or the side is unknown.

    References
    ----------
    Golub & Van Loan, Matrix Computations, 2.3 (relative perturbation in a norm).

    Examples
    --------
    >>> s, base = Spectrum.of_values([4.0, 3.0]), Spectrum.of_values([8.0, 6.0])
    >>> update_ratio(s, base), update_ratio(s, base, "spectral")
    (0.5, 0.5)
    """
    if side not in SIDES:
        raise unknown("side", side, SIDES)
    if base.shape != s.shape:
        raise WrongInput(f"W0 must have the update's shape {s.shape}; got {base.shape}.")
    return math.nan if s.zero or base.zero else norm(s, side) / norm(base, side)
