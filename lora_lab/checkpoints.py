"""Updates of models on disk that were made elsewhere; the one home of PEFT's file format.

Only safetensors and JSON are read. Tensors are memory-mapped and come one layer at a time.
"""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from lora_lab.layers import natural
from lora_lab.linalg import Dense, Factored, Update
from lora_lab.linalg.factored import Array, coarser
from lora_lab.registry import WrongInput
from lora_lab.tensorfile import (
    FLOATS,
    StoredTensor,
    holds_no,
    local_folder,
    matrices,
    model_matrices,
    read_json,
    some,
    tensors_of,
)

Layer: TypeAlias = tuple[str, Array | None, Update]
Matrices: TypeAlias = dict[str, StoredTensor]

PLAIN_STARTS = (True, False, "true", "false", "gaussian", "eva", "orthogonal", "mica")
"""`init_lora_weights` of PEFT that leave the base weight as it is, so that dW = scale B A."""

CHANGES_UPDATE = (
    "use_dora", "use_qalora", "use_bdlora", "kasa_config", "monteclora_config", "arrow_config",
    "layer_replication", "target_parameters", "alora_invocation_tokens",
)  # fmt: skip
"""Keys of adapter_config.json that make dW another thing than scale B A of one weight."""

HARMLESS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config",
    "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode",
    "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha",
    "lora_bias", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core",
    "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern",
    "revision", "runtime_config", "target_modules", "task_type", "trainable_token_indices",
    "use_rslora", "velora_config",
}  # fmt: skip
"""Keys that are read here, or that do not change dW of the factors."""


def read_updates(
    base: str | Path | None = None,
    tuned: str | Path | None = None,
    adapter: str | Path | None = None,
) -> Iterator[Layer]:
    """What fine-tuning did to every weight matrix of a model on disk, one layer at a time.

    Parameters
    ----------
    base : path
        Local Hugging Face folder of the base model, with safetensors (single or sharded); may be
        left out for an adapter.
    tuned : path
        Local Hugging Face folder of the tuned model.
    adapter : path
        Folder of a PEFT LoRA adapter; exactly one of `tuned` and `adapter` is given.

    Returns
    -------
    iterator of (layer, W0, update)
        Layers in the model's order, named as in the base's state dict without `.weight`, updates
        in the orientation of the state dict's weight; W0 (m, n) in float64, None without base.
        The update is `Dense` (both weights cast to float64 before subtracting) or `Factored`.
        All that headers and configs tell is checked before the first layer is read.

    Raises
    ------
    WrongInput
        A folder or file that is missing, damaged or pickled, shapes that differ, no layer in
        common, an adapter of a kind that is not read yet.

    Warns
    -----
    UserWarning
        Once, with the names, if matrices of one side are missing on the other or not understood.
    """
    if (tuned is None) == (adapter is None):
        raise WrongInput("give exactly one of tuned (a model folder) and adapter (a PEFT folder).")
    if tuned is not None and base is None:
        raise WrongInput("a tuned model needs its base: give the base model's folder as base.")
    weights = None if base is None else model_matrices(base, "base")
    if adapter is not None:
        jobs, notes = _adapter_jobs(weights, local_folder(adapter, "adapter"))
    else:
        assert weights is not None
        assert tuned is not None
        jobs, notes = _tuned_jobs(weights, model_matrices(tuned, "tuned"))
    if notes:
        warnings.warn("; ".join(notes) + ".", stacklevel=2)
    jobs.sort(key=lambda job: natural(job.layer))
    return (job.load() for job in jobs)


@dataclass(frozen=True)
class _Pair:
    """The factors of one module of an adapter."""

    A: StoredTensor
    B: StoredTensor
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.B.shape[0], self.A.shape[1]


@dataclass(frozen=True)
class _Job:
    """One layer that has been checked and is to be loaded when its turn comes."""

    layer: str
    base: StoredTensor | None
    new: StoredTensor | _Pair
    transposed: bool = False

    def load(self) -> Layer:
        W0 = None if self.base is None else self.base.load()
        if isinstance(self.new, _Pair):
            A, B = self.new.A.load(), self.new.B.load()
            made_in = coarser(self.new.A.dtype, self.new.B.dtype)
            factors = (A.T, B.T) if self.transposed else (B, A)
            return self.layer, W0, Factored(*factors, self.new.scale, made_in)
        assert self.base is not None
        assert W0 is not None
        made_in = coarser(self.base.dtype, self.new.dtype)
        return self.layer, W0, Dense(self.new.load() - W0, made_in)


