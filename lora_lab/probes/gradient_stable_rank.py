"""Energy of the gradient of one step in units of its leading direction, per layer."""

from __future__ import annotations

from lora_lab.probes import Moment, Values, gradient_trace, ranks


@gradient_trace(at="spectra")
def gradient_stable_rank(moment: Moment) -> Values:
    """Per layer `stable_rank` ‖G‖_F²/‖G‖₂² of G = ∂L/∂(W0 + dW), before clipping.

    In [1, min(out, in, tokens of the step)]; 0 where G = 0. At dW = 0 it is the same for every
    method.

    References
    ----------
    Rudelson & Vershynin 2007 (the rank, see `measures/stable_rank.py`).
    """
    return ranks("stable_rank", moment.gradient_spectra)
