"""Updates and their spectra against numpy, torch and matrices of known singular values."""

import threading
import time

import numpy as np
import pytest
import scipy.linalg
import torch
from scipy.stats import chi2

from lora_lab.linalg import Dense, Factored, Spectrum, decompose, gram, lapack
from lora_lab.linalg.factored import ROUNDOFF, coarser
from lora_lab.registry import WrongInput


def orthogonal(rng, m, k):
    return np.linalg.qr(rng.standard_normal((m, k)))[0]


def with_values(rng, m, n, values):
    """A matrix of known singular values (leading ones; the rest is zero)."""
    k = len(values)
    return (orthogonal(rng, m, k) * values) @ orthogonal(rng, n, k).T


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize(
    ("m", "n", "r"), [(40, 30, 4), (30, 40, 30), (7, 90, 1), (1, 20, 1), (20, 1, 1), (5, 6, 9)]
)
def test_factors_have_the_spectrum_of_their_product(rng, m, n, r):
    update = Factored(rng.standard_normal((m, r)), rng.standard_normal((r, n)), scale=-0.5)
    reference = np.linalg.svd(-0.5 * update.B @ update.A, compute_uv=False)
    s = decompose(update)
    assert (s.route in ("gram_core", "qr_core")) == (r <= min(m, n))
    assert s.r == r
    np.testing.assert_allclose(s.values, reference, atol=max(s.bound, 1e-13) * reference[0])
    assert not s.values[r:].any(), "beyond r the values are exactly zero"


@pytest.mark.parametrize(
    "update",
    [
        Factored(np.arange(12.0).reshape(6, 2), np.cos(np.arange(10.0)).reshape(2, 5), 2.0),
        Factored(np.arange(12.0).reshape(6, 2), np.cos(np.arange(10.0)).reshape(2, 5), -2.0),
        Dense(np.sin(np.arange(30.0)).reshape(6, 5)),
        Dense(np.sin(np.arange(30.0)).reshape(5, 6)),
        Dense(np.zeros((3, 4))),
        Factored(np.zeros((6, 2)), np.ones((2, 5))),
    ],
)
def test_vectors_rebuild_the_update_and_are_orthonormal(update):
    s = decompose(update, vectors=True)
    k = s.r if s.r else s.q
    assert s.U.shape == (update.shape[0], k)
    assert s.Vh.shape == (k, update.shape[1])
    np.testing.assert_allclose((s.U * s.values[:k]) @ s.Vh, update.dense(), atol=1e-13)
    np.testing.assert_allclose(s.U.T @ s.U, np.eye(k), atol=1e-13)
    np.testing.assert_allclose(s.Vh @ s.Vh.T, np.eye(k), atol=1e-13)


def test_truncation_is_the_nearest_matrix_of_its_rank(rng):
    dW = with_values(rng, 12, 9, [5.0, 3.0, 2.0, 1.0])
    s = decompose(Dense(dW), vectors=True)
    kept = s.truncate(2)
    assert np.linalg.matrix_rank(kept.dense()) == 2
    assert np.linalg.norm(dW - kept.dense()) == pytest.approx(np.sqrt(5.0), rel=1e-12)
    with pytest.raises(WrongInput, match=r"k must be in \[1, 9\]"):
        s.truncate(10)
    with pytest.raises(WrongInput, match=r"k must be in \[1, 0\]"):
        decompose(Dense(dW)).truncate(1)


