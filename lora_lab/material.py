"""What inits read of the base network before training: mean gradients and input moments."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from lora_lab.models import Examples, Model

BATCHES, BATCH = 8, 32
"""How many training examples are looked at: the first of the split, which depend on no seed."""


def gather(
    model: Model, examples: Examples, layers: Sequence[str], needs: Iterable[str]
) -> dict[str, dict[str, Any]]:
    """Gradients and activations of the base network's layers.

    Parameters
    ----------
    model : Model
        With plain linear layers and its head, before anything is frozen.
    examples : Examples
        The training split.
    layers : sequence of str
        The layers to look at.
    needs : iterable of str
        `gradient` and `activations`; other words are left to others.

    Returns
    -------
    dict of str to dict
        By layer. `gradient`: of the mean loss at W0, (out, in). `activations`: E[x xᵀ], (in, in),
        over the tokens that are no padding. float64 Tensors.
    """
    found: dict[str, dict[str, Any]] = {layer: {} for layer in layers}
    needs = set(needs)
    count = min(len(examples), BATCHES * BATCH)
    mask: list[torch.Tensor | None] = [None]
    tokens = 0
    hooks = []
    for layer in layers:
        module = model.base.get_submodule(layer)
        if "activations" in needs:
            hooks.append(module.register_forward_hook(partial(_inputs, found[layer], mask)))
        if "gradient" in needs:
            hooks.append(module.register_forward_hook(partial(_gradient, found[layer])))
    model.eval()
    for begin in range(0, count if hooks else 0, BATCH):
        batch = examples.collate(range(begin, min(begin + BATCH, count)))
        mask[0] = batch.get("attention_mask")
        tokens += len(batch["targets"]) if mask[0] is None else int(mask[0].sum())
        loss = model.loss(model(batch), batch["targets"])
        if "gradient" in needs:
            (len(batch["targets"]) / count * loss).backward()
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    for material in found.values():
        if "activations" in material:
            material["activations"] /= tokens
    return found


def _inputs(
    own: dict[str, Any],
    mask: list[torch.Tensor | None],
    _: nn.Module,
    given: tuple[Any, ...],
    y: Any,
) -> None:
    x = given[0].detach()
    rows = x.flatten(0, -2) if mask[0] is None else x[mask[0].bool()]
    own["activations"] = own.get("activations", 0) + (rows.T @ rows).double()


def _gradient(own: dict[str, Any], _: nn.Module, given: tuple[Any, ...], y: torch.Tensor) -> None:
    seen = given[0].detach().flatten(0, -2)

    def add(D: torch.Tensor) -> None:
        own["gradient"] = own.get("gradient", 0) + (D.flatten(0, -2).T @ seen).double()

    y.register_hook(add)
