"""Scaling rules: the factor s of dW = s·B·A from α and r. One file a rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lora_lab.registry import Registry


@dataclass(frozen=True)
class Scaling:
    """One rule.

    Attributes
    ----------
    scale : callable
        ``scale(alpha, r) -> float``: s, or the value that it starts from.
    trains : bool
        Whether every layer's s is a parameter.
    """

    scale: Callable[[float, int], float]
    trains: bool = False


SCALINGS: Registry[Scaling] = Registry(__name__, "adapter.scaling")


def define(trains: bool = False) -> Callable[[Callable[[float, int], float]], Scaling]:
    """Decorator: enter a rule under the name of its file."""

    def enter(scale: Callable[[float, int], float]) -> Scaling:
        return SCALINGS.register(Scaling(scale, trains), scale.__module__)

    return enter
