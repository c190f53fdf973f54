"""The family of energy ranks, by order."""

from __future__ import annotations

import math

import numpy as np

from lora_lab.linalg import Spectrum
from lora_lab.measures import define, entropy_rank
from lora_lab.registry import WrongInput


@define(grid=(0.5, 1.0, 2.0, 4.0))
def renyi_rank(s: Spectrum, k: float = 2.0) -> float:
    """(sum p^a)^(1 / (1 - a)), p = sigma^2 / sum(sigma^2), of order a = `k` > 0.

    In [1, number of nonzero sigma], non-increasing in a: a = 1 is energy_effective_rank, 2 is
    participation_ratio, a to infinity stable_rank; 0 at dW = 0. Unchanged by scaling,
    transposition and rotation of dW.

    Raises
    ------
    WrongInput
        If a is not above 0.

    References
    ----------
    Renyi 1961; Hill 1973, "Diversity and evenness", Ecology 54 (Hill numbers).

    Examples
    --------
    >>> s = Spectrum.of_values([4.0, 3.0])
    >>> [round(renyi_rank(s, a), 6) for a in (0.5, 1.0, 2.0, float("inf"))]
    [1.96, 1.9221, 1.854599, 1.5625]
    """
    if not k > 0:
        raise WrongInput(f"the order k of renyi_rank must be above 0; got {k}.")
    if s.zero:
        return 0.0
    energy = s.relative**2
    if k == 1:
        return entropy_rank(energy)
    total = float(np.sum(energy))
    if math.isinf(k):
        return total
    if abs(k - 1) < 0.5:
        # sum p^a = 1 + sum p (p^(a-1) - 1): the quotient of two vanishing numbers stays exact.
        p = energy[energy > 0] / total
        return math.exp(math.log1p(np.sum(p * np.expm1((k - 1) * np.log(p)))) / (1 - k))
    # In units of the largest p, so that p^a does not underflow for large a.
    return math.exp((math.log(np.sum(energy**k)) - k * math.log(total)) / (1 - k))
