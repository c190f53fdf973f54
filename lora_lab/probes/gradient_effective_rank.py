"""Entropy rank of the gradient of one step, per layer."""

from __future__ import annotations

from lora_lab.probes import Moment, Values, gradient_trace, ranks


@gradient_trace(at="spectra")
def gradient_effective_rank(moment: Moment) -> Values:
    """Per layer `effective_rank` of G = ∂L/∂(W0 + dW) of the step's mean loss, before clipping.

    In [1, min(out, in, tokens of the step)]; 0 where G = 0. At dW = 0 it is the same for every
    method. Of this one step's gradient: the running mean's is `mean_gradient_effective_rank`, the
    optimizer step's `step_effective_rank`. Computing in bfloat16 rounds G once, which adds a flat
    floor of 1.7e-3·‖G‖_F to the singular values together.

    References
    ----------
    Roy & Vetterli 2007 (the rank, see `measures/effective_rank.py`).
    """
    return ranks("effective_rank", moment.gradient_spectra)
