"""Measures against the base weight, on inputs and of stored precision: references and laws."""

import gc
import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from scipy.stats import beta

from lora_lab.analysis import rows
from lora_lab.linalg import Dense, Factored, Spectrum, decompose, haar
from lora_lab.linalg.remember import remembered
from lora_lab.linalg.rounding import rounded
from lora_lab.linalg.subspace import random_frame
from lora_lab.measures import MEASURES, Refused, measure
from lora_lab.measures.activation_error import square_root
from lora_lab.measures.amplification import random_size
from lora_lab.registry import WrongInput

NAMES = (
    "amplification", "structural_alignment", "activation_error", "merge_precision",
    "requantization_error", "intruder_dimensions", "intruder_dimensions_eps",
)  # fmt: skip


class Layer:
    """An update, its base and inputs, and every row of a measure."""

    def __init__(self, update, W0, C=None):
        self.update, self.W0 = update, np.asarray(W0, dtype=float)
        self.s = decompose(update, vectors=True)
        self.base = decompose(Dense(self.W0), vectors=True)
        self.C = np.eye(update.shape[1]) if C is None else C

    def given(self, name):
        have = {
            "W0": self.W0, "base": self.base, "update": self.update, "activations": self.C
        }  # fmt: skip
        return {need: have[need] for need in MEASURES[name].given}

    def value(self, name, k=None, side=None):
        return measure(name, self.s, k, side, **self.given(name))

    def null(self, name, k=None, side=None):
        m = MEASURES[name]
        return m.null(self.s, **m.arguments(k, side, self.given(name)))

    def rows(self, name):
        m = MEASURES[name]
        for k, side in itertools.product(m.grid(self.s) if m.grid else (None,), m.sides):
            try:
                yield k, side, self.value(name, k, side)
            except Refused:
                yield k, side, None


def some_updates(rng, m=14, n=9):
    return {
        "dense": Dense(rng.standard_normal((m, n))),
        "factored": Factored(rng.standard_normal((m, 3)), rng.standard_normal((3, n)), 2.0),
        "r > q": Factored(rng.standard_normal((m, 11)), rng.standard_normal((11, n))),
    }


UPDATES = ("dense", "factored", "r > q")


def layer_of(kind, seed=0, m=14, n=9):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((40, n)) * np.geomspace(1, 0.05, n)
    update = some_updates(rng, m, n)[kind]
    return Layer(update, rng.standard_normal((m, n)), x.T @ x / len(x))


# --- rounding ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_rounding_equals_the_casts_of_torch_on_every_kind_of_float32(dtype):
    bits = np.random.default_rng(0).integers(0, 2**32, 300_000, dtype=np.uint32)
    edges = np.float32([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, 65504, 65519.99, 65520, 3.4e38])
    x = np.concatenate([bits.view(np.float32), edges])
    cast = torch.from_numpy(x).to(getattr(torch, dtype)).double().numpy()
    with np.errstate(invalid="ignore"):  # signalling NaN among the random bits
        wide = x.astype(np.float64)
    with warnings.catch_warnings(), np.errstate(all="raise", invalid="ignore"):
        warnings.simplefilter("error")
        ours = rounded(wide, dtype)
    np.testing.assert_array_equal(ours, cast)
    real = ~np.isnan(cast)
    np.testing.assert_array_equal(np.signbit(ours[real]), np.signbit(cast[real]))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_rounding_equals_the_casts_of_numpy_on_float64(dtype):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((40, 5000)) * 10.0 ** rng.integers(-50, 45, (40, 1))
    with np.errstate(over="ignore", under="ignore"):
        np.testing.assert_array_equal(rounded(x, dtype), x.astype(dtype).astype(float))


def test_rounding_to_bfloat16_rounds_once():
    just_above_a_tie = 1 + 2**-8 + 2**-40
    assert rounded(just_above_a_tie, "bfloat16") == 1 + 2**-7
    assert torch.tensor(just_above_a_tie, dtype=torch.float64).bfloat16().item() == 1  # by float32


