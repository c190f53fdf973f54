"""How the factors start. One file an init: ``init(out, in, r, generator[, needs]) -> (A, B)``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from lora_lab.registry import Registry

Factors = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Init:
    """One init.

    Attributes
    ----------
    draw : callable
        ``draw(out, in, r, generator, **needs) -> (A, B)``, Tensors (r, in) and (out, r), float32
        or wider.
    needs : tuple of str
        Keywords that it takes: `W0` (out, in) and `scale`, the s of dW = s·B·A, of the layer; and
        of `adapters.Place.material`, `gradient`, `activations`, `reference`.
    start : str
        What the network computes before the first step. `base`: B·A = 0. `subtracted`: s·B·A is
        taken from the frozen weight, so that the base network comes out again and
        dW = s(B·A − B₀·A₀). `moved`: W0 + s·B·A, another network than the base.
    """

    draw: Callable[..., Factors]
    needs: tuple[str, ...] = ()
    start: Literal["base", "subtracted", "moved"] = "base"

    def __call__(
        self, out: int, inner: int, r: int, generator: torch.Generator, **given: Any
    ) -> Factors:
        """A (r, in) and B (out, r) for a layer."""
        return self.draw(out, inner, r, generator, **{name: given[name] for name in self.needs})


INITS: Registry[Init] = Registry(__name__, "adapter.init")


def define(
    needs: tuple[str, ...] = (), start: Literal["base", "subtracted", "moved"] = "base"
) -> Callable[[Callable[..., Factors]], Init]:
    """Decorator: enter an init under the name of its file."""

    def enter(draw: Callable[..., Factors]) -> Init:
        return INITS.register(Init(draw, needs, start), draw.__module__)

    return enter


def upright(rows: torch.Tensor) -> torch.Tensor:
    """Signs (k,), 1 or -1, that make the largest entry of each row positive.

    Singular vectors are free in sign, and libraries differ in it.
    """
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))[:, 0]
    return torch.where(largest < 0, -1.0, 1.0).to(rows.dtype)


def svd(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U (m, q), S (q,) descending and Vh (q, n) of a matrix, in float64, with `upright` rows."""
    U, S, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    signs = upright(Vh)
    return U * signs, S, signs[:, None] * Vh


def balanced(U: torch.Tensor, S: torch.Tensor, Vh: torch.Tensor) -> Factors:
    """A = √S·Vh and B = U·√S, so that B·A = U·S·Vh and AAᵀ = BᵀB."""
    root = S.sqrt()
    return root[:, None] * Vh, U * root
