"""An update decomposed once: singular values, optionally vectors, the route and its error bound."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, TypeAlias

import numpy as np
import scipy.linalg

from lora_lab.linalg import gram
from lora_lab.linalg.factored import ROUNDOFF, Array, Factored, Update, coarser
from lora_lab.registry import WrongInput

U64 = ROUNDOFF["float64"]
GRAM_BOUND = 1e-8
"""Largest error of a singular value, relative to sigma_1, that a dense route may have."""


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Singular values of one update, and what is known about them.

    Attributes
    ----------
    values : ndarray, (q,), float64
        Singular values, descending, q = min(m, n); exact zeros beyond r for factors. From
        `randomized.leading` the k leading ones only.
    shape : (int, int)
        (m, n) of dW.
    U : ndarray (m, k) or None
        Left (output-side) singular vectors as columns.
    Vh : ndarray (k, n) or None
        Right (input-side) singular vectors as rows.
    made_in : str
        dtype whose unit roundoff decides ranks (see `Factored`).
    route : str
        How the values were computed: `gram_core` or `qr_core` (of factors), `gram`, `svd`,
        `randomized`, `given` or `zero`; with `_gesvd` appended where LAPACK's gesdd failed.
    bound : float
        Error bound of every singular value relative to sigma_1 (first order). Where vectors are
        not from an exact SVD it holds their residuals ||dW v - sigma u||, ||dW^T u - sigma v|| too.
    r : int or None
        Configured rank of a factored update.

    Examples
    --------
    >>> s = Spectrum.of_values([4.0, 3.0], shape=(5, 7))
    >>> s.values.tolist(), s.q
    ([4.0, 3.0, 0.0, 0.0, 0.0], 5)
    """

    values: Array
    shape: tuple[int, int]
    U: Array | None = None
    Vh: Array | None = None
    made_in: str = "float64"
    route: str = "given"
    bound: float = 0.0
    r: int | None = None

    def __post_init__(self) -> None:
        if not np.isfinite(self.values).all():
            raise WrongInput("singular values must be finite; the update is too large for float64.")

    @classmethod
    def of_values(
        cls,
        values: Iterable[float],
        shape: tuple[int, int] | None = None,
        made_in: str = "float64",
        r: int | None = None,
    ) -> Spectrum:
        """A spectrum from given singular values in any order, padded with zeros to q.

        Without a shape the update is taken as square, as wide as there are values.

        Raises
        ------
        WrongInput
            For no, negative or non-finite values, more values than q, or an unknown dtype.
        """
        sigma = np.sort(np.asarray(list(values), dtype=np.float64))[::-1]
        shape = (len(sigma), len(sigma)) if shape is None else shape
        q = min(shape)
        if not (np.isfinite(sigma).all() and (sigma >= 0).all() and len(sigma) <= q and q >= 1):
            raise WrongInput(
                f"singular values must be finite, at least 0 and at most min(m, n) = {q} many;"
                f" got {len(sigma)} values for shape {shape}, smallest {sigma.min(initial=0)}."
            )
        padded = np.concatenate([sigma, np.zeros(q - len(sigma))])
        return cls(padded, shape, made_in=coarser(made_in), r=r)

    @property
    def q(self) -> int:
        """min(m, n), the number of singular values."""
        return min(self.shape)

    @property
    def zero(self) -> bool:
        """Whether the update is exactly zero."""
        return bool(self.values[0] == 0)

    @property
    def roundoff(self) -> float:
        """Unit roundoff of the dtype the weights were made in."""
        return ROUNDOFF[self.made_in]

    @cached_property
    def relative(self) -> Array:
        """values / sigma_1: 1 first, so that squares do not underflow; all 0 for a zero update.

        Raises
        ------
        WrongInput
            If only the leading values are known: sums over them would pass for sums over all.
        """
        if len(self.values) < self.q:
            raise WrongInput(
                f"this spectrum holds the {len(self.values)} leading of {self.q} singular values;"
                " a measure of all of them needs decompose(update)."
            )
        return self.values if self.zero else self.values / self.values[0]

    def truncate(self, k: int) -> Factored:
        """dW_k, the best approximation of rank k >= 1, as factors (Eckart-Young-Mirsky).

        Raises
        ------
        WrongInput
            If vectors are missing (``decompose(update, vectors=True)``) or fewer than k.
        """
        if self.U is None or self.Vh is None or not 1 <= k <= self.U.shape[1]:
            have = 0 if self.U is None else self.U.shape[1]
            raise WrongInput(f"k must be in [1, {have}], the vectors this spectrum holds; got {k}.")
        return Factored(self.U[:, :k] * self.values[:k], self.Vh[:k], made_in=self.made_in)


