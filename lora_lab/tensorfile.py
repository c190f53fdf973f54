"""Matrices of safetensors files, read in blocks, without torch. Pickles are never read."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from lora_lab.config import literal_path
from lora_lab.registry import WrongInput

FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""safetensors' words for the dtypes that are read, and their names here."""

OTHERS = {
    "BOOL": "u1", "U8": "u1", "I8": "i1", "U16": "u2", "I16": "i2", "U32": "u4", "I32": "i4",
    "U64": "u8", "I64": "i8",
}  # fmt: skip
"""safetensors' words for dtypes whose tensors are copied as they lie, and numpy's."""

SMALL_FLOATS = ("F8", "F6", "F4")
"""Starts of safetensors' words for quantised floats: worth nothing without their scales."""

SMALL_INTEGERS = ("I8", "U8")
"""Words for what quantised weights are stored as, if the tensor is a weight."""

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
"""The file of a model that was saved whole, and the list of shards of one that was not."""

BLOCK = 1 << 18
"""Entries that are read and cast at a time."""

JSON_LIMIT = 1 << 26
"""Bytes of the largest JSON file that is read; an index of 100,000 tensors has a sixth of it."""

NEVER_PICKLES = (
    "Only safetensors are read, never pickles (.bin, .pt);"
    " save again with save_pretrained(..., safe_serialization=True)."
)


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies in a file.

    Attributes
    ----------
    path : Path
    dtype : str
        Name as in `FLOATS`, or safetensors' own word for one that is not read.
    shape : tuple of int
    start : int
        Offset of its first byte in the file.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def width(self) -> int:
        """Bytes of one entry."""
        return self._stored.itemsize

    @property
    def _stored(self) -> np.dtype[Any]:
        known = OTHERS | {"bfloat16": "u2"}
        return np.dtype(known.get(self.dtype, self.dtype)).newbyteorder("<")

    def load(self) -> NDArray[np.float64]:
        """The tensor as float64.

        It is read and cast in blocks, so that memory never holds more than the result and 5 MB.
        A file that was cut short since its header was read ends in an error, where a memory map
        would end the process.

        Raises
        ------
        WrongInput
            If the file is gone or shorter than its header said.
        """
        out = np.empty(self.size)
        try:
            with self.path.open("rb") as file:
                file.seek(self.start)
                for at in range(0, self.size, BLOCK):
                    part = out[at : at + BLOCK]
                    part[:] = self._block(file, part.size)
        except (OSError, ValueError) as error:
            raise WrongInput(
                f"{self.path} changed while it was read ({one_line(error)}). Start again."
            ) from None
        return out.reshape(self.shape)

    def _block(self, file: BinaryIO, count: int) -> NDArray[Any]:
        raw = np.frombuffer(file.read(count * self.width), self._stored, count)
        if self.dtype == "bfloat16":
            # bfloat16 is the upper half of a float32; numpy has no such dtype.
            return (raw.astype(np.uint32) << 16).view(np.float32)
        return raw

    def blocks(self, size: int) -> Iterator[bytes]:
        """Its bytes as stored, at most `size` at a time."""
        left = self.size * self.width
        with self.path.open("rb") as file:
            file.seek(self.start)
            while left and (block := file.read(min(size, left))):
                left -= len(block)
                yield block


