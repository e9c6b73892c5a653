from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom, binomtest, ttest_1samp

from flpriv.measures.intervals import bootstrap, bootstrap_mean, clopper_pearson, student


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (1, 10), (5, 10), (10, 10), (3, 1000), (0, 1), (1, 1)])
def test_clopper_pearson_is_scipys_exact_interval(successes: int, n: int) -> None:
    expected = binomtest(successes, n).proportion_ci(0.95, method="exact")
    assert clopper_pearson(successes, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_clopper_pearson_ends_where_the_tails_are_two_and_a_half_percent() -> None:
    low, high = clopper_pearson(7, 20)
    assert binom.sf(6, 20, low) == pytest.approx(0.025)
    assert binom.cdf(7, 20, high) == pytest.approx(0.025)


def test_clopper_pearson_takes_fractions_and_knows_nothing_of_no_trials() -> None:
    assert clopper_pearson(0, 0) == (0.0, 1.0)
    below, between, above = (clopper_pearson(k, 10) for k in (4, 4.5, 5))
    assert below[0] < between[0] < above[0]
    assert below[1] < between[1] < above[1]


def test_student_is_scipys_interval_over_repeats() -> None:
    values = [0.5, 0.6, 0.55, 0.7, 0.52]
    expected = ttest_1samp(values, 0).confidence_interval(0.95)
    assert student(values) == pytest.approx((expected.low, expected.high))
    assert student([0.5]) is None


def test_bootstrap_of_a_mean_comes_near_the_normal_interval() -> None:
    values = np.random.default_rng(0).normal(3, 2, 400)
    interval = bootstrap_mean(values, seed=1)
    assert interval is not None
    half = 1.96 * values.std() / 20
    assert interval == pytest.approx((values.mean() - half, values.mean() + half), abs=0.05)
    assert bootstrap_mean(values, seed=1) == interval
    assert bootstrap_mean(values, seed=2) != interval


def test_bootstrap_draws_whole_patients() -> None:
    values = np.repeat(np.random.default_rng(0).normal(size=30), 10)
    alone = bootstrap_mean(values, seed=0)
    together = bootstrap_mean(values, [str(i // 10) for i in range(300)], seed=0)
    assert alone is not None
    assert together is not None
    assert together[1] - together[0] > 2.5 * (alone[1] - alone[0])


def test_bootstrap_tells_nothing_from_one_patient_or_from_statistics_that_cannot_tell() -> None:
    assert bootstrap_mean([1.0, 2.0], ["a", "a"], seed=0) is None
    assert bootstrap(lambda rows: float("nan"), 10, seed=0) is None
    assert bootstrap_mean([], seed=0) is None
