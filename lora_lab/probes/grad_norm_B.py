"""‖∇_B‖_F per layer."""

from __future__ import annotations

from lora_lab.probes import Moment, Values, factor_norms, gradient_trace


@gradient_trace()
def grad_norm_B(moment: Moment) -> Values:
    """Per layer ‖∂L/∂B‖_F before clipping; no rows for methods without factors."""
    return factor_norms(moment, 1)
