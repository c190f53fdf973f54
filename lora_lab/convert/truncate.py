"""An adapter to a smaller one, in factor space."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import pandas as pd

from lora_lab.checkpoints.job import Job, Pair
from lora_lab.checkpoints.names import layer_of, to_base
from lora_lab.checkpoints.peft import (
    CONFIG,
    EMBEDDING,
    ENDS,
    PARTS,
    PREFIX,
    WEIGHTS,
    Adapter,
    oriented,
    read_whole_adapter,
)
from lora_lab.checkpoints.write import factor_names, lora_config, whole_name
from lora_lab.convert.cut import Cut, Size, cut_all, finish
from lora_lab.convert.folder import new_folder
from lora_lab.layers import natural
from lora_lab.linalg.factored import coarser
from lora_lab.registry import WrongInput
from lora_lab.tasks import Tell
from lora_lab.tensorfile import (
    StoredTensor,
    local_folder,
    model_matrices,
    read_json,
    some,
    tensors_of,
)

KEPT = (
    "base_model_name_or_path", "bias", "ensure_weight_tying", "fan_in_fan_out", "lora_dropout",
    "modules_to_save", "revision", "task_type",
)  # fmt: skip
"""Keys of adapter_config.json that stay as they are: they say nothing of the factors."""


def truncate(
    adapter: str | Path,
    out: str | Path,
    size: Size,
    base: str | Path | None = None,
    tell: Tell = lambda done, total, share: None,
) -> pd.DataFrame:
    """Write the best approximation of an adapter's updates as a smaller LoRA adapter.

    Each layer's factors are cut by the QR core of B and A, without forming dW, and come out
    balanced with alpha = r, in the dtype that they were stored in. Plain LoRA, rsLoRA, AdaLoRA
    and starts that `base` can make again become plain LoRA; what was saved whole stays.

    Parameters
    ----------
    adapter : path
        Folder of a PEFT adapter, LoRA or AdaLoRA, not DoRA.
    out : path
        Not there yet, or an empty folder. It is there whole or not at all.
    size : Size
        `r` or `energy`. A layer that has fewer directions than `r` keeps them all.
    base : path, optional
        Needed for the starts that took a part out of the base weight (`pissa`, `olora`).
    tell : callable
        Hears how far it is (see `tasks.Tell`).

    Returns
    -------
    DataFrame
        A row for each layer with the columns that `cut.cut` describes. Layers with dW = 0 have
        r = 0 and are not in the new adapter.

    Raises
    ------
    WrongInput
        As `checkpoints.updates`; for DoRA, an r above that of every layer, an adapter of zeros,
        or an `out` that is there.

    Warns
    -----
    UserWarning
        Once: keys of adapter_config.json that are missing or unknown.
    """
    source = local_folder(adapter, "adapter")
    held = read_whole_adapter(source)
    if held.config.dora:
        raise WrongInput(
            f"{source}: DoRA's dW is no product of factors and cannot be truncated. Merge it"
            " (lora-lab merge), then extract the merged model (lora-lab extract)."
        )
    jobs = _jobs(held, source, base)
    _check(size, jobs)
    with new_folder(out) as folder:
        cuts = {
            name: Cut(job, size.r, size.energy, _dtype(pair), folder / f"part-{i}", pair.turned)
            for i, (name, (job, pair)) in enumerate(jobs.items())
        }
        rows = dict(zip(cuts, cut_all(list(cuts.values()), tell), strict=True))
        kept = {name: row["r"] for name, row in rows.items() if row["r"]}
        if not kept:
            raise WrongInput(f"{source}: every update is zero: nothing to truncate.")
        stored = tensors_of(source / WEIGHTS)
        tensors = _whole(stored, kept)
        for name in kept:
            tensors |= _factors(name, cuts[name].stored(rows[name]), stored)
        config = read_json(source / CONFIG)
        more = {key: config[key] for key in KEPT if key in config}
        content = lora_config({n: (r, r) for n, r in kept.items()}, jobs, **more)
        finish(folder, content, tensors, cuts.values())
    if held.config.notes:
        warnings.warn("; ".join(held.config.notes) + ".", stacklevel=2)
    return pd.DataFrame(rows.values())


def _jobs(held: Adapter, source: Path, base: str | Path | None) -> dict[str, tuple[Job, Pair]]:
    """Each module's job, and its factors in the orientation of the state dict, by PEFT's name.

    Only a start that took a part out of the base weight needs the base.
    """
    if held.config.start is None:
        found = {layer_of(n): (Job(layer_of(n), None, p), p) for n, p in held.pairs.items()}
    else:
        if base is None:
            raise WrongInput(
                f"{source}: with init_lora_weights {held.config.start!r} dW depends on the base"
                " weight. Give the original base model as base."
            )
        weights = model_matrices(base, "base")
        ours = to_base(held.pairs, weights)
        if lost := [layer_of(name) for name in held.pairs if name not in ours]:
            raise WrongInput(f"{some(lost)} of {source} are not in the base. Give its own base.")
        found = {}
        for name, pair in held.pairs.items():
            W0, layer = weights[ours[name]], layer_of(ours[name])
            pair = oriented(layer, pair, W0)
            found[layer_of(name)] = Job(layer, W0, pair), pair
    return dict(sorted(found.items(), key=lambda item: natural(item[0])))


def _check(size: Size, jobs: Mapping[str, tuple[Job, Pair]]) -> None:
    if size.ranks is not None:
        raise WrongInput("truncate takes r or energy, for all layers; got ranks.")
    # A start adds its own directions to those of the factors.
    of = {layer: p.A.shape[0] * (2 if p.start else 1) for layer, (_, p) in jobs.items()}
    layer = max(of, key=of.__getitem__)
    if size.r is not None and size.r > of[layer]:
        m, n = jobs[layer][0].shape
        raise WrongInput(
            f"r must be in [1, {of[layer]}], the directions that layer {layer!r} ({m}×{n}) has,"
            f" the most of all; got {size.r}."
        )


def _dtype(pair: Pair) -> str:
    return coarser(pair.A.dtype, pair.B.dtype)


def _whole(stored: Mapping[str, StoredTensor], layers: Collection[str]) -> dict[str, StoredTensor]:
    """What an adapter holds beside its factors, under PEFT's names beside new factors."""
    tails = (*ENDS, *ENDS.values(), *(tail for _, tail in PARTS))
    out = {}
    for name, tensor in stored.items():
        if not name.endswith(tails):
            plain = name.removeprefix(PREFIX).replace(".base_layer.", ".")
            out[whole_name(plain, layers) if ".base_layer." in name else name] = tensor
    return out


def _factors(
    layer: str, new: tuple[StoredTensor, StoredTensor], stored: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """New factors in the shape that PEFT gives to those of this kind of module."""
    end = next(end for end in ENDS if f"{PREFIX}{layer}{end}" in stored)
    kernel = stored[f"{PREFIX}{layer}{end}"].shape[1:]
    A, B = new
    A = replace(A, shape=(A.shape[0], *kernel))
    B = replace(B, shape=(*B.shape, *(1 for _ in kernel[1:])))
    return dict(zip(factor_names(layer, end == EMBEDDING), (A, B), strict=True))
