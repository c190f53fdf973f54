"""s = α/r, the rule of the paper (Hu et al. 2021, https://arxiv.org/abs/2106.09685)."""

from __future__ import annotations

from lora_lab.scalings import define


@define()
def alpha_over_r(alpha: float, r: int) -> float:
    """α/r.

    >>> alpha_over_r.scale(16, 4)
    4.0
    """
    return alpha / r
