"""The update of one weight: dW as factors (`Factored`) or as a matrix (`Dense`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lora_lab.registry import WrongInput, unknown

Array: TypeAlias = NDArray[np.float64]

ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Unit roundoff u (half the spacing of numbers at 1) of each dtype in which weights are made."""


def coarser(*dtypes: str) -> str:
    """The dtype with the largest unit roundoff.

    >>> coarser("float32", "bfloat16", "float64")
    'bfloat16'
    """
    for name in dtypes:
        if name not in ROUNDOFF:
            raise unknown("dtype", name, ROUNDOFF)
    return max(dtypes, key=ROUNDOFF.__getitem__)


def _as_matrix(x: Any, name: str) -> tuple[Array, str]:
    """A numpy array or torch tensor as a float64 matrix, and the name of its own dtype."""
    own = str(getattr(x, "dtype", "float64")).removeprefix("torch.")
    if hasattr(x, "detach"):
        # bfloat16 has no numpy dtype; every torch float casts to double without an error.
        x = x.detach().cpu().double().numpy()
    matrix = np.ascontiguousarray(x, dtype=np.float64)
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise WrongInput(f"{name} must be a matrix of at least 1 x 1; got shape {matrix.shape}.")
    return matrix, own if own in ROUNDOFF else "float64"


def _matched(self_shape: tuple[int, int], other_shape: tuple[int, int]) -> None:
    if self_shape != other_shape:
        raise WrongInput(f"two updates must have one shape; got {self_shape} and {other_shape}.")


@dataclass(frozen=True, eq=False)
class Factored:
    """A low-rank update ``dW = scale * B @ A``, kept as its factors.

    Parameters
    ----------
    B : array_like, (m, r)
        Output side; numpy array or torch tensor of any float dtype, kept as float64.
    A : array_like, (r, n)
        Input side.
    scale : float
        For LoRA alpha / r, for rsLoRA alpha / sqrt(r).
    made_in : str
        dtype in which the weights were made: float64, float32, float16 or bfloat16. Its unit
        roundoff decides ranks. If B or A comes in a coarser dtype, that one counts.

    Raises
    ------
    WrongInput
        If the shapes do not fit, or the scale is not finite.

    Examples
    --------
    >>> update = Factored([[1.0], [0.0]], [[3.0, 4.0]], scale=2.0)
    >>> update.shape, update.r, update.norm()
    ((2, 2), 1, 10.0)
    """

    B: Array
    A: Array
    scale: float = 1.0
    made_in: str = "float32"

    def __post_init__(self) -> None:
        B, made_B = _as_matrix(self.B, "B")
        A, made_A = _as_matrix(self.A, "A")
        if B.shape[1] != A.shape[0]:
            raise WrongInput(
                f"B (m, r) and A (r, n) must share r; got B {B.shape} and A {A.shape}."
            )
        if not np.isfinite(self.scale):
            raise WrongInput(f"scale must be a finite number; got {self.scale}.")
        object.__setattr__(self, "B", B)
        object.__setattr__(self, "A", A)
        object.__setattr__(self, "scale", float(self.scale))
        object.__setattr__(self, "made_in", coarser(self.made_in, made_B, made_A))

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n): outputs and inputs of the layer."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def r(self) -> int:
        """The configured rank."""
        return self.B.shape[1]

    def dense(self) -> Array:
        """dW as a float64 matrix (m, n)."""
        return self.scale * (self.B @ self.A)

    def core(self) -> tuple[Array, Array, Array, float]:
        """QR core: ``dW = size * Q_B @ core @ Q_A.T`` with orthonormal Q_B (m, p), Q_A (n, p').

        The columns of B and the rows of A are brought to largest entry 1 first, and their sizes
        multiplied into the core, so that factors of size 1e200 and 1e-200 meet without overflow.

        Returns
        -------
        Q_B, Q_A, core, size
            p = min(m, r), p' = min(n, r); `size` is 0 for a zero update.

        Raises
        ------
        WrongInput
            If scale B A is beyond float64.
        """
        B, A, weight, size = self._levelled()
        Q_B, R_B = np.linalg.qr(B)
        Q_A, R_A = np.linalg.qr(A.T)
        return Q_B, Q_A, (R_B * weight) @ R_A.T, size

    def core_alone(self) -> tuple[Array, float]:
        """`core` and `size` without the frames: all that values and norms need, for half the work.

        >>> core, size = Factored([[3.0], [4.0]], [[1.0, 0.0]]).core_alone()
        >>> core.shape, abs(round(float(size * core[0, 0]), 12))
        ((1, 1), 5.0)
        """
        B, A, weight, size = self._levelled()
        R_B, R_A = (np.asarray(np.linalg.qr(x, mode="r")) for x in (B, A.T))
        return (R_B * weight) @ R_A.T, size

    def _levelled(self) -> tuple[Array, Array, Array, float]:
        """B and A with columns and rows of largest entry 1, the weights between, and their size."""
        b, a = np.abs(self.B).max(axis=0), np.abs(self.A).max(axis=1)
        with np.errstate(over="ignore"):
            weight = b * a * self.scale
        size = float(np.abs(weight).max())
        if not np.isfinite(size):
            raise WrongInput("the update is not finite in float64; check B, A and scale.")
        b[b == 0], a[a == 0] = 1.0, 1.0
        return self.B / b, self.A / a[:, None], weight / size if size else weight, size

    def norm(self) -> float:
        """Frobenius norm of dW in O((m + n) r^2), without forming dW; 0 for a zero update."""
        core, size = self.core_alone()
        return float(size * np.linalg.norm(core))

    def inner(self, other: Update) -> float:
        """Frobenius inner product ``<dW, other>``; for two factored updates from r x r products.

        >>> u = Factored([[1.0], [0.0]], [[3.0, 4.0]])
        >>> u.inner(u), u.inner(Dense([[1.0, 1.0], [5.0, 5.0]]))
        (25.0, 7.0)
        """
        _matched(self.shape, other.shape)
        if isinstance(other, Dense):
            return float(self.scale * np.sum((self.B.T @ other.dW) * self.A))
        product = (self.B.T @ other.B) * (self.A @ other.A.T)
        return float(self.scale * other.scale * np.sum(product))


