"""Laws over every registered measure, and references by an independent computation."""

import inspect
import itertools
import math
import warnings

import numpy as np
import pytest
from material import ENTRYWISE, IN_STORAGE_ORDER, INPUT_SIDE, all_values, material, swapped

from lora_lab.linalg import Dense, Factored, Spectrum, decompose
from lora_lab.measures import MEASURES, measure
from lora_lab.registry import WrongInput

CURVES = {
    "flat": [1.0, 1.0, 1.0, 1.0],
    "one": [1.0, 0.0, 0.0, 0.0],
    "pair": [4.0, 3.0],
    "harmonic": [1.0, 1 / 2, 1 / 3, 1 / 4],
    "geometric": [10 * 0.8**i for i in range(32)],
    "steep": [10.0**-i for i in range(9)],
    "noise": list(np.linspace(1.5, 0.5, 40)),
}
GOLDEN = {  # the table of the definitions: one row a spectrum, in the order of these measures
    "names": (
        "effective_rank", "energy_effective_rank", "stable_rank", "participation_ratio",
        "l1_l2_ratio", "nuclear_dimension", "energy_rank", "nuclear_rank",
    ),
    "flat": (4, 4, 4, 4, 4, 4, 4, 4),
    "one": (1, 1, 1, 1, 1, 1, 1, 1),
    "pair": (1.979626, 1.922100, 1.5625, 1.854599, 1.96, 1.75, 2, 2),
    "harmonic": (3.464117, 2.434783, 1.423611, 1.878716, 3.048780, 2.083333, 3, 4),
    "geometric": (12.128495, 6.141328, 2.777776, 4.555550, 8.985750, 4.996039, 6, 11),
}  # fmt: skip


def spectrum(values, shape=None, r=None):
    values = list(values)
    return Spectrum.of_values(values, shape or (len(values) + 3, len(values)), r=r)


def le(*chain):
    """Whether a chain of values does not fall, to rounding."""
    return all(a <= b * (1 + 1e-12) for a, b in itertools.pairwise(chain))


def same(got, expected, rel):
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert got[key] == pytest.approx(value, rel=rel, abs=1e-12, nan_ok=True), key


def test_every_measure_of_the_first_set_is_registered():
    scalar = set(GOLDEN["names"]) | {
        "numerical_rank", "normalized_entropy", "normalized_entropy_r", "renyi_rank",
        "ratio_rank", "utilization", "stable_utilization",
    }  # fmt: skip
    assert scalar | {"norm", "truncation_error", "update_ratio"} <= set(MEASURES)


@pytest.mark.parametrize("curve", [c for c in GOLDEN if c != "names"])
def test_the_golden_numbers_hold(curve):
    s = Spectrum.of_values(CURVES[curve])
    for name, golden in zip(GOLDEN["names"], GOLDEN[curve], strict=True):
        k = 0.9 if MEASURES[name].grid else None
        assert measure(name, s, k) == pytest.approx(golden, abs=5e-7), name


@pytest.mark.parametrize("name", list(MEASURES))
def test_a_measure_is_documented_and_its_default_needs_no_parameter(name):
    m = MEASURES[name]
    text = inspect.getdoc(m.function)
    assert m.kind in ("rank", "ratio", "size")
    assert m.function.__name__ == name
    for wanted in ("dW = 0", "References", "Examples", ">>>"):
        assert wanted in text, f"{name}: its docstring lacks {wanted!r}"
    rng = np.random.default_rng(0)
    of = material(Factored(rng.standard_normal((9, 2)), rng.standard_normal((2, 7))))
    if set(m.needs) == {"values"}:
        assert math.isfinite(measure(name, decompose(Dense(rng.standard_normal((80, 60))))))
    else:
        assert math.isfinite(measure(name, of.spectrum, **of.given(m)))


@pytest.mark.parametrize("shape", [(4, 4), (1, 6), (6, 1), (300, 2)])
@pytest.mark.parametrize("made_in", ["float64", "bfloat16"])
def test_a_zero_update_has_rank_zero_and_every_ratio_nan_without_a_warning(shape, made_in):
    s = Spectrum.of_values([0.0], shape=shape, made_in=made_in, r=2)
    with warnings.catch_warnings(), np.errstate(all="raise"):
        warnings.simplefilter("error")
        ranks, ratios, sizes = (all_values(s, (kind,)) for kind in ("rank", "ratio", "size"))
    assert all(value == 0 for value in ranks.values()), ranks
    assert all(math.isnan(value) for value in ratios.values()), ratios
    assert all(value == 0 for value in sizes.values())