def test_rounding_leaves_its_input_and_refuses_unknown_formats():
    x = np.array([[1 / 3, 2.0]])
    for dtype in ("float64", "float32", "bfloat16"):
        out = rounded(x.T, dtype)
        out[:] = 0
        assert out.shape == (2, 1)
        assert x.tolist() == [[1 / 3, 2.0]]
    with pytest.raises(WrongInput, match="Did you mean 'bfloat16'"):
        rounded(x, "bfloat")


# --- random subspaces -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "k", "values"),
    [((6, 9), 2, [3, 1, 0.5]), ((12, 7), 3, [1]), ((5, 5), 5, [2, 1]), ((8, 10), 8, range(1, 9))],
)
def test_energy_in_random_subspaces_has_the_moments_of_the_formula(shape, k, values):
    rng = np.random.default_rng(2)
    sigma = np.array(list(values), dtype=float)
    M = np.zeros(shape)
    M[: len(sigma), : len(sigma)] = np.diag(sigma) / np.linalg.norm(sigma)
    pure = haar.purity(sigma)
    left = [random_frame(shape[0], k, rng).T @ M for _ in range(4000)]
    both = [x @ random_frame(shape[1], k, rng) for x in left]
    for drawn, (mean, variance) in (
        (left, haar.one_sided(k, shape[0], pure)),
        (both, haar.two_sided(k, shape, pure)),
    ):
        energy = np.array([np.sum(x**2) for x in drawn])
        assert energy.mean() == pytest.approx(mean, abs=5 * math.sqrt(variance / 4000) + 1e-12)
        assert energy.var() == pytest.approx(variance, rel=0.15, abs=1e-12)
        low, high = haar.interval(mean, variance)
        inside = np.mean((energy >= low - 1e-9) & (energy <= high + 1e-9))
        assert inside == pytest.approx(1 if low == high else 0.95, abs=0.03)


def test_the_interval_of_one_direction_in_a_subspace_is_exact():
    k, d = 3, 20
    exact = beta(k / 2, (d - k) / 2).ppf([0.025, 0.975])
    assert haar.interval(*haar.one_sided(k, d, 1.0)) == pytest.approx(tuple(exact), rel=1e-9)


def test_shared_work_is_done_once_for_each_spectrum_and_goes_with_it():
    calls = []

    @remembered
    def work(s, other):
        calls.append(1)
        return other.sum()

    s, t = Spectrum.of_values([2.0]), Spectrum.of_values([2.0])
    one, two = np.ones(2), np.ones(3)
    assert [work(s, one), work(t, one), work(s, one), work(t, one)] == [2, 2, 2, 2]
    assert len(calls) == 2
    assert [work(s, two), work(s, one)] == [3, 2]
    assert len(calls) == 4
    kept = work.__closure__[1].cell_contents
    del s
    gc.collect()
    assert len(kept) == 1


# --- amplification ----------------------------------------------------------------------------


def test_the_random_column_of_the_paper_comes_by_formula():
    for k, printed in ((4, 0.0202), (64, 0.3227)):
        assert random_size(61.95, (12288, 12288), k) == pytest.approx(printed, abs=5e-5)


def test_the_random_column_of_the_paper_comes_by_simulation_at_a_size_that_fits():
    rng = np.random.default_rng(3)
    W0 = rng.standard_normal((160, 120)) * np.geomspace(3, 0.1, 120)
    W0 *= 61.95 / np.linalg.norm(W0)
    layer = Layer(Dense(np.outer(np.ones(160), np.ones(120))), W0)
    for k in (4, 64):
        sizes = np.array([
            np.linalg.norm(random_frame(160, k, rng).T @ W0 @ random_frame(120, k, rng))
            for _ in range(300)
        ])  # fmt: skip
        size = np.sqrt(np.mean(sizes**2))
        assert size == pytest.approx(61.95 * k / math.sqrt(160 * 120), rel=0.05)
        assert layer.s.values[0] / size == pytest.approx(
            layer.value("amplification", k, "random"), rel=0.05
        )
        center, low, high = layer.null("amplification", k)
        assert center == layer.value("amplification", k, "random")
        ratios = layer.s.values[0] / sizes
        assert np.mean((low < ratios) & (ratios < high)) == pytest.approx(0.95, abs=0.035)


