"""Nulls: their draws against direct simulation, laws over the registry, and their intervals."""

import inspect
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from scipy.stats import ks_2samp

from lora_lab import nulls
from lora_lab.analysis import rows
from lora_lab.linalg import Dense, Factored, Spectrum, decompose
from lora_lab.linalg.noise import noise_edge
from lora_lab.linalg.rounding import rounded
from lora_lab.measures import MEASURES, Refused, measure
from lora_lab.nulls import NULLS, draws, interval, level


def example(name, shape=(40, 30), r=5, seed=0):
    """An update that has this null, its base, and what the null needs of them."""
    rng = np.random.default_rng(seed)
    m, n = shape
    W0 = rng.standard_normal(shape)
    update = Dense(1e-3 * rng.standard_normal(shape))
    if "r" in NULLS[name].needs:
        update = Factored(rng.standard_normal((m, r)), rng.standard_normal((r, n)))
    given = {"update": update, "W0": W0}
    return decompose(update), {need: given[need] for need in NULLS[name].given}


def values(spectra):
    return np.array([s.values for s in spectra])


@pytest.mark.parametrize("name", NULLS)
def test_a_null_is_documented_and_draws_spectra_of_the_updates_kind(name):
    null = NULLS[name]
    text = inspect.getdoc(null.draw)
    assert null.draw.__name__ == name
    for wanted in ("References", "Examples", ">>>"):
        assert wanted in text, f"{name}: its docstring lacks {wanted!r}"
    s, given = example(name)
    drawn = draws(name, s, **given)
    assert len(drawn) == nulls.DRAWS
    for one in drawn:
        assert (one.shape, one.r, one.made_in) == ((40, 30), s.r, s.made_in)
        assert np.count_nonzero(one.values) == (s.r or 30)
    assert len({one.values[0] for one in drawn}) == nulls.DRAWS, "each draw is a new one"


@pytest.mark.parametrize("name", NULLS)
def test_draws_are_the_same_whenever_they_are_asked_for(name):
    s, given = example(name)
    again, given_again = example(name)
    np.testing.assert_array_equal(
        values(draws(name, s, **given)), values(draws(name, again, **given_again))
    )


@pytest.mark.parametrize("name", [name for name in NULLS if not NULLS[name].given])
def test_a_null_of_the_shape_knows_nothing_else_of_the_update(name):
    one, _ = example(name, seed=0)
    other, _ = example(name, seed=1)
    flipped, _ = example(name, shape=(30, 40))
    expected = values(draws(name, one))
    np.testing.assert_array_equal(values(draws(name, other)), expected)
    np.testing.assert_array_equal(values(draws(name, flipped)), expected)
    coarse = Spectrum.of_values([1.0], one.shape, "bfloat16", one.r)
    np.testing.assert_array_equal(values(draws(name, coarse)), expected)
    larger, _ = example(name, shape=(41, 30))
    assert not np.array_equal(values(draws(name, larger)), expected)


