"""Work that several measures, or several rows of one measure, share."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TypeVar
from weakref import WeakKeyDictionary, ref

from lora_lab.linalg.spectrum import Spectrum

T = TypeVar("T")


def remembered(function: Callable[..., T]) -> Callable[..., T]:
    """Decorator: keep the last result for each spectrum, for the same other arguments.

    Arguments are compared by identity and not kept alive: the result goes when the spectrum goes.
    It must not hold the spectrum itself. As everywhere, arrays are values: change none in place.

    Examples
    --------
    >>> @remembered
    ... def largest(s, other):
    ...     print("computed")
    ...     return max(s.values[0], other.values[0])
    >>> a, b = Spectrum.of_values([4.0, 3.0]), Spectrum.of_values([5.0])
    >>> float(largest(a, b)), float(largest(a, b))
    computed
    (5.0, 5.0)
    """
    kept: WeakKeyDictionary[Spectrum, tuple[tuple[ref[object], ...], T]] = WeakKeyDictionary()

    @wraps(function)
    def once(s: Spectrum, *others: object) -> T:
        found = kept.get(s)
        if found is not None and all(
            known() is other for known, other in zip(found[0], others, strict=True)
        ):
            return found[1]
        result = function(s, *others)
        kept[s] = (tuple(ref(other) for other in others), result)
        return result

    return once
