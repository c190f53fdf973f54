"""Gram matrices: singular values, leading directions and small cores, where a bound suffices.

Half the work of an SVD or less, at the price of squared conditions. Every function answers with
a bound, or with None where its bound exceeds the tolerance and the caller must go the exact way.
Bounds are first order, with rounding errors taken to accumulate like random walks, as they do
(Higham & Mary 2019, A new approach to probabilistic rounding error analysis).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import scipy.linalg
from numpy.typing import NDArray
from scipy.linalg import lapack

from lora_lab.linalg.factored import ROUNDOFF, Array
from lora_lab.linalg.lapack import eigenvalues, tridiagonal

U64 = ROUNDOFF["float64"]
CORE_BOUND = 1e-12
"""Largest error relative to sigma_1 that the Gram core of factors may have; QR goes below."""
SQUARES = (2.0**-800, 2.0**800)
"""Squared norms in this range have lost nothing that matters to underflow or overflow."""
PROBES = 16
PROBE = 1.2044473
"""Square root of the 1e-6 quantile of chi-squared with `PROBES` degrees of freedom."""


def probed_norm(product: Array) -> float:
    """Upper bound of ||E||_2 from E Z, Z Gaussian with `PROBES` columns; it fails with p <= 1e-6.

    With v the leading right vector of E, ||E Z|| >= ||E|| ||v^T Z||, and ||v^T Z||^2 is
    chi-squared with `PROBES` degrees of freedom. Fixed seeds make failure repeatable, not likelier.

    >>> E = np.diag([2.0, 1.0])
    >>> 2 < probed_norm(E @ np.random.default_rng(0).standard_normal((2, PROBES))) < 20
    True
    """
    return float(np.linalg.norm(product, 2)) / PROBE


def ritz(matrix: Array, V: Array) -> tuple[Array, Array, Array, Array]:
    """Singular triples of a matrix (m, n) inside the span of a frame V (n, p), and residuals.

    Returns
    -------
    U (m, p), sigma (p,), V' (n, p), residual (p,)
        U and V' orthonormal with matrix V' = U diag(sigma) to rounding; residual_i is
        ||matrix^T u_i - sigma_i v'_i||. No sigma_i exceeds the i-th singular value of the matrix,
        and the leading j of them lie within ||residual[:j]|| of j of its singular values.
    """
    U, sigma, turn = np.linalg.svd(matrix @ V, full_matrices=False)
    turned = V @ turn.T
    return U, sigma, turned, np.linalg.norm(matrix.T @ U - turned * sigma, axis=0)


def values(matrix: Array, tolerance: float) -> tuple[Array, float] | None:
    """All singular values from the smaller Gram matrix, and their error relative to sigma_1.

    Parameters
    ----------
    matrix : ndarray (m, n)
        Not zero, its squares within `SQUARES`.
    tolerance : float
        Largest bound to accept.
    """
    wide = _wide(matrix)
    if not _sensible(len(wide), tolerance):
        return None
    return _accepted(wide, _Tridiagonal(wide @ wide.T), tolerance)


def leading(matrix: Array, k: int, tolerance: float) -> tuple[Array, Array, Array, float] | None:
    """All singular values and the k leading directions, from one tridiagonal form of the Gram.

    Eigenvectors of the small side are sharpened by `ritz`. The bound is that of the values plus
    the largest residual, so that every (u, sigma, v) is one of a matrix within it.

    Returns
    -------
    U (m, k), sigma (min(m, n),), Vh (k, n), bound, or None
    """
    wide = _wide(matrix)
    if not _sensible(len(wide), tolerance):
        return None
    form = _Tridiagonal(wide @ wide.T)
    found = _accepted(wide, form, tolerance)
    frame = None if found is None else form.leading(k)
    if found is None or frame is None:
        return None
    sigma, bound = found
    long, _, short, residual = ritz(wide.T, frame)
    bound += float(residual.max() / sigma[0])
    if bound > tolerance:
        return None
    U, V = (short, long) if wide is matrix else (long, short)
    return U, sigma, np.ascontiguousarray(V.T), bound


def core(B: Array, A: Array, scale: float) -> tuple[Array, float] | None:
    """The r singular values of scale B A from B^T B and A A^T, and their bound.

    With Cholesky factors R of the Grams of the normalised columns of B and rows of A, B = Q R D
    where Q is orthonormal up to eta = ||R^-T (error of the Gram and of R) R^-1||: every singular
    value, also the smallest, is right to half the sum of both eta, *relative to itself*
    (Ostrowski). The r x r product adds u sqrt(r) (sum of the columns' sizes), relative to sigma_1.
    """
    # What over- or underflows, and NaN or Inf in a factor, comes out as a refusal.
    with np.errstate(all="ignore"):
        left, right = _triangle(B.T @ B, B.shape[0]), _triangle(A @ A.T, A.shape[1])
        if left is None or right is None:
            return None
        (b, R_B, eta_B), (a, R_A, eta_A) = left, right
        weight = b * a * scale
    size = float(np.abs(weight).max())
    if not 0 < size < np.inf:
        return None
    weight /= size
    try:
        sigma: NDArray[Any] = np.linalg.svd((R_B * weight) @ R_A.T, compute_uv=False)
    except np.linalg.LinAlgError:
        return None
    if sigma[0] == 0:
        return None
    product = U64 * math.sqrt(len(sigma)) * float(np.abs(weight).sum() / sigma[0])
    bound = 0.5 * (eta_B + eta_A) + product
    return (sigma * size, bound) if bound <= CORE_BOUND else None


def _wide(matrix: Array) -> Array:
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T


def _sensible(q: int, tolerance: float) -> bool:
    """Whether to try: eigenvalues alone may err too much, and 1 x n needs none."""
    return q > 1 and _eigenvalue_error(q) <= tolerance


def _eigenvalue_error(q: int) -> float:
    """Error of LAPACK's symmetric eigenvalues relative to the largest: a random walk of q steps."""
    return 8 * math.sqrt(q) * U64


def _accepted(wide: Array, form: _Tridiagonal, tolerance: float) -> tuple[Array, float] | None:
    """Values and bound from the eigenvalues of the Gram matrix.

    If Gram and eigenvalues are right to delta sigma_1^2, a value sigma is right to
    delta sigma_1^2 / max(sigma, sqrt(delta) sigma_1): worst for the smallest.
    """
    squares = form.values()
    if squares is None:
        return None
    sigma: Array = np.sqrt(np.maximum(squares, 0.0))
    largest, smallest = float(squares[0]), float(sigma[-1] / sigma[0])

    def bound(error: float) -> float:
        delta = error / largest + _eigenvalue_error(len(squares))
        return delta / max(smallest, math.sqrt(delta))

    # ||fl(X X^T) - X X^T|| <= sqrt(length) u ||X||_F^2 costs nothing, but flat spectra err far
    # less than that: there the error itself is measured.
    stated = bound(U64 * math.sqrt(wide.shape[1]) * float(squares.sum()))
    if stated > tolerance >= bound(0.0):
        Z = np.random.default_rng(0).standard_normal((len(wide), PROBES))
        stated = bound(probed_norm(wide @ wide.T @ Z - wide @ (wide.T @ Z)))
    return (sigma, stated) if stated <= tolerance else None


class _Tridiagonal:
    """A symmetric matrix reduced once, in its own memory, for eigenvalues and some eigenvectors."""

    def __init__(self, G: Array) -> None:
        self.q = len(G)
        # Narrower blocks than LAPACK's own 32 are up to a fifth faster at these sizes.
        block = 8 if self.q <= 512 else 16
        self.d, self.e, self.tau = tridiagonal(G, block)
        self.reflectors = G.T

    def values(self) -> Array | None:
        """All eigenvalues, descending; None where QL does not converge."""
        ascending = eigenvalues(self.d, self.e)
        return None if ascending is None else ascending[::-1]

    def leading(self, k: int) -> Array | None:
        """The eigenvectors of the k largest eigenvalues, as columns in that order."""
        last = (self.q - k, self.q - 1)
        try:
            _, V = scipy.linalg.eigh_tridiagonal(self.d, self.e, select="i", select_range=last)
        except np.linalg.LinAlgError:
            return None
        # Reflectors leave the first coordinate alone: below it they are those of a QR.
        turned, _, info = lapack.dormqr(
            "L", "N", self.reflectors[1:, :-1], self.tau, V[1:], lwork=64 * self.q
        )
        return None if info else np.vstack([V[:1], turned])[:, ::-1]


def _triangle(G: Array, length: int) -> tuple[Array, Array, float] | None:
    """Norms (r,) of a factor's columns, Cholesky factor of their correlations, and its eta."""
    squares = np.diagonal(G)
    r, low, high = len(G), squares.min(), squares.max()
    entry = (math.sqrt(length) + math.sqrt(r) + 2) * U64
    # NaN or Inf anywhere in the factor is NaN or Inf on the diagonal, and fails this test.
    if not (SQUARES[0] <= low and high <= SQUARES[1] and r * entry <= CORE_BOUND):
        return None
    norms = np.sqrt(squares)
    R, info = lapack.dpotrf(G / np.multiply.outer(norms, norms))
    if info:
        return None
    inverse, info = lapack.dtrtri(R)
    if info:
        return None
    # Every entry of the Gram is right to `entry`: ||R^-T E R^-1|| <= entry || |R^-T| 1 ||^2, and
    # <= r entry ||R^-1||^2, which is sharper for larger r and costs an SVD.
    eta = entry * float(np.sum(np.abs(inverse).sum(axis=0) ** 2))
    if eta > CORE_BOUND / 2:
        eta = min(eta, r * entry * float(np.linalg.norm(inverse, 2)) ** 2)
    return norms, R, eta