@pytest.mark.parametrize("kind", UPDATES)
def test_amplification_equals_its_definition_and_lies_above_the_base_control(kind):
    layer = layer_of(kind)
    dW = layer.update.dense()
    U, _, Vh = np.linalg.svd(dW)
    sigma = np.linalg.svd(layer.W0, compute_uv=False)
    for k in MEASURES["amplification"].grid(layer.s):
        i = int(k)
        inside = np.linalg.norm(U[:, :i].T @ layer.W0 @ Vh[:i].T)
        found = layer.value("amplification", k)
        assert found == pytest.approx(np.linalg.norm(dW) / inside, rel=1e-9)
        floor = layer.value("amplification", k, "base")
        assert floor == pytest.approx(np.linalg.norm(dW) / np.linalg.norm(sigma[:i]), rel=1e-12)
        assert found >= floor
        center, low, high = layer.null("amplification", k)
        assert low <= center <= high


def test_amplification_refuses_directions_that_are_none():
    W0 = np.diag([3.0, 2.0, 1.0])
    for update, k, said in (
        (Dense(np.diag([2.0, 1.0, 0.0])), 3, "has 2 directions"),
        (Dense(np.diag([2.0, 1.0, 1.0])), 2, "equal singular values"),
        (Dense([[0.0, 1, 0], [0, 0, 0], [0, 0, 0]]), 1, "W0 has nothing"),
    ):
        with pytest.raises(Refused, match=said):
            Layer(update, W0).value("amplification", k)
    for k in (0, 1.5, 4):
        with pytest.raises(WrongInput, match="whole number"):
            Layer(Dense(np.diag([3.0, 2.0, 1.0])), W0).value("amplification", k)


# --- structural alignment ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", UPDATES)
def test_structural_alignment_equals_its_definition(kind):
    layer = layer_of(kind)
    dW = layer.update.dense()
    U, _, Vh = np.linalg.svd(layer.W0)
    total = np.sum(dW**2)
    for k in (1, 2, 4, 8, 9):
        P, Q = U[:, :k] @ U[:, :k].T, Vh[:k].T @ Vh[:k]
        for side, part in (("left", P @ dW), ("right", dW @ Q), ("both", P @ dW @ Q)):
            expected = np.sum(part**2) / total
            assert layer.value("structural_alignment", k, side) == pytest.approx(expected, rel=1e-9)
    assert layer.value("structural_alignment", 9, "right") == pytest.approx(1, rel=1e-12)


def test_structural_alignment_of_random_updates_lies_in_its_null():
    rng = np.random.default_rng(4)
    W0, inside = rng.standard_normal((30, 20)), []
    for _ in range(200):
        layer = Layer(Factored(rng.standard_normal((30, 2)), rng.standard_normal((2, 20))), W0)
        for side, mean in (("left", 4 / 30), ("right", 4 / 20), ("both", 16 / 600)):
            null, low, high = layer.null("structural_alignment", 4, side)
            assert null == pytest.approx(mean, rel=1e-12)
            inside.append(low <= layer.value("structural_alignment", 4, side) <= high)
    assert np.mean(inside) == pytest.approx(0.95, abs=0.03)


def test_an_update_inside_the_leading_subspace_of_the_base_is_aligned_and_above_its_null():
    rng = np.random.default_rng(5)
    W0 = rng.standard_normal((30, 20))
    U, _, Vh = np.linalg.svd(W0)
    layer = Layer(Dense(U[:, :2] @ rng.standard_normal((2, 2)) @ Vh[4:6]), W0)
    assert layer.value("structural_alignment", 2, "left") == pytest.approx(1, rel=1e-12)
    assert layer.null("structural_alignment", 2, "left")[2] < 0.5
    assert layer.value("structural_alignment", 2, "both") == pytest.approx(0, abs=1e-12)


