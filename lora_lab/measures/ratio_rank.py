"""Directions within a factor of the leading one."""

from __future__ import annotations

import numpy as np

from lora_lab.linalg import Spectrum
from lora_lab.measures import SLACK, define
from lora_lab.registry import WrongInput


@define(grid=(2.0, 10.0, 100.0))
def ratio_rank(s: Spectrum, k: float = 10.0) -> float:
    """#{i: sigma_i >= sigma_1 / rho}, rho = `k` >= 1.

    In [1, q], non-decreasing in rho; 0 at dW = 0. Unchanged by scaling, transposition and
    rotation of dW.

    Raises
    ------
    WrongInput
        If rho is not a finite number of at least 1.

    References
    ----------
    The `sv_ratio` option of kohya-ss resize_lora.py.

    Examples
    --------
    >>> s = Spectrum.of_values([1, 1 / 2, 1 / 3, 1 / 4])
    >>> ratio_rank(s, 1.0), ratio_rank(s, 3.0), ratio_rank(s, 10.0)
    (1, 3, 4)
    """
    if not 1 <= k < np.inf:
        raise WrongInput(f"the ratio k of ratio_rank must be finite and at least 1; got {k}.")
    return 0 if s.zero else int(np.count_nonzero(s.relative >= (1 - SLACK) / k))
