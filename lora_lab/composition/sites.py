"""What adapters add to one module: thin products, dense ones, rows of a table, other parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import nn

from lora_lab.linalg import Factored, Update
from lora_lab.models.hf import LINEAR
from lora_lab.registry import WrongInput


@dataclass(frozen=True)
class Rows:
    """The adapter of each row of a batch, None for the base alone."""

    names: tuple[str | None, ...]

    @cached_property
    def groups(self) -> dict[str, list[int]]:
        """Positions of the rows of each adapter."""
        found: dict[str, list[int]] = {}
        for i, name in enumerate(self.names):
            if name is not None:
                found.setdefault(name, []).append(i)
        return found

    def need(self, rows: int, layer: str) -> None:
        """Raise `WrongInput` unless a batch has as many rows."""
        if rows != len(self.names):
            raise WrongInput(
                f"route was given {len(self.names)} names; layer {layer!r} sees a batch of {rows} "
                "rows. Give one name for each row."
            )


@dataclass(frozen=True)
class Product:
    """x ↦ x·right·left of a layer, with the scale in `left`; for a dense dW `left` is None.

    Attributes
    ----------
    right : Tensor (in, r), or (in, out)
    left : Tensor (r, out) or None
    """

    right: torch.Tensor
    left: torch.Tensor | None

    def __call__(self, x: torch.Tensor, table: bool) -> torch.Tensor:
        """The product; of a table x holds indices of rows of `right`."""
        seen = self.right[x] if table else x.to(self.right.dtype) @ self.right
        return seen if self.left is None else seen @ self.left


class Site:
    """One module of the network, and what each adapter adds to it.

    Parameters
    ----------
    layer : str
        Its name.
    module : nn.Module
    """

    def __init__(self, layer: str, module: nn.Module) -> None:
        self.layer, self.module = layer, module
        self.table = isinstance(module, nn.Embedding)
        self.linear = isinstance(module, LINEAR)
        self.outputs_first = isinstance(module, (nn.Linear, nn.Embedding))
        self.updates: dict[str, Update] = {}
        self.products: dict[str, Product] = {}
        self.differences: dict[str, dict[str, torch.Tensor]] = {}
        self._stack: tuple[dict[str, int], torch.Tensor, torch.Tensor] | None = None

    @property
    def _like(self) -> torch.Tensor:
        """An empty tensor on the weight's device, in float32 or wider."""
        weight = self.module.weight
        return weight.detach().new_empty(0, dtype=torch.promote_types(torch.float32, weight.dtype))

    def add_update(self, name: str, update: Update) -> None:
        """Enter dW of an adapter: (out, in), of a table as the table lies."""
        if not (self.table or self.linear):
            raise WrongInput(
                f"adapter {name!r} changes {self.layer!r}, a {type(self.module).__name__}; linear "
                "layers and embeddings can be changed, in a network without other adapters."
            )
        weight = self.module.weight
        m, n = weight.shape if self.outputs_first else weight.T.shape
        if update.shape != (m, n):
            raise WrongInput(
                f"adapter {name!r} has an update of {update.shape[0]}×{update.shape[1]} for layer "
                f"{self.layer!r} ({m}×{n}). Give the base network that it was made from."
            )
        self.updates[name] = update
        if isinstance(update, Factored):
            right, left = update.A.T, update.scale * update.B.T
            if self.table:
                right, left = update.scale * update.B, update.A
            self.products[name] = Product(self._tensor(right), self._tensor(left))
        else:
            dense = update.dense() if self.table else update.dense().T
            self.products[name] = Product(self._tensor(dense), None)

    def add_difference(self, name: str, leaf: str, difference: np.ndarray) -> None:
        """Enter how an adapter changes another parameter of the module."""
        self.differences.setdefault(name, {})[leaf] = torch.from_numpy(difference)

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._like)

    def _change(self, weights: Mapping[str, float]) -> dict[str, torch.Tensor]:
        """Σ c·difference of the parameters that were saved whole, float64."""
        total: dict[str, torch.Tensor] = {}
        for name, weight in weights.items():
            for leaf, difference in self.differences.get(name, {}).items():
                total[leaf] = total.get(leaf, 0) + weight * difference
        return total

    def _with_change(
        self, x: torch.Tensor, y: torch.Tensor, weights: Mapping[str, float]
    ) -> torch.Tensor:
        """y as the module gives it with its changed parameters."""
        change = self._change(weights)
        if not change:
            return y
        if self.linear and set(change) == {"bias"}:
            return y + change["bias"].to(y)
        own = {leaf: getattr(self.module, leaf) for leaf in change}
        new = {n: (p.double() + change[n].to(p.device)).to(p.dtype) for n, p in own.items()}
        hooks = self.module._forward_hooks
        # The module itself, without the hook that called this.
        self.module._forward_hooks = type(hooks)()
        try:
            out: torch.Tensor = torch.func.functional_call(self.module, new, (x,))
        finally:
            self.module._forward_hooks = hooks
        return out

    def summed(
        self, x: torch.Tensor, y: torch.Tensor, weights: Mapping[str, float]
    ) -> torch.Tensor:
        """What the module gives with a weighted sum of adapters; y: with none."""
        out = self._with_change(x, y, weights)
        for name, weight in weights.items():
            if name in self.products:
                out = out + (weight * self._product(name)(x, self.table)).to(out.dtype)
        return out

    def _product(self, name: str) -> Product:
        """Its product, on the module's device."""
        product, device = self.products[name], self.module.weight.device
        if product.right.device != device:
            left = None if product.left is None else product.left.to(device)
            product = self.products[name] = Product(product.right.to(device), left)
        return product

    def routed(self, x: torch.Tensor, y: torch.Tensor, rows: Rows) -> torch.Tensor:
        """What the module gives where each row has an adapter of its own."""
        rows.need(len(x), self.layer)
        thin = {n for n, p in self.products.items() if p.left is not None and not self.table}
        out = y.clone()
        for name, at in rows.groups.items():
            alone = {name: 1.0}
            if name not in thin and (name in self.products or name in self.differences):
                out[at] = self.summed(x[at], y[at], alone)
            elif name in self.differences:
                out[at] = self._with_change(x[at], y[at], alone)
        return out + self._gathered(x, rows).to(y.dtype) if thin & set(rows.groups) else out

    def _gathered(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        """Every row's thin product at once: factors gathered by row, two batched products."""
        places, right, left = self._stacked()
        at = torch.tensor([places.get(name or "", 0) for name in rows.names], device=x.device)
        seen = x.reshape(len(x), -1, x.shape[-1]).to(right.dtype)
        out = torch.bmm(torch.bmm(seen, right[at]), left[at])
        return out.reshape(*x.shape[:-1], -1)

    def _stacked(self) -> tuple[dict[str, int], torch.Tensor, torch.Tensor]:
        """All thin factors, those of smaller r with zeros; place 0 is no adapter."""
        device = self.module.weight.device
        if self._stack is None or self._stack[1].device != device:
            found = {n: self._product(n) for n, p in self.products.items() if p.left is not None}
            r = max(p.right.shape[1] for p in found.values())
            some = next(iter(found.values()))
            assert some.left is not None
            right = some.right.new_zeros(len(found) + 1, len(some.right), r)
            left = some.right.new_zeros(len(found) + 1, r, some.left.shape[1])
            for i, product in enumerate(found.values(), 1):
                assert product.left is not None
                right[i, :, : product.right.shape[1]] = product.right
                left[i, : len(product.left)] = product.left
            self._stack = {name: i for i, name in enumerate(found, 1)}, right, left
        return self._stack

    def merged(self, weights: Mapping[str, float]) -> dict[str, torch.Tensor]:
        """The parameters that a weighted sum changes, summed in float64 and rounded once."""
        total = self._change(weights)
        for name, weight in weights.items():
            if name in self.updates:
                dW = torch.from_numpy(weight * self.updates[name].dense())
                own = dW if self.outputs_first else dW.T
                total["weight"] = total.get("weight", 0) + own
        own_parameters = {leaf: getattr(self.module, leaf).detach() for leaf in total}
        return {
            leaf: (old.double() + total[leaf].to(old.device)).to(old.dtype)
            for leaf, old in own_parameters.items()
        }