@pytest.mark.parametrize(
    "update", [Factored(np.zeros((9, 2)), np.ones((2, 7))), Dense(np.zeros((9, 7)))]
)
def test_a_zero_update_has_rank_zero_and_every_ratio_nan_beside_its_base_and_others(update):
    with warnings.catch_warnings(), np.errstate(all="raise"):
        warnings.simplefilter("error")
        of = material(update)
        for kind, good in (
            ("rank", lambda v: v == 0),
            ("ratio", math.isnan),
            ("size", lambda v: v == 0),
        ):
            found = all_values(of, (kind,))
            assert found
            assert all(good(v) for v in found.values()), (kind, found)


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("c", [1e-200, 1e-30, 7.3, 1e30, 1e200])
def test_no_rank_and_no_ratio_depends_on_the_size_of_the_update(curve, c):
    values = np.array(CURVES[curve])
    with warnings.catch_warnings(), np.errstate(over="raise", invalid="raise", divide="raise"):
        warnings.simplefilter("error")
        same(all_values(spectrum(values * c, r=3)), all_values(spectrum(values, r=3)), 1e-12)


@pytest.mark.parametrize("m", [MEASURES[n] for n in MEASURES if MEASURES[n].kind == "size"])
def test_a_size_grows_with_the_update(m):
    small, large = spectrum([4.0, 3.0]), spectrum([8e200, 6e200])
    for side in m.sides or (None,):
        assert m(large, None, side) == pytest.approx(2e200 * m(small, None, side), rel=1e-13)


@pytest.mark.parametrize("update", ["dense", "factored"])
def test_transposition_and_rotation_change_no_rank_and_no_ratio(update):
    rng = np.random.default_rng(1)
    Q, P = (np.linalg.qr(rng.standard_normal((n, n)))[0] for n in (24, 16))
    B, A = rng.standard_normal((24, 5)) * [9, 5, 3, 2, 1], rng.standard_normal((5, 16))
    dW = rng.standard_normal((24, 16)) * np.linspace(2, 0.1, 16)
    of = material(Factored(B, A) if update == "factored" else Dense(dW))
    kinds = ("rank", "ratio", "size")
    expected = all_values(of, kinds)
    assert ("update_ratio", None, "spectral") in expected
    turning = {n for n in MEASURES if not INPUT_SIDE & set(MEASURES[n].needs)} - IN_STORAGE_ORDER
    for got, names in (
        (swapped(all_values(of.transposed(), kinds)), turning),
        (all_values(of.mapped(Q, P), kinds), set(MEASURES) - ENTRYWISE),
    ):
        same(*({key: v for key, v in x.items() if key[0] in names} for x in (got, expected)), 1e-8)


@pytest.mark.parametrize("shape", [(7, 5), (1, 9), (9, 1), (1, 1)])
def test_an_update_of_rank_one_has_rank_one_in_every_measure(shape):
    rng = np.random.default_rng(2)
    u, v = rng.standard_normal(shape[0]), rng.standard_normal(shape[1])
    for s in (decompose(Dense(np.outer(u, v))), decompose(Factored(u[:, None], v[None]))):
        for key, value in all_values(s, kinds=("rank",)).items():
            assert value == pytest.approx(1, abs=1e-10), key
        for side in ("frobenius", "spectral", "nuclear"):
            assert measure("truncation_error", s, 0, side) == 1
            assert measure("truncation_error", s, 1, side) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("n", [2, 3, 7, 10, 50])
def test_a_spectrum_that_sits_on_a_threshold_does_not_flip(n):
    flat = np.full(n, 0.1) * (1 + 1e-15 * np.cos(np.arange(n)))
    s = spectrum(flat)
    for share in range(1, n + 1):
        for name in ("energy_rank", "nuclear_rank"):
            assert measure(name, s, share / n) == share, (name, share)
    assert measure("ratio_rank", s, 1.0) == n
    third = spectrum([3.0, 1.0 - 1e-15, 1.0 + 1e-15, 0.5])
    assert measure("ratio_rank", third, 3.0) == 3


