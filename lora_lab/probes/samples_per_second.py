"""Throughput since the first batch, evaluation excluded."""

from __future__ import annotations

from lora_lab.probes import Moment, Values, step_trace


@step_trace()
def samples_per_second(moment: Moment) -> Values:
    """Training examples per second of training time so far."""
    return {"": moment.samples_per_second}
