"""A full fine-tuned pair to a LoRA adapter."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from lora_lab.checkpoints import Job
from lora_lab.checkpoints.names import layer_of, to_base
from lora_lab.checkpoints.tuned import equal, tuned_jobs
from lora_lab.checkpoints.write import factor_names, lora_config, whole_name
from lora_lab.convert.cut import Cut, Size, cut_all, finish
from lora_lab.convert.folder import new_folder
from lora_lab.layers import depth_of, natural
from lora_lab.registry import WrongInput, unknown
from lora_lab.targets import role
from lora_lab.tasks import Tell
from lora_lab.tensorfile import (
    FLOATS,
    StoredTensor,
    local_folder,
    matrices,
    model_tensors,
    read_json,
    some,
)

Tensors = Mapping[str, StoredTensor]

LOOKED_UP = ("embed", "relative_attention_bias")
"""Words in names of tables inside blocks, which are no linear layers."""


def extract(
    base: str | Path,
    tuned: str | Path,
    out: str | Path,
    size: Size,
    dtype: str = "float32",
    tell: Tell = lambda done, total, share: None,
) -> pd.DataFrame:
    """Write a LoRA adapter that PEFT loads: the best approximation of each layer's dW.

    Linear layers of the blocks get balanced factors (alpha = r). What else training changed
    (norms, biases, embeddings, heads, convolutions) has no factors in LoRA and is saved whole:
    under `modules_to_save` where that says it, else under the tensor's own name, as PEFT saves
    biases and resized embeddings. With r = min(m, n) the adapter is the tuned model.

    Parameters
    ----------
    base, tuned : path
        As in `checkpoints.updates`. Modules in the adapter are named as in `tuned`.
    out : path
        Not there yet, or an empty folder. It is there whole or not at all.
    size : Size
    dtype : str
        Of the factors: float64, float32, float16 or bfloat16.
    tell : callable
        Hears how far it is (see `tasks.Tell`).

    Returns
    -------
    DataFrame
        A row for each layer, named as in `base`, with the columns that `cut.cut` describes.
        Layers that training did not change have r = 0 and are not in the adapter.

    Raises
    ------
    WrongInput
        As `checkpoints.updates`; for an r out of a layer's range, a layer of `size.ranks` that is
        none, a pair without any changed linear layer, or an `out` that is there.

    Warns
    -----
    UserWarning
        Once: what is saved whole, and which layers have no r in `size.ranks`.
    """
    plan = _plan(base, tuned)
    chosen = _chosen(plan, size)
    with new_folder(out) as folder:
        cuts = {
            name: Cut(
                job,
                size.of(job.layer),
                size.energy,
                dtype,
                folder / f"part-{i}",
                name in plan.turned,
            )
            for i, (name, job) in enumerate(chosen.items())
        }
        rows = dict(zip(cuts, cut_all(list(cuts.values()), tell), strict=True))
        changed = {name: row["r"] for name, row in rows.items() if row["r"]}
        if not changed:
            raise WrongInput("base and tuned have the same linear layers: nothing to extract.")
        tensors: dict[str, StoredTensor] = {}
        for name in changed:
            tensors |= zip(factor_names(name), cuts[name].stored(rows[name]), strict=True)
        modules, others = _saved(plan, changed)
        tensors |= {whole_name(name, changed): plan.tuned[name] for name in others}
        more: dict[str, Any] = {
            "base_model_name_or_path": str(local_folder(base, "base").resolve()),
            "modules_to_save": modules or None,
            "bias": "all" if any(n.rpartition(".")[0] in changed for n in others) else "none",
            "fan_in_fan_out": bool(plan.turned & changed.keys()),
        }
        content = lora_config({n: (r, r) for n, r in changed.items()}, plan.modules, **more)
        finish(folder, content, tensors, cuts.values())
    _warn(plan, others, chosen)
    return pd.DataFrame(rows.values())


@dataclass(frozen=True)
class Plan:
    """What of a pair can have factors, and what else changed.

    Attributes
    ----------
    tuned : mapping of str to StoredTensor
        Every tensor of the tuned model.
    linear : dict of str to Job
        Linear layers of the blocks, by the tuned model's name, in its order.
    turned : set of str
        Those of them that are stored as (in, out).
    whole : list of str
        Other tensors that the base does not have, or has otherwise.
    new : set of str
        Those of them that the base does not have.
    tied : bool
        Whether an output may share the embedding's weight.
    """

    tuned: Tensors
    linear: dict[str, Job]
    turned: set[str]
    whole: list[str]
    new: set[str]
    tied: bool

    @property
    def modules(self) -> set[str]:
        """Every name of a module, also of those that hold others."""
        parts = [name.split(".")[:-1] for name in self.tuned]
        return {".".join(p[: i + 1]) for p in parts for i in range(len(p))}


def _plan(base: str | Path, tuned: str | Path) -> Plan:
    old, new = model_tensors(base, "base"), model_tensors(tuned, "tuned")
    jobs, _ = tuned_jobs(matrices(old), matrices(new))
    ours = to_base(new, old)
    theirs = {layer_of(known): name for name, known in ours.items()}
    linear = {
        layer_of(theirs[job.layer]): job
        for job in sorted(jobs, key=lambda job: natural(job.layer))
        if _linear(theirs[job.layer], new[theirs[job.layer]])
    }
    rest = [
        name for name in new if layer_of(name) not in linear and new[name].dtype in FLOATS.values()
    ]
    whole = [name for name in rest if name not in ours or not _same(old[ours[name]], new[name])]
    config = local_folder(tuned, "tuned") / "config.json"
    tied = (read_json(config) if config.is_file() else {}).get("tie_word_embeddings", True)
    return Plan(new, linear, _turned(linear, new), whole, set(whole) - set(ours), bool(tied))


def _linear(name: str, tensor: StoredTensor) -> bool:
    """Whether a weight is that of a linear layer in a block, by its name and shape."""
    layer = layer_of(name)
    looked_up = any(word in layer for word in LOOKED_UP)
    inside = not math.isnan(depth_of(layer)) and role(layer) != "outside"
    return name.endswith(".weight") and len(tensor.shape) == 2 and inside and not looked_up


def _same(one: StoredTensor, other: StoredTensor) -> bool:
    if one.shape != other.shape:
        return False
    if one.dtype == other.dtype:
        return equal(one, other)
    return bool((one.load() == other.load()).all())


def _turned(linear: Mapping[str, Job], tensors: Tensors) -> set[str]:
    """Layers stored as (in, out), as GPT-2's: a bias has as many entries as there are outputs.

    Square layers, and those without a bias, are as the others of their model are.
    """
    known = {}
    for name, job in linear.items():
        bias = tensors.get(f"{name}.bias")
        if bias is not None and job.shape[0] != job.shape[1] and bias.size in job.shape:
            known[name] = bias.size == job.shape[1]
    others = bool(known) and all(known.values())
    return {name for name in linear if known.get(name, others)}


def _chosen(plan: Plan, size: Size) -> dict[str, Job]:
    """The layers to cut, their r checked."""
    layers = {job.layer for job in plan.linear.values()}
    for layer in size.ranks or ():
        if layer not in layers:
            raise unknown("layer of ranks", layer, sorted(layers, key=natural))
    if not layers:
        raise WrongInput("the models have no linear layers in blocks: nothing to extract.")
    chosen = {
        name: job
        for name, job in plan.linear.items()
        if size.ranks is None or job.layer in size.ranks
    }
    for job in chosen.values():
        r, (m, n) = size.of(job.layer), job.shape
        if r is not None and r > min(m, n):
            raise WrongInput(
                f"r must be in [1, {min(m, n)}] for layer {job.layer!r} ({m}×{n}); got {r}."
                " Lower r, or give each layer its own (ranks)."
            )
    return chosen


def _saved(plan: Plan, layers: Collection[str]) -> tuple[list[str], list[str]]:
    """Modules for PEFT's modules_to_save, and the names of all tensors to save whole.

    PEFT takes each module whose name ends in a given one, wants every tensor of it, and gives it
    a weight of its own: where that would hit another module or untie an output from its
    embedding, a tensor goes by its own name.
    """
    modules, tensors = [], []
    for name in plan.whole:
        module, _, leaf = name.rpartition(".")
        own = [other for other in plan.tuned if other.rpartition(".")[0] == module]
        alone = not any(other != module and other.endswith(module) for other in plan.modules)
        table = len(plan.tuned[name].shape) == 2 and len(own) == 1 and name not in plan.new
        bare = leaf not in ("weight", "bias")
        if module in layers or not alone or bare or (table and plan.tied):
            tensors.append(name)
        elif module not in modules:
            modules.append(module)
            tensors += own
    return modules, tensors


def _warn(plan: Plan, others: Collection[str], chosen: Collection[str]) -> None:
    notes = []
    if others:
        megabytes = sum(plan.tuned[n].size * plan.tuned[n].width for n in others) / 1e6
        notes.append(f"saved whole, having no factors in LoRA: {some(others)} ({megabytes:.1f} MB)")
    if left := [job.layer for name, job in plan.linear.items() if name not in chosen]:
        notes.append(f"left out, having no r in ranks: {some(left)}")
    if notes:
        warnings.warn("; ".join(notes) + ".", stacklevel=3)
