"""A product of two Gaussian factors: what a low-rank update looks like before it learns."""

from __future__ import annotations

import numpy as np
from scipy.linalg import svdvals

from lora_lab.linalg import Spectrum
from lora_lab.linalg.factored import Array
from lora_lab.linalg.subspace import random_triangle
from lora_lab.nulls import define


@define(needs=("r",))
def random_ba(s: Spectrum, rng: np.random.Generator) -> Array:
    """Singular values of B A, Gaussian B (m, r) and A (r, n): r of them, r at most q.

    Drawn in O(r^3) whatever the shape: only the triangular QR factors of B and of A transposed
    matter, and those of a Gaussian matrix are chi on the diagonal and Gaussian above it.

    References
    ----------
    Bartlett 1933 (QR of a Gaussian matrix).

    Examples
    --------
    >>> one = Spectrum.of_values([1.0], shape=(768, 768), r=16)
    >>> rng = np.random.default_rng(0)
    >>> ranks = [(v := random_ba(one, rng)) @ v / v.max() ** 2 / 16 for _ in range(200)]
    >>> round(float(np.mean(ranks)), 2)
    0.71
    """
    assert s.r is not None
    R_B, R_A = (random_triangle(size, s.r, rng) for size in s.shape)
    return np.asarray(svdvals(R_B @ R_A.T))
