"""The leading directions by the randomized route: right, certified, and exact where it is not."""

import numpy as np
import pytest

from lora_lab.linalg import Dense, Factored, decompose, randomized
from lora_lab.linalg.randomized import leading
from lora_lab.registry import WrongInput

Q, LONG = 120, 160


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Take the randomized route at the sizes of these tests."""
    monkeypatch.setattr(randomized, "LARGE", 100)
    monkeypatch.setattr(randomized, "FEW", 8)


def orthogonal(rng, m, k):
    return np.linalg.qr(rng.standard_normal((m, k)))[0]


def with_values(rng, values, m=Q, n=LONG):
    return (orthogonal(rng, m, len(values)) * values) @ orthogonal(rng, n, len(values)).T


DECAYING = {
    "geometric": 0.7 ** np.arange(Q),
    "power law": 1.0 / np.arange(1, Q + 1) ** 2,
    "low rank": np.array([5.0, 4.0, 3.0]),
    "rank 1": np.array([1.0]),
    "low rank and noise": np.concatenate([[5.0, 4.0, 3.0, 2.0, 1.0], np.full(Q - 5, 1e-3)]),
    "ties": np.repeat(0.1 ** np.arange(6), [2, 2, 2, 2, 2, Q - 10]),
}


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("name", DECAYING)
@pytest.mark.parametrize("turn", [False, True])
def test_leading_directions_are_right_to_the_certificate(rng, k, name, turn):
    values = np.concatenate([DECAYING[name], np.zeros(Q)])
    dW = with_values(rng, DECAYING[name])
    dW = dW.T if turn else dW
    s = leading(Dense(dW), k)
    assert s.route == "randomized"
    assert s.bound <= 1e-8
    assert s.values.shape == (k,)
    assert (s.U.shape, s.Vh.shape) == ((dW.shape[0], k), (k, dW.shape[1]))
    assert (s.q, s.shape) == (Q, dW.shape)
    limit = s.bound * values[0]
    assert np.abs(s.values - values[:k]).max() <= limit
    for frame in (s.U, s.Vh.T):
        np.testing.assert_allclose(frame.T @ frame, np.eye(k), atol=1e-13)
    assert np.linalg.norm(dW @ s.Vh.T - s.U * s.values, axis=0).max() <= limit
    assert np.linalg.norm(dW.T @ s.U - s.Vh.T * s.values, axis=0).max() <= limit


@pytest.mark.parametrize(
    "values",
    [
        np.linspace(1.0, 0.9, Q),  # converges too slowly
        np.ones(Q),
        np.concatenate([np.ones(3), np.full(Q - 3, 0.97)]),  # found, but not told from the rest
    ],
)
def test_a_flat_spectrum_goes_back_to_the_exact_way_and_says_so(rng, values):
    s = leading(Dense(with_values(rng, values)), 4)
    assert s.route in ("gram", "svd")
    assert s.values.shape == (4,)
    np.testing.assert_allclose(s.values, values[:4], rtol=1e-9)


def test_a_direction_that_the_start_cannot_see_is_not_missed(rng, monkeypatch):
    # The start is made orthogonal to the first direction and Krylov blocks stay so: only the
    # check for what was left over can notice.
    values = 0.5 ** np.arange(Q)
    U, V = orthogonal(rng, Q, Q), orthogonal(rng, LONG, Q)
    update = Dense((U * values) @ V.T)
    blind, calls = randomized._orthogonal, []

    def blinded(block, frame):
        calls.append(block)
        return blind(block - V[:, :1] @ (V[:, :1].T @ block), frame)

    monkeypatch.setattr(randomized, "_orthogonal", blinded)
    s = leading(update, 3)
    assert calls, "the randomized route was tried"
    assert s.route != "randomized"
    np.testing.assert_allclose(s.values, values[:3], rtol=1e-9)


def test_the_bound_of_the_rest_lies_above_it_and_is_sharp(rng):
    values = np.concatenate([[10.0, 5.0], np.linspace(3.0, 1.0, Q - 2)])
    dW = with_values(rng, values)
    whole = decompose(Dense(dW, "float64"), vectors=True)
    for j in (1, 2):
        rests = [
            randomized._rest(
                dW, whole.U[:, :j], values[:j], whole.Vh[:j].T, j, np.random.SeedSequence(seed)
            )
            for seed in range(20)
        ]
        assert min(rests) >= values[j]
        assert max(rests) < 1.35 * values[j]


def test_equal_seeds_give_equal_bits_and_other_seeds_the_same_answer(rng):
    update = Dense(with_values(rng, DECAYING["geometric"]))
    first, again, other = leading(update, 4), leading(update, 4), leading(update, 4, seed=1)
    for name in ("values", "U", "Vh"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    assert not np.array_equal(first.U, other.U)
    np.testing.assert_allclose(other.values, first.values, rtol=1e-9)
    np.testing.assert_allclose(np.abs(np.sum(first.U * other.U, axis=0)), 1.0, rtol=1e-9)


@pytest.mark.parametrize("size", [1e-200, 1e-30, 1e30, 1e200])
def test_extreme_sizes_neither_under_nor_overflow(rng, size):
    dW = with_values(rng, DECAYING["geometric"])
    s, one = leading(Dense(dW * size), 4), leading(Dense(dW), 4)
    assert s.route == "randomized"
    np.testing.assert_allclose(s.values / size, one.values, rtol=1e-9)


@pytest.mark.parametrize(
    ("make", "route"),
    [
        (lambda rng: Factored(rng.standard_normal((Q, 6)), rng.standard_normal((6, Q))), "qr_core"),
        (lambda rng: Dense(with_values(rng, DECAYING["power law"][:90], 120, 90)), "gram"),
        (lambda rng: Dense(with_values(rng, DECAYING["geometric"]), "float64"), "svd"),
        (lambda rng: Dense(np.zeros((Q, LONG))), "zero"),
    ],
)
def test_other_updates_are_cut_from_their_decomposition(rng, make, route):
    update = make(rng)
    s, whole = leading(update, 4), decompose(update, vectors=4)
    assert s.route == route
    np.testing.assert_array_equal(s.values, whole.values[:4])
    np.testing.assert_array_equal(s.U, whole.U)
    np.testing.assert_array_equal(s.Vh, whole.Vh)


def test_more_directions_than_there_are_gives_them_all(rng):
    s = leading(Factored(rng.standard_normal((9, 2)), rng.standard_normal((2, 7))), 5)
    assert s.values.shape == (2,)
    assert s.U.shape == (9, 2)


def test_measures_of_all_values_refuse_the_leading_ones(rng):
    s = leading(Dense(with_values(rng, DECAYING["geometric"])), 4)
    with pytest.raises(WrongInput, match=f"4 leading of {Q} singular values"):
        _ = s.relative


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_inf_are_refused_with_the_layers_name(rng, bad):
    dW = with_values(rng, DECAYING["geometric"])
    dW[3, 4] = bad
    with pytest.raises(WrongInput, match=r"layer 'h\.3': .* NaN or Inf \(1 of"):
        leading(Dense(dW), 2, layer="h.3")


def test_no_directions_are_refused(rng):
    with pytest.raises(WrongInput, match="k must be at least 1; got 0"):
        leading(Dense(np.eye(3)), 0)
