"""An update with all that a measure may need beside it, and what laws do to them together."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lora_lab.linalg import Dense, Factored, Spectrum, decompose
from lora_lab.linalg.factored import Array, Update
from lora_lab.measures import MEASURES, Measure, Refused

ENTRYWISE = {"merge_precision", "requantization_error", "sign_conflict"}
"""Measures of single entries: a rotation changes what they measure."""

IN_STORAGE_ORDER = {"requantization_error"}
"""Measures of rows or blocks of numbers: transposition changes what they measure too."""

INPUT_SIDE = {"activations"}
"""Needs that belong to the input side: transposition is no symmetry of their measures."""

SWAPPED = {"left": "right", "right": "left"}


@dataclass(frozen=True)
class Material:
    """Everything that a measure may need, for one layer."""

    update: Update
    W0: Array
    activations: Array
    pair_update: Update
    others: tuple[Update, ...]

    @property
    def spectrum(self) -> Spectrum:
        return decompose(self.update, vectors=True)

    def given(self, m: Measure) -> dict[str, Any]:
        made = {
            "W0": lambda: self.W0,
            "base": lambda: decompose(Dense(self.W0), vectors=True),
            "update": lambda: self.update,
            "activations": lambda: self.activations,
            "pair": lambda: decompose(self.pair_update, vectors=True),
            "pair_update": lambda: self.pair_update,
            "seeds": lambda: [decompose(u, vectors=True) for u in self.others],
        }
        return {need: made[need]() for need in m.given}

    def mapped(self, Q: Array, P: Array) -> Material:
        """The same layer with rotated outputs (Q) and inputs (P): W becomes Q W P."""

        def turn(update: Update) -> Update:
            if isinstance(update, Factored):
                return replace(update, B=Q @ update.B, A=update.A @ P)
            return replace(update, dW=Q @ update.dW @ P)

        return Material(
            turn(self.update),
            Q @ self.W0 @ P,
            P.T @ self.activations @ P,
            turn(self.pair_update),
            tuple(turn(u) for u in self.others),
        )

    def transposed(self) -> Material:
        def turn(update: Update) -> Update:
            if isinstance(update, Factored):
                return replace(update, B=update.A.T, A=update.B.T)
            return replace(update, dW=update.dW.T)

        return replace(
            self,
            update=turn(self.update),
            W0=self.W0.T,
            activations=np.eye(len(self.W0)),  # inputs of the other side are not known
            pair_update=turn(self.pair_update),
            others=tuple(turn(u) for u in self.others),
        )


def material(update: Update, seed: int = 0) -> Material:
    """An update with a random base, inputs, a random partner and two other seeds of its kind."""
    rng = np.random.default_rng(seed)
    m, n = update.shape
    x = rng.standard_normal((4 * n, n)) * np.geomspace(1, 0.1, n)
    others = [_like(update, rng) for _ in range(3)]
    W0 = rng.standard_normal((m, n))
    return Material(update, W0, x.T @ x / len(x), others[0], tuple(others[1:]))


def _like(update: Update, rng: np.random.Generator) -> Update:
    m, n = update.shape
    if isinstance(update, Factored):
        return Factored(rng.standard_normal((m, update.r)), rng.standard_normal((update.r, n)))
    return Dense(rng.standard_normal((m, n)))


def all_values(
    of: Spectrum | Material, kinds: tuple[str, ...] = ("rank", "ratio")
) -> dict[tuple[str, float | None, str | None], float]:
    """Every value that can be had of every measure of these kinds: {(name, k, side): value}.

    Where a measure refuses there is no value.
    """
    s = of.spectrum if isinstance(of, Material) else of
    out = {}
    for name in MEASURES:
        m = MEASURES[name]
        bare = m.given or "vectors" in m.needs
        if m.kind not in kinds or ("r" in m.needs and s.r is None):
            continue
        if bare and not isinstance(of, Material):
            continue
        given = of.given(m) if isinstance(of, Material) else {}
        for k in m.grid(s) if m.grid else (None,):
            for side in m.sides or (None,):
                try:
                    out[name, k, side] = m(s, k, side, **given)
                except Refused:
                    continue
    return out


def swapped(
    values: dict[tuple[str, float | None, str | None], float],
) -> dict[tuple[str, float | None, str | None], float]:
    """Values with left for right: what the transposed layer gives."""
    return {(name, k, SWAPPED.get(str(side), side)): v for (name, k, side), v in values.items()}
