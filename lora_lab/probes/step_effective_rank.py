"""Entropy rank of the optimizer's step, per layer."""

from __future__ import annotations

from lora_lab.probes import Moment, Values, finite_spectrum, parts_update, ranks, step_trace


@step_trace(at="spectra")
def step_effective_rank(moment: Moment) -> Values:
    """Per layer `effective_rank` of dW_t − dW_{t−1}, the change of the weight in one step.

    In [1, min(out, in)], for factors in [1, 2r]; 0 where the step changes nothing. Adam divides
    the gradient entry by entry, so that the step of a full weight has a far higher rank than G.

    References
    ----------
    Roy & Vetterli 2007 (the rank, see `measures/effective_rank.py`).
    """
    found = {name: finite_spectrum(parts_update(p)) for name, p in moment.steps()}
    return ranks("effective_rank", found)
