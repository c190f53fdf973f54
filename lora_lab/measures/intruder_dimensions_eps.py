"""Intruder dimensions among ten vectors, against the threshold."""

from __future__ import annotations

from lora_lab.linalg import Spectrum, Update
from lora_lab.linalg.factored import Array
from lora_lab.measures import Level, define
from lora_lab.measures.intruder_dimensions import SIDES, count, null_count
from lora_lab.registry import WrongInput

TOP = 10
GRID = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def level(
    s: Spectrum, W0: Array, base: Spectrum, update: Update, k: float = 0.5, side: str = "left"
) -> Level:
    """The count after a random full-rank update of the same Frobenius norm."""
    return null_count(s, base, TOP, k, side)


@define(
    kind="rank",
    needs=("values", "W0", "base", "update"),
    grid=GRID,
    sides=SIDES,
    null=level,
    at="end",
)
def intruder_dimensions_eps(
    s: Spectrum, W0: Array, base: Spectrum, update: Update, k: float = 0.5, side: str = "left"
) -> float:
    """Of the 10 leading singular vectors of W0 + dW, those less similar to W0's than k = epsilon.

    `intruder_dimensions` against the threshold: see there for definition, null and cost, which
    the two share.

    0, 1, ..., 10, non-decreasing in epsilon; 0 at dW = 0, NaN at W0 = 0. Unchanged when dW and W0
    are scaled or rotated together; transposition swaps the sides.

    Parameters
    ----------
    s, W0, base, update, side
        As in `intruder_dimensions`.
    k : float
        epsilon in (0, 1].

    Raises
    ------
    WrongInput
        If shapes differ, the side is unknown, or epsilon is out of range.
    Refused
        Where epsilon is so small that it could find nothing: at most 1 / sqrt(directions) on a
        side that the directions of W0 fill.

    References
    ----------
    Shuttleworth et al. 2024, LoRA vs Full Fine-tuning: An Illusion of Equivalence.

    Examples
    --------
    >>> import numpy as np
    >>> from lora_lab.linalg import Dense, decompose
    >>> W0 = np.diag([5.0, 4.0, 3.0, 2.0, 1.0])
    >>> update = Dense(60 * np.outer([0, 0, 1, 1, 0], [0, 0, 0, 1, 0]))
    >>> given = decompose(update), W0, decompose(Dense(W0), vectors=True), update
    >>> [intruder_dimensions_eps(*given, k=epsilon) for epsilon in (0.6, 0.8)]
    [0.0, 2.0]
    """
    if not 0 < k <= 1:
        raise WrongInput(f"k, the threshold epsilon, must be in (0, 1]; got {k}.")
    return count(s, W0, base, update, TOP, k, side)
