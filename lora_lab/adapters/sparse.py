"""Sparse LoRA: dW = mask ⊙ (s·B·A), the smallest entries of BA pruned during or after training.

Magnitude pruning by a cubic schedule: Zhu & Gupta 2017, https://arxiv.org/abs/1710.01878. The rank
of a masked product may exceed r.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from lora_lab.adapters import ADAPTERS, Adapted, Place, Shapes, linear, linear_sum
from lora_lab.adapters.lora import LoRA, LoRALayer
from lora_lab.config import need
from lora_lab.gradual import cubic, need_span, progress, span
from lora_lab.inits import INITS


class SparseLayer(LoRALayer):
    """LoRA until its first pruning; from then on s·B·A is formed and masked in every pass."""

    mask: torch.Tensor
    pruned: torch.Tensor

    def __init__(self, place: Place, A: torch.Tensor, B: torch.Tensor, config: Sparse) -> None:
        super().__init__(place, A, B, config)
        self.dense = config.sparsity > 0
        if self.dense:
            self.register_buffer("mask", torch.ones(self.shape, dtype=torch.bool))
            self.register_buffer("pruned", torch.tensor(False))

    def product(self) -> torch.Tensor:
        """s·B·A, (out, in)."""
        A, B, scale = self.scaled()
        return scale * (B @ A)

    def prune(self, share: float) -> None:
        """Zero the given share of the entries, the smallest of s·B·A; earlier ones may return."""
        sizes = self.product().detach().abs().flatten()
        smallest = sizes.topk(round(share * sizes.numel()), largest=False, sorted=False).indices
        self.mask.fill_(True).view(-1)[smallest] = False
        self.pruned.fill_(len(smallest) > 0)

    def adapted(self, x: torch.Tensor) -> torch.Tensor:
        if not self.dense or not self.pruned:
            return super().adapted(x)
        dW = self.mask * self.product()
        if not self.dropout:
            return linear_sum(x, self.W0, dW, self.bias)
        seen = F.dropout(x, self.dropout, self.training)
        return linear(x, self.W0, self.bias) + linear(seen, dW, None)

    def tensors(self) -> dict[str, torch.Tensor]:
        # Dense from the start, so that two steps can be compared.
        return {"dW": self.mask * self.product().detach()} if self.dense else super().tensors()


@ADAPTERS.register
@dataclass(frozen=True)
class Sparse(LoRA):
    """LoRA with magnitude pruning of its product.

    Attributes
    ----------
    r, alpha, scaling, init, targets, dropout, r_pattern, alpha_pattern, lr_ratio, freeze_a
        As of LoRA; `init` one that is not subtracted from the frozen weight.
    sparsity : float
        Share of the entries of every layer's update that are 0 in the end, in [0, 1); 0 is LoRA.
    begin, end : float
        Shares of the training between which the sparsity grows; both 1: pruned once at its end.
    every : int
        Steps between two prunings. The mask rests between them and after the last.
    """

    sparsity: float = 0.5
    begin: float = 0.2
    end: float = 0.8
    every: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        need(0 <= self.sparsity < 1, "adapter.sparsity", "in [0, 1)", self.sparsity)
        need_span(self.begin, self.end, self.every)
        need(
            INITS[self.init].start != "subtracted",
            "adapter.init",
            "one that is not subtracted from the frozen weight with adapter=sparse",
            repr(self.init),
        )

    def adapt(self, place: Place) -> Adapted:
        return SparseLayer(place, *self.start_of(place), self)

    def flops(self, shapes: Shapes) -> int:
        """As it computes once pruned: dense, and without the forming of BA once a pass."""
        if not self.sparsity:
            return super().flops(shapes)
        return sum(2 * shapes[layer][0] * shapes[layer][1] for layer in self.layers(shapes))

    def after_step(
        self,
        adapted: Mapping[str, Adapted],
        step: int,
        steps: int,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        done = progress(step, *span(self.begin, self.end, steps), self.every)
        if done is None or not self.sparsity:
            return
        for layer in adapted.values():
            assert isinstance(layer, SparseLayer)
            layer.prune(cubic(0.0, self.sparsity, done))
