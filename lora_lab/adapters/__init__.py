"""Methods: how an update is parametrised. One file a method.

A method's config says which layers it changes and replaces each by an `Adapted` layer. `Adapted`
carries everything that differs between methods: the forward pass, the exact update, its factors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from lora_lab.probes import parts_norm
from lora_lab.registry import Registry

Shapes = Mapping[str, tuple[int, int]]


class Adapted(nn.Module, ABC):
    """A linear layer y = x (W0 + dW)ᵀ + bias with frozen W0 and a trainable dW.

    Attributes
    ----------
    W0 : Tensor, (out, in)
        The base weight, frozen.
    watched : bool
        While true, backward passes collect the gradient of the implicit weight W0 + dW.
    """

    W0_computes: ClassVar[bool] = True
    """Whether the forward pass uses W0, so that it is kept in the compute dtype."""

    W0: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        weight = linear.weight.detach()
        # GPT-2's Conv1D stores (in, out).
        weight = weight if isinstance(linear, nn.Linear) else weight.T.contiguous()
        self.register_buffer("W0", weight, persistent=False)
        # The layer's own bias parameter, so that `train.also=biases` trains it here too.
        self.bias = linear.bias
        self.watched = False
        self._gradient: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return (self.W0.shape[0], self.W0.shape[1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.adapted(x)
        if self.watched and y.requires_grad:
            seen = x.detach()
            y.register_hook(lambda D: self._watch(seen, D))
        return y

    def _watch(self, x: torch.Tensor, D: torch.Tensor) -> None:
        """Add DᵀX: the gradient of the implicit weight, in the dtype in which autograd would."""
        G = D.flatten(0, -2).T @ x.flatten(0, -2).to(D.dtype)
        # One micro-batch needs no wide copy: norms are taken in float32 or wider anyway.
        self._gradient = G if self._gradient is None else self._gradient.to(self.wide) + G

    def implicit_gradient(self) -> torch.Tensor | None:
        """G = ∂L/∂(W0 + dW), (out, in), summed over the micro-batches since `forget`.

        None before a watched backward pass.
        """
        return self._gradient

    def average(self, reduce: Callable[[torch.Tensor, str], torch.Tensor]) -> None:
        """Average the watched gradient over processes; a parameter's own already is."""
        if self._gradient is not None:
            self._gradient = reduce(self._gradient, "mean")

    def forget(self) -> None:
        """Drop the watched gradient."""
        self._gradient = None

    @property
    def wide(self) -> torch.dtype:
        """dtype of the trainable parameters: float32, or float64 where that is computed in."""
        return torch.promote_types(torch.float32, self.W0.dtype)

    @abstractmethod
    def adapted(self, x: torch.Tensor) -> torch.Tensor:
        """Output of the layer with its update."""

    @abstractmethod
    def tensors(self) -> dict[str, torch.Tensor]:
        """The exact dW: `A`, `B` and `scale` where the method has factors, else `dW`.

        `A` and `B` may be views of what trains; `dW` is made anew at each call.
        """

    def update_norm(self) -> torch.Tensor:
        """‖dW‖_F, a float64 scalar on the layer's device; 0 at dW = 0."""
        return parts_norm(self.tensors())

    @property
    def factors(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(A, B) as parameters, None where the method has none."""
        return None


class Method(Protocol):
    """What every registered adapter config can do."""

    rate: float

    def layers(self, shapes: Shapes) -> list[str]:
        """Layers that change; raises WrongInput for targets or ranges that do not fit."""

    def adapt(self, linear: nn.Module, layer: str, generator: torch.Generator) -> Adapted:
        """The layer's replacement, drawn from the generator."""

    def parameters(self, shapes: Shapes) -> int:
        """Trainable parameters of the update, by formula."""

    def peft_config(self, shapes: Shapes) -> dict[str, Any] | None:
        """Content of PEFT's adapter_config.json for shapes of the changed layers; None: dense."""


ADAPTERS: Registry[type[Any]] = Registry(__name__, "adapter")


def layer_seed(seed: int, layer: str) -> int:
    """A seed for one layer that does not depend on which other layers are changed."""
    words = np.frombuffer(
        layer.encode().ljust(-len(layer.encode()) % 4 + len(layer.encode())), dtype="<u4"
    )
    return int(np.random.SeedSequence([seed, *words.tolist()]).generate_state(1, np.uint64)[0] >> 1)


def attach(base: nn.Module, method: Method, shapes: Shapes, seed: int) -> dict[str, Adapted]:
    """Replace the target layers of a network in place.

    Parameters
    ----------
    base : nn.Module
        The network; every parameter of it is frozen by this call, biases included.
    method : Method
        The adapter config.
    shapes : mapping of str to (int, int)
        (out, in) of all its linear layers.
    seed : int
        Seed of the initial factors.

    Returns
    -------
    dict of str to Adapted
        The new layers by name, in the model's order.
    """
    base.requires_grad_(False)
    adapted: dict[str, Adapted] = {}
    for layer in method.layers(shapes):
        parent, _, name = layer.rpartition(".")
        owner = base.get_submodule(parent)
        generator = torch.Generator().manual_seed(layer_seed(seed, layer))
        adapted[layer] = method.adapt(getattr(owner, name), layer, generator)
        setattr(owner, name, adapted[layer])
    return adapted


def snapshot(adapted: Mapping[str, Adapted]) -> dict[str, np.ndarray]:
    """The updates of all layers as `<layer>.<part>` arrays, see `linalg.updates_of`."""
    return {
        f"{layer}.{part}": tensor.detach().cpu().numpy().copy()
        for layer, module in adapted.items()
        for part, tensor in module.tensors().items()
    }


def compute_in(base: nn.Module, dtype: torch.dtype) -> None:
    """Cast what is frozen to the compute dtype; what trains keeps its own."""
    for module in base.modules():
        for parameter in module.parameters(recurse=False):
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
        if getattr(module, "W0_computes", True):
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.is_floating_point():
                    setattr(module, name, buffer.to(dtype))


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """F.linear with weight and bias in the dtype of the input."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