def tensors_of(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of one safetensors file by name, of any dtype and shape, none loaded.

    Raises
    ------
    WrongInput
        If the file is missing, truncated, or its header is damaged.
    """
    try:
        # The library checks header, offsets and length; it has no numpy route for bfloat16.
        with safe_open(path, framework="numpy"):
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise WrongInput(
            f"{path} is not a whole safetensors file ({one_line(error)}). Copy or save it again."
        ) from None
    return {
        name: StoredTensor(
            path,
            FLOATS.get(entry["dtype"], entry["dtype"]),
            tuple(entry["shape"]),
            8 + length + entry["data_offsets"][0],
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }


def flat(tensor: StoredTensor) -> StoredTensor:
    """A convolution's kernel (out, in, ...) as the matrix (out, in * ...); a matrix as it is."""
    if len(tensor.shape) < 3:
        return tensor
    return replace(tensor, shape=(tensor.shape[0], math.prod(tensor.shape[1:])))


def matrices(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The weight matrices among tensors: float, not empty, two or more dimensions.

    Kernels of convolutions come flattened to (out, rest). Of more than two dimensions at least
    two must exceed 1: a token (1, 1, n) is a vector.

    Raises
    ------
    WrongInput
        For a quantised weight (8 bits and less): left out silently it would look unchanged.
    """
    out = {}
    for name, tensor in tensors.items():
        shape = tensor.shape
        if len(shape) < 2 or 0 in shape or (len(shape) > 2 and sum(n > 1 for n in shape) < 2):
            continue
        if tensor.dtype.startswith(SMALL_FLOATS) or (
            tensor.dtype in SMALL_INTEGERS and name.endswith("weight")
        ):
            raise WrongInput(
                f"tensor {name!r} of {tensor.path} is {tensor.dtype}; quantised weights are not"
                f" read, allowed: {', '.join(FLOATS)}. Dequantise the model first."
            )
        if tensor.dtype in FLOATS.values():
            out[name] = flat(tensor)
    return out


def model_matrices(given: str | Path, kind: str) -> dict[str, StoredTensor]:
    """The weight matrices of a Hugging Face model folder, single or sharded.

    Parameters
    ----------
    given : path
    kind : str
        What the folder is called in messages (`base`, `tuned`).

    Raises
    ------
    WrongInput
        No such folder, no safetensors in it, a damaged file or index.
    """
    return matrices(model_tensors(given, kind))


def model_tensors(given: str | Path, kind: str) -> dict[str, StoredTensor]:
    """Every tensor of a model folder, of any dtype and shape; otherwise as `model_matrices`."""
    folder = local_folder(given, kind)
    index, single = folder / INDEX, folder / SINGLE
    if single.is_file():
        return tensors_of(single)
    if not index.is_file():
        raise holds_no(folder, f"{SINGLE} (or {INDEX})")
    shards = read_json(index).get("weight_map")
    # A shard's name is untrusted text: it must name a file of this very folder.
    if not isinstance(shards, dict) or any(
        not isinstance(shard, str) or Path(shard).name != shard for shard in shards.values()
    ):
        raise WrongInput(f"{index} must map tensor names to file names in its own folder.")
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(set(shards.values())):
        tensors |= tensors_of(folder / shard)
    if lost := sorted(set(shards) - set(tensors)):
        raise WrongInput(f"{index} lists {some(lost)}, which no shard holds. Copy it again.")
    return tensors


def local_folder(given: str | Path, kind: str) -> Path:
    """An existing folder, `~` expanded, or `WrongInput`."""
    folder = literal_path(str(given))
    if not folder.is_dir():
        raise WrongInput(
            f"{kind} must be a local folder; got {str(given)!r}, which is none. Download it first."
        )
    return folder


def holds_no(folder: Path, wanted: str) -> WrongInput:
    """The error for a folder without a file, with a word on pickles where it holds some."""
    pickled = any(p.suffix in (".bin", ".pt", ".pth") for p in folder.iterdir())
    return WrongInput(f"{folder} holds no {wanted}." + (f" {NEVER_PICKLES}" if pickled else ""))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or `WrongInput`."""
    try:
        if path.stat().st_size > JSON_LIMIT:
            raise ValueError(f"larger than {JSON_LIMIT >> 20} MB")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WrongInput(f"{path} cannot be read as JSON ({one_line(error)}).") from None
    if not isinstance(content, dict):
        raise WrongInput(f"{path} must hold a JSON object; got a {type(content).__name__}.")
    return content


def one_line(error: Exception) -> str:
    """An error's text on one line of at most 200 characters."""
    return " ".join(str(error).split())[:200]


def some(names: Iterable[str]) -> str:
    """Up to three names, and how many more.

    >>> some(["a", "b", "c", "d"])
    "'a', 'b', 'c' and 1 more"
    """
    names = list(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(repr(name) for name in names[:3]) + more
