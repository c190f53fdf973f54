"""PEFT's adapter_config.json: which r and scale each module has, and what cannot be read."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_lab.checkpoints.starts import STARTS
from lora_lab.registry import WrongInput
from lora_lab.tensorfile import read_json, some

PLAIN_STARTS = ("true", "false", "gaussian", "eva", "orthogonal", "mica")
"""`init_lora_weights` of PEFT that leave the base weight as it is."""

CHANGES_UPDATE = (
    "use_qalora", "use_bdlora", "kasa_config", "monteclora_config", "arrow_config",
    "layer_replication", "target_parameters", "alora_invocation_tokens",
)  # fmt: skip
"""Keys of adapter_config.json that make dW another thing than scale B A of one weight."""

BESIDE = ("lora_bias", "trainable_token_indices")
"""Keys that say that the adapter changes the model beside dW of its factors and whole tensors."""

HARMLESS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config",
    "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode",
    "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha",
    "lora_bias", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core",
    "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern",
    "revision", "runtime_config", "target_modules", "task_type", "trainable_token_indices",
    "use_dora", "use_rslora", "velora_config",
}  # fmt: skip
"""Keys that are read here, or that do not change dW of the factors."""

OF_ADALORA = {
    "beta1", "beta2", "deltaT", "init_r", "orth_reg_weight", "target_r", "tfinal", "tinit",
    "total_step",
}  # fmt: skip

MERGE = "Merge it with PEFT (merge_and_unload) and give the merged model as tuned."


@dataclass(frozen=True)
class AdapterConfig:
    """What adapter_config.json says about the factors.

    Attributes
    ----------
    adalora, dora, turned : bool
        The method; `turned` is `fan_in_fan_out`.
    start : str or None
        Name in `STARTS` if the start changed the base weight.
    beside : list of str
        Keys of `BESIDE` that are set.
    notes : list of str
        What the user should know of it.
    of : callable
        (r, scale) of a module, named as in the base model.
    """

    adalora: bool
    dora: bool
    turned: bool
    start: str | None
    beside: list[str]
    notes: list[str]
    of: Callable[[str], tuple[float, float]]


def adapter_config(path: Path) -> AdapterConfig:
    """Read and check an adapter_config.json.

    Raises
    ------
    WrongInput
        For a kind of adapter whose update cannot be told from its files, and for values that
        PEFT would not take.
    """
    config = read_json(path)
    kind = config.get("peft_type")
    if kind not in ("LORA", "ADALORA"):
        raise WrongInput(
            f"{path}: peft_type {kind!r} is not read; allowed: 'LORA', 'ADALORA'. {MERGE}"
        )
    for key in CHANGES_UPDATE:
        if config.get(key):
            raise WrongInput(
                f"{path}: {key} is not read (dW is not scale B A of one weight). {MERGE}"
            )
    adalora = kind == "ADALORA"
    known = HARMLESS | OF_ADALORA if adalora else HARMLESS
    notes = [
        f"{path.name} has no {key}: PEFT's default {default} is taken"
        for key, default in (("init_r", 12) if adalora else ("r", 8), ("lora_alpha", 8))
        if key not in config
    ]
    if unknown := sorted(key for key, value in config.items() if value and key not in known):
        notes.append(f"{path.name} has unknown keys {some(unknown)}, taken as harmless")
    return AdapterConfig(
        adalora,
        bool(config.get("use_dora")),
        bool(config.get("fan_in_fan_out")),
        None if adalora else _start(path, config.get("init_lora_weights", True)),
        [key for key in BESIDE if config.get(key)],
        notes,
        _adalora(path, config) if adalora else _lora(path, config),
    )


def _start(path: Path, given: object) -> str | None:
    name = str(given).lower()
    if name in PLAIN_STARTS:
        return None
    if name in STARTS:
        return name
    # LoftQ's part of dW is the quantisation of the base, which no factors can hold.
    convert = "" if name == "loftq" else (
        "Save it with path_initial_model_for_weight_conversion, which makes it plain LoRA, or: "
    )  # fmt: skip
    raise WrongInput(
        f"{path}: init_lora_weights {given!r} changes the base weight in a way that the base"
        f" alone does not tell; allowed: {', '.join((*PLAIN_STARTS, *STARTS))}. {convert}{MERGE}"
    )


def _lora(path: Path, config: dict[str, Any]) -> Callable[[str], tuple[float, float]]:
    """PEFT's rule for LoRA.

    A pattern is a regular expression; it matches a module whose name it is, or whose name ends
    with it after a dot, and the first that matches wins.
    """
    ranks = _patterns(path, config.get("r", 8), config.get("rank_pattern"))
    alphas = _patterns(path, config.get("lora_alpha", 8), config.get("alpha_pattern"))
    rslora = bool(config.get("use_rslora"))

    def of(module: str) -> tuple[float, float]:
        r, alpha = (
            next(number for pattern, number in rules if pattern.match(module))
            for rules in (ranks, alphas)
        )
        return r, alpha / (math.sqrt(r) if rslora else r)

    return of


def _adalora(path: Path, config: dict[str, Any]) -> Callable[[str], tuple[float, float]]:
    """PEFT's rule for AdaLoRA.

    `rank_pattern` holds a mask by parameter (`<module>.lora_E`). The scale divides by the initial
    r also where directions were pruned; r and use_rslora mean nothing.
    """
    init_r = _number(path, config.get("init_r", 12))
    scale = _number(path, config.get("lora_alpha", 8)) / (init_r + 1e-5)
    kept = {}
    for name, mask in _dictionary(path, config.get("rank_pattern")).items():
        if not isinstance(mask, list) or not all(isinstance(keep, bool) for keep in mask):
            raise WrongInput(f"{path}: rank_pattern of {name!r} must be a list of true and false.")
        kept[name.rpartition(".lora_E")[0]] = sum(mask)
    return lambda module: (kept.get(module, init_r), scale)


def _patterns(path: Path, default: object, given: object) -> list[tuple[re.Pattern[str], float]]:
    """Patterns with their numbers in PEFT's order, the default last (it matches everything)."""
    rules = [(rf"(.*\.)?({key})$", number) for key, number in _dictionary(path, given).items()]
    out = []
    for key, number in [*rules, ("", default)]:
        try:
            out.append((re.compile(key), _number(path, number)))
        except re.error as error:
            raise WrongInput(
                f"{path}: pattern {key!r} is no regular expression ({error})."
            ) from None
    return out


def _dictionary(path: Path, given: object) -> dict[str, Any]:
    if not isinstance(given or {}, dict):
        raise WrongInput(f"{path}: patterns must be JSON objects; got a {type(given).__name__}.")
    return dict(given) if isinstance(given, dict) else {}


def _number(path: Path, given: object) -> float:
    fits = isinstance(given, (int, float)) and not isinstance(given, bool)
    if not fits or not 0 < given < math.inf:  # type: ignore[operator]
        raise WrongInput(f"{path}: r and lora_alpha must be numbers above 0; got {given!r}.")
    return given  # type: ignore[return-value]
