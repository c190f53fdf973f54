"""How two files of one model call the same weight."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection
from typing import TypeAlias

from lora_lab.registry import WrongInput
from lora_lab.tensorfile import StoredTensor

Matrices: TypeAlias = dict[str, StoredTensor]


def layer_of(name: str) -> str:
    """A tensor's layer.

    >>> layer_of("pooler.dense.weight")
    'pooler.dense'
    """
    return name.removesuffix(".weight")


def to_base(names: Collection[str], base: Collection[str]) -> dict[str, str]:
    """Each name as the base calls it, for those that it has.

    Models with and without a head differ by one prefix (`bert.encoder...`, `encoder...`): the
    one that most unmatched names agree on is taken off or put on.

    >>> to_base(["bert.a.weight", "head.weight"], ["a.weight", "b.weight"])
    {'bert.a.weight': 'a.weight'}
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


def same_shape(layer: str, ours: tuple[int, ...], base: tuple[int, ...], kind: str) -> None:
    """Raise `WrongInput` unless a weight has its base's shape."""
    if ours != base:
        raise WrongInput(
            f"layer {layer!r} has shape {ours} in the {kind} and {base} in the base."
            " Give the base model that it was made from."
        )
