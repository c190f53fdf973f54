"""LoRA: dW = s·B·A with B (out, r) and A (r, in).

Hu et al. 2021, https://arxiv.org/abs/2106.09685; B with a rate of its own (LoRA+): Hayou et al.
2024, https://arxiv.org/abs/2402.12354; frozen A (LoRA-FA): Zhang et al. 2023,
https://arxiv.org/abs/2308.03303.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from lora_lab.adapters import (
    ADAPTERS,
    Adapted,
    Method,
    Place,
    Shapes,
    computed,
    linear,
    need_fits,
)
from lora_lab.config import need, need_positive
from lora_lab.inits import INITS
from lora_lab.scalings import SCALINGS
from lora_lab.targets import by_pattern, select


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


def low_rank(
    x: torch.Tensor,
    frozen: torch.Tensor,
    bias: torch.Tensor | None,
    update: tuple[torch.Tensor, torch.Tensor, float],
) -> torch.Tensor:
    """x (frozen + s·B·A)ᵀ + bias in four products forward and backward; `update` is (A, B, s)."""
    y: torch.Tensor = _Product.apply(computed(x), frozen, bias, *update)
    return y


class LoRALayer(Adapted):
    """A frozen layer with a low-rank update; A, B and a learned s in float32 (or wider).

    Parameters
    ----------
    place : Place
    A, B : Tensor, (r, in) and (out, r)
        How the factors start.
    config : LoRA
        Its scaling, dropout, rates, and init, which says whether the start is taken from the
        frozen weight.
    """

    def __init__(self, place: Place, A: torch.Tensor, B: torch.Tensor, config: LoRA) -> None:
        super().__init__(place)
        # An SVD gives columns: fused optimizers go wrong where moments have other strides.
        A, B = A.to(self.wide).contiguous(), B.to(self.wide).contiguous()
        scale = config.scale_of(place.layer)
        self.scale: float | nn.Parameter = scale
        if SCALINGS[config.scaling].trains:
            self.scale = nn.Parameter(torch.tensor(scale, dtype=self.wide))
        self.dropout = config.dropout
        self.subtracted = INITS[config.init].start == "subtracted"
        if self.subtracted:
            residual = self.W0.double() - scale * (B.double() @ A.double())
            self.register_buffer("residual", residual.to(self.W0.dtype), persistent=False)
            self.computes = ("residual",)
        if config.freeze_a:
            self.register_buffer("A", A)
        else:
            self.A = nn.Parameter(A)
        self.B = nn.Parameter(B)
        if self.subtracted:
            # Bitwise what `tensors` gives at first, so that dW starts at exactly 0.
            A0, B0, _ = self.scaled()
            self.register_buffer("A0", A0.detach().clone(), persistent=False)
            self.register_buffer("B0", B0.detach().clone(), persistent=False)
        if config.lr_ratio != 1:
            self.rates = {"B": config.lr_ratio}

    def scaled(self) -> tuple[torch.Tensor, torch.Tensor, float]:
        """A, B and a constant s whose product s·B·A is added to the frozen weight."""
        if isinstance(self.scale, float):
            return self.A, self.B, self.scale
        return self.A, self.scale * self.B, 1.0

    def adapted(self, x: torch.Tensor) -> torch.Tensor:
        A, B, scale = self.scaled()
        frozen = self.residual if self.subtracted else self.W0
        if not self.dropout:
            return low_rank(x, frozen, self.bias, (A, B, scale))
        x = computed(x)
        seen = F.dropout(x, self.dropout, self.training)
        return linear(x, frozen, self.bias) + linear(linear(seen, A, None), scale * B, None)

    def tensors(self) -> dict[str, torch.Tensor]:
        A, B, scale = self.scaled()
        parts = {
            "A": A.detach(),
            "B": B.detach(),
            "scale": torch.tensor(scale, dtype=torch.float64),
        }
        if not self.subtracted:
            return parts
        # s(BA - B0 A0) = s [B, -B0] [A; A0]
        return parts | {
            "A": torch.cat([parts["A"], self.A0]),
            "B": torch.cat([parts["B"], -self.B0], dim=1),
        }

    @property
    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.A, self.B


def need_drawn(init: str, method: str) -> None:
    """Refuse inits that are no new random draw each time, or that do not start at the base."""
    drawn = [name for name, known in INITS.items() if not known.needs and known.start == "base"]
    allowed = f"one of {', '.join(drawn)} with adapter={method}"
    need(init in drawn, "adapter.init", allowed, repr(init))


@ADAPTERS.register
@dataclass(frozen=True)
class LoRA(Method):
    """Low-rank adaptation.

    Attributes
    ----------
    r : int
        Configured rank, in [1, min(out, in)] of every target layer.
    alpha : float or None
        α of the scaling rule; None: 2·r.
    scaling : str
        How s follows from α and r: a file of lora_lab/scalings.
    init : str
        How A and B start: a file of lora_lab/inits.
    reference : str
        For init=reference: run_id (or an override line, which becomes one) of a finished run whose
        update the factors start from.
    targets : str
        As of `AdapterConfig`.
    dropout : float
        Dropout of the input of A, in [0, 1).
    r_pattern, alpha_pattern : dict
        r and α of layers by name pattern (PEFT's matching, first match wins).
    lr_ratio : float
        Learning rate of B over that of A (LoRA+).
    freeze_a : bool
        Only B trains (LoRA-FA).
    """

    r: int = 8
    alpha: float | None = None
    scaling: str = "alpha_over_r"
    init: str = "kaiming"
    reference: str = ""
    targets: str = "all"
    dropout: float = 0.0
    r_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    lr_ratio: float = 1.0
    freeze_a: bool = False

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
        need_positive("adapter.lr_ratio", self.lr_ratio)
        SCALINGS.require(self.scaling)
        INITS.require(self.init)
        need(
            not (self.freeze_a and self.init == "zero_a"),
            "adapter.init",
            "one with A ≠ 0 where adapter.freeze_a=true",
            repr(self.init),
        )
        need(
            bool(self.reference) == (self.init == "reference"),
            "adapter.reference",
            "a run where adapter.init=reference, and empty elsewhere",
            repr(self.reference),
        )

    @property
    def needs(self) -> frozenset[str]:
        return frozenset(INITS[self.init].needs) - {"W0", "scale"}

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
        return SCALINGS[self.scaling].scale(alpha, self.rank_of(layer))

    def layers(self, shapes: Shapes) -> list[str]:
        chosen = select(self.targets, shapes)
        for layer in chosen:
            need_fits("r", self.rank_of(layer), layer, shapes[layer])
        return chosen

    def start_of(self, place: Place) -> tuple[torch.Tensor, torch.Tensor]:
        """How A and B of one layer start."""
        given = {"W0": place.W0, "scale": self.scale_of(place.layer), **place.material}
        init = INITS[self.init]
        return init(*place.shape, self.rank_of(place.layer), place.generator, **given)

    def adapt(self, place: Place) -> Adapted:
        return LoRALayer(place, *self.start_of(place), self)

    def parameters(self, shapes: Shapes) -> int:
        layers = self.layers(shapes)
        sides = [(0, shapes[n][0]) if self.freeze_a else shapes[n] for n in layers]
        scales = len(layers) * SCALINGS[self.scaling].trains
        return scales + sum(
            self.rank_of(layer) * sum(side) for layer, side in zip(layers, sides, strict=True)
        )

    def flops(self, shapes: Shapes) -> int:
        return sum(2 * self.rank_of(layer) * sum(shapes[layer]) for layer in self.layers(shapes))
