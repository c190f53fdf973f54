"""A zero, B uniform by its own fan-in: the other of the two conventions that start at the base."""

from __future__ import annotations

import torch

from lora_lab.inits import define


@define()
def zero_a(
    out: int, inner: int, r: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """A = 0, B ~ U(±1/√r) (Kaiming uniform, a = √5, by its fan-in r; variance 1/(3r)), so dW = 0.

    At the first step ∇B = 0 and ∇A = s·BᵀG: the output directions are random and the input
    directions are learned first. With a frozen A nothing would ever train.

    Returns
    -------
    A : Tensor, (r, in), float32
    B : Tensor, (out, r), float32

    References
    ----------
    Hayou et al. 2024, https://arxiv.org/abs/2406.08447, "Init[B]".
    """
    B = torch.empty(out, r).uniform_(-(r**-0.5), r**-0.5, generator=generator)
    return torch.zeros(r, inner), B
