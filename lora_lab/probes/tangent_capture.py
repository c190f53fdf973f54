"""Share of the gradient that the factors can follow, per layer."""

from __future__ import annotations

import math

import torch

from lora_lab.linalg.factored import ROUNDOFF
from lora_lab.probes import Moment, Values, gradient_trace, norm, wide


@gradient_trace(at="spectra")
def tangent_capture(moment: Moment) -> Values:
    """Per layer ‖P_B G + G P_A − P_B G P_A‖_F²/‖G‖_F² before step t; no rows without factors.

    P_B projects on the columns of B, P_A on the rows of A, and the numerator is the part of G in
    the tangent space of the matrices of rank r at BA: all that moves of the factors can change
    to first order. In [0, 1]; NaN where G = 0. At B = 0 it is ‖G P_A‖²/‖G‖², with mean r/in for
    an A drawn without regard to G; for a random G the mean is `tangent_null`. Unchanged by the
    scale, by B → BR, A → R⁻¹A and by the size of G.

    References
    ----------
    Tangent space: Koch & Lubich 2007, "Dynamical low-rank approximation", SIAM J. Matrix Anal.
    Appl. 29, equation (2.5).
    """
    return {
        layer: capture(G, *moment.adapted[layer].factors)
        for layer, G in moment.gradients.items()
        if moment.adapted[layer].factors is not None
    }


def tangent_null(m: int, n: int, r: int) -> float:
    """Mean of tangent_capture for a random G (m, n) and factors of full rank r.

    ``r (m + n - r) / (m n)``: the dimension of the manifold of rank-r matrices over that of all.
    At B = 0, where only G P_A is left, the mean is ``r / n``.

    >>> tangent_null(4, 4, 1), tangent_null(4, 6, 4)
    (0.4375, 1.0)
    """
    return r * (m + n - r) / (m * n)


def capture(G: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor | float:
    """The share for one layer: G (m, n), A (r, n), B (m, r); NaN where one is not finite.

    >>> G = torch.tensor([[4.0, 0.0], [0.0, 3.0]])
    >>> e = torch.eye(2)
    >>> round(float(capture(G, e[:1], 0 * e[:, :1])), 6)  # B = 0: the first column of G
    0.64
    >>> round(float(capture(G, e[:1], e[:, 1:])), 6)  # and its second row
    1.0
    """
    G = wide(G)
    total = norm(G)
    if not all(math.isfinite(float(size)) for size in (total, norm(A), norm(B))):
        return math.nan
    Q_B, Q_A = basis(B).to(G.dtype), basis(A.T).to(G.dtype)
    left, right = Q_B.T @ G, G @ Q_A
    # Divided before squaring: the squares of a small gradient would underflow.
    a, b, both = (norm(part) / total for part in (left, right, left @ Q_A))
    return a**2 + b**2 - both**2


def basis(factor: torch.Tensor) -> torch.Tensor:
    """Orthonormal basis (m, p) of the column space of a factor (m, r), float64; p its rank.

    Singular values up to σ₁·max(m, r)·u count as 0, u of the dtype that the factor was made in.
    """
    slack = max(factor.shape) * ROUNDOFF[str(factor.dtype).removeprefix("torch.")]
    Q, R = torch.linalg.qr(factor.detach().double())
    # ‖R‖‖R⁻¹‖ bounds the condition number from above and is much cheaper than the SVD.
    inverse = torch.linalg.solve_triangular(R, torch.eye(len(R)).to(R), upper=True)
    if float(norm(R) * norm(inverse)) * slack < 1:
        return Q
    U, S, _ = torch.linalg.svd(R)
    return Q @ U[:, S[0] * slack < S]