# --- activation-weighted truncation -----------------------------------------------------------


def matrix_root(C):
    values, vectors = np.linalg.eigh(C)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T


@pytest.mark.parametrize("kind", UPDATES)
@pytest.mark.parametrize("singular", [False, True])
def test_activation_error_equals_the_error_of_the_matrices_themselves(kind, singular):
    layer = layer_of(kind)
    C = layer.C
    if singular:
        x = np.random.default_rng(6).standard_normal((6, 9))
        C = x.T @ x / 6
        layer = Layer(layer.update, layer.W0, C)
    dW, root = layer.update.dense(), matrix_root(C)
    for k in MEASURES["activation_error"].grid(layer.s):
        for side in ("weighted", "plain"):
            U, sigma, Vh = np.linalg.svd(dW @ root if side == "weighted" else dW)
            i = int(k)
            M = (U[:, :i] * sigma[:i]) @ Vh[:i]
            if side == "weighted":
                M = M @ np.linalg.pinv(root, rcond=1e-7)
            expected = np.linalg.norm((dW - M) @ root) / np.linalg.norm(dW @ root)
            # Roots of a singular matrix are right to the root of the roundoff.
            tolerance = 1e-6 if singular else 1e-10
            found = layer.value("activation_error", k, side)
            assert found == pytest.approx(expected, abs=tolerance), (k, side)


def test_the_weighted_error_is_never_above_the_plain_one_nor_that_of_any_other_matrix():
    rng = np.random.default_rng(7)
    for seed, kind in itertools.product(range(5), UPDATES):
        layer = layer_of(kind, seed)
        errors = [layer.value("activation_error", k) for k in (0, 1, 2, 3)]
        assert errors == sorted(errors, reverse=True)
        for k, best in enumerate(errors):
            assert best <= layer.value("activation_error", k, "plain") * (1 + 1e-12)
        dW, root = layer.update.dense(), matrix_root(layer.C)
        for _ in range(20):
            # The best M on the input directions of a random frame, of rank 2.
            U = random_frame(14, 2, rng)
            lost = np.linalg.norm((dW - U @ U.T @ dW) @ root) / np.linalg.norm(dW @ root)
            assert errors[2] <= lost


def test_activation_error_with_white_inputs_is_the_truncation_error():
    layer = layer_of("dense")
    layer = Layer(layer.update, layer.W0, 3 * np.eye(9))
    for k, side in itertools.product((0, 1, 4, 8), ("weighted", "plain")):
        expected = measure("truncation_error", layer.s, k)
        assert layer.value("activation_error", k, side) == pytest.approx(expected, rel=1e-12)


def test_activation_error_is_nan_where_the_inputs_never_reach_the_update():
    v = np.array([1.0, 2.0, 3.0])
    C = np.eye(3) - np.outer(v, v) / 14
    for update in (Dense(np.outer([1.0, 1.0], v)), Factored([[1.0], [1.0]], v[None])):
        for k, side in itertools.product((0, 1), ("weighted", "plain")):
            assert math.isnan(Layer(update, np.ones((2, 3)), C).value("activation_error", k, side))
    assert math.isnan(Layer(update, np.ones((2, 3)), np.zeros((3, 3))).value("activation_error", 0))


@pytest.mark.parametrize(
    ("C", "said"),
    [
        (np.eye(4), "got shape"),
        (np.full((3, 3), np.nan), "NaN"),
        ([[1.0, 2, 0], [0, 1, 0], [0, 0, 1]], "not symmetric"),
        ([[1.0, 2, 0], [2, 1, 0], [0, 0, 1]], "negative"),
    ],
)
def test_inputs_that_are_no_second_moments_are_refused(C, said):
    with pytest.raises(WrongInput, match=said):
        square_root(np.asarray(C), 3)


