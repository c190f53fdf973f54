"""Starts of an adapter that take a part out of the base weight, made again from the base weight.

PEFT stores the trained factors alone. With a start B0, A0 the model began as
W0 = (W0 - scale B0 A0) + scale B0 A0, so that dW = scale (B A - B0 A0).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from lora_lab.linalg.factored import ROUNDOFF, Array

Start: TypeAlias = Callable[[Array, int, float], tuple[Array, Array]]

ACCURACY = 1e-9
"""Sine of the largest angle between `_leading`'s subspace and the exact one."""


def pissa(W0: Array, r: int, scale: float) -> tuple[Array, Array]:
    """PiSSA's start: ``scale * B0 @ A0`` is the best approximation of W0 with rank r.

    Parameters
    ----------
    W0 : ndarray (m, n)
        The base weight before the start changed it.
    r : int
        In [1, min(m, n)].
    scale : float

    Returns
    -------
    B0 (m, r), A0 (r, n)
        Any factors with this product: dW depends on nothing else. It is determined if the r-th
        singular value exceeds the next; PEFT made it in float32, to about 6e-8 times the first
        over their difference. Memory: a Krylov basis of k (m + n) numbers, with k some multiple
        of r for a weight whose spectrum decays and min(m, n) at worst.

    References
    ----------
    Meng, Wang, Zhang 2024, "PiSSA: Principal Singular Values and Singular Vectors Adaptation".

    Examples
    --------
    >>> B0, A0 = pissa(np.diag([3.0, 2.0, 1.0]), r=1, scale=2.0)
    >>> np.abs(2.0 * B0 @ A0).round(12).tolist()
    [[3.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    """
    if W0.shape[0] <= W0.shape[1]:
        U = _leading(W0, r)
        return U, U.T @ W0 / scale
    V = _leading(W0.T, r)
    return W0 @ V / scale, V.T


def olora(W0: Array, r: int, scale: float) -> tuple[Array, Array]:
    """OLoRA's start: ``B0 @ A0`` are the first r terms of W0 = Q R, subtracted with `scale`.

    Parameters
    ----------
    W0, r, scale
        As in `pissa`; the scale does not enter the factors.

    Returns
    -------
    B0 (m, r), A0 (r, n)
        The projection of W0 on the span of its first r columns, which must be independent.

    References
    ----------
    Büyükakyüz 2024, "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models".

    Examples
    --------
    >>> B0, A0 = olora(np.array([[3.0, 1.0], [0.0, 1.0]]), r=1, scale=2.0)
    >>> np.abs(B0 @ A0).round(12).tolist()
    [[3.0, 1.0], [0.0, 0.0]]
    """
    del scale
    Q, _ = np.linalg.qr(W0[:, :r])
    return Q, Q.T @ W0


STARTS: dict[str, Start] = {"pissa": pissa, "olora": olora}
"""By PEFT's `init_lora_weights`; only what W0 alone determines can be made again."""


def _leading(W: Array, r: int) -> Array:
    """Orthonormal basis (q, r) of the leading r left singular vectors of a wide W (q, n).

    Block Krylov with full reorthogonalisation. It ends when the residual over the gap to the next
    Ritz value bounds the angle (Davis and Kahan), or is as small as rounding allows, or with the
    whole space. Convergence is looked at whenever the basis has grown by a quarter.
    """
    q, block = W.shape[0], r + 8
    Q = np.linalg.qr(np.random.default_rng(0).standard_normal((q, min(q, block))))[0]
    Z = W.T @ Q
    looked = 0
    while True:
        k = Q.shape[1]
        if k >= 1.25 * looked or k == q:
            looked = k
            squares, Y = np.linalg.eigh(Z.T @ Z)
            U = Q @ Y[:, -r:]
            if k == q:
                return U
            residual = np.linalg.norm(W @ (Z @ Y[:, -r:]) - U * squares[-r:])
            rounding = q * ROUNDOFF["float64"] * squares[-1]
            if residual <= max(ACCURACY * (squares[-r] - squares[-r - 1]), rounding):
                return U
        new = W @ Z[:, -block:]
        for _ in range(2):
            new -= Q @ (Q.T @ new)
            new = np.linalg.qr(new)[0]
        new = new[:, : q - k]
        Q, Z = np.hstack([Q, new]), np.hstack([Z, W.T @ new])
