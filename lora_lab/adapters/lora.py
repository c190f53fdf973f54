"""LoRA: dW = s·B·A with B (out, r) and A (r, in).

Hu et al. 2021, https://arxiv.org/abs/2106.09685; rsLoRA: Kalajdzievski 2023,
https://arxiv.org/abs/2312.03732.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from lora_lab.adapters import ADAPTERS, Adapted, Shapes, linear
from lora_lab.config import AdapterConfig, need, need_positive
from lora_lab.inits import INITS
from lora_lab.registry import WrongInput
from lora_lab.targets import by_pattern, select


class Scaling(Enum):
    """s as a function of α and r."""

    alpha_over_r = "alpha_over_r"
    rslora = "rslora"
    constant = "constant"

    def scale(self, alpha: float, r: int) -> float:
        """The factor s of dW = s·B·A.

        >>> Scaling.alpha_over_r.scale(16, 4), Scaling.rslora.scale(16, 4)
        (4.0, 8.0)
        >>> Scaling.constant.scale(16, 4)
        16.0
        """
        divisor = {"alpha_over_r": float(r), "rslora": math.sqrt(r), "constant": 1.0}[self.name]
        return float(alpha) / divisor


class _Product(torch.autograd.Function):
    """y = x W0ᵀ + bias + (x Aᵀ) (sB)ᵀ with the second product accumulated into the first.

    Autograd's own graph would make a copy of y for the sum, forward and backward; these copies
    cost more than the two thin products.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        W0: torch.Tensor,
        bias: torch.Tensor | None,
        A: torch.Tensor,
        B: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        rows = x.flatten(0, -2)
        W0, a, b = W0.to(x.dtype), A.to(x.dtype), (scale * B).to(x.dtype)
        seen = rows @ a.T
        y = F.linear(rows, W0, None if bias is None else bias.to(x.dtype)).addmm_(seen, b.T)
        ctx.save_for_backward(rows, seen, W0, a, b)
        ctx.scale, ctx.shape = scale, x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, D: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, seen, W0, a, b = ctx.saved_tensors
        D = D.flatten(0, -2)
        thin = D @ b
        want_x, _, want_bias, want_A, want_B, _ = ctx.needs_input_grad
        grad_x = (D @ W0).addmm_(thin, a).view(ctx.shape) if want_x else None
        grad_bias = D.sum(0) if want_bias else None
        grad_A = thin.T @ rows if want_A else None
        grad_B = ctx.scale * (D.T @ seen) if want_B else None
        return grad_x, None, grad_bias, grad_A, grad_B, None


