"""Jobs from a base and a tuned model folder."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

from lora_lab.checkpoints.job import Job
from lora_lab.checkpoints.names import Matrices, layer_of, same_shape, to_base
from lora_lab.layers import natural
from lora_lab.registry import WrongInput
from lora_lab.tensorfile import BLOCK, StoredTensor, some

SAMPLE = 4096
"""Bytes by which tensors that cannot be equal are told apart."""

HEADS = ("head", "decoder", "embed_out", "output")
"""Words in names of output weights; a tied weight goes by the name of its embedding."""


def tuned_jobs(base: Matrices, tuned: Matrices) -> tuple[list[Job], list[str]]:
    """A job for each weight of both models, and notes on what was left out.

    Raises
    ------
    WrongInput
        For models that share no weight, or a weight of two shapes.
    """
    ours = to_base(tuned, base)
    if not ours:
        raise WrongInput(
            f"base and tuned have no weight in common (base has {some(base)};"
            f" tuned has {some(tuned)}). Give two models of one architecture."
        )
    tied_base, tied = copies(base), copies(tuned)
    jobs = []
    for name, known in ours.items():
        same_shape(layer_of(known), tuned[name].shape, base[known].shape, "tuned model")
        first = tied.get(name)
        if first is None or ours.get(first) != tied_base.get(known, ""):
            jobs.append(Job(layer_of(known), base[known], tuned[name]))
    sides = (
        (sorted(set(base) - set(ours.values()) - set(tied_base)), "only in the base"),
        (sorted(set(tuned) - set(ours) - set(tied)), "only in the tuned model"),
    )
    return jobs, [f"left out: {some(names)} {where}" for names, where in sides if names]


def copies(tensors: Matrices) -> dict[str, str]:
    """Names whose content another name holds too: tied weights that were saved twice.

    Returns
    -------
    dict of str to str
        Each further name to the first, which is not an output's if there is a choice. Constant
        tensors (an untrained table of zeros) are alike without being tied: they are no copies.
    """
    alike: dict[tuple[object, ...], list[str]] = defaultdict(list)
    for name in sorted(tensors, key=lambda n: (any(h in n for h in HEADS), natural(n))):
        alike[tensors[name].dtype, tensors[name].shape].append(name)
    out: dict[str, str] = {}
    for group in alike.values():
        firsts: dict[bytes, list[str]] = defaultdict(list)
        for name in group if len(group) > 1 else ():
            tensor = tensors[name]
            sample = _middle(tensor)
            if sample == sample[: tensor.width] * (len(sample) // tensor.width):
                continue
            same = (other for other in firsts[sample] if equal(tensors[other], tensor))
            if (first := next(same, None)) is None:
                firsts[sample].append(name)
            else:
                out[name] = first
    return out


def _middle(tensor: StoredTensor) -> bytes:
    """Bytes from its middle: the first row is often padding."""
    half = tensor.size // 2
    part = replace(tensor, start=tensor.start + half * tensor.width, shape=(tensor.size - half,))
    return next(part.blocks(SAMPLE), b"")


def equal(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors of one dtype and shape hold the same bytes."""
    return all(a == b for a, b in zip(one.blocks(BLOCK), other.blocks(BLOCK), strict=True))
