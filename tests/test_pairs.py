"""Measures of two updates of one layer: closed forms, references, their nulls."""

import math
import tracemalloc

import numpy as np
import pytest
from scipy.linalg import subspace_angles

import lora_lab.measures.sign_conflict as conflicts
from lora_lab.linalg import Dense, Factored, Spectrum, decompose
from lora_lab.linalg.subspace import random_frame
from lora_lab.measures import MEASURES, Refused, measure
from lora_lab.measures.principal_angle import random_product
from lora_lab.registry import WrongInput

OF_SUBSPACES = ("subspace_overlap", "principal_angle", "geodesic_distance", "chordal_distance")
OF_UPDATES = ("cosine", "sign_conflict")
SIDES = ("left", "right")


def spectra(*updates):
    return [decompose(u, vectors=True) for u in updates]


def value(name, one, other, k=None, side=None):
    """A measure of two updates."""
    s, pair = spectra(one, other)
    if name in OF_SUBSPACES:
        return measure(name, s, k, side, pair=pair)
    return measure(name, s, side=side, update=one, pair_update=other)


def level(name, one, other, k=None, side=None):
    s, pair = spectra(one, other)
    m = MEASURES[name]
    side = side or (m.sides[0] if m.sides else None)
    given = {"pair": pair, "update": one, "pair_update": other}
    return m.null(s, **m.arguments(k, side, given))


def updates(shape=(20, 14), r=5, seed=0):
    """Four updates of one layer: two factored, two dense."""
    rng = np.random.default_rng(seed)
    m, n = shape
    low = [
        Factored(rng.standard_normal((m, r)), rng.standard_normal((r, n)), s) for s in (2.0, 0.1)
    ]
    return [*low, *(Dense(rng.standard_normal(shape)) for _ in range(2))]


PAIRS = [(0, 1), (0, 2), (2, 0), (2, 3)]


@pytest.mark.parametrize("pair", PAIRS)
def test_angles_and_overlap_equal_those_of_scipy(pair):
    one, other = (updates()[i] for i in pair)
    first, second = (np.linalg.svd(u.dense()) for u in (one, other))
    for k in (1, 2, 4):
        for side, frames in (
            ("left", [x[0][:, :k] for x in (first, second)]),
            ("right", [x[2][:k].T for x in (first, second)]),
        ):
            angles = subspace_angles(*frames)
            expected = {
                "subspace_overlap": np.mean(np.cos(angles) ** 2),
                "principal_angle": angles.max(),
                "geodesic_distance": np.linalg.norm(angles),
                "chordal_distance": np.linalg.norm(
                    frames[0] @ frames[0].T - frames[1] @ frames[1].T
                )
                / math.sqrt(2),
            }
            for name, wanted in expected.items():
                assert value(name, one, other, k, side) == pytest.approx(wanted, rel=1e-9), name


@pytest.mark.parametrize("name", OF_SUBSPACES + OF_UPDATES)
@pytest.mark.parametrize("pair", PAIRS)
def test_a_pair_may_be_exchanged(name, pair):
    one, other = (updates()[i] for i in pair)
    for side in MEASURES[name].sides or (None,):
        there, back = value(name, one, other, side=side), value(name, other, one, side=side)
        assert there == pytest.approx(back, rel=1e-12), side


@pytest.mark.parametrize("one", updates())
def test_an_update_agrees_with_itself_and_opposes_its_negative(one):
    twin = Factored(one.B * 3, one.A, one.scale) if isinstance(one, Factored) else Dense(one.dW * 3)
    negative = Dense(-one.dense())
    for side in SIDES:
        for other in (twin, negative):
            assert value("subspace_overlap", one, other, 4, side) == pytest.approx(1, abs=1e-12)
            for name in OF_SUBSPACES[1:]:
                assert value(name, one, other, 4, side) == pytest.approx(0, abs=1e-7), name
    assert value("cosine", one, twin) == pytest.approx(1, rel=1e-12)
    assert value("cosine", one, negative) == pytest.approx(-1, rel=1e-12)
    for side in MEASURES["sign_conflict"].sides:
        assert value("sign_conflict", one, twin, side=side) == 0
        assert value("sign_conflict", one, negative, side=side) == 1


@pytest.mark.parametrize("name", OF_SUBSPACES + OF_UPDATES)
@pytest.mark.parametrize(
    "zero", [Dense(np.zeros((20, 14))), Factored(np.zeros((20, 5)), np.ones((5, 14)))]
)
def test_nothing_is_said_of_a_pair_with_a_zero_update_without_a_warning(name, zero):
    other = updates()[0]
    with np.errstate(all="raise"):
        for one, two in ((zero, other), (other, zero), (zero, zero)):
            for side in MEASURES[name].sides or (None,):
                assert math.isnan(value(name, one, two, 1 if name in OF_SUBSPACES else None, side))
        k = 1 if name in OF_SUBSPACES else None
        assert all(map(math.isnan, level(name, other, zero, k)))


