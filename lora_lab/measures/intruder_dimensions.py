"""Leading directions of the tuned weight that the base weight does not have."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_lab.linalg import Dense, Spectrum, Update, randomized
from lora_lab.linalg.factored import Array
from lora_lab.linalg.remember import remembered
from lora_lab.measures import SLACK, Level, Refused, define
from lora_lab.measures.norm import norm
from lora_lab.registry import WrongInput, unknown

SIDES = ("left", "right")
EXAMINED = (1, 2, 5, 10, 20)
EPSILON = 0.5

DRAWS = 40
SEED = 20_241_028
WINDOW = 32
"""Leading directions of W0 whose mixing by noise is drawn; those behind enter to first order."""


class Found(NamedTuple):
    """Both sides' similarities of W0 + dW's leading vectors to W0, and what they cannot be below.

    `left` and `right` (..., K): for each vector its largest |cosine| with a direction of W0.
    `floors`: 1 / sqrt(directions) where those of W0 fill the whole side, else 0.
    """

    left: Array
    right: Array
    floors: tuple[float, float]


def grid(s: Spectrum) -> tuple[float, ...]:
    """1, 2, 5, 10 and 20 examined vectors, as far as there are so many."""
    return tuple(float(k) for k in EXAMINED if k <= s.q)


def level(
    s: Spectrum, W0: Array, base: Spectrum, update: Update, k: float = 10, side: str = "left"
) -> Level:
    """The count after a random full-rank update of the same Frobenius norm."""
    return null_count(s, base, int(k), EPSILON, side)


@define(
    kind="rank",
    needs=("values", "W0", "base", "update"),
    grid=grid,
    sides=SIDES,
    null=level,
    at="end",
)
def intruder_dimensions(
    s: Spectrum, W0: Array, base: Spectrum, update: Update, k: float = 10, side: str = "left"
) -> float:
    """Of the k leading singular vectors of W0 + dW, those that W0 does not have, at epsilon = 0.5.

    Vector j is an intruder if max_i |<u0_i, u_j>| < epsilon over the singular vectors u0_i of W0
    on that side (`intruder_dimensions_eps` varies epsilon). Directions of W0 whose singular
    values agree to the rounding of the stored weight are compared as one subspace, by the norm of
    the projection; those whose singular value is 0 to that rounding are no directions of W0. So
    W0's directions fill a side only if W0 has as many nonzero singular values as that side has
    dimensions; there epsilon below 1 / sqrt(directions) could find nothing, and is refused. The
    thin basis of the longer side never is complete.

    0, 1, ..., k; 0 at dW = 0, NaN at W0 = 0. Unchanged when dW and W0 are scaled or rotated
    together; transposition swaps the sides. It grows with the size of dW against W0. The null is a
    random full-rank update of dW's Frobenius norm: how many intruders noise of that size makes.

    Parameters
    ----------
    s : Spectrum
        Of dW (m, n).
    W0 : ndarray, (m, n)
        The base weight.
    base : Spectrum
        Of W0, with all min(m, n) vectors.
    update : Factored or Dense
        dW itself.
    k : int
        Vectors examined; min(m, n) if there are fewer. The default 10 is the authors'.
    side : str
        `left` (output) or `right` (input).

    Raises
    ------
    WrongInput
        If shapes differ, the side is unknown, or k is no whole number in [1, 20].
    Refused
        Where epsilon could find nothing.

    References
    ----------
    Shuttleworth et al. 2024, LoRA vs Full Fine-tuning: An Illusion of Equivalence.

    Examples
    --------
    The update reads one input direction that W0 has, and writes one that W0 has not: a mixture
    of five.

    >>> from lora_lab.linalg import decompose
    >>> W0 = np.diag([5.0, 4.0, 3.0, 2.0, 1.0])
    >>> update = Dense(60 * np.outer(np.ones(5), [0, 0, 0, 1, 0]))
    >>> given = decompose(update), W0, decompose(Dense(W0), vectors=True), update
    >>> [intruder_dimensions(*given, k=1, side=side) for side in SIDES]
    [1.0, 0.0]
    """
    if not (float(k).is_integer() and 1 <= k <= EXAMINED[-1]):
        raise WrongInput(f"k must be a whole number in [1, {EXAMINED[-1]}]; got {k}.")
    return count(s, W0, base, update, int(k), EPSILON, side)


def count(
    s: Spectrum, W0: Array, base: Spectrum, update: Update, k: int, epsilon: float, side: str
) -> float:
    """Intruders among the k leading vectors at a threshold; see `intruder_dimensions`."""
    if side not in SIDES:
        raise unknown("side", side, SIDES)
    W0 = np.asarray(W0, dtype=np.float64)
    for shape in (W0.shape, base.shape, update.shape):
        if shape != s.shape:
            raise WrongInput(f"W0 must have the update's shape {s.shape}; got {shape}.")
    if s.zero:
        return 0.0
    if base.zero:
        return math.nan
    found = _similarities(s, W0, base, update)
    floor = found.floors[SIDES.index(side)]
    if epsilon <= floor * (1 + SLACK):
        raise Refused(
            f"W0's directions fill the {side} side: no vector is less than {floor:.3g} similar to"
            f" all of them, so epsilon = {epsilon:.3g} finds nothing"
        )
    similar = found.left if side == "left" else found.right
    return float(np.count_nonzero(similar[:k] < epsilon * (1 - SLACK)))


def null_count(s: Spectrum, base: Spectrum, k: int, epsilon: float, side: str) -> Level:
    """Mean and central 95 % of the count after random full-rank updates of dW's norm."""
    if base.zero:
        return math.nan, math.nan, math.nan
    drawn = _null_similarities(s, base)
    similar = drawn.left if side == "left" else drawn.right
    counts = np.count_nonzero(similar[:, :k] < epsilon * (1 - SLACK), axis=1)
    low, high = np.quantile(counts, [0.025, 0.975])
    return float(counts.mean()), float(low), float(high)


