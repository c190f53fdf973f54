"""The calibrated instrument: six linear layers whose true update is known.

Layer l computes `W0_l x`; the data was made by a teacher `W0_l + dW*_l` with dW* of known rank and
spectrum. Layers do not feed each other, so each is an exact low-rank regression of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from lora_lab.config import DataConfig, ModelConfig
from lora_lab.data import Problem
from lora_lab.data.planted import LAYERS, PlantedData, base_weights
from lora_lab.models import MODELS, Batch, Model, need_kind


class Bias(nn.Module):
    """An additive bias: the head of the planted problem, whose true value is 0."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.bias


class PlantedNet(nn.Module):
    """Six bias-free linear layers, named as in `LAYERS`; `down` reads the input's second part."""

    def __init__(self, weights: dict[str, np.ndarray]) -> None:
        super().__init__()
        for name in LAYERS:
            out, inner = weights[name].shape
            layer = nn.Linear(inner, out, bias=False)
            layer.weight.data = torch.tensor(weights[name], dtype=torch.float32)
            self.add_module(name, layer)
        self.width = weights["q"].shape[1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = x[:, : self.width], x[:, self.width :]
        inputs = {name: second if name == "down" else first for name in LAYERS}
        return torch.cat([getattr(self, name)(inputs[name]) for name in LAYERS], dim=1)


class PlantedRegression(Model):
    """The planted layers and a bias."""

    def __init__(self, weights: dict[str, np.ndarray]) -> None:
        super().__init__()
        self.base = PlantedNet(weights)
        self.classifier = Bias(sum(w.shape[0] for w in weights.values()))

    def features(self, batch: Batch) -> torch.Tensor:
        first = next(self.base.parameters())
        return self.base(batch["inputs"].to(first.dtype)).to(self.classifier.bias.dtype)

    def loss(self, output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(output, targets.to(output.dtype))


class Rows:
    """Dense examples, all of length 1."""

    def __init__(self, inputs: np.ndarray, targets: np.ndarray) -> None:
        self.inputs, self.targets = torch.from_numpy(inputs), torch.from_numpy(targets)
        self.lengths = np.ones(len(inputs), dtype=np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    def collate(self, indices: Sequence[int]) -> Batch:
        rows = list(indices)
        return {"inputs": self.inputs[rows], "targets": self.targets[rows]}


@MODELS.register
@dataclass(frozen=True)
class Planted(ModelConfig):
    """The student of `data=planted`; its width and base weights are the teacher's."""

    full_rate: ClassVar[float] = 3e-3

    def shapes(self, data: DataConfig) -> dict[str, tuple[int, int]]:
        need_kind(self, "regression", data)
        assert isinstance(data, PlantedData)
        return {
            name: (out * data.width, inner * data.width) for name, (out, inner) in LAYERS.items()
        }

    def precision(self, device: str) -> str:
        return "float32"

    def build(self, data: PlantedData, problem: Problem, dropout: float) -> Model:
        return PlantedRegression(base_weights(data))

    def encode(self, problem: Problem, split: str, cache: Path) -> Rows:
        return Rows(problem.inputs[split], problem.targets[split])

    def fingerprint(self, data: PlantedData) -> str:
        digest = hashlib.sha256()
        for name, weight in base_weights(data).items():
            digest.update(name.encode() + weight.astype("<f4").tobytes())
        return digest.hexdigest()