# --- merge precision --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("factored", [False, True])
def test_merge_precision_equals_a_merge_by_torch(dtype, factored):
    rng = np.random.default_rng(8)
    # Numbers of 2**-16: sums and products are exact in float32, so that torch rounds once.
    W0 = np.round(rng.standard_normal((150, 90)) * 2**12) * 2.0**-16
    B, A = (np.round(rng.standard_normal(x) * 8) * 2.0**-8 for x in ((150, 4), (4, 90)))
    update = Factored(B, A) if factored else Dense(B @ A)
    dW, to = B @ A, getattr(torch, dtype)
    merged = torch.tensor(W0 + dW, dtype=torch.float32).to(to).double().numpy()
    start = torch.tensor(W0, dtype=torch.float32).to(to).double().numpy()
    lost = (merged == start) & (dW != 0)
    layer = Layer(update, W0)
    assert layer.value("merge_precision", side=dtype) == pytest.approx(
        np.linalg.norm(merged - W0 - dW) / np.linalg.norm(dW), rel=1e-12
    )
    assert layer.value("merge_precision", side=f"{dtype}_lost") == pytest.approx(
        lost.sum() / np.count_nonzero(dW), rel=1e-12
    )
    assert 0.001 < lost.sum() / np.count_nonzero(dW) < 0.9
    assert layer.value("merge_precision", side=f"{dtype}_lost_energy") == pytest.approx(
        np.sum(dW[lost] ** 2) / np.sum(dW**2), rel=1e-12
    )


@pytest.mark.parametrize("size", [1e-20, 1e-200])
def test_an_update_below_every_ulp_is_lost_as_a_whole(size):
    layer = Layer(Dense(size * np.eye(3)), np.ones((3, 3)))
    for _, side, value in layer.rows("merge_precision"):
        assert value == pytest.approx(1, rel=1e-12), side


def test_a_merge_that_the_format_holds_loses_nothing_and_one_that_overflows_it_is_refused():
    layer = Layer(Dense(np.eye(2)), np.ones((2, 2)))
    assert all(value == 0 for _, _, value in layer.rows("merge_precision"))
    layer = Layer(Dense([[1.0, 0.0]]), np.array([[65520.0, 1.0]]))
    with pytest.raises(Refused, match="too large for float16"):
        layer.value("merge_precision", side="float16")
    assert layer.value("merge_precision", side="float32") == 0


def test_merge_precision_is_one_for_weights_scaled_by_a_power_of_two_and_better_for_more_bits():
    layer = layer_of("dense")
    scaled = Layer(Dense(layer.update.dW * 2.0**-7), layer.W0 * 2.0**-7)
    errors = [layer.value("merge_precision", side=x) for x in ("float32", "float16", "bfloat16")]
    assert errors == sorted(errors)
    for side in ("bfloat16", "bfloat16_lost", "bfloat16_lost_energy", "float32"):
        found = scaled.value("merge_precision", side=side)
        assert found == pytest.approx(layer.value("merge_precision", side=side), rel=1e-12)


# --- intruder dimensions ----------------------------------------------------------------------


def weight(rng, m=40, n=56, decay=0.5):
    """A random weight with a power law of singular values."""
    q = min(m, n)
    U, V = random_frame(m, q, rng), random_frame(n, q, rng)
    return (U * np.arange(1, q + 1.0) ** -decay) @ V.T


def noise(rng, W0, share):
    E = rng.standard_normal(W0.shape)
    return E * share * np.linalg.norm(W0) / np.linalg.norm(E)


