"""Which layers a method changes: one string, matched by rule and never by accident.

A target string is a word (`attention`, `qv`, `qk`, `qkvo`, `mlp`, `all`), or names joined by `+`
(a name is a layer or its last dotted parts, such as `query` or `output.dense`; words may be among
them), or a regular expression that a whole layer name must match. What matches nothing is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from lora_lab.registry import WrongInput, did_you_mean

ROLES = {
    "q": ("query", "query_proj", "q_proj", "q_lin", "q", "to_q", "q_attn"),
    "k": ("key", "key_proj", "k_proj", "k_lin", "k", "to_k"),
    "v": ("value", "value_proj", "v_proj", "v_lin", "v", "to_v"),
    "o": (
        "attention.output.dense",
        "o_proj",
        "out_proj",
        "out_lin",
        "o",
        "attn.c_proj",
        "attention.dense",
        "self_attn.dense",
        "self_attention.dense",
        "attn.Wo",
        "to_out.0",
    ),
    "qkv": ("c_attn", "query_key_value", "qkv_proj", "Wqkv", "in_proj", "qkv"),
    "mlp": (
        "intermediate.dense",
        "output.dense",
        "up_proj",
        "gate_proj",
        "down_proj",
        "fc1",
        "fc2",
        "lin1",
        "lin2",
        "c_fc",
        "fc_in",
        "fc_out",
        "ffn",
        "ffn_output",
        "mlp.c_proj",
        "wi",
        "wi_0",
        "wi_1",
        "wo",
        "up",
        "down",
        "dense_h_to_4h",
        "dense_4h_to_h",
        "gate_up_proj",
        "Wi",
        "Wo",
        "w1",
        "w2",
        "w3",
    ),
}
"""Role of a layer by the last parts of its name; the longest match wins, so that BERT's
`attention.output.dense` is `o` and `output.dense` belongs to the MLP."""

WORDS = {
    "attention": ("q", "k", "v", "o", "qkv"),
    "qv": ("q", "v"),
    "qk": ("q", "k"),
    "qkvo": ("q", "k", "v", "o"),
    "mlp": ("mlp",),
    "all": (),
}

OUTSIDE = ("pooler", "lm_head", "classifier", "score", "embeddings", "embed_tokens")
"""Parts of a name that put a linear layer outside the blocks: never a target of a word."""


def _ends(layer: str, name: str) -> bool:
    return layer == name or layer.endswith("." + name)


def role(layer: str) -> str:
    """Role of a layer in its block.

    >>> role("encoder.layer.0.attention.output.dense"), role("encoder.layer.0.output.dense")
    ('o', 'mlp')
    >>> role("model.layers.3.self_attn.q_proj"), role("pooler.dense"), role("layers.0.adapter_in")
    ('q', 'outside', 'other')
    """
    if any(part in OUTSIDE for part in layer.split(".")):
        return "outside"
    best, length = "other", 0
    for kind, names in ROLES.items():
        for name in names:
            if _ends(layer, name) and len(name) > length:
                best, length = kind, len(name)
    return best


def select(targets: str, layers: Iterable[str]) -> list[str]:
    """Layers that a target string names, in the model's order.

    Parameters
    ----------
    targets : str
        A word, names joined by `+`, or a regular expression for whole layer names.
    layers : iterable of str
        Names of the model's linear layers.

    Raises
    ------
    WrongInput
        When the string, or one of its joined parts, matches no layer.

    >>> layers = ["b.0.query", "b.0.key", "b.0.value", "b.0.intermediate.dense"]
    >>> select("qv", layers)
    ['b.0.query', 'b.0.value']
    >>> select("key+intermediate.dense", layers)
    ['b.0.key', 'b.0.intermediate.dense']
    >>> select(r".*\\.(query|key)", layers)
    ['b.0.query', 'b.0.key']
    """
    layers = list(layers)
    parts = targets.split("+")
    found: dict[str, set[str]] = {part: _named(part, layers) for part in parts}
    if all(found.values()):
        chosen = set().union(*found.values())
        return [layer for layer in layers if layer in chosen]
    try:
        matched = [layer for layer in layers if re.fullmatch(targets, layer)]
    except re.error:
        matched = []
    if matched:
        return matched
    wrong = next(part for part in parts if not found[part])
    names = sorted({layer.rpartition(".")[2] for layer in layers})
    raise WrongInput(
        f"adapter.targets {wrong!r} matches no layer; allowed: {', '.join(WORDS)}, layer names "
        f"such as {', '.join(names[:8])} joined by '+', or a regex for whole layer names."
        + did_you_mean(wrong, [*WORDS, *names])
    )


def _named(part: str, layers: list[str]) -> set[str]:
    if part in WORDS:
        roles = WORDS[part]
        return {
            layer
            for layer in layers
            if (role(layer) in roles if roles else role(layer) != "outside")
        }
    return {layer for layer in layers if _ends(layer, part)}


def by_pattern(layer: str, patterns: Mapping[str, float], default: float) -> float:
    """Value of the first pattern that a layer's name ends with (PEFT's rule), else the default.

    A key matches as PEFT's `rank_pattern` keys do: as a regular expression for the whole name or
    for its last dotted parts, the first match in the order given.

    Raises
    ------
    WrongInput
        For a pattern that is no regular expression.

    >>> by_pattern("b.0.query", {"key": 2, "query": 4}, 8)
    4
    >>> by_pattern("b.1.query", {r"b\\.0\\.query": 4}, 8)
    8
    """
    for pattern, value in patterns.items():
        try:
            matched = re.match(rf"(.*\.)?({pattern})$", layer)
        except re.error as error:
            raise WrongInput(f"pattern {pattern!r} is no regular expression: {error}.") from None
        if matched:
            return value
    return default
