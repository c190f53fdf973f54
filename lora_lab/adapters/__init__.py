"""Methods: how an update is parametrised. One file a method.

A method's config says which layers it changes and replaces each by an `Adapted` layer. `Adapted`
carries everything that differs between methods: the forward pass, the exact update, its factors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from lora_lab.config import AdapterConfig
from lora_lab.probes import parts_norm
from lora_lab.registry import Registry, WrongInput

Shapes = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Place:
    """One layer that a method is to change, and what is known of it.

    Attributes
    ----------
    layer : str
        Its name in the base network.
    linear : nn.Module
        The layer itself: nn.Linear, or Conv1D, which stores its weight transposed.
    generator : torch.Generator
        A stream of the layer's own, the same whichever other layers change.
    material : mapping of str to Any
        What the method `needs`: `gradient`, the mean gradient of the loss at the base weight, and
        `activations`, E[x xᵀ] of the layer's inputs, both float64 Tensors from the first batches;
        `reference`, the update of the run that `adapter.reference` names, None where it did not
        change the layer.
    """

    layer: str
    linear: nn.Module
    generator: torch.Generator
    material: Mapping[str, Any] = field(default_factory=dict)

    @property
    def W0(self) -> torch.Tensor:
        """The base weight (out, in), detached, in its own dtype."""
        return weight_of(self.linear).contiguous()

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        out, inner = weight_of(self.linear).shape
        return out, inner


def weight_of(linear: nn.Module) -> torch.Tensor:
    """The weight of a linear layer as a detached view (out, in); Conv1D stores it transposed."""
    weight: torch.Tensor = linear.weight.detach()
    return weight if isinstance(linear, nn.Linear) else weight.T


class Adapted(nn.Module, ABC):
    """A linear layer y = x (W0 + dW)ᵀ + bias with frozen W0 and a trainable dW.

    Whatever else a method must remember from step to step is a persistent buffer: checkpoints
    hold parameters and persistent buffers. Parameters are contiguous, as what they hold comes back.

    Attributes
    ----------
    W0 : Tensor, (out, in)
        The base weight, frozen.
    watched : bool
        While true, backward passes collect the gradient of the implicit weight W0 + dW.
    merged : Tensor, (out, in), or None
        W0 + dW after `merge`, with which the layer then computes.
    computes : tuple of str
        Frozen buffers that the forward pass uses, and that are kept in the compute dtype.
    rates : mapping of str to float
        Learning rates of single parameters as multiples of the run's; 1 where nothing is said.
    """

    W0: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.register_buffer("W0", place.W0, persistent=False)
        # The layer's own bias parameter, so that `train.also=biases` trains it here too.
        self.bias = place.linear.bias
        self.watched = False
        self.merged: torch.Tensor | None = None
        self.computes: tuple[str, ...] = ("W0",)
        self.rates: Mapping[str, float] = {}
        self._gradient: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return (self.W0.shape[0], self.W0.shape[1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.merged is not None:
            return linear(x, self.merged, self.bias)
        y = self.adapted(x)
        if self.watched and y.requires_grad:
            seen = x.detach()
            y.register_hook(lambda D: self._watch(seen, D))
        return y

    def merge(self) -> None:
        """Compute with W0 + dW from now on, added in float64; merging twice adds once.

        W0 stays as it is, so that `unmerge` restores the layer exactly.
        """
        dW = parts_dense(self.tensors()).to(self.W0.device)
        self.merged = (self.W0.double() + dW).to(self.W0.dtype)

    def unmerge(self) -> None:
        """Compute with W0 and the update apart again; bitwise the layer before `merge`."""
        self.merged = None

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
    def live_r(self) -> int | None:
        """Directions that the update has now; None for methods in which that does not change."""
        return None

    @property
    def factors(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(A, B) as parameters, None where the method has none."""
        return None


