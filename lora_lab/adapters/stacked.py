"""Stacked adapters: dW = s₁B₁A₁ + s₂B₂A₂ + …, trained together or one after another.

Together and with constant scales they are one LoRA of the summed rank, step by step, as the
optimizers of the lab work entry by entry. What differs is training one after another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

import torch
from torch import nn

from lora_lab.adapters import ADAPTERS, Adapted, Place, Shapes
from lora_lab.adapters.lora import LoRA, LoRALayer, need_drawn
from lora_lab.config import need


class Order(Enum):
    """When the blocks train."""

    together = "together"
    one_after_another = "one_after_another"


class StackedLayer(LoRALayer):
    """All blocks as one pair of factors, [A₁; A₂; …] and [B₁ B₂ …], in as many kernels as LoRA.

    Parameters
    ----------
    place : Place
    starts : list of (A, B)
        (r, in) and (out, r) of each block.
    config : Stacked
    """

    def __init__(
        self, place: Place, starts: list[tuple[torch.Tensor, torch.Tensor]], config: Stacked
    ) -> None:
        A, B = torch.cat([A for A, _ in starts]), torch.cat([B for _, B in starts], dim=1)
        super().__init__(place, A, B, config)
        self.blocks = len(starts)
        if isinstance(self.scale, nn.Parameter):
            self.scale = nn.Parameter(self.scale.detach().repeat(self.blocks))
        self._held: list[tuple[torch.Tensor, torch.Tensor]] = []

    def scaled(self) -> tuple[torch.Tensor, torch.Tensor, float]:
        if isinstance(self.scale, float):
            return super().scaled()
        return self.A, self.B * self.scale.repeat_interleave(len(self.A) // self.blocks), 1.0

    def hold(self, active: int) -> None:
        """Take the gradients from all blocks but one, and remember their values."""
        for parameter, along in ((self.A, 0), (self.B, 1), (self.scale, 0)):
            if not isinstance(parameter, nn.Parameter) or parameter.grad is None:
                continue
            parts = parameter.detach().chunk(self.blocks, along)
            grads = parameter.grad.chunk(self.blocks, along)
            for i, (part, grad) in enumerate(zip(parts, grads, strict=True)):
                if i != active:
                    grad.zero_()
                    self._held.append((part, part.clone()))

    def restore(self) -> None:
        """Put back what momentum or weight decay has moved of the other blocks."""
        for part, value in self._held:
            part.copy_(value)
        self._held = []


@ADAPTERS.register
@dataclass(frozen=True)
class Stacked(LoRA):
    """Several low-rank updates of one weight.

    Attributes
    ----------
    r : int
        Rank of each block, so that the update has rank blocks·r.
    alpha, scaling, init, targets, dropout, r_pattern, alpha_pattern, lr_ratio, freeze_a
        As of LoRA, for every block; `init` one that draws at random; a learned s is one a block.
    blocks : int
        How many low-rank updates each weight has.
    order : Order
        `together`, or `one_after_another`: each block trains for its share of the steps while the
        others rest, with moments and bias correction of its own; the rate follows the run's
        schedule over all of them.
    """

    blocks: int = 2
    order: Order = Order.together

    def __post_init__(self) -> None:
        super().__post_init__()
        need(self.blocks >= 1, "adapter.blocks", "at least 1", self.blocks)
        need_drawn(self.init, "stacked")

    def adapt(self, place: Place) -> Adapted:
        return StackedLayer(place, [self.start_of(place) for _ in range(self.blocks)], self)

    def parameters(self, shapes: Shapes) -> int:
        return self.blocks * super().parameters(shapes)

    def flops(self, shapes: Shapes) -> int:
        return self.blocks * super().flops(shapes)

    def active(self, step: int, steps: int) -> int:
        """The block that trains at a step."""
        return (step - 1) * self.blocks // steps

    def before_step(self, adapted: Mapping[str, Adapted], step: int, steps: int) -> None:
        if self.order is Order.one_after_another:
            for layer in adapted.values():
                assert isinstance(layer, StackedLayer)
                layer.hold(self.active(step, steps))

    def after_step(
        self,
        adapted: Mapping[str, Adapted],
        step: int,
        steps: int,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        if self.order is Order.together:
            return
        ended = self.active(step, steps) != self.active(step + 1, steps)
        for layer in adapted.values():
            assert isinstance(layer, StackedLayer)
            layer.restore()
            for name, parameter in layer.named_parameters():
                if ended and name != "bias":
                    optimizer.state.pop(parameter, None)
