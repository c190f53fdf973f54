"""Training loss of the step, mean over its micro-batches."""

from __future__ import annotations

from lora_lab.probes import Moment, Values, step_trace


@step_trace()
def loss(moment: Moment) -> Values:
    """Mean training loss of the step's examples."""
    return {"": moment.loss}
