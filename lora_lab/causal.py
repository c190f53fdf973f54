"""Causal language models of transformers as classifiers by label words, and as themselves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lora_lab.models import Batch, Model

PART = 1024
"""Tokens whose logits (one for each word of the vocabulary) are held at once."""


class LabelWords(nn.Module):
    """Logits of the label words: their rows of the output embedding, frozen, and a bias.

    Parameters
    ----------
    rows : Tensor, (classes, hidden)
    """

    def __init__(self, rows: torch.Tensor) -> None:
        super().__init__()
        self.rows: torch.Tensor
        self.register_buffer("rows", rows.detach().clone())
        self.bias = nn.Parameter(torch.zeros(len(rows)))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return F.linear(states, self.rows, self.bias)


class CausalClassifier(Model):
    """The network's own next-token logits of a prompt, for the label words only.

    Parameters
    ----------
    base : nn.Module
        A causal language model of transformers with its network in `model`.
    words : sequence of int
        A token for each class.
    """

    def __init__(self, base: nn.Module, words: Sequence[int]) -> None:
        super().__init__()
        self.base = base
        self.classifier = LabelWords(base.get_output_embeddings().weight[list(words)])

    def features(self, batch: Batch) -> torch.Tensor:
        last = batch["attention_mask"].sum(1) - 1
        states = hidden_states(self.base, batch)
        rows = torch.arange(len(states), device=states.device)
        return states[rows, last].to(self.classifier.rows.dtype)

    def loss(self, output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(output, targets)


class CausalLanguage(Model):
    """Next-token prediction. Its output is (summed negative log-likelihood, tokens) per example.

    The loss is the mean over all tokens of the examples, in which long texts weigh more; the score
    is exp(-loss), the geometric mean probability of the true token, in (0, 1].

    Parameters
    ----------
    base : nn.Module
        As in `CausalClassifier`.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.classifier = nn.Identity()

    def features(self, batch: Batch) -> torch.Tensor:
        real = batch["attention_mask"][:, 1:].bool()
        states = hidden_states(self.base, batch)[:, :-1][real]
        found = token_losses(
            states, self.base.get_output_embeddings(), batch["input_ids"][:, 1:][real]
        )
        losses = found.new_zeros(real.shape).masked_scatter(real, found)
        return torch.stack([losses.sum(1), real.sum(1).to(losses)], dim=1)

    def loss(self, output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        summed, tokens = output.sum(0)
        return summed / tokens

    def score(self, output: np.ndarray, targets: np.ndarray) -> float:
        summed, tokens = output.sum(0, dtype=np.float64)
        return float(np.exp(-summed / tokens))

    def contributions(self, output: np.ndarray, targets: np.ndarray) -> np.ndarray:
        summed, tokens = output.astype(np.float64).T
        return -summed / tokens


def hidden_states(base: nn.Module, batch: Batch) -> torch.Tensor:
    """Final states (batch, tokens, hidden), after the norm, of texts padded on the right.

    No mask is needed: a token sees only those before it, and padding stands behind them all.
    """
    states: torch.Tensor = base.model(
        input_ids=batch["input_ids"], use_cache=False
    ).last_hidden_state
    return states


def token_losses(states: torch.Tensor, head: nn.Module, words: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of each word, (tokens,), float32 or wider.

    Logits of a part of the tokens at a time are held, and computed again for the gradient.
    """

    def part(states: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        logits = head(states)
        wide = torch.promote_types(torch.float32, logits.dtype)
        return F.cross_entropy(logits.to(wide), words, reduction="none")

    parts = zip(states.split(PART), words.split(PART), strict=True)
    return torch.cat(
        [checkpoint(part, s, w, use_reentrant=False, preserve_rng_state=False) for s, w in parts]
    )
