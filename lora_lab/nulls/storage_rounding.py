"""The rounding of the stored weights alone, by the dtype they were made in."""

from __future__ import annotations

import numpy as np

from lora_lab.linalg import Dense, Factored, Spectrum, decompose
from lora_lab.linalg.factored import Array, Update
from lora_lab.linalg.noise import ulp
from lora_lab.measures import Refused
from lora_lab.nulls import define, matrix


@define(needs=("update", "W0"))
def storage_rounding(s: Spectrum, rng: np.random.Generator, update: Update, W0: Array) -> Array:
    """Singular values of what storing the tuned weight did to dW.

    Before it was stored a weight was anywhere within half a spacing of the number it became, so
    the error is drawn uniform within half an ulp of W0 + dW, in the dtype the weights were made
    in, and 0 where the update is exactly 0. This is the one rounding of a tuned weight: training
    starts from the base as it is stored. If the base was rounded afterwards too, errors are
    sqrt(2) larger, which changes no rank and no ratio.

    Sizes: the rms of one bfloat16 rounding is 1.66e-3 of |w|.

    Raises
    ------
    Refused
        For factors, which are stored themselves, and for too many entries (see `matrix`).

    References
    ----------
    Widrow & Kollar 2008, Quantization noise (rounding errors as uniform independent noise).

    Examples
    --------
    >>> W0 = np.full((64, 64), 1.5)  # bfloat16 numbers lie 2^-7 apart there
    >>> update = Dense(np.full((64, 64), 2.0**-7), made_in="bfloat16")
    >>> values = storage_rounding(decompose(update), np.random.default_rng(0), update, W0)
    >>> round(float(np.linalg.norm(values)) / 64 * 2**7 * 12**0.5, 1)  # rms ulp / sqrt(12)
    1.0
    """
    if isinstance(update, Factored):
        raise Refused("factors are stored themselves: no rounding of W0 + dW is in their product.")
    dW = matrix(update)
    error = rng.uniform(-0.5, 0.5, dW.shape)
    error *= ulp(W0 + dW, s.made_in)
    error[dW == 0] = 0
    return decompose(Dense(error, s.made_in)).values
