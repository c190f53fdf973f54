"""The calibrated instrument: regression on a teacher W0 + dW* whose update is known exactly.

Six linear layers, each a problem of its own:

    y_l = (W0_l + dW*_l) x_l + e_l,    dW*_l = U diag(s) Vh,    s_i proportional to decay^i

A trained dW that is right equals dW*; its rank, its spectrum and its error can be read off.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np

from lora_lab.config import need, need_positive
from lora_lab.data import DATA, SPLITS, DataSet, Problem

LAYERS = {"q": (1, 1), "k": (1, 1), "v": (1, 1), "o": (1, 1), "up": (2, 1), "down": (1, 2)}
"""Shape (d_out, d_in) of each layer in units of `data.width`, in the order of the targets."""


class Teacher(NamedTuple):
    """One layer's truth: W0 (d_out, d_in) float32, and dW* as float64 U (d_out, r), s (r,),
    Vh (r, d_in) with orthonormal columns and rows."""

    W0: np.ndarray
    U: np.ndarray
    s: np.ndarray
    Vh: np.ndarray


@DATA.register
@dataclass(frozen=True)
class PlantedData(DataSet):
    """Gaussian inputs through a planted low-rank update.

    The variance of a target is about 1, so R2 has a known floor and ceiling: with the share
    c = 1 / (1 + strength^2 (1 + noise^2)), the base weights alone score about c, and the teacher
    scores about 1 - c (strength noise)^2.

    Attributes
    ----------
    true_r : int
        Rank of every dW*, in [1, width].
    decay : float
        Spectrum of dW*: sigma_i proportional to decay^i, in (0, 1]; 1 is flat.
    strength : float
        Frobenius norm of dW* relative to that of W0, above 0.
    noise : float
        Standard deviation of the output noise relative to that of the update's output, at least 0.
    width : int
        Width of the layers, at least 64.
    """

    kind: ClassVar[str] = "regression"

    train_examples: int | None = 2048
    validation_examples: int | None = 256
    test_examples: int | None = 1024
    true_r: int = 4
    decay: float = 1.0
    strength: float = 0.5
    noise: float = 0.1
    width: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        need(self.width >= 64, "data.width", "at least 64", self.width)
        need(
            1 <= self.true_r <= self.width,
            "data.true_r",
            f"in [1, {self.width}] (data.width)",
            self.true_r,
        )
        need(0 < self.decay <= 1, "data.decay", "in (0, 1]", self.decay)
        need_positive("data.strength", self.strength)
        ok = math.isfinite(self.noise) and self.noise >= 0
        need(ok, "data.noise", "a finite number of at least 0", self.noise)
        for split in SPLITS:
            n = getattr(self, f"{split}_examples")
            need(n is not None, f"data.{split}_examples", "a number (planted data have no end)", n)

    def check(self) -> None:
        """Nothing can be missing: the ranges were checked when the config was made."""

    def load(self) -> Problem:
        inputs, targets = {}, {}
        digest = hashlib.sha256()
        teachers = {layer: self.teacher(layer) for layer in LAYERS}
        for split in SPLITS:
            inputs[split], targets[split] = self._examples(split, teachers)
            digest.update(inputs[split].astype("<f4").tobytes())
            digest.update(targets[split].astype("<f4").tobytes())
        return Problem(self.kind, inputs, targets, (), digest.hexdigest(), "planted")

    def teacher(self, layer: str) -> Teacher:
        """W0 and the factors of dW* of one layer.

        W0 has entries N(0, 1/d_in) and depends on seed and width only, so that problems of
        different true_r, decay, strength or noise share their base weights and inputs.

        >>> teacher = PlantedData(true_r=3, decay=0.5).teacher("up")
        >>> teacher.W0.shape, (teacher.s / teacher.s[0]).tolist()
        ((256, 128), [1.0, 0.5, 0.25])
        """
        d_out, d_in = (factor * self.width for factor in LAYERS[layer])
        W0 = self._normal("W0", layer, shape=(d_out, d_in)) / math.sqrt(d_in)
        W0 = W0.astype(np.float32)
        U = np.linalg.qr(self._normal("U", layer, shape=(d_out, self.true_r)))[0]
        V = np.linalg.qr(self._normal("V", layer, shape=(d_in, self.true_r)))[0]
        s = self.decay ** np.arange(self.true_r, dtype=np.float64)
        s *= self.strength * np.linalg.norm(W0.astype(np.float64)) / np.linalg.norm(s)
        return Teacher(W0, U, s, V.T)

    def _examples(self, split: str, teachers: dict[str, Teacher]) -> tuple[np.ndarray, np.ndarray]:
        n = getattr(self, f"{split}_examples")
        # Scaled inputs, not scaled weights: W0 keeps its stated distribution.
        scale = 1 / math.sqrt(1 + self.strength**2 * (1 + self.noise**2))
        x = scale * self._normal("inputs", split, shape=(n, 3 * self.width))
        parts = []
        for layer, teacher in teachers.items():
            own = x[:, columns(self, layer)[0]]
            clean = own @ teacher.W0.T.astype(np.float64)
            clean += ((own @ teacher.Vh.T) * teacher.s) @ teacher.U.T
            d_out = len(teacher.W0)
            # An output of dW* x has the mean variance scale^2 |dW*|_F^2 / d_out.
            std = self.noise * scale * np.linalg.norm(teacher.s) / math.sqrt(d_out)
            parts.append(clean + std * self._normal("noise", split, layer, shape=(n, d_out)))
        return x.astype(np.float32), np.concatenate(parts, axis=1).astype(np.float32)

    def _normal(self, *names: str, shape: tuple[int, int]) -> np.ndarray:
        """Standard normal numbers of a stream of their own, chosen by name; rows are nested."""
        entropy = [self.seed, *"/".join(names).encode()]
        return np.random.default_rng(np.random.SeedSequence(entropy)).standard_normal(shape)


def base_weights(config: PlantedData) -> dict[str, np.ndarray]:
    """W0 of every layer, float32 (d_out, d_in), from which the model starts."""
    return {layer: config.teacher(layer).W0 for layer in LAYERS}


def columns(config: PlantedData, layer: str) -> tuple[slice, slice]:
    """Where a layer's inputs and targets stand in the rows of the problem.

    Inputs are x (width; read by q, k, v, o, up) beside z (2 width; read by down); targets are the
    outputs in the order of `LAYERS`.

    >>> columns(PlantedData(width=64), "down")
    (slice(64, 192, None), slice(384, 448, None))
    """
    w, names = config.width, list(LAYERS)
    start = w * sum(LAYERS[name][0] for name in names[: names.index(layer)])
    inputs = slice(w, 3 * w) if layer == "down" else slice(0, w)
    return inputs, slice(start, start + w * LAYERS[layer][0])
