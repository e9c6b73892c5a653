"""Bounds hold as often as they say, reach what the formulas allow, and agree with other libraries."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from opacus.accountants.analysis import gdp
from scipy.stats import binom, binomtest, norm

from flpriv.measures.bounds import (
    LEAST,
    STEP,
    Cap,
    Rates,
    ceiling,
    chance,
    clopper_pearson_bound,
    counts,
    crossing,
    delta_of,
    epsilon_of,
    fixed,
    gdp_bound,
    guessed,
    mu_of,
    one_run,
    p_value,
    rates,
)

DELTA = 1e-5
Bools = NDArray[np.bool_]


def right_at(scores: NDArray[Any], included: Bools) -> dict[int, int]:
    """Right guesses by number of guesses, written out."""
    order, guess = guessed(scores)
    hits = [bool(included[canary]) == bool(said) for canary, said in zip(order, guess, strict=True)]
    return {r: sum(hits[:r]) for r in counts(len(scores))}


@pytest.mark.parametrize(("canaries", "most"), [(50, 2.8), (100, 3.5), (200, 4.2), (500, 5.1), (1000, 5.8)])
def test_ceilings_of_the_test(canaries: int, most: float) -> None:
    assert fixed(canaries, canaries, canaries, delta=DELTA) == pytest.approx(most, abs=0.05)
    assert most - 0.15 < ceiling(canaries, delta=DELTA) <= fixed(canaries, canaries, canaries, delta=0.0)


@pytest.mark.parametrize(("m", "r", "v", "epsilon"), [(20, 20, 15, 0.5), (100, 40, 33, 1.0), (100, 10, 0, 2.0), (5, 5, 5, 0.0)])
def test_the_p_value_is_the_formula(m: int, r: int, v: int, epsilon: float) -> None:
    q = math.exp(epsilon) / (1 + math.exp(epsilon))
    mass = [math.comb(r, k) * q**k * (1 - q) ** (r - k) for k in range(r + 1)]
    beta = sum(mass[v:])
    alpha = max((sum(mass[v - i : v]) / i for i in range(1, v + 1)), default=0.0)
    assert p_value(m, r, v, epsilon, 0.0) == pytest.approx(beta, rel=1e-9)
    assert p_value(m, r, v, epsilon, 1e-3) == pytest.approx(min(1, beta + 2 * m * 1e-3 * alpha), rel=1e-9)


def test_a_bound_is_where_the_p_value_crosses_the_level() -> None:
    bound = fixed(200, 100, 90, delta=DELTA)
    assert p_value(200, 100, 90, bound - 1e-6, DELTA) < 0.05 <= p_value(200, 100, 90, bound + 1e-6, DELTA)
    assert fixed(200, 100, 50, delta=DELTA) == 0.0


def test_shuffled_membership_shows_nothing_unless_the_best_count_is_taken_uncorrected() -> None:
    alarms, uncorrected = [], []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        included, scores = rng.random(200) < 0.5, rng.normal(size=200)
        alarms.append(one_run(scores, included, delta=DELTA) > 0)
        found = right_at(scores, included)
        uncorrected.append(min(p_value(200, r, v, 0.0, DELTA) for r, v in found.items()) < 0.05)
    assert sum(alarms) <= 5
    assert sum(uncorrected) > 5


@pytest.mark.parametrize(("epsilon", "canaries"), [(0.0, 50), (0.0, 500), (0.5, 100), (1.0, 60)])
def test_randomised_response_is_accused_at_most_as_often_as_the_level_says(epsilon: float, canaries: int) -> None:
    rng, trials, false = np.random.default_rng(3), 200, 0
    for _ in range(trials):
        included, truthful = rng.random(canaries) < 0.5, rng.random(canaries) < chance(epsilon)
        scores = np.where(truthful, included, ~included) + 0.1 * rng.random(canaries)
        false += one_run(scores, included, delta=DELTA) > epsilon
    assert binomtest(false, trials, 0.05, alternative="greater").pvalue > 0.01


def test_the_correction_costs_less_than_bonferronis() -> None:
    rng = np.random.default_rng(5)
    ours, theirs, halves = [], [], []
    for _ in range(10):
        included = rng.random(200) < 0.5
        scores = rng.normal(size=200) + 2 * included
        found = right_at(scores, included)
        ours.append(one_run(scores, included, delta=DELTA))
        theirs.append(max(fixed(200, r, v, delta=DELTA, confidence=1 - 0.05 / len(found)) for r, v in found.items()))
        halves.append(fixed(200, 100, found[100], delta=DELTA))
    assert np.mean(ours) > max(np.mean(theirs), np.mean(halves))


@pytest.mark.parametrize("epsilon", [0.0, 0.7, 2.0])
def test_the_correction_is_that_of_simulated_coins(epsilon: float) -> None:
    rng, q = np.random.default_rng(7), chance(epsilon)
    included = rng.random(60) < 0.5
    found = right_at(rng.normal(size=60) + 1.5 * included, included)
    grid = np.array(list(found))
    tails = binom.sf(np.cumsum(rng.random((40_000, 60)) < q, axis=1)[:, grid - 1] - 1, grid, q).min(1)
    seen = min(binom.sf(v - 1, r, q) for r, v in found.items())
    exact = crossing(tuple(found), list(found.values()), q)
    assert (tails <= seen * (1 + 1e-9)).mean() == pytest.approx(exact, abs=4 * math.sqrt(exact / 40_000))


def test_everything_up_to_the_bound_is_refuted_and_what_follows_is_not() -> None:
    rng = np.random.default_rng(7)
    included = rng.random(60) < 0.5
    scores = rng.normal(size=60) + 1.5 * included
    found, bound = right_at(scores, included), one_run(scores, included, delta=1e-4)
    assert bound > LEAST
    refuted = [
        crossing(tuple(found), list(found.values()), chance(epsilon)) < 0.05 - 60e-4
        for epsilon in np.arange(LEAST, bound + 1.5 * STEP, STEP)
    ]
    assert refuted == [True] * (len(refuted) - 1) + [False]


def test_too_many_canaries_for_delta_show_nothing() -> None:
    assert ceiling(600, delta=1e-4) == 0.0
    assert one_run(np.arange(600), np.arange(600) > 300, delta=1e-4) == 0.0


def test_guesses_come_from_both_ends() -> None:
    order, guess = guessed([0.1, 0.9, 0.5, 0.3, 0.7])
    assert order.tolist() == [1, 0, 4, 3, 2]
    assert guess.tolist() == [True, False, True, False, True]


def test_rates_are_exact_intervals_on_the_other_half() -> None:
    scores = np.concatenate([np.full(40, 2.0), np.full(40, 1.0)])
    included = scores > 1.5
    included[1], included[41] = False, True
    found = rates(scores, included, by="epsilon")
    assert rates(scores, included, by="mu") == found
    misses = binomtest(1, 20).proportion_ci(0.95, "exact").high
    assert (found.fpr, found.fnr) == pytest.approx((misses, misses))
    expected = math.log((1 - misses - DELTA) / misses)
    assert clopper_pearson_bound(found, delta=DELTA) == pytest.approx(expected)
    assert gdp_bound(found, delta=DELTA) == pytest.approx(gdp.eps_from_mu(mu=2 * norm.isf(misses), delta=DELTA), rel=1e-6)
    assert clopper_pearson_bound(Rates(fpr=0.9, fnr=0.9), delta=DELTA) == gdp_bound(Rates(fpr=0.9, fnr=0.9), delta=DELTA) == 0.0


def test_the_gaussian_bound_comes_near_a_gaussian_mechanism_from_below() -> None:
    rng = np.random.default_rng(1)
    included = rng.random(8_000) < 0.5
    found = gdp_bound(rates(rng.normal(size=8_000) + included, included, by="mu"), delta=DELTA)
    assert 0.8 * epsilon_of(1.0, delta=DELTA) < found < epsilon_of(1.0, delta=DELTA)


@pytest.mark.parametrize("mu", [0.1, 0.5, 1.0, 3.0, 6.0])
def test_gaussian_differential_privacy_agrees_with_opacus(mu: float) -> None:
    epsilon = epsilon_of(mu, delta=DELTA)
    assert epsilon == pytest.approx(gdp.eps_from_mu(mu=mu, delta=DELTA), rel=1e-6)
    assert delta_of(mu, epsilon) == pytest.approx(gdp.delta_eps_mu(eps=epsilon, mu=mu), rel=1e-6)
    assert mu_of(epsilon, delta=DELTA) == pytest.approx(mu, rel=1e-6)


@pytest.mark.parametrize(("epsilon", "auc"), [(1, 0.575), (3, 0.694), (8, 0.881)])
def test_what_a_claimed_epsilon_allows(epsilon: float, auc: float) -> None:
    cap = Cap.of(epsilon, delta=DELTA)
    assert cap.auc == pytest.approx(auc, abs=5e-4)
    rng = np.random.default_rng(0)
    inside, outside = rng.normal(size=200_000) + cap.mu, rng.normal(size=200_000)
    assert (inside > outside).mean() == pytest.approx(cap.auc, abs=0.004)
    assert (inside > np.quantile(outside, 0.99)).mean() == pytest.approx(cap.tpr(0.01), abs=0.01)
    assert Cap.of(0.0, delta=DELTA).auc == pytest.approx(0.5, abs=1e-4)
