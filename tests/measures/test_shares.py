from __future__ import annotations

import numpy as np
import pytest

from flpriv.measures.intervals import clopper_pearson
from flpriv.measures.shares import share_interval


@pytest.mark.parametrize("hits", [0, 1, 7, 20])
def test_with_one_image_a_patient_it_is_clopper_pearson(hits: int) -> None:
    found = np.arange(20) < hits
    assert share_interval(found, [f"p{i}" for i in range(20)]) == clopper_pearson(hits, 20)


@pytest.mark.parametrize("hits", [0, 10])
def test_all_or_nothing_counts_patients_not_images(hits: int) -> None:
    found = np.repeat(np.arange(10) < hits, 6)
    assert share_interval(found, [f"p{i // 6}" for i in range(60)]) == pytest.approx(clopper_pearson(hits, 10))


def test_copies_of_a_patients_image_tell_no_more_than_one() -> None:
    patients = np.random.default_rng(0).random(40) < 0.4
    low, high = share_interval(np.repeat(patients, 5), [f"p{i // 5}" for i in range(200)])
    once = clopper_pearson(int(patients.sum()), 40)
    assert (low, high) == pytest.approx(once, abs=0.02)
    naive = clopper_pearson(5 * int(patients.sum()), 200)
    assert high - low > 1.8 * (naive[1] - naive[0])


def test_the_interval_is_never_a_point_and_holds_the_share() -> None:
    for hits, groups in (
        ([True], ["a"]),
        ([False] * 9, ["a"] * 9),
        ([True] * 9, ["a"] * 8 + ["b"]),
        ([True, False] * 10, ["a"] * 10 + ["b"] * 10),
        ([True, False, False], ["a", "a", "b"]),
    ):
        low, high = share_interval(hits, groups)
        assert 0 <= low <= np.mean(hits) <= high <= 1
        assert high - low > 0.3
    assert share_interval([], []) == (0.0, 1.0)


def test_two_patients_never_tell_more_than_two() -> None:
    assert share_interval([True, False] * 10, ["a"] * 10 + ["b"] * 10) == pytest.approx(clopper_pearson(1, 2))


def test_order_and_names_of_patients_do_not_matter() -> None:
    rng = np.random.default_rng(1)
    found, groups = rng.random(60) < 0.5, rng.integers(12, size=60)
    mixed = rng.permutation(60)
    one = share_interval(found, [f"p{g}" for g in groups])
    assert share_interval(found[mixed], [f"x{11 - g}" for g in groups[mixed]]) == pytest.approx(one)


@pytest.mark.parametrize(("patients", "each", "alike"), [(10, 8, 0.9), (30, 4, 0.5), (20, 6, 0.0)])
def test_it_covers_the_truth_where_images_of_a_patient_are_alike(patients: int, each: int, alike: float) -> None:
    """Patients differ in their share (beta, intraclass correlation ``alike``), for which the exact interval is too narrow."""
    rng, truth, covered, naive, draws = np.random.default_rng(0), 0.3, 0, 0, 400
    groups = [f"p{i // each}" for i in range(patients * each)]
    for _ in range(draws):
        spread = (1 - alike) / alike if alike else 1e9
        own = rng.beta(truth * spread, (1 - truth) * spread, patients)
        found = rng.random(patients * each) < np.repeat(own, each)
        low, high = share_interval(found, groups)
        covered += low <= truth <= high
        low, high = clopper_pearson(int(found.sum()), found.size)
        naive += low <= truth <= high
    assert covered / draws >= 0.93
    if alike:
        assert naive / draws < 0.85
