"""‖G‖_F of the implicit weight W0 + dW: the same quantity for full fine-tuning and LoRA."""

from __future__ import annotations

from lora_lab.probes import Moment, Values, gradient_trace, norm


@gradient_trace()
def grad_norm(moment: Moment) -> Values:
    """Per layer ‖∂L/∂(W0 + dW)‖_F before clipping; 0 where no gradient flowed."""
    return {name: norm(G) for name, G in moment.gradients.items()}
