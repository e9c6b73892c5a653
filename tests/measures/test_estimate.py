from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.metrics import mean_absolute_error, r2_score

from flpriv.claim import Estimate, Goal
from flpriv.errors import ClaimError
from flpriv.finding import Finding, Level
from flpriv.measures import measure
from flpriv.measures.estimate import R2, r2
from flpriv.records import Records
from flpriv.risk import judge, sentence
from flpriv.truth import Truth

findings = partial(measure, attack="a", name="age-regression", goal=Goal.ATTRIBUTE, setting="none", defense="none")
AGES = np.random.default_rng(0).integers(20, 90, 200)


def truth(*, members: int = 50) -> Truth:
    known = Records(
        images=torch.zeros(200, 1, 2, 2),
        labels=torch.zeros(200).long(),
        patients=tuple(str(i // 2) for i in range(200)),
        attributes={
            "site": tuple("ab"[i % 3 == 0] for i in range(200)),
            "age": tuple("" if i % 10 == 9 else str(age) for i, age in enumerate(AGES)),
        },
    )
    return Truth(candidates=known, members=torch.arange(200) < members)


def claim(noise: float, *, baseline: str = "", probe: str = "head", repeat: int = 0) -> Estimate:
    rng = np.random.default_rng(repeat + 7)
    values = torch.from_numpy(AGES + noise * rng.normal(size=200))
    return Estimate(attribute="age", values=values, probe=probe, baseline=baseline, repeat=repeat)


MEAN = Estimate(attribute="age", values=torch.full((200,), 55.0).double(), probe="mean", baseline="mean age")


def overall(*claims: Estimate, facts: Truth | None = None) -> Finding:
    return findings(claims, facts or truth())[0]


def test_r2_and_error_are_sklearns_on_held_out_records_that_tell_their_age() -> None:
    found = overall(claim(8), MEAN)
    rows = np.array([i for i in range(50, 200) if i % 10 != 9])
    said = claim(8).values.numpy()
    assert found.headline is not None
    assert found.headline.name == R2
    assert found.headline.n == len(rows)
    assert found.headline.value == pytest.approx(r2_score(AGES[rows], said[rows]))
    assert found.headline.null == pytest.approx(r2_score(AGES[rows], np.full(len(rows), 55.0)))
    error = next(metric for metric in found.metrics if metric.name == "mean absolute error")
    assert error.value == pytest.approx(mean_absolute_error(AGES[rows], said[rows]))
    assert found.headline.low is not None
    assert found.headline.high is not None
    assert found.headline.low < (found.headline.value or 0) < found.headline.high


def test_repeats_are_averaged_and_the_best_probe_and_baseline_stand_for_theirs() -> None:
    runs = [claim(8, repeat=i) for i in range(3)]
    found = overall(*runs, claim(60, probe="ridge regression"), MEAN, claim(15, baseline="pixel statistics"))
    rows = [i for i in range(50, 200) if i % 10 != 9]
    assert found.headline is not None
    assert found.headline.note == "head"
    assert found.headline.null_name == "pixel statistics"
    each = [r2_score(AGES[rows], run.values.numpy()[rows]) for run in runs]
    assert found.headline.value == pytest.approx(np.mean(each))


def test_levels_go_by_what_is_surely_beyond_the_baseline() -> None:
    good, level = judge(overall(claim(8), MEAN)), sentence([judge(overall(claim(8), MEAN))], "model-user")
    assert good.level is Level.HIGH
    assert "estimates ages with an R² of" in level[1]
    alike = overall(claim(15), claim(15, baseline="pixel statistics"))
    assert judge(alike).level is Level.NONE
    assert any("Not told apart" in caveat for caveat in alike.caveats)


def test_each_site_with_enough_records_has_a_finding() -> None:
    assert [finding.site for finding in findings([claim(8), MEAN], truth())] == ["", "a", "b"]


def test_few_held_out_records_are_a_caveat() -> None:
    assert any("Only 9 held-out records" in text for text in overall(claim(8), MEAN, facts=truth(members=190)).caveats)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ClaimError, match="give each a finite number"):
        overall(replace(claim(8), values=torch.zeros(3)))
    with pytest.raises(ClaimError, match="give each a finite number"):
        overall(replace(claim(8), values=torch.full((200,), float("nan"))))
    with pytest.raises(ClaimError, match="every claim is a baseline's"):
        overall(MEAN)
    with pytest.raises(ClaimError, match="not known of the candidates"):
        overall(replace(claim(8), attribute="weight"))
    with pytest.raises(ClaimError, match="several attributes"):
        overall(claim(8), replace(claim(8), attribute="weight"))
    facts = truth()
    assert facts.candidates is not None
    alike = replace(facts, candidates=replace(facts.candidates, attributes={"age": ("40",) * 200}))
    with pytest.raises(ClaimError, match="all alike or too few"):
        overall(claim(8), facts=alike)
    assert np.isnan(r2(np.ones(3), np.ones((1, 3))))