class LoRALayer(Adapted):
    """A frozen layer with a low-rank update; A and B in float32 (or wider)."""

    def __init__(
        self, layer: nn.Module, A: torch.Tensor, B: torch.Tensor, scale: float, dropout: float
    ) -> None:
        super().__init__(layer)
        self.A = nn.Parameter(A.to(self.wide))
        self.B = nn.Parameter(B.to(self.wide))
        self.scale, self.dropout = scale, dropout

    def adapted(self, x: torch.Tensor) -> torch.Tensor:
        device = x.device.type
        if torch.is_autocast_enabled(device):
            # Autocast does not look inside a custom function.
            x = x.to(torch.get_autocast_dtype(device))
        if not self.dropout:
            y: torch.Tensor = _Product.apply(x, self.W0, self.bias, self.A, self.B, self.scale)
            return y
        seen = F.dropout(x, self.dropout, self.training)
        return linear(x, self.W0, self.bias) + linear(
            linear(seen, self.A, None), self.scale * self.B, None
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        scale = torch.tensor(self.scale, dtype=torch.float64)
        return {"A": self.A.detach(), "B": self.B.detach(), "scale": scale}

    @property
    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.A, self.B


@ADAPTERS.register
@dataclass(frozen=True)
class LoRA(AdapterConfig):
    """Low-rank adaptation.

    Attributes
    ----------
    r : int
        Configured rank, in [1, min(out, in)] of every target layer.
    alpha : float or None
        α of the scaling rule; None: 2·r.
    scaling : Scaling
        s = α/r, α/√r (rsLoRA) or α (constant).
    init : str
        How A and B start: a file of lora_lab/inits.
    targets : str
        Layers that change, see lora_lab.targets.
    dropout : float
        Dropout of the input of A, in [0, 1).
    r_pattern, alpha_pattern : dict
        r and α of layers by name pattern (PEFT's matching, first match wins).
    """

    r: int = 8
    alpha: float | None = None
    scaling: Scaling = Scaling.alpha_over_r
    init: str = "kaiming"
    targets: str = "all"
    dropout: float = 0.0
    r_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    rate: ClassVar[float] = 5.0

    def __post_init__(self) -> None:
        need(self.r >= 1, "adapter.r", "at least 1", self.r)
        if self.alpha is not None:
            need_positive("adapter.alpha", self.alpha)
        need(0 <= self.dropout < 1, "adapter.dropout", "in [0, 1)", self.dropout)
        for pattern, r in self.r_pattern.items():
            need(r >= 1, f"adapter.r_pattern[{pattern!r}]", "at least 1", r)
        for pattern, alpha in self.alpha_pattern.items():
            need_positive(f"adapter.alpha_pattern[{pattern!r}]", alpha)
        INITS.require(self.init)

    def resolved(self) -> LoRA:
        """The same with α filled in, so that α = 2r written out is the same run."""
        return self if self.alpha is not None else dataclasses.replace(self, alpha=2.0 * self.r)

    def rank_of(self, layer: str) -> int:
        """r of one layer."""
        return int(by_pattern(layer, self.r_pattern, self.r))

    def scale_of(self, layer: str) -> float:
        """s of one layer."""
        alpha = 2.0 * self.r if self.alpha is None else self.alpha
        alpha = by_pattern(layer, self.alpha_pattern, alpha)
        return self.scaling.scale(alpha, self.rank_of(layer))

    def layers(self, shapes: Shapes) -> list[str]:
        chosen = select(self.targets, shapes)
        for layer in chosen:
            out, inner = shapes[layer]
            if self.rank_of(layer) > min(out, inner):
                raise WrongInput(
                    f"r must be in [1, {min(out, inner)}] for layer {layer!r} ({out}×{inner}); got "
                    f"{self.rank_of(layer)}. Lower adapter.r or leave this layer out of "
                    "adapter.targets."
                )
        return chosen

    def adapt(self, linear: nn.Module, layer: str, generator: torch.Generator) -> Adapted:
        out, inner = linear.weight.shape
        if not isinstance(linear, nn.Linear):
            out, inner = inner, out
        A, B = INITS[self.init](out, inner, self.rank_of(layer), generator)
        return LoRALayer(linear, A, B, self.scale_of(layer), self.dropout)

    def parameters(self, shapes: Shapes) -> int:
        return sum(self.rank_of(layer) * sum(shapes[layer]) for layer in self.layers(shapes))

    def peft_config(self, shapes: Shapes) -> dict[str, Any] | None:
        layers = self.layers(shapes)
        ranks = {layer: self.rank_of(layer) for layer in layers}
        rslora = self.scaling is Scaling.rslora
        # PEFT knows α/r and α/√r only: the α that gives our s.
        alphas = {
            layer: self.scale_of(layer) * (math.sqrt(r) if rslora else r)
            for layer, r in ranks.items()
        }
        first = layers[0]
        return {
            "peft_type": "LORA",
            "task_type": None,
            "r": ranks[first],
            "lora_alpha": alphas[first],
            "use_rslora": rslora,
            "rank_pattern": {n: r for n, r in ranks.items() if r != ranks[first]},
            "alpha_pattern": {n: a for n, a in alphas.items() if a != alphas[first]},
            "target_modules": layers,
            "lora_dropout": self.dropout,
            "bias": "none",
            "inference_mode": True,
        }