@pytest.mark.parametrize("name", OF_SUBSPACES)
def test_a_subspace_that_does_not_exist_or_is_not_one_is_refused(name):
    low, full = Factored(np.eye(20, 2) * [2, 1], np.eye(2, 14)), updates()[2]
    grid = MEASURES[name].grid(decompose(full, vectors=True))
    assert grid == (1, 2, 4, 8)
    for one, other in ((low, full), (full, low)):
        assert math.isfinite(value(name, one, other, 2))
        with pytest.raises(Refused, match="2 directions, fewer than 4"):
            value(name, one, other, 4)
    # Rank 2 in factors of width 5: what the other three columns span is rounding.
    wide = Factored(np.hstack([low.B, np.zeros((20, 3))]), updates()[0].A)
    with pytest.raises(Refused, match="2 directions"):
        value(name, full, wide, 4)
    tied = Dense(np.diag([3.0, 1.0, 1.0, 0.5]))
    other = Dense(np.random.default_rng(0).standard_normal((4, 4)))
    assert math.isfinite(value(name, tied, other, 1))
    with pytest.raises(Refused, match=r"2 and 3 .* are equal"):
        value(name, other, tied, 2)


@pytest.mark.parametrize(("d", "k"), [(40, 1), (40, 6), (12, 8), (6, 6)])
def test_random_subspaces_lie_in_the_null_of_each_measure_in_95_percent(d, k):
    rng = np.random.default_rng(k)
    values, draws = np.arange(d, 0.0, -1)[:k], 400
    s = Spectrum(np.pad(values, (0, d - k)), (d, d), np.eye(d, k), np.eye(k, d))
    found = {name: [] for name in OF_SUBSPACES}
    for _ in range(draws):
        U = random_frame(d, k, rng)
        pair = Spectrum(s.values, (d, d), U, U.T)
        for name in OF_SUBSPACES:
            found[name].append(MEASURES[name](s, k, "left", pair=pair))
    for name in OF_SUBSPACES:
        mean, low, high = MEASURES[name].null(s, pair, k, "left")
        spread = np.std(found[name])
        # A null of 200 draws and 400 draws: five standard errors of the difference.
        assert np.mean(found[name]) == pytest.approx(
            mean, abs=5 * spread * math.sqrt(3 / 400) + 1e-7
        )
        if k < d:
            inside = np.mean([low <= v <= high for v in found[name]])
            assert 0.91 < inside < 0.985, name
    assert MEASURES["subspace_overlap"].null(s, pair, k, "left")[0] == pytest.approx(k / d)


@pytest.mark.parametrize(("d", "i", "j"), [(40, 3, 5), (40, 38, 5), (9, 7, 7), (6, 6, 2)])
def test_a_random_product_is_distributed_as_that_of_random_frames(d, i, j):
    rng, draws = np.random.default_rng(0), 3000
    ours = np.array([random_product(d, i, j, rng) for _ in range(draws)]) ** 2
    frames = np.array([random_frame(d, j, rng)[:i] for _ in range(draws)]) ** 2
    assert ours.shape == frames.shape
    for f in (lambda x: x.sum((1, 2)), lambda x: x[:, 0, 0], lambda x: x[:, -1, -1]):
        a, b = f(ours), f(frames)
        assert np.mean(a) == pytest.approx(
            np.mean(b), abs=5 * np.std(b) * math.sqrt(2 / draws) + 1e-9
        )
        assert np.std(a) == pytest.approx(np.std(b), rel=0.1, abs=1e-9)


@pytest.mark.parametrize("pair", PAIRS)
def test_cosine_and_sign_conflict_equal_those_of_the_matrices(pair):
    one, other = (updates()[i] for i in pair)
    a, b = one.dense(), other.dense()
    cosine = np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b)
    assert value("cosine", one, other) == pytest.approx(cosine, rel=1e-10)
    against = np.sign(a) != np.sign(b)
    assert value("sign_conflict", one, other) == pytest.approx(np.mean(against))
    weighted = np.abs(a * b)[against].sum() / np.abs(a * b).sum()
    assert value("sign_conflict", one, other, side="weighted") == pytest.approx(weighted)


@pytest.mark.parametrize("c", [1e-300, 1e-200, 1e150])
def test_no_comparison_depends_on_the_sizes_of_the_updates(c):
    low, second, dense, _ = updates()
    expected = {n: value(n, low, dense) for n in OF_SUBSPACES + OF_UPDATES}
    small = Factored(low.B * c, low.A, low.scale)
    apart = Factored(second.B * 1e200, second.A * 1e-200, second.scale)
    for name, wanted in expected.items():
        for one, other in ((small, dense), (low, Dense(dense.dW * c))):
            assert value(name, one, other) == pytest.approx(wanted, rel=1e-9), name
        assert value(name, low, apart) == pytest.approx(value(name, low, second), rel=1e-9), name


