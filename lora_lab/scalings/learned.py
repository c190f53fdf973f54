"""s is a parameter of every layer that starts at α/r ("LoRA++")."""

from __future__ import annotations

from lora_lab.scalings import define


@define(trains=True)
def learned(alpha: float, r: int) -> float:
    """α/r at the start.

    >>> learned.scale(16, 4), learned.trains
    (4.0, True)
    """
    return alpha / r