@pytest.mark.parametrize("shape", [(40, 56), (56, 40)])
def test_intruder_dimensions_equal_the_definition(shape):
    rng = np.random.default_rng(9)
    W0 = weight(rng, *shape)
    low_rank = rng.standard_normal((shape[0], 6)) @ rng.standard_normal((6, shape[1]))
    layer = Layer(Dense(low_rank * 0.03), W0)
    U0, _, V0 = np.linalg.svd(W0, full_matrices=False)
    U, _, V = np.linalg.svd(W0 + layer.update.dW, full_matrices=False)
    similar = {
        "left": np.abs(U0.T @ U).max(axis=0),
        "right": np.abs(V0 @ V.T).max(axis=0),
    }
    counts = set()
    for side, values in similar.items():
        for k in (1, 2, 5, 10, 20):
            expected = np.sum(values[:k] < 0.5)
            assert layer.value("intruder_dimensions", k, side) == expected
            counts.add(expected)
        for epsilon in (0.3, 0.5, 0.7, 0.9):
            expected = np.sum(values[:10] < epsilon)
            assert layer.value("intruder_dimensions_eps", epsilon, side) == expected
    assert len(counts) > 3


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_planted_intruder_is_found_on_its_layer_and_side_and_nowhere_else(side):
    rng = np.random.default_rng(10)
    for planted, layer in itertools.product(range(3), range(3)):
        U, V = random_frame(120, 120, rng), random_frame(160, 120, rng)
        sigma = 0.8 ** np.arange(120)
        W0 = (U * sigma) @ V.T
        dW = noise(rng, W0, 0.02)
        if layer == planted:
            # One side gets a direction of its own, the other one that W0 has.
            own = [random_frame(d, 1, rng)[:, 0] for d in W0.shape]
            u, v = (own[0], V[:, 6]) if side == "left" else (U[:, 6], own[1])
            dW += 2.5 * sigma[6] * np.outer(u, v)  # the third largest of W0 + dW
        for row in rows("x", Dense(dW), ["intruder_dimensions"], W0=W0):
            here = layer == planted and row["side"] == side and row["k"] >= 5
            if row["k"] <= 10:
                assert row["value"] == float(here), (planted, layer, row)
                assert (row["value"] > row["null_high"]) == here, (planted, layer, row)


def test_with_none_planted_at_most_one_in_twenty_trials_has_more_intruders_than_the_null():
    rng = np.random.default_rng(11)
    false = {"left": 0, "right": 0}
    for trial in range(200):
        W0 = weight(rng) if trial % 2 else rng.standard_normal((40, 56))
        layer = Layer(Dense(noise(rng, W0, (0.02, 0.1, 0.2)[trial % 3])), W0)
        for side in false:
            high = layer.null("intruder_dimensions", 10, side)[2]
            false[side] += layer.value("intruder_dimensions", 10, side) > high
    assert max(false.values()) <= 10


@pytest.mark.parametrize("share", [0.1, 0.3, 0.8])
def test_the_null_of_intruders_agrees_with_decompositions_of_noisy_weights(share):
    rng = np.random.default_rng(12)
    # Larger than the window, of which alone the mixing is drawn.
    W0 = rng.standard_normal((48, 80)) * np.geomspace(2, 0.5, 80)
    drawn = [Layer(Dense(noise(rng, W0, share)), W0) for _ in range(25)]
    for side, epsilon in itertools.product(("left", "right"), (0.5, 0.7)):
        counts = [x.value("intruder_dimensions_eps", epsilon, side) for x in drawn]
        mean, low, high = drawn[0].null("intruder_dimensions_eps", epsilon, side)
        assert mean == pytest.approx(np.mean(counts), abs=0.5 + 0.1 * np.mean(counts))
        assert low <= np.median(counts) <= high


def test_equal_singular_values_of_the_base_are_one_subspace():
    rng = np.random.default_rng(13)
    U, V = random_frame(30, 12, rng), random_frame(20, 12, rng)
    values = np.array([3.0] * 6 + [1.0, 0.9, 0.8, 0.7, 0.6, 0.5])
    W0 = (U * values) @ V.T
    # A perturbation far below the gap turns the six leading vectors among themselves.
    layer = Layer(Dense(1e-3 * rng.standard_normal((30, 20))), W0)
    U1 = np.linalg.svd(W0 + layer.update.dW)[0][:, :6]
    assert (np.abs(layer.base.U.T @ U1).max(axis=0) < 0.9).any()
    for side in ("left", "right"):
        assert layer.value("intruder_dimensions_eps", 0.9, side) == 0