@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (384, 384), (2, 5000), (64, 64)])
@pytest.mark.parametrize("vectors", [False, 5])
def test_the_gram_route_is_as_right_as_it_says(rng, shape, vectors):
    for values in (np.geomspace(1.0, 1e-3, min(shape)), np.repeat([3.0, 1.0], min(shape) // 2)):
        s = decompose(Dense(with_values(rng, *shape, values), made_in="float32"), vectors)
        assert s.route == "gram"
        error = np.abs(s.values - values).max() / values[0]
        assert error <= s.bound <= 1e-8


def test_a_measured_rounding_error_keeps_flat_spectra_on_the_fast_way(rng):
    values = np.linspace(1.0, 1e-5, 400)
    s = decompose(Dense(with_values(rng, 400, 400, values)))
    assert s.route == "gram"
    assert np.abs(s.values - values).max() <= s.bound <= 1e-8
    worst = 2.0**-53 * np.sqrt(400) * np.sum(values**2) / values[-1]
    assert worst > 1e-8, "by the worst case of rounding it would have gone to the SVD"


@pytest.mark.parametrize(
    ("values", "made_in"),
    [
        (np.geomspace(1.0, 1e-3, 128), "float64"),  # its rank decisions are finer than Gram's
        (np.geomspace(1.0, 1e-12, 128), "float32"),  # nearly singular
        ([1.0], "float32"),
    ],
)
def test_a_matrix_that_gram_cannot_resolve_goes_through_the_svd(rng, values, made_in):
    s = decompose(Dense(with_values(rng, 256, 128, values), made_in=made_in))
    assert s.route == "svd"
    reference = np.concatenate([values, np.zeros(128 - len(values))])
    assert np.abs(s.values - reference).max() <= s.bound < 1e-13


@pytest.mark.parametrize("route", ["gram_core", "gram", "svd"])
@pytest.mark.parametrize("size", [1e-200, 1e200, 1e-30, 1e30])
def test_extreme_sizes_neither_under_nor_overflow(rng, route, size):
    if route == "gram_core":
        one = Factored(rng.standard_normal((50, 3)), rng.standard_normal((3, 40)))
        scaled = Factored(one.B, one.A, scale=size)
    else:
        made_in = "float32" if route == "gram" else "float64"
        dW = with_values(rng, 200, 150, np.linspace(2.0, 1.0, 150))
        one, scaled = Dense(dW, made_in), Dense(dW * size, made_in)
    s = decompose(scaled)
    assert s.route == route
    np.testing.assert_allclose(s.values / size, decompose(one).values, rtol=1e-9)
    assert scaled.norm() == pytest.approx(one.norm() * size, rel=1e-12)


def test_factors_of_opposite_extremes_meet(rng):
    B, A = rng.standard_normal((30, 2)), rng.standard_normal((2, 20))
    sizes = np.array([1e200, 1e-180])
    update = Factored(B * sizes, A / sizes[:, None])
    np.testing.assert_allclose(
        decompose(update).values, np.linalg.svd(B @ A, compute_uv=False), atol=1e-13
    )


def test_denormal_entries_have_a_spectrum():
    s = decompose(Dense(np.diag([8 * 5e-324, 4 * 5e-324])))
    assert s.values.tolist() == [8 * 5e-324, 4 * 5e-324]
    assert s.relative.tolist() == [1.0, 0.5]


def test_cancelling_factors_are_right_to_their_stated_bound(rng):
    B, A = rng.standard_normal((60, 4)), rng.standard_normal((4, 50))
    tiny = 1e-9 * rng.standard_normal((60, 4))
    update = Factored(np.hstack([B + tiny, B]), np.vstack([A, -A]))
    exact = np.linalg.svd(((B + tiny) - B) @ A, compute_uv=False)
    s = decompose(update)
    assert np.abs(s.values - exact).max() <= s.bound * s.values[0]
    assert s.bound > 1e-9, "a bound of rounding size would hide the cancellation"


def test_a_zero_update_has_an_exactly_zero_spectrum():
    for update in (
        Dense(np.zeros((3, 5))),
        Factored(np.zeros((3, 2)), np.ones((2, 5))),
        Factored(np.ones((3, 2)), np.ones((2, 5)), scale=0.0),
    ):
        s = decompose(update)
        assert s.zero
        assert s.values.tolist() == [0.0, 0.0, 0.0]
        assert s.relative.tolist() == [0.0, 0.0, 0.0]
        assert update.norm() == 0.0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_are_refused_with_the_layers_name(bad):
    B, A, dW = np.ones((3, 2)), np.ones((2, 4)), np.ones((3, 4))
    B[1, 1] = dW[2, 0] = bad
    for update in (Factored(B, A), Dense(dW)):
        with pytest.raises(ValueError, match=r"layer 'h\.3\.query': .* NaN or Inf \(1 of"):
            decompose(update, layer="h.3.query")


def failing(*args, **keywords):
    raise np.linalg.LinAlgError("did not converge")


@pytest.mark.parametrize("vectors", [False, True, 2])
def test_a_failing_gesdd_falls_back_to_gesvd_and_says_so(rng, monkeypatch, vectors):
    monkeypatch.setattr(np.linalg, "svd", failing)  # numpy's is gesdd
    dW = with_values(rng, 8, 6, [3.0, 2.0, 1.0])
    for update, route in (
        (Dense(dW, "float64"), "svd_gesvd"),
        (Factored(dW[:, :2], np.eye(2, 6)), "qr_core_gesvd"),
    ):
        s = decompose(update, vectors)
        assert s.route == route
        reference = scipy.linalg.svdvals(update.dense())
        np.testing.assert_allclose(s.values, reference, atol=1e-13)
    monkeypatch.setattr(scipy.linalg, "svd", failing)
    with pytest.raises(WrongInput, match="both failed"):
        decompose(Dense(dW, "float64"), vectors)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_torch_tensors_of_every_dtype_are_taken_exactly(dtype):
    torch.manual_seed(0)
    B = torch.randn(9, 2, requires_grad=True).to(getattr(torch, dtype))
    A = torch.randn(2, 8).to(getattr(torch, dtype))
    update = Factored(B, A, scale=2.0)
    expected = 2.0 * (B.detach().double() @ A.double())
    np.testing.assert_allclose(update.dense(), expected.numpy(), rtol=1e-14, atol=1e-15)
    assert update.made_in == coarser("float32", dtype)
    assert Dense(A).made_in == coarser("float32", dtype)
    assert np.array_equal(Dense(A).dense(), A.double().numpy())


def test_norm_and_inner_product_equal_those_of_the_matrices(rng):
    a = Factored(rng.standard_normal((9, 2)), rng.standard_normal((2, 7)), 3.0)
    b = Factored(rng.standard_normal((9, 4)), rng.standard_normal((4, 7)), -1.5)
    assert a.norm() == pytest.approx(np.linalg.norm(a.dense()), rel=1e-13)
    assert Dense(a.dense()).norm() == pytest.approx(a.norm(), rel=1e-13)
    expected = np.sum(a.dense() * b.dense())
    assert a.inner(b) == pytest.approx(expected, rel=1e-12)
    assert a.inner(Dense(b.dense())) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(WrongInput, match="one shape"):
        a.inner(Dense(np.ones((7, 9))))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Factored(np.ones((3, 2)), np.ones((3, 4))), "must share r"),
        (lambda: Factored(np.ones(3), np.ones((3, 4))), "B must be a matrix"),
        (lambda: Dense(np.ones((0, 4))), "dW must be a matrix"),
        (lambda: Factored(np.ones((3, 1)), np.ones((1, 4)), np.nan), "scale must be a finite"),
        (lambda: Dense(np.ones((3, 4)), made_in="float8"), "unknown dtype 'float8'; allowed"),
        (lambda: decompose(Factored([[1e300]], [[1e300]])), "not finite in float64"),
        (lambda: Spectrum.of_values([1.0, -1.0]), "at least 0"),
        (lambda: Spectrum.of_values([np.inf]), "finite"),
        (lambda: Spectrum.of_values([3.0, 2.0, 1.0], shape=(2, 9)), r"min\(m, n\) = 2"),
        (lambda: Spectrum.of_values([]), "at most"),
    ],
)
def test_wrong_input_is_one_line_that_says_what_is_allowed(make, said):
    with pytest.raises(WrongInput, match=said) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_unit_roundoffs_are_those_of_the_dtypes():
    for name, u in ROUNDOFF.items():
        assert u == torch.finfo(getattr(torch, name)).eps / 2


