"""When a method acts during training: every so many steps within a share of them."""

from __future__ import annotations

from lora_lab.config import need


def need_span(begin: float, end: float, every: int) -> None:
    """Refuse fields `begin`, `end` and `every` of a method that are no schedule."""
    need(0 <= begin <= 1, "adapter.begin", "in [0, 1]", begin)
    need(begin <= end <= 1, "adapter.end", f"in [adapter.begin = {begin:g}, 1]", end)
    need(every >= 1, "adapter.every", "at least 1", every)


def span(begin: float, end: float, steps: int) -> tuple[int, int]:
    """First and last of the steps 1 … `steps` at which a method acts.

    >>> span(0.2, 0.8, 100), span(0.0, 0.0, 100), span(1.0, 1.0, 100)
    ((20, 80), (1, 1), (100, 100))
    """
    first = max(1, round(begin * steps))
    return first, max(first, round(end * steps))


def progress(step: int, first: int, last: int, every: int) -> float | None:
    """How far a schedule has come, from 0 at `first` to 1 at `last`; None where it rests.

    >>> [progress(step, 20, 70, 20) for step in (20, 30, 40, 70)]
    [0.0, None, 0.4, 1.0]
    >>> progress(5, 5, 5, 20)
    1.0
    """
    if not first <= step <= last or ((step - first) % every and step != last):
        return None
    return (step - first) / (last - first) if first < last else 1.0


def cubic(start: float, end: float, progress: float) -> float:
    """``end + (start - end)(1 - progress)^3``: fast at first.

    References
    ----------
    Zhu & Gupta 2017, "To prune, or not to prune", https://arxiv.org/abs/1710.01878, equation (1).

    >>> cubic(8, 0, 0.0), cubic(8, 0, 0.5), cubic(8, 0, 1.0)
    (8.0, 1.0, 0.0)
    """
    return float(end + (start - end) * (1 - progress) ** 3)
