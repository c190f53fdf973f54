"""Traces: what is recorded while training. One file a trace; the same keys for every method.

To add one, write `probes/NAME.py` with a function of a `Moment` under `@gradient_trace()` (taken
before clipping) or `@step_trace()` (taken after the step). A trace that decomposes something per
layer costs several training steps: with ``at="spectra"`` it is taken at the spectra steps and the
last, and only if `train.gradient_spectra` asks for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch

from lora_lab.linalg import Dense, Factored, Spectrum, Update, decompose
from lora_lab.measures import measure
from lora_lab.registry import Registry, WrongInput

Values = dict[str, Any]
"""Layer (or '' for the whole model) to a number or a scalar tensor."""

Parts = Mapping[str, torch.Tensor]
"""An update as `Adapted.tensors` gives it: `A`, `B` and `scale`, or `dW`."""

When = Literal["traced", "spectra"]


class History:
    """What probes know of earlier steps.

    Parameters
    ----------
    rows : iterable of (int, str, str, float)
        The trace rows of a run that goes on: step, layer, trace, value.
    tensors : mapping of str to Tensor
        Its `gradients`.

    Attributes
    ----------
    last : dict of (str, str) to (int, float)
        (layer, trace) to (step, value) of the newest row.
    gradients : dict of str to Tensor
        Per layer the sum of the gradients that were added, (out, in), float32 or wider.
    """

    def __init__(
        self,
        rows: Iterable[tuple[int, str, str, float]] = (),
        tensors: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self.last: dict[tuple[str, str], tuple[int, float]] = {}
        self.gradients = dict(tensors or {})
        self.enter(rows)

    def enter(self, rows: Iterable[tuple[int, str, str, float]]) -> None:
        """Take note of new trace rows (step, layer, trace, value)."""
        self.last.update(((layer, trace), (step, v)) for step, layer, trace, v in rows)

    def add_gradients(self, adapted: Mapping[str, Any]) -> None:
        """Add the implicit gradients of this step to the sums."""
        for name, module in adapted.items():
            G = module.implicit_gradient()
            if G is not None:
                known = self.gradients.get(name)
                # A resumed sum comes from the CPU.
                self.gradients[name] = (
                    wide(G).clone() if known is None else known.to(G.device).add_(G.detach())
                )


@dataclass(frozen=True)
class Moment:
    """One optimizer step as probes see it.

    Attributes
    ----------
    step : int
        1 = first.
    adapted : mapping of str to Adapted
        The changed layers.
    loss, grad_norm, lr, samples_per_second : float or scalar Tensor
        Of this step; `grad_norm` is global and before clipping.
    history : History
        Earlier steps; its sums include this step's gradients.
    before : mapping of str to Parts
        The updates before the optimizer changes them, see `copies`.
    """

    step: int
    adapted: Mapping[str, Any]
    loss: Any
    grad_norm: Any
    lr: float
    samples_per_second: float
    history: History
    before: Mapping[str, Parts]

    @cached_property
    def gradients(self) -> dict[str, torch.Tensor]:
        """G of each layer that has one, (out, in), before clipping, in the dtype of its making."""
        found = {name: m.implicit_gradient() for name, m in self.adapted.items()}
        return {name: G.detach() for name, G in found.items() if G is not None}

    @cached_property
    def gradient_spectra(self) -> dict[str, Spectrum | None]:
        """Spectrum of each G, None where it is not finite."""
        return {name: finite_spectrum(Dense(G)) for name, G in self.gradients.items()}

    def steps(self) -> Iterator[tuple[str, Parts]]:
        """dW_t - dW_(t-1) layer by layer, none of them kept; only after the step."""
        for name, module in self.adapted.items():
            yield name, difference(self.before[name], module.tensors())

    @cached_property
    def step_norms(self) -> dict[str, torch.Tensor]:
        """Frobenius norm of each of `steps`."""
        return {name: parts_norm(parts) for name, parts in self.steps()}


@dataclass(frozen=True)
class Probe:
    """A function of a moment, and when it is taken.

    Attributes
    ----------
    reads_gradients : bool
        True: called after the backward passes, before clipping. False: called after the step.
    at : str
        `traced`: at every traced step; `spectra`: at the spectra steps and the last, where
        `train.gradient_spectra` asks for it.
    """

    values: Callable[[Moment], Values]
    reads_gradients: bool
    at: When


PROBES: Registry[Probe] = Registry(__name__, "trace")

_Function = Callable[[Moment], Values]


def gradient_trace(at: When = "traced") -> Callable[[_Function], _Function]:
    """Decorator: a trace of gradients, taken before clipping."""
    return _enter(True, at)


def step_trace(at: When = "traced") -> Callable[[_Function], _Function]:
    """Decorator: a trace of the step's result, taken after it."""
    return _enter(False, at)


