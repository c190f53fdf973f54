"""Subspaces against scipy, closed forms, laws of metrics and the Monte Carlo mean."""

import numpy as np
import pytest
import scipy.linalg

from lora_lab.linalg.subspace import (
    DISTANCES,
    blocks,
    distance,
    overlap_grid,
    principal_angles,
    random_frame,
    random_overlap,
)
from lora_lab.registry import WrongInput


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def planes(*angles, extra=0):
    """Two frames with these principal angles, and `extra` more columns in the first."""
    k = len(angles)
    U1 = np.eye(2 * k + extra)[:, : k + extra]
    U2 = np.zeros((2 * k + extra, k))
    U2[np.arange(k), np.arange(k)] = np.cos(angles)
    U2[k + extra + np.arange(k), np.arange(k)] = np.sin(angles)
    return U1, U2


def turned(rng, U, V):
    """The same two subspaces after a rotation of the space and of the columns of each frame."""
    Q = random_frame(len(U), len(U), rng)
    return tuple(Q @ X @ random_frame(X.shape[1], X.shape[1], rng) for X in (U, V))


def test_the_overlap_grid_is_its_definition(rng):
    U1, U2 = random_frame(20, 5, rng), random_frame(20, 8, rng)
    grid = overlap_grid(U1, U2)
    for i in range(1, 6):
        for j in range(1, 9):
            phi = np.linalg.norm(U1[:, :i].T @ U2[:, :j]) ** 2 / min(i, j)
            assert grid[i - 1, j - 1] == pytest.approx(phi, rel=1e-12)
    np.testing.assert_allclose(overlap_grid(U2, U1), grid.T, rtol=1e-12)


def test_overlap_is_one_inside_and_zero_across():
    Q = random_frame(30, 9, np.random.default_rng(1))
    grid = overlap_grid(Q, Q)
    np.testing.assert_allclose(grid, 1.0, rtol=1e-12)
    assert grid.max() <= 1.0
    np.testing.assert_allclose(overlap_grid(Q[:, :4], Q[:, 4:]), 0.0, atol=1e-30)


@pytest.mark.parametrize(("i", "j", "d"), [(1, 1, 10), (4, 4, 64), (2, 8, 64), (8, 2, 64)])
def test_random_subspaces_overlap_by_the_larger_dimension_over_d(rng, i, j, d):
    draws = [
        overlap_grid(random_frame(d, i, rng), random_frame(d, j, rng))[-1, -1] for _ in range(2000)
    ]
    error = np.std(draws) / np.sqrt(len(draws))
    assert abs(np.mean(draws) - random_overlap(i, j, d)) < 4 * error
    assert error < 0.05 * random_overlap(i, j, d), "enough draws to tell"


@pytest.mark.parametrize("extra", [0, 2])
def test_known_angles_are_found_small_and_large(rng, extra):
    known = [0.0, 1e-12, 1e-7, 0.3, np.pi / 4, 1.2, np.pi / 2 - 1e-9, np.pi / 2]
    U1, U2 = planes(*known, extra=extra)
    np.testing.assert_allclose(principal_angles(U1, U2), known, rtol=1e-9, atol=1e-30)
    np.testing.assert_allclose(principal_angles(U2, U1), known, rtol=1e-9, atol=1e-30)
    np.testing.assert_allclose(principal_angles(*turned(rng, U1, U2)), known, atol=1e-14)


def test_angles_agree_with_scipy(rng):
    for i, j in ((3, 3), (2, 7), (7, 2), (1, 1), (10, 10)):
        U1, U2 = random_frame(12, i, rng), random_frame(12, j, rng)
        expected = scipy.linalg.subspace_angles(U1, U2)[::-1]
        np.testing.assert_allclose(principal_angles(U1, U2), expected, atol=1e-14)
        assert len(expected) == min(i, j)


def test_distances_of_known_angles():
    U1, U2 = planes(0.3, 0.4)
    assert distance(U1, U2, "geodesic") == pytest.approx(0.5)
    assert distance(U1, U2, "chordal") == pytest.approx(np.hypot(np.sin(0.3), np.sin(0.4)))
    assert distance(U1, U2, "spectral") == pytest.approx(0.4)
    projections = [U @ U.T for U in (U1, U2)]
    chordal = np.linalg.norm(projections[0] - projections[1]) / np.sqrt(2)
    assert distance(U1, U2, "chordal") == pytest.approx(chordal)


def test_missing_dimensions_count_as_right_angles():
    U1, U2 = planes(0.3, extra=2)
    right = np.pi / 2
    assert distance(U1, U2, "geodesic") == pytest.approx(np.sqrt(0.09 + 2 * right**2))
    assert distance(U1, U2, "chordal") == pytest.approx(np.sqrt(np.sin(0.3) ** 2 + 2))
    assert distance(U1, U2, "spectral") == pytest.approx(right)


