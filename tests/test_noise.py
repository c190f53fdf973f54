"""Noise edges and thresholds, the ranks above them, and the power law of the tail."""

import math
import warnings

import numpy as np
import pandas as pd
import powerlaw as package
import pytest
from scipy.stats import ortho_group

from experiments.benchmarks import calibration
from lora_lab.linalg import Dense, Factored, Spectrum, decompose, noise
from lora_lab.linalg.rounding import rounded
from lora_lab.measures import Refused, measure
from lora_lab.nulls.gaussian import gaussian
from lora_lab.registry import WrongInput

BETAS = (1.0, 0.5, 0.25)
RANKS = ("marchenko_pastur_rank", "gavish_donoho_rank")


def planted(values, shape, rng, sd=1.0):
    """A matrix of noise with these singular values planted in it."""
    U, V = (np.linalg.qr(rng.standard_normal((size, len(values))))[0] for size in shape)
    return (U * values) @ V.T + sd * rng.standard_normal(shape)


def test_the_thresholds_are_those_of_gavish_and_donoho():
    known = [noise.known_noise_coefficient(beta) for beta in BETAS]
    assert known == pytest.approx([4 / math.sqrt(3), 1.9786, 1.7580], abs=5e-5)
    unknown = [noise.unknown_noise_coefficient(beta) for beta in BETAS]
    assert unknown == pytest.approx([2.858, 2.171, 1.837], abs=1e-3)
    assert noise.optimal_threshold((200, 400), 0.5) == pytest.approx(1.9786 * 10, rel=1e-4)


