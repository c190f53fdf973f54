"""One layer that has been checked and is loaded when its turn comes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from lora_lab.checkpoints.starts import STARTS
from lora_lab.linalg import Dense, Factored, Update
from lora_lab.linalg.factored import Array, coarser
from lora_lab.tensorfile import StoredTensor

Layer: TypeAlias = tuple[str, Array | None, Update]


@dataclass(frozen=True)
class Pair:
    """The factors of one module of an adapter, as they lie in its file.

    Attributes
    ----------
    A : StoredTensor (r, n)
    B : StoredTensor (m, r)
        Kernels of convolutions flattened; r = 0 for a module that AdaLoRA pruned away.
    scale : float
    turned : bool
        dW lies transposed in the state dict: embeddings, and linear maps stored as (in, out).
    E : StoredTensor, optional
        AdaLoRA's r singular values.
    magnitude : StoredTensor, optional
        DoRA's m magnitudes, one for each output.
    start : str, optional
        Name in `STARTS` if the start changed the base weight.
    """

    A: StoredTensor
    B: StoredTensor
    scale: float
    turned: bool = False
    E: StoredTensor | None = None
    magnitude: StoredTensor | None = None
    start: str | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) in the orientation of the state dict."""
        m, n = self.B.shape[0], self.A.shape[1]
        return (n, m) if self.turned else (m, n)

    @property
    def needs_base(self) -> bool:
        """Whether dW depends on W0."""
        return self.magnitude is not None or self.start is not None

    def update(self, base: StoredTensor | None, W0: Array | None) -> Update:
        """dW; `W0` is `base` loaded, needed only if `needs_base`."""
        B, A = self._factors(W0)
        made_in = coarser(self.A.dtype, self.B.dtype)
        if not self.needs_base:
            return Factored(B, A, self.scale, made_in)
        assert base is not None
        made_in = coarser(made_in, base.dtype)
        if self.magnitude is None:
            return Factored(B, A, self.scale, made_in)
        assert W0 is not None
        dW = (self.scale * B) @ A
        dW += W0
        _set_norms(dW, self.magnitude.load().ravel(), axis=0 if self.turned else 1)
        dW -= W0
        return Dense(dW, coarser(made_in, self.magnitude.dtype))

    def _factors(self, W0: Array | None) -> tuple[Array, Array]:
        B, A = self.B.load(), self.A.load()
        if self.E is not None:
            A *= self.E.load().reshape(-1, 1)
        if not A.size:
            # All of its directions were pruned: the zero update, whose factors need one row.
            B, A = np.zeros((B.shape[0], 1)), np.zeros((1, A.shape[1]))
        if self.turned:
            B, A = A.T, B.T
        if self.start is not None:
            assert W0 is not None
            B0, A0 = STARTS[self.start](W0, A.shape[0], self.scale)
            B, A = np.hstack([B, B0]), np.vstack([A, -A0])
        return B, A


def _set_norms(weight: Array, norms: Array, axis: int) -> None:
    """Give the rows (axis 1) or columns (axis 0) of a matrix these 2-norms, in place.

    They are brought to largest entry 1 first, so that no square over- or underflows. A row of
    zeros has no direction and becomes NaN, as in PEFT.
    """
    norms = np.expand_dims(norms, axis)
    with np.errstate(invalid="ignore", divide="ignore"):
        weight /= np.maximum(weight.max(axis, keepdims=True), -weight.min(axis, keepdims=True))
        squares = np.einsum("ij,ij->i" if axis else "ij,ij->j", weight, weight)
        weight *= norms / np.expand_dims(np.sqrt(squares), axis)


@dataclass(frozen=True)
class Job:
    """One layer of a model on disk: checked, not loaded, and small enough to send to a process.

    Attributes
    ----------
    layer : str
        Named as in the base's state dict, without `.weight`.
    base : StoredTensor, optional
        Where W0 lies.
    new : StoredTensor or Pair
        Where the tuned weight lies, or its adapter.
    """

    layer: str
    base: StoredTensor | None
    new: StoredTensor | Pair

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of dW, in the orientation of the state dict's weight."""
        m, n = self.new.shape
        return m, n

    @property
    def nbytes(self) -> int:
        """Bytes of the largest tensor that `load` makes, in float64: the unit of its peak."""
        new = (self.new.A, self.new.B) if isinstance(self.new, Pair) else (self.new,)
        return 8 * max(t.size for t in (*new, self.base) if t is not None)

    def load(self) -> Layer:
        """(layer, W0 or None, update).

        Peak memory is that of the result, at most 2 * `nbytes` (W0 and a dense dW), and a
        few MB: tensors are cast block by block and dW is made in place. An adapter whose start
        changed the base weight adds the start's basis, see `starts.pissa`.

        Raises
        ------
        WrongInput
            If a file changed since it was checked.
        """
        W0 = None if self.base is None else self.base.load()
        if isinstance(self.new, Pair):
            return self.layer, W0, self.new.update(self.base, W0)
        assert self.base is not None
        assert W0 is not None
        dW = self.new.load()
        dW -= W0
        return self.layer, W0, Dense(dW, coarser(self.base.dtype, self.new.dtype))