def _enter(reads_gradients: bool, at: When) -> Callable[[_Function], _Function]:
    def enter(values: _Function) -> _Function:
        PROBES.register(Probe(values, reads_gradients, at), values.__module__)
        return values

    return enter


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor without its graph, in float32 or wider."""
    return tensor.detach().to(torch.promote_types(torch.float32, tensor.dtype))


def norm(gradient: torch.Tensor) -> torch.Tensor:
    """Frobenius norm in float32 or wider."""
    dtype = torch.promote_types(torch.float32, gradient.dtype)
    return torch.linalg.vector_norm(gradient.detach(), dtype=dtype)


def factor_norms(moment: Moment, which: int) -> Values:
    """Gradient norms of A (0) or B (1)."""
    out = {}
    for layer, module in moment.adapted.items():
        factors = module.factors
        if factors is not None and factors[which].grad is not None:
            out[layer] = norm(factors[which].grad)
    return out


def copies(adapted: Mapping[str, Any]) -> dict[str, Parts]:
    """The updates of all layers as they are now; a dense one is no view of what trains."""
    return {
        name: {k: t if k == "dW" else t.clone() for k, t in module.tensors().items()}
        for name, module in adapted.items()
    }


def difference(before: Parts, after: Parts) -> Parts:
    """Of two states of one update the exact difference, again as parts.

    Factors: ``s'B'A' - sBA = [s'B', s'B' - sB] [A' - A; A]`` in float64. The differences come
    first, so that a step that is small against the update is not lost in cancellation. The two
    may have different numbers of directions.

    >>> one = {"A": torch.eye(1), "B": torch.eye(1), "scale": torch.tensor(3.0)}
    >>> two = {"A": 2 * torch.eye(1), "B": 2 * torch.eye(1), "scale": torch.tensor(3.0)}
    >>> float(parts_norm(difference(one, two)))
    9.0
    """
    if "dW" in after:
        return {"dW": after["dW"] - before["dW"]}
    A0, A1 = before["A"].double(), after["A"].double()
    B0, B1 = (parts["scale"] * parts["B"].double() for parts in (before, after))
    if A0.shape == A1.shape:
        B, A = torch.cat([B1, B1 - B0], dim=1), torch.cat([A1 - A0, A0])
    else:  # the number of directions has changed
        B, A = torch.cat([B1, -B0], dim=1), torch.cat([A1, A0])
    return {"A": A, "B": B, "scale": torch.ones((), dtype=torch.float64)}


def parts_norm(parts: Parts) -> torch.Tensor:
    """Frobenius norm in float64; of factors |s| sqrt(tr((B'B)(AA'))), without forming BA."""
    if "dW" in parts:
        return norm(parts["dW"]).double()
    A, B = parts["A"].double(), parts["B"].double()
    return parts["scale"].abs() * ((B.T @ B) * (A @ A.T)).sum().clamp_min(0).sqrt()


def parts_update(parts: Parts) -> Update:
    """The parts as an update, to be decomposed."""
    if "dW" in parts:
        return Dense(parts["dW"])
    return Factored(parts["B"], parts["A"], float(parts["scale"]))


def finite_spectrum(update: Update) -> Spectrum | None:
    """Singular values, or None where there are none: NaN or Inf, of which the trainer tells."""
    try:
        return decompose(update)
    except WrongInput:
        return None


def ranks(name: str, spectra: Mapping[str, Spectrum | None]) -> Values:
    """One measure of every layer's spectrum; NaN for None."""
    return {layer: math.nan if s is None else measure(name, s) for layer, s in spectra.items()}
