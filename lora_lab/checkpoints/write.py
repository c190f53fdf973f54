"""Adapters as PEFT reads them, and tensors as safetensors keep them: the writing side."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lora_lab.checkpoints.peft import PREFIX
from lora_lab.linalg.factored import Array
from lora_lab.linalg.rounding import rounded
from lora_lab.tensorfile import BLOCK, FLOATS, StoredTensor

WORDS = {name: word for word, name in FLOATS.items()}
"""safetensors' word for each dtype."""

METADATA = {"format": "pt"}
"""What transformers asks of a file's metadata."""


def lora_config(
    sizes: Mapping[str, tuple[int, float]], known: Iterable[str] = (), **more: Any
) -> dict[str, Any]:
    """The content of an adapter_config.json for LoRA.

    The commonest r and alpha become PEFT's defaults, those of other layers patterns. Names are
    written so that PEFT's matching by endings and regular expressions finds these layers alone.

    Parameters
    ----------
    sizes : mapping of str to (int, float)
        r and alpha of each layer, named as the model names its modules; at least one.
    known : iterable of str
        Names of other modules of the model, as far as they are known.
    **more
        Further keys of the file, such as `use_rslora` or `modules_to_save`.

    Returns
    -------
    dict
        Of JSON types. The scale is alpha / r, with ``use_rslora=True`` alpha / sqrt(r).

    Examples
    --------
    >>> content = lora_config({"0.query": (2, 2), "0.key": (2, 2), "1.query": (1, 1)})
    >>> content["r"], content["lora_alpha"], content["rank_pattern"], content["alpha_pattern"]
    (2, 2, {'1.query': 1}, {'1.query': 1})
    >>> content["target_modules"]
    ['0.query', '0.key', '1.query']
    """
    r, alpha = (Counter(part).most_common(1)[0][0] for part in zip(*sizes.values(), strict=True))
    return {
        "peft_type": "LORA",
        "task_type": None,
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {_pattern(n, sizes): own for n, (own, _) in sizes.items() if own != r},
        "alpha_pattern": {_pattern(n, sizes): a for n, (_, a) in sizes.items() if a != alpha},
        "target_modules": _targets(list(sizes), known),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    } | more


def _pattern(layer: str, layers: Iterable[str]) -> str:
    """A pattern that PEFT's rule matches with this layer alone: its bare name as a rule."""
    bare = re.compile(rf"(.*\.)?({layer})$")
    alone = all(other == layer or not bare.match(other) for other in layers)
    return layer if alone else f"^{re.escape(layer)}"


def _targets(layers: list[str], known: Iterable[str]) -> list[str] | str:
    """The list of names; a regular expression where one of them ends another module's name."""
    ends = tuple(f".{layer}" for layer in layers)
    if any(other.endswith(ends) for other in {*known} - {*layers}):
        return "|".join(re.escape(layer) for layer in layers)
    return layers


def factor_names(layer: str, embedding: bool = False) -> tuple[str, str]:
    """PEFT's names for A and B of a layer.

    >>> factor_names("0.query")
    ('base_model.model.0.query.lora_A.weight', 'base_model.model.0.query.lora_B.weight')
    """
    part, tail = ("lora_embedding", "") if embedding else ("lora", ".weight")
    return f"{PREFIX}{layer}.{part}_A{tail}", f"{PREFIX}{layer}.{part}_B{tail}"


def whole_name(tensor: str, layers: Iterable[str]) -> str:
    """PEFT's name for a tensor saved whole; a layer with factors lies one name deeper.

    >>> whole_name("0.norm.bias", {"0.query"}), whole_name("0.query.bias", {"0.query"})
    ('base_model.model.0.norm.bias', 'base_model.model.0.query.base_layer.bias')
    """
    module, _, leaf = tensor.rpartition(".")
    return PREFIX + (f"{module}.base_layer.{leaf}" if module in layers else tensor)


def encoded(x: Array, dtype: str) -> bytes:
    """Numbers as safetensors keep them, each rounded once, from float64 to the dtype.

    >>> encoded(np.array([1.0, 1 + 3 * 2.0**-8]), "bfloat16").hex()
    '803f823f'
    """
    if dtype == "bfloat16":
        bits = rounded(x, dtype).astype("<f4").view("<u4")
        return (bits >> 16).astype("<u2").tobytes()
    with np.errstate(over="ignore"):
        return x.astype(np.dtype(dtype).newbyteorder("<")).tobytes()


def write_tensors(
    path: Path, tensors: Mapping[str, StoredTensor], after: Path | None = None
) -> None:
    """Write a safetensors file from tensors that lie in other files, block by block.

    Parameters
    ----------
    path : Path
        It is written in place: write into a folder that is renamed last.
    tensors : mapping of str to StoredTensor
        In the order in which they are to lie.
    after : Path, optional
        A safetensors file whose whole content comes first.
    """
    header, start, size = _header(after)
    at = size
    for name, tensor in tensors.items():
        stop = at + tensor.size * tensor.width
        place = {"shape": list(tensor.shape), "data_offsets": [at, stop]}
        header[name] = {"dtype": WORDS.get(tensor.dtype, tensor.dtype), **place}
        at = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        if after is not None:
            _copy(after, start, file)
        for tensor in tensors.values():
            for block in tensor.blocks(8 * BLOCK):
                file.write(block)
        assert file.tell() == 8 + len(text) + at, "a file that is read changed meanwhile"


def _header(path: Path | None) -> tuple[dict[str, Any], int, int]:
    """Header of a file that has been checked, where its data start, and their bytes."""
    if path is None:
        return {"__metadata__": METADATA}, 0, 0
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return header, 8 + length, path.stat().st_size - 8 - length


def _copy(source: Path, start: int, into: BinaryIO) -> None:
    with source.open("rb") as file:
        file.seek(start)
        while block := file.read(8 * BLOCK):
            into.write(block)
