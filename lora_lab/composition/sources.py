"""Where adapters come from: PEFT's folders, finished runs, updates in memory."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import nn

from lora_lab.checkpoints.names import to_base
from lora_lab.checkpoints.peft import oriented, read_whole_adapter
from lora_lab.linalg import Dense, Factored, Update
from lora_lab.measuring import kept
from lora_lab.models.hf import LINEAR
from lora_lab.registry import WrongInput
from lora_lab.store import RunDir
from lora_lab.tensorfile import StoredTensor, local_folder, some

TWICE = {"modules_to_save", "original_module"}
"""Parts of names inside PEFT's wrapper of a module that is saved whole."""

Source: TypeAlias = "str | Path | RunDir | Mapping[str, Update]"


@dataclass(frozen=True)
class Changes:
    """All that an adapter does to a network.

    Attributes
    ----------
    updates : mapping of str to Update
        dW by layer, (out, in) also for Conv1D; of an embedding (rows, columns) as it lies.
    others : mapping of str to ndarray
        New minus old, float64, of other parameters by name.
    """

    updates: Mapping[str, Update]
    others: Mapping[str, np.ndarray] = field(default_factory=dict)


def read(network: nn.Module, source: Source) -> Changes:
    """The changes that a source makes to a network; see `composition.compose`."""
    if isinstance(source, Mapping):
        return Changes(source)
    if isinstance(source, RunDir):
        return _of_run(network, source)
    folder = local_folder(source, "adapter")
    run = RunDir(folder)
    # A run has its own config beside PEFT's.
    if run.has_json("config") and run.has_tensors("head"):
        return _of_run(network, run)
    return _of_folder(network, folder)


def _of_run(network: nn.Module, run: RunDir) -> Changes:
    if run.status() != "done":
        raise WrongInput(f"run {run.run_id} is not done; it cannot be composed.")
    updates, whole = kept(run)
    if not whole:
        raise WrongInput(
            f"run {run.run_id} kept only the leading directions of its update; do it again with "
            "host.keep=all in a new results folder."
        )
    saved = {
        name.removeprefix("base."): array.astype(np.float64)
        for name, array in run.read_tensors("head").items()
        if name.startswith("base.")
    }
    return Changes(updates, {n: new - _array(network, n) for n, new in saved.items()})


def _of_folder(network: nn.Module, folder: Path) -> Changes:
    held = read_whole_adapter(folder)
    parameters = dict(network.named_parameters(remove_duplicate=False))
    whole = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in held.whole.items()
        # With biases PEFT saves those of modules that it saved whole twice more.
        if not TWICE & set(name.split("."))
    }
    ours = to_base([*held.pairs, *whole], parameters)
    if lost := sorted(set(held.pairs) - set(ours)):
        raise WrongInput(
            f"{folder} changes {some(lost)}, which the network does not have. Give the base "
            "network that it was made from."
        )
    updates: dict[str, Update] = {}
    others: dict[str, np.ndarray] = {}
    for name, pair in held.pairs.items():
        layer = ours[name].removesuffix(".weight")
        W0 = parameters[ours[name]]
        about = StoredTensor(folder, str(W0.dtype).removeprefix("torch."), tuple(W0.shape), 0)
        update = oriented(layer, pair, about).update(about, _array(network, ours[name]))
        updates[layer] = _outputs_first(network.get_submodule(layer), update)
    for name, tensor in whole.items():
        if name not in ours:
            continue
        difference = tensor.load() - _array(network, ours[name])
        layer, _, leaf = ours[name].rpartition(".")
        module = network.get_submodule(layer)
        if leaf == "weight" and isinstance(module, (*LINEAR, nn.Embedding)):
            updates[layer] = _outputs_first(module, Dense(difference))
        else:
            others[ours[name]] = difference
    if lost := sorted(set(whole) - set(ours)):
        warnings.warn(
            f"{folder}: the network has no {some(lost)}; left out.", UserWarning, stacklevel=4
        )
    return Changes(updates, others)


def _array(network: nn.Module, name: str) -> np.ndarray:
    """A parameter as float64."""
    try:
        parameter = network.get_parameter(name)
    except AttributeError:
        raise WrongInput(
            f"the network has no parameter {name!r}. Give the base network that the adapter was "
            "made from."
        ) from None
    array: np.ndarray = parameter.detach().to("cpu", torch.float64).numpy()
    return array


def _outputs_first(module: nn.Module, update: Update) -> Update:
    """dW as (out, in), from how the weight lies in the state dict."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        return update
    if isinstance(update, Factored):
        return Factored(update.A.T, update.B.T, update.scale, update.made_in)
    return Dense(update.dW.T, update.made_in)
