"""The minor components of W0 train, the principal ones are frozen (MiLoRA)."""

from __future__ import annotations

import torch

from lora_lab.inits import balanced, define, svd


@define(needs=("W0", "scale"), start="subtracted")
def minor(
    out: int,
    inner: int,
    r: int,
    generator: torch.Generator,
    W0: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """s·B·A = the r smallest of the q singular directions of W0; taken from the frozen weight.

    With W0 = U·Σ·Vh: A = √(Σ/s)·Vh[q−r:], B = U[:, q−r:]·√(Σ/s). Nothing is random. The network
    starts at the base, dW = s(B·A − B₀·A₀) at 0, of a rank up to 2r afterwards. A direction
    with σ = 0 gives a pair of zeros, which stays at 0.

    Returns
    -------
    A : Tensor, (r, in), float64
    B : Tensor, (out, r), float64

    References
    ----------
    Wang et al. 2024, https://arxiv.org/abs/2406.09044.
    """
    U, S, Vh = svd(W0)
    return balanced(U[:, -r:], S[-r:] / scale, Vh[-r:])
