"""Number of directions in use per layer, where a method changes it."""

from __future__ import annotations

from lora_lab.probes import Moment, Values, step_trace


@step_trace()
def live_r(moment: Moment) -> Values:
    """Per layer the directions of the update that are in use after step t.

    A whole number from 0 to what the method allocates; of them the singular values may still be
    anything. No rows for methods that never change it.
    """
    found = {name: module.live_r for name, module in moment.adapted.items()}
    return {name: live for name, live in found.items() if live is not None}
