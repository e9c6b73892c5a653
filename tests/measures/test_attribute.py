from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import ttest_1samp
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score
from torch.nn.functional import one_hot

from flpriv.claim import Attribute, Goal
from flpriv.errors import ClaimError
from flpriv.finding import Finding
from flpriv.measures import measure
from flpriv.measures.intervals import clopper_pearson
from flpriv.records import Records
from flpriv.truth import Truth

judge = partial(measure, attack="a", name="b", goal=Goal.ATTRIBUTE, setting="none", defense="none")
SITES = ("a", "b", "c")


def known(values: list[str], *, attribute: str = "site", members: list[bool] | None = None, **columns: tuple[str, ...]) -> Truth:
    n = len(values)
    candidates = Records(
        images=torch.zeros(n, 1, 2, 2),
        labels=torch.zeros(n, dtype=torch.long),
        patients=columns.pop("patients", tuple(map(str, range(n)))),
        attributes={attribute: tuple(values), **columns},
    )
    return Truth(candidates=candidates, members=torch.tensor(members if members else [False] * n))


def guess(codes: Any, *, classes: tuple[str, ...] = SITES, attribute: str = "site", **about: Any) -> Attribute:
    rows = one_hot(torch.as_tensor(np.asarray(codes)), len(classes)).double()
    return Attribute(attribute=attribute, classes=classes, probabilities=rows, **{"probe": "head", **about})


def drawn(rate: float, *, n: int = 300, seed: int = 0) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    rng = np.random.default_rng(seed)
    true = rng.choice(3, size=n, p=[0.5, 0.3, 0.2])
    return true, np.where(rng.random(n) < rate, true, rng.integers(3, size=n))


def metrics(finding: Finding) -> dict[str, Any]:
    return {metric.name: metric for metric in finding.metrics}


def test_numbers_are_sklearns() -> None:
    true, codes = drawn(0.7)
    overall = judge([guess(codes)], known([SITES[i] for i in true]))[0]
    found = metrics(overall)
    assert found["accuracy"].value == pytest.approx(accuracy_score(true, codes))
    assert found["macro F1"].value == pytest.approx(f1_score(true, codes, average="macro"))
    assert found["weighted F1"].value == pytest.approx(f1_score(true, codes, average="weighted"))
    for name in ("macro F1", "weighted F1"):
        assert found[name].low < found[name].value < found[name].high
    assert overall.confusion is not None
    assert overall.confusion.classes == SITES
    assert (overall.confusion.counts == confusion_matrix(true, codes)).all()
    correct = int((true == codes).sum())
    assert (found["accuracy"].low, found["accuracy"].high) == pytest.approx(clopper_pearson(correct, 300))


def test_guesses_of_one_class_have_sklearns_f1() -> None:
    true, _ = drawn(1)
    overall = judge([guess(np.zeros(300, dtype=int))], known([SITES[i] for i in true]))[0]
    expected = f1_score(true, np.zeros(300), average="macro", zero_division=0)
    assert metrics(overall)["macro F1"].value == pytest.approx(expected)


def test_the_null_is_the_best_baseline_and_lift_is_the_difference() -> None:
    true, own = drawn(0.8)
    _, pixels = drawn(0.6, seed=1)
    pixels = np.where(pixels == drawn(0.6, seed=1)[0], true, pixels)
    claims = [guess(own), guess(pixels, baseline="pixel statistics"), guess(np.full(300, 2), baseline="untrained backbone")]
    overall = judge(claims, known([SITES[i] for i in true]))[0]
    head, lift = overall.headline, metrics(overall)["lift over the best baseline"]
    assert head is not None
    assert overall.confusion is not None
    assert head.null == pytest.approx((pixels == true).mean())
    assert head.null_name == "pixel statistics"
    assert lift.value == pytest.approx((own == true).mean() - (pixels == true).mean())
    assert lift.low < lift.value < lift.high
    assert overall.confusion.baselines == {
        "majority class": pytest.approx(np.bincount(true).max() / 300),
        "pixel statistics": pytest.approx((pixels == true).mean()),
        "untrained backbone": pytest.approx((true == 2).mean()),
    }


def test_a_signal_is_found_and_no_signal_stays_at_the_baseline() -> None:
    true, found = drawn(0.9)
    truth = known([SITES[i] for i in true])
    head = judge([guess(found)], truth)[0].headline
    assert head is not None
    assert head.low is not None
    assert head.null is not None
    assert head.low > head.null + 0.2
    nothing = judge([guess(np.random.default_rng(3).integers(3, size=300))], truth)[0]
    assert nothing.headline is not None
    assert nothing.headline.null_name == "majority class"
    assert nothing.headline.low is not None
    assert nothing.headline.null is not None
    assert nothing.headline.low < nothing.headline.null
    assert any("Not told apart from the baseline 'majority class'" in caveat for caveat in nothing.caveats)


def test_repeats_are_averaged_with_students_interval() -> None:
    true, _ = drawn(1)
    runs = [np.where(np.random.default_rng(seed).random(300) < 0.7, true, 0) for seed in range(5)]
    overall = judge([guess(run, repeat=i) for i, run in enumerate(runs)], known([SITES[i] for i in true]))[0]
    each = [float((run == true).mean()) for run in runs]
    found = metrics(overall)
    assert found["accuracy"].value == pytest.approx(np.mean(each))
    assert "mean over 5 repeats" in found["accuracy"].note
    expected = ttest_1samp(each, 0).confidence_interval(0.95)
    seeds = found["accuracy, trained model, head"]
    assert seeds.low == pytest.approx(expected.low)
    assert seeds.high == pytest.approx(expected.high)
    assert seeds.n == 5
    assert overall.confusion is not None
    assert overall.confusion.counts.sum() == 5 * 300


