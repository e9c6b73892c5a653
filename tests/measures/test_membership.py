from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import balanced_accuracy_score, roc_auc_score, roc_curve

from flpriv.claim import Goal, Membership
from flpriv.errors import ClaimError
from flpriv.finding import Finding
from flpriv.measures import measure
from flpriv.measures.intervals import clopper_pearson
from flpriv.measures.membership import _low_fpr, auc, auc_interval, null_error, roc, tpr_at
from flpriv.records import Records
from flpriv.truth import Claimed, Truth

judge = partial(measure, attack="a", name="b", goal=Goal.MEMBERSHIP, setting="none", defense="none")

scored = st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=60).filter(
    lambda rows: len({member for _, member in rows}) == 2
)


@settings(deadline=None)
@given(scored)
def test_auc_and_roc_with_ties_are_sklearns(rows: list[tuple[int, bool]]) -> None:
    scores, members = np.array([s for s, _ in rows], dtype=float), np.array([m for _, m in rows])
    curve = roc(scores, members)
    assert auc(scores, members) == pytest.approx(roc_auc_score(members, scores), abs=1e-12)
    assert np.trapezoid(curve.tpr, curve.fpr) == pytest.approx(auc(scores, members), abs=1e-12)
    fpr, tpr, _ = roc_curve(members, scores, drop_intermediate=False)
    assert np.allclose(curve.fpr, fpr)
    assert np.allclose(curve.tpr, tpr)


@settings(deadline=None)
@given(scored)
def test_roc_goes_from_corner_to_corner_and_never_back(rows: list[tuple[int, bool]]) -> None:
    scores, members = [s for s, _ in rows], [m for _, m in rows]
    curve = roc(scores, members)
    assert (curve.fpr[0], curve.tpr[0], curve.fpr[-1], curve.tpr[-1]) == (0, 0, 1, 1)
    assert (np.diff(curve.fpr) >= 0).all()
    assert (np.diff(curve.tpr) >= 0).all()
    assert auc(scores, members) == pytest.approx(1 - auc([-s for s in scores], members), abs=1e-12)
    low, high = auc_interval(scores, members)
    assert 0 <= low <= auc(scores, members) <= high <= 1


def test_forty_percent_ties_leave_the_auc_sklearns() -> None:
    rng = np.random.default_rng(0)
    members = rng.random(5000) < 0.5
    scores = rng.normal(size=5000) + 0.4 * members
    scores[rng.random(5000) < 0.4] = 0.25
    assert auc(scores, members) == pytest.approx(roc_auc_score(members, scores), abs=1e-12)


def test_all_equal_scores_are_one_diagonal() -> None:
    curve = roc([1.0] * 6, [True, False] * 3)
    assert curve.fpr.tolist() == [0, 1]
    assert curve.tpr.tolist() == [0, 1]
    assert tpr_at(curve, 0.01) == 0


def test_infinite_scores_tie_like_others() -> None:
    scores, members = [-np.inf, -np.inf, 0.0, np.inf], [True, False, False, True]
    assert auc(scores, members) == pytest.approx(0.625)
    assert np.trapezoid(roc(scores, members).tpr, roc(scores, members).fpr) == pytest.approx(0.625)


def test_delong_interval_covers_the_true_area() -> None:
    rng = np.random.default_rng(3)
    truth, covered = 0.7602, 0  # Phi(1 / sqrt 2)
    for _ in range(300):
        scores = np.concatenate([rng.normal(1, 1, 60), rng.normal(0, 1, 80)])
        low, high = auc_interval(scores, np.arange(140) < 60)
        covered += low <= truth <= high
    assert 0.91 <= covered / 300 <= 0.98


def test_delong_variance_is_that_of_the_paper() -> None:
    """The structural components written out as in DeLong et al. 1988."""
    x, y = np.array([3.0, 1.0, 2.0, 5.0]), np.array([0.0, 1.0, 4.0])
    kernel = (x[:, None] > y[None]) + 0.5 * (x[:, None] == y[None])
    variance = np.var(kernel.mean(1), ddof=1) / 4 + np.var(kernel.mean(0), ddof=1) / 3
    low, _high = auc_interval(np.concatenate([x, y]), [True] * 4 + [False] * 3, level=0.5)
    assert kernel.mean() - low == pytest.approx(0.6744897501960817 * np.sqrt(variance))


