"""Models: what is adapted. One file a name; it gives layer shapes cheaply and builds a `Model`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from lora_lab.config import DataConfig
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


def wrong_kind(name: str, kind: str, data: str) -> WrongInput:
    """The error for a problem that a model cannot read."""
    partner = "Add data=planted" if kind == "regression" else "Use model=planted"
    return WrongInput(f"model={name} solves {kind} problems; the data holds {data}. {partner}.")


def device_type(name: str) -> str:
    """`cpu`, `cuda`, `mps` … of a `host.device` value; `auto`: the accelerator if there is one."""
    if name != "auto":
        return name.partition(":")[0]
    found = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if found is None else str(found.type)
