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
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
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

CAUSAL = [*WORDS, "<|endoftext|>", "Review", "Sentiment", ":", "praise", "blame"]
"""The words of a causal language model."""


def folder(path: Path, kind: str = "bert") -> Path:
    """A two-block network of width 32 (`bert`, `gpt2`, `llama`) with a tokenizer of few words."""
    torch.manual_seed(0)
    words = CAUSAL if kind == "llama" else WORDS
    _network(kind, len(words)).save_pretrained(path)
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        eos_token="<|endoftext|>" if kind == "llama" else None,
    ).save_pretrained(path)
    return path


def _network(kind: str, words: int) -> PreTrainedModel:
    if kind == "llama":
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=words,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                intermediate_size=64,
                max_position_embeddings=64,
                initializer_range=0.3,
                tie_word_embeddings=True,
            )
        )
    if kind == "gpt2":
        return GPT2Model(
            GPT2Config(vocab_size=words, n_embd=32, n_layer=2, n_head=4, n_positions=32)
        )
    config = BertConfig(
        vocab_size=words,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    return BertModel(config, add_pooling_layer=False)


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
