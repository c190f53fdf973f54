"""Policies that read a rank for LoRA off a full fine-tuning: what each says, layer by layer.

Each takes one measure of every layer's update. That a policy is here says nothing about whether it
is right: claim C4 counts how often each one is.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

POLICIES = {
    "energy": ("energy_rank", 0.95),
    "effective_rank": ("effective_rank", math.nan),
    "stable_rank": ("stable_rank", math.nan),
    "noise_edge": ("gavish_donoho_rank", math.nan),
    "replicated": ("replicated_rank", math.nan),
}
"""(measure, k) of each policy that looks at the update alone."""

ORACLE = "oracle"
"""The smallest k whose truncation W0 + dW_k still does what the whole update does."""

DEFAULT = ORACLE
"""What is recommended: a test holds it against the counts of claim C4."""

WITHOUT_DATA = "energy"
"""What is recommended where only the weights are there: likewise."""

MARGIN = 0.02
"""Score that a truncation or LoRA may lose against full fine-tuning and still be enough."""


def policy_ranks(measures: pd.DataFrame, policy: str) -> pd.Series:
    """r of each layer by a policy that looks at the update alone.

    Parameters
    ----------
    measures : DataFrame
        Rows of one run, or of `analyze`: `layer, measure, k, side, value`, and `step` where there
        are several (the last one counts). Where a measure has sides or seeds, their mean.
    policy : str
        A name of `POLICIES`.

    Returns
    -------
    Series of int
        By layer, at least 1; without the layers that have no such measure (an update of 0, or
        `replicated` with a single seed).

    Examples
    --------
    >>> import pandas as pd
    >>> rows = {"layer": ["a", "b"], "measure": "stable_rank", "k": math.nan, "side": ""}
    >>> policy_ranks(pd.DataFrame({**rows, "value": [2.3, 0.9]}), "stable_rank").to_dict()
    {'a': 3, 'b': 1}
    """
    import numpy as np

    name, k = POLICIES[policy]
    own = measures[(measures["measure"] == name) & (measures["layer"] != "")]
    if "step" in own:
        own = own[own["step"] == own["step"].max()]
    own = own[own["k"].isna() if math.isnan(k) else np.isclose(own["k"], k)]
    found = own.groupby("layer", sort=False)["value"].mean().dropna()
    # A measure such as 2.0000000001 is two directions.
    return np.ceil(found - 1e-6).clip(lower=1).astype(int)


def overall(ranks: pd.Series) -> int:
    """One r for all layers: the median over them, rounded up.

    >>> import pandas as pd
    >>> overall(pd.Series([1, 2, 5])), overall(pd.Series([2, 3]))
    (2, 3)
    """
    return math.ceil(ranks.median())
