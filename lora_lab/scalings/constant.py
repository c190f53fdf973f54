"""s = α, whatever r is."""

from __future__ import annotations

from lora_lab.scalings import define


@define()
def constant(alpha: float, r: int) -> float:
    """α.

    >>> constant.scale(16, 4)
    16.0
    """
    return float(alpha)
