"""Entries at which two updates of one layer pull into opposite directions."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from lora_lab.linalg import Dense, Spectrum, Update
from lora_lab.linalg.factored import Array
from lora_lab.linalg.remember import remembered
from lora_lab.measures import Level, define
from lora_lab.measures.cosine import Z
from lora_lab.registry import WrongInput, unknown

SIDES = ("entries", "weighted")
BLOCK = 2**18
"""Entries of an update that are looked at together, at most (and at least one row)."""


def level(s: Spectrum, update: Update, pair_update: Update, side: str) -> Level:
    """The share where the signs of one update's rows and columns are flipped at random.

    Mean 1/2; the standard deviation sqrt(sum w^2) / (2 sum w) over the entries is exact, and the
    interval is the normal one of it.
    """
    whole, squares, _ = _sums(s, update, pair_update)[side]
    if not whole:
        return math.nan, math.nan, math.nan
    spread = min(Z * math.sqrt(squares) / (2 * whole), 0.5)
    return 0.5, 0.5 - spread, 0.5 + spread


@define(
    kind="ratio", needs=("values", "update", "pair_update"), sides=SIDES, null=level, at="later"
)
def sign_conflict(s: Spectrum, update: Update, pair_update: Update, side: str = "entries") -> float:
    """Share of the entries at which two updates have opposite signs, of those both change.

    In [0, 1]; 1/2 for unrelated updates. `entries` counts each once; `weighted` by |dW dW'|, so
    that entries which hardly change count little: (1 - sum(dW dW') / sum|dW dW'|) / 2. NaN at
    dW = 0, of either, and where no entry is changed by both. Symmetric; unchanged by the sizes of
    the updates and by transposition, not by rotation: it is about single weights. Factors are
    multiplied out a few rows at a time.

    Parameters
    ----------
    s : Spectrum
        Of `update`.
    update, pair_update : Factored or Dense
        Two updates of one layer.
    side : str
        `entries` or `weighted`.

    Raises
    ------
    WrongInput
        If the shapes differ or the side is unknown.

    References
    ----------
    Yadav et al. 2023, TIES-merging: resolving interference when merging models.

    Examples
    --------
    >>> one, other = Dense([[3.0, 1.0], [0.0, 1.0]]), Dense([[1.0, -1.0], [5.0, 1.0]])
    >>> s = Spectrum.of_values([1.0], shape=(2, 2))
    >>> round(sign_conflict(s, one, other), 6), sign_conflict(s, one, other, "weighted")
    (0.333333, 0.2)
    """
    if side not in SIDES:
        raise unknown("side", side, SIDES)
    whole, _, opposite = _sums(s, update, pair_update)[side]
    return opposite / whole if whole else math.nan


@remembered
def _sums(
    s: Spectrum, update: Update, pair_update: Update
) -> dict[str, tuple[float, float, float]]:
    """Per side: sum of the weights, of their squares, and of those at opposite signs.

    One pass serves both sides and their nulls.
    """
    if update.shape != pair_update.shape:
        raise WrongInput(
            f"two updates must have one shape; got {update.shape} and {pair_update.shape}."
        )
    sums = {side: np.zeros(3) for side in SIDES}
    for one, other in zip(_rows(update), _rows(pair_update), strict=True):
        product = one * other
        against = product < 0
        changed, opposite = np.count_nonzero(product), np.count_nonzero(against)
        sums["entries"] += changed, changed, opposite
        flat = product.ravel()
        sums["weighted"] += np.abs(flat).sum(), flat @ flat, -flat[against.ravel()].sum()
    return {side: (float(a), float(b), float(c)) for side, (a, b, c) in sums.items()}


def _rows(update: Update) -> Iterator[Array]:
    """Blocks of rows, in a scale in which products of two entries are numbers."""
    m, n = update.shape
    step = max(BLOCK // n, 1)
    if isinstance(update, Dense):
        size = float(np.abs(update.dW).max()) or 1.0
        yield from (update.dW[i : i + step] / size for i in range(0, m, step))
        return
    b, a = (float(np.abs(F).max()) or 1.0 for F in (update.B, update.A))
    A = np.sign(update.scale) * update.A / a
    yield from ((update.B[i : i + step] / b) @ A for i in range(0, m, step))