def test_the_cosine_of_factors_forms_no_product():
    d = 100_000  # a matrix of 80 GB
    B, A = np.zeros((d, 2)), np.zeros((2, d))
    B[0, 0] = B[1, 1] = A[0, 0] = A[1, 1] = 1.0
    turned = np.array([[0.6, -0.8], [0.8, 0.6]])
    assert value("cosine", Factored(B, A), Factored(B @ turned, A)) == pytest.approx(0.6)


@pytest.mark.parametrize("block", [1, 14, 45, 10**6])
def test_sign_conflicts_do_not_depend_on_the_blocks(block, monkeypatch):
    low, _, dense, _ = updates()
    expected = [value("sign_conflict", low, dense, side=side) for side in conflicts.SIDES]
    monkeypatch.setattr(conflicts, "BLOCK", block)
    found = [value("sign_conflict", low, dense, side=side) for side in conflicts.SIDES]
    assert found == pytest.approx(expected, rel=1e-12)


def test_sign_conflicts_of_factors_need_a_few_rows_at_a_time():
    rng = np.random.default_rng(0)
    one, other = (
        Factored(rng.standard_normal((2048, 2)), rng.standard_normal((2, 2048))) for _ in range(2)
    )
    s = Spectrum.of_values([1.0], one.shape)
    tracemalloc.start()
    measure("sign_conflict", s, update=one, pair_update=other)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * 2048 * 2048 / 2  # half of one of the two products


def test_entries_that_only_one_update_changes_are_no_conflict():
    one = Factored([[1.0], [0.0], [1.0]], [[1.0, -1.0]])
    other = Dense([[1.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    assert value("sign_conflict", one, other) == 0.5  # the first row alone
    assert math.isnan(value("sign_conflict", one, Dense([[0.0, 0], [5, 5], [0, 0]])))


@pytest.mark.parametrize("r", [1, 2, 30])
def test_the_null_of_the_cosine_is_that_of_random_rotations(r):
    rng, (m, n) = np.random.default_rng(r), (40, 30)
    fixed = Factored(rng.standard_normal((m, r)), rng.standard_normal((r, n)))
    mean, low, high = level("cosine", fixed, fixed)
    assert (mean, low) == (0, -high)
    found = []
    for _ in range(800):
        turned = Factored(
            random_frame(m, r, rng) * np.geomspace(1, 0.5, r), random_frame(n, r, rng).T
        )
        found.append(
            measure("cosine", Spectrum.of_values([1.0], (m, n)), update=fixed, pair_update=turned)
        )
    assert np.mean(np.square(found)) * m * n == pytest.approx(1, rel=0.25)
    # The product of two normal variables, which r = 1 is, has longer tails than one.
    inside = 0.933 if r == 1 else 0.95
    assert np.mean(np.abs(found) <= high) == pytest.approx(inside, abs=0.02)


@pytest.mark.parametrize("kind", [0, 2])
@pytest.mark.parametrize("side", conflicts.SIDES)
def test_the_null_of_sign_conflicts_is_that_of_flipped_rows_and_columns(kind, side):
    rng = np.random.default_rng(1)
    one, other = updates((40, 30), r=3)[kind], updates((40, 30), r=3, seed=5)[kind]
    mean, low, high = level("sign_conflict", one, other, side=side)
    a, b = one.dense(), other.dense()
    s, found = Spectrum.of_values([1.0], one.shape), []
    for _ in range(1500):
        flipped = b * rng.choice([-1.0, 1.0], (40, 1)) * rng.choice([-1.0, 1.0], (1, 30))
        found.append(
            measure("sign_conflict", s, side=side, update=Dense(a), pair_update=Dense(flipped))
        )
    sd = (high - low) / 2 / 1.959964
    assert mean == 0.5
    assert np.mean(found) == pytest.approx(0.5, abs=5 * sd / math.sqrt(1500))
    assert np.std(found) == pytest.approx(sd, rel=0.1)


@pytest.mark.parametrize(
    ("name", "k", "side", "said"),
    [
        *((name, 0, None, "whole number >= 1") for name in OF_SUBSPACES),
        *((name, 1.5, None, "whole number >= 1") for name in OF_SUBSPACES),
        *((name, 1, "top", "allowed: left, right") for name in OF_SUBSPACES),
        ("sign_conflict", None, "weigthed", "Did you mean 'weighted'"),
    ],
)
def test_a_wrong_comparison_is_one_line_that_says_what_is_allowed(name, k, side, said):
    one, other, *_ = updates()
    with pytest.raises(WrongInput, match=said) as caught:
        value(name, one, other, k, side)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", OF_SUBSPACES + OF_UPDATES)
@pytest.mark.parametrize("pair", PAIRS)
def test_updates_of_two_shapes_are_refused(name, pair):
    one, other = updates()[pair[0]], updates((20, 13))[pair[1]]
    with pytest.raises(WrongInput, match=r"\(20, 14\).*\(20, 13\)"):
        value(name, one, other)
