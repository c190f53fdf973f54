"""The update with random signs: what its entries give by their sizes alone."""

from __future__ import annotations

import numpy as np

from lora_lab.linalg import Dense, Spectrum, decompose
from lora_lab.linalg.factored import Array, Update
from lora_lab.nulls import define, matrix


@define(needs=("update",))
def sign_flip(s: Spectrum, rng: np.random.Generator, update: Update) -> Array:
    """Singular values of dW with every entry's sign drawn anew.

    Keeps the size of every entry, and so of every row and column; what is left of the spectrum is
    no alignment of entries. (The mean of such a matrix is 0 given the sizes: independent entries.)

    Raises
    ------
    Refused
        If the update has too many entries (see `matrix`).

    References
    ----------
    Hong, Sheng & Dobriban 2020, Selecting the number of components in PCA via random signflips.

    Examples
    --------
    >>> flat = Dense(np.ones((60, 40)))  # rank one: sigma_1 = sqrt(2400) = 49
    >>> values = sign_flip(decompose(flat), np.random.default_rng(0), flat)
    >>> bool(abs(values.max() / (60**0.5 + 40**0.5) - 1) < 0.05), len(values)
    (True, 40)
    """
    dW = matrix(update)
    flipped = np.copysign(dW, rng.integers(0, 2, dW.shape) - 0.5)
    return decompose(Dense(flipped, s.made_in)).values
