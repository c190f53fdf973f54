"""Dynamic rank: singular values below a threshold are dropped, saturated layers grow.

Every layer has room for r directions, of which the first `live` are in use. A cut turns the factors
to the singular basis of dW first, so that it is the truncated SVD and the best update of its rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lora_lab.adapters import ADAPTERS, Adapted, Place, layer_seed
from lora_lab.adapters.lora import LoRA, LoRALayer, need_drawn
from lora_lab.config import need
from lora_lab.gradual import need_span, progress, span
from lora_lab.inits import INITS

Rows = dict[str, torch.Tensor]
"""A factor (`value`) and the optimizer's moments of it, with one row for each direction."""


class DynamicLayer(LoRALayer):
    """LoRA of the first `live` rows of A and columns of B; the others are 0 and wait."""

    live: torch.Tensor

    def __init__(self, place: Place, A: torch.Tensor, B: torch.Tensor, config: Dynamic) -> None:
        super().__init__(place, A, B, config)
        assert config.start_r is not None, "resolved by the method"
        live = min(config.start_r, len(A))
        self.register_buffer("live", torch.tensor(live))
        self.A.data[live:], self.B.data[:, live:] = 0, 0
        self.init, self.seed = config.init, place.generator.initial_seed()

    @property
    def live_r(self) -> int:
        return int(self.live)

    def scaled(self) -> tuple[torch.Tensor, torch.Tensor, float]:
        A, B, scale = super().scaled()
        return A[: self.live_r], B[:, : self.live_r], scale

    def resize(
        self, threshold: float, grow: int, step: int, optimizer: torch.optim.Optimizer
    ) -> None:
        """Drop directions below ``threshold·σ₁``; where there are none, add `grow` fresh ones.

        The optimizer's moments are carried over: first moments turn as gradients do, exactly;
        second moments as if the gradients of the directions were uncorrelated; a fresh direction
        gets the mean second moment of the live ones, so that its steps are as long as theirs.
        Fresh directions depend on the layer, the run's seed and `step` alone.
        """
        live, rows = self.live_r, self._rows(optimizer)
        sigma, to_A, to_B = balancing(rows[0]["value"][:live], rows[1]["value"][:live].T)
        kept = int((sigma >= threshold * sigma[0]).sum())
        if kept < live:
            turn(rows[0], to_A[:kept], to_B[:, :kept].T)
            turn(rows[1], to_B[:, :kept].T, to_A[:kept])
            self.live.fill_(kept)
        elif sigma[0] > 0 and live < len(self.A):
            self._grow(min(live + grow, len(self.A)), step, rows)

    def _rows(self, optimizer: torch.optim.Optimizer) -> tuple[Rows, Rows]:
        """A, and B transposed; all are views."""
        found = [
            {"value": p.detach()}
            | {k: m for k, m in optimizer.state.get(p, {}).items() if m is not None and m.dim()}
            for p in (self.A, self.B)
        ]
        return found[0], {name: tensor.T for name, tensor in found[1].items()}

    def _grow(self, live: int, step: int, rows: tuple[Rows, Rows]) -> None:
        generator = torch.Generator().manual_seed(layer_seed(self.seed, f"step {step}"))
        A, B = INITS[self.init](*self.shape, len(self.A), generator)
        before = self.live_r
        for own, drawn in zip(rows, (A, B.T), strict=True):
            own["value"][before:live] = drawn[before:live].to(own["value"])
            if "exp_avg_sq" in own:
                own["exp_avg_sq"][before:live] = own["exp_avg_sq"][:before].mean(0)
        self.live.fill_(live)


def balancing(A: torch.Tensor, B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """How the factors turn to U√Σ and √ΣVᵀ of BA, by the SVD of their QR core.

    Returns
    -------
    sigma : Tensor, (r,)
        Singular values of BA, descending; float64 as all of them.
    to_A, to_B : Tensor, (r, r)
        ``to_A @ A = √ΣVᵀ``, ``B @ to_B = U√Σ`` and ``to_A @ to_B = 1``, not finite where σ = 0.

    >>> A, B = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 8.0], [2.0, 0.0]])
    >>> sigma, to_A, to_B = balancing(A, B)
    >>> sigma.tolist(), (B.double() @ to_B).abs().square().round(decimals=9).tolist()
    ([8.0, 4.0], [[8.0, 0.0], [0.0, 4.0]])
    """
    R_B, R_A = torch.linalg.qr(B.double()).R, torch.linalg.qr(A.T.double()).R
    U, sigma, Vh = torch.linalg.svd(R_B @ R_A.T)
    root = sigma.sqrt()
    return sigma, U.T @ R_B / root[:, None], R_A.T @ Vh.T / root


def turn(rows: Rows, matrix: torch.Tensor, dual: torch.Tensor) -> None:
    """Map the rows of a factor by `matrix` (kept, live) and the moments by its `dual`, in place."""
    maps = {"value": matrix, "exp_avg_sq": dual**2}
    for name, tensor in rows.items():
        by = maps.get(name, dual)
        turned = by @ tensor[: by.shape[1]].double()
        tensor.zero_()
        tensor[: len(turned)] = turned.to(tensor)


@ADAPTERS.register
@dataclass(frozen=True)
class Dynamic(LoRA):
    """LoRA whose rank per layer follows its singular values.

    Attributes
    ----------
    r : int
        The most directions of a layer; so much is allocated.
    alpha, scaling, init, targets, dropout, r_pattern, alpha_pattern, lr_ratio
        As of LoRA, with s by r; `init` one that draws at random. A never freezes.
    start_r : int or None
        Directions at the start, in [1, r]; None: half of r.
    threshold : float
        Directions with σ below this share of σ₁ are dropped, in (0, 1).
    grow : int
        Directions that a layer gets where all of its own are above the threshold; 0: never.
    begin, end : float
        Shares of the training between which ranks change.
    every : int
        Steps between two changes.
    """

    start_r: int | None = None
    threshold: float = 0.1
    grow: int = 1
    begin: float = 0.1
    end: float = 0.8
    every: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        known = self.start_r is None or 1 <= self.start_r <= self.r
        need(known, "adapter.start_r", f"in [1, adapter.r = {self.r}]", self.start_r)
        need(0 < self.threshold < 1, "adapter.threshold", "in (0, 1)", self.threshold)
        need(self.grow >= 0, "adapter.grow", "at least 0", self.grow)
        need_span(self.begin, self.end, self.every)
        need_drawn(self.init, "dynamic")
        need(not self.freeze_a, "adapter.freeze_a", "false with adapter=dynamic", self.freeze_a)

    def resolved(self) -> Dynamic:
        """The same with α and the start written out."""
        start = max(1, self.r // 2) if self.start_r is None else self.start_r
        alpha = 2.0 * self.r if self.alpha is None else self.alpha
        return dataclasses.replace(self, alpha=alpha, start_r=start)

    def adapt(self, place: Place) -> Adapted:
        return DynamicLayer(place, *self.start_of(place), self.resolved())

    def after_step(
        self,
        adapted: Mapping[str, Adapted],
        step: int,
        steps: int,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        if progress(step, *span(self.begin, self.end, steps), self.every) is None:
            return
        for layer in adapted.values():
            assert isinstance(layer, DynamicLayer)
            layer.resize(self.threshold, self.grow, step, optimizer)
