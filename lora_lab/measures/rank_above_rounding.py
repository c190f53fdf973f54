"""Singular values above the noise that storing the weights left in the update."""

from __future__ import annotations

import numpy as np

from lora_lab.linalg import Spectrum
from lora_lab.linalg.factored import Array
from lora_lab.linalg.noise import ulp
from lora_lab.linalg.rounding import rounded
from lora_lab.measures import SLACK, define
from lora_lab.registry import WrongInput


@define(needs=("values", "W0"), at="end")
def rank_above_rounding(s: Spectrum, W0: Array) -> int:
    """#{i: sigma_i > the edge of the rounding noise of the dtype the weights were made in}.

    The answer where numerical_rank is undecidable (bfloat16 from size 256 on). A stored weight is
    wrong by up to half an ulp, of variance v = ulp(W0)^2 / 12 per entry; v counts twice if W0 too
    is stored in that dtype, since a base may have been rounded afterwards (if training started
    from it as it is, the edge is sqrt(2) too high: nothing false is counted). The edge of
    independent noise of these variances is sqrt(largest row sum of v) + sqrt(largest column sum),
    which for equal entries is rms (sqrt(m) + sqrt(n)). The product of an adapter's factors holds no
    such noise: there it counts the directions that stand above what a merge into W0 would add.

    In [0, q]; 0 at dW = 0, and where all that changed is rounding. Unchanged when dW and W0 are
    transposed together; a rotation or scaling of both moves the edge as far as ulps do.

    Parameters
    ----------
    s : Spectrum
        Of dW (m, n).
    W0 : ndarray, (m, n)
        The base weight; dW is taken to be small beside it.

    Raises
    ------
    WrongInput
        If the shapes differ.

    References
    ----------
    Bandeira & van Handel 2016, Sharp nonasymptotic bounds on the norm of random matrices with
    independent entries (the edge); Widrow & Kollar 2008, Quantization noise (the variance).

    Examples
    --------
    >>> W0 = np.full((256, 256), 1.5)  # edge: sqrt(2) 2^-7 / sqrt(12) (16 + 16) = 0.102
    >>> s = Spectrum.of_values([1.0, 0.11, 0.1], shape=(256, 256), made_in="bfloat16")
    >>> rank_above_rounding(s, W0)
    2
    """
    if np.shape(W0) != s.shape:
        raise WrongInput(f"W0 must have the update's shape {s.shape}; got {np.shape(W0)}.")
    if s.zero:
        return 0
    roundings = 2 if np.array_equal(rounded(W0, s.made_in), W0) else 1
    v = roundings / 12 * ulp(W0, s.made_in) ** 2
    edge = np.sqrt(v.sum(axis=1).max()) + np.sqrt(v.sum(axis=0).max())
    return int(np.count_nonzero(s.values > edge * (1 + SLACK)))
