"""How much of the update lies inside the leading subspaces of W0."""

from __future__ import annotations

import math

import numpy as np

from lora_lab.linalg import Factored, Spectrum, Update, haar
from lora_lab.linalg.factored import Array
from lora_lab.linalg.remember import remembered
from lora_lab.measures import DIRECTIONS, Level, define, doubling
from lora_lab.measures.amplification import directions
from lora_lab.registry import WrongInput, unknown

SIDES = ("left", "right", "both")


def grid(s: Spectrum) -> tuple[float, ...]:
    """1, 2, 4, ... directions of W0: at most 64."""
    return doubling(min(DIRECTIONS, s.q))


def level(s: Spectrum, base: Spectrum, update: Update, k: float = 1, side: str = "left") -> Level:
    """The share of an update with the same singular values and random (Haar) vectors, by formula.

    Mean k/m, k/n or k^2/(mn), and the central 95 % of the Beta of the exact mean and variance:
    exact for one side and an update of rank one, else right in two moments.
    """
    if base.zero:
        return math.nan, math.nan, math.nan
    (m, n), pure = s.shape, haar.purity(s.values)
    if side == "both":
        moments = haar.two_sided(int(k), (m, n), pure)
    else:
        moments = haar.one_sided(int(k), m if side == "left" else n, pure)
    return moments[0], *haar.interval(*moments)


@define(
    kind="ratio", needs=("values", "base", "update"), grid=grid, sides=SIDES, null=level, at="end"
)
def structural_alignment(
    s: Spectrum, base: Spectrum, update: Update, k: float = 1, side: str = "left"
) -> float:
    """Share of ||dW||_F^2 inside the span of W0's k leading singular vectors.

    `left` ||U_k^T dW||^2 / ||dW||^2 (output side), `right` ||dW V_k||^2 / ||dW||^2 (input side),
    `both` ||U_k^T dW V_k||^2 / ||dW||^2, with U_k, V_k of W0.

    In [0, 1], non-decreasing in k, both <= left and both <= right; 1 where the k directions span
    the whole side. NaN at dW = 0 and at W0 = 0. Unchanged by the sizes of dW and W0 and by
    rotations of both together; transposition swaps left and right.

    Parameters
    ----------
    s : Spectrum
        Of dW (m, n).
    base : Spectrum
        Of W0 (m, n), with vectors.
    update : Factored or Dense
        dW itself; factors are not multiplied out.
    k : int
        Directions of W0, at least 1 and at most 64.
    side : str
        `left`, `right` or `both`.

    Raises
    ------
    WrongInput
        If shapes differ, the side is unknown, or k is out of range.
    Refused
        If W0 has fewer than k directions or no unique ones.

    References
    ----------
    Sharma, Ash & Misra 2023 (LASER: the truncated singular subspaces of a pretrained weight).

    Examples
    --------
    >>> from lora_lab.linalg import Dense, decompose
    >>> base = decompose(Dense(np.diag([3.0, 2.0, 1.0])), vectors=True)
    >>> update = Dense([[1.0, 2.0, 0.0], [2.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    >>> s = decompose(update)
    >>> [round(structural_alignment(s, base, update, 1, side), 9) for side in SIDES]
    [0.5, 0.5, 0.1]
    """
    if side not in SIDES:
        raise unknown("side", side, SIDES)
    if base.shape != s.shape or update.shape != s.shape:
        raise WrongInput(f"W0 must have the update's shape {s.shape}; got {base.shape}.")
    if s.zero or base.zero:
        return math.nan
    count = directions(base, k, "W0")
    shares = _shares(s, base, update)[SIDES.index(side)]
    if count > len(shares):
        raise WrongInput(f"k must be in [1, {len(shares)}]; got {k}.")
    return float(shares[count - 1])


@remembered
def _shares(s: Spectrum, base: Spectrum, update: Update) -> Array:
    """Shares (3, K): left, right and both for 1, ..., K directions of W0."""
    assert base.U is not None
    assert base.Vh is not None
    count = min(DIRECTIONS, base.U.shape[1])
    U, V = base.U[:, :count], base.Vh[:count].T
    if isinstance(update, Factored):
        # dW = Q_B core Q_A^T: an orthonormal Q on the far side changes no norm.
        Q_B, Q_A, dW, _ = update.core()
        U, V = Q_B.T @ U, Q_A.T @ V
    else:
        dW = update.dW / np.abs(update.dW).max()
    left, right = U.T @ dW, dW @ V
    both = (left @ V) ** 2
    energy = np.stack(
        [
            np.cumsum(np.sum(left**2, axis=1)),
            np.cumsum(np.sum(right**2, axis=0)),
            np.diagonal(both.cumsum(axis=0).cumsum(axis=1)),
        ]
    )
    return np.minimum(energy / np.sum(dW**2), 1.0)
