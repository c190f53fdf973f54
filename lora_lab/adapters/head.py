"""The linear probe: no layer changes, only the head trains. The floor of every score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lora_lab.adapters import ADAPTERS, Adapted, Method, Place, Shapes


@ADAPTERS.register
@dataclass(frozen=True)
class Head(Method):
    """Nothing but `train.also` trains; dW = 0 everywhere."""

    rate: ClassVar[float] = 100.0

    def layers(self, shapes: Shapes) -> list[str]:
        return []

    def adapt(self, place: Place) -> Adapted:
        raise AssertionError("the head method has no layers to adapt")

    def parameters(self, shapes: Shapes) -> int:
        return 0

    def flops(self, shapes: Shapes) -> int:
        return 0
