"""The principal components of W0 train, the rest of it is frozen (PiSSA)."""

from __future__ import annotations

import torch

from lora_lab.inits import balanced, define, svd


@define(needs=("W0", "scale"), start="subtracted")
def pissa(
    out: int,
    inner: int,
    r: int,
    generator: torch.Generator,
    W0: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """s·B·A = the r largest singular directions of W0; they are taken from the frozen weight.

    With W0 = U·Σ·Vh: A = √(Σ/s)·Vh[:r], B = U[:, :r]·√(Σ/s). Nothing is random. The network starts
    at the base, dW = s(B·A − B₀·A₀) at 0, of a rank up to 2r afterwards.

    Returns
    -------
    A : Tensor, (r, in), float64
    B : Tensor, (out, r), float64

    References
    ----------
    Meng et al. 2024, https://arxiv.org/abs/2404.02948.
    """
    U, S, Vh = svd(W0)
    return balanced(U[:, :r], S[:r] / scale, Vh[:r])
