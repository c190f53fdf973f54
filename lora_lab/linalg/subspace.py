"""Subspaces: overlap, principal angles, distances, random frames and degenerate blocks.

A frame U (d, k) holds k orthonormal columns of a d-dimensional space: the left vectors `U` of a
spectrum for the output side, `Vh.T` for the input side. Results depend on the spanned subspaces
(of the leading columns) only: signs, and rotations inside a degenerate block, are free.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from lora_lab.linalg.factored import Array
from lora_lab.registry import WrongInput, unknown

ORTHONORMAL = 1e-6
"""Largest entry of U^T U - I that a frame may have: coarser bases (float16) are no frames."""


def overlap_grid(U1: ArrayLike, U2: ArrayLike) -> Array:
    """phi(i, j) = ||U1[:, :i]^T U2[:, :j]||_F^2 / min(i, j) for every pair of leading subspaces.

    Parameters
    ----------
    U1, U2 : array_like, (d, i) and (d, j)
        Frames; their leading columns are compared.

    Returns
    -------
    ndarray (i, j), float64
        In [0, 1]: 1 where one subspace holds the other, 0 where they are orthogonal; entry
        [a - 1, b - 1] is phi(a, b). The transpose for exchanged frames. Compare with
        `random_overlap`.

    Raises
    ------
    WrongInput
        If an argument is no frame, or they live in different spaces.

    References
    ----------
    Hu et al., LoRA, 2021, appendix G.

    Examples
    --------
    >>> overlap_grid(np.eye(3)[:, :2], np.eye(3)[:, 1:]).tolist()
    [[0.0, 0.0], [1.0, 0.5]]
    """
    U1, U2 = _frames(U1, U2)
    energy = ((U1.T @ U2) ** 2).cumsum(axis=0).cumsum(axis=1)
    smaller = np.minimum.outer(1 + np.arange(U1.shape[1]), 1 + np.arange(U2.shape[1]))
    return np.minimum(energy / smaller, 1.0)


def random_overlap(i: int, j: int, d: int) -> float:
    """Mean of phi(i, j) over random subspaces of a d-dimensional space: max(i, j) / d.

    Either subspace may be fixed, if the other is uniform (Haar). In (0, 1].

    Raises
    ------
    WrongInput
        Unless i and j lie in [1, d].

    Examples
    --------
    >>> random_overlap(4, 8, 64)
    0.125
    """
    if not (1 <= i <= d and 1 <= j <= d):
        raise WrongInput(f"i and j must be in [1, d = {d}]; got {i} and {j}.")
    return max(i, j) / d


def principal_angles(U1: ArrayLike, U2: ArrayLike) -> Array:
    """Principal angles between the spans of two frames.

    From sines where the angle is below 45 degrees and from cosines above, so that every angle is
    right to rounding (an arccos alone loses angles below 1e-8).

    Parameters
    ----------
    U1, U2 : array_like, (d, i) and (d, j)
        Frames.

    Returns
    -------
    ndarray (min(i, j),), float64
        Radians in [0, pi/2], ascending. A subspace inside the other has angles 0 only: where
        i != j the |i - j| further dimensions have no angle here (see `distance`).

    Raises
    ------
    WrongInput
        If an argument is no frame, or they live in different spaces.

    References
    ----------
    Björck & Golub 1973, Numerical methods for computing angles between linear subspaces.

    Examples
    --------
    >>> tilted = [[1.0, 0.0], [0.0, np.cos(1e-9)], [0.0, np.sin(1e-9)]]
    >>> principal_angles(np.eye(3)[:, :2], tilted).tolist()
    [0.0, 1e-09]
    """
    U1, U2 = _frames(U1, U2)
    if U1.shape[1] < U2.shape[1]:
        U1, U2 = U2, U1
    product = U1.T @ U2
    cosines = np.linalg.svd(product, compute_uv=False)
    sines = np.linalg.svd(U2 - U1 @ product, compute_uv=False)[::-1]
    angles = np.where(
        cosines**2 > 0.5, np.arcsin(np.minimum(sines, 1.0)), np.arccos(np.minimum(cosines, 1.0))
    )
    # The two formulas differ by rounding where they meet.
    return np.sort(angles)


DISTANCES: dict[str, Callable[[Array], float]] = {
    "geodesic": lambda angles: float(np.linalg.norm(angles)),
    "chordal": lambda angles: float(np.linalg.norm(np.sin(angles))),
    "spectral": lambda angles: float(angles.max()),
}


def distance(U1: ArrayLike, U2: ArrayLike, kind: str = "geodesic") -> float:
    """Distance of the spans of two frames; a metric over subspaces of every dimension.

    `geodesic` sqrt(sum theta^2), `chordal` sqrt(sum sin^2 theta), `spectral` the largest angle,
    over the min(i, j) principal angles theta and, for i != j, an angle of pi/2 for each of the
    |i - j| missing dimensions: a line inside a plane lies at pi/2 (geodesic), not at 0.

    Parameters
    ----------
    U1, U2 : array_like, (d, i) and (d, j)
        Frames.
    kind : str
        `geodesic`, `chordal` or `spectral`.

    Returns
    -------
    float
        At least 0, and 0 for equal subspaces only; at most sqrt(k) pi/2, sqrt(k) and pi/2 with
        k = max(i, j). For i = j the chordal one is ||P1 - P2||_F / sqrt(2) of the projections.

    Raises
    ------
    WrongInput
        Unknown kind, no frame, or frames of different spaces.

    References
    ----------
    Ye & Lim 2016, Schubert varieties and distances between subspaces of different dimensions.

    Examples
    --------
    >>> distance(np.eye(3)[:, :2], np.eye(3)[:, 1:], "chordal")
    1.0
    """
    if kind not in DISTANCES:
        raise unknown("distance", kind, DISTANCES)
    missing = abs(np.shape(U1)[-1] - np.shape(U2)[-1])
    angles = principal_angles(U1, U2)
    return DISTANCES[kind](np.concatenate([angles, np.full(missing, math.pi / 2)]))


def random_triangle(d: int, k: int, generator: np.random.Generator) -> Array:
    """R (k, k) of the QR of a Gaussian matrix (d, k), without the matrix; 1 <= k <= d.

    Gaussian above the diagonal and on it the root of chi-square of d, d - 1, ... degrees of
    freedom: what a Gaussian matrix is but for a rotation, in O(k^2) whatever d.

    References
    ----------
    Bartlett 1933.

    Examples
    --------
    >>> R = random_triangle(900, 1, np.random.default_rng(0))
    >>> R.shape, bool(abs(R[0, 0] / 30 - 1) < 0.1)
    ((1, 1), True)
    """
    R = np.triu(generator.standard_normal((k, k)), 1)
    R[np.diag_indices(k)] = np.sqrt(generator.chisquare(d - np.arange(k)))
    return R


def random_frame(d: int, k: int, generator: np.random.Generator) -> Array:
    """A frame of k uniform (Haar) orthonormal columns in d dimensions.

    QR of a Gaussian matrix with the signs of R's diagonal moved into Q, without which the frame
    is not uniform.

    Parameters
    ----------
    d, k : int
        1 <= k <= d.
    generator : numpy Generator
        Where the randomness comes from; advanced by d k normal draws.

    Returns
    -------
    ndarray (d, k), float64

    Raises
    ------
    WrongInput
        Unless k lies in [1, d].

    References
    ----------
    Mezzadri 2007, How to generate random matrices from the classical compact groups.

    Examples
    --------
    >>> U = random_frame(5, 2, np.random.default_rng(0))
    >>> bool(np.allclose(U.T @ U, np.eye(2)))
    True
    """
    if not 1 <= k <= d:
        raise WrongInput(f"k must be in [1, d = {d}]; got {k}.")
    Q, R = np.linalg.qr(generator.standard_normal((d, k)))
    return Q * np.copysign(1.0, np.diagonal(R))


def blocks(values: ArrayLike, tolerance: float) -> list[slice]:
    """Runs of near-degenerate neighbours among singular values, to compare as one subspace each.

    Two neighbours belong together if sigma_i - sigma_{i+1} <= tolerance * sigma_i: single vectors
    of such a run mean nothing, only their span does. Exact zeros are one block.

    Parameters
    ----------
    values : array_like, (k,)
        Singular values, descending.
    tolerance : float
        Relative gap in [0, 1); 0 joins exact ties only.

    Returns
    -------
    list of slice
        In order, covering all k: ``U[:, block]`` spans one block.

    Raises
    ------
    WrongInput
        For values that are not descending or below 0, or a tolerance outside [0, 1).

    Examples
    --------
    >>> blocks([3.0, 2.0, 1.99, 1.0], tolerance=0.01)
    [slice(0, 1, None), slice(1, 3, None), slice(3, 4, None)]
    """
    sigma = np.asarray(values, dtype=np.float64)
    if not 0 <= tolerance < 1:
        raise WrongInput(f"tolerance must be in [0, 1); got {tolerance}.")
    if sigma.ndim != 1 or not (np.diff(sigma) <= 0).all() or not (sigma >= 0).all():
        raise WrongInput("values must be a list of singular values, descending and at least 0.")
    apart = sigma[:-1] - sigma[1:] > tolerance * sigma[:-1]
    ends = [*(np.flatnonzero(apart) + 1).tolist(), len(sigma)]
    return [slice(a, b) for a, b in zip([0, *ends], ends, strict=False) if b > a]


def _frames(U1: ArrayLike, U2: ArrayLike) -> tuple[Array, Array]:
    first, second = (_frame(U) for U in (U1, U2))
    if len(first) != len(second):
        raise WrongInput(
            f"two frames must live in one space; got {len(first)} and {len(second)} dimensions."
        )
    return first, second


def _frame(U: ArrayLike) -> Array:
    frame = np.asarray(U, dtype=np.float64)
    if frame.ndim != 2 or not 1 <= frame.shape[1] <= frame.shape[0]:
        raise WrongInput(
            f"a frame must be (d, k) with 1 <= k <= d columns; got shape {frame.shape}."
            " Pass U or Vh.T."
        )
    excess = frame.T @ frame - np.eye(frame.shape[1])
    if not np.abs(excess).max() <= ORTHONORMAL:  # also refuses NaN
        raise WrongInput(
            "the columns of a frame must be orthonormal; U^T U differs from the identity by up to"
            f" {np.abs(excess).max():.1e}. Orthonormalise by QR, or pass singular vectors."
        )
    return frame