def _layer(name: str) -> str:
    return name.removesuffix(".weight")


def _to_base(names: Collection[str], base: Collection[str]) -> dict[str, str]:
    """Each name as the base calls it, for those that it has.

    Models with and without a head differ by one prefix (`bert.encoder...`, `encoder...`): the
    one that most unmatched names agree on is taken off or put on.
    """
    out = {name: name for name in names if name in base}
    others = [name for name in names if name not in base]
    prefixes = defaultdict(list)
    for name in base:
        for head, tail in _splits(name):
            prefixes[tail].append(head)
    votes: Counter[tuple[str, str]] = Counter()
    for name in others:
        votes.update((head, "") for head, tail in _splits(name) if tail in base)
        votes.update(("", head) for head in prefixes[name])
    if votes:
        (off, on), _ = votes.most_common(1)[0]
        for name in others:
            renamed = on + name.removeprefix(off)
            if name.startswith(off) and renamed in base and renamed not in out:
                out[name] = renamed
    return out


def _splits(name: str) -> list[tuple[str, str]]:
    """A name cut after each of its dots."""
    return [(name[: i + 1], name[i + 1 :]) for i, c in enumerate(name) if c == "."]


def _same_shape(layer: str, ours: tuple[int, ...], base: tuple[int, ...], kind: str) -> None:
    if ours != base:
        raise WrongInput(
            f"layer {layer!r} has shape {ours} in the {kind} and {base} in the base."
            " Give the base model that it was made from."
        )


def _tuned_jobs(base: Matrices, tuned: Matrices) -> tuple[list[_Job], list[str]]:
    ours = _to_base(tuned, base)
    if not ours:
        raise WrongInput(
            f"base and tuned have no weight in common (base has {some(base)};"
            f" tuned has {some(tuned)}). Give two models of one architecture."
        )
    jobs = []
    for name, known in ours.items():
        _same_shape(_layer(known), tuned[name].shape, base[known].shape, "tuned model")
        jobs.append(_Job(_layer(known), base[known], tuned[name]))
    sides = (
        (sorted(set(base) - set(ours.values())), "only in the base"),
        (sorted(set(tuned) - set(ours)), "only in the tuned model"),
    )
    return jobs, [f"left out: {some(names)} {where}" for names, where in sides if names]


class _Rule:
    """PEFT's rule for r and scale of each module, from adapter_config.json.

    A pattern is a regular expression; it matches a module whose name it is, or whose name ends
    with it after a dot, and the first that matches wins.
    """

    def __init__(self, path: Path) -> None:
        config = read_json(path)
        kind = config.get("peft_type")
        if kind != "LORA":
            raise WrongInput(f"{path}: peft_type {kind!r} is not read yet; read today: 'LORA'.")
        for key in CHANGES_UPDATE:
            if config.get(key):
                raise WrongInput(f"{path}: {key} is not read yet (dW is not scale B A with it).")
        start = config.get("init_lora_weights", True)
        if (start.lower() if isinstance(start, str) else start) not in PLAIN_STARTS:
            raise WrongInput(
                f"{path}: init_lora_weights {start!r} changes the base weight, which is not read"
                " yet. Save with path_initial_model_for_weight_conversion to get plain LoRA."
            )
        self.notes = []
        for key in ("r", "lora_alpha"):
            if key not in config:
                self.notes.append(f"{path.name} has no {key}: PEFT's default 8 is taken")
        unknown = sorted(key for key, value in config.items() if value and key not in HARMLESS)
        if unknown:
            self.notes.append(f"{path.name} has unknown keys {some(unknown)}, taken as harmless")
        self.rslora = bool(config.get("use_rslora"))
        self.transposed = bool(config.get("fan_in_fan_out"))
        self.r = _numbers(path, config.get("r", 8), config.get("rank_pattern"))
        self.alpha = _numbers(path, config.get("lora_alpha", 8), config.get("alpha_pattern"))

    def of(self, module: str) -> tuple[float, float]:
        """(r, scale) of a module, named as in the base model."""
        r, alpha = (
            next(number for pattern, number in rules if pattern.match(module))
            for rules in (self.r, self.alpha)
        )
        return r, alpha / (math.sqrt(r) if self.rslora else r)


