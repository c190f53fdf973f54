"""A normal with variance 1/r, B zero: the convention of the paper's text."""

from __future__ import annotations

import torch

from lora_lab.inits import define


@define()
def normal(
    out: int, inner: int, r: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """A ~ N(0, 1/r) (standard deviation 1/√r), B = 0, so dW = 0.

    ‖Ax‖ does not depend on r. PEFT's "gaussian" is another one (standard deviation 1/r).

    Returns
    -------
    A : Tensor, (r, in), float32
    B : Tensor, (out, r), float32
    """
    return torch.randn(r, inner, generator=generator) * r**-0.5, torch.zeros(out, r)
