"""Projected full fine-tuning: dW is truncated to rank r every few steps and at the end.

The direct solver of min L(W0 + dW) subject to rank(dW) ≤ r, by projected gradient descent: the
truncated SVD is the projection on the matrices of rank ≤ r (Eckart & Young 1936). Jain, Meka &
Dhillon 2010, "Guaranteed rank minimization via singular value projection", NIPS.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lora_lab.adapters import ADAPTERS, Adapted, Place, Shapes, need_fits
from lora_lab.adapters.full import Full, FullLayer
from lora_lab.config import need


class ProjectedLayer(FullLayer):
    """A full layer whose update can be truncated."""

    def project(self, r: int) -> None:
        """Set W to W0 + dW_r, the nearest to W of all W0 + M with rank(M) ≤ r."""
        dW = self.W.detach().double() - self.W0.double()
        self.W.data.copy_(self.W0.double() + truncated(dW, r))


def truncated(matrix: torch.Tensor, r: int) -> torch.Tensor:
    """Its truncated SVD in float64, by projection on the leading vectors of the smaller side.

    These come from the Gram matrix, whose squared condition only blurs directions with singular
    values below 1e-8·σ₁, and these only among each other.

    >>> truncated(torch.tensor([[3.0, 0.0], [0.0, 4.0]]), 1).abs().tolist()
    [[0.0, 0.0], [0.0, 4.0]]
    """
    matrix = matrix.double()
    if matrix.shape[0] > matrix.shape[1]:
        return truncated(matrix.T, r).T
    U = torch.linalg.eigh(matrix @ matrix.T).eigenvectors[:, -r:]
    return U @ (U.T @ matrix)


@ADAPTERS.register
@dataclass(frozen=True)
class Projected(Full):
    """All entries of the target weights, projected on updates of low rank.

    Attributes
    ----------
    targets : str
        As of `AdapterConfig`.
    r : int
        Rank of the update after a projection, in [1, min(out, in)] of every target layer.
    every : int
        Steps between two projections; there is always one after the last step.
    """

    r: int = 8
    every: int = 1

    def __post_init__(self) -> None:
        need(self.r >= 1, "adapter.r", "at least 1", self.r)
        need(self.every >= 1, "adapter.every", "at least 1", self.every)

    def layers(self, shapes: Shapes) -> list[str]:
        chosen = super().layers(shapes)
        for layer in chosen:
            need_fits("r", self.r, layer, shapes[layer])
        return chosen

    def adapt(self, place: Place) -> Adapted:
        return ProjectedLayer(place)

    def after_step(
        self,
        adapted: Mapping[str, Adapted],
        step: int,
        steps: int,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        if step % self.every and step != steps:
            return
        for layer in adapted.values():
            assert isinstance(layer, ProjectedLayer)
            layer.project(self.r)
