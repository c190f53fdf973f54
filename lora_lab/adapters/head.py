"""The linear probe: no layer changes, only the head trains. The floor of every score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from lora_lab.adapters import ADAPTERS, Adapted, Shapes
from lora_lab.config import AdapterConfig


@ADAPTERS.register
@dataclass(frozen=True)
class Head(AdapterConfig):
    """Nothing but `train.also` trains; dW = 0 everywhere."""

    rate: ClassVar[float] = 100.0

    def layers(self, shapes: Shapes) -> list[str]:
        return []

    def adapt(self, linear: nn.Module, layer: str, generator: torch.Generator) -> Adapted:
        raise AssertionError("the head method has no layers to adapt")

    def parameters(self, shapes: Shapes) -> int:
        return 0

    def peft_config(self, shapes: Shapes) -> dict[str, Any] | None:
        return None
