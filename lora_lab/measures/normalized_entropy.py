"""Entropy of the spectrum as a share of the largest that the shape allows."""

from __future__ import annotations

import math

from lora_lab.linalg import Spectrum
from lora_lab.measures import define, entropy_rank


@define(kind="ratio")
def normalized_entropy(s: Spectrum) -> float:
    """ln(effective_rank) / ln(q), q = min(m, n).

    In [0, 1]; 1 for a flat spectrum and for q = 1; NaN at dW = 0. Unchanged by scaling,
    transposition and rotation of dW. See normalized_entropy_r for the share of ln r.

    References
    ----------
    Roy & Vetterli 2007 (the entropy); Alter, Brown & Botstein 2000, PNAS 97 (normalised).

    Examples
    --------
    >>> round(normalized_entropy(Spectrum.of_values([4.0, 3.0])), 6)
    0.985228
    >>> normalized_entropy(Spectrum.of_values([2.0], shape=(1, 9)))
    1.0
    """
    if s.zero:
        return math.nan
    if s.q == 1:
        return 1.0
    return math.log(entropy_rank(s.relative)) / math.log(s.q)
