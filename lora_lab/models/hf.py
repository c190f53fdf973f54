"""Any encoder or decoder of the Hugging Face hub or a local folder, as a text classifier.

The classifier is the bare network (`AutoModel`), a stated pooling, and one linear layer, for every
architecture alike. Only safetensors are read and remote code is off.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file
from torch import nn
from torch.nn import functional as F

from lora_lab.config import DataConfig, ModelConfig, literal_path, need
from lora_lab.data import Problem
from lora_lab.models import MODELS, Batch, Model, need_kind
from lora_lab.registry import WrongInput

LINEAR: tuple[type[nn.Module], ...] = (nn.Linear, transformers.pytorch_utils.Conv1D)
"""Classes of layers that can be adapted; Conv1D is GPT-2's linear layer, stored transposed."""

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


class Pooling(Enum):
    """How token states become one vector: mean over tokens, the first token, the last token."""

    mean = "mean"
    cls = "cls"
    last = "last"


class TextClassifier(Model):
    """Bare network, pooling, and one linear layer kept in float32."""

    def __init__(self, base: nn.Module, hidden: int, outputs: int, pooling: Pooling) -> None:
        super().__init__()
        self.base, self.pooling = base, pooling
        self.classifier = nn.Linear(hidden, outputs)

    def features(self, batch: Batch) -> torch.Tensor:
        mask = batch["attention_mask"]
        states = self.base(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
        wide = self.classifier.weight.dtype
        if self.pooling is Pooling.cls:
            return states[:, 0].to(wide)
        if self.pooling is Pooling.last:
            last = mask.sum(1) - 1
            return states[torch.arange(len(states), device=states.device), last].to(wide)
        weights = mask.to(wide).unsqueeze(-1)
        return (states.to(wide) * weights).sum(1) / weights.sum(1)

    def loss(self, output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(output, targets)


WIDTHS = 8
"""Batches are padded to a multiple of so many tokens, or to the most that the model may see."""


class Tokens:
    """Ragged token ids of one split.

    Attributes
    ----------
    lengths : ndarray of int64, (examples,)
        Tokens of each example, after truncation.
    """

    def __init__(
        self, ids: np.ndarray, offsets: np.ndarray, targets: np.ndarray, pad: int, widest: int
    ) -> None:
        self.ids, self.offsets, self.pad, self.widest = ids, offsets, pad, widest
        self.targets = torch.from_numpy(targets.astype(np.int64))
        self.lengths = np.diff(offsets)

    def __len__(self) -> int:
        return len(self.lengths)

    def collate(self, indices: Sequence[int]) -> Batch:
        # Few widths: each new one costs the CPU's matrix library a compilation per product.
        width = -(-int(self.lengths[list(indices)].max()) // WIDTHS) * WIDTHS
        width = min(width, self.widest)
        ids = np.full((len(indices), width), self.pad, dtype=np.int64)
        mask = np.zeros((len(indices), width), dtype=np.int64)
        for row, i in enumerate(indices):
            n = self.lengths[i]
            ids[row, :n] = self.ids[self.offsets[i] : self.offsets[i] + n]
            mask[row, :n] = 1
        return {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy(mask),
            "targets": self.targets[list(indices)],
        }


@lru_cache(maxsize=4)
def _architecture(folder: str, revision: str | None) -> tuple[Any, dict[str, tuple[int, int]]]:
    """Config and linear layers of a network, built without weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = transformers.AutoConfig.from_pretrained(
            folder, revision=revision, trust_remote_code=False
        )
        with torch.device("meta"):
            net = transformers.AutoModel.from_config(config, trust_remote_code=False)
    shapes = {}
    for name, module in net.named_modules():
        if isinstance(module, LINEAR):
            rows, columns = module.weight.shape
            shapes[name] = (rows, columns) if isinstance(module, nn.Linear) else (columns, rows)
    return config, shapes


class TextModel:
    """What text models share: everything but where the files lie."""

    pooling: Pooling
    max_tokens: int
    # Torch's fused attention is the slower one in bfloat16 on a CPU.
    attention: ClassVar[str] = "eager"
    remedy: ClassVar[str] = (
        "Give a local folder with config.json and *.safetensors, or a hub name on a machine with "
        "network."
    )
    """What to do when the files cannot be loaded."""

    def source(self) -> str:
        """Folder or hub name of the pretrained files."""
        raise NotImplementedError

    def pinned(self) -> str | None:
        """Revision on the hub, None for a local folder."""
        return None

    def shapes(self, data: DataConfig) -> dict[str, tuple[int, int]]:
        need_kind(self, "text", data)
        return dict(self._load(_architecture)[1])

    def _load(self, loader: Any, *args: Any) -> Any:
        """Call a loader of (source, revision); one line when the files cannot be had."""
        try:
            return loader(self.source(), self.pinned(), *args)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            if isinstance(error, WrongInput):
                raise
            reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else "no reason"
            raise WrongInput(
                f"model {self.source()!r} cannot be loaded ({reason}). {self.remedy}"
            ) from error

    def build(self, data: DataConfig, problem: Problem, dropout: float) -> Model:
        config, _ = self._load(_architecture)
        base = self._load(pretrained, transformers.AutoModel, self.attention, dropout)
        hidden = int(getattr(config, "hidden_size", 0) or config.n_embd)
        return TextClassifier(base, hidden, problem.outputs, self.pooling)

    def _reading(self) -> list[Any]:
        """What decides how a text becomes tokens."""
        return [self.source(), self.pinned(), self.max_tokens, transformers.__version__]

    def encode(self, problem: Problem, split: str, cache: Path) -> Tokens:
        texts, targets = problem.inputs[split], problem.targets[split]
        asked = json.dumps([*self._reading(), list(texts)])
        key = hashlib.sha256(asked.encode()).hexdigest()[:24]
        path = cache / f"tokens-{key}.safetensors"
        if path.is_file():
            stored = load_file(path)
        else:
            stored = self._tokenize(list(texts))
            cache.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(f".{os.getpid()}.part")
            save_file(stored, part)
            os.replace(part, path)
        pad = int(stored["pad"][0])
        return Tokens(stored["ids"], stored["offsets"], targets, pad, self.max_tokens)

    def _tokenize(self, texts: list[str]) -> dict[str, np.ndarray]:
        tokenizer = self._load(tokenizer_of)
        rows = self._rows(tokenizer, texts)
        offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
        ids = np.fromiter((i for row in rows for i in row), dtype=np.int32, count=int(offsets[-1]))
        pad = tokenizer.pad_token_id
        pad = tokenizer.eos_token_id if pad is None else pad
        return {"ids": ids, "offsets": offsets, "pad": np.array([pad or 0], dtype=np.int32)}

    def _rows(self, tokenizer: Any, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, at most `max_tokens`."""
        rows: list[list[int]] = tokenizer(texts, truncation=True, max_length=self.max_tokens)[
            "input_ids"
        ]
        return rows


def tokenizer_of(folder: str, revision: str | None) -> Any:
    """The tokenizer of a folder or hub name."""
    return transformers.AutoTokenizer.from_pretrained(
        folder, revision=revision, trust_remote_code=False
    )


def pretrained(
    folder: str, revision: str | None, kind: Any, attention: str, dropout: float
) -> nn.Module:
    """A network of an `Auto` class of transformers, with that dropout wherever it has one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = transformers.AutoConfig.from_pretrained(
            folder, revision=revision, trust_remote_code=False
        )
        options = {
            k: dropout
            for k, v in config.to_dict().items()
            if "drop" in k and isinstance(v, (int, float)) and not isinstance(v, bool)
        }
        net: nn.Module = kind.from_pretrained(
            folder,
            revision=revision,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,
            attn_implementation=attention,
            **options,
        )
    return net


@MODELS.register
@dataclass(frozen=True)
class HFModel(TextModel, ModelConfig):
    """A pretrained network by name (hub) or folder.

    Attributes
    ----------
    name : str
        `organisation/name` on the hub, or a local folder with config.json and safetensors.
    revision : str
        Branch, tag or commit on the hub; recorded as part of the run.
    pooling : Pooling
        Token states to one vector: `mean`, `cls` (encoders) or `last` (decoders).
    max_tokens : int
        Longer texts are cut.
    """

    name: str = ""
    revision: str = "main"
    pooling: Pooling = Pooling.mean
    max_tokens: int = 128

    def __post_init__(self) -> None:
        need(
            bool(self.name),
            "model.name",
            "a hub name or a local folder",
            "nothing",
            "Add model.name=organisation/name or model.name=./folder.",
        )
        need(self.max_tokens >= 4, "model.max_tokens", "at least 4", self.max_tokens)

    def source(self) -> str:
        folder = literal_path(self.name)
        if folder.is_dir():
            if not (folder / "config.json").is_file():
                raise WrongInput(f"model.name {self.name!r} is a folder without config.json.")
            if not any(folder.glob("*.safetensors")):
                raise WrongInput(
                    f"model.name {self.name!r} holds no *.safetensors; other formats are not read."
                )
            return str(folder)
        if self.name.count("/") != 1 or self.name[0] in "./~\\" or "\\" in self.name:
            raise WrongInput(
                f"model.name {self.name!r} is neither an existing folder nor a hub name "
                "(organisation/name)."
            )
        return self.name

    def pinned(self) -> str | None:
        return None if literal_path(self.name).is_dir() else self.revision

    def precision(self, device: str) -> str:
        return "bfloat16" if device == "cuda" else "float32"

    def fingerprint(self, data: DataConfig) -> str:
        folder = literal_path(self.name)
        if not folder.is_dir():
            return f"{self.name}@{_architecture(self.name, self.revision)[0]._commit_hash}"
        digest = hashlib.sha256()
        for path in sorted(folder.glob("*.safetensors")):
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()
