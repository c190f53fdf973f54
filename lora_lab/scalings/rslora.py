"""s = α/√r, rsLoRA (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732)."""

from __future__ import annotations

import math

from lora_lab.scalings import define


@define()
def rslora(alpha: float, r: int) -> float:
    """α/√r.

    >>> rslora.scale(16, 4)
    8.0
    """
    return alpha / math.sqrt(r)