def test_given_values_are_sorted_and_padded():
    s = Spectrum.of_values([3.0, 4.0], shape=(5, 7))
    assert s.values.tolist() == [4.0, 3.0, 0.0, 0.0, 0.0]
    assert Spectrum.of_values([3.0, 4.0]).shape == (2, 2)


def normal(rng, m, n):
    return rng.standard_normal((m, n))


def bfloat16(dW):
    return torch.from_numpy(dW).to(torch.bfloat16)


def repeated(rng, m, n):
    return with_values(rng, m, n, np.repeat([4.0, 2.0, 1.0], min(m, n) // 3))


def conditioned(rng, m, n):
    return with_values(rng, m, n, np.geomspace(1.0, 1e-16, min(m, n)))


HARD = {
    "zero": lambda rng: Dense(np.zeros((20, 30))),
    "zero factors": lambda rng: Factored(np.zeros((20, 3)), normal(rng, 3, 30)),
    "rank 1": lambda rng: Dense(normal(rng, 90, 1) @ normal(rng, 1, 120)),
    "rank 1 factors": lambda rng: Factored(normal(rng, 90, 1), normal(rng, 1, 120)),
    "equal columns": lambda rng: Factored(np.ones((90, 4)), normal(rng, 4, 120)),
    "repeated": lambda rng: Dense(repeated(rng, 90, 120)),
    "repeated, all equal": lambda rng: Dense(orthogonal(rng, 120, 90)),
    "condition 1e16": lambda rng: Dense(conditioned(rng, 120, 90)),
    "condition 1e16, float64": lambda rng: Dense(conditioned(rng, 120, 90), "float64"),
    "condition 1e16 factors": lambda rng: Factored(conditioned(rng, 90, 8), normal(rng, 8, 120)),
    "one row": lambda rng: Dense(normal(rng, 1, 300)),
    "one column": lambda rng: Dense(normal(rng, 300, 1)),
    "one entry": lambda rng: Dense([[-3.0]]),
    "denormal": lambda rng: Dense(np.round(normal(rng, 40, 30) * 1e3) * 5e-324),
    "1e-30": lambda rng: Dense(normal(rng, 90, 120) * 1e-30),
    "1e30": lambda rng: Dense(normal(rng, 90, 120) * 1e30),
    "1e-200": lambda rng: Dense(normal(rng, 90, 120) * 1e-200),
    "1e200": lambda rng: Dense(normal(rng, 90, 120) * 1e200),
    "columns of 1e-8 to 1e8": lambda rng: Dense(normal(rng, 90, 60) * np.geomspace(1e-8, 1e8, 60)),
    "bfloat16": lambda rng: Dense(bfloat16(normal(rng, 90, 120))),
    "bfloat16 factors": lambda rng: Factored(
        bfloat16(normal(rng, 90, 4)), bfloat16(normal(rng, 4, 120)), 2.0
    ),
    "wider than it is": lambda rng: Factored(normal(rng, 6, 9), normal(rng, 9, 8)),
}


@pytest.mark.parametrize("vectors", [False, True, 3])
@pytest.mark.parametrize("name", HARD)
def test_hard_updates_are_right_to_their_stated_bound(rng, name, vectors):
    update = HARD[name](rng)
    s = decompose(update, vectors)
    dW = update.dense()
    size = np.abs(dW).max() or 1.0
    exact = scipy.linalg.svdvals(dW / size, check_finite=True)
    relative = exact[0] or 1.0
    # The reference errs too, and forming B A.
    slack = 3e-15 + (5e-324 / (size * relative))
    assert np.abs(s.values / size - exact).max() / relative <= s.bound + slack
    assert s.bound <= 1e-6
    assert (np.diff(s.values) <= 0).all()
    if vectors:
        k = min(s.q if s.r is None else s.r, s.q)
        k = k if vectors is True else min(k, vectors)
        sigma = s.values[:k] / size
        assert s.U.shape == (update.shape[0], k)
        assert s.Vh.shape == (k, update.shape[1])
        for frame in (s.U, s.Vh.T):
            np.testing.assert_allclose(frame.T @ frame, np.eye(k), atol=1e-12)
        limit = (s.bound + 10 * slack) * relative
        assert np.linalg.norm((dW / size) @ s.Vh.T - s.U * sigma, axis=0).max() <= limit
        assert np.linalg.norm((dW / size).T @ s.U - s.Vh.T * sigma, axis=0).max() <= limit


@pytest.mark.parametrize(("m", "n"), [(60, 60), (64, 300), (300, 64), (2, 2), (1, 9), (9, 1)])
@pytest.mark.parametrize("made_in", ["float32", "float64"])
def test_leading_directions_are_those_of_the_whole_decomposition(rng, m, n, made_in):
    update = Dense(rng.standard_normal((m, n)), made_in)
    whole, values = decompose(update, vectors=True), decompose(update).values
    for k in {1, min(m, n) // 2 or 1, min(m, n), min(m, n) + 5}:
        s = decompose(update, vectors=k)
        np.testing.assert_allclose(s.values, values, rtol=1e-12)
        kept = min(k, m, n)
        for found, other in ((s.U.T, whole.U.T), (s.Vh, whole.Vh)):
            cosines = np.abs(np.sum(found * other[:kept], axis=1))
            np.testing.assert_allclose(cosines, 1.0, rtol=1e-9)
        signs = np.sum(s.U * (update.dense() @ s.Vh.T), axis=0)
        assert (signs > 0).all(), "u and v belong together"


def test_directions_of_a_low_rank_update_do_not_pass_gram(rng):
    # Below its rank there are no directions that a Gram matrix could tell from rounding.
    s = decompose(Dense(with_values(rng, 80, 60, [3.0, 2.0])), vectors=5)
    assert s.route == "svd"
    np.testing.assert_allclose(s.U.T @ s.U, np.eye(5), atol=1e-13)


def test_directions_with_a_large_residual_are_taken_from_the_svd(rng, monkeypatch):
    update = Dense(rng.standard_normal((60, 80)))
    whole, sound = decompose(update, vectors=True), gram._Tridiagonal.leading

    def turned(form, k):
        frame = sound(form, k)
        return orthogonal(rng, *frame.shape) * 1e-6 + frame

    monkeypatch.setattr(gram._Tridiagonal, "leading", turned)
    s = decompose(update, vectors=3)
    assert s.route == "svd"
    np.testing.assert_allclose(np.abs(np.sum(s.U * whole.U[:, :3], axis=0)), 1.0, rtol=1e-12)


def test_a_negative_number_of_directions_is_refused():
    with pytest.raises(WrongInput, match="number of directions; got -1"):
        decompose(Dense(np.eye(3)), vectors=-1)


@pytest.mark.parametrize("size", [1e-140, 1.0, 1e100])
def test_small_values_of_factors_are_right_relative_to_themselves(rng, size):
    # Orthogonal columns of very different lengths: the Gram core keeps every digit of each.
    values = np.geomspace(1.0, 1e-12, 6)
    update = Factored(orthogonal(rng, 500, 6) * values, orthogonal(rng, 400, 6).T, size)
    s = decompose(update)
    assert s.route == "gram_core"
    np.testing.assert_allclose(s.values[:6] / size, values, rtol=1e-12)


def test_nearly_dependent_factors_leave_the_gram_core(rng):
    for angle, route in ((1.0, "gram_core"), (1e-3, "qr_core"), (1e-10, "qr_core")):
        B = rng.standard_normal((200, 4))
        B[:, 3] = B[:, 0] + angle * B[:, 3]
        update = Factored(B, rng.standard_normal((4, 300)))
        s = decompose(update)
        assert s.route == route
        exact = np.linalg.svd(update.dense(), compute_uv=False)
        assert np.abs(s.values - exact).max() / exact[0] <= s.bound + 1e-15


@pytest.mark.parametrize("r", [1, 4, 16, 40])
def test_the_bounds_of_factors_hold_over_many_shapes(rng, r):
    for m, n in rng.integers(40, 400, size=(20, 2)):
        update = Factored(rng.standard_normal((m, r)), rng.standard_normal((r, n)))
        exact = np.linalg.svd(update.dense(), compute_uv=False)
        for s in (decompose(update), decompose(update, vectors=True)):
            assert np.abs(s.values - exact).max() / exact[0] <= s.bound + 2e-15
            assert s.bound <= 1e-12


def test_an_incomplete_spectrum_is_not_taken_for_a_whole_one():
    s = Spectrum(np.array([2.0, 1.0]), shape=(5, 7))
    assert s.q == 5
    with pytest.raises(WrongInput, match="holds the 2 leading of 5 singular values"):
        _ = s.relative


def test_the_probe_bounds_a_norm_from_above_as_often_as_it_says(rng):
    quantile = chi2.ppf(1e-6, gram.PROBES)
    np.testing.assert_allclose(gram.PROBE**2, quantile, rtol=1e-6)
    E = np.outer(orthogonal(rng, 30, 1), orthogonal(rng, 20, 1))  # the hardest: one direction
    bounds = [gram.probed_norm(E @ rng.standard_normal((20, gram.PROBES))) for _ in range(500)]
    assert min(bounds) >= 1
    assert max(bounds) < 10


# ---- LAPACK without Python's lock --------------------------------------------------------------


@pytest.mark.parametrize("q", [2, 3, 64, 200])
def test_the_tridiagonal_form_and_its_eigenvalues_are_those_of_scipys_wrappers(rng, q):
    G = (X := rng.standard_normal((q, q + 3))) @ X.T
    wrapped, *expected, info = scipy.linalg.lapack.dsytrd(G.T, lower=1, lwork=8 * q)
    assert info == 0
    ours = lapack.tridiagonal(G, 8)
    for found, known in zip(ours, expected, strict=True):
        np.testing.assert_array_equal(found, known)
    np.testing.assert_array_equal(np.tril(G.T), np.tril(wrapped))
    kept = ours[0].copy(), ours[1].copy()
    found = lapack.eigenvalues(ours[0], ours[1])
    np.testing.assert_array_equal(found, scipy.linalg.lapack.dsterf(*kept)[0])
    np.testing.assert_array_equal(ours[0], kept[0], "left as it was, for the eigenvectors")
    np.testing.assert_array_equal(ours[1], kept[1])


def test_a_matrix_whose_rows_do_not_lie_one_after_the_other_is_no_matrix_for_lapack(rng):
    with pytest.raises((TypeError, BufferError)):
        lapack.tridiagonal(rng.standard_normal((8, 6))[:6, :].T[:6], 8)


@pytest.mark.parametrize("q", [1, 2, 50])
def test_values_of_a_bidiagonal_matrix_are_right_relative_to_themselves(rng, q):
    d, e = rng.standard_normal(q) + 3, np.zeros(q - 1)
    scale = np.geomspace(1, 1e-200, q)
    expected = np.sort(np.abs(d * scale))[::-1]
    np.testing.assert_allclose(lapack.bidiagonal_values(d * scale, e), expected, rtol=1e-14)
    e = rng.standard_normal(q - 1)
    exact = np.linalg.svd(np.diag(d) + np.diag(e, 1), compute_uv=False)
    np.testing.assert_allclose(lapack.bidiagonal_values(d, e), exact, rtol=1e-12)


def test_other_threads_work_while_a_layer_is_decomposed(rng):
    G = (X := rng.standard_normal((1200, 1200))) @ X.T
    times = {}

    def reduce():
        times["begin"] = time.perf_counter()
        lapack.tridiagonal(G, 16)
        times["end"] = time.perf_counter()

    worker, seen = threading.Thread(target=reduce), []
    worker.start()
    while worker.is_alive():
        time.sleep(0.001)
        seen.append(time.perf_counter())
    third = (times["end"] - times["begin"]) / 3
    assert any(times["begin"] + third < at < times["end"] - third for at in seen)
