"""Entropy rank of the running mean of the gradient, per layer."""

from __future__ import annotations

from lora_lab.linalg import Dense
from lora_lab.probes import Moment, Values, finite_spectrum, gradient_trace, ranks


@gradient_trace(at="spectra")
def mean_gradient_effective_rank(moment: Moment) -> Values:
    """Per layer `effective_rank` of the mean of G over the watched steps up to this one.

    Watched are the traced steps and the spectra steps, with equal weight; the sum is float32 or
    wider. In [1, min(out, in)]; 0 where the mean is 0. At step 1 it is `gradient_effective_rank`.
    What the batches share adds up and their noise does not.

    References
    ----------
    Roy & Vetterli 2007 (the rank, see `measures/effective_rank.py`).
    """
    sums = moment.history.gradients  # the rank of a sum is that of the mean
    found = {name: finite_spectrum(Dense(sums[name])) for name in moment.adapted if name in sums}
    return ranks("effective_rank", found)
