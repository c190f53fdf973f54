"""What several claims read off curves: optima, steps to a target, and seeds that would tell."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import pandas as pd

from lora_lab.registry import WrongInput
from lora_lab.stats import Interval, slope, t_interval, units_needed

MANY = 100
"""Seeds beyond which a mean lies so close to a bound that more of them are no way to decide."""


def optimum(tried: Iterable[float], losses: Iterable[float]) -> tuple[float, bool]:
    """Where a loss is lowest, between the values that were tried.

    Parameters
    ----------
    tried : iterable of float
        Positive, such as learning rates.
    losses : iterable of float
        Positive; NaN for a run that diverged.

    Returns
    -------
    value : float
        The lowest point of the parabola through the best value and its neighbours, in logarithms;
        the best value itself where it has no two neighbours. NaN if every run diverged.
    edge : bool
        The best one is the lowest or highest of several that were tried, or its neighbour diverged.

    Examples
    --------
    >>> value, edge = optimum([1.0, 10.0, 100.0], [2.0, 1.0, 2.0])
    >>> round(value, 6), edge
    (10.0, False)
    >>> optimum([1.0, 10.0, 100.0], [1.0, 2.0, 3.0])
    (1.0, True)
    """
    x, y = (np.log(np.array(list(v), dtype=np.float64)) for v in (tried, losses))
    order = np.argsort(x)
    x, y = x[order], y[order]
    if not np.isfinite(y).any():
        return math.nan, True
    i = int(np.nanargmin(y))
    near = slice(max(i - 1, 0), i + 2)
    if len(x[near]) < 3 or not np.isfinite(y[near]).all():
        return float(np.exp(x[i])), len(x) > 1
    a, b, _ = np.polyfit(x[near] - x[i], y[near], 2)
    return float(np.exp(x[i] - b / (2 * a) if a > 0 else x[i])), False


def reached(steps: Iterable[float], losses: Iterable[float], target: float) -> float:
    """The step at which a curve first falls to a target, linear between its points.

    The last step where it never does: a method that is not there yet counts as just arrived.

    >>> reached([10, 20, 30], [3.0, 1.0, 0.5], 2.0), reached([10, 20], [3.0, 2.5], 2.0)
    (15.0, 20.0)
    """
    x, y = (np.array(list(v), dtype=np.float64) for v in (steps, losses))
    there = np.flatnonzero(y <= target)
    if not there.size:
        return float(x[-1])
    i = int(there[0])
    if i == 0:
        return float(x[0])
    share = (y[i - 1] - target) / (y[i - 1] - y[i])
    return float(x[i - 1] + share * (x[i] - x[i - 1]))


def spread(values: Iterable[float], level: float = 0.95) -> Interval:
    """`stats.t_interval` of the finite values: seeds without a result are left out."""
    return t_interval([v for v in values if math.isfinite(v)], level)


def slopes(points: pd.DataFrame, x: str, y: str) -> pd.Series:
    """Slope of y on x for each `seed` that has three values of x or more.

    Their t interval holds also where the points of a seed depend on each other, as the steps of one
    run do; a regression over all points would take them for independent.

    >>> points = pd.DataFrame({"seed": [0, 0, 0, 1], "x": [1, 2, 3, 1], "y": [2, 4, 6, 0]})
    >>> slopes(points, "x", "y").round(6).to_dict()
    {0: 2.0}
    """
    kept = points.dropna(subset=[x, y])
    found = {
        seed: slope(own[x], own[y]).slope
        for seed, own in kept.groupby("seed")
        if own[x].nunique() >= 3
    }
    return pd.Series(found, dtype="float64")


def inside(found: Interval, low: float, high: float) -> str:
    """Outcome of "the value lies between `low` and `high`", which may be infinite.

    >>> inside(Interval(1.0, 0.9, 1.1), 0.5, 2.0), inside(Interval(3.0, 2.9, 3.1), 0.5, 2.0)
    ('supported', 'refuted')
    """
    if low < found.low and found.high < high:
        return "supported"
    return "refuted" if found.low > high or found.high < low else "unresolved"


def seeds_to_tell(values: Iterable[float], *edges: float, either: bool = False) -> str:
    """How many seeds would tell on which side of the nearest edge the mean lies, in words.

    With `either` the edge that is farthest away counts: it is enough to be on one side of one.

    >>> seeds_to_tell([0.01, 0.03, 0.02], 0.0), seeds_to_tell([0.0], 0.0)
    ('about 5 seeds would tell', 'one seed says nothing: 2 or more are needed')
    >>> seeds_to_tell([-0.01, 0.012], 0.0)
    'about 1902 seeds would tell, as the mean lies close to the bound'
    """
    kept = np.array([v for v in values if math.isfinite(v)])
    if len(kept) < 2:
        return "one seed says nothing: 2 or more are needed"
    gaps = sorted((float(kept.mean()) - edge for edge in edges), key=abs)
    try:
        count = units_needed(gaps[-1 if either else 0], kept.std(ddof=1))
    except (WrongInput, AssertionError):
        return "no affordable number of seeds would tell"
    why = ", as the mean lies close to the bound" if count > MANY else ""
    return f"about {count} seeds would tell{why}"


def by_others(table: pd.DataFrame, value: str, over: str, least: bool = False) -> pd.Series:
    """For each seed the value at the choice that the *other* seeds favour.

    A choice made and judged by the same seeds flatters what had more to choose from.

    Parameters
    ----------
    table : DataFrame
        One row for each choice and `seed`; NaN, a diverged run, counts as the worst value.
    value, over : str
        Columns: what is judged, and what is chosen.
    least : bool
        The lowest value is the best.

    Returns
    -------
    Series
        By seed; a single seed chooses for itself.
    """
    grid = table.pivot_table(index="seed", columns=over, values=value, dropna=False)
    filled = grid.fillna(grid.max().max() if least else grid.min().min())
    out = {}
    for seed in filled.index:
        others = filled.drop(index=seed) if len(filled) > 1 else filled
        means = others.mean()
        out[seed] = filled.at[seed, means.idxmin() if least else means.idxmax()]
    return pd.Series(out, dtype="float64")
