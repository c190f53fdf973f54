"""Layers of the PEFT library, made from the words of a config: the one home of the package peft.

PEFT adapts bare linear layers without bias, in a tree of modules with the names of the network.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lora_lab.registry import WrongInput, did_you_mean, unknown

Shapes = Mapping[str, tuple[int, int]]

NAME = "default"
"""PEFT's name for the one adapter of a model."""

UNFIT = {
    "ADAMSS": "its size depends on clusters of the weights",
    "ADAPTION_PROMPT": "it adds prompts to attention, and changes no weight",
    "BEFT": "it trains biases alone; use train.also=target_biases",
    "LILY": "it mixes experts by input, so that its update is no matrix",
    "LN_TUNING": "it trains layers whole; use adapter=full, or train.also=norms",
    "POLY": "it mixes adapters by task, so that its update is no matrix",
    "SHADOW": "it adds a second network",
    "TRAINABLE_TOKENS": "it trains rows of embeddings; use train.also=embeddings",
}
"""Types with target modules that do not change the weight of a linear layer, and why."""

ELSEWHERE = {
    "target_modules": "adapter.targets",
    "modules_to_save": "train.also",
    "bias": "train.also",
    "lora_bias": "train.also",
    "trainable_token_indices": "train.also",
    "total_step": "train.epochs",
}
"""Keys of PEFT that are said by a key of ours."""

NOT_OURS = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path"),
    *("revision", "inference_mode", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("fan_in_fan_out", "target_parameters", "layer_replication", "alora_invocation_tokens"),
    *("megatron_core", "ensure_weight_tying", "use_qalora", "qalora_group_size", "use_bdlora"),
    *("runtime_config", "save_projection", "progressbar", "runtime_offload_base_weight"),
}
"""Keys of PEFT that choose layers in another way, or concern files, servers or other networks."""

DATA_STARTS = ("eva", "corda", "loftq", "lora_ga")
"""Values of `init_lora_weights` that PEFT makes from data or quantised weights."""


def _library() -> Any:
    """The peft package, or one line that says how to get it."""
    try:
        import peft
    except ImportError as error:
        raise WrongInput(
            f"adapter=peft needs the package peft ({error}). Install it: pip install "
            "'lora-lab[peft]'."
        ) from error
    return peft


def types() -> dict[str, type[Any]]:
    """PEFT's types that change linear layers, each with its config class."""
    library = _library().mapping
    return {
        kind.value: config
        for kind, config in library.PEFT_TYPE_TO_CONFIG_MAPPING.items()
        if kind.value not in UNFIT
        and library.PEFT_TYPE_TO_TUNER_MAPPING.get(kind) is not None
        and "target_modules" in {f.name for f in fields(config)}
    }


