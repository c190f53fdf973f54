"""An update decomposed once: singular values, optionally vectors, the route and its error bound."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.linalg

from lora_lab.linalg.factored import ROUNDOFF, Array, Factored, Update, coarser
from lora_lab.registry import WrongInput

U64 = ROUNDOFF["float64"]
GRAM_BOUND = 1e-8
"""Largest error of a singular value, relative to sigma_1, that the Gram route may have."""


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Singular values of one update, and what is known about them.

    Attributes
    ----------
    values : ndarray, (q,), float64
        Singular values, descending, q = min(m, n); exact zeros beyond r for factors.
    shape : (int, int)
        (m, n) of dW.
    U : ndarray (m, k) or None
        Left (output-side) singular vectors as columns.
    Vh : ndarray (k, n) or None
        Right (input-side) singular vectors as rows.
    made_in : str
        dtype whose unit roundoff decides ranks (see `Factored`).
    route : str
        How the values were computed: `qr_core`, `gram`, `svd`, `given` or `zero`; with `_gesvd`
        appended where LAPACK's gesdd failed.
    bound : float
        Error bound of every singular value relative to sigma_1 (first order).
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
        return len(self.values)

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
        """values / sigma_1: 1 first, so that squares do not underflow; all 0 for a zero update."""
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
    bad = sum(int(np.count_nonzero(~np.isfinite(a))) for a in arrays)
    if bad:
        where = f"layer {layer!r}: " if layer else ""
        raise WrongInput(
            f"{where}the {what} holds NaN or Inf ({bad} of {sum(a.size for a in arrays)} entries);"
            " nothing can be measured. Check the run or the file."
        )


def decompose(update: Update, vectors: bool = False, layer: str = "") -> Spectrum:
    """Singular values of an update, and its vectors on request.

    Factors go through QR of B and of A transposed and an r x r SVD, without forming ``B @ A``;
    a dense update through its float64 Gram matrix where the bound shows that this suffices, else
    through LAPACK's gesdd, and gesvd where gesdd fails.

    Parameters
    ----------
    update : Factored or Dense
    vectors : bool
        Also compute U and Vh: r directions for factors, all q for a dense update.
    layer : str
        The layer's name, for the error message.

    Returns
    -------
    Spectrum
        For a zero update all values are 0, and with `vectors` the first unit vectors.

    Raises
    ------
    WrongInput
        If the update holds NaN or Inf.

    Examples
    --------
    >>> s = decompose(Factored([[1.0], [0.0]], [[3.0, 4.0]], scale=2.0))
    >>> s.values.round(12).tolist(), s.route, s.r
    ([10.0, 0.0], 'qr_core', 1)
    >>> decompose(Factored([[1.0]], [[float("nan")]]), layer="query")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    lora_lab.registry.WrongInput: layer 'query': the update holds NaN or Inf (1 of 2 entries); ...
    """
    arrays = (update.B, update.A) if isinstance(update, Factored) else (update.dW,)
    need_finite(*arrays, what="update", layer=layer)
    if isinstance(update, Factored):
        if update.r <= min(update.shape):
            return _of_factors(update, vectors)
        return _of_matrix(update.dense(), update.made_in, vectors, update.r)
    return _of_matrix(update.dW, update.made_in, vectors, None)


def _of_factors(update: Factored, vectors: bool) -> Spectrum:
    Q_B, Q_A, core, size = update.core()
    U, sigma, Vh, fallback = _svd(core, vectors)
    values = np.zeros(min(update.shape))
    values[: update.r] = sigma * size
    # Backward error of QR is relative to the factors, which exceeds sigma_1 if they cancel; the
    # columns have unit size there, so sqrt(m n) bounds the product's scale from above.
    largest = float(np.sqrt(np.prod(update.shape)))
    bound = U64 * update.r * (largest / sigma[0] if sigma[0] else 0.0)
    return Spectrum(
        values,
        update.shape,
        U=None if U is None else Q_B @ U,
        Vh=None if Vh is None else Vh @ Q_A.T,
        made_in=update.made_in,
        route="qr_core" + fallback,
        bound=bound,
        r=update.r,
    )


def _of_matrix(dW: Array, made_in: str, vectors: bool, r: int | None) -> Spectrum:
    size = float(np.abs(dW).max())
    if size == 0:
        m, n = dW.shape
        q = min(m, n)
        U, Vh = (np.eye(m, q), np.eye(q, n)) if vectors else (None, None)
        return Spectrum(np.zeros(q), (m, n), U, Vh, made_in, "zero", 0.0, r)
    scaled = dW / size
    gram = None if vectors else _gram(scaled, made_in)
    if gram is not None:
        sigma, bound = gram
        return Spectrum(sigma * size, dW.shape, None, None, made_in, "gram", bound, r)
    U, sigma, Vh, fallback = _svd(scaled, vectors)
    bound = U64 * max(dW.shape)
    return Spectrum(sigma * size, dW.shape, U, Vh, made_in, "svd" + fallback, bound, r)


def _gram(scaled: Array, made_in: str) -> tuple[Array, float] | None:
    """Singular values from the smaller Gram matrix, and their bound; None where it is too coarse.

    Gram and eigenvalues are right to delta = (sqrt(max) F^2 / sigma_1^2 + q) u, relative to
    sigma_1^2 (Higham & Mary 2019 for the product, with F the Frobenius norm). A singular value
    sigma is then right to delta sigma_1^2 / max(sigma, sqrt(delta) sigma_1), which is worst for
    the smallest: a matrix that is nearly singular needs the SVD. Rank decisions leave a factor 10.
    """
    long, q = max(scaled.shape), min(scaled.shape)
    tolerance = min(GRAM_BOUND, 0.1 * long * ROUNDOFF[made_in])
    if U64 * (np.sqrt(long) + q) > tolerance:
        return None
    G = scaled @ scaled.T if scaled.shape[0] == q else scaled.T @ scaled
    # Only the lower triangle is read, so rounding that makes G unsymmetric does no harm.
    try:
        squares = np.linalg.eigvalsh(G)[::-1]
    except np.linalg.LinAlgError:
        return None
    top = squares[0]
    delta = U64 * (np.sqrt(long) * np.trace(G) / top + q)
    sigma = np.sqrt(np.clip(squares, 0.0, None))
    bound = float(delta / max(sigma[-1] / sigma[0], np.sqrt(delta)))
    return (sigma, bound) if bound <= tolerance else None


def _svd(scaled: Array, vectors: bool) -> tuple[Array | None, Array, Array | None, str]:
    """Exact SVD by gesdd; gesvd is slower and converges on matrices where gesdd does not."""
    for driver, fallback in (("gesdd", ""), ("gesvd", "_gesvd")):
        try:
            if not vectors:
                sigma = scipy.linalg.svd(scaled, compute_uv=False, lapack_driver=driver)
                return None, sigma, None, fallback
            U, sigma, Vh = scipy.linalg.svd(scaled, full_matrices=False, lapack_driver=driver)
            return U, sigma, Vh, fallback
        except np.linalg.LinAlgError:
            continue
    raise WrongInput("LAPACK's gesdd and gesvd both failed to converge on this update.")
