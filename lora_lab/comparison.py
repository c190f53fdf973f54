"""Updates of several sources side by side, pair by pair: similarity and interference.

A source is an adapter, a run, a tuned model: whatever names its layers as the others do.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import combinations
from typing import Any, TypeAlias

import pandas as pd

from lora_lab import schema
from lora_lab.analysis import rows
from lora_lab.layers import depth_of, module_of
from lora_lab.linalg import Update, decompose
from lora_lab.linalg.factored import frobenius
from lora_lab.measures import DIRECTIONS, MEASURES
from lora_lab.measures.cosine import Z
from lora_lab.registry import WrongInput, unknown

Source: TypeAlias = Mapping[str, Update] | Iterable[tuple[str, Any, Update]]
"""Updates by layer, or (layer, W0, update) as `checkpoints.read_updates` gives them."""

COLUMNS = (
    "one",
    "other",
    *(name for name in schema.MEASURES if name not in ("run_id", "step")),
    "flag",
)
"""Columns of `compare`."""


def pairwise() -> list[str]:
    """The measures that compare two updates of one layer."""
    return [n for n in MEASURES if {"pair", "pair_update"} & set(MEASURES[n].needs)]


def compare(updates: Mapping[str, Source], names: Iterable[str] | None = None) -> pd.DataFrame:
    """Every measure of two updates, for each pair of sources and each layer that both have.

    Each update is decomposed once; factors are never multiplied out as a whole.

    Parameters
    ----------
    updates : mapping of str to (mapping or iterable)
        At least two sources by name: updates by layer, or what `read_updates` gives.
    names : iterable of str, optional
        Measures to take; None: all that compare two updates.

    Returns
    -------
    DataFrame
        Columns one, other (sources, in the order given), those of `schema.MEASURES` without run_id
        and step, and flag (`zero update` where one of the two is zero, the reason where a measure
        refuses, else ''). The cosine of the whole models stands in a row with layer ''.

    Raises
    ------
    WrongInput
        Fewer than two sources, no layer that two have, a layer whose shapes differ, NaN or Inf in
        an update, a measure that does not exist or does not compare updates.

    Examples
    --------
    >>> from lora_lab.linalg import Factored
    >>> one = {"q": Factored([[1.0], [0.0]], [[3.0, 4.0]])}
    >>> other = {"q": Factored([[1.0], [0.0]], [[4.0, 3.0]])}
    >>> compare({"a": one, "b": other}, ["cosine"])[["one", "other", "layer", "value"]].round(6)
      one other layer  value
    0   a     b     q   0.96
    1   a     b         0.96
    """
    sources = {name: _by_layer(given) for name, given in updates.items()}
    if len(sources) < 2:
        raise WrongInput(f"give at least two sources to compare; got {len(sources)}.")
    chosen = None if names is None else list(names)
    layers = list(dict.fromkeys(layer for own in sources.values() for layer in own))
    shared = {
        layer: own
        for layer in layers
        if len(own := {name: by[layer] for name, by in sources.items() if layer in by}) > 1
    }
    if not shared:
        some = ", ".join(f"{name!r} has {next(iter(by), 'none')}" for name, by in sources.items())
        raise WrongInput(f"no layer that two sources have ({some}). Give updates of one model.")
    out = [row for layer, own in shared.items() for row in layer_rows(layer, own, chosen)]
    norms = {
        name: {layer: update.norm() for layer, update in by.items()} for name, by in sources.items()
    }
    sizes = {layer: math.prod(next(iter(own.values())).shape) for layer, own in shared.items()}
    return table([*out, *whole_rows(out, norms, sizes)])


def _by_layer(given: Source) -> dict[str, Update]:
    if isinstance(given, Mapping):
        return dict(given)
    return {layer: update for layer, _, update in given}


def layer_rows(
    layer: str, updates: Mapping[str, Update], names: Iterable[str] | None = None
) -> list[dict[str, Any]]:
    """The rows of `compare` for one layer, from the updates of the sources that have it."""
    allowed = pairwise()
    chosen = allowed if names is None else list(names)
    for name in chosen:
        if name not in allowed:
            raise unknown("measure of two updates", name, allowed)
    first, *others = updates
    for other in others:
        if updates[other].shape != updates[first].shape:
            raise WrongInput(
                f"layer {layer!r} has shape {updates[first].shape} in {first!r} and"
                f" {updates[other].shape} in {other!r}. Give updates of one model."
            )
    vectors = DIRECTIONS if any("vectors" in MEASURES[n].needs for n in chosen) else False
    spectra = {n: decompose(u, vectors=vectors, layer=layer) for n, u in updates.items()}
    out = []
    for one, other in combinations(updates, 2):
        s, pair = spectra[one], spectra[other]
        about: dict[str, Any] = {"one": one, "other": other}
        about |= {"module": module_of(layer), "depth": depth_of(layer)}
        about |= {"flag": "zero update"} if s.zero or pair.zero else {}
        both: dict[str, Any] = {"update": updates[one], "pair_update": updates[other]}
        out += [row | about for row in rows(layer, s, chosen, pair=pair, **both)]
    return out


def whole_rows(
    found: Iterable[Mapping[str, Any]],
    norms: Mapping[str, Mapping[str, float]],
    sizes: Mapping[str, int],
) -> list[dict[str, Any]]:
    """The cosine of the whole models, from the rows of their layers.

    <dW, dW'> and the norms are sums over layers; a layer that only one of the two has adds to its
    norm alone. The null turns every layer of one of them at random.

    Parameters
    ----------
    found : iterable of mapping
        Rows of `layer_rows`; those of `cosine` are used.
    norms : mapping
        By source and layer, of all layers: ||dW||.
    sizes : mapping
        Entries m n by layer, of the layers in `found`.
    """
    parts: dict[tuple[str, str], list[tuple[float, float]]] = {}
    totals = {source: frobenius([[0.0, *by.values()]]) for source, by in norms.items()}
    for row in found:
        if row["measure"] != "cosine":
            continue
        one, other, layer = row["one"], row["other"], row["layer"]
        weights = [norms[s][layer] / totals[s] if totals[s] else 0.0 for s in (one, other)]
        weight = math.prod(weights)
        cosine = row["value"] if weight else 0.0  # a zero update has none
        own = parts.setdefault((one, other), [])
        own.append((weight * cosine, weight**2 / sizes[layer]))
    return [
        _whole(one, other, own, zero=not (totals[one] and totals[other]))
        for (one, other), own in parts.items()
    ]


def _whole(one: str, other: str, parts: list[tuple[float, float]], zero: bool) -> dict[str, Any]:
    value = math.nan if zero else math.fsum(part for part, _ in parts)
    spread = math.nan if zero else min(Z * math.sqrt(math.fsum(v for _, v in parts)), 1.0)
    return {
        **{"one": one, "other": other, "layer": "", "module": "", "depth": math.nan},
        **{"measure": "cosine", "k": math.nan, "side": "", "value": value},
        **{"null": math.nan if zero else 0.0, "null_low": -spread, "null_high": spread},
        "flag": "zero update" if zero else "",
    }


def table(found: list[dict[str, Any]]) -> pd.DataFrame:
    """Rows of `layer_rows` and `whole_rows` as the table that `compare` gives."""
    floats = [name for name in COLUMNS if schema.MEASURES.get(name, ("",))[0] == "float64"]
    return pd.DataFrame(found, columns=list(COLUMNS)).astype(dict.fromkeys(floats, "float64"))
