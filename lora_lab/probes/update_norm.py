"""‖dW_t‖_F per layer, after the step."""

from __future__ import annotations

from lora_lab.probes import Moment, Values, step_trace


@step_trace()
def update_norm(moment: Moment) -> Values:
    """Per layer ‖dW_t‖_F after step t."""
    return {name: m.update_norm() for name, m in moment.adapted.items()}
