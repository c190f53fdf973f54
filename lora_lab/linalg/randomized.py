"""The leading singular triples of an update, by a randomized method that certifies its answer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lora_lab.linalg.factored import Array, Factored, Update
from lora_lab.linalg.gram import PROBES, U64, probed_norm, ritz
from lora_lab.linalg.spectrum import Spectrum, decompose, in_range, tolerance
from lora_lab.registry import WrongInput

LARGE = 2048
"""Smallest min(m, n) from which the randomized route is tried."""
FEW = 128
"""It is tried for at most min(m, n) / FEW directions. Beyond, `decompose` is as fast or faster."""
SPARE = 8
"""Columns of a Krylov block beyond k."""
DEPTHS = (3, 6, 9, 12)
"""Products with dW^T dW after which convergence is looked at."""
POWER = 8
"""Products with A^T A that sharpen the probe of what was left over."""


def leading(update: Update, k: int, seed: int = 0, layer: str = "") -> Spectrum:
    """The k leading singular values and vectors of an update, and nothing else of it.

    For a large dense update (min(m, n) >= `LARGE`, k <= min(m, n) / `FEW`) by a block Krylov
    method from a Gaussian start, at the cost of some 40 products with k columns. Its answer is
    certified afterwards, from dW itself:

    - certain: every triple has dW v_i = sigma_i u_i to rounding, and the residuals
      ||dW^T u_i - sigma_i v_i|| are measured. Their root sum of squares rho bounds the distance of
      the returned values, each to a singular value of its own (Kahan; Stewart & Sun 1990, IV.4);
    - that none was missed: no singular value of dW deflated by the converged triples lies above
      sigma_k by more than the bound. Certain where the Frobenius norm of the rest shows it, else
      by a power iteration from Gaussian probes that are independent of the start, wrong with a
      chance of at most 1e-6 at each of at most four looks.

    `bound` is the sum of both, relative to sigma_1: values are those of the k leading ones within
    it, and the vectors are exact for a matrix within it of dW. Where the bound exceeds that of the
    dense routes (`spectrum.tolerance`) because the spectrum is too flat, and for every other
    update, `decompose` answers instead, cut to k; `route` says which. Equal seeds give equal
    results.

    Parameters
    ----------
    update : Factored or Dense
    k : int
        At least 1; where there are fewer directions (r for factors), all of them are given.
    seed : int
        Of the random start.
    layer : str
        The layer's name, for the error message.

    Returns
    -------
    Spectrum
        With k `values`, U (m, k) and Vh (k, n). Measures of all values refuse it. For the zero
        update values are 0 and vectors the first unit vectors.

    Raises
    ------
    WrongInput
        If the update holds NaN or Inf, or k is below 1.

    References
    ----------
    Halko, Martinsson & Tropp 2011; Musco & Musco 2015 (block Krylov).

    Examples
    --------
    >>> s = leading(Factored(np.eye(5, 3), np.diag([3.0, 2.0, 1.0])), k=2)
    >>> s.values.round(12).tolist(), s.U.shape, s.Vh.shape, s.q
    ([3.0, 2.0], (5, 2), (2, 3), 3)
    """
    if k < 1:
        raise WrongInput(f"k must be at least 1; got {k}.")
    if not isinstance(update, Factored) and k * FEW <= min(update.shape) >= LARGE:
        matrix, unit = in_range(update.dW, layer)
        tolerable = tolerance(update.shape, update.made_in)
        if unit and (found := _certified(matrix, k, tolerable, seed)):
            U, sigma, Vh, bound = found
            return Spectrum(sigma * unit, update.shape, U, Vh, update.made_in, "randomized", bound)
    whole = decompose(update, vectors=k, layer=layer)
    assert whole.U is not None
    return replace(whole, values=whole.values[: whole.U.shape[1]])


Triples = tuple[Array, Array, Array, float]


def _certified(matrix: Array, k: int, tolerable: float, seed: int) -> Triples | None:
    """U, values, Vh and bound once the certificate closes; None where it does not in time."""
    starting, probing = np.random.SeedSequence(seed).spawn(2)
    width, watched = k + SPARE, 2 * k + SPARE
    Z = np.random.default_rng(starting).standard_normal((matrix.shape[1], width))
    V = _orthogonal(Z, np.empty((len(Z), 0)))
    images = matrix @ V
    before = np.inf
    for depth in range(1, DEPTHS[-1] + 1):
        if V.shape[1] + width > min(matrix.shape) // 2:
            return None
        block = _orthogonal(matrix.T @ images[:, -width:], V)
        V, images = np.hstack([V, block]), np.hstack([images, matrix @ block])
        if depth not in DEPTHS:
            continue
        turn = np.linalg.svd(np.linalg.qr(images, mode="r"))[2]
        U, sigma, right, residual = ritz(matrix, np.linalg.qr(V @ turn[:watched].T)[0])
        rho = np.sqrt(np.cumsum(residual**2)) / sigma[0]
        j = int(np.count_nonzero(rho <= tolerable))
        if j >= k:
            rest = _rest(matrix, U[:, :j], sigma[:j], right[:, :j], k, probing)
            missed = max(0.0, rest / sigma[0] - sigma[k - 1] / sigma[0])
            bound = float(rho[j - 1] + missed) + U64 * max(matrix.shape)
            if bound <= tolerable:
                return U[:, :k].copy(), sigma[:k], right[:, :k].T.copy(), bound
        # Convergence is geometric: give up where the checks left will not do.
        left = len(DEPTHS) - 1 - DEPTHS.index(depth)
        if j == watched or rho[k - 1] * (rho[k - 1] / before) ** left > tolerable:
            return None
        before = rho[k - 1]
    return None


def _orthogonal(block: Array, V: Array) -> Array:
    """A frame of what a block adds to a frame V; the second pass mends the first's rounding."""
    for _ in range(2):
        block = np.linalg.qr(block - V @ (V.T @ block))[0]
    return block


def _rest(
    matrix: Array, U: Array, sigma: Array, V: Array, k: int, probing: np.random.SeedSequence
) -> float:
    """Upper bound of the norm of what the converged triples leave, as sharp as is needed for k."""
    energy = float(np.vdot(matrix, matrix))
    rounding = U64 * max(matrix.shape) * energy
    rest = float(np.sqrt(max(energy - np.vdot(sigma, sigma), 0.0) + rounding))
    if rest <= sigma[k - 1]:
        return rest
    X = np.random.default_rng(probing).standard_normal((matrix.shape[1], PROBES))
    # Divided by `rest` in each product, powers stay within float64.
    for step in range(2 * POWER + 1):
        here, there, M = (V, U, matrix) if step % 2 == 0 else (U, V, matrix.T)
        X = M @ (X - here @ (here.T @ X))
        X = (X - there @ (there.T @ X)) / rest
    return float(rest * min(1.0, probed_norm(X) ** (1 / (2 * POWER + 1))))