@dataclass(frozen=True, eq=False)
class Dense:
    """An update kept as the matrix dW itself, for example ``W_T - W_0`` of full fine-tuning.

    Parameters
    ----------
    dW : array_like, (m, n)
        numpy array or torch tensor, kept as float64. Cast both weights **before** subtracting.
    made_in : str
        dtype in which the weights were made (see `Factored`). It is float32 by default also for
        a float64 array, because such a difference comes from cast float32 weights as a rule.

    Examples
    --------
    >>> Dense([[3.0, 0.0], [0.0, 4.0]]).norm()
    5.0
    """

    dW: Array
    made_in: str = "float32"

    def __post_init__(self) -> None:
        dW, made = _as_matrix(self.dW, "dW")
        object.__setattr__(self, "dW", dW)
        object.__setattr__(self, "made_in", coarser(self.made_in, made))

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n): outputs and inputs of the layer."""
        return self.dW.shape[0], self.dW.shape[1]

    def dense(self) -> Array:
        """dW as a float64 matrix (m, n)."""
        return self.dW

    def norm(self) -> float:
        """Frobenius norm of dW; 0 for a zero update."""
        return frobenius(self.dW)


Update: TypeAlias = Factored | Dense


def frobenius(matrix: ArrayLike) -> float:
    """Frobenius norm that neither under- nor overflows in its squares.

    >>> float(f"{frobenius([[3e-200, 4e-200]]):.6g}")
    5e-200
    """
    matrix = np.asarray(matrix, dtype=np.float64)
    size = float(np.abs(matrix).max())
    return size * float(np.linalg.norm(matrix / size)) if size else 0.0


def updates_of(tensors: Mapping[str, Any]) -> dict[str, Update]:
    """Updates from `<layer>.<part>` arrays, as runs store them.

    Parameters
    ----------
    tensors : mapping of str to array_like
        Per layer `dW`, or `A`, `B` and `scale`.

    >>> updates_of({"q.A": [[3.0, 4.0]], "q.B": [[1.0]], "q.scale": 2.0})["q"].norm()
    10.0
    """
    parts: dict[str, dict[str, Any]] = {}
    for name, array in tensors.items():
        layer, _, part = name.rpartition(".")
        parts.setdefault(layer, {})[part] = array
    return {
        layer: Dense(p["dW"]) if "dW" in p else Factored(p["B"], p["A"], float(p["scale"]))
        for layer, p in parts.items()
    }