@pytest.mark.parametrize(
    ("name", "shape", "r"),
    [
        ("gaussian", (30, 20), None),
        ("gaussian", (20, 30), None),
        ("gaussian", (1, 6), None),
        ("gaussian", (5, 5), None),
        ("random_ba", (30, 20), 4),
        ("random_ba", (12, 20), 12),
        ("random_ba", (7, 9), 1),
    ],
)
def test_draws_without_the_matrix_are_distributed_as_those_of_the_matrix(name, shape, r):
    rng = np.random.default_rng(1)
    s = Spectrum.of_values([1.0], shape, r=r)
    count = min(shape) if r is None else r
    fast = np.array([np.sort(NULLS[name].draw(s, rng))[::-1] for _ in range(1500)])
    m, n = shape

    def direct():
        if r is None:
            return rng.standard_normal(shape)
        return rng.standard_normal((m, r)) @ rng.standard_normal((r, n))

    slow = np.linalg.svd([direct() for _ in range(1500)], compute_uv=False)[:, :count]
    assert fast.shape == slow.shape
    statistics = {
        "largest": lambda x: x[:, 0],
        "middle": lambda x: x[:, count // 2],
        "smallest": lambda x: x[:, -1],
        "energy": lambda x: np.sum(x**2, axis=1),
        "stable rank": lambda x: np.sum(x**2, axis=1) / x[:, 0] ** 2,
    }
    for what, of in statistics.items():
        if count > 1 or what != "stable rank":
            assert ks_2samp(of(fast), of(slow)).pvalue > 1e-3, what


@pytest.mark.parametrize(
    ("size", "r", "stable", "entropy"),
    [
        (768, 4, 0.88, None),
        (768, 8, 0.80, None),
        (768, 16, 0.715, None),
        (768, 32, 0.617, None),
        (768, 64, 0.507, 0.98),
        (768, 256, 0.287, 0.91),
        (768, 768, None, 0.67),
        (384, 64, None, 0.96),
        (384, 256, None, 0.80),
    ],
)
def test_random_factors_have_the_utilization_of_the_table(size, r, stable, entropy):
    rng = np.random.default_rng(2)
    s = Spectrum.of_values([1.0], (size, size), r=r)
    drawn = [
        Spectrum.of_values(NULLS["random_ba"].draw(s, rng), s.shape, r=r)
        for _ in range(max(2, 800 // r))
    ]
    for name, expected in (("stable_utilization", stable), ("utilization", entropy)):
        if expected:
            found = np.mean([measure(name, one) for one in drawn])
            assert found == pytest.approx(expected, abs=0.0085)


def test_a_gaussian_matrix_fills_the_range_of_marchenko_and_pastur():
    s = Spectrum.of_values([1.0], (900, 400))
    v = values(draws("gaussian", s))
    assert v[:, 0].mean() == pytest.approx(50, rel=0.01)
    assert v[:, -1].mean() == pytest.approx(10, rel=0.03)
    assert v.max() < noise_edge(s.shape)


def test_random_signs_keep_every_size_and_shuffling_keeps_every_entry(monkeypatch):
    rng = np.random.default_rng(3)
    dW = rng.standard_normal((30, 20)) * np.geomspace(1, 1e-3, 20) + 0.1
    seen = []

    def remembering(dense, *_):
        seen.append(dense.dW)
        return decompose(dense)

    for name, kept in (("sign_flip", np.abs), ("permutation", lambda x: np.sort(x, axis=None))):
        monkeypatch.setattr(f"lora_lab.nulls.{name}.decompose", remembering)
        seen.clear()
        draws(name, decompose(Dense(dW)), update=Dense(dW))
        for one in seen:
            np.testing.assert_array_equal(kept(one), kept(dW))
            assert np.mean(one != dW) > 0.2
    flips = np.mean([np.sign(one) for one in seen], axis=0)
    assert abs(flips.mean() - np.sign(dW).mean()) < 0.1


def test_random_signs_and_shuffling_take_away_what_was_planted():
    rng = np.random.default_rng(4)
    # Of signs: rows and columns of one size, so that sizes alone hold nothing of what is planted.
    B, A = (np.sign(rng.standard_normal(shape)) for shape in ((80, 2), (2, 60)))
    planted = Dense(B @ A + rng.standard_normal((80, 60)))
    s = decompose(planted)
    assert measure("gavish_donoho_rank", s) == 2
    for name in ("sign_flip", "permutation"):
        assert level(name, "gavish_donoho_rank", s, None, None, update=planted) == (0, 0, 0)
        # The factors alone: their product has no bulk, its entries with random signs have one.
        flipped = draws(name, decompose(Factored(B, A)), update=Factored(B, A))
        assert np.median(flipped[0].values) > 0.1 * flipped[0].values[0]


def rms(x):
    return math.sqrt(np.mean(np.square(x)))


def test_one_rounding_and_the_difference_of_two_have_the_sizes_of_the_table():
    rng = np.random.default_rng(5)
    w = rng.standard_normal(400_000)
    stored = rounded(w, "bfloat16")
    assert rms((stored - w) / w) == pytest.approx(1.66e-3, rel=0.01)
    for relative, size, zero in (
        (0.1, 2.35e-3, 0.02),
        (1e-3, 1.65e-3, 0.684),
        (1e-4, 0.59e-3, 0.94),
    ):
        u = relative * rng.standard_normal(w.size)
        dW = rounded(w + u, "bfloat16") - stored
        assert rms(dW - u) == pytest.approx(size, rel=0.02)
        assert np.mean(dW == 0) == pytest.approx(zero, abs=0.005)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("profile", ["equal", "columns"])
def test_the_null_of_storage_has_the_spectrum_of_what_rounding_did(dtype, profile):
    rng = np.random.default_rng(6)
    shape = (120, 90)
    sizes = 1.0 if profile == "equal" else np.geomspace(1, 0.03, 90)
    W0 = rounded(0.05 * rng.standard_normal(shape) * sizes, dtype)
    done = []
    for _ in range(20):
        tuned = W0 + 0.3 * rng.standard_normal(shape) * np.abs(W0)
        stored = rounded(tuned, dtype)
        done.append(np.linalg.svd(stored - tuned, compute_uv=False))
    update = Dense(stored - W0, made_in=dtype)
    drawn = values(draws("storage_rounding", decompose(update), update=update, W0=W0))
    assert rms(drawn) == pytest.approx(rms(done), rel=0.02)
    np.testing.assert_allclose(drawn.mean(axis=0)[:80], np.mean(done, axis=0)[:80], rtol=0.04)


def test_an_entry_that_did_not_change_was_not_rounded():
    rng = np.random.default_rng(7)
    W0 = rng.standard_normal((40, 30))
    dW = np.zeros((40, 30))
    dW[3] = 0.1
    update = Dense(dW, made_in="bfloat16")
    for one in draws("storage_rounding", decompose(update), update=update, W0=W0):
        assert np.count_nonzero(one.relative > 1e-12) == 1


def test_one_more_draw_lies_outside_the_interval_once_in_twenty():
    rng = np.random.default_rng(8)
    outside = 0
    for _ in range(4000):
        mean, low, high = interval(rng.standard_normal(nulls.DRAWS))
        assert low < mean < high
        outside += not low <= rng.standard_normal() <= high
    assert outside / 4000 == pytest.approx(0.05, abs=0.01)
    assert all(math.isnan(end) for end in interval(np.array([math.nan, math.inf])))


@pytest.mark.parametrize("name", NULLS)
def test_every_null_fills_the_columns_of_rows(name):
    s, given = example(name, shape=(70, 60))
    update = given.get("update") or s
    [row] = rows("x", update, ["stable_rank"], null=name, W0=given.get("W0"))
    assert row["null_low"] <= row["null"] <= row["null_high"]
    low, high = 1, 60
    assert low <= row["null"] <= high


@pytest.mark.parametrize(
    ("name", "update", "said"),
    [
        ("random_ba", Dense(np.eye(3)), "factors with r at most"),
        ("random_ba", Factored(np.ones((3, 5)), np.ones((5, 4))), r"min\(m, n\) = 3"),
        ("storage_rounding", Factored(np.ones((3, 1)), np.ones((1, 4))), "stored themselves"),
        ("sign_flip", Dense(np.ones((9, 9))), "up to 80 of them; this update is 9 x 9"),
        ("permutation", Factored(np.ones((9, 1)), np.ones((1, 9))), "up to 80"),
    ],
)
def test_a_null_that_an_update_has_not_is_refused_and_leaves_its_columns_empty(
    name, update, said, monkeypatch
):
    monkeypatch.setattr(nulls, "ENTRIES", 80)
    s, W0 = decompose(update), np.ones(update.shape)
    with pytest.raises(Refused, match=said) as caught:
        draws(name, s, **{"update": update, "W0": W0})
    assert "\n" not in str(caught.value)
    [row] = rows("x", update, ["stable_rank"], null=name, W0=W0)
    assert row["value"] >= 1
    assert all(math.isnan(row[end]) for end in ("null", "null_low", "null_high"))


def test_threads_that_ask_for_one_null_draw_it_once(monkeypatch):
    drawn, drawing = [], NULLS["gaussian"].draw

    def draw(s, rng):
        drawn.append(threading.get_ident())
        time.sleep(0.002)
        return drawing(s, rng)

    monkeypatch.setattr(nulls, "NULLS", {"gaussian": nulls.Null(draw, ())})
    nulls._by_shape.cache_clear()
    nulls._level_by_shape.cache_clear()
    s = Spectrum.of_values([1.0], shape=(31, 17))
    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(lambda _: level("gaussian", "stable_rank", s, None, None), range(4)))
    nulls._by_shape.cache_clear()
    nulls._level_by_shape.cache_clear()
    assert len(found) == 1
    assert len(drawn) == nulls.DRAWS
    assert len(set(drawn)) == 1


def test_a_measure_that_refuses_its_nulls_draws_has_no_null():
    s = decompose(Factored(np.ones((40, 2)), np.ones((2, 40))))
    assert MEASURES["gavish_donoho_rank"].null == "random"
    got = level("random_ba", "gavish_donoho_rank", s, None, None)
    assert all(math.isnan(end) for end in got)


def test_all_rows_of_a_layer_share_one_set_of_draws(monkeypatch):
    calls = []

    def counting(dense, *_):
        calls.append(dense)
        return decompose(dense)

    monkeypatch.setattr("lora_lab.nulls.sign_flip.decompose", counting)
    found = rows("x", Dense(np.eye(50) + 0.1), null="sign_flip")
    assert sum(not math.isnan(row["null"]) for row in found) > 10
    assert len(calls) == nulls.DRAWS
