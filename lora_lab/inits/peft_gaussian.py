"""A normal with standard deviation 1/r, B zero: PEFT's `init_lora_weights="gaussian"`."""

from __future__ import annotations

import torch

from lora_lab.inits import define


@define()
def peft_gaussian(
    out: int, inner: int, r: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """A ~ N(0, 1/r²) (standard deviation 1/r), B = 0, so dW = 0.

    E‖Ax‖² = ‖x‖²/r falls with r, where `normal` (variance 1/r) keeps it and `kaiming` (variance
    1/(3·in)) lets it grow.

    Returns
    -------
    A : Tensor, (r, in), float32
    B : Tensor, (out, r), float32

    References
    ----------
    PEFT's documentation of `LoraConfig.init_lora_weights`; the standard deviation is in its code.
    """
    return torch.randn(r, inner, generator=generator) / r, torch.zeros(out, r)
