"""The angle between two updates of one layer, as vectors of all their entries."""

from __future__ import annotations

import math

import numpy as np

from lora_lab.linalg import Dense, Factored, Spectrum, Update
from lora_lab.linalg.factored import frobenius
from lora_lab.measures import Level, define
from lora_lab.registry import WrongInput

Z = 1.959963984540054
"""A normal variable lies within this many standard deviations of its mean in 95 % of cases."""


def unit(update: Update) -> Update:
    """An update divided by its Frobenius norm, whatever its size; a zero one as it is.

    >>> unit(Factored([[3e-100]], [[1e-100]])).dense().round(12).tolist()
    [[1.0]]
    """
    if isinstance(update, Dense):
        size = float(np.abs(update.dW).max())
        # Divided first: an entry's square may not be a number.
        scaled = update.dW / size if size else update.dW
        return Dense(scaled / (frobenius(scaled) or 1.0), update.made_in)
    Q_B, Q_A, core, size = update.core()
    return Factored(Q_B @ (core / (frobenius(core) if size else 1.0)), Q_A.T)


def level(s: Spectrum, update: Update, pair_update: Update) -> Level:
    """Cosine of updates of which one is rotated at random: 0 -+ 1.96 / sqrt(m n).

    Mean and standard deviation are exact for any two updates (random rotations of both sides).
    95 % lie within where an update has many directions; 93 % of rank one against rank one.
    """
    if s.zero or not pair_update.norm():
        return math.nan, math.nan, math.nan
    spread = min(Z / math.sqrt(math.prod(s.shape)), 1.0)
    return 0.0, -spread, spread


@define(kind="ratio", needs=("values", "update", "pair_update"), null=level, at="later")
def cosine(s: Spectrum, update: Update, pair_update: Update) -> float:
    """<dW, dW'> / (||dW|| ||dW'||), the Frobenius inner product of two updates over their norms.

    In [-1, 1]: 1 for positive multiples, -1 where they cancel, 0 where they do not interfere. NaN
    at dW = 0, of either. Factors are never multiplied out: O((m + n) r^2). Symmetric; unchanged by
    the sizes of the updates, and by transposition and rotation of both together.

    Parameters
    ----------
    s : Spectrum
        Of `update`.
    update, pair_update : Factored or Dense
        Two updates of one layer.

    Raises
    ------
    WrongInput
        If the shapes differ.

    References
    ----------
    Ilharco et al. 2023, Editing models with task arithmetic (cosines between updates).

    Examples
    --------
    >>> one, other = Factored([[1.0], [0.0]], [[3.0, 4.0]]), Dense([[1.0, 0.0], [0.0, 1.0]])
    >>> s = Spectrum.of_values([5.0], shape=(2, 2))
    >>> round(cosine(s, one, other), 6)
    0.424264
    """
    if pair_update.shape != s.shape:
        raise WrongInput(
            f"the pair must have the update's shape {s.shape}; got {pair_update.shape}."
        )
    if s.zero or not pair_update.norm():
        return math.nan
    return min(max(_inner(unit(update), unit(pair_update)), -1.0), 1.0)


def _inner(one: Update, other: Update) -> float:
    if isinstance(one, Factored):
        return one.inner(other)
    if isinstance(other, Factored):
        return other.inner(one)
    return float(np.vdot(one.dW, other.dW))