def test_an_interval_over_repeats_stays_within_what_accuracy_can_be() -> None:
    true = drawn(1)[0][:40]
    runs = [true, true, np.where(np.arange(40) < 12, 2 - true, true)]
    seeds = metrics(judge([guess(run, repeat=i) for i, run in enumerate(runs)], known([SITES[i] for i in true]))[0])
    found = seeds["accuracy, trained model, head"]
    assert found.high == 1
    assert 0 <= found.low < found.value


def test_each_set_of_features_is_represented_by_its_best_probe() -> None:
    true, good = drawn(0.9)
    zeros = np.full(300, 2)
    claims = [
        guess(zeros),
        guess(good, probe="logistic probe"),
        guess(zeros, baseline="untrained backbone"),
        guess(good, baseline="untrained backbone", probe="logistic probe"),
    ]
    head = judge(claims, known([SITES[i] for i in true]))[0].headline
    assert head is not None
    assert head.value == head.null == pytest.approx((good == true).mean())
    assert head.null_name == "untrained backbone"
    assert head.note.startswith("logistic probe")


def test_members_are_left_out_where_there_are_enough_others() -> None:
    true = [0, 1] * 40
    members = [i < 40 for i in range(80)]
    codes = np.array([c if m else 1 - c for c, m in zip(true, members, strict=True)])
    overall = judge([guess(codes, classes=("a", "b"))], known([SITES[i] for i in true], members=members))[0]
    assert overall.headline is not None
    assert (overall.headline.value, overall.headline.n) == (0, 40)
    few = judge([guess(codes, classes=("a", "b"))], known([SITES[i] for i in true], members=[i < 65 for i in range(80)]))[0]
    assert few.headline is not None
    assert few.headline.n == 80
    assert "Only 15 held-out records tell their site" in few.caveats[0]


def test_unknown_values_are_left_out_and_unseen_ones_are_wrong() -> None:
    values = ["F"] * 20 + ["M"] * 20 + [""] * 10 + ["X"] * 10
    codes = [0] * 20 + [1] * 20 + [0] * 20
    overall = judge([guess(codes, classes=("F", "M"), attribute="sex")], known(values, attribute="sex"))[0]
    assert overall.headline is not None
    assert overall.headline.value == pytest.approx(40 / 50)
    assert overall.headline.n == 50
    assert overall.confusion is not None
    assert overall.confusion.classes == ("F", "M", "X")
    assert overall.confusion.counts.tolist() == [[20, 0, 0], [0, 20, 0], [10, 0, 0]]
    assert "has seen no sex X" in overall.caveats[0]


def test_ages_are_compared_by_band() -> None:
    ages = ["12", "39", "40", "59.5", "60", "95"] * 5
    overall = judge(
        [guess([0, 0, 1, 1, 2, 2] * 5, classes=("0-39", "40-59", "60+"), attribute="age")], known(ages, attribute="age")
    )[0]
    assert overall.headline is not None
    assert overall.headline.value == 1


def test_at_a_site_the_site_is_scored_by_recall_and_sex_by_accuracy() -> None:
    true, own = drawn(0.7)
    overall, a, b, c = judge(
        [guess(own), guess(np.zeros(300, dtype=int), baseline="pixel statistics")],
        known([SITES[i] for i in true], site=tuple(SITES[i] for i in true)),
    )
    assert [f.site for f in (overall, a, b, c)] == ["", "a", "b", "c"]
    assert b.headline is not None
    assert b.headline.name == "recall"
    assert b.headline.value == pytest.approx((own == 1)[true == 1].mean())
    assert b.headline.null == pytest.approx((true == 1).mean())
    assert b.headline.null_name == "share of the site"
    assert a.headline is not None
    assert (a.headline.null, a.headline.null_name) == (1, "pixel statistics")
    sexes = ["F"] * 30 + ["M"] * 30
    truth = known(sexes, attribute="sex", site=("a",) * 40 + ("b",) * 20)
    _, a, b = judge([guess([0] * 35 + [1] * 25, classes=("F", "M"), attribute="sex")], truth)
    assert a.headline is not None
    assert a.headline.name == "accuracy"
    assert a.headline.value == pytest.approx(35 / 40)
    assert a.headline.null == pytest.approx(30 / 40)
    assert a.headline.null_name == "majority class"
    assert b.headline is not None
    assert b.headline.null == 1


def test_images_of_one_patient_do_not_count_as_independent() -> None:
    true, own = drawn(0.7, n=60)
    values = [SITES[i] for i in np.repeat(true, 5)]
    claims = [guess(np.repeat(own, 5))]
    apart = judge(claims, known(values))[0].headline
    together = judge(claims, known(values, patients=tuple(str(i // 5) for i in range(300))))[0].headline
    assert apart is not None
    assert together is not None
    assert together.low is not None
    assert apart.low is not None
    assert together.value == apart.value
    assert together.low < apart.low


def test_claims_that_do_not_fit_are_refused() -> None:
    truth = known(["a", "b", "c"] * 10)
    with pytest.raises(ClaimError, match="several attributes"):
        judge([guess([0] * 30), guess([0] * 30, attribute="sex")], truth)
    with pytest.raises(ClaimError, match=r"shape \(4, 3\), expected \(30, 3\)"):
        judge([guess([0] * 4)], truth)
    with pytest.raises(ClaimError, match="not known of the candidates"):
        judge([guess([0] * 30, attribute="sex")], truth)
    with pytest.raises(ClaimError, match="known of no candidate"):
        judge([guess([0] * 30)], known([""] * 30))
    with pytest.raises(ClaimError, match="every claim is a baseline's"):
        judge([guess([0] * 30, baseline="pixel statistics")], truth)
