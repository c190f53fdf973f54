"""Entropy of a factored update's spectrum as a share of the largest that r allows."""

from __future__ import annotations

import math

from lora_lab.linalg import Spectrum
from lora_lab.measures import define, entropy_rank


@define(kind="ratio", needs=("values", "r"))
def normalized_entropy_r(s: Spectrum) -> float:
    """ln(effective_rank) / ln(min(r, q)), for a factored update of configured rank r.

    In [0, 1]; 1 for r equal singular values and where r = 1 or q = 1; NaN at dW = 0. Unchanged
    by scaling, transposition and rotation of dW. A random product B A stays below 1: compare
    with its null, not with 1.

    References
    ----------
    As normalized_entropy, with the number of directions that the factors can have.

    Examples
    --------
    >>> round(normalized_entropy_r(Spectrum.of_values([4.0, 3.0], shape=(5, 7), r=2)), 6)
    0.985228
    """
    assert s.r is not None
    if s.zero:
        return math.nan
    largest = min(s.r, s.q)
    return 1.0 if largest == 1 else math.log(entropy_rank(s.relative)) / math.log(largest)