def need_finite(*arrays: Array, what: str, layer: str = "") -> None:
    """Raise `WrongInput` naming the layer if an array holds NaN or Inf (numpy would not)."""
    # Cheaper than a look at every entry (see `in_range`), and without doubt where it is finite.
    if all(np.isfinite(np.vdot(a, a)) for a in arrays):
        return
    bad = sum(int(np.count_nonzero(~np.isfinite(a))) for a in arrays)
    if bad:
        where = f"layer {layer!r}: " if layer else ""
        raise WrongInput(
            f"{where}the {what} holds NaN or Inf ({bad} of {sum(a.size for a in arrays)} entries);"
            " nothing can be measured. Check the run or the file."
        )


def decompose(update: Update, vectors: bool | int = False, layer: str = "") -> Spectrum:
    """Singular values of an update, and its vectors on request.

    Nothing is formed that is not asked for, and the fastest route is taken whose error bound
    suffices: Gram matrices (`gram`) of factors to 1e-12, of a dense update to `GRAM_BOUND` and a
    tenth of the resolution of the dtype its weights were made in. Otherwise factors go through QR
    of B and of A transposed and an r x r SVD, without forming ``B @ A``, and a dense update
    through LAPACK's gesdd, and gesvd where gesdd fails.

    Parameters
    ----------
    update : Factored or Dense
    vectors : bool or int
        True: also U and Vh exactly, r directions for factors, all q for a dense update. An int k:
        the k leading directions of them, or all where there are fewer; for a dense update much
        cheaper than True, within the spectrum's `bound`. All q values come in any case; where k
        directions alone are wanted, see `randomized.leading`.
    layer : str
        The layer's name, for the error message.

    Returns
    -------
    Spectrum
        For a zero update all values are 0, and with `vectors` the first unit vectors.

    Raises
    ------
    WrongInput
        If the update holds NaN or Inf or its values overflow, or for negative `vectors`.

    Examples
    --------
    >>> s = decompose(Factored([[1.0], [0.0]], [[3.0, 4.0]], scale=2.0))
    >>> s.values.round(12).tolist(), s.route, s.r
    ([10.0, 0.0], 'gram_core', 1)
    >>> decompose(Factored([[1.0]], [[float("nan")]]), layer="query")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    lora_lab.registry.WrongInput: layer 'query': the update holds NaN or Inf (1 of 2 entries); ...
    """
    if vectors < 0:
        raise WrongInput(f"vectors must be True, False or a number of directions; got {vectors}.")
    if not isinstance(update, Factored):
        return _of_matrix(update.dW, update.made_in, vectors, None, layer)
    if update.r <= min(update.shape):
        return _of_factors(update, vectors, layer)
    need_finite(update.B, update.A, what="update", layer=layer)
    return _of_matrix(update.dense(), update.made_in, vectors, update.r, layer)


def _of_factors(update: Factored, vectors: bool | int, layer: str) -> Spectrum:
    values = np.zeros(min(update.shape))
    fast = None if vectors else gram.core(update.B, update.A, update.scale)
    if fast is not None:
        values[: update.r], bound = fast
        return Spectrum(
            values, update.shape, made_in=update.made_in, route="gram_core", bound=bound, r=update.r
        )
    need_finite(update.B, update.A, what="update", layer=layer)
    U = Vh = None
    if vectors:
        Q_B, Q_A, core, size = update.core()
        U, sigma, Vh, fallback = _svd(core, vectors)
        U, Vh = Q_B @ U, Vh @ Q_A.T
    else:
        core, size = update.core_alone()
        sigma, fallback = _lapack(core, compute_uv=False)
    values[: update.r] = sigma * size
    # Backward error of QR is relative to the factors, which exceeds sigma_1 if they cancel; the
    # columns have unit size there, so sqrt(m n) bounds the product's scale from above.
    largest = float(np.sqrt(np.prod(update.shape)))
    bound = U64 * update.r * (largest / sigma[0] if sigma[0] else 0.0)
    return Spectrum(
        values,
        update.shape,
        U,
        Vh,
        made_in=update.made_in,
        route="qr_core" + fallback,
        bound=bound,
        r=update.r,
    )


