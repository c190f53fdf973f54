"""A small vision transformer for `data=digits`, pre-trained by the lab itself.

Pre-training is a run like any other: fine-tuning starts from it as from any run (`model.start`), so
it is named by its content, done once, and shared.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from lora_lab.config import DataConfig, ModelConfig, need
from lora_lab.data import Problem
from lora_lab.data.digits import PIXELS
from lora_lab.models import MODELS, Batch, Model, need_kind
from lora_lab.models.planted import Rows

SIDE, PATCH = math.isqrt(PIXELS), 2
TOKENS = (SIDE // PATCH) ** 2
HEAD_WIDTH = 16

PRETRAINED = "pretrained"


class Embeddings(nn.Module):
    """Pixels to tokens: patches of 2 by 2 through a linear layer, and a learned position each."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patch = nn.Linear(PATCH**2, width)
        self.position = nn.Embedding(TOKENS, width)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """(batch, 64) to (batch, 16, width)."""
        across = SIDE // PATCH
        patches = pixels.view(-1, across, PATCH, across, PATCH).transpose(2, 3)
        return self.patch(patches.reshape(-1, TOKENS, PATCH**2)) + self.position.weight


class Attention(nn.Module):
    """Multi-head self-attention with heads of width 16."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (-1, HEAD_WIDTH)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        out: torch.Tensor = self.out_proj(
            F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        )
        return out


class Block(nn.Module):
    """Attention and a two-layer perceptron, each normalised before and added to its input."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(width), Attention(width)
        self.mlp_norm = nn.LayerNorm(width)
        self.up_proj, self.down_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        out: torch.Tensor = x + self.dropout(self.down_proj(F.gelu(self.up_proj(self.mlp_norm(x)))))
        return out


class DigitsNet(nn.Module):
    """Embeddings, blocks, a last norm: (batch, 64) to (batch, 16, width)."""

    def __init__(self, width: int, depth: int, dropout: float) -> None:
        super().__init__()
        self.embeddings = Embeddings(width)
        self.blocks = nn.ModuleList(Block(width, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = self.embeddings(pixels)
        for block in self.blocks:
            x = block(x)
        out: torch.Tensor = self.norm(x)
        return out


class DigitsClassifier(Model):
    """The network, the mean over tokens, and one linear layer."""

    def __init__(self, base: DigitsNet, width: int, outputs: int) -> None:
        super().__init__()
        self.base = base
        self.classifier = nn.Linear(width, outputs)

    def features(self, batch: Batch) -> torch.Tensor:
        pixels = batch["inputs"].to(self.base.norm.weight.dtype)
        return self.base(pixels).mean(1).to(self.classifier.weight.dtype)

    def loss(self, output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(output, targets)


@MODELS.register
@dataclass(frozen=True)
class DigitsViT(ModelConfig):
    """A vision transformer of patches of 2 by 2 pixels, heads of width 16.

    Attributes
    ----------
    start : str
        `pretrained`: the lab's own training on the digits 0 to 4 (run first if it is not there).
        Empty: random weights, the same in every run. Else as of every model.
    width : int
        Width of the tokens, a multiple of 16 in [16, 512].
    depth : int
        Blocks, in [1, 24].
    """

    start: str = PRETRAINED
    width: int = 64
    depth: int = 4

    full_rate: ClassVar[float] = 2e-3

    def __post_init__(self) -> None:
        ok = 16 <= self.width <= 512 and self.width % HEAD_WIDTH == 0
        need(ok, "model.width", "a multiple of 16 in [16, 512]", self.width)
        need(1 <= self.depth <= 24, "model.depth", "in [1, 24]", self.depth)

    def begin(self) -> str:
        if self.start != PRETRAINED:
            return self.start
        return (
            f"model=digits_vit model.width={self.width} model.depth={self.depth} model.start= "
            "data=digits data.classes=lower adapter=full adapter.targets=all+embeddings.patch "
            "train.also=classifier+norms+biases+embeddings train.epochs=30 train.lr=3e-3 "
            "train.dropout=0.1 train.evaluations=1"
        )

    def shapes(self, data: DataConfig) -> dict[str, tuple[int, int]]:
        need_kind(self, "image", data)
        with torch.device("meta"):
            net = DigitsNet(self.width, self.depth, 0.0)
        return {
            name: (module.out_features, module.in_features)
            for name, module in net.named_modules()
            if isinstance(module, nn.Linear)
        }

    def precision(self, device: str) -> str:
        # Measured: in bfloat16 a step of this size takes 1.4 times as long on a CPU with AMX.
        return "float32"

    def build(self, data: DataConfig, problem: Problem, dropout: float) -> Model:
        return DigitsClassifier(self._untrained(dropout), self.width, problem.outputs)

    def encode(self, problem: Problem, split: str, cache: Path) -> Rows:
        return Rows(problem.inputs[split], problem.targets[split])

    def fingerprint(self, data: DataConfig) -> str:
        digest = hashlib.sha256()
        for name, parameter in self._untrained().named_parameters():
            digest.update(name.encode() + parameter.detach().numpy().astype("<f4").tobytes())
        return digest.hexdigest()

    def _untrained(self, dropout: float = 0.0) -> DigitsNet:
        """The network before pre-training: its weights depend on width and depth alone.

        Linear weights N(0, 1/d_in), positions N(0, 0.02²), norms 1, biases 0.
        """
        with torch.device("meta"):
            net = DigitsNet(self.width, self.depth, dropout)
        net.to_empty(device="cpu")
        generator = torch.Generator().manual_seed(0)
        for module in net.modules():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, nn.Linear):
                std = module.in_features**-0.5
                nn.init.normal_(module.weight, std=std, generator=generator)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02, generator=generator)
        return net