@pytest.mark.parametrize("beta", [*BETAS, 0.01])
def test_the_median_of_noise_halves_the_marchenko_pastur_density(beta):
    a, b = (1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2
    # The density of the eigenvalue itself, summed at the midpoints of a fine grid of its square
    # root, where it has no pole.
    step = (math.sqrt(b) - math.sqrt(a)) / 10**6
    x = math.sqrt(a) + step * (np.arange(10**6) + 0.5)
    density = np.sqrt((b - x**2) * (x**2 - a)) / (np.pi * beta * x)
    assert density.sum() * step == pytest.approx(1, abs=1e-6)
    assert density[x < noise.noise_median(beta)].sum() * step == pytest.approx(0.5, abs=2e-6)


@pytest.mark.parametrize("shape", [(60, 60), (30, 200), (200, 30)])
def test_noise_stays_below_its_edge_but_comes_close(shape):
    rng = np.random.default_rng(0)
    s = Spectrum.of_values([1.0], shape)
    top = np.array([gaussian(s, rng).max() for _ in range(1000)])
    assert np.mean(top > noise.noise_edge(shape)) <= 0.005
    assert top.max() > 0.97 * noise.noise_edge(shape)
    assert noise.noise_edge(shape, sd=3.0) == pytest.approx(3 * noise.noise_edge(shape))
    large = tuple(10**6 * size for size in shape)
    asymptotic = math.sqrt(large[0]) + math.sqrt(large[1])
    assert noise.noise_edge(large) == pytest.approx(asymptotic, rel=1e-4)


@pytest.mark.parametrize(("shape", "x"), [((400, 400), 1.5), ((200, 800), 1.0), ((400, 400), 0.5)])
def test_a_planted_spike_shows_where_the_map_says(shape, x):
    rng = np.random.default_rng(1)
    unit = math.sqrt(max(shape))
    top = [np.linalg.norm(planted([x * unit], shape, rng), 2) / unit for _ in range(5)]
    assert np.mean(top) == pytest.approx(noise.seen_spike(x, noise.aspect(shape)), rel=0.02)


@pytest.mark.parametrize("beta", BETAS)
def test_the_spike_map_is_continuous_where_spikes_drown(beta):
    critical = beta**0.25
    at_edge = 1 + math.sqrt(beta)
    assert noise.seen_spike(critical * (1 + 1e-6), beta) == pytest.approx(at_edge, rel=1e-9)
    assert noise.seen_spike(critical * (1 - 1e-6), beta) == at_edge


@pytest.mark.parametrize(
    ("dtype", "kind"), [("float16", np.float16), ("float32", np.float32), ("float64", np.float64)]
)
def test_an_ulp_is_the_spacing_of_numpy(dtype, kind):
    rng = np.random.default_rng(2)
    x = np.concatenate([rng.standard_normal(1000) * 10.0 ** rng.uniform(-9, 3, 1000), [0, 1, 2]])
    x = x.astype(kind)
    expected = np.spacing(np.abs(x)).astype(np.float64)
    np.testing.assert_array_equal(noise.ulp(x.astype(np.float64), dtype), expected)


def test_an_ulp_of_bfloat16_is_the_step_to_the_next_stored_number():
    x = rounded(np.abs(np.random.default_rng(3).standard_normal(1000)), "bfloat16")
    step = noise.ulp(x, "bfloat16")
    np.testing.assert_array_equal(rounded(x + step, "bfloat16"), x + step)
    np.testing.assert_array_equal(rounded(x + 0.49 * step, "bfloat16"), x)
    with pytest.raises(WrongInput, match="Did you mean 'bfloat16'"):
        noise.ulp(x, "bfloat")


@pytest.mark.parametrize("name", RANKS)
@pytest.mark.parametrize("shape", [(32, 32), (80, 60), (40, 120)])
def test_pure_noise_has_a_rank_in_at_most_one_of_twenty_trials(name, shape):
    rng = np.random.default_rng(4)
    trials = [measure(name, decompose(Dense(rng.standard_normal(shape)))) for _ in range(200)]
    assert np.mean(np.array(trials) > 0) <= 0.05


@pytest.mark.parametrize("name", RANKS)
@pytest.mark.parametrize("shape", [(100, 100), (60, 200)])
def test_directions_planted_at_twice_the_edge_are_counted(name, shape):
    rng = np.random.default_rng(15)
    edge = noise.noise_edge(shape, 1e-3)
    for k in (1, 4, 12):
        dW = planted(np.linspace(2.5, 2, k) * edge, shape, rng, 1e-3)
        of = decompose(Dense(dW))
        assert measure(name, of) == k
        assert measure(name, decompose(Dense(1e9 * dW.T))) == k
        Q, P = (ortho_group.rvs(size, random_state=6) for size in shape)
        assert measure(name, decompose(Dense(Q @ dW @ P))) == k


def test_the_level_of_noise_is_read_again_without_what_stands_above_it():
    # 16 of 64 values are signal: the plain median would lie so high that the weakest are missed.
    rng = np.random.default_rng(7)
    shape = (64, 64)
    x = np.concatenate([np.full(15, 4.0), [0.8]]) * noise.noise_edge(shape)
    s = decompose(Dense(planted(x, shape, rng)))
    plain = np.median(s.values) / (8 * noise.noise_median(1.0))
    assert np.count_nonzero(s.values > noise.noise_edge(shape, plain)) == 15
    assert measure("marchenko_pastur_rank", s) == 16


@pytest.mark.parametrize("name", RANKS)
@pytest.mark.parametrize(
    ("s", "said"),
    [
        (Spectrum.of_values([2.0, 1.0], (90, 80), r=4), "product of factors"),
        (Spectrum.of_values(np.ones(80), (90, 80), r=80), "product of factors"),
        (Spectrum.of_values([2.0, 1.0], (90, 80)), "median singular value is 0"),
        (decompose(Dense(np.outer(np.arange(1, 41), np.arange(1, 51)))), "median .* is 0"),
        (Spectrum.of_values(np.ones(31)), "too few"),
    ],
)
def test_a_rank_above_noise_is_refused_where_there_is_no_bulk(name, s, said):
    with pytest.raises(Refused, match=said) as caught:
        measure(name, s)
    assert "\n" not in str(caught.value)


def test_a_spectrum_that_is_all_signal_is_refused_by_the_edge():
    with pytest.raises(Refused, match="over half"):
        measure("marchenko_pastur_rank", Spectrum.of_values(0.8 ** np.arange(100.0)))


def pareto(alpha, n, rng):
    """Singular values whose squares have density x^-alpha above 1."""
    return np.sqrt((1 - rng.random(n)) ** (-1 / (alpha - 1)))


def fit(s):
    sides = ("alpha", "D", "n_tail", "lognormal_R", "lognormal_p")
    return {side: measure("power_law", s, side=side) for side in sides}


@pytest.mark.parametrize("alpha", [1.8, 2.5, 4.5, 7.0])
def test_the_exponent_of_a_power_law_is_found_also_above_three(alpha):
    rng = np.random.default_rng(8)
    samples = [Spectrum.of_values(pareto(alpha, 1000, rng)) for _ in range(5)]
    found = [fit(s) for s in samples]
    for s, one in zip(samples, found, strict=True):
        x = s.values[: int(one["n_tail"])] ** 2
        # The maximum likelihood in closed form.
        assert one["alpha"] == pytest.approx(1 + len(x) / np.log(x / x[-1]).sum(), rel=1e-4)
        assert one["D"] < 1.36 / math.sqrt(len(x))
    # Its standard error of (alpha - 1) / sqrt(n), and what the choice of x_min adds.
    assert np.mean([one["alpha"] for one in found]) == pytest.approx(alpha, abs=0.08 * (alpha - 1))


def test_the_tail_starts_where_the_packages_own_search_starts_it():
    rng = np.random.default_rng(9)
    values = np.concatenate([pareto(2.5, 300, rng), rng.uniform(0.3, 1, 300)])
    found = fit(Spectrum.of_values(values))
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        own = package.Fit(values**2, parameter_ranges={"alpha": [1, None]}, verbose=0)
    assert found["n_tail"] == own.n_tail
    assert found["D"] == pytest.approx(own.power_law.D, rel=1e-9)
    assert found["alpha"] == pytest.approx(own.power_law.alpha, rel=1e-9)


def test_noise_is_told_from_a_power_law_by_its_distance_and_the_lognormal(capfd):
    rng = np.random.default_rng(10)
    with warnings.catch_warnings(), np.errstate(all="raise"):
        warnings.simplefilter("error")
        found = fit(decompose(Dense(rng.standard_normal((200, 150)))))
    assert found["n_tail"] >= 50
    assert found["lognormal_R"] < 0
    assert found["lognormal_p"] < 0.1
    assert found["D"] > 0.1
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("shape", [(384, 384), (200, 800)])
def test_the_lognormal_is_the_packages_where_its_search_ends(shape):
    rng = np.random.default_rng(12)
    s = decompose(Dense(rng.standard_normal(shape)))
    found = fit(s)
    x = s.values[: int(found["n_tail"])] ** 2
    own = package.Fit(x / x[-1], xmin=1.0, parameter_ranges={"alpha": [1, None]}, verbose=0)
    R, p = own.distribution_compare("power_law", "lognormal", normalized_ratio=True)
    assert found["lognormal_R"] == pytest.approx(R, rel=5e-3)
    assert found["lognormal_p"] == pytest.approx(p, rel=2e-2)


def test_of_a_tail_heavier_than_any_lognormal_the_power_law_is_the_best_one():
    # Logarithms whose standard deviation exceeds their mean: mu falls and sigma grows without end.
    log = np.concatenate([np.linspace(0, 0.2, 40), np.linspace(0.3, 8, 10)])
    found = fit(Spectrum.of_values(np.exp(log / 2)))
    assert found["n_tail"] == 50
    assert (found["lognormal_R"], found["lognormal_p"]) == (0.0, 1.0)


def test_a_power_law_depends_on_nothing_but_the_shape_of_the_spectrum():
    rng = np.random.default_rng(11)
    values = pareto(3.5, 200, rng)
    expected = fit(Spectrum.of_values(values))
    for c in (1e-150, 1e150):
        assert fit(Spectrum.of_values(c * values)) == pytest.approx(expected, rel=1e-6)
    padded = Spectrum.of_values([*values, *[1e-17] * 50], shape=(300, 280))
    assert fit(padded) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (np.arange(1.0, 50), "this spectrum has 49"),
        ([*np.arange(1.0, 50), *np.geomspace(1e-15, 1e-17, 20)], "this spectrum has 49"),
        (np.ones(60), "are equal"),
    ],
)
def test_a_power_law_is_refused_without_a_tail(values, said):
    with pytest.raises(Refused, match=said):
        measure("power_law", Spectrum.of_values(values))


