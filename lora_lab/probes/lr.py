"""Learning rate of the step."""

from __future__ import annotations

from lora_lab.probes import Moment, Values, step_trace


@step_trace()
def lr(moment: Moment) -> Values:
    """Learning rate that the step used."""
    return {"": moment.lr}
