"""The largest angle between the leading directions of two updates of one layer."""

from __future__ import annotations

import math
from functools import lru_cache, partial

import numpy as np

from lora_lab.linalg import Spectrum
from lora_lab.linalg.factored import Array
from lora_lab.linalg.subspace import DISTANCES, distance, random_triangle
from lora_lab.measures import Level, define
from lora_lab.measures.subspace_overlap import SIDES, frames, grid

DRAWS = 200
"""Random subspaces from which a level is taken."""

SEED = 20_210_617
"""Random subspaces are the same everywhere."""


def between(s: Spectrum, pair: Spectrum, k: float, side: str, kind: str) -> float:
    """Distance of a kind of the k leading directions; NaN if one of the updates is zero."""
    if s.zero or pair.zero:
        return math.nan
    return distance(*frames(s, pair, k, side), kind)


def random_level(s: Spectrum, pair: Spectrum, k: float, side: str, kind: str) -> Level:
    """Distance of a kind of `DRAWS` random subspaces: mean and central 95 %."""
    if s.zero or pair.zero:
        return math.nan, math.nan, math.nan
    found = [DISTANCES[kind](angles) for angles in _angles(s.shape[SIDES.index(side)], int(k))]
    low, high = np.quantile(found, [0.025, 0.975])
    return float(np.mean(found)), float(low), float(high)


def random_product(d: int, i: int, j: int, rng: np.random.Generator) -> Array:
    """U^T V of a fixed frame U (d, i) and a random one V (d, j), signs of columns aside.

    That is the corner of a random orthogonal matrix. Drawn in O((i + j) j^2) whatever d: of the
    Gaussian matrix whose QR is V, only i rows and the triangular factor of all others matter.

    Parameters
    ----------
    d, i, j : int
        1 <= i <= d and 1 <= j <= d.
    rng : numpy Generator

    Returns
    -------
    ndarray (i, j), float64
        Leading columns belong to leading columns of V.

    References
    ----------
    Bartlett 1933 (QR of a Gaussian matrix).

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> round(float(np.mean([np.sum(random_product(40, 3, 5, rng) ** 2) for _ in range(2000)])), 2)
    0.38
    """
    rest = random_triangle(d - i, j, rng) if d - i >= j else rng.standard_normal((d - i, j))
    return np.linalg.qr(np.vstack([rng.standard_normal((i, j)), rest]))[0][:i]


@lru_cache(maxsize=256)
def _angles(d: int, k: int) -> Array:
    rng = np.random.default_rng([SEED, d, k])
    products = np.stack([random_product(d, k, k, rng) for _ in range(DRAWS)])
    return np.arccos(np.clip(np.linalg.svd(products, compute_uv=False), 0.0, 1.0))


chance = partial(random_level, kind="spectral")


@define(kind="ratio", needs=("vectors", "pair"), grid=grid, sides=SIDES, null=chance, at="later")
def principal_angle(s: Spectrum, pair: Spectrum, k: float = 1, side: str = "left") -> float:
    """Largest principal angle between the spans of the k leading singular vectors of two updates.

    The spectral distance of the subspaces, in radians: 0 where they are equal, pi/2 where one
    holds a direction orthogonal to the whole other. NaN at dW = 0, of either. Symmetric in the
    two updates; unchanged by their sizes and by rotations of both together; transposition swaps
    the sides.

    Parameters
    ----------
    s, pair, k, side
        As in `subspace_overlap`.

    Raises
    ------
    WrongInput, Refused
        As in `subspace_overlap`.

    References
    ----------
    Björck & Golub 1973, Numerical methods for computing angles between linear subspaces.

    Examples
    --------
    >>> from lora_lab.linalg import Dense, decompose
    >>> one = decompose(Dense([[1.0, 0.0]]), vectors=True)
    >>> other = decompose(Dense([[1.0, 1.0]]), vectors=True)
    >>> round(principal_angle(one, other, 1, "right") / np.pi, 9)
    0.25
    """
    return between(s, pair, k, side, "spectral")