def test_images_of_one_patient_do_not_count_as_independent() -> None:
    rng = np.random.default_rng(1)
    scores, members = np.repeat(rng.normal(size=60), 5), np.repeat(np.arange(60) < 30, 5)
    patients = [str(i // 5) for i in range(300)]
    apart, together = auc_interval(scores, members), auc_interval(scores, members, patients)
    assert together[1] - together[0] > 2 * (apart[1] - apart[0])
    one_each = auc_interval(scores[::5], members[::5])
    assert together == pytest.approx(one_each, abs=1e-9)


def test_a_perfect_separation_still_has_an_interval() -> None:
    low, high = auc_interval([1.0, 2.0, 3.0, -1.0, -2.0], [True, True, True, False, False])
    assert (low, high) == clopper_pearson(2, 2)


def test_null_error_is_the_spread_of_guesses() -> None:
    assert [round(null_error(n, n), 3) for n in (100, 500, 1000)] == [0.041, 0.018, 0.013]
    rng = np.random.default_rng(0)
    areas = [auc(rng.normal(size=150), np.arange(150) < 50) for _ in range(500)]
    assert np.std(areas) == pytest.approx(null_error(50, 100), rel=0.1)


def truth_of(members: NDArray[np.bool_], sites: list[str], patients: tuple[str, ...] = ()) -> Truth:
    n = len(members)
    records = Records(
        images=torch.zeros(n, 1, 2, 2),
        labels=torch.zeros(n, dtype=torch.long),
        patients=patients or tuple(str(i) for i in range(n)),
        attributes={"site": tuple(sites)},
    )
    return Truth(members=torch.from_numpy(members), candidates=records, site_of={7: "a", 8: "b"})


def scenario(n: int = 400) -> tuple[Truth, NDArray[np.float64]]:
    rng = np.random.default_rng(0)
    members = np.arange(n) % 2 == 0
    sites = ["a" if i % 4 < 2 else "b" for i in range(n)]
    return truth_of(members, sites), rng.normal(size=n) + members


def metrics(finding: Finding) -> dict[str, Any]:
    return {metric.name: metric for metric in finding.metrics}


def test_finding_over_the_federation_then_per_site() -> None:
    truth, scores = scenario()
    overall, a, b = judge([Membership(scores=torch.from_numpy(scores))], truth)
    assert (overall.site, a.site, b.site) == ("", "a", "b")
    assert (overall.attack, overall.name, overall.setting) == ("a", "b", "none")
    head = overall.headline
    assert head is not None
    assert truth.members is not None
    members = truth.members.numpy()
    assert head.value == pytest.approx(roc_auc_score(members, scores))
    assert (head.null, head.null_name, head.n) == (0.5, "chance", 400)
    assert head.low is not None
    assert head.high is not None
    assert 0.5 < head.low < float(head.value or 0) < head.high
    here = np.arange(400) % 4 < 2
    assert a.headline is not None
    assert a.headline.value == pytest.approx(roc_auc_score(members[here], scores[here]))
    thresholds = np.unique(scores)
    best = max(balanced_accuracy_score(members, scores >= t) for t in thresholds)
    assert metrics(overall)["balanced accuracy"].value == pytest.approx(best)
    assert overall.roc is not None


def test_low_false_positive_rates_the_sample_cannot_resolve_read_not_available() -> None:
    truth, scores = scenario(400)
    found = metrics(judge([Membership(scores=torch.from_numpy(scores))], truth)[0])
    assert found["TPR at 0.1 % FPR"].value is None
    assert found["TPR at 0.1 % FPR"].note == "needs 1000 non-members, there are 200"
    one = found["TPR at 1 % FPR"]
    assert (one.low, one.high) == clopper_pearson(round(one.value * 200), 200)
    assert one.null == 0.01
    truth, scores = scenario(2000)
    found = metrics(judge([Membership(scores=torch.from_numpy(scores))], truth)[0])
    assert found["TPR at 0.1 % FPR"].value is not None
    truth, scores = scenario(198)
    found = metrics(judge([Membership(scores=torch.from_numpy(scores))], truth)[0])
    assert found["TPR at 1 % FPR"].value is None


def test_true_positive_rate_counts_only_thresholds_within_the_false_positive_rate() -> None:
    members = np.array([True] * 100 + [False] * 100)
    scores = np.concatenate([np.full(30, 9.0), np.full(70, 1.0), [9.5], np.full(99, 0.0)])
    assert tpr_at(roc(scores, members), 0.01) == 1.0
    scores[101] = 5.0
    assert tpr_at(roc(scores, members), 0.01) == pytest.approx(0.3)


def test_a_site_is_scored_by_its_own_node_and_the_federation_by_the_highest_standardised_node() -> None:
    truth, scores = scenario()
    noise = np.random.default_rng(5).normal(size=400)
    here = np.array([i % 4 < 2 for i in range(400)])
    node_a = Membership(scores=torch.from_numpy(np.where(here, scores * 100, noise * 100)), node=7)
    node_b = Membership(scores=torch.from_numpy(np.where(here, noise, scores)), node=8)
    overall, a, b = judge([node_a, node_b], truth)
    assert truth.members is not None
    members = truth.members.numpy()
    assert a.headline is not None
    assert b.headline is not None
    assert overall.headline is not None
    assert a.headline.value == pytest.approx(roc_auc_score(members[here], scores[here]))
    assert b.headline.value == pytest.approx(roc_auc_score(members[~here], scores[~here]))
    standard = [(s - s.mean()) / s.std() for s in (node_a.scores.numpy(), node_b.scores.numpy())]
    assert overall.headline.value == pytest.approx(roc_auc_score(members, np.maximum(*standard)))
    given, *_ = judge([node_a, Membership(scores=torch.from_numpy(noise)), node_b], truth)
    assert given.headline is not None
    assert given.headline.value == pytest.approx(roc_auc_score(members, noise))


def test_telling_sites_apart_is_not_taken_for_telling_members_at_a_site() -> None:
    members = np.array([True, False] * 100)
    sites = ["a"] * 100 + ["b"] * 100
    score = torch.tensor([1.0] * 100 + [0.0] * 100)
    _, a, b = judge([Membership(scores=score, node=7), Membership(scores=1 - score, node=8)], truth_of(members, sites))
    assert a.headline is not None
    assert b.headline is not None
    assert a.headline.value == b.headline.value == 0.5


def test_shuffled_membership_is_at_chance() -> None:
    truth, scores = scenario(1000)
    inside = 0
    for seed in range(40):
        shuffled = np.random.default_rng(seed).permutation(scores)
        head = judge([Membership(scores=torch.from_numpy(shuffled))], truth)[0].headline
        assert head is not None
        assert head.value is not None
        inside += abs(head.value - 0.5) <= 2 * null_error(500, 500)
    assert inside >= 35


def test_a_site_without_non_members_has_no_auc_and_says_so() -> None:
    truth = truth_of(np.array([True, True, False, True]), ["a", "a", "b", "b"])
    _, a, _ = judge([Membership(scores=torch.arange(4.0))], truth)
    assert a.headline is not None
    assert a.headline.value is None
    assert a.headline.note == "2 members, 0 non-members"


def test_few_candidates_are_a_caveat() -> None:
    overall = judge([Membership(scores=torch.arange(20.0))], truth_of(np.array([True, False] * 10), ["a"] * 20))[0]
    assert "Only 10 members and 10 non-members" in overall.caveats[0]


def test_a_patients_images_do_not_count_as_independent_at_low_false_positive_rates() -> None:
    """Copies of an image are one image: ten each give the interval of a tenth of them, and the same rate."""
    rng = np.random.default_rng(0)
    few, members = rng.normal(size=400) + np.where(np.arange(400) % 2 == 0, 2, 0), np.arange(400) % 2 == 0
    one = metrics(judge([Membership(scores=torch.from_numpy(few))], truth_of(members, ["a"] * 400))[0])["TPR at 1 % FPR"]
    patients = tuple(str(i // 10) for i in range(4000))
    copied = truth_of(members.repeat(10), ["a"] * 4000, patients=patients)
    ten = metrics(judge([Membership(scores=torch.from_numpy(few.repeat(10)))], copied)[0])["TPR at 1 % FPR"]
    assert ten.value == one.value
    assert (ten.low, ten.high) == pytest.approx((one.low, one.high), abs=0.02)


@settings(deadline=None)
@given(scored, st.sampled_from([0.0, 0.01, 0.1, 0.3]))
def test_the_rate_reported_is_the_curves(rows: list[tuple[int, bool]], fpr: float) -> None:
    scores, members = np.array([s for s, _ in rows], dtype=float), np.array([m for _, m in rows])
    found = _low_fpr(scores, members, np.arange(len(rows)).astype(str), fpr, 1)
    assert found.value == pytest.approx(tpr_at(roc(scores, members), fpr))


def test_people_of_a_sex_or_age_band_are_judged_among_themselves() -> None:
    truth, noise = scenario(600)
    assert truth.candidates is not None
    sex = tuple("F" if i % 3 == 0 else "M" for i in range(600))
    age = tuple("" if i % 5 == 0 else str(30 + 10 * (i % 4)) for i in range(600))
    known = replace(truth.candidates, attributes={**truth.candidates.attributes, "sex": sex, "age": age})
    members = np.arange(600) % 2 == 0
    scores = noise + 3 * (np.array(sex) == "F") * members
    overall, *others = judge([Membership(scores=torch.from_numpy(scores))], replace(truth, candidates=known))
    groups = {(group.attribute, group.value): group for group in overall.groups}
    assert list(groups) == [("sex", "F"), ("sex", "M"), ("age", "0-39"), ("age", "40-59"), ("age", "60-79")]
    women = np.array(sex) == "F"
    assert groups["sex", "F"].auc.value == pytest.approx(roc_auc_score(members[women], scores[women]))
    assert (groups["sex", "F"].auc.low or 0) > (groups["sex", "M"].auc.high or 1)
    assert (groups["sex", "F"].members, groups["sex", "F"].others) == (100, 100)
    assert groups["sex", "F"].strict.value is not None
    assert all(not finding.groups for finding in others)


@pytest.mark.parametrize(("lift", "doubted"), [(0.1, False), (2.0, True)])
def test_a_claimed_epsilon_caps_the_auc(lift: float, doubted: bool) -> None:
    """A Gaussian mechanism of ε = 3 at δ = 1e-5 has a cap of .694; the weakest claim counts, where all sites claim one."""
    truth, _ = scenario(1000)
    rng = np.random.default_rng(1)
    scores = torch.from_numpy(rng.normal(size=1000) + lift * (np.arange(1000) % 2 == 0))
    claimed = {"a": Claimed(epsilon=1.0, delta=1e-5), "b": Claimed(epsilon=3.0, delta=1e-5)}
    overall = judge([Membership(scores=scores)], replace(truth, claimed=claimed))[0]
    assert metrics(overall)["largest AUC allowed"].value == pytest.approx(0.694, abs=0.002)
    assert any("doubt the claim" in caveat for caveat in overall.caveats) == doubted
    alone = judge([Membership(scores=scores)], replace(truth, claimed={"a": claimed["a"]}))[0]
    assert "largest AUC allowed" not in metrics(alone)


def test_a_group_too_small_reads_not_available() -> None:
    truth, scores = scenario(100)
    assert truth.candidates is not None
    sex = ("F",) * 12 + ("M",) * 88
    known = replace(truth.candidates, attributes={**truth.candidates.attributes, "sex": sex})
    women, men = judge([Membership(scores=torch.from_numpy(scores))], replace(truth, candidates=known))[0].groups
    assert women.auc.value is None
    assert women.strict.value is None
    assert men.auc.value is not None


@pytest.mark.parametrize(("share", "told"), [(0.5, False), (0.8, True)])
def test_a_label_that_tells_members_is_a_caveat(share: float, told: bool) -> None:
    members = np.array([True, False] * 200)
    truth = truth_of(members, ["a"] * 400)
    assert truth.candidates is not None
    rng = np.random.default_rng(0)
    labels = torch.from_numpy((rng.random(400) < np.where(members, share, 0.5)).astype(np.int64))
    overall = judge([Membership(scores=labels.double())], replace(truth, candidates=replace(truth.candidates, labels=labels)))[0]
    assert any("class shares" in caveat for caveat in overall.caveats) == told


@pytest.mark.parametrize(
    ("scores", "message"),
    [(torch.zeros(3), "scores for 4 candidates"), (torch.tensor([0.0, float("nan"), 1.0, 2.0]), "1 of 4 scores are NaN")],
)
def test_claims_that_do_not_fit_are_refused(scores: torch.Tensor, message: str) -> None:
    with pytest.raises(ClaimError, match=message):
        judge([Membership(scores=scores)], truth_of(np.array([True, False] * 2), ["a"] * 4))
    with pytest.raises(ClaimError, match="not known which"):
        judge([Membership(scores=torch.zeros(4))], Truth())