def _numbers(path: Path, default: object, given: object) -> list[tuple[re.Pattern[str], float]]:
    """Patterns with their numbers in PEFT's order, the default last (it matches everything)."""
    patterns = given if isinstance(given, dict) else {}
    rules = [(rf"(.*\.)?({key})$", number) for key, number in patterns.items()]
    out = []
    for key, number in [*rules, ("", default)]:
        if not isinstance(number, (int, float)) or not 0 < number < math.inf:
            raise WrongInput(f"{path}: r and lora_alpha must be numbers above 0; got {number!r}.")
        try:
            out.append((re.compile(key), number))
        except re.error as error:
            raise WrongInput(
                f"{path}: pattern {key!r} is no regular expression ({error})."
            ) from None
    return out


def _adapter_jobs(base: Matrices | None, folder: Path) -> tuple[list[_Job], list[str]]:
    config, file = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if not config.is_file():
        raise holds_no(folder, "adapter_config.json (is it a PEFT adapter?)")
    rule = _Rule(config)
    if not file.is_file():
        raise holds_no(folder, "adapter_model.safetensors")
    pairs, rest = _pairs(file, rule)
    extra = matrices(rest)
    ours = _to_base([*pairs, *extra], base or ())
    if base is not None and not set(pairs) & set(ours):
        raise WrongInput(
            f"adapter and base have no layer in common (adapter has {some(pairs)};"
            f" base has {some(base)}). Give the base model that it was made from."
        )
    known = base or {}
    jobs, alone, left = [], [], []
    for name, pair in pairs.items():
        W0 = known.get(ours.get(name, ""))
        layer = _layer(ours.get(name, name))
        jobs.append(_Job(layer, W0, pair, _transposed(layer, pair, W0, rule.transposed)))
        if base is not None and W0 is None:
            alone.append(layer)
    for name, tensor in extra.items():
        W0 = known.get(ours.get(name, ""))
        if W0 is None or W0.shape != tensor.shape:
            left.append(name)
        else:
            jobs.append(_Job(_layer(ours[name]), W0, tensor))
    notes = rule.notes
    notes += [f"{some(sorted(alone))} not in the base: no W0 for them"] if alone else []
    notes += [f"left out: {some(sorted(left))}, not comparable with the base"] if left else []
    return jobs, notes


def _pairs(file: Path, rule: _Rule) -> tuple[dict[str, _Pair], Matrices]:
    """lora_A and lora_B of each module by the name of its weight, and all other tensors."""
    rest = {n.removeprefix("base_model.model."): t for n, t in tensors_of(file).items()}
    pairs = {}
    for name in list(rest):
        if "lora_embedding_" in name or "lora_magnitude_vector" in name:
            raise WrongInput(f"{file}: {name!r} (LoRA of an embedding, or DoRA) is not read yet.")
        if not name.endswith(".lora_A.weight"):
            continue
        module = name.removesuffix(".lora_A.weight")
        A, B = rest.pop(name), rest.pop(f"{module}.lora_B.weight", None)
        if B is None:
            raise WrongInput(f"{file}: layer {module!r} has lora_A but no lora_B.")
        if len(A.shape) != 2 or len(B.shape) != 2:
            raise WrongInput(f"{file}: layer {module!r} is a convolution, which is not read yet.")
        if not {A.dtype, B.dtype} <= set(FLOATS.values()):
            raise WrongInput(
                f"{file}: layer {module!r} is stored as {A.dtype}; allowed: {', '.join(FLOATS)}."
            )
        r, scale = rule.of(module)
        if not A.shape[0] == B.shape[1] == r:
            raise WrongInput(
                f"{file}: layer {module!r} has lora_A {A.shape} and lora_B {B.shape}, but"
                f" adapter_config.json gives it r = {r}."
            )
        pairs[f"{module}.weight"] = _Pair(A, B, scale)
    if not pairs:
        raise WrongInput(f"{file} holds no lora_A and lora_B weights. Is it a LoRA adapter?")
    return pairs, rest


def _transposed(layer: str, pair: _Pair, W0: StoredTensor | None, flag: bool) -> bool:
    """Whether dW lies transposed in the state dict (GPT-2's Conv1D).

    The base's shape decides; PEFT saves one flag for all modules, which is wrong where a model
    mixes both kinds, so it counts only for square weights and without a base.
    """
    square = pair.shape[0] == pair.shape[1]
    turned = flag if W0 is None or square else W0.shape == pair.shape[::-1]
    if W0 is not None:
        _same_shape(layer, pair.shape[::-1] if turned else pair.shape, W0.shape, "adapter")
    return turned
