"""A run ready to train: data and model loaded, restored, quantised, its layers replaced."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import torch
from torch import nn

from lora_lab.adapters import Adapted, attach, compute_in, layer_seed, weight_of
from lora_lab.adapters.full import FullLayer
from lora_lab.config import Host, RunConfig
from lora_lab.data import Problem
from lora_lab.linalg import Update
from lora_lab.linalg.quantize import quantize
from lora_lab.material import gather
from lora_lab.models import Examples, Model
from lora_lab.registry import WrongInput
from lora_lab.targets import select


@dataclass(frozen=True)
class Trained:
    """What a finished run left in its network.

    Attributes
    ----------
    updates : mapping of str to Update
        dW by layer.
    others : mapping of str to ndarray
        Whole parameters of the base network that trained, by name.
    quantize : str
        Storage of the base that dW is against, see `config.Quantization`.
    before : Trained, optional
        What the run that this one started from left.
    """

    updates: Mapping[str, Update] = field(default_factory=dict)
    others: Mapping[str, np.ndarray] = field(default_factory=dict)
    quantize: str = "none"
    before: Trained | None = None


@dataclass
class Setup:
    """A run ready to train.

    Attributes
    ----------
    adapted : dict of str to Adapted
        The changed layers by name.
    steps : int
        Optimizer steps of the whole run.
    base : dict of str to ndarray
        W0 of the changed layers, (out, in), float32 or wider.
    """

    config: RunConfig
    problem: Problem
    model: Model
    adapted: dict[str, Adapted]
    splits: dict[str, Examples]
    accelerator: accelerate.Accelerator
    steps: int
    base: dict[str, np.ndarray]


def prepare(
    config: RunConfig,
    host: Host,
    cache: Path,
    start: Trained | None = None,
    reference: Trained | None = None,
) -> Setup:
    """Load data and model and replace the target layers.

    Of the run that `model.start` names, dW by layer is added to the pretrained weight and whole
    parameters are put in its place; of the one that `adapter.reference` names, an init reads dW.

    The head and dropout draw from torch's global generator, seeded here with the run's seed;
    the factors of each layer draw from a generator of their own.
    """
    accelerator = accelerate.Accelerator(cpu=host.device == "cpu")
    processes = accelerator.num_processes
    if config.train.accumulate % processes:
        raise WrongInput(
            f"train.accumulate must be a multiple of the {processes} processes, which share a "
            f"step's micro-batches; got {config.train.accumulate}."
        )
    accelerator.gradient_accumulation_steps = config.train.accumulate // processes
    # Not as the run that it starts from, whose features have learned to fit the head drawn there.
    first = config.model.start
    torch.manual_seed(layer_seed(config.seed, first) if first else config.seed)
    problem = config.data.load()
    model = config.model.build(config.data, problem, config.train.dropout)
    shapes = config.model.shapes(config.data)
    if start is not None:
        restore(model.base, shapes, start)
    quantize_blocks(model.base, shapes, config.model.quantize.name)
    dtype = getattr(torch, config.train.precision.name)
    if dtype == torch.float64:
        model.double()
    splits = {name: config.model.encode(problem, name, cache) for name in problem.inputs}
    targets = config.adapter.layers(shapes)
    material = gather(model, splits["train"], targets, config.adapter.needs)
    if reference is not None:
        refer(material, reference.updates, shapes)
    adapted = attach(model.base, config.adapter, shapes, config.seed, material)
    base = {name: layer.W0.numpy() for name, layer in adapted.items()}
    inside = also_trains(model, adapted, config.train.also)
    if dtype == torch.bfloat16 and not inside:
        compute_in(model.base, dtype)
    elif dtype == torch.bfloat16:
        # Norms, biases or embeddings train too: they stay float32, products are cast one by one.
        model.features = _autocast(model.features, accelerator.device.type)
    model.to(accelerator.device)
    batches = math.ceil(len(splits["train"]) / config.train.batch_size)
    steps = max(1, math.ceil(config.train.epochs * batches / config.train.accumulate))
    return Setup(config, problem, model, adapted, splits, accelerator, steps, base)


@torch.no_grad()
def put_back(layers: Mapping[str, FullLayer], updates: Mapping[str, Update]) -> None:
    """Give the layers of a full fine-tuning W0 + dW."""
    for name, layer in layers.items():
        layer.W.copy_(layer.W0.double() + torch.from_numpy(updates[name].dense()))


def restore(base: nn.Module, shapes: Mapping[str, tuple[int, int]], left: Trained) -> None:
    """Put a pretrained network into the state in which a run, after those before it, left it."""
    if left.before is not None:
        restore(base, shapes, left.before)
    quantize_blocks(base, shapes, left.quantize)
    for layer, update in left.updates.items():
        weight = weight_of(base.get_submodule(layer))
        weight += torch.from_numpy(update.dense()).to(weight)
    for name, array in left.others.items():
        base.get_parameter(name).data.copy_(torch.from_numpy(array))


def quantize_blocks(base: nn.Module, shapes: Mapping[str, tuple[int, int]], kind: str) -> None:
    """Replace the linear weights in the blocks by what a storage gives back (`none`: nothing)."""
    for layer in select("all", shapes) if kind != "none" else ():
        weight = weight_of(base.get_submodule(layer))
        weight.copy_(torch.from_numpy(quantize(weight.numpy(), kind)))


def refer(
    material: Mapping[str, dict[str, Any]],
    updates: Mapping[str, Update],
    shapes: Mapping[str, tuple[int, int]],
) -> None:
    """Enter into each layer's material the `reference`, None where that run did not change it.

    Raises
    ------
    WrongInput
        If the run changed none of the layers, or changed layers of another shape.
    """
    shared = [layer for layer in material if layer in updates]
    if not shared:
        raise WrongInput(
            f"adapter.reference must name a run that changed layers of this one, such as "
            f"{next(iter(material))!r}; it changed {', '.join(sorted(updates)[:3]) or 'none'}."
        )
    for layer, own in material.items():
        update = own["reference"] = updates.get(layer)
        if update is not None and update.shape != shapes[layer]:
            raise WrongInput(
                f"adapter.reference must name a run of a model of the same shapes; layer {layer!r} "
                f"is {update.shape} there and {shapes[layer]} here."
            )


def _autocast(call: Callable[..., torch.Tensor], device: str) -> Callable[..., torch.Tensor]:
    def cast(batch: Any) -> torch.Tensor:
        with torch.autocast(device, dtype=torch.bfloat16):
            return call(batch).float()

    return cast


def also_trains(model: Model, adapted: Mapping[str, Adapted], words: str) -> bool:
    """Unfreeze the parameters that `train.also` names; whether any lies inside the base."""
    chosen = set(words.split("+"))
    if "classifier" not in chosen:
        model.classifier.requires_grad_(False)
    found = False
    changed = set(map(id, adapted.values()))
    for module in model.base.modules():
        is_norm = "Norm" in type(module).__name__
        is_embedding = isinstance(module, nn.Embedding)
        for name, parameter in module.named_parameters(recurse=False):
            if (
                ("norms" in chosen and is_norm)
                or ("embeddings" in chosen and is_embedding)
                or ("biases" in chosen and name == "bias" and not is_norm)
                or ("target_biases" in chosen and name == "bias" and id(module) in changed)
            ):
                parameter.requires_grad_(True)
                found = True
    return found
