"""Full fine-tuning: every entry of the target weights trains."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from lora_lab.adapters import ADAPTERS, Adapted, Method, Place, Shapes, linear
from lora_lab.targets import select


class FullLayer(Adapted):
    """W is trained in float32 (or wider) and cast to the compute dtype in the forward pass."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.computes = ()
        self.W = nn.Parameter(self.W0.clone())

    def adapted(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.W, self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # W's own gradient is the implicit one: nothing has to be watched.
        return self.adapted(x) if self.merged is None else linear(x, self.merged, self.bias)

    def implicit_gradient(self) -> torch.Tensor | None:
        return self.W.grad

    def tensors(self) -> dict[str, torch.Tensor]:
        # Nearby float32 numbers subtract exactly; the others round by 6e-8 of the difference.
        return {"dW": self.W.detach() - self.W0}


@ADAPTERS.register
@dataclass(frozen=True)
class Full(Method):
    """All entries of the target layers' weights.

    Attributes
    ----------
    targets : str
        As of `AdapterConfig`.
    """

    targets: str = "all"

    def layers(self, shapes: Shapes) -> list[str]:
        return select(self.targets, shapes)

    def adapt(self, place: Place) -> Adapted:
        return FullLayer(place)

    def parameters(self, shapes: Shapes) -> int:
        return sum(shapes[layer][0] * shapes[layer][1] for layer in self.layers(shapes))

    def flops(self, shapes: Shapes) -> int:
        return 0
