"""What the tables say."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from flpriv.finding import Finding, Level, Metric, Verdict
from flpriv.report import tables


@pytest.mark.parametrize(
    ("metric", "text"),
    [
        (Metric(name="fraction at PSNR ≥ 30 dB", value=0.875), "88 %"),
        (Metric(name="accuracy", value=0.9996), "99.9 %"),
        (Metric(name="accuracy", value=1.0), "100 %"),
        (Metric(name="accuracy", value=0.0), "0 %"),
        (Metric(name="TPR at 1 % FPR", value=0.0123), "1.2 %"),
        (Metric(name="lift over the best baseline", value=-0.2), "−20 %"),
        (Metric(name="mean PSNR", value=31.24, unit="dB"), "31.2 dB"),
        (Metric(name="PSNR", value=math.inf, unit="dB"), "∞ dB"),
        (Metric(name="AUC", value=0.6534), "0.653"),
        (Metric(name="epsilon", value=12.34), "12.3"),
        (Metric(name="AUC", value=None), "n/a"),
        (Metric(name="AUC", value=math.nan), "n/a"),
    ],
)
def test_number(metric: Metric, text: str) -> None:
    assert tables.number(metric.value, metric).replace(tables.NO_BREAK, " ") == text


def test_interval_has_one_unit_and_is_empty_without_a_value() -> None:
    metric = Metric(name="accuracy", value=0.5, low=0.4, high=0.6)
    assert tables.interval(metric).replace(tables.NO_BREAK, " ") == "40 to 60 %"
    assert tables.interval(replace(metric, low=0.004)).replace(tables.NO_BREAK, " ") == "0.4 to 60.0 %"
    assert tables.interval(replace(metric, value=None)) == ""
    assert tables.interval(replace(metric, high=None)) == ""


def test_undefended_comes_first(verdict: Verdict) -> None:
    turned = replace(verdict, settings=verdict.settings[::-1])
    assert tables.defenses(turned)[0] == "none"
    assert set(tables.defenses(turned)) == {"none", "gaussian", "model-guard"}


def test_matrix_by_defense_shows_every_outcome(verdict: Verdict) -> None:
    matrix = tables.by_defense(verdict)
    cells = {(row.attack, column): cell for row in matrix.rows for column, cell in zip(matrix.columns, row.cells, strict=True)}
    assert cells["imprint", "none"] is verdict.findings[0]
    statuses = {key: cell.status for key, cell in cells.items() if cell is not None}
    assert statuses["imprint", "model-guard"] == "refused"
    assert statuses["inverting-gradients", "gaussian"] == "failed"
    assert statuses["source", "none"] == "not granted"
    assert cells["canaries", "none"] is None


def test_matrix_by_site_starts_with_all_sites(verdict: Verdict) -> None:
    matrix = tables.by_site(verdict)
    assert matrix.columns == ("", *(site.name for site in verdict.sites))
    assert [row.attack for row in matrix.rows] == ["imprint"]
    found = [cell.site for cell in matrix.rows[0].cells if cell is not None]
    assert found == list(matrix.columns)
    assert tables.by_site(verdict, "gaussian").rows == ()


def test_the_worst_site_stands_for_all_where_there_is_no_other(verdict: Verdict) -> None:
    only_sites = [finding for finding in verdict.findings if finding.site]
    (stands,) = tables.overall(only_sites)
    assert stands.level is Level.CRITICAL
    assert tables.overall(only_sites[::-1])[0].level is Level.CRITICAL


def test_lift_is_over_each_baseline_best_first(verdict: Verdict) -> None:
    confusion = next(finding.confusion for finding in verdict.findings if finding.confusion)
    first, *_ = found = tables.lifts(confusion)
    assert (first.name, first.accuracy) == ("pixel statistics", 0.55)
    assert first.lift == pytest.approx(0.242)
    assert [lift.accuracy for lift in found] == sorted(confusion.baselines.values(), reverse=True)


def test_utility_is_that_of_the_shared_federation(verdict: Verdict) -> None:
    active = verdict.findings[0]
    assert active.setting == "none--imprint"
    utility = tables.utility_of(verdict, active)
    assert utility is not None and utility.value == 0.86
    alone = replace(verdict, settings=tuple(s for s in verdict.settings if s.id != "none"))
    assert tables.utility_of(alone, active) is None


def test_what_is_out_of_reach_is_said_in_the_negative(verdict: Verdict) -> None:
    assert "does not know the labels of the records behind an update" in tables.out_of_reach(verdict)
    nothing = tables.out_of_reach(replace(verdict, adversary=()))
    assert {"does not see the final global model", "does not choose the model that clients receive"} < set(nothing)


def test_tidy_has_a_row_a_metric_and_keeps_failures(verdict: Verdict) -> None:
    frame = tables.tidy([verdict, verdict])
    assert tuple(frame.columns) == tables.COLUMNS
    one = frame[: len(frame) // 2]
    attacks = one[one.kind == "attack"]
    expected = sum(max(1, len(finding.metrics) or bool(finding.headline)) for finding in verdict.findings)
    assert len(attacks) == expected
    failed = attacks[attacks.status == "failed"].iloc[0]
    assert pd.isna(failed.metric) and failed.attack == "inverting-gradients"
    assert (attacks[attacks.headline == True].groupby(["attack", "setting", "site"]).size() == 1).all()  # noqa: E712
    unresolved = attacks[attacks.metric == "TPR at 0.1 % FPR"].iloc[0]
    assert pd.isna(unresolved.value) and unresolved.note.startswith("400 non-members")
    assert len(one[one.kind == "utility"]) == 2 * len(verdict.settings)
    assert one[one.kind == "claimed epsilon"].value.max() == pytest.approx(2.3)


def test_no_cell_is_a_formula(verdict: Verdict) -> None:
    frame = tables.tidy([verdict])
    texts = [value for column in frame.columns for value in frame[column] if isinstance(value, str)]
    assert "'=HYPERLINK(1)" in texts
    assert not [text for text in texts if text.startswith(("=", "+", "-", "@"))]


def test_json_holds_every_number_and_no_image(verdict: Verdict) -> None:
    text = tables.report_json([verdict])
    content: dict[str, Any] = json.loads(text)
    assert (content["format"], content["version"]) == ("flpriv-report", 1)
    findings = content["verdicts"][0]["findings"]
    assert len(findings) == len(verdict.findings)
    pairs = [pair for finding in findings for pair in finding["pairs"]]
    assert pairs and all(set(pair) == {"psnr", "ssim", "null_psnr", "null_ssim", "site", "rank", "rdlv"} for pair in pairs)
    curve = next(finding["roc"] for finding in findings if finding["roc"])
    assert (curve["fpr"][0], curve["tpr"][-1]) == (0.0, 1.0)
    confusion = next(finding["confusion"] for finding in findings if finding["confusion"])
    assert np.array(confusion["counts"]).sum() == 120
    assert json.loads(tables.report_json([verdict], redact_images=True))["images"] == "left out"


def test_json_never_holds_a_bare_nan(small: Verdict, verdict: Verdict) -> None:
    endless = Finding(
        attack="a",
        name="a",
        goal=verdict.findings[0].goal,
        setting="none",
        headline=Metric(name="PSNR", value=math.inf),
    )
    content = json.loads(tables.report_json([replace(small, findings=(endless,))]))
    assert content["verdicts"][0]["findings"][0]["headline"]["value"] == "inf"
