"""The principal components of the layer's inputs, B zero (EVA)."""

from __future__ import annotations

import torch

from lora_lab.inits import define, upright


@define(needs=("activations",))
def eva(
    out: int, inner: int, r: int, generator: torch.Generator, activations: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A = the r leading eigenvectors of E[x·xᵀ] as rows (AAᵀ = I), B = 0, so dW = 0.

    They are the right singular vectors of the inputs, not centred (PEFT's "eva" subtracts the
    mean): of all A of rank r they keep the most of the inputs' energy. Nothing is random. r stays
    as configured; the paper also shares a budget of directions out among layers.

    Returns
    -------
    A : Tensor, (r, in), float64
    B : Tensor, (out, r), float64

    References
    ----------
    Paischer et al. 2024, https://arxiv.org/abs/2410.07170.
    """
    _, vectors = torch.linalg.eigh(activations.double())
    A = vectors.flip(1)[:, :r].T.contiguous()
    return upright(A)[:, None] * A, torch.zeros(out, r, dtype=torch.float64)
