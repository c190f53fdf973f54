"""Singular values above the edge of noise."""

from __future__ import annotations

import numpy as np

from lora_lab.linalg import Spectrum
from lora_lab.linalg.noise import aspect, no_bulk, noise_edge, noise_median
from lora_lab.measures import SLACK, Refused, define


@define()
def marchenko_pastur_rank(s: Spectrum) -> int:
    """#{i: sigma_i > the largest that noise of the bulk's level reaches}.

    The level sd is the median singular value over that of noise of sd 1 (Marchenko & Pastur), the
    edge sd (sqrt(m) + sqrt(n)) and the Tracy-Widom slack that noise exceeds in one of a thousand
    matrices (`linalg.noise.noise_edge`). What lies above is taken out, the level read again from
    the rest, of shape (m - k, n - k), until nothing more comes out. With the level estimated,
    less than 2 % of pure noise matrices give a count above 0. Noise whose entries differ in size,
    as that of an update near the spacing of bfloat16, has no such edge and is counted: compare
    with the nulls `sign_flip` and `storage_rounding`.

    In [0, q/2]; 0 at dW = 0, and where there is nothing above noise. It sees a planted singular
    value x only if x > (m n)^(1/4) sd. Unchanged by scaling, transposition and rotation of dW.

    Raises
    ------
    Refused
        For a product of factors, a median of 0 (to rounding), min(m, n) < 32, and where over half
        of the values come out: no bulk.

    References
    ----------
    Marchenko & Pastur 1967; Johnstone 2001, On the distribution of the largest eigenvalue.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> noise = np.linalg.svd(rng.standard_normal((100, 80)), compute_uv=False)
    >>> marchenko_pastur_rank(Spectrum.of_values(noise, shape=(100, 80)))
    0
    >>> marchenko_pastur_rank(Spectrum.of_values([40.0, 30.0, *noise[2:]], shape=(100, 80)))
    2
    """
    if s.zero:
        return 0
    if reason := no_bulk(s):
        raise Refused(reason)
    m, n = s.shape
    k, above = -1, 0
    while k < above <= s.q // 2:
        k = above
        rest = (m - k, n - k)
        sd = np.median(s.relative[k:]) / (np.sqrt(max(rest)) * noise_median(aspect(rest)))
        above = int(np.count_nonzero(s.relative > noise_edge(rest, sd) * (1 + SLACK)))
    if above > s.q // 2:
        raise Refused("over half of the singular values lie above the noise that the rest tells")
    return k
