"""A and B both random and alike: the start is another network than the base."""

from __future__ import annotations

import torch

from lora_lab.inits import define


@define(start="moved")
def symmetric(
    out: int, inner: int, r: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B ~ N(0, σ²) with σ² = 1/√(out·in), so dW = s·B·A ≠ 0.

    E[(BA)ᵢⱼ²] = r·σ⁴ = r/(out·in), hence E‖BA‖_F² = r: r random directions of size about 1. Rows
    of A and columns of B then have a length near 1, as σ² = Θ(1/width) of the reference asks for;
    the perturbation E‖dW‖_F² = s²·r is a part of W0 that falls with the width. With σ² = 1/r
    (`normal`) for both it would be ‖BA‖_F² = out·in/r, and swamp any trained weight.

    Returns
    -------
    A : Tensor, (r, in), float32
    B : Tensor, (out, r), float32

    References
    ----------
    Li et al. 2025, "Beyond Zero Initialization", https://arxiv.org/abs/2505.23194, "Init[AB]".
    """
    sigma = (out * inner) ** -0.25
    A = torch.randn(r, inner, generator=generator) * sigma
    return A, torch.randn(out, r, generator=generator) * sigma
