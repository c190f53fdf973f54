"""Intrinsic-dimension training: the updates of all layers together are P·z with one z of length d.

Li et al. 2018, https://arxiv.org/abs/1804.08838; Aghajanyan et al. 2020,
https://arxiv.org/abs/2012.13255. P is random and fixed, dense or a Fastfood transform (Le et al.
2013, https://arxiv.org/abs/1408.3060), which is never formed.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import ClassVar

import torch
from torch import nn

from lora_lab.adapters import ADAPTERS, Adapted, Method, Place, Shapes, linear_sum
from lora_lab.config import need
from lora_lab.registry import WrongInput
from lora_lab.targets import select

LARGEST = 2**27
"""Most entries of a dense P: 0.5 GB in float32."""

RADIX = 64
"""Largest factor of a Walsh-Hadamard transform: a product with 64×64 costs one pass of memory."""


class Projection(Enum):
    """How P is made."""

    dense = "dense"
    fastfood = "fastfood"


class IntrinsicLayer(Adapted):
    """dW = the layer's rows of P·z, shaped (out, in).

    Parameters
    ----------
    place : Place
    z : nn.Parameter, (d,)
        The same object in every layer.
    total : int
        Rows of P over all layers.
    """

    def __init__(self, place: Place, z: nn.Parameter, total: int) -> None:
        super().__init__(place)
        self.z = z
        self.total = total

    @abstractmethod
    def product(self) -> torch.Tensor:
        """dW, (out, in), with its gradient."""

    def adapted(self, x: torch.Tensor) -> torch.Tensor:
        return linear_sum(x, self.W0, self.product(), self.bias)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"dW": self.product().detach()}


class DenseLayer(IntrinsicLayer):
    """P stored; entries N(0, 1) until `divide`."""

    P: torch.Tensor

    def __init__(self, place: Place, z: nn.Parameter, total: int) -> None:
        super().__init__(place, z, total)
        P = torch.randn(self.W0.numel(), len(z), generator=place.generator)
        self.register_buffer("P", P.to(self.wide), persistent=False)

    def product(self) -> torch.Tensor:
        return (self.P @ self.z).view(self.shape)


class FastfoodLayer(IntrinsicLayer):
    """Blocks H·G·Π·H·B/√(n·total) of n = 2^⌈log₂ d⌉ rows each, the last one cut.

    B are random signs and G normal numbers, new in every block (scaled to √n together), Π a
    permutation shared by the layer's blocks: given Π they are independent. All columns of a whole
    block have the same length, so that those of P have length 1 up to the cut of each layer.
    """

    signs: torch.Tensor
    gains: torch.Tensor
    order: torch.Tensor

    def __init__(self, place: Place, z: nn.Parameter, total: int) -> None:
        super().__init__(place, z, total)
        n = 1 << (len(z) - 1).bit_length()
        blocks = -(-self.W0.numel() // n)
        random = place.generator
        signs = torch.randint(0, 2, (blocks, n), generator=random) * 2.0 - 1
        gains = torch.randn(blocks, n, generator=random)
        gains /= gains.square().mean(1, keepdim=True).sqrt() * (n * total) ** 0.5
        for name, tensor in (("signs", signs), ("gains", gains)):
            self.register_buffer(name, tensor.to(self.wide), persistent=False)
        self.register_buffer("order", torch.randperm(n, generator=random), persistent=False)

    def product(self) -> torch.Tensor:
        z = nn.functional.pad(self.z, (0, self.gains.shape[1] - len(self.z)))
        rows = walsh_hadamard(self.signs * z).index_select(1, self.order)
        rows = walsh_hadamard(self.gains * rows)
        return rows.flatten()[: self.W0.numel()].view(self.shape)


def walsh_hadamard(rows: torch.Tensor) -> torch.Tensor:
    """Each row (…, n) times the Hadamard matrix of order n = 2^k, which is not normalised.

    One product for each factor of n of at most `RADIX`, as H_ab = H_a ⊗ H_b; H is symmetric, so
    that autograd's gradient is the same transform.

    >>> walsh_hadamard(torch.tensor([[1.0, 0.0, 1.0, 0.0]])).tolist()
    [[2.0, 2.0, 0.0, 0.0]]
    """
    shape, n = rows.shape, rows.shape[-1]
    after = 1
    while after < n:
        order = min(RADIX, n // after)
        H = hadamard(order).to(rows)
        rows = rows.reshape(-1, order) @ H if after == 1 else H @ rows.view(-1, order, after)
        after *= order
    return rows.reshape(shape)


@lru_cache
def hadamard(order: int) -> torch.Tensor:
    """Hadamard matrix of a power of 2 in Sylvester's order, float64.

    >>> hadamard(2).tolist()
    [[1.0, 1.0], [1.0, -1.0]]
    """
    H = torch.ones(1, 1, dtype=torch.float64)
    while len(H) < order:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return H


@ADAPTERS.register
@dataclass(frozen=True)
class Intrinsic(Method):
    """Training in a random subspace of all target weights.

    Attributes
    ----------
    d : int
        Dimension of the random subspace: the only parameters that train.
    projection : Projection
        `dense` holds entries × d numbers, for small models; `fastfood` few times the entries.
    targets : str
        As of `AdapterConfig`.
    """

    d: int = 1024
    projection: Projection = Projection.fastfood
    targets: str = "all"

    rate: ClassVar[float] = 50.0

    def __post_init__(self) -> None:
        need(self.d >= 1, "adapter.d", "at least 1", self.d)

    def layers(self, shapes: Shapes) -> list[str]:
        chosen = select(self.targets, shapes)
        total = entries(shapes[layer] for layer in chosen)
        need(self.d <= total, "adapter.d", f"at most the {total} entries of the targets", self.d)
        if self.projection is Projection.dense and self.d * total > LARGEST:
            raise WrongInput(
                f"a dense projection of {total} entries holds at most d = {LARGEST // total}; got "
                f"{self.d}. Lower adapter.d or use adapter.projection=fastfood."
            )
        return chosen

    def adapt(self, place: Place) -> Adapted:
        raise AssertionError("the layers share z: adapt_all")

    def adapt_all(self, places: Iterable[Place]) -> dict[str, Adapted]:
        places = list(places)
        total = entries(place.shape for place in places)
        wide = torch.promote_types(torch.float32, places[0].W0.dtype)
        z = nn.Parameter(torch.zeros(self.d, dtype=wide))
        if self.projection is Projection.fastfood:
            return {place.layer: FastfoodLayer(place, z, total) for place in places}
        layers = {place.layer: DenseLayer(place, z, total) for place in places}
        length = sum(layer.P.square().sum(0) for layer in layers.values()) ** 0.5
        for layer in layers.values():
            layer.P /= length
        return dict(layers)

    def parameters(self, shapes: Shapes) -> int:
        return self.d if self.layers(shapes) else 0

    def flops(self, shapes: Shapes) -> int:
        """Of the dense update; its forming, once a pass, is not counted."""
        return 2 * entries(shapes[layer] for layer in self.layers(shapes))


def entries(shapes: Iterable[tuple[int, int]]) -> int:
    """Entries of matrices of these shapes together."""
    return sum(out * inner for out, inner in shapes)