def checked(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config in one order of its keys, `peft_type` first.

    Raises
    ------
    WrongInput
        For a type or key that does not exist or is said elsewhere, and what PEFT refuses.
    """
    if "peft_type" not in config:
        raise WrongInput(
            f"adapter.config must name a peft_type; allowed: {', '.join(sorted(types()))}. "
            "For example adapter.config={peft_type:LORA,r:8,use_dora:true}."
        )
    kind = str(config["peft_type"]).upper()
    if kind in UNFIT:
        raise WrongInput(f"peft_type {kind} is no method for linear layers: {UNFIT[kind]}.")
    if kind not in types():
        raise unknown("peft_type", kind, types())
    rest = {key: config[key] for key in sorted(config) if key != "peft_type"}
    _check_keys(kind, rest)
    known = {"peft_type": kind, **rest}
    _made(known, ["layer"])
    return known


def _check_keys(kind: str, given: Mapping[str, Any]) -> None:
    known = {f.name for f in fields(types()[kind])}
    unused = {"rank_pattern", "use_dora", "r"} if kind == "ADALORA" else set()
    allowed = sorted(
        key for key in known - NOT_OURS - set(ELSEWHERE) - unused if not key.endswith("_config")
    )
    for key, value in given.items():
        if key in ELSEWHERE and key in known:
            raise WrongInput(f"adapter.config.{key} is said by {ELSEWHERE[key]}; leave it out.")
        if key not in allowed:
            raise WrongInput(
                f"adapter.config for {kind} has no key {key!r}; allowed: {', '.join(allowed)}."
                f"{did_you_mean(key, allowed)}"
            )
        if key == "init_lora_weights" and str(value).lower() in DATA_STARTS:
            raise WrongInput(
                f"adapter.config.init_lora_weights {value!r} is made from data by a script of "
                "PEFT's; use adapter=lora with an adapter.init of the lab."
            )


def _made(config: Mapping[str, Any], layers: Iterable[str]) -> Any:
    """The PeftConfig for these layers; a new one at each call, because PEFT changes it."""
    kind = config["peft_type"]
    given = {k: copy.deepcopy(v) for k, v in config.items() if k != "peft_type"}
    given["target_modules"] = list(layers)
    if kind == "ADALORA":
        # The number of steps is known when training begins.
        given["total_step"] = given.get("tinit", 0) + given.get("tfinal", 0) + 1
    if kind == "IA3":
        given.setdefault("feedforward_modules", [])
    try:
        with _silence():
            made = types()[kind](**given)
    except Exception as error:
        raise _refused(error) from error
    if kind == "ADALORA" and not 1 <= made.target_r < made.init_r:
        raise WrongInput(
            f"adapter.config.target_r must be in [1, init_r - 1] = [1, {made.init_r - 1}]; "
            f"got {made.target_r}."
        )
    return made


def injected(
    config: Mapping[str, Any],
    weights: Mapping[str, torch.Tensor],
    seeds: Mapping[str, int],
) -> Any:
    """PEFT's model of a bare tree of linear layers.

    Parameters
    ----------
    config : mapping
        As from `checked`.
    weights : mapping of str to Tensor (out, in)
        The layers by name; they get no bias.
    seeds : mapping of str to int
        Seed of each layer's start; shared parts draw from the first.

    Raises
    ------
    WrongInput
        What PEFT refuses.
    """
    tree = nn.Module()
    for layer, weight in weights.items():
        *parents, name = layer.split(".")
        owner = tree
        for parent in parents:
            if parent not in dict(owner.named_children()):
                owner.add_module(parent, nn.Module())
            owner = owner.get_submodule(parent)
        inner = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        inner.weight = nn.Parameter(weight, requires_grad=False)
        owner.add_module(name, inner)
    made = _made(config, weights)
    kind = _library().mapping.PEFT_TYPE_TO_TUNER_MAPPING[made.peft_type]

    class Seeded(kind):  # type: ignore[misc, valid-type]
        """Each layer starts from a seed of its own, whichever others change."""

        def _create_and_replace(self, *args: Any, **named: Any) -> None:
            torch.manual_seed(seeds[named["current_key"]])
            super()._create_and_replace(*args, **named)

    try:
        with torch.random.fork_rng(devices=[]), _silence():
            torch.manual_seed(next(iter(seeds.values())))
            return Seeded(tree, made, NAME)
    except Exception as error:
        raise _refused(error) from error


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Without PEFT's warnings (of keys that do not matter here) and progress bars."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield


def _refused(error: Exception) -> WrongInput:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return WrongInput(f"PEFT refuses adapter.config: {reason.rstrip('.')}. Change it.")


def _trials(text: str) -> Iterator[Any]:
    """PEFT's model for a config and shapes: without data, and with some, which a few types need."""
    config, shapes = json.loads(text)
    for device in ("meta", "cpu"):
        generator = torch.Generator(device).manual_seed(0) if device == "cpu" else None
        weights = {
            layer: torch.randn(*shape, device=device, generator=generator)
            for layer, shape in shapes.items()
        }
        try:
            with torch.device(device):
                whole = injected(config, weights, dict.fromkeys(weights, 0))
        except WrongInput:
            if device == "cpu":
                raise
            continue
        yield whole


def parameters(config: Mapping[str, Any], shapes: Shapes) -> int:
    """Trainable parameters that a config gives to layers of these shapes.

    Raises
    ------
    WrongInput
        When PEFT does not make such layers.
    """
    return _parameters(json.dumps([config, shapes]))


def flops(config: Mapping[str, Any], shapes: Shapes) -> int:
    """Operations in matrix products that one token more costs beyond the frozen layers."""
    return _flops(json.dumps([config, shapes]))


@lru_cache(maxsize=256)
def _parameters(text: str) -> int:
    whole = next(_trials(text))
    return sum(
        p.numel()
        for name, p in whole.model.named_parameters()
        if p.requires_grad and "ranknum" not in name
    )


@lru_cache(maxsize=256)
def _flops(text: str) -> int:
    shapes = json.loads(text)[1]
    for whole in _trials(text):
        device = next(whole.model.parameters()).device
        try:
            two, three = (
                sum(
                    _products(whole.model.get_submodule(layer), tokens, inner, device)
                    for layer, (_, inner) in shapes.items()
                )
                for tokens in (2, 3)
            )
        except RuntimeError:  # a few types need numbers to know what to do
            if device.type == "meta":
                continue
            raise
        return three - two - sum(2 * out * inner for out, inner in shapes.values())
    raise AssertionError("the last trial has data")


def _products(layer: nn.Module, tokens: int, inner: int, device: torch.device) -> int:
    """Operations in the matrix products of a forward pass."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(torch.zeros(tokens, inner, device=device))
    return int(counter.get_total_flops())
