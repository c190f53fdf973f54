"""Adaptive budget (AdaLoRA): dW = s·P·diag(λ)·Q, a global budget of directions by importance.

Zhang et al. 2023, https://arxiv.org/abs/2303.10512; equation numbers are of this paper.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from lora_lab.adapters import ADAPTERS, Adapted, Method, Place, Shapes, need_fits
from lora_lab.adapters.lora import low_rank
from lora_lab.config import need, need_positive
from lora_lab.gradual import cubic, need_span, progress, span
from lora_lab.scalings import SCALINGS
from lora_lab.targets import select


class AdaptiveLayer(Adapted):
    """Triplets (column of P, λ, row of Q); P (out, r), λ (r,) and Q (r, in) train.

    Parameters
    ----------
    place : Place
    r : int
        Triplets at the start.
    scale, lr_ratio : float
        See `Adaptive`.
    """

    live: torch.Tensor

    def __init__(self, place: Place, r: int, scale: float, lr_ratio: float) -> None:
        super().__init__(place)
        out, inner = self.shape
        # Orthonormal, where the paper's are normal numbers: the penalty starts at 0, and does not
        # fill the norm at which gradients are clipped.
        P, Q = (
            torch.linalg.qr(torch.randn(side, r, generator=place.generator, dtype=torch.float64)).Q
            for side in (out, inner)
        )
        self.P = nn.Parameter(P.to(self.wide).contiguous())
        self.lamda = nn.Parameter(torch.zeros(r, dtype=self.wide))
        self.Q = nn.Parameter(Q.T.to(self.wide).contiguous())
        self.scale = scale
        if lr_ratio != 1:
            self.rates = {"lamda": lr_ratio}
        self.register_buffer("live", torch.ones(r, dtype=torch.bool))
        for name, parameter in self.trained().items():
            for what in ("importance", "uncertainty"):
                self.register_buffer(f"{what}_{name}", torch.zeros_like(parameter))

    def trained(self) -> dict[str, nn.Parameter]:
        """What trains, by name."""
        return {"P": self.P, "lamda": self.lamda, "Q": self.Q}

    @property
    def live_r(self) -> int:
        return int(self.live.sum())

    def adapted(self, x: torch.Tensor) -> torch.Tensor:
        return low_rank(x, self.W0, self.bias, (self.Q, self.P * self.lamda, self.scale))

    def tensors(self) -> dict[str, torch.Tensor]:
        # A weight outside the budget trains on until the next allocation sets it to 0.
        kept = self.live | (self.lamda.detach() != 0)
        kept[0] |= not kept.any()  # a layer without a budget: one direction of weight 0
        return {
            "A": self.Q.detach()[kept],
            "B": (self.P * self.lamda).detach()[:, kept],
            "scale": torch.tensor(self.scale, dtype=torch.float64),
        }

    def regularise(self, gamma: float) -> None:
        """Add the gradient of γ(‖PᵀP − 1‖_F² + ‖QQᵀ − 1‖_F²), equation (4)."""
        if self.P.grad is None or self.Q.grad is None:
            return
        for rows, grad in ((self.P.detach().T, self.P.grad.T), (self.Q.detach(), self.Q.grad)):
            excess = rows @ rows.T
            excess.diagonal().sub_(1)
            grad.addmm_(excess, rows, alpha=4 * gamma)

    def observe(self, beta1: float, beta2: float) -> None:
        """Average |w·∇w| and its deviation over steps, equations (8), (9) and (10)."""
        for name, parameter in self.trained().items():
            if parameter.grad is None:
                continue
            seen = (parameter.detach() * parameter.grad).abs()
            mean = getattr(self, f"importance_{name}").lerp_(seen, 1 - beta1)
            getattr(self, f"uncertainty_{name}").lerp_(seen.sub_(mean).abs_(), 1 - beta2)

    def score(self) -> torch.Tensor:
        """Importance of each triplet, (r,), equations (7) and (11)."""
        P, lamda, Q = (
            getattr(self, f"importance_{name}") * getattr(self, f"uncertainty_{name}")
            for name in ("P", "lamda", "Q")
        )
        return lamda + P.mean(0) + Q.mean(1)

    def cut(self) -> None:
        """Set λ of the triplets outside the budget to 0, equation (6)."""
        self.lamda.data.mul_(self.live)


@ADAPTERS.register
@dataclass(frozen=True)
class Adaptive(Method):
    """AdaLoRA: every layer starts above r, and the least important triplets of all go.

    Attributes
    ----------
    r : int
        Mean number of triplets of a layer in the end; single layers may have none, or init_r.
    init_r : int or None
        Triplets of every layer at the start, at least r; None: half more than r, or as many as
        fit.
    alpha : float or None
        α of the scaling rule, which takes r; None: 2·r.
    scaling : str
        How s follows from α and r: a file of lora_lab/scalings whose s does not train, as λ does.
    targets : str
        As of `AdapterConfig`.
    begin, end : float
        Shares of the training between which the budget falls; after `end` it is fixed.
    every : int
        Steps between two allocations.
    lr_ratio : float
        Learning rate of λ over that of P and Q, 1 in the paper. A step of λ moves σ by the rate,
        and a step of LoRA's B by the rate times about √out.
    gamma : float
        Weight of the penalty on P and Q that are not orthonormal; at least 0.
    beta1, beta2 : float
        Smoothing of importance and of its uncertainty, in [0, 1).
    """

    r: int = 8
    init_r: int | None = None
    alpha: float | None = None
    scaling: str = "alpha_over_r"
    targets: str = "all"
    begin: float = 0.1
    end: float = 0.7
    every: int = 10
    lr_ratio: float = 16.0
    gamma: float = 0.1
    beta1: float = 0.85
    beta2: float = 0.85

    rate: ClassVar[float] = 15.0

    def __post_init__(self) -> None:
        need(self.r >= 1, "adapter.r", "at least 1", self.r)
        known = self.init_r is None or self.init_r >= self.r
        need(known, "adapter.init_r", f"at least adapter.r = {self.r}", self.init_r)
        if self.alpha is not None:
            need_positive("adapter.alpha", self.alpha)
        SCALINGS.require(self.scaling)
        constant = [name for name, rule in SCALINGS.items() if not rule.trains]
        allowed = f"one of {', '.join(constant)} with adapter=adaptive"
        need(self.scaling in constant, "adapter.scaling", allowed, repr(self.scaling))
        need_span(self.begin, self.end, self.every)
        need_positive("adapter.lr_ratio", self.lr_ratio)
        need(0 <= self.gamma < math.inf, "adapter.gamma", "at least 0", self.gamma)
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            need(0 <= value < 1, f"adapter.{name}", "in [0, 1)", value)

    def resolved(self) -> Adaptive:
        """The same with α filled in."""
        return self if self.alpha is not None else dataclasses.replace(self, alpha=2.0 * self.r)

    def start(self, shape: tuple[int, int]) -> int:
        """Triplets of a layer (out, in) at the start."""
        return min(-(-3 * self.r // 2), *shape) if self.init_r is None else self.init_r

    def layers(self, shapes: Shapes) -> list[str]:
        chosen = select(self.targets, shapes)
        for layer in chosen:
            if self.init_r is None:
                need_fits("r", self.r, layer, shapes[layer])
            else:
                need_fits("init_r", self.init_r, layer, shapes[layer])
        return chosen

    def adapt(self, place: Place) -> Adapted:
        alpha = 2.0 * self.r if self.alpha is None else self.alpha
        scale = SCALINGS[self.scaling].scale(alpha, self.r)
        return AdaptiveLayer(place, self.start(place.shape), scale, self.lr_ratio)

    def parameters(self, shapes: Shapes) -> int:
        """Of the start: what the budget takes away still trains."""
        own = (shapes[layer] for layer in self.layers(shapes))
        return sum(self.start(shape) * (sum(shape) + 1) for shape in own)

    def flops(self, shapes: Shapes) -> int:
        own = (shapes[layer] for layer in self.layers(shapes))
        return sum(2 * self.start(shape) * sum(shape) for shape in own)

    def budget(self, layers: Mapping[str, AdaptiveLayer], done: float) -> int:
        """Triplets of all layers together, section 3.3; `done` from 0 to 1."""
        before = sum(len(layer.lamda) for layer in layers.values())
        return round(cubic(before, self.r * len(layers), done))

    def before_step(self, adapted: Mapping[str, Adapted], step: int, steps: int) -> None:
        for layer in own(adapted).values():
            layer.regularise(self.gamma)
            layer.observe(self.beta1, self.beta2)

    def after_step(
        self,
        adapted: Mapping[str, Adapted],
        step: int,
        steps: int,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        layers, (first, last) = own(adapted), span(self.begin, self.end, steps)
        done = progress(step, first, last, self.every)
        if done is not None:
            allocate(layers, self.budget(layers, done))
        if done is not None or step > last:
            for layer in layers.values():
                layer.cut()


def own(adapted: Mapping[str, Adapted]) -> dict[str, AdaptiveLayer]:
    """The layers of the method, by their type."""
    return {name: layer for name, layer in adapted.items() if isinstance(layer, AdaptiveLayer)}


def allocate(layers: Mapping[str, AdaptiveLayer], budget: int) -> None:
    """Give the budget to the most important triplets of all layers."""
    scores = [layer.score() for layer in layers.values()]
    live = torch.zeros(sum(map(len, scores)), dtype=torch.bool, device=scores[0].device)
    live[torch.cat(scores).topk(budget).indices] = True
    for layer, part in zip(layers.values(), live.split([len(s) for s in scores]), strict=True):
        layer.live.copy_(part)
