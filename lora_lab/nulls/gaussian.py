"""A matrix of independent Gaussian entries: an update that is noise alone."""

from __future__ import annotations

import numpy as np

from lora_lab.linalg import Spectrum
from lora_lab.linalg.factored import Array
from lora_lab.linalg.lapack import bidiagonal_values
from lora_lab.nulls import define


@define()
def gaussian(s: Spectrum, rng: np.random.Generator) -> Array:
    """Singular values of a Gaussian matrix of the update's shape, q of them, in units of its sd.

    Drawn in O(q^2) without the matrix: Golub-Kahan bidiagonalisation of a Gaussian matrix gives
    independent chi variables (max, max-1, ... on the diagonal, q-1, q-2, ... beside it).

    References
    ----------
    Dumitriu & Edelman 2002, Matrix models for beta ensembles.

    Examples
    --------
    >>> one = Spectrum.of_values([1.0], shape=(400, 100))
    >>> values = gaussian(one, np.random.default_rng(0))
    >>> len(values), bool(abs(values.max() / 30 - 1) < 0.05)  # sqrt(400) + sqrt(100)
    (100, True)
    """
    q, long = min(s.shape), max(s.shape)
    diagonal = np.sqrt(rng.chisquare(long - np.arange(q)))
    beside = np.sqrt(rng.chisquare(q - 1 - np.arange(q - 1)))
    return bidiagonal_values(diagonal, beside)
