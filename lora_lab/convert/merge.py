"""Adapters to a model: base + updates, rounded once."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from lora_lab.checkpoints.job import Job, Pair
from lora_lab.checkpoints.names import layer_of, same_shape, to_base
from lora_lab.checkpoints.peft import oriented, read_whole_adapter
from lora_lab.checkpoints.tuned import copies
from lora_lab.checkpoints.write import encoded, write_tensors
from lora_lab.convert.folder import new_folder, over_layers
from lora_lab.layers import natural
from lora_lab.linalg.factored import Array, frobenius
from lora_lab.linalg.rounding import rounded
from lora_lab.registry import WrongInput
from lora_lab.store.files import write_bytes
from lora_lab.tasks import Result, Tell
from lora_lab.tensorfile import (
    INDEX,
    SINGLE,
    StoredTensor,
    flat,
    local_folder,
    matrices,
    model_tensors,
    read_json,
    some,
    tensors_of,
)

TENSORS = 3.5
"""Tensors of a layer's size in float64 that a worker holds at most: W0, an update and their sum."""

ENTRIES = 1 << 18
"""Entries that are rounded and written at once."""

WEIGHT_FILES = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".onnx_data",
    ".gguf", ".ot", ".npz", ".tflite", ".index.json",
)  # fmt: skip
"""Ends of names of files that hold or list weights: those of the base, which are not copied."""

New = Pair | StoredTensor


def merge(
    base: str | Path,
    adapters: Sequence[str | Path],
    out: str | Path,
    tell: Tell = lambda done, total, share: None,
) -> pd.DataFrame:
    """Write the base model with the updates of one or more adapters added to it.

    Every weight is W0 + dW_1 + dW_2 + ... in float64, each dW against the base alone, rounded
    once to the base's dtype. Files and shards are those of the base; all that is no weight is
    copied. What an adapter saved whole replaces the base's tensor (of several, the differences
    are added); what the base does not have, as a classifier's head, is added to the last shard.

    Parameters
    ----------
    base : path
        Local Hugging Face folder: the model that the adapters were made from.
    adapters : sequence of path
        Folders of PEFT adapters of every kind that `checkpoints.updates` reads.
    out : path
        Not there yet, or an empty folder. It is there whole or not at all.
    tell : callable
        Hears how far it is (see `tasks.Tell`).

    Returns
    -------
    DataFrame
        A row for each changed tensor: layer, m, n (1 and its size for a vector), dtype,
        `adapters` (how many change it), `rounding`: ||round(W0 + dW) - (W0 + dW)||_F / ||dW||_F;
        `lost`: share of the entries with dW != 0 that the rounding leaves at W0; `lost_energy`:
        share of ||dW||_F^2 in those (see the measure merge_precision). NaN where dW = 0.

    Raises
    ------
    WrongInput
        As `checkpoints.updates`; for an adapter's layer that the base does not have, a merged
        weight beyond the base's dtype, or an `out` that is there.

    Warns
    -----
    UserWarning
        Once: tensors added to those of the base; keys of adapter_config.json.
    """
    tensors = model_tensors(base, "base")
    source = local_folder(base, "base")
    news: dict[str, list[New]] = {}
    added: dict[str, StoredTensor] = {}
    notes: list[str] = []
    for adapter in adapters:
        notes += _collect(local_folder(adapter, "adapter"), tensors, news, added)
    _tie(source, tensors, news)
    names = sorted(news, key=natural)
    with new_folder(out) as folder:
        _copy(source, folder)
        last = max(tensor.path for tensor in tensors.values())
        for shard in sorted({tensor.path for tensor in tensors.values()}):
            write_tensors(folder / shard.name, added if shard == last else {}, after=shard)
        _index(source, folder, last.name, added)
        places = {
            name: place
            for shard in {tensor.path.name for tensor in tensors.values()}
            for name, place in tensors_of(folder / shard).items()
        }
        jobs = [
            Job(layer_of(name), _matrix(tensors[name]), _matrix(tensors[name])) for name in names
        ]
        work = [
            (job, places[name].start, str(places[name].path), news[name])
            for name, job in zip(names, jobs, strict=True)
        ]
        rows = over_layers(add, work, jobs, TENSORS, tell)
    if added:
        notes.append(f"added, not being in the base: {some(sorted(added, key=natural))}")
    if notes:
        warnings.warn("; ".join(dict.fromkeys(notes)) + ".", stacklevel=2)
    return pd.DataFrame(rows)


