"""What of the update is lost when it is merged into a weight of lower precision."""

from __future__ import annotations

import math

import numpy as np

from lora_lab.linalg import Factored, Spectrum, Update
from lora_lab.linalg.factored import Array, frobenius
from lora_lab.linalg.remember import remembered
from lora_lab.linalg.rounding import BLOCK, FORMATS, rounded
from lora_lab.measures import Refused, define
from lora_lab.registry import WrongInput, unknown

KINDS = ("", "_lost", "_lost_energy")
SIDES = tuple(dtype + kind for dtype in ("bfloat16", "float16", "float32") for kind in KINDS)


@define(kind="ratio", needs=("values", "W0", "update"), sides=SIDES, at="later")
def merge_precision(s: Spectrum, W0: Array, update: Update, side: str = "bfloat16") -> float:
    """Error of storing W0 + dW in bfloat16, float16 or float32, against the update.

    - `bfloat16` …: ||round(W0 + dW) - (W0 + dW)||_F / ||dW||_F. At least 0, no upper limit: above
      1 the storage changes the weight more than training did.
    - `bfloat16_lost` …: share of the entries with dW != 0 where round(W0 + dW) = round(W0), that
      is, where dW is as a rule below half an ulp of W0. In [0, 1].
    - `bfloat16_lost_energy` …: share of ||dW||_F^2 in those entries. In [0, 1].

    NaN at dW = 0. A measure of entries and of real numbers in fixed formats: unchanged by
    transposition and by powers of two (away from over- and underflow), not by rotation; it falls as
    dW grows against W0.

    Parameters
    ----------
    s : Spectrum
        Of dW (m, n).
    W0 : ndarray, (m, n)
        The base weight. The error includes its own rounding where the format does not hold it.
    update : Factored or Dense
        dW itself.
    side : str
        The format, alone or with `_lost` or `_lost_energy`.

    Raises
    ------
    WrongInput
        If shapes differ or the side is unknown.
    Refused
        If an entry of W0 + dW overflows the format.

    References
    ----------
    IEEE 754-2019, section 4.3.1; Higham 2002, Accuracy and Stability of Numerical Algorithms, 2.1.

    Examples
    --------
    Around 1 the spacing of bfloat16 is 2**-8 below and 2**-7 above: half of 2**-7 is lost, 1.5
    times it is rounded up by as much.

    >>> from lora_lab.linalg import Dense, decompose
    >>> update = Dense([[2.0**-8, 0.0], [0.0, 3 * 2.0**-8]])
    >>> s, W0 = decompose(update), np.ones((2, 2))
    >>> [round(merge_precision(s, W0, update, f"bfloat16{kind}"), 9) for kind in KINDS]
    [0.447213595, 0.5, 0.1]
    """
    if side not in SIDES:
        raise unknown("side", side, SIDES)
    W0 = np.asarray(W0, dtype=np.float64)
    if W0.shape != s.shape or update.shape != s.shape:
        raise WrongInput(f"W0 must have the update's shape {s.shape}; got {W0.shape}.")
    if s.zero:
        return math.nan
    value = _losses(s, W0, update)[side]
    if math.isinf(value):
        raise Refused(f"W0 + dW has entries too large for {side}")
    return value


@remembered
def _losses(s: Spectrum, W0: Array, update: Update) -> dict[str, float]:
    """The value of every side, in blocks of rows that stay in the processor's cache."""
    m, n = s.shape
    rows = max(1, BLOCK // n)
    parts = [_of_block(W0[i : i + rows], _rows(update, i, i + rows)) for i in range(0, m, rows)]
    entries, size = sum(p["entries"] for p in parts), math.hypot(*(p["size"] for p in parts))
    out = {}
    for dtype in FORMATS:
        out[dtype] = math.hypot(*(p[dtype] for p in parts)) / size
        out[f"{dtype}_lost"] = sum(p[f"{dtype}_lost"] for p in parts) / entries
        out[f"{dtype}_lost_energy"] = (
            math.hypot(*(p[f"{dtype}_lost_energy"] for p in parts)) / size
        ) ** 2
    return out


def _rows(update: Update, start: int, stop: int) -> Array:
    if isinstance(update, Factored):
        return update.scale * (update.B[start:stop] @ update.A)
    return update.dW[start:stop]


def _of_block(W0: Array, dW: Array) -> dict[str, float]:
    """Frobenius norms (of errors, of lost entries) and counts of some rows."""
    changed = dW != 0
    out = {"entries": float(np.count_nonzero(changed)), "size": frobenius(dW)}
    for dtype in FORMATS:
        stored = rounded(W0 + dW, dtype)
        lost = changed & (stored == rounded(W0, dtype))
        # Not against the float64 sum, which has itself lost the smallest dW.
        finite = np.isfinite(stored).all()
        out[dtype] = frobenius((stored - W0) - dW) if finite else math.inf
        out[f"{dtype}_lost"] = float(np.count_nonzero(lost))
        out[f"{dtype}_lost_energy"] = frobenius(np.where(lost, dW, 0.0))
    return out