def _of_matrix(dW: Array, made_in: str, vectors: bool | int, r: int | None, layer: str) -> Spectrum:
    shape, q = (dW.shape[0], dW.shape[1]), min(dW.shape)
    scaled, unit = in_range(dW, layer)
    if unit == 0:
        k = q if vectors is True else min(vectors, q)
        U, Vh = (np.eye(shape[0], k), np.eye(k, shape[1])) if vectors else (None, None)
        return Spectrum(np.zeros(q), shape, U, Vh, made_in, "zero", 0.0, r)
    U, sigma, Vh, route, bound = _routed(scaled, tolerance(shape, made_in), vectors)
    return Spectrum(sigma * unit, shape, U, Vh, made_in, route, bound, r)


def in_range(dW: Array, layer: str = "") -> tuple[Array, float]:
    """A matrix whose squares neither under- nor overflow, and its unit: dW = matrix * unit.

    dW itself and 1 as a rule; a unit of 0 says that dW is zero.

    Raises
    ------
    WrongInput
        If dW holds NaN or Inf, naming the layer.

    Examples
    --------
    >>> in_range(np.array([[3e200, 4e200]]))
    (array([[0.75, 1.  ]]), 4e+200)
    """
    # The sum of squares is the cheapest look at every entry: NaN and Inf come out of it too.
    if gram.SQUARES[0] <= np.vdot(dW, dW) <= gram.SQUARES[1]:
        return dW, 1.0
    need_finite(dW, what="update", layer=layer)
    size = float(np.abs(dW).max())
    return (dW / size, size) if size else (dW, 0.0)


def tolerance(shape: tuple[int, int], made_in: str) -> float:
    """Error that values of a dense update may have, relative to sigma_1.

    `GRAM_BOUND`, or a tenth of max(m, n) u where the dtype's unit roundoff u is finer, so that
    rank decisions stay those of exact values.

    >>> tolerance((384, 1536), "float32"), tolerance((384, 1536), "float64") < 1e-13
    (1e-08, True)
    """
    return min(GRAM_BOUND, 0.1 * max(shape) * ROUNDOFF[made_in])


Routed: TypeAlias = tuple[Array | None, Array, Array | None, str, float]


def _routed(scaled: Array, tolerable: float, vectors: bool | int) -> Routed:
    """U, values, Vh, route and bound by the first route that suffices."""
    exact = U64 * max(scaled.shape)
    if not vectors:
        if found := gram.values(scaled, tolerable):
            return None, found[0], None, "gram", found[1]
        sigma, fallback = _lapack(scaled, compute_uv=False)
        return None, sigma, None, "svd" + fallback, exact
    if vectors is not True and (
        directed := gram.leading(scaled, min(vectors, *scaled.shape), tolerable)
    ):
        U, sigma, Vh, bound = directed
        return U, sigma, Vh, "gram", bound
    U, sigma, Vh, fallback = _svd(scaled, vectors)
    return U, sigma, Vh, "svd" + fallback, exact


def _svd(scaled: Array, vectors: bool | int) -> tuple[Array, Array, Array, str]:
    """Exact values, all of them, and vectors as many as asked for."""
    (U, sigma, Vh), fallback = _lapack(scaled, full_matrices=False)
    if vectors is not True and vectors < len(sigma):
        # Copies, so that the directions not asked for are freed.
        U, Vh = U[:, :vectors].copy(), Vh[:vectors].copy()
    return U, sigma, Vh, fallback


def _lapack(scaled: Array, **wanted: bool) -> tuple[Any, str]:
    """An exact SVD by gesdd; gesvd is slower and converges on matrices where gesdd does not."""
    solvers: tuple[tuple[Callable[..., Any], str], ...]
    solvers = ((np.linalg.svd, ""), (partial(scipy.linalg.svd, lapack_driver="gesvd"), "_gesvd"))
    for solver, fallback in solvers:
        try:
            return solver(scaled, **wanted), fallback
        except np.linalg.LinAlgError:
            continue
    raise WrongInput("LAPACK's gesdd and gesvd both failed to converge on this update.")
