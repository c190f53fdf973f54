"""Jobs from a PEFT adapter folder: its tensors by module, beside the base's weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from lora_lab.checkpoints.job import Job, Pair
from lora_lab.checkpoints.names import Matrices, layer_of, same_shape, to_base
from lora_lab.checkpoints.peft_config import MERGE, AdapterConfig, adapter_config
from lora_lab.registry import WrongInput
from lora_lab.tensorfile import FLOATS, StoredTensor, flat, holds_no, matrices, some, tensors_of

PREFIX = "base_model.model."
"""What PEFT puts before a module's name in the base model."""

EMBEDDING = ".lora_embedding_A"

ENDS = {
    ".lora_A.weight": ".lora_B.weight",
    ".lora_A": ".lora_B",
    EMBEDDING: ".lora_embedding_B",
}
"""Ends of the names of A and B: modules, AdaLoRA's parameters, embeddings."""

PARTS = (
    ("E", ".lora_E"),
    ("magnitude", ".lora_magnitude_vector"),
    ("magnitude", ".lora_magnitude_vector.weight"),
)
"""What else a module may have, and the ends of its name."""


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""The two files of an adapter."""


@dataclass(frozen=True)
class Adapter:
    """What an adapter's folder holds.

    Attributes
    ----------
    config : AdapterConfig
    pairs : dict of str to Pair
        Factors by the name of their weight.
    whole : dict of str to StoredTensor
        Tensors that were saved whole, by PEFT's name for them, of any shape.
    """

    config: AdapterConfig
    pairs: dict[str, Pair]
    whole: dict[str, StoredTensor]


def read_adapter(folder: Path) -> Adapter:
    """The content of an adapter's folder, checked but not loaded.

    Raises
    ------
    WrongInput
        As `checkpoints.updates`.
    """
    config_file, file = folder / CONFIG, folder / WEIGHTS
    if not config_file.is_file():
        raise holds_no(folder, f"{CONFIG} (is it a PEFT adapter?)")
    config = adapter_config(config_file)
    if not file.is_file():
        raise holds_no(folder, WEIGHTS)
    return Adapter(config, *_pairs(file, config))


def read_whole_adapter(folder: Path) -> Adapter:
    """As `read_adapter`, for those who must not lose anything of an adapter.

    Raises
    ------
    WrongInput
        Also where the adapter changes the model beside its factors and the tensors saved whole.
    """
    held = read_adapter(folder)
    if held.config.beside:
        raise WrongInput(f"{folder}: {', '.join(held.config.beside)} cannot be kept. {MERGE}")
    return held


def adapter_jobs(base: Matrices | None, folder: Path) -> tuple[list[Job], list[str]]:
    """A job for each module of an adapter and each weight that it saved whole, and notes.

    Raises
    ------
    WrongInput
        As `checkpoints.updates`.
    """
    held = read_adapter(folder)
    config, pairs, extra = held.config, held.pairs, matrices(held.whole)
    if base is None and (config.dora or config.start):
        what = "DoRA" if config.dora else f"init_lora_weights {config.start!r}"
        raise WrongInput(
            f"{folder}: with {what} dW depends on the base weight. Give the original base model"
            " (not the one that the start has changed) as base."
        )
    ours = to_base([*pairs, *extra], base or ())
    if base is not None and not set(pairs) & set(ours):
        raise WrongInput(
            f"adapter and base have no layer in common (adapter has {some(pairs)};"
            f" base has {some(base)}). Give the base model that it was made from."
        )
    known = base or {}
    jobs, alone, left = [], [], []
    for name, pair in pairs.items():
        W0, layer = known.get(ours.get(name, "")), layer_of(ours.get(name, name))
        if W0 is None and pair.needs_base:
            left.append(layer)
            continue
        jobs.append(Job(layer, W0, oriented(layer, pair, W0)))
        if base is not None and W0 is None:
            alone.append(layer)
    for name, tensor in extra.items():
        W0 = known.get(ours.get(name, ""))
        if W0 is None or W0.shape != tensor.shape:
            left.append(name)
        else:
            jobs.append(Job(layer_of(ours[name]), W0, tensor))
    notes = list(config.notes)
    notes += [f"{some(sorted(alone))} not in the base: no W0 for them"] if alone else []
    notes += [f"left out: {some(sorted(left))}, not comparable with the base"] if left else []
    return jobs, notes


def _pairs(file: Path, config: AdapterConfig) -> tuple[dict[str, Pair], Matrices]:
    """The factors of each module by the name of its weight, and the tensors saved whole."""
    rest = {n.removeprefix(PREFIX): t for n, t in tensors_of(file).items()}
    pairs = {}
    for name in list(rest):
        end = next((end for end in ENDS if name.endswith(end)), None)
        if end is None:
            continue
        module = name.removesuffix(end)
        found = {"A": rest.pop(name)}
        for part, tail in (("B", ENDS[end]), *PARTS):
            if (tensor := rest.pop(module + tail, None)) is not None:
                found[part] = tensor
        # The frozen weight below the factors, which PEFT saves beside those of an embedding.
        rest.pop(f"{module}.base_layer.weight", None)
        pair = _pair(found, config, config.of(module), f"{file}: layer {module!r}")
        if end == EMBEDDING:
            # PEFT's embeddings look factors up by token: stored turned, and their starts are plain.
            pair = replace(pair, turned=True, start=None)
        pairs[f"{module}.weight"] = pair
    if not pairs:
        raise WrongInput(f"{file} holds no lora_A and lora_B weights. Is it a LoRA adapter?")
    tails = (*ENDS.values(), *(tail for _, tail in PARTS))
    if strange := sorted(name for name in rest if name.endswith(tails)):
        raise WrongInput(f"{file}: {some(strange)} without its lora_A. Save the adapter again.")
    return pairs, rest


def _pair(
    found: dict[str, StoredTensor], config: AdapterConfig, rule: tuple[float, float], where: str
) -> Pair:
    """One module's factors, checked against each other and against the config's (r, scale)."""
    wanted = {"A", "B", *(["E"] if config.adalora else []), *(["magnitude"] if config.dora else [])}
    if wanted != set(found):
        raise WrongInput(
            f"{where} has the parts {', '.join(sorted(found))}; by adapter_config.json it has"
            f" {', '.join(sorted(wanted))}. Save the adapter again."
        )
    for tensor in found.values():
        if tensor.dtype not in FLOATS.values():
            raise WrongInput(f"{where} is stored as {tensor.dtype}; allowed: {', '.join(FLOATS)}.")
    r, scale = rule
    A, B = found["A"], found["B"]
    fits = len(A.shape) > 1 and len(B.shape) > 1 and A.shape[0] == r == flat(B).shape[1]
    if not fits:
        raise WrongInput(
            f"{where} has lora_A {A.shape} and lora_B {B.shape}, but adapter_config.json gives it"
            f" r = {r}. Save the adapter again (grouped convolutions are not read)."
        )
    linear = len(A.shape) == 2
    A, B = flat(A), flat(B)
    E, magnitude = found.get("E"), found.get("magnitude")
    sizes = [E is None or E.size == r, magnitude is None or magnitude.size == B.shape[0]]
    if not all(sizes) or 0 in (B.shape[0], A.shape[1]):
        shapes = ", ".join(f"{part} {tensor.shape}" for part, tensor in found.items())
        raise WrongInput(f"{where} has parts that do not fit: {shapes}. Save the adapter again.")
    start = config.start if linear else None
    return Pair(A, B, scale, config.turned and linear, E, magnitude, start)


def oriented(layer: str, pair: Pair, W0: StoredTensor | None) -> Pair:
    """The pair in the orientation of the base's weight.

    PEFT saves one flag (`fan_in_fan_out`) for all modules, which is wrong where a model mixes
    both kinds: it counts only for square weights and without a base.
    """
    if W0 is None:
        return pair
    other = replace(pair, turned=not pair.turned)
    if W0.shape == other.shape and W0.shape != pair.shape:
        return other
    same_shape(layer, pair.shape, W0.shape, "adapter")
    return pair
