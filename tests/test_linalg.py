"""Updates and their spectra against numpy, torch and matrices of known singular values."""

import numpy as np
import pytest
import scipy.linalg
import torch

from lora_lab.linalg import Dense, Factored, Spectrum, decompose
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
    assert (s.route == "qr_core") == (r <= min(m, n))
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


@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (384, 384)])
def test_the_gram_route_is_as_right_as_it_says(rng, shape):
    dW = with_values(rng, *shape, np.geomspace(1.0, 1e-3, min(shape)))
    s = decompose(Dense(dW, made_in="float32"))
    assert s.route == "gram"
    error = np.abs(s.values - np.geomspace(1.0, 1e-3, min(shape))).max()
    assert error <= s.bound <= 1e-8


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


@pytest.mark.parametrize("route", ["qr_core", "gram", "svd"])
@pytest.mark.parametrize("size", [1e-200, 1e200, 1e-30, 1e30])
def test_extreme_sizes_neither_under_nor_overflow(rng, route, size):
    if route == "qr_core":
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


def test_a_failing_gesdd_falls_back_to_gesvd_and_says_so(rng, monkeypatch):
    real, tried = scipy.linalg.svd, []

    def failing(*args, lapack_driver="gesdd", **keywords):
        tried.append(lapack_driver)
        if lapack_driver == "gesdd":
            raise np.linalg.LinAlgError("did not converge")
        return real(*args, lapack_driver=lapack_driver, **keywords)

    monkeypatch.setattr(scipy.linalg, "svd", failing)
    dW = with_values(rng, 8, 6, [3.0, 2.0, 1.0])
    for update, route in (
        (Dense(dW, "float64"), "svd_gesvd"),
        (Factored(dW[:, :2], np.eye(2, 6)), "qr_core_gesvd"),
    ):
        s = decompose(update)
        assert s.route == route
        reference = np.linalg.svd(update.dense(), compute_uv=False)
        np.testing.assert_allclose(s.values, reference, atol=1e-13)
    assert tried == ["gesdd", "gesvd"] * 2

    def broken(*args, **keywords):
        raise np.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(scipy.linalg, "svd", broken)
    with pytest.raises(WrongInput, match="both failed"):
        decompose(Dense(dW, "float64"))


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
