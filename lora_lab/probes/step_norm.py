"""‖dW_t − dW_{t−1}‖_F per layer: how far one optimizer step moves the weight."""

from __future__ import annotations

from lora_lab.probes import Moment, Values, step_trace


@step_trace()
def step_norm(moment: Moment) -> Values:
    """Per layer ‖dW_t − dW_{t−1}‖_F of the one step t, in units of the weight.

    At least 0; 0 where the step changes nothing. At t = 1 it is ‖dW_1‖_F for every method that
    starts at dW = 0. Factors by their algebra in float64, s(B'A' − BA) = s[B', B' − B][A' − A; A],
    without forming BA; unchanged by B → BR, A → R⁻¹A of both states.
    """
    return dict(moment.step_norms)
