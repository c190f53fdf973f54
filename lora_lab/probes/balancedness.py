"""‖BᵀB − AAᵀ‖_F per layer: how unevenly the two factors have grown."""

from __future__ import annotations

import torch

from lora_lab.probes import Moment, Values, step_trace


@step_trace()
def balancedness(moment: Moment) -> Values:
    """Per layer ‖BᵀB − AAᵀ‖_F after step t, of the factors without s; no rows without factors.

    At least 0, in units of a factor's square; at B = 0 it is ‖AAᵀ‖_F, for dW = 0 with A = 0 also
    0. Gradient flow conserves BᵀB − AAᵀ exactly, gradient descent up to O(η²) a step, Adam does
    not. Changes under B → BR, A → R⁻¹A unless R is orthogonal: it is of the factors, not of dW.

    References
    ----------
    Arora, Cohen & Hazan 2018, "On the optimization of deep networks", ICML, Theorem 1.
    """
    out = {}
    for layer, module in moment.adapted.items():
        if module.factors is not None:
            A, B = (factor.detach().double() for factor in module.factors)
            out[layer] = torch.linalg.vector_norm(B.T @ B - A @ A.T)
    return out
