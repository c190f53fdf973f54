"""Traces: what is recorded while training. One file a trace; the same keys for every method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lora_lab.registry import Registry

Values = dict[str, Any]
"""Layer (or '' for the whole model) to a number or a scalar tensor."""


@dataclass(frozen=True)
class Moment:
    """One optimizer step as probes see it.

    Attributes
    ----------
    adapted : mapping of str to Adapted
        The changed layers.
    loss, grad_norm, lr, samples_per_second : float or scalar Tensor
        Of this step; `grad_norm` is global and before clipping.
    """

    adapted: Mapping[str, Any]
    loss: Any
    grad_norm: Any
    lr: float
    samples_per_second: float


@dataclass(frozen=True)
class Probe:
    """A function of a moment, and whether it reads gradients (before clipping) or the result.

    Attributes
    ----------
    reads_gradients : bool
        True: called after the backward passes, before clipping. False: called after the step.
    """

    values: Callable[[Moment], Values]
    reads_gradients: bool


PROBES: Registry[Probe] = Registry(__name__, "trace")


def gradient_trace(values: Callable[[Moment], Values]) -> Probe:
    """Decorator: a trace of gradients, taken before clipping."""
    return PROBES.register(Probe(values, True), values.__module__)


def step_trace(values: Callable[[Moment], Values]) -> Probe:
    """Decorator: a trace of the step's result, taken after it."""
    return PROBES.register(Probe(values, False), values.__module__)


def norm(gradient: torch.Tensor) -> torch.Tensor:
    """Frobenius norm in float32 or wider."""
    wide = torch.promote_types(torch.float32, gradient.dtype)
    return torch.linalg.vector_norm(gradient.detach(), dtype=wide)


def factor_norms(moment: Moment, which: int) -> Values:
    """Gradient norms of A (0) or B (1)."""
    out = {}
    for layer, module in moment.adapted.items():
        factors = module.factors
        if factors is not None and factors[which].grad is not None:
            out[layer] = norm(factors[which].grad)
    return out