def test_the_tail_of_small_energies_is_not_lost():
    # 1e5 directions of energy 1e-16 each: below the last bit of a running sum that starts at 1.
    values = np.concatenate([[1.0], np.full(10**5, 1e-8)])
    exact = math.sqrt(10**5 * 1e-16 / (1 + 10**5 * 1e-16))
    assert measure("truncation_error", spectrum(values), 1) == pytest.approx(exact, rel=1e-12)
    last = measure("truncation_error", spectrum(values), 10**5)
    assert last == pytest.approx(1e-8 / math.sqrt(1 + 1e-11), rel=1e-12)


@pytest.mark.parametrize("curve", CURVES)
def test_the_inequalities_between_the_ranks_hold(curve):
    s = spectrum(CURVES[curve])
    v = {name: value for (name, k, _), value in all_values(s).items() if k in (None, 0.9)}
    nonzero = np.count_nonzero(s.values)
    assert le(1, v["stable_rank"], v["participation_ratio"], v["energy_effective_rank"])
    assert le(v["energy_effective_rank"], v["effective_rank"], nonzero)
    assert le(v["stable_rank"], v["nuclear_dimension"], nonzero)
    assert le(v["l1_l2_ratio"], v["effective_rank"])
    assert le(v["energy_rank"], v["nuclear_rank"], nonzero)
    family = [measure("renyi_rank", s, a) for a in (8.0, 2.0, 1.0 + 1e-6, 1.0, 1.0 - 1e-6, 0.5)]
    assert le(v["stable_rank"], measure("renyi_rank", s, 1e9), *family)
    assert measure("renyi_rank", s, 1.0) == pytest.approx(v["energy_effective_rank"], rel=1e-12)
    assert measure("renyi_rank", s, 1 + 1e-6) == pytest.approx(family[3], rel=1e-4)
    assert measure("renyi_rank", s, 2.0) == pytest.approx(v["participation_ratio"], rel=1e-12)
    assert measure("renyi_rank", s, np.inf) == pytest.approx(v["stable_rank"], rel=1e-12)
    frobenius, spectral, nuclear = (measure("norm", s, side=x) for x in MEASURES["norm"].sides)
    assert le(spectral, frobenius, nuclear, math.sqrt(nonzero) * frobenius, nonzero * spectral)


@pytest.mark.parametrize("curve", CURVES)
def test_truncation_errors_run_from_one_to_zero_and_never_rise(curve):
    s = spectrum(CURVES[curve])
    grid = MEASURES["truncation_error"].grid(s)
    assert grid[0] == 0
    assert grid[-1] == s.q
    assert len(set(grid)) == len(grid)
    for side in MEASURES["truncation_error"].sides:
        errors = [measure("truncation_error", s, k, side) for k in grid]
        assert errors[0] == 1
        assert errors[-1] == measure("truncation_error", s, s.q + 5, side) == 0
        assert errors == sorted(errors, reverse=True)


def test_measures_equal_an_independent_computation_from_the_matrix():
    rng = np.random.default_rng(3)
    dW = rng.standard_normal((20, 14)) @ np.diag(np.geomspace(1, 1e-2, 14))
    W0 = rng.standard_normal((20, 14))
    s = decompose(Dense(dW))
    G = dW.T @ dW
    P = G / np.trace(G)  # a density matrix: entropies and purity without singular values
    eigen = np.linalg.eigvalsh(P)
    nuclear = np.linalg.norm(dW, "nuc")
    p = np.sqrt(eigen) / np.sqrt(eigen).sum()
    expected = {
        "energy_effective_rank": np.exp(-np.sum(eigen * np.log(eigen))),
        "effective_rank": np.prod(p**-p),
        "normalized_entropy": -np.sum(p * np.log(p)) / np.log(14),
        "participation_ratio": 1 / np.trace(P @ P),
        "stable_rank": (np.linalg.norm(dW) / np.linalg.norm(dW, 2)) ** 2,
        "nuclear_dimension": nuclear / np.linalg.norm(dW, 2),
        "l1_l2_ratio": (nuclear / np.linalg.norm(dW)) ** 2,
        "numerical_rank": np.linalg.matrix_rank(dW),
        "norm": np.linalg.norm(dW),
    }
    for name, value in expected.items():
        assert measure(name, s) == pytest.approx(value, rel=1e-9), name
    assert measure("update_ratio", s, W0=W0) == pytest.approx(
        np.linalg.norm(dW) / np.linalg.norm(W0), rel=1e-12
    )
    assert measure("update_ratio", s, side="spectral", W0=W0) == pytest.approx(
        np.linalg.norm(dW, 2) / np.linalg.norm(W0, 2), rel=1e-9
    )
    U, sigma, Vh = np.linalg.svd(dW, full_matrices=False)
    for k in (1, 5, 13):
        rest = dW - (U[:, :k] * sigma[:k]) @ Vh[:k]
        for side, order in (("frobenius", "fro"), ("spectral", 2), ("nuclear", "nuc")):
            assert measure("truncation_error", s, k, side) == pytest.approx(
                np.linalg.norm(rest, order) / np.linalg.norm(dW, order), rel=1e-9
            )


