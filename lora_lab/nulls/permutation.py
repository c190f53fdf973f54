"""The update with its entries shuffled: what their distribution gives without their places."""

from __future__ import annotations

import numpy as np

from lora_lab.linalg import Dense, Spectrum, decompose
from lora_lab.linalg.factored import Array, Update
from lora_lab.nulls import define, matrix


@define(needs=("update",))
def permutation(s: Spectrum, rng: np.random.Generator, update: Update) -> Array:
    """Singular values of dW with all entries in random places.

    Keeps the entries themselves, signs and mean included, and no row or column: a mean that is
    not 0 stays as one direction.

    Raises
    ------
    Refused
        If the update has too many entries (see `matrix`).

    References
    ----------
    Buja & Eyuboglu 1992, Remarks on parallel analysis.

    Examples
    --------
    >>> spiked = Dense(np.outer(np.arange(60) - 29.5, np.arange(40) - 19.5))
    >>> values = permutation(decompose(spiked), np.random.default_rng(0), spiked)
    >>> round(spiked.norm() / float(np.linalg.norm(values)), 12), bool(values[0] < values[1] * 1.1)
    (1.0, True)
    """
    return decompose(Dense(rng.permuted(matrix(update), axis=None), s.made_in)).values