class Method(AdapterConfig, ABC):
    """Base of every `adapters/NAME.py` config, a frozen dataclass."""

    @property
    def needs(self) -> frozenset[str]:
        """What of `Place.material` the method's start is made from."""
        return frozenset()

    @abstractmethod
    def layers(self, shapes: Shapes) -> list[str]:
        """Layers that change; raises WrongInput for targets or ranges that do not fit."""

    @abstractmethod
    def adapt(self, place: Place) -> Adapted:
        """The layer's replacement."""

    def adapt_all(self, places: Iterable[Place]) -> dict[str, Adapted]:
        """All replacements by layer; layers of most methods know nothing of each other."""
        return {place.layer: self.adapt(place) for place in places}

    @abstractmethod
    def parameters(self, shapes: Shapes) -> int:
        """Trainable parameters of the update, by formula."""

    @abstractmethod
    def flops(self, shapes: Shapes) -> int:
        """Floating-point operations that the update adds to one token's forward pass through the
        target layers, by formula; a multiply-add is two. After merging there are none."""

    def before_step(self, adapted: Mapping[str, Adapted], step: int, steps: int) -> None:
        """Called with the gradients of step 1 … `steps`, before they are clipped and used."""

    def after_step(
        self,
        adapted: Mapping[str, Adapted],
        step: int,
        steps: int,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Called after the optimizer's step; what it remembers of a parameter may be changed."""


ADAPTERS: Registry[type[Any]] = Registry(__name__, "adapter")


def need_fits(key: str, r: int, layer: str, shape: tuple[int, int]) -> None:
    """Refuse a rank, the value of `adapter.<key>`, above the smaller side of a layer."""
    out, inner = shape
    if r > min(out, inner):
        raise WrongInput(
            f"{key} must be in [1, {min(out, inner)}] for layer {layer!r} ({out}×{inner}); got "
            f"{r}. Lower adapter.{key} or leave this layer out of adapter.targets."
        )


def layer_seed(seed: int, layer: str) -> int:
    """A seed for one layer that does not depend on which other layers are changed."""
    words = np.frombuffer(
        layer.encode().ljust(-len(layer.encode()) % 4 + len(layer.encode())), dtype="<u4"
    )
    return int(np.random.SeedSequence([seed, *words.tolist()]).generate_state(1, np.uint64)[0] >> 1)


def attach(
    base: nn.Module,
    method: Method,
    shapes: Shapes,
    seed: int,
    material: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Adapted]:
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
    material : mapping of str to mapping
        `Place.material` by layer.

    Returns
    -------
    dict of str to Adapted
        The new layers by name, in the model's order.
    """
    base.requires_grad_(False)
    places = [
        Place(
            layer,
            base.get_submodule(layer),
            torch.Generator().manual_seed(layer_seed(seed, layer)),
            (material or {}).get(layer, {}),
        )
        for layer in method.layers(shapes)
    ]
    adapted = method.adapt_all(places)
    for layer, module in adapted.items():
        parent, _, name = layer.rpartition(".")
        setattr(base.get_submodule(parent), name, module)
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
        computes = getattr(module, "computes", None)
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point() and (computes is None or name in computes):
                setattr(module, name, buffer.to(dtype))


def parts_dense(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """dW of what `Adapted.tensors` gives, as a float64 matrix (out, in)."""
    if "dW" in parts:
        return parts["dW"].double()
    return parts["scale"].double() * (parts["B"].double() @ parts["A"].double())


def computed(x: torch.Tensor) -> torch.Tensor:
    """The input in the dtype of products: autocast does not look inside custom functions."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x


def linear_sum(
    x: torch.Tensor, W0: torch.Tensor, dW: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """x (W0 + dW)ᵀ + bias with a dense dW that may have a gradient."""
    x = computed(x)
    if x.dtype == dW.dtype:
        return linear(x, W0 + dW, bias)
    # The sum in a narrow dtype would lose most of a small dW.
    return linear(x, W0, bias) + linear(x, dW, None)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """F.linear with weight and bias in the dtype of the input."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
