"""Tiny models and data on disk, made as a user's would be."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    PreTrainedTokenizerFast,
)

WORDS = [
    "[PAD]",
    "[UNK]",
    "good",
    "bad",
    "fine",
    "awful",
    "film",
    "plot",
    "the",
    "a",
    "was",
    "very",
]


def folder(path: Path, kind: str = "bert") -> Path:
    """A two-block network of width 32 with a tokenizer of a dozen words."""
    torch.manual_seed(0)
    if kind == "bert":
        config = BertConfig(
            vocab_size=len(WORDS),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=32,
        )
        net = BertModel(config, add_pooling_layer=False)
    else:
        config = GPT2Config(vocab_size=len(WORDS), n_embd=32, n_layer=2, n_head=4, n_positions=32)
        net = GPT2Model(config)
    net.save_pretrained(path)
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(path)
    return path


def reviews(path: Path, rows: int = 120) -> Path:
    """A CSV of labelled sentences that a bag of words separates."""
    kinds = [("good", "fine"), ("bad", "awful")]
    texts = [
        (
            f"the {['film', 'plot'][i // 2 % 2]} was {'very ' * (i % 3)}"
            f"{kinds[i % 2][i // 4 % 2]} {i}",
            ["praise", "blame"][i % 2],
        )
        for i in range(rows)
    ]
    pd.DataFrame(texts, columns=["review", "stars"]).to_csv(path, index=False)
    return path