def test_directions_that_the_base_only_has_by_rounding_are_not_its_own():
    rng = np.random.default_rng(14)
    W0 = rng.standard_normal((30, 4)) @ rng.standard_normal((4, 20))
    base = decompose(Dense(W0), vectors=True)
    # Inside the thin basis of W0, in its null space.
    dW = 9 * base.values[0] * np.outer(base.U[:, 10], base.Vh[12])
    layer = Layer(Dense(dW), W0)
    for side in ("left", "right"):
        assert layer.value("intruder_dimensions", 1, side) == 1
        assert layer.value("intruder_dimensions", 10, side) == 1  # rank 5: no other vectors


def test_a_threshold_that_can_find_nothing_is_refused_on_the_side_that_the_base_fills():
    rng = np.random.default_rng(15)
    layer = Layer(Dense(0.1 * rng.standard_normal((6, 40))), rng.standard_normal((6, 40)))
    with pytest.raises(Refused, match=r"left side.* epsilon = 0.4"):
        layer.value("intruder_dimensions_eps", 0.4, "left")  # 1 / sqrt(6) = 0.408
    assert layer.value("intruder_dimensions_eps", 0.41, "left") >= 0
    assert layer.value("intruder_dimensions_eps", 0.01, "right") == 0


# --- laws over all of them --------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (1, 1), (7, 7), (12, 5)])
@pytest.mark.parametrize("kind", ["rank one", "dense", "r > q", "zero", "no base"])
@pytest.mark.parametrize("c", [1.0, 1e-150, 1e150])
def test_every_row_is_a_number_in_range_or_refused_without_a_warning(shape, kind, c):
    rng = np.random.default_rng(16)
    m, n = shape
    updates = {
        "rank one": Factored(rng.standard_normal((m, 1)) * c, rng.standard_normal((1, n))),
        "r > q": Factored(rng.standard_normal((m, 13)) * c, rng.standard_normal((13, n))),
        "zero": Factored(np.zeros((m, 1)), np.ones((1, n))),
    }
    update = updates.get(kind, Dense(rng.standard_normal((m, n)) * c))
    W0 = np.zeros(shape) if kind == "no base" else rng.standard_normal(shape)
    with warnings.catch_warnings(), np.errstate(over="raise", invalid="raise", divide="raise"):
        warnings.simplefilter("error")
        layer = Layer(update, W0)
        for name in NAMES:
            found = [(k, side, v) for k, side, v in layer.rows(name) if v is not None]
            of_base = name not in ("activation_error", "merge_precision", "requantization_error")
            for k, side, value in found:
                about = (name, k, side, value)
                if kind == "zero":
                    assert value == 0 if MEASURES[name].kind == "rank" else math.isnan(value), about
                elif kind == "no base" and of_base:
                    assert math.isnan(value), about
                    assert all(map(math.isnan, layer.null(name, k, side))), about
                else:
                    assert value >= 0, about
                    assert math.isfinite(value), about
                    if name in ("structural_alignment", "activation_error"):
                        assert value <= 1, about
                    if MEASURES[name].null and math.isfinite(value):
                        mean, low, high = layer.null(name, k, side)
                        assert low <= high, about
                        assert math.isfinite(mean), about


@pytest.mark.parametrize("name", ["structural_alignment", "activation_error"])
def test_shares_do_not_depend_on_the_size_of_the_update(name):
    layer = layer_of("dense")
    large = Layer(Dense(layer.update.dW * 1e100), layer.W0, layer.C * 1e-30)
    for (k, side, one), (_, _, other) in zip(layer.rows(name), large.rows(name), strict=True):
        assert other == pytest.approx(one, rel=1e-9), (k, side)


@pytest.mark.parametrize("name", NAMES)
def test_a_base_or_side_that_does_not_fit_is_one_line(name):
    layer = layer_of("dense")
    given = layer.given(name)
    if "W0" in given or "base" in given:
        other = layer_of("dense", m=9, n=14)
        wrong = other.given(name) | ({"update": layer.update} if "update" in given else {})
        with pytest.raises(WrongInput, match="must have the update's shape"):
            measure(name, layer.s, **wrong)
    with pytest.raises(WrongInput, match="unknown side"):
        measure(name, layer.s, side="top", **given)
