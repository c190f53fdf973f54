"""Weights as 8-bit and 4-bit storage would give them back, simulated on float32 arrays."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lora_lab.registry import WrongInput, unknown

BLOCK = 64
"""Numbers that share a scale in 4-bit storage: so many after another, row after row."""


def normal_levels() -> NDArray[np.float32]:
    """The 16 levels of NormalFloat4 in [-1, 1]: quantiles of N(0, 1), divided by the largest.

    Probabilities run evenly from δ to 1/2 in 8 steps below 0 and in 9 above, δ = (1/32 + 1/30)/2,
    and meet in one exact 0: 7 levels below it, 8 above.

    References
    ----------
    Dettmers et al. 2023, https://arxiv.org/abs/2305.14314, section 3 and appendix E.

    Examples
    --------
    >>> normal_levels()[[0, 1, 7, 8, 15]].round(6).tolist()
    [-1.0, -0.6961929798126221, 0.0, 0.07958000153303146, 1.0]
    """
    delta = (1 / 32 + 1 / 30) / 2
    quantile = NormalDist().inv_cdf
    below = [quantile(p) for p in np.linspace(delta, 0.5, 8)[:-1]]
    above = [-quantile(p) for p in np.linspace(delta, 0.5, 9)[:-1]]
    levels = np.array([*below, 0.0, *reversed(above)])
    return (levels / levels.max()).astype(np.float32)


LEVELS: dict[str, NDArray[np.float32]] = {
    "int8": (np.arange(-127, 128) / 127).astype(np.float32),
    "int4": (np.arange(-7, 8) / 7).astype(np.float32),
    "nf4": normal_levels(),
}
"""What each kind can store, as multiples of the largest size among the numbers that share a scale:
those of a row in int8, of a `BLOCK` in the others."""


def quantize(W: ArrayLike, kind: str) -> NDArray[np.float32]:
    """A weight after quantisation and dequantisation, each number at the nearest level.

    Scales (the largest size in a row or block) are kept in float32; there is no second quantisation
    of scales. Q(Q(W)) = Q(W); a power of two passes through, and so does a sign except in nf4.
    The error of a number is at most half the widest gap between levels times its scale: 1/254 in
    int8, 1/14 in int4, 0.152 in nf4.

    Parameters
    ----------
    W : array_like, (out, in)
        Any float dtype; read as float32.
    kind : str
        - `int8`: 255 levels -127 … 127 of 1/127, one scale a row (an output).
        - `int4`: 15 levels -7 … 7 of 1/7, a scale for each 64 numbers in storage order.
        - `nf4`: the 16 levels of `normal_levels`, the same blocks.

    Returns
    -------
    ndarray (out, in), float32
        0 for a zero weight.

    Raises
    ------
    WrongInput
        Unknown kind, no matrix, or NaN or Inf (also: a number too large for float32).

    References
    ----------
    int8: Dettmers et al. 2022, https://arxiv.org/abs/2208.07339 (without its outlier columns);
    4 bits: Dettmers et al. 2023, https://arxiv.org/abs/2305.14314.

    Examples
    --------
    >>> quantize([[127.0, 1.4, -0.6], [0.0, 0.0, 0.0]], "int8").tolist()
    [[127.0, 1.0, -1.0], [0.0, 0.0, 0.0]]
    """
    if kind not in LEVELS:
        raise unknown("quantization", kind, LEVELS)
    with np.errstate(over="ignore"):
        W = np.asarray(W, dtype=np.float32)
    if W.ndim != 2 or not np.isfinite(W).all():
        what = f"shape {W.shape}" if W.ndim != 2 else "NaN or Inf"
        raise WrongInput(f"a weight to be quantised must be a finite float32 matrix; got {what}.")
    groups = W if kind == "int8" else _blocks(W)
    scale = np.abs(groups).max(axis=1, keepdims=True)
    levels = LEVELS[kind]
    between = (levels[1:].astype(np.float64) + levels[:-1]) / 2
    nearest = np.searchsorted(between, groups / np.where(scale == 0, 1, scale).astype(np.float64))
    out: NDArray[np.float32] = (levels[nearest] * scale).reshape(-1)[: W.size].reshape(W.shape)
    return out


def _blocks(W: NDArray[np.float32]) -> NDArray[np.float32]:
    """The numbers in storage order, 64 a row; the last row is filled with zeros."""
    flat = W.reshape(-1)
    return np.pad(flat, (0, -len(flat) % BLOCK)).reshape(-1, BLOCK)


def bits_per_weight(kind: str, shape: tuple[int, int]) -> float:
    """Storage of one number, its share of the float32 scales included.

    Parameters
    ----------
    kind : str
        As for `quantize`.
    shape : (int, int)
        (out, in).

    Returns
    -------
    float
        8 + 32/in, or 4 + 32·⌈out·in/64⌉/(out·in): 4.5 for whole blocks.

    Raises
    ------
    WrongInput
        Unknown kind.

    Examples
    --------
    >>> bits_per_weight("int8", (384, 64)), bits_per_weight("nf4", (384, 64))
    (8.5, 4.5)
    """
    if kind not in LEVELS:
        raise unknown("quantization", kind, LEVELS)
    out, inner = shape
    if kind == "int8":
        return 8 + 32 / inner
    return 4 + 32 * -(-out * inner // BLOCK) / (out * inner)
