"""What truncation loses of the layer's output, on the inputs that the layer sees."""

from __future__ import annotations

import math

import numpy as np
from scipy.linalg import lapack

from lora_lab.linalg import Dense, Factored, Spectrum, Update, decompose
from lora_lab.linalg.factored import ROUNDOFF, Array
from lora_lab.linalg.remember import remembered
from lora_lab.measures import DIRECTIONS, amplification, define
from lora_lab.measures.amplification import directions
from lora_lab.registry import WrongInput, unknown

SIDES = ("weighted", "plain")


def grid(s: Spectrum) -> tuple[float, ...]:
    """0, 1, 2, 4, ... kept directions: at most 64, those there are, and r of factors."""
    return (0.0, *amplification.grid(s))


@define(
    kind="ratio",
    needs=("vectors", "update", "activations"),
    grid=grid,
    sides=SIDES,
    at="later",
)
def activation_error(
    s: Spectrum, update: Update, activations: Array, k: float = 1, side: str = "weighted"
) -> float:
    """||(dW - M) C^(1/2)||_F / ||dW C^(1/2)||_F for M of rank k, C = E[x x^T].

    Its square is the share of the update's mean squared output that is lost, E||(dW - M) x||^2 /
    E||dW x||^2. `weighted`: the best M of rank k, (dW C^(1/2))_k C^(-1/2) with the pseudo-inverse
    of a singular C; `plain`: M = dW_k, the best approximation without regard to inputs.

    In [0, 1], non-increasing in k, and `weighted` is never above `plain`; 1 at k = 0, 0 for
    k >= rank. NaN at dW = 0, and where the inputs never reach dW
    (dW C = 0). Unchanged by the size of dW and of C and by rotations; no transposition, since the
    inputs belong to one side.

    Parameters
    ----------
    s : Spectrum
        Of dW (m, n), with vectors.
    update : Factored or Dense
        dW itself; factors are not multiplied out.
    activations : ndarray, (n, n)
        C, the uncentred second moment of the layer's inputs.
    k : int
        Kept directions, at least 0.
    side : str
        `weighted` or `plain`.

    Raises
    ------
    WrongInput
        If C is not a symmetric positive semidefinite (n, n) matrix, the side is unknown, or k is
        out of range.
    Refused
        `plain` where dW has no unique k leading directions.

    References
    ----------
    Eckart & Young 1936, applied to dW C^(1/2); Wang et al. 2024 (SVD-LLM) for weights.

    Examples
    --------
    The inputs never show what the leading direction does.

    >>> update, C = Dense(np.diag([4.0, 3.0, 1.0])), np.diag([0.0, 1.0, 7.0])
    >>> s = decompose(update, vectors=True)
    >>> [round(activation_error(s, update, C, 1, side), 6) for side in ("weighted", "plain")]
    [0.661438, 1.0]
    """
    if side not in SIDES:
        raise unknown("side", side, SIDES)
    if not (k >= 0 and float(k).is_integer()):
        raise WrongInput(f"k, the kept directions, must be a whole number >= 0; got {k}.")
    if s.zero:
        return math.nan
    weighted, plain = _errors(s, update, np.asarray(activations, dtype=np.float64))
    if math.isnan(weighted[0]) or k == 0:
        return float(weighted[0])
    have = s.q if s.r is None else min(s.r, s.q)
    if k >= (min(have, len(weighted) - 1) if side == "weighted" else have):
        return 0.0
    if side == "weighted":
        return float(weighted[int(k)])
    count = directions(s, k, "the update")
    if count >= len(plain):
        raise WrongInput(f"k must be in [0, {len(plain) - 1}], the vectors there are; got {k}.")
    return float(plain[count])


@remembered
def _errors(s: Spectrum, update: Update, C: Array) -> tuple[Array, Array]:
    """Errors for k = 0, ..., q (weighted) and k = 0, ..., K (plain); NaN if dW C = 0."""
    assert s.U is not None
    root = square_root(C, s.shape[1])
    seen = _times(update, root)
    # In units of sigma_1 of dW and of C's root, both of which cancel.
    spectrum = decompose(seen)
    if spectrum.values[0] <= len(C) * ROUNDOFF["float64"] * s.values[0] * np.abs(root).max():
        return np.array([math.nan]), np.array([math.nan])
    weighted = _tail(spectrum.relative**2)
    Y = seen.dense() / spectrum.values[0]
    U = s.U[:, :DIRECTIONS]
    # dW_k C^(1/2) is the part of dW C^(1/2) inside U_k: the rest is added from the small end.
    inside = U.T @ Y
    beyond = np.sum((Y - U @ inside) ** 2)
    plain = _tail(np.append(np.sum(inside**2, axis=1), beyond))[:-1]
    return weighted, plain


def _times(update: Update, root: Array) -> Update:
    if isinstance(update, Factored):
        return Factored(update.B, update.A @ root, update.scale, made_in="float64")
    return Dense(update.dW @ root, made_in="float64")


def _tail(energy: Array) -> Array:
    """sqrt(sum beyond k / sum) for k = 0, 1, ..."""
    tail = np.append(np.cumsum(energy[::-1])[::-1], 0.0)
    return np.asarray(np.sqrt(tail / tail[0]))


def square_root(C: Array, n: int) -> Array:
    """L (n, rank) with C = L L^T, by Cholesky with pivots; C may be singular, not indefinite.

    Every square root of C gives the same norms and singular values; this is the cheapest.

    >>> L = square_root(np.array([[4.0, 2.0], [2.0, 1.0]]), 2)
    >>> L.ravel().tolist()
    [2.0, 1.0]
    """
    what = f"activations, E[x x^T], must be a positive semidefinite matrix ({n}, {n})"
    if C.shape != (n, n):
        raise WrongInput(f"{what}; got shape {C.shape}.")
    largest = float(np.abs(C).max())
    if not np.isfinite(largest):
        raise WrongInput(f"{what}; it holds NaN or Inf.")
    if largest == 0:
        return np.zeros((n, 1))
    slack = n * ROUNDOFF["float32"] * largest  # inputs may be float32 sums
    z = np.random.default_rng(0).standard_normal(n)
    if np.abs(C @ z - z @ C).max() > slack:  # a probe: C - C^T itself takes longer than Cholesky
        raise WrongInput(f"{what}; it is not symmetric.")
    factor, pivots, rank, _ = lapack.dpstrf(C, lower=1)
    L = np.empty((n, rank))
    L[pivots - 1] = np.tril(factor)[:, :rank]
    if np.abs(np.sum(L**2, axis=1) - np.diagonal(C)).max() > slack:
        raise WrongInput(f"{what}; it has a negative eigenvalue.")
    return L
