"""How much the update strengthens what W0 has in the update's own directions."""

from __future__ import annotations

import math

import numpy as np

from lora_lab.linalg import Spectrum, haar
from lora_lab.linalg.factored import ROUNDOFF, Array, frobenius
from lora_lab.linalg.remember import remembered
from lora_lab.measures import DIRECTIONS, Level, Refused, define, doubling
from lora_lab.measures.norm import norm
from lora_lab.registry import WrongInput, unknown

SIDES = ("update", "base", "random")


def grid(s: Spectrum) -> tuple[float, ...]:
    """1, 2, 4, ... directions of the update: at most 64, those there are, and r of factors."""
    there = s.q if s.U is None else s.U.shape[1]
    return doubling(min(DIRECTIONS, there, there if s.r is None else s.r))


def directions(s: Spectrum, k: float, of: str) -> int:
    """k as an int, if the span of the k leading directions is unique.

    Raises
    ------
    WrongInput
        If k is not a whole number in [1, q].
    Refused
        If sigma_k is 0 or sigma_k = sigma_(k+1), to the error bound of the values: the vectors
        there, or which of them come first, are rounding errors.
    """
    if not (float(k).is_integer() and 1 <= k <= s.q):
        raise WrongInput(
            f"k, the leading directions, must be a whole number in [1, {s.q}]; got {k}."
        )
    error = max(s.bound, max(s.shape) * ROUNDOFF["float64"]) * s.values[0]
    if s.values[int(k) - 1] <= error:
        have = int(np.count_nonzero(s.values > error))
        raise Refused(f"{of} has {have} directions, fewer than k = {int(k)}")
    if k < s.q and s.values[int(k) - 1] - s.values[int(k)] <= error:
        raise Refused(f"{of} has equal singular values at k = {int(k)}: no unique directions")
    return int(k)


def random_size(size: float, shape: tuple[int, int], k: int) -> float:
    """Root mean square of ||U^T W0 V||_F over random frames U (m, k), V (n, k): size k / sqrt(mn).

    The random column of Hu et al. (table 7) has .02 and .33 for one draw:

    >>> [round(random_size(61.95, (12288, 12288), k), 4) for k in (4, 64)]
    [0.0202, 0.3227]
    """
    return size * k / math.sqrt(shape[0] * shape[1])


def level(s: Spectrum, W0: Array, base: Spectrum, k: float = 1, side: str = "update") -> Level:
    """The ratio for random frames, by formula: at the root mean square, and central 95 %.

    ||U^T W0 V||^2 / ||W0||^2 is taken as the Beta of its exact mean and variance. The mean of the
    ratio itself is no use: at k = 1 it is infinite, because the denominator may come near 0.
    """
    if base.zero:
        return math.nan, math.nan, math.nan
    low, high = haar.interval(*haar.two_sided(int(k), s.shape, haar.purity(base.values)))
    ratio = norm(s) / norm(base)
    center = norm(s) / random_size(norm(base), s.shape, int(k))
    return center, ratio / math.sqrt(high), ratio / math.sqrt(low)


@define(kind="ratio", needs=("vectors", "W0", "base"), grid=grid, sides=SIDES, null=level, at="end")
def amplification(
    s: Spectrum, W0: Array, base: Spectrum, k: float = 1, side: str = "update"
) -> float:
    """||dW||_F / ||U_k^T W0 V_k||_F, the whole update over what W0 has in k directions.

    `update`: U_k, V_k are the leading singular vectors of dW. Large where training strengthens
    directions that W0 has but does not emphasise. Two controls: `base`, W0's own leading vectors
    (the smallest value that any frames give), and `random`, the root mean square over random
    frames.

    Above 0; NaN at dW = 0 and at W0 = 0. Non-increasing in k. Grows with |c| in c dW; unchanged
    when dW and W0 are scaled, transposed or rotated together.

    Parameters
    ----------
    s : Spectrum
        Of dW (m, n), with vectors.
    W0 : ndarray, (m, n)
        The base weight.
    base : Spectrum
        Of W0.
    k : int
        Directions, at least 1 and at most the vectors that are there.
    side : str
        `update`, `base` or `random`.

    Raises
    ------
    WrongInput
        If shapes differ, the side is unknown, or k is out of range.
    Refused
        If dW has fewer than k directions or no unique ones, or W0 has nothing in them.

    References
    ----------
    Hu et al., LoRA, 2021, section 7.3 and appendix H.4.

    Examples
    --------
    >>> from lora_lab.linalg import Dense, decompose
    >>> s, W0 = decompose(Dense(np.diag([0.0, 0.5, 3.0])), vectors=True), np.diag([8.0, 4.0, 1.0])
    >>> base = decompose(Dense(W0))
    >>> [round(amplification(s, W0, base, 1, side), 4) for side in ("update", "base", "random")]
    [3.0414, 0.3802, 1.0138]
    """
    if side not in SIDES:
        raise unknown("side", side, SIDES)
    W0 = np.asarray(W0, dtype=np.float64)
    if W0.shape != s.shape or base.shape != s.shape:
        raise WrongInput(f"W0 must have the update's shape {s.shape}; got {W0.shape}.")
    if s.zero or base.zero:
        return math.nan
    if side == "random":
        held = random_size(norm(base), s.shape, int(k))
    elif side == "base":
        held = float(base.values[0] * np.linalg.norm(base.relative[: int(k)]))
    else:
        count = directions(s, k, "the update")
        inside = _inside(s, W0)
        if count > len(inside):
            raise WrongInput(f"k must be in [1, {len(inside)}], the vectors there are; got {k}.")
        held = frobenius(inside[:count, :count])
        if held <= ROUNDOFF["float64"] * norm(base):
            raise Refused(f"W0 has nothing in the {count} leading directions of the update")
    return norm(s) / held


@remembered
def _inside(s: Spectrum, W0: Array) -> Array:
    """U^T W0 V for the leading vectors of dW: its leading blocks belong to every k."""
    assert s.U is not None
    assert s.Vh is not None
    count = min(DIRECTIONS, s.U.shape[1])
    return (s.U[:, :count].T @ W0) @ s.Vh[:count].T