def test_an_exact_low_rank_float32_product_has_its_rank_by_the_dtype_it_was_made_in():
    rng = np.random.default_rng(4)
    B = rng.standard_normal((256, 8)).astype(np.float32)
    dW = B @ rng.standard_normal((8, 128)).astype(np.float32)
    assert measure("numerical_rank", decompose(Dense(dW, made_in="float32"))) == 8
    assert measure("numerical_rank", Spectrum.of_values(
        np.linalg.svd(dW.astype(float), compute_uv=False), (256, 128), made_in="float64"
    )) == 128  # fmt: skip


@pytest.mark.parametrize(("made_in", "edge"), [("bfloat16", 256), ("float16", 2048)])
def test_numerical_rank_is_undecidable_where_the_threshold_reaches_the_largest_value(made_in, edge):
    s = Spectrum.of_values([1.0], shape=(edge, 3), made_in=made_in)
    below = Spectrum.of_values([1.0], shape=(edge - 1, 3), made_in=made_in)
    assert math.isnan(measure("numerical_rank", s))
    assert measure("numerical_rank", below) == 1


def test_utilization_compares_with_r_and_needs_a_factored_update():
    rng = np.random.default_rng(5)
    s = decompose(Factored(np.linalg.qr(rng.standard_normal((40, 6)))[0], np.eye(6, 30)))
    for name in ("utilization", "stable_utilization", "normalized_entropy_r"):
        assert measure(name, s) == pytest.approx(1, rel=1e-12)
        with pytest.raises(WrongInput, match="configured rank r"):
            measure(name, decompose(Dense(np.eye(3))))


@pytest.mark.parametrize(("r", "stable", "entropy"), [(4, 0.88, None), (64, 0.50, 0.98)])
def test_random_factors_use_less_than_all_of_r(r, stable, entropy):
    rng = np.random.default_rng(6)
    s = decompose(Factored(rng.standard_normal((768, r)), rng.standard_normal((r, 768))))
    assert measure("stable_utilization", s) == pytest.approx(stable, abs=0.03)
    if entropy:
        assert measure("utilization", s) == pytest.approx(entropy, abs=0.01)


def test_update_ratio_is_nan_for_a_zero_base():
    s = spectrum([4.0, 3.0], (2, 2))
    for side in ("frobenius", "spectral"):
        assert math.isnan(measure("update_ratio", s, side=side, W0=np.zeros((2, 2))))
    assert measure("update_ratio", s, W0=np.eye(2) * 1e-200) == pytest.approx(5e200 / 2**0.5)


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("stabel_rank", {}, "Did you mean 'stable_rank'"),
        ("stable_rank", {"k": 2}, "no parameter k"),
        ("stable_rank", {"side": "left"}, "no sides"),
        ("norm", {"side": "frobenios"}, "Did you mean 'frobenius'"),
        ("energy_rank", {"k": 0.0}, r"in \(0, 1\]"),
        ("nuclear_rank", {"k": 95}, r"in \(0, 1\]"),
        ("ratio_rank", {"k": 0.5}, "at least 1"),
        ("renyi_rank", {"k": 0.0}, "above 0"),
        ("renyi_rank", {"k": math.nan}, "above 0"),
        ("truncation_error", {"k": -1}, "whole number"),
        ("truncation_error", {"k": 1.5}, "whole number"),
        ("truncation_error", {"k": math.inf}, "whole number"),
        ("update_ratio", {}, "needs W0"),
        ("update_ratio", {"W0": np.ones((3, 3))}, "W0 must have the update's shape"),
    ],
)
def test_a_wrong_call_is_one_line_that_says_what_is_allowed(name, arguments, said):
    with pytest.raises(WrongInput, match=said) as caught:
        measure(name, spectrum([4.0, 3.0]), **arguments)
    assert "\n" not in str(caught.value)