@pytest.mark.parametrize("base_rounded", [True, False])
@pytest.mark.parametrize("size", [0.1, 0.01])
def test_the_rank_above_rounding_is_that_of_the_update_before_it_was_stored(base_rounded, size):
    rng = np.random.default_rng(12)
    before = rng.standard_normal((256, 300))
    W0 = rounded(before, "bfloat16")
    if not base_rounded:
        before = W0
    update = (
        size / 2 * Factored(rng.standard_normal((256, 4)), rng.standard_normal((4, 300))).dense()
    )
    dW = rounded(before + update, "bfloat16") - W0
    s = decompose(Dense(dW, "bfloat16"))
    assert math.isnan(measure("numerical_rank", s))
    assert measure("rank_above_rounding", s, W0=W0) == 4
    alone = decompose(Dense(dW - update, "bfloat16"))
    assert measure("rank_above_rounding", alone, W0=W0) == 0


def test_the_edge_of_rounding_holds_for_columns_of_unequal_size():
    rng = np.random.default_rng(13)
    W0 = rounded(rng.standard_normal((256, 256)) * np.exp(rng.standard_normal(256)), "float16")
    before = W0 + noise.ulp(W0, "float16") * rng.uniform(-0.5, 0.5, W0.shape)
    error = rounded(before * 1.5, "float16") - before * 1.5
    s = decompose(Dense(error, "float16"))
    assert measure("rank_above_rounding", s, W0=1.5 * W0) == 0
    equal = np.sqrt(np.mean(noise.ulp(1.5 * W0, "float16") ** 2) / 12) * 32
    assert s.values[0] > equal, "the edge of equal entries would have been passed"


