"""The first gradient's singular directions: a first step like full fine-tuning's (LoRA-GA)."""

from __future__ import annotations

import torch

from lora_lab.inits import define, svd

GAMMA = 16.0
"""γ of the reference implementation."""


@define(needs=("gradient",), start="subtracted")
def lora_ga(
    out: int, inner: int, r: int, generator: torch.Generator, gradient: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A = c·Vh[:r] and B = c·U[:, r:2r] of the gradient G = U·Σ·Vh at W0, c = out^¼/√γ, γ = 16.

    A first step of plain gradient descent moves dW by −η·s²(B·Bᵀ·G + G·Aᵀ·A), which is
    −η·s²·c²·G₂ᵣ, a multiple of the best approximation of rank 2r of the full gradient's step. Where
    2r > q there are no 2r directions: B takes the last r of the q, and those in the middle count
    twice. s·B·A is taken from the frozen weight: the network starts at the base, and dW is of a
    rank up to 2r. Nothing is random but the gradient's choice of examples, the first of the
    training split. PEFT's "lora_ga" differs in size: its B is c·U·Σ, and its A Vh alone.

    Returns
    -------
    A : Tensor, (r, in), float64
    B : Tensor, (out, r), float64

    References
    ----------
    Wang et al. 2024, https://arxiv.org/abs/2407.05000, theorems 3.1 and 3.2, and their code.
    """
    U, S, Vh = svd(gradient)
    c = out**0.25 / GAMMA**0.5
    first = min(r, len(S) - r)
    return c * Vh[:r], c * U[:, first : first + r]
