"""Levels follow the cautious end of an interval; words follow levels."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flpriv.claim import Goal
from flpriv.finding import Event, Finding, Level, Metric, SettingResult
from flpriv.risk import caveats, judge, sentence


def finding(goal: Goal, value: float | None, **changes: object) -> Finding:
    metric = {k: changes.pop(k) for k in ("low", "high", "null") if k in changes}
    headline = Metric(name="AUC", value=value, null_name="chance", **metric)  # type: ignore[arg-type]
    return Finding(attack="a", name="a", goal=goal, setting="none", headline=headline, metrics=(headline,), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "null", "level"),
    [
        (1.0, 0.0, Level.CRITICAL),
        (0.5, 0.0, Level.CRITICAL),
        (0.2, 0.0, Level.HIGH),
        (0.05, 0.0, Level.MEDIUM),
        (0.0, 0.0, Level.NONE),
    ],
)
def test_reconstruction_levels(value: float, null: float, level: Level) -> None:
    assert judge(finding(Goal.RECONSTRUCTION, value, null=null)).level is level


def test_a_reconstruction_no_better_than_its_null_is_no_leak() -> None:
    assert judge(finding(Goal.RECONSTRUCTION, 0.64, null=0.64)).level is Level.NONE


def test_the_better_of_two_nulls_is_the_one_to_beat() -> None:
    bare = finding(Goal.RECONSTRUCTION, 0.3, null=0.1)
    assert judge(bare).level is Level.HIGH
    assert bare.headline is not None
    beaten = replace(bare.headline, second_null=0.3, second_null_name="mean public image")
    assert beaten.best_null == 0.3
    assert judge(replace(bare, headline=beaten)).level is Level.NONE
    assert Metric(name="AUC", value=0.6).best_null is None


@pytest.mark.parametrize(("low", "level"), [(0.48, Level.MEDIUM), (0.1, Level.LOW), (0.01, Level.NONE)])
def test_a_blurred_image_that_finds_its_patient_is_a_leak(low: float, level: Level) -> None:
    found = Metric(name="re-identification, own patient first of 90", value=0.5, low=low, null=0.01)
    bare = finding(Goal.RECONSTRUCTION, 0.0, null=0.0)
    assert judge(replace(bare, metrics=(*bare.metrics, found))).level is level


@pytest.mark.parametrize(
    ("low", "level"), [(0.72, Level.HIGH), (0.61, Level.MEDIUM), (0.51, Level.LOW), (0.49, Level.NONE), (0.5, Level.NONE)]
)
def test_membership_goes_by_the_lower_end(low: float, level: Level) -> None:
    assert judge(finding(Goal.MEMBERSHIP, 0.75, low=low, null=0.5)).level is level


@pytest.mark.parametrize(("low", "level"), [(0.75, Level.HIGH), (0.55, Level.MEDIUM), (0.42, Level.LOW), (0.40, Level.NONE)])
def test_attributes_go_by_the_lift_over_the_best_baseline(low: float, level: Level) -> None:
    assert judge(finding(Goal.ATTRIBUTE, 0.8, low=low, null=0.4)).level is level


def test_a_bound_above_the_claim_is_critical() -> None:
    assert judge(finding(Goal.PRIVACY_BOUND, 2.0, null=1.0)).level is Level.CRITICAL
    assert judge(finding(Goal.PRIVACY_BOUND, 0.0, null=1.0)).level is Level.NONE


def test_what_failed_or_cannot_be_resolved_is_unknown_never_none() -> None:
    assert judge(finding(Goal.MEMBERSHIP, None)).level is Level.UNKNOWN
    assert judge(finding(Goal.MEMBERSHIP, 0.9, status="failed")).level is Level.UNKNOWN
    assert judge(finding(Goal.MEMBERSHIP, 0.9, status="refused")).level is Level.NONE


def test_the_verdict_names_the_worst_undefended_attack_and_what_stopped_it() -> None:
    bad = judge(finding(Goal.RECONSTRUCTION, 0.9, null=0.0))
    stopped = judge(finding(Goal.RECONSTRUCTION, 0.0, null=0.0, defense="gaussian"))
    level, words = sentence([bad, stopped], "malicious-server")
    assert level is Level.CRITICAL
    assert "critical" in words
    assert "'gaussian'" in words


def test_of_attacks_at_one_level_the_verdict_names_the_one_that_got_most() -> None:
    some, all_of_it = (judge(finding(Goal.RECONSTRUCTION, value, null=0.0)) for value in (0.7, 1.0))
    for order in ([some, all_of_it], [all_of_it, some]):
        assert "rebuilds 1.00 of" in sentence(order, "malicious-server")[1]


def test_no_verdict_from_failed_attacks_alone() -> None:
    level, words = sentence([judge(finding(Goal.MEMBERSHIP, 0.9, status="failed"))], "model-user")
    assert level is Level.UNKNOWN
    assert "failed" in words


def test_caveats_name_inactive_defences_failures_and_lost_replies() -> None:
    setting = SettingResult(
        id="none", defense="none", trap="", recipe="", rounds=1, utility=(), events=(Event(round=1, who="a", what="lost"),)
    )
    found = caveats(
        [judge(finding(Goal.MEMBERSHIP, 0.9, status="failed", message="boom"))], [setting], same_as_undefended=["top-k"]
    )
    assert any("top-k" in line for line in found)
    assert any("boom" in line for line in found)
    assert any("1 reply was lost" in line for line in found)


def test_a_refusal_is_no_caveat() -> None:
    refused = (Event(round=1, who="a", what="refused: model-guard: no"),)
    setting = SettingResult(id="none", defense="none", trap="", recipe="", rounds=1, utility=(), events=refused)
    assert not caveats([], [setting])


def test_where_there_is_no_plain_federation_an_arrangement_alone_is_the_undefended_one() -> None:
    metric = Metric(name="AUC", value=0.8, low=0.75, high=0.85, n=100, null=0.5, null_name="chance")
    own = Finding(attack="a", name="a", goal=Goal.MEMBERSHIP, setting="iid", defense="iid", headline=metric, metrics=(metric,))
    weak = replace(metric, value=0.5, low=0.45, high=0.55)
    kept = replace(own, defense="iid+dp-sgd", setting="iid+dp-sgd", headline=weak, metrics=(weak,))
    level, text = sentence([judge(own), judge(kept)], "model-user")
    assert level is Level.HIGH
    assert "'iid+dp-sgd' brought this attack down" in text