def _collect(
    folder: Path,
    base: Mapping[str, StoredTensor],
    news: dict[str, list[New]],
    added: dict[str, StoredTensor],
) -> list[str]:
    """Enter what one adapter does to each tensor of the base, and what it adds; its notes."""
    held = read_whole_adapter(folder)
    whole = {name.replace(".base_layer.", "."): tensor for name, tensor in held.whole.items()}
    ours = to_base([*held.pairs, *whole], base)
    if lost := [layer_of(name) for name in held.pairs if name not in ours]:
        raise WrongInput(
            f"{some(lost)} of {folder} are not in the base: it was made from another model, or the"
            " weight is tied to an embedding. Give its own base."
        )
    for name, pair in held.pairs.items():
        layer = layer_of(ours[name])
        news.setdefault(ours[name], []).append(oriented(layer, pair, flat(base[ours[name]])))
    for name, tensor in whole.items():
        if name in ours:
            same_shape(layer_of(ours[name]), tensor.shape, base[ours[name]].shape, "adapter")
            news.setdefault(ours[name], []).append(tensor)
        elif name in added:
            raise WrongInput(
                f"several adapters bring {name!r}, which the base does not have: there is nothing"
                " to add it to. Merge one of them."
            )
        else:
            added[name] = tensor
    return held.config.notes


def _tie(source: Path, tensors: Mapping[str, StoredTensor], news: dict[str, list[New]]) -> None:
    """Give a tied weight that was saved twice the same updates under both names."""
    config = source / "config.json"
    if not config.is_file() or not read_json(config).get("tie_word_embeddings", True):
        return
    for name, first in copies(matrices(tensors)).items():
        if found := news.get(first, news.get(name)):
            news[first] = news[name] = found


def _matrix(tensor: StoredTensor) -> StoredTensor:
    """A tensor as a matrix: kernels flattened, vectors as one row."""
    return flat(tensor) if len(tensor.shape) > 1 else replace(tensor, shape=(1, tensor.size))


def _copy(source: Path, folder: Path) -> None:
    """All files of a model's folder that hold no weights; links are followed."""
    for path in sorted(source.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            (folder / path.name).mkdir()
            _copy(path, folder / path.name)
            if not any((folder / path.name).iterdir()):
                (folder / path.name).rmdir()
        elif not path.name.endswith(WEIGHT_FILES):
            shutil.copyfile(path, folder / path.name)


def _index(source: Path, folder: Path, last: str, added: Mapping[str, StoredTensor]) -> None:
    """The list of shards, with what was added to the last one."""
    if (source / SINGLE).is_file():
        return
    content = read_json(source / INDEX)
    content["weight_map"] |= dict.fromkeys(added, last)
    sizes = content.setdefault("metadata", {})
    if "total_size" in sizes:
        sizes["total_size"] += sum(tensor.size * tensor.width for tensor in added.values())
    write_bytes(folder / INDEX, json.dumps(content, indent=2).encode())


def add(job: Job, start: int, path: str, news: Sequence[New]) -> Result:
    """Add updates to one tensor of a copy of the base, in its place; returns its row.

    Parameters
    ----------
    job : Job
        Its `base` is the base's tensor as a matrix.
    start, path
        Where it lies in the copy.
    news : sequence of Pair or StoredTensor
        Factors, or the tensor saved whole.
    """
    base = job.base
    assert base is not None
    W0 = base.load()
    dW = np.zeros_like(W0)
    for new in news:
        dW += _difference(new, base, W0)
    # Rounding the sum of differences could miss a tensor that replaces the base's.
    only = news[0] if len(news) == 1 else None
    whole = only.load().reshape(W0.shape) if isinstance(only, StoredTensor) else None
    rows = max(1, ENTRIES // W0.shape[1])
    error = lost = lost_energy = 0.0
    with Path(path).open("r+b") as file:
        file.seek(start)
        for i in range(0, len(W0), rows):
            at = slice(i, i + rows)
            exact = W0[at] + dW[at] if whole is None else whole[at]
            stored = rounded(exact, base.dtype)
            if not np.isfinite(stored).all():
                raise WrongInput(
                    f"layer {job.layer!r}: the merged weight is not finite in {base.dtype}."
                    " Check the adapter, or give a base of another dtype."
                )
            file.write(encoded(stored, base.dtype))
            unmoved = (dW[at] != 0) & (stored == W0[at])
            error = math.hypot(error, frobenius((stored - W0[at]) - dW[at]))
            lost += float(np.count_nonzero(unmoved))
            lost_energy = math.hypot(lost_energy, frobenius(np.where(unmoved, dW[at], 0.0)))
    return _row(job, len(news), dW, (error, lost, lost_energy))


def _difference(new: New, base: StoredTensor, W0: Array) -> Array:
    if isinstance(new, Pair):
        return new.update(base, W0).dense()
    dW = new.load().reshape(W0.shape)
    dW -= W0
    return dW


def _row(job: Job, adapters: int, dW: Array, sums: tuple[float, float, float]) -> Result:
    """What `merge` says of a tensor, from the norms and the count of its blocks."""
    assert job.base is not None
    size, (m, n) = frobenius(dW), job.shape
    row = {"layer": job.layer, "m": m, "n": n, "dtype": job.base.dtype, "adapters": adapters}
    names = ("rounding", "lost", "lost_energy")
    if not size:
        return row | dict.fromkeys(names, math.nan)
    error, lost, lost_energy = sums
    numbers = (error / size, lost / np.count_nonzero(dW), (lost_energy / size) ** 2)
    return row | dict(zip(names, map(float, numbers), strict=True))
