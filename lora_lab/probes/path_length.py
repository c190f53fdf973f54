"""Σ_{u≤t} ‖dW_u − dW_{u−1}‖_F per layer: the length of the way that the weight has gone."""

from __future__ import annotations

from lora_lab.probes import Moment, Values, step_trace


@step_trace()
def path_length(moment: Moment) -> Values:
    """Per layer the sum of all steps' `step_norm`, untraced ones interpolated linearly.

    Exact at `train.trace_every` = 1, and then at least the displacement ‖dW_t‖_F (`update_norm`)
    for every method that starts at dW = 0. Between two traced steps step_norm is taken as linear,
    because copying all weights at every step costs full fine-tuning over a tenth of its time.
    In units of the weight; 0 while nothing has moved. Displacement / path is 1 for a straight way
    and about 1/√t for a random walk of t steps.
    """
    out = {}
    for layer, norm in moment.step_norms.items():
        step, length = moment.history.last.get((layer, "path_length"), (0, 0.0))
        _, earlier = moment.history.last.get((layer, "step_norm"), (0, 0.0))
        count = moment.step - step
        # The sum of the line's values at the steps after the last traced one.
        out[layer] = length + count * earlier + (count + 1) / 2 * (norm - earlier)
    return out
