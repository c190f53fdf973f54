"""Share of the configured rank that the spectrum uses, by entropy."""

from __future__ import annotations

import math

from lora_lab.linalg import Spectrum
from lora_lab.measures import define, entropy_rank


@define(kind="ratio", needs=("values", "r"))
def utilization(s: Spectrum) -> float:
    """effective_rank / r, for a factored update of configured rank r.

    In (0, 1]; NaN at dW = 0. Unchanged by scaling, transposition and rotation of dW. Compare
    with a random product B A of the same shape, not with 1: at 768 x 768 that has .98 (r = 64),
    .91 (256), .67 (768), so part of "utilization falls with r" is geometry.

    References
    ----------
    effective_rank of Roy & Vetterli 2007 over the r of Hu et al. 2021.

    Examples
    --------
    >>> round(utilization(Spectrum.of_values([4.0, 3.0], shape=(5, 7), r=4)), 6)
    0.494907
    """
    assert s.r is not None
    return math.nan if s.zero else entropy_rank(s.relative) / s.r
