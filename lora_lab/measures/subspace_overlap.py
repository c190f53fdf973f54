"""How much of the leading directions two updates of one layer share."""

from __future__ import annotations

import math

import numpy as np

from lora_lab.linalg import Spectrum
from lora_lab.linalg.factored import Array
from lora_lab.linalg.haar import interval, one_sided
from lora_lab.linalg.subspace import overlap_grid
from lora_lab.measures import DIRECTIONS, Level, Refused, define, doubling
from lora_lab.registry import WrongInput, unknown

SIDES = ("left", "right")


def grid(s: Spectrum) -> tuple[float, ...]:
    """1, 2, 4, ... up to the vectors that are there, and at most `DIRECTIONS`.

    >>> grid(Spectrum(np.ones(5), (6, 5), np.eye(6, 5), np.eye(5)))
    (1.0, 2.0, 4.0)
    """
    return doubling(0 if s.U is None else min(s.U.shape[1], DIRECTIONS))


def directions(s: Spectrum, side: str) -> Array:
    """The leading singular vectors of one side that exist, (d, at most `DIRECTIONS`) as columns.

    One whose singular value lies within its error bound of 0 does not exist: its vectors are
    whatever the algorithm made of rounding. A zero update has none.

    Raises
    ------
    WrongInput
        If the side is not `left` (output) or `right` (input).
    """
    if side not in SIDES:
        raise unknown("side", side, SIDES)
    assert s.U is not None
    assert s.Vh is not None
    U = s.U if side == "left" else s.Vh.T
    values = s.values[: min(U.shape[1], DIRECTIONS)]
    return U[:, : np.count_nonzero(values > s.bound * values[0])]


def frames(s: Spectrum, pair: Spectrum, k: float, side: str) -> tuple[Array, Array]:
    """The k leading directions of two updates of one layer, neither of them zero.

    Raises
    ------
    WrongInput
        If the shapes differ, or k is not a whole number of at least 1.
    Refused
        If one of them has fewer directions, or a tie at k leaves open which they are.
    """
    if pair.shape != s.shape:
        raise WrongInput(f"the pair must have the update's shape {s.shape}; got {pair.shape}.")
    if not (k >= 1 and float(k).is_integer()):
        raise WrongInput(f"k, the compared directions, must be a whole number >= 1; got {k}.")
    both = []
    for one in (s, pair):
        U, n = directions(one, side), int(k)
        if U.shape[1] < n:
            raise Refused(f"one of the updates has {U.shape[1]} directions, fewer than {n}")
        gap = one.values[n - 1 : n + 1]
        if len(gap) == 2 and gap[0] - gap[1] <= 2 * one.bound * one.values[0]:
            raise Refused(f"singular values {n} and {n + 1} of one of the updates are equal")
        both.append(U[:, :n])
    return both[0], both[1]


def level(s: Spectrum, pair: Spectrum, k: float, side: str) -> Level:
    """phi(k, k) of random subspaces: its mean k/d and the central 95 % of the Beta that fits it."""
    if s.zero or pair.zero:
        return math.nan, math.nan, math.nan
    # A frame over sqrt(k) is a matrix of norm 1 with k equal singular values.
    mean, variance = one_sided(int(k), s.shape[SIDES.index(side)], 1 / k)
    return mean, *interval(mean, variance)


@define(kind="ratio", needs=("vectors", "pair"), grid=grid, sides=SIDES, null=level, at="later")
def subspace_overlap(s: Spectrum, pair: Spectrum, k: float = 1, side: str = "left") -> float:
    """phi(k, k) = ||U_k^T U'_k||_F^2 / k of the k leading singular vectors of two updates.

    In [0, 1]: the mean cos^2 of the principal angles; k/d for random subspaces of d dimensions.
    NaN at dW = 0, of either. Symmetric in the two updates; unchanged by their sizes and by
    rotations of both together; transposition swaps the sides.

    Parameters
    ----------
    s, pair : Spectrum
        With vectors; of two updates of one layer.
    k : float
        Compared directions.
    side : str
        `left` (output) or `right` (input).

    Raises
    ------
    WrongInput
        If the shapes differ, k is no whole number above 0, or the side is unknown.
    Refused
        If one of them has fewer than k directions, or singular values k and k + 1 are equal.

    References
    ----------
    Hu et al., LoRA, 2021, appendix G.

    Examples
    --------
    >>> from lora_lab.linalg import Dense, decompose
    >>> one = decompose(Dense([[2.0, 0, 0], [0, 1, 0]]), vectors=True)
    >>> other = decompose(Dense([[3.0, 0, 0], [0, 0, 1]]), vectors=True)
    >>> [round(subspace_overlap(one, other, 2, side), 9) for side in ("left", "right")]
    [1.0, 0.5]
    """
    if s.zero or pair.zero:
        return math.nan
    return float(overlap_grid(*frames(s, pair, k, side))[-1, -1])
