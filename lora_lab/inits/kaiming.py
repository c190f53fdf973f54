"""A uniform by fan-in, B zero: the start of the reference implementation and of PEFT."""

from __future__ import annotations

import torch

from lora_lab.inits import define


@define()
def kaiming(
    out: int, inner: int, r: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """A ~ U(±1/√in) (Kaiming uniform with a = √5; variance 1/(3·in)), B = 0, so dW = 0.

    Returns
    -------
    A : Tensor, (r, in), float32
    B : Tensor, (out, r), float32

    References
    ----------
    Hu et al. 2021, reference code.
    """
    A = torch.empty(r, inner).uniform_(-(inner**-0.5), inner**-0.5, generator=generator)
    return A, torch.zeros(out, r)
