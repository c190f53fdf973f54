"""Storage in float32, float16 or bfloat16, simulated on float64 arrays."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from lora_lab.linalg.factored import Array
from lora_lab.registry import unknown

FORMATS = {"float32": (24, 127), "float16": (11, 15), "bfloat16": (8, 127)}
"""Bits of the significand (with the hidden one) and largest exponent of each format."""

BLOCK = 2**13
"""Numbers rounded at once: their bits stay in the processor's cache."""


def rounded(x: ArrayLike, dtype: str) -> Array:
    """Every number as the format would store it, to nearest and ties to even, kept as float64.

    One rounding from float64 to the format. (A cast by way of float32, as of torch's float64
    tensors to bfloat16, rounds twice and misses the nearest number in rare cases.)

    Parameters
    ----------
    x : array_like
        Of any shape.
    dtype : str
        `float64`, `float32`, `float16` or `bfloat16`.

    Returns
    -------
    ndarray, float64
        A new array. Exact for subnormals; Inf where the format overflows; NaN, Inf and the sign
        of zero stay.

    Raises
    ------
    WrongInput
        Unknown dtype.

    References
    ----------
    IEEE 754-2019, section 4.3.1 (roundTiesToEven).

    Examples
    --------
    >>> rounded([1 + 2**-8, 1 + 3 * 2**-8, 65520.0], "bfloat16").tolist()
    [1.0, 1.015625, 65536.0]
    >>> rounded([65519.0, 65520.0, 3 * 2.0**-26], "float16").tolist()
    [65504.0, inf, 5.960464477539063e-08]
    """
    x = np.asarray(x, dtype=np.float64)
    if dtype == "float64":
        return x.copy()
    if dtype not in FORMATS:
        raise unknown("dtype", dtype, ["float64", *FORMATS])
    if dtype == "float32":
        with np.errstate(over="ignore", under="ignore"):
            return np.asarray(x.astype(np.float32), dtype=np.float64)
    flat = np.ascontiguousarray(x).reshape(-1)
    out = np.empty_like(flat)
    for start in range(0, flat.size, BLOCK):
        block = slice(start, start + BLOCK)
        out[block] = _rounded(flat[block], *FORMATS[dtype])
    return out.reshape(x.shape)


def _rounded(x: Array, p: int, largest: int) -> Array:
    drop = 53 - p
    bits = x.view(np.uint64)
    # Half a unit in the last kept place, less one where that place is even: a carry rounds up.
    up = (bits >> np.uint64(drop)) & np.uint64(1)
    up += np.uint64((1 << (drop - 1)) - 1)
    up += bits
    up &= np.uint64((1 << 64) - (1 << drop))
    out: Array = up.view(np.float64)

    size = np.abs(x)
    small = size < math.ldexp(1.0, 1 - largest)
    if small.any():
        # Subnormals have one fixed spacing: that of float64 numbers of this size.
        offset = math.ldexp(1.5, 52 + 2 - largest - p)
        out[small] = np.copysign(size[small] + offset - offset, x[small])
    # From half a unit above the largest number on; NaN compares false and comes here too.
    too_large = ~(size < math.ldexp(2 - 2.0**-p, largest))
    if too_large.any():
        out[too_large] = np.where(np.isnan(x), x, np.copysign(np.inf, x))[too_large]
    return out
