"""A with orthonormal rows, B zero."""

from __future__ import annotations

import torch

from lora_lab.inits import define


@define()
def orthogonal(
    out: int, inner: int, r: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """A = r rows of a uniformly random orthonormal frame (AAᵀ = I), B = 0, so dW = 0.

    Entries of A have variance 1/in, and no direction of A is longer than another. It is not PEFT's
    "orthogonal", whose A and B are both random and not 0, within orthogonal halves of the
    r-dimensional space between them, so that B·A = 0 (r must be even there).

    Returns
    -------
    A : Tensor, (r, in), float64
    B : Tensor, (out, r), float64

    References
    ----------
    Saxe et al. 2014, https://arxiv.org/abs/1312.6120. Uniform by the signs of R's diagonal:
    Mezzadri 2007, https://arxiv.org/abs/math-ph/0609050.
    """
    Q, R = torch.linalg.qr(torch.randn(inner, r, generator=generator, dtype=torch.float64))
    return (Q * R.diagonal().sign()).T.contiguous(), torch.zeros(out, r, dtype=torch.float64)
