"""What of the update is lost when it is merged into a quantised weight."""

from __future__ import annotations

import math

import numpy as np

from lora_lab.linalg import Spectrum, Update
from lora_lab.linalg.factored import Array, frobenius
from lora_lab.linalg.quantize import LEVELS, quantize
from lora_lab.measures import Refused, define
from lora_lab.registry import WrongInput, unknown

SIDES = tuple(LEVELS)


@define(kind="ratio", needs=("values", "W0", "update"), sides=SIDES, at="later")
def requantization_error(s: Spectrum, W0: Array, update: Update, side: str = "int8") -> float:
    """Error of storing W0 + dW in int8, int4 or nf4, against the update.

    ||Q(W0 + dW) - (W0 + dW)||_F / ||dW||_F, Q as in `linalg.quantize`. At least 0, no upper limit.
    1 where W0 is what Q has given back and dW nowhere reaches half a step: the merged weight is the
    base again, and merging undoes training. NaN at dW = 0. A measure of entries in storage order:
    unchanged by powers of two (away from over- and underflow), not by transposition or rotation.

    Parameters
    ----------
    s : Spectrum
        Of dW (m, n).
    W0 : ndarray, (m, n)
        The base weight. The error includes its own where it is not quantised.
    update : Factored or Dense
        dW itself.
    side : str
        The storage.

    Raises
    ------
    WrongInput
        If shapes differ or the side is unknown.
    Refused
        If an entry of W0 + dW overflows float32.

    References
    ----------
    Dettmers et al. 2023, https://arxiv.org/abs/2305.14314.

    Examples
    --------
    In int8 the step of these rows is 1: the quarter is lost, and 0.75 is stored as 1.

    >>> from lora_lab.linalg import Dense, decompose
    >>> update = Dense([[0.0, 0.25], [0.0, 0.75]])
    >>> W0 = np.array([[127.0, 10.0], [127.0, 20.0]])
    >>> round(requantization_error(decompose(update), W0, update), 6)
    0.447214
    """
    if side not in SIDES:
        raise unknown("side", side, SIDES)
    W0 = np.asarray(W0, dtype=np.float64)
    if W0.shape != s.shape or update.shape != s.shape:
        raise WrongInput(f"W0 must have the update's shape {s.shape}; got {W0.shape}.")
    if s.zero:
        return math.nan
    dW = update.dense()
    if np.abs(W0 + dW).max() > np.finfo(np.float32).max:
        raise Refused("W0 + dW has entries too large for float32")
    # Not against the float64 sum, which has itself lost the smallest dW.
    return frobenius((quantize(W0 + dW, side) - W0) - dW) / frobenius(dW)
