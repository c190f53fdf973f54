"""Intervals cover and tests err as often as they say, at the numbers of units of their use."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats as reference

from lora_lab.registry import WrongInput
from lora_lab.stats import (
    benjamini_hochberg,
    blocked_slope,
    bootstrap,
    equivalence,
    fit_curve,
    holm,
    paired,
    permutation,
    power,
    rate_interval,
    slope,
    t_interval,
    units_needed,
)

TRIALS = 2000


def share(trial: Callable[[np.random.Generator], bool], trials: int = TRIALS) -> float:
    """How often a trial holds."""
    rng = np.random.default_rng(20)
    return sum(bool(trial(rng)) for _ in range(trials)) / trials


def covers(found: tuple[float, float, float] | object, truth: float) -> bool:
    _, low, high = found  # type: ignore[misc]
    return low <= truth <= high


# ---- coverage: 95 % within what 2,000 trials can tell, and inside 93 to 97 % ---------------------


# 3 and 5 seeds, 8 problems, the 12 tasks of claim C4.
@pytest.mark.parametrize("n", [3, 5, 8, 10, 12])
def test_t_intervals_over_seeds_cover(n: int) -> None:
    found = share(lambda rng: covers(t_interval(rng.normal(0.8, 0.02, n)), 0.8))
    assert 0.93 <= found <= 0.97


@pytest.mark.parametrize("n", [3, 5])
def test_intervals_of_paired_differences_cover(n: int) -> None:
    def trial(rng: np.random.Generator) -> bool:
        seeds = rng.normal(0, 0.05, n)  # what the members of a pair share
        one, other = (seeds + rng.normal(m, 0.01, n) for m in (0.8, 0.79))
        d = paired(one, other)
        return d.low <= 0.01 <= d.high

    assert 0.93 <= share(trial) <= 0.97


@pytest.mark.parametrize("n", [200, pytest.param(1000, marks=pytest.mark.long)])
def test_bootstrap_intervals_over_examples_cover(n: int) -> None:
    def trial(rng: np.random.Generator) -> bool:
        right = rng.random(n) < 0.8
        return covers(bootstrap(right, seed=int(rng.integers(2**31)), resamples=999), 0.8)

    assert 0.93 <= share(trial, 600) <= 0.97


def test_bootstrap_intervals_over_36_layers_cover() -> None:
    def trial(rng: np.random.Generator) -> bool:
        layers = rng.gamma(4.0, 0.25, 36)
        return covers(bootstrap(layers, seed=int(rng.integers(2**31)), resamples=999), 1.0)

    assert 0.93 <= share(trial, 600) <= 0.97


@pytest.mark.parametrize("p", [0.5, 0.9, 0.95])
def test_intervals_of_a_rate_cover(p: float) -> None:
    # Exactly, over all outcomes of 40 trials, not by simulation; a rate jumps from count to count.
    hits = np.arange(41)
    chance = reference.binom.pmf(hits, 40, p)
    inside = [covers(rate_interval(int(h), 40), p) for h in hits]
    assert 0.92 <= float(chance[inside].sum()) <= 0.98


@pytest.mark.parametrize("trials", [12, 40])  # the tasks of claim C4, the problems of a benchmark
def test_intervals_of_a_rate_cover_all_rates_between_them(trials: int) -> None:
    # No interval of a count covers every rate equally often.
    hits = np.arange(trials + 1)
    found = [rate_interval(int(h), trials) for h in hits]
    rates = np.linspace(0.05, 0.95, 91)
    chances = np.array(
        [
            reference.binom.pmf(hits, trials, p)[[covers(one, p) for one in found]].sum()
            for p in rates
        ]
    )
    assert 0.93 <= chances.mean() <= 0.97
    assert chances.min() > 0.9


def test_slopes_with_intervals_cover() -> None:
    x = np.log([1, 2, 4, 8, 16, 32, 64])

    def trial(rng: np.random.Generator) -> bool:
        fit = slope(x, -0.5 * x + rng.normal(0, 0.1, len(x)))
        return fit.low <= -0.5 <= fit.high

    assert 0.93 <= share(trial) <= 0.97


# Values of x times blocks: starts of claim E1, widths of D10, pairs of tasks in F3.
@pytest.mark.parametrize(("points", "blocks"), [(4, 3), (3, 5), (6, 5)])
def test_slopes_within_blocks_cover_whatever_the_blocks_levels(points: int, blocks: int) -> None:
    x = np.tile(np.log(4.0) * np.arange(points), blocks)
    block = np.repeat(np.arange(blocks), points)

    def trial(rng: np.random.Generator) -> bool:
        levels = np.repeat(rng.normal(0, 5, blocks), points)
        fit = blocked_slope(x, levels + 0.3 * x + rng.normal(0, 0.1, len(x)), list(block))
        return fit.low <= 0.3 <= fit.high

    assert 0.93 <= share(trial) <= 0.97


def test_parameters_of_a_fitted_curve_are_covered() -> None:
    x = np.repeat([1.0, 2, 4, 8, 16, 32, 64], 5)

    def trial(rng: np.random.Generator) -> bool:
        y = 0.8 - 0.05 / x + rng.normal(0, 0.01, len(x))
        found = fit_curve(lambda x, a, b: a - b / x, x, y, {"a": 0.5, "b": 0.1})
        return covers(found.parameters["b"], 0.05)

    assert 0.93 <= share(trial, 600) <= 0.97


# ---- error rates ---------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [3, 5])
def test_a_paired_t_test_errs_in_5_of_100(n: int) -> None:
    rate = share(lambda rng: paired(rng.normal(0, 1, n), 0.0).p < 0.05)
    assert 0.035 <= rate <= 0.065


@pytest.mark.parametrize("n", [3, 5])
def test_equivalence_errs_in_at_most_5_of_100_at_the_margin(n: int) -> None:
    rate = share(lambda rng: equivalence(rng.normal(0.02, 0.005, n), 0.0, 0.02) < 0.05)
    assert 0.03 <= rate <= 0.065


def test_a_permutation_test_errs_in_5_of_100() -> None:
    rate = share(lambda rng: permutation(rng.normal(0, 1, 36)) < 0.05, 200)
    assert rate <= 0.09


def test_holm_keeps_the_chance_of_any_error() -> None:
    def trial(rng: np.random.Generator) -> bool:
        return bool((holm(rng.random(36)) < 0.05).any())

    assert share(trial) <= 0.065


def test_power_is_the_share_of_tests_that_see_the_effect() -> None:
    said = power(effect=0.02, sd=0.015, n=5)
    seen = share(lambda rng: paired(rng.normal(0.02, 0.015, 5)).p < 0.05)
    assert seen == pytest.approx(said, abs=0.03)


# ---- closed forms --------------------------------------------------------------------------------


def test_a_paired_test_is_scipys() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(2, 7))
    found, wanted = paired(one, other), reference.ttest_rel(one, other)
    assert found.p == pytest.approx(wanted.pvalue, rel=1e-12)
    interval = wanted.confidence_interval()
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-12)


def test_equivalence_agrees_with_the_90_percent_interval() -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        d = rng.normal(0.01, 0.01, 5)
        narrow = paired(d, level=0.9)
        inside = narrow.low > -0.02 and narrow.high < 0.02
        assert (equivalence(d, 0.0, 0.02) < 0.05) == inside


def test_equal_pairs_differ_in_nothing_and_one_pair_says_nothing() -> None:
    assert paired([0.5, 0.5], [0.5, 0.5]).p == 1.0
    assert equivalence([0.5, 0.5], [0.5, 0.5], 0.01) == 0.0
    assert math.isnan(paired([0.5], [0.4]).p)


def test_equal_values_have_a_slope_of_zero_without_doubt() -> None:
    fit = slope([0.0, 1.0, 2.0], [5.0, 5.0, 5.0])
    assert (fit.slope, fit.low, fit.high) == (0.0, 0.0, 0.0)


def test_the_number_of_units_is_the_first_that_suffices() -> None:
    n = units_needed(effect=0.02, sd=0.015)
    assert power(0.02, 0.015, n) >= 0.8 > power(0.02, 0.015, n - 1)


def test_the_curve_that_made_the_points_has_the_lower_criterion() -> None:
    rng = np.random.default_rng(2)
    x = np.repeat([1.0, 2, 4, 8, 16, 32, 64], 3)
    y = 0.8 - 0.3 * x**-0.5 + rng.normal(0, 0.003, len(x))
    power_law = fit_curve(lambda x, a, b, c: a - b * x**-c, x, y, {"a": 0.8, "b": 0.1, "c": 1.0})
    logarithm = fit_curve(lambda x, a, b: a + b * np.log(x), x, y, {"a": 0.5, "b": 0.1})
    assert power_law.aic < logarithm.aic - 2
    assert covers(power_law.parameters["c"], 0.5)


def test_adjusted_p_are_scipys_and_statsmodels_textbook_values() -> None:
    p = [0.001, 0.008, 0.039, 0.041, 0.042, 0.06]
    assert holm(p) == pytest.approx([0.006, 0.04, 0.156, 0.156, 0.156, 0.156])
    assert benjamini_hochberg(p) == pytest.approx([0.006, 0.024, 0.0504, 0.0504, 0.0504, 0.06])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap(range(5)), "at least 20 units; got 5"),
        (lambda: permutation([1.0] * 5), "at least 20 units; got 5"),
        (lambda: paired([1.0, 2.0], [1.0, 2.0, 3.0]), "one length"),
        (lambda: paired([]), "at least one pair"),
        (lambda: blocked_slope([0, 1], [0, 1], "ab"), "at least 4 points; got 2"),
        (lambda: blocked_slope([1, 1, 2, 2], [0, 1, 2, 3], "aabb"), "vary inside a block"),
        (lambda: units_needed(1e-6, 1.0), "more than 10000 pairs"),
        (lambda: fit_curve(lambda x, a: a + x, [1, 2], [1, 2], {"a": 0.0}), "at least 4 points"),
    ],
)
def test_too_little_is_refused_in_one_line(call: Callable[[], object], message: str) -> None:
    with pytest.raises(WrongInput, match=message):
        call()
