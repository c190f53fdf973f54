"""Norm of the whole trainable gradient, before clipping."""

from __future__ import annotations

from lora_lab.probes import Moment, Values, step_trace


@step_trace()
def grad_norm_total(moment: Moment) -> Values:
    """Global gradient norm of everything that trains, before clipping."""
    return {"": moment.grad_norm}