@pytest.mark.parametrize("kind", DISTANCES)
def test_distances_are_metrics_over_subspaces_of_every_dimension(rng, kind):
    for _ in range(200):
        A, B, C = (random_frame(5, k, rng) for k in rng.integers(1, 6, size=3))
        # Two that are close, so that the triangle can fail.
        C = scipy.linalg.qr(A + 0.1 * rng.standard_normal(A.shape), mode="economic")[0]
        AB, BC, AC = distance(A, B, kind), distance(B, C, kind), distance(A, C, kind)
        assert abs(AB - distance(B, A, kind)) < 1e-12
        assert AC <= AB + BC + 1e-12
        assert AB <= AC + BC + 1e-12
        assert AC > 0 or A.shape[1] == 5
        assert distance(A, A, kind) < 1e-7


@pytest.mark.parametrize("kind", DISTANCES)
def test_signs_and_rotations_of_a_frame_are_free(rng, kind):
    A, B = random_frame(9, 4, rng), random_frame(9, 3, rng)
    rotated = A @ random_frame(4, 4, rng) * [1, -1, 1, -1]
    assert distance(rotated, B, kind) == pytest.approx(distance(A, B, kind), rel=1e-12)
    C, D = turned(rng, A, B)
    assert distance(C, D, kind) == pytest.approx(distance(A, B, kind), rel=1e-12)
    assert overlap_grid(rotated, B)[-1, -1] == pytest.approx(overlap_grid(A, B)[-1, -1])


def test_random_frames_are_orthonormal_uniform_and_repeatable(rng):
    np.testing.assert_array_equal(
        random_frame(7, 3, np.random.default_rng(5)), random_frame(7, 3, np.random.default_rng(5))
    )
    draws = np.array([random_frame(3, 3, rng) for _ in range(4000)])
    np.testing.assert_allclose(np.swapaxes(draws, 1, 2) @ draws, [np.eye(3)] * 4000, atol=1e-13)
    # Every entry of a uniform frame has mean 0 and variance 1/d; without the signs the diagonal
    # would have a mean of -1/2 or so.
    assert np.abs(draws.mean(axis=0)).max() < 5 * np.sqrt(1 / 3 / 4000)
    np.testing.assert_allclose((draws**2).mean(axis=0), 1 / 3, atol=0.03)
    assert (np.linalg.det(draws) > 0).mean() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(
    ("values", "tolerance", "expected"),
    [
        ([5.0], 0.1, [(0, 1)]),
        ([3.0, 2.0, 1.0], 0.1, [(0, 1), (1, 2), (2, 3)]),
        ([2.0, 2.0, 1.0, 1.0], 0.0, [(0, 2), (2, 4)]),
        ([1.0, 0.95, 0.9, 0.5], 0.06, [(0, 3), (3, 4)]),  # a chain of close neighbours
        ([1.0, 0.0, 0.0], 0.5, [(0, 1), (1, 3)]),
        ([0.0, 0.0], 0.0, [(0, 2)]),
        ([], 0.1, []),
    ],
)
def test_blocks_join_close_neighbours(values, tolerance, expected):
    for size in (1.0, 1e-200, 1e200):
        found = blocks(np.array(values) * size, tolerance)
        assert [(b.start, b.stop) for b in found] == expected


def test_degenerate_vectors_compare_as_blocks(rng):
    U = random_frame(40, 4, rng)
    values = [2.0, 1.0, 1.0, 0.5]
    other = U.copy()
    other[:, 1:3] = U[:, 1:3] @ random_frame(2, 2, rng)
    single = np.abs(np.sum(U * other, axis=0))
    assert single[1] < 0.999, "single vectors of a tie differ"
    for block in blocks(values, 1e-9):
        assert principal_angles(U[:, block], other[:, block]).max() < 1e-12


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: overlap_grid(np.eye(3), np.eye(4)), "one space; got 3 and 4"),
        (lambda: overlap_grid(np.eye(3)[:2], np.eye(3)), r"got shape \(2, 3\). Pass U or Vh.T"),
        (lambda: principal_angles(np.ones((3, 2)), np.eye(3)), "must be orthonormal"),
        (lambda: principal_angles(np.full((3, 2), np.nan), np.eye(3)), "must be orthonormal"),
        (lambda: distance(np.eye(3), np.eye(3), "geodesik"), "Did you mean 'geodesic'"),
        (lambda: distance(np.eye(3)[0], np.eye(3)), "a frame must be"),
        (lambda: random_overlap(0, 1, 5), r"in \[1, d = 5\]"),
        (lambda: random_overlap(1, 6, 5), r"in \[1, d = 5\]"),
        (lambda: random_frame(3, 4, np.random.default_rng(0)), r"in \[1, d = 3\]; got 4"),
        (lambda: blocks([1.0, 2.0], 0.1), "descending"),
        (lambda: blocks([1.0, -2.0], 0.1), "at least 0"),
        (lambda: blocks([1.0, np.nan], 0.1), "descending"),
        (lambda: blocks([1.0], 1.0), r"in \[0, 1\)"),
    ],
)
def test_wrong_input_is_one_line_that_says_what_is_allowed(make, said):
    with pytest.raises(WrongInput, match=said) as caught:
        make()
    assert "\n" not in str(caught.value)
