"""The truncated SVD of another run's update: start where that run ended, as far as r reaches."""

from __future__ import annotations

import torch

from lora_lab.inits import balanced, define, svd
from lora_lab.inits.kaiming import kaiming
from lora_lab.linalg import Update


@define(needs=("reference", "scale"), start="moved")
def reference(
    out: int,
    inner: int,
    r: int,
    generator: torch.Generator,
    reference: Update | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """s·B·A = the best approximation of rank r of the reference's dW; A and B balanced.

    With dW = U·Σ·Vh: A = √(Σ/s)·Vh[:r], B = U[:, :r]·√(Σ/s), so AAᵀ = BᵀB. Only the layer's update
    is taken over, not the head.

    Where the reference has no direction left (its rank is below r, or it left the layer as it
    was), the row of A is `kaiming`'s and the column of B is 0: a pair of zeros would never train.

    Parameters
    ----------
    reference : Factored, Dense or None
        dW of the other run; None for a layer that it did not change.
    scale : float
        s of this run.

    Returns
    -------
    A : Tensor, (r, in), float64
    B : Tensor, (out, r), float64

    References
    ----------
    Eckart & Young 1936 (the truncation is the best of its rank).
    """
    A, B = (factor.double() for factor in kaiming(out, inner, r, generator))
    if reference is None:
        return A, B
    U, S, Vh = svd(torch.from_numpy(reference.dense()))
    rounding = S.max() * max(out, inner) * torch.finfo(S.dtype).eps
    k = min(r, int(torch.count_nonzero(S.gt(rounding))))
    A[:k], B[:, :k] = balanced(U[:, :k], S[:k] / scale, Vh[:k])
    return A, B
