"""‖∇_A‖_F per layer."""

from __future__ import annotations

from lora_lab.probes import Moment, Values, factor_norms, gradient_trace


@gradient_trace()
def grad_norm_A(moment: Moment) -> Values:
    """Per layer ‖∂L/∂A‖_F before clipping; no rows for methods without factors."""
    return factor_norms(moment, 0)