@remembered
def _similarities(s: Spectrum, W0: Array, base: Spectrum, update: Update) -> Found:
    assert base.U is not None
    assert base.Vh is not None
    tuned = randomized.leading(Dense(W0 + update.dense()), EXAMINED[-1])
    assert tuned.U is not None
    assert tuned.Vh is not None
    # The vectors of a value that is 0 are no directions of the tuned weight.
    exist = tuned.values[: len(tuned.Vh)] > _rounding(s) * tuned.values[0]
    starts, have = _blocks(s, base)
    left = _similar(base.U[:, :have].T @ tuned.U[:, exist], starts)
    right = _similar(base.Vh[:have] @ tuned.Vh[exist].T, starts)
    floors = [1 / math.sqrt(len(starts)) if have == d else 0.0 for d in s.shape]
    return Found(left, right, (floors[0], floors[1]))


def _rounding(s: Spectrum) -> float:
    """What storing W0 + dW moves a singular value by, relative to sigma_1, with a factor 4."""
    return 4 * s.roundoff


def _blocks(s: Spectrum, base: Spectrum) -> tuple[NDArray[np.intp], int]:
    """Where blocks of equal singular values of W0 start, and how many values are not 0."""
    values = base.relative[base.relative > _rounding(s)]
    apart = np.flatnonzero(values[:-1] - values[1:] > _rounding(s)) + 1
    return np.concatenate([[0], apart]), len(values)


def _similar(cosines: Array, starts: NDArray[np.intp]) -> Array:
    """Largest norm of the projections onto the blocks, per column of cosines (..., i, j)."""
    energy = np.add.reduceat(cosines**2, starts, axis=-2)
    return np.asarray(np.sqrt(energy.max(axis=-2)))


@remembered
def _null_similarities(s: Spectrum, base: Spectrum) -> Found:
    """Similarities after W0 + E, E Gaussian with dW's Frobenius norm; arrays (draws, K).

    In the bases of W0's vectors E is Gaussian again. The window's part of W0 + E is decomposed; of
    the directions behind it, vector j (at theta) takes up E's entries to first order: variance
    sd^2 (theta^2 + sigma_i^2) / (theta^2 - sigma_i^2)^2 from each i. Close up to ||dW|| of about
    ||W0||, and too low beyond. Decompositions of the whole W0 + E cost a hundred times as much.
    """
    m, n = s.shape
    sd = norm(s) / math.sqrt(m * n)
    starts, have = _blocks(s, base)
    size = min(WINDOW, s.q)
    window = np.zeros((size, size))
    np.fill_diagonal(window, base.values[:size])
    noise = np.random.default_rng([SEED, m, n]).standard_normal((DRAWS, size, size))
    U, theta, Vh = np.linalg.svd(window + sd * noise)
    k = min(EXAMINED[-1], size)
    U, theta, V = U[:, :, :k], theta[:, :k], np.swapaxes(Vh, 1, 2)[:, :, :k]
    behind = base.values[size:]
    mixed = sd**2 * _first_order(theta, behind)
    starts = starts[starts < min(size, have)]
    sides = []
    for vectors, d in ((U, m), (V, n)):
        outside = mixed + sd**2 * (d - s.q) / theta**2
        inside = _similar(vectors[:, : min(size, have)], starts)
        sides.append(inside / np.sqrt(1 + outside))
    return Found(sides[0], sides[1], (0.0, 0.0))


def _first_order(theta: Array, behind: Array) -> Array:
    """sum_i (theta^2 + sigma_i^2) / (theta^2 - sigma_i^2)^2; infinite unless theta > sigma_i."""
    gap = theta[..., None] ** 2 - behind**2
    with np.errstate(divide="ignore"):
        share = (theta[..., None] ** 2 + behind**2) / np.where(gap > 0, gap, 0.0) ** 2
    return np.asarray(share.sum(axis=-1))
