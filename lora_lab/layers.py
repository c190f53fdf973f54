"""What a layer's name says: its module, its depth, its place in the model."""

from __future__ import annotations

import math
import re


def module_of(layer: str) -> str:
    """Last part of a layer's name.

    >>> module_of("encoder.layer.3.attention.self.query")
    'query'
    """
    return layer.rpartition(".")[2]


def depth_of(layer: str) -> float:
    """Index of the block that holds the layer: the first whole number among the name's parts.

    NaN for a layer outside the blocks.

    >>> depth_of("encoder.layer.3.attention.self.query"), depth_of("embeddings.word_embeddings")
    (3.0, nan)
    """
    return next((float(part) for part in layer.split(".") if part.isdecimal()), math.nan)


def place_of(layer: str) -> str:
    """What a layer is inside its block: the name without the block and what leads to it.

    >>> place_of("encoder.layer.3.attention.self.query"), place_of("lm_head")
    ('attention.self.query', 'lm_head')
    """
    return re.sub(r"^(.*?\.)?\d+\.(?=.)", "", layer)


def natural(layer: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key that puts block 2 before block 10.

    >>> sorted(["layer.10.a", "layer.2.b", "layer.2.a", "embeddings"], key=natural)
    ['embeddings', 'layer.2.a', 'layer.2.b', 'layer.10.a']
    """
    parts = layer.split(".")
    return tuple((0, int(p), "") if p.isdecimal() else (1, 0, p) for p in parts)
