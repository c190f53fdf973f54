"""What a number of seeds can show."""

from __future__ import annotations

import math

from scipy.stats import nct
from scipy.stats import t as student

from lora_lab.registry import WrongInput


def power(effect: float, sd: float, n: int, level: float = 0.05) -> float:
    """Chance that a two-sided paired t test at `level` sees a mean difference.

    Parameters
    ----------
    effect : float
        True mean difference.
    sd : float
        Standard deviation of one difference, above 0.
    n : int
        Pairs; fewer than 2 see nothing.

    Returns
    -------
    float
        In [0, 1]; `level` at effect 0.

    References
    ----------
    Cohen, "Statistical Power Analysis for the Behavioral Sciences", 2nd ed. (1988), chapter 2.

    >>> round(power(effect=0.02, sd=0.01, n=5), 3)
    0.909
    >>> power(effect=0.02, sd=0.01, n=1)
    0.0
    """
    assert sd > 0
    if n < 2:
        return 0.0
    shift, edge = effect / sd * math.sqrt(n), float(student.ppf(1 - level / 2, n - 1))
    return float(nct.sf(edge, n - 1, shift) + nct.cdf(-edge, n - 1, shift))


def units_needed(
    effect: float, sd: float, wanted: float = 0.8, level: float = 0.05, most: int = 10_000
) -> int:
    """Fewest pairs with which a paired t test sees a mean difference with a given chance.

    Parameters
    ----------
    effect, sd : float
        As for `power`; effect is not 0.
    wanted : float
        Chance, in (0, 1).
    most : int
        More than so many are not counted.

    Raises
    ------
    WrongInput
        If more than `most` would be needed.

    >>> units_needed(effect=0.02, sd=0.02)
    10
    """
    low, high = 2, 2
    while power(effect, sd, high, level) < wanted:
        low, high = high, 2 * high
        if low > most:
            raise WrongInput(
                f"an effect of {effect:g} at a spread of {sd:g} needs more than {most} pairs."
            )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if power(effect, sd, middle, level) < wanted else (low, middle)
    return low if power(effect, sd, low, level) >= wanted else high
