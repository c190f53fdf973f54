"""Models: what is adapted. One file a name; it gives layer shapes cheaply and builds a `Model`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from lora_lab.config import DataConfig, choice
from lora_lab.data import Problem
from lora_lab.registry import Registry, WrongInput

Batch = dict[str, torch.Tensor]


class Model(nn.Module, ABC):
    """A base network with a trainable head on top.

    Attributes
    ----------
    base : nn.Module
        The pretrained network. Layer names are names inside it, so they are those of its own state
        dict.
    classifier : nn.Module
        The head; what `train.also=classifier` trains.
    """

    base: nn.Module
    classifier: nn.Module

    @abstractmethod
    def features(self, batch: Batch) -> torch.Tensor:
        """What the head sees: (batch, features), float32 or wider."""

    def forward(self, batch: Batch) -> torch.Tensor:
        """Output of the head: logits or predictions, (batch, outputs)."""
        out: torch.Tensor = self.classifier(self.features(batch))
        return out

    @abstractmethod
    def loss(self, output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean loss over the batch, a scalar."""

    def score(self, output: np.ndarray, targets: np.ndarray) -> float:
        """What a run is judged by, higher is better: `score` unless the model says otherwise."""
        return score(output, targets)

    def contributions(self, output: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """What each example adds to it, (examples,): for paired comparisons of runs."""
        return contributions(output, targets)


def score(output: np.ndarray, targets: np.ndarray) -> float:
    """Accuracy of logits for integer targets, else R² over all outputs together.

    Parameters
    ----------
    output : ndarray, (examples, outputs)
    targets : ndarray, (examples,) of int, or (examples, outputs) of float

    Returns
    -------
    float
        Accuracy in [0, 1], or R² = 1 - Σ(y - ŷ)²/Σ(y - mean y)² in (-inf, 1].

    >>> score(np.array([[0.1, 0.9], [0.8, 0.2]]), np.array([1, 1]))
    0.5
    >>> score(np.array([[1.0], [3.0]]), np.array([[1.0], [3.0]]))
    1.0
    """
    return float(contributions(output, targets).mean())


def contributions(output: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """What each example adds to `score`, which is their mean, (examples,) float64.

    >>> contributions(np.array([[0.1, 0.9], [0.8, 0.2]]), np.array([1, 1])).tolist()
    [1.0, 0.0]
    >>> contributions(np.array([[1.0], [2.0], [3.0]]), np.array([[1.0], [2.0], [6.0]])).round(3)
    array([ 1.   ,  1.   , -0.929])
    """
    if targets.ndim == 1:
        return (output.argmax(1) == targets).astype(np.float64)
    wide = targets.astype(np.float64)
    residuals = ((wide - output) ** 2).sum(1)
    return np.asarray(1 - len(wide) * residuals / ((wide - wide.mean(0)) ** 2).sum())


class Examples(Protocol):
    """Encoded examples of one split: sized, with a length per example, collated by index."""

    lengths: np.ndarray

    def __len__(self) -> int: ...

    def collate(self, indices: Sequence[int]) -> Batch:
        """One padded batch; `targets` is among its tensors."""


class Buildable(Protocol):
    """What every registered model config can do."""

    full_rate: float

    def shapes(self, data: DataConfig) -> dict[str, tuple[int, int]]:
        """(out, in) of every linear layer, from the architecture alone (no weights read).

        Raises `WrongInput` when this model cannot read such data."""

    def precision(self, device: str) -> str:
        """Measured best compute dtype on a device type."""

    def build(self, data: DataConfig, problem: Problem, dropout: float) -> Model:
        """The pretrained network with a fresh head (drawn from torch's global generator)."""

    def encode(self, problem: Problem, split: str, cache: Path) -> Examples:
        """Examples of a split as this model reads them; token ids are cached below `cache`."""

    def fingerprint(self, data: DataConfig) -> str:
        """SHA-256 of the pretrained weights."""


MODELS: Registry[type[Any]] = Registry(__name__, "model")


PARTNERS = {"regression": ("planted", "planted"), "image": ("digits_vit", "digits")}
"""The model and the data of each kind that is not text, which is the default of both."""


def need_kind(model: object, kind: str, data: DataConfig) -> None:
    """Raise `WrongInput` for data of another kind than a model reads."""
    if data.kind == kind:
        return
    name, partner = choice(model), f"Use model={PARTNERS.get(data.kind, ('minilm',))[0]}"
    if kind in PARTNERS:
        partner = f"Add data={PARTNERS[kind][1]}"
    raise WrongInput(f"model={name} solves {kind} problems; the data holds {data.kind}. {partner}.")


def device_type(name: str) -> str:
    """`cpu`, `cuda`, `mps` … of a `host.device` value; `auto`: the accelerator if there is one."""
    if name != "auto":
        return name.partition(":")[0]
    found = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if found is None else str(found.type)