def test_the_rank_above_rounding_needs_the_base_of_its_own_shape():
    with pytest.raises(WrongInput, match="W0 must have the update's shape"):
        measure("rank_above_rounding", Spectrum.of_values([1.0]), W0=np.ones((2, 2)))


def test_the_calibration_finds_counts_above_noise_right_and_its_page_says_so(tmp_path, monkeypatch):
    tiny = {"trials": 4, "shapes": ((48, 64),), "ranks": (1, 3), "ratios": (4.0, 0.5)}
    table = calibration.calibrate(**tiny)
    pd.testing.assert_frame_equal(table, calibration.calibrate(**tiny))
    assert not table.duplicated([*calibration.CELL, "measure"]).any()
    share = table.groupby(["signal_to_noise", "measure"])["recovered"].mean()
    for name in (*RANKS, "replicated_rank(left)", "replicated_rank(right)"):
        assert share[4.0, name] >= 0.9
        assert share[0.5, name] <= 0.5
    assert share[4.0, "effective_rank"] == share[4.0, "numerical_rank"] == 0
    equal, falling, never = calibration.advice(table)
    for said in (equal, falling):
        clear, drowned = said.split("; at 0.5 ")
        assert "`gavish_donoho_rank`" in clear
        assert drowned == "none."
    assert "`numerical_rank` 48" in never
    monkeypatch.setattr(calibration, "OUT", tmp_path)
    monkeypatch.setattr(calibration, "calibrate", lambda: table)
    calibration.main()
    assert pd.read_csv(tmp_path / "calibration.csv")["recovered"].tolist() == list(
        table["recovered"]
    )
    page = (tmp_path / "calibration.md").read_text()
    for said in (equal, falling, never):
        assert f"- {said}\n" in page
    rows = [line for line in page.splitlines() if line.startswith("| `numerical_rank`")]
    assert rows == ["| `numerical_rank` | 0 % (48) | 0 % (48) | 0 % (48) | 0 % (48) |"] * 2
